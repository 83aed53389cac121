"""Micro-batches: in which parts the items of a step go through the model.

The batch that a step is computed in is the run's; a part of it is what the model sees at once. An
item's answer does not depend on its part but for rounding (another shape may take another kernel),
so a run keeps how each of its steps was split, and what is recomputed is split alike: bit for bit.
Twins that are coupled go together. Out of memory, a part is halved and the run goes on so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DitLensError, InvalidValue
from ..model.pinned import sent

TEXT_AXES = ("text_token", "text_query")
"""Axes that are as long as the longest text of a batch, padding behind."""


class OutOfMemory(DitLensError, RuntimeError):
    """A part that can't be made smaller does not fit."""


@dataclass(frozen=True)
class Split:
    """How the items of one step went through the model.

    Attributes:
        parts: the positions of each part's items.
        size: how many items the step has.
        copied: whether the second half are copies of the first, as twins are before they part.
        edited: whether an edit that is not the run's own may have acted in the step.
        texts: how many text tokens each item's part had, with padding; none where no stream is a
            text's.
    """

    parts: tuple[tuple[int, ...], ...]
    size: int
    copied: bool = False
    edited: bool = False
    texts: tuple[int, ...] = ()

    @classmethod
    def of(cls, size: int, at_once: int | None, pairs: bool = False, copied: bool = False) -> Split:
        """In as few parts as hold at most so many items each, as equal as they can be.

        Args:
            size: how many items there are.
            at_once: so many go together, but always one, or one pair; None is all.
            pairs: whether the items are [A | B], and twins go together.
            copied: whether only the first half is run.

        >>> Split.of(4, 2).parts, Split.of(4, 2, pairs=True).parts
        (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        """
        units = size // 2 if pairs or copied else size
        most = units if at_once is None else max(1, at_once // 2 if pairs else at_once)
        n = -(-units // most)
        cuts = [range(units * i // n, units * (i + 1) // n) for i in range(n)]
        twins = pairs and not copied
        parts = tuple(tuple([*r, *(i + units for i in r)] if twins else r) for r in cuts)
        return cls(parts, size, copied)

    @property
    def whole(self) -> bool:
        """Whether all items go together."""
        return len(self.parts) == 1 and not self.copied

    def with_texts(self, tokens: Sequence[int]) -> Split:
        """The same with the text tokens of each part.

        Args:
            tokens: part by part; 0 where there are none.
        """
        if not any(tokens):
            return self
        of = {i: n for part, n in zip(self.parts, tokens, strict=True) for i in part}
        half = self.size // 2
        texts = tuple(of[i] if i in of else of[i - half] for i in range(self.size))
        return replace(self, texts=texts)

    def rows(self, part: Sequence[int], passes: int) -> tuple[int, ...]:
        """Where a part's rows, in each of `passes` stacked copies of the items, stand in the whole
        batch.
        """
        return tuple(i + self.size * p for p in range(passes) for i in part)

    def order(self, passes: int, device: torch.device) -> Tensor | None:
        """Where each row of the whole batch is among the parts' rows, one behind the other; None
        where they are in order.
        """
        return _order(self, passes, device)


@lru_cache(maxsize=64)
def _order(split: Split, passes: int, device: torch.device) -> Tensor | None:
    rows = [r for part in split.parts for r in split.rows(part, passes)]
    place = {r: i for i, r in enumerate(rows)}
    half = split.size // 2
    found = [
        place[r - half if split.copied and r % split.size >= half else r]
        for r in range(split.size * passes)
    ]
    if found == list(range(len(rows))):
        return None
    return sent(torch.tensor(found, device="cpu"), device)


@lru_cache(maxsize=256)
def positions(part: tuple[int, ...], device: torch.device) -> Tensor | slice:
    """A part's items as an index, on the device once; a slice where they are neighbours."""
    if part == tuple(range(part[0], part[-1] + 1)):
        return slice(part[0], part[-1] + 1)
    return sent(torch.tensor(part, device="cpu"), device)


def together(parts: Sequence[Tensor], axes: Sequence[str]) -> Tensor:
    """Parts of a batch as one. Texts that are shorter than the longest are filled up with zeros.

    Args:
        parts: [batch, ...] each.
        axes: theirs, by name.

    Raises:
        InvalidValue: where they differ along another axis, as patterns do over keys of texts.

    >>> short, long = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    >>> together([short, long], ("batch", "text_token", "d_model")).sum((1, 2))
    tensor([ 8., 12.])
    """
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        most = [max(each) for each in zip(*sizes, strict=True)]
        uneven = [i for i, each in enumerate(zip(*sizes, strict=True), 1) if len(set(each)) > 1]
        if any(axes[i] not in TEXT_AXES for i in uneven):
            raise InvalidValue(
                f"The parts of the batch have texts of different lengths, and so other axes "
                f"({', '.join(axes[i] for i in uneven)}: "
                f"{', '.join(str(list(part.shape)) for part in parts)}); expected prompts of one "
                "length, or a run without batch=."
            )
        parts = [F.pad(part, _behind(part.shape[1:], most)) for part in parts]
    return torch.cat(list(parts))


def _behind(own: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """What `F.pad` adds behind each axis, the last axis first."""
    return [n for a, b in zip(own[::-1], wanted[::-1], strict=True) for n in (0, b - a)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class Splitter:
    """Says how each step of a run is split, and halves it where memory gives out.

    Args:
        batch: images at once, where guidance makes two of an item; None is all.
        passes: images an item.
        pairs: whether the items are [A | B], and twins go together.
        copied_until: before this step the second half of the items are copies of the first.
        given: the splits by step, in place of all that.

    Attributes:
        batch: as given, or what was found to fit.
    """

    def __init__(
        self,
        batch: int | None = None,
        passes: int = 1,
        pairs: bool = False,
        copied_until: int = 0,
        given: Sequence[Split] | None = None,
    ) -> None:
        self.batch, self.passes, self.pairs = batch, passes, pairs
        self.copied_until, self.given = copied_until, given

    def at(self, step: int, size: int) -> Split:
        """How a step with so many items is split."""
        if self.given is not None:
            return self.given[step]
        at_once = None if self.batch is None else max(1, self.batch // self.passes)
        return Split.of(size, at_once, self.pairs, step < self.copied_until)

    def halved(self, part: tuple[int, ...], pairs: bool) -> list[tuple[int, ...]]:
        """A part that did not fit, in two; from now on no part is larger.

        Raises:
            OutOfMemory: if it is one item, or one pair.
        """
        units = len(part) // 2 if pairs else len(part)
        if units < 2:
            what = "pair of twins" if pairs else "image"
            raise OutOfMemory(
                f"Out of memory with one {what} at once; expected a smaller model, dtype='bfloat16'"
                ", a smaller size, or a device with more memory."
            )
        half = units // 2
        self.batch, self.given = (units - half) * (2 if pairs else 1) * self.passes, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Out of memory with {len(part) * self.passes} images at once; going on with "
            f"{self.batch}.",
            stacklevel=2,
        )
        if not pairs:
            return [part[:half], part[half:]]
        a, b = part[:units], part[units:]
        return [(*a[:half], *b[:half]), (*a[half:], *b[half:])]
