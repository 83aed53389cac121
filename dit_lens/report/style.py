"""What all reports share: colours, figures that leave the caller's matplotlib alone, a console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ..pictures.style import INK
from ..storage import replacing, versions

DOT: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 3,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 0.6,
}
"""A mark on a coloured cell, of any colour."""
WRITTEN = "pictures and figures: "
"""Before the names of what was written."""
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def picture(path: Path, size: tuple[float, float], **axes: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, to be drawn in the `with` block and written at its end.

    It belongs to no pyplot session and is drawn in matplotlib's own style, whatever the caller has
    set; the caller's settings and backend stay as they are.

    Args:
        path: the file to write.
        size: width and height in inches.
        axes: how many and how they are laid out, as for matplotlib's `Figure.subplots`.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(**axes)
        with replacing(path) as part:
            figure.savefig(part, dpi=200, format="png", metadata=_made_with())


def _made_with() -> dict[str, str]:
    """For a picture's metadata; its checksums are PNG's own."""
    made = versions()
    return {"Software": ", ".join(f"{name} {made[name]}" for name in ("dit_lens", "torch"))}


def beside(stored: Path, kind: str, picture: str) -> Path:
    """Where a picture of a stored result goes: into its folder, and where the file has a name of
    its own, under that name too, so that no other result's picture is overwritten.

    Args:
        stored: the result's file.
        kind: the name that it usually has.
        picture: the name that its picture usually has.

    >>> beside(Path("a/gap.nc"), "gap.nc", "x.png").name
    'x.png'
    >>> beside(Path("a/mine.nc"), "gap.nc", "x.png").name
    'mine_x.png'
    """
    return stored.with_name(picture if stored.name == kind else f"{stored.stem}_{picture}")


def plain_console(width: int) -> Console:
    """A terminal that prints brackets as they stand; rich would take some for markup."""
    return Console(width=width, highlight=False, markup=False)


def files(console: Console, paths: Sequence[Path]) -> None:
    """Say which files were written."""
    written = ", ".join(map(str, paths))
    console.print(f"{WRITTEN}{written}", style="dim", soft_wrap=True)
