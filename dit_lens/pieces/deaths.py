"""Workers that die: how often that is borne."""

from __future__ import annotations

from .work import stopped

DEATHS = 3
"""A worker may die so often, for each there is, without a piece being finished meanwhile."""


class Deaths:
    """How often workers died since a piece was finished.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self.most, self.count, self.missing = DEATHS * workers, 0, 0

    def progress(self, missing: int) -> None:
        """Say how many pieces are waited for."""
        if missing != self.missing:
            self.missing, self.count = missing, 0

    def one(self, how: str) -> None:
        """Count one.

        Args:
            how: it died.

        Raises:
            InvalidState: if it was one too many.
        """
        self.count += 1
        if self.count > self.most:
            raise stopped(
                f"Workers died {self.count} times ({how}) and no piece was finished, as where "
                "memory gives out; expected fewer workers, or a smaller batch"
            )
