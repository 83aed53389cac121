"""Outcomes: what of finished twins is compared. The latents by band, the images, or features of the
images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures.agreement import Agreement, Contrasts, agreement, sums
from ..measures.bands import CUT, Bands
from ..model.hooked import HookedDiT
from ..sampling.run import decode


@dataclass(frozen=True, eq=False)
class Outcome:
    """What of finished twins is compared; made by `latents`, `images` or `features`, or by hand.

    Attributes:
        name: of the outcome, under which `Curves` keeps it.
        of: maps finished latents [n, channel, height, width] to fields [n, ..., h, w], or to
            features of any shape [n, ...].
        bands: how the fields are split; None for features, which count as one band.

    >>> Outcome("mean colour", lambda x: x.mean((2, 3)), None).band_names
    ('mean colour',)
    """

    name: str
    of: Callable[[Tensor], Tensor]
    bands: Bands | None

    def __post_init__(self) -> None:
        arguments.text("name", self.name)
        arguments.function("of", self.of, "of finished latents")
        arguments.optional(arguments.instance, "bands", self.bands, Bands, "Bands, or None")

    @property
    def band_names(self) -> tuple[str, ...]:
        """The names of the bands; without bands the outcome's own."""
        return self.bands.names if self.bands else (self.name,)

    def compare(self, a: Tensor, b: Tensor, groups: Sequence[int]) -> Agreement:
        """Agreement statistics of finished latents, without each group's mean.

        Args:
            a: of the twins A, [pair, channel, height, width].
            b: of the twins B.
            groups: [pair], the labels.

        Returns:
            Agreement: [pair, band].
        """
        return agreement(self._fields(a), self._fields(b), self.bands, groups)

    def modes(self, x: Tensor, contrasts: Contrasts) -> Tensor:
        """One side of a comparison: what is compared, in the modes of the bands; two of these make
        an Agreement by `sums`.

        Args:
            x: finished latents, [pair, channel, height, width].
            contrasts: of the labels.
        """
        return contrasts.modes(self._fields(x), self.bands)

    def _fields(self, x: Tensor) -> Tensor:
        """What is compared of x. A function of the user's gets a copy: it may work in place."""
        ours = self.of is _itself or isinstance(self.of, Decoder)
        return self.of(x if ours else x.clone())

    def sums(self, x: Tensor, y: Tensor, contrasts: Contrasts) -> Tensor:  # noqa: ARG002
        """The statistics of both sides, [3, pair, band]: ⟨x, y⟩, |x|² and |y|².

        Args:
            x: of twin A, from `modes`.
            y: of twin B.
            contrasts: of the labels.
        """
        return sums(x, y, self.bands)


Sides = Mapping[str, Tensor]
"""One side of all comparisons: modes by the name of the outcome."""


def side(outcomes: Sequence[Outcome], x: Tensor, contrasts: Contrasts) -> Sides:
    """One side of the comparison in every outcome; modes that several compare are computed once.

    Args:
        outcomes: what is compared.
        x: finished latents, [pair, channel, height, width].
        contrasts: of the labels.
    """
    found: dict[str, Tensor] = {}
    for group in _alike(outcomes):
        modes = group[0].modes(x, contrasts)
        found |= {o.name: modes for o in group}
    return found


def statistics(
    outcomes: Sequence[Outcome], x: Tensor | Sides, y: Tensor | Sides, contrasts: Contrasts
) -> dict[str, Tensor]:
    """What `Outcome.sums` gives of both sides, by the name of the outcome, [3, pair, band].

    Args:
        outcomes: what is compared.
        x: finished latents of twin A, or what `side` made of them.
        y: the same of twin B.
        contrasts: of the labels.
    """
    found: dict[str, Tensor] = {}
    for group in _alike(outcomes):
        first = group[0]
        a, b = (
            first.modes(each, contrasts) if isinstance(each, Tensor) else each[first.name]
            for each in (x, y)
        )
        found |= {o.name: o.sums(a, b, contrasts) for o in group}
        del a, b  # or the next group's would be made beside them
    return found


def _alike(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """The outcomes in groups that compare the same modes of the same fields."""
    groups: list[list[Outcome]] = []
    for one in outcomes:
        for group in groups:
            a, b = one.bands, group[0].bands
            plain = type(one) is type(group[0]) is Outcome and one.of is group[0].of
            if plain and (a is b or (a and b and a.shares_modes(b))):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


class Decoder:
    """Decodes latents through the model's VAE, each of them once within `once()`.

    Args:
        model: the opened model.
        batch: so many images at once; None is all.
    """

    def __init__(self, model: HookedDiT, batch: int | None = None) -> None:
        self.model, self.batch = model, batch

    def __call__(self, x: Tensor) -> Tensor:
        """Images [n, channel, height, width] in [0, 1] of latents x."""
        known = _DECODED.get()
        if self.model.vae is None or known is None:
            return decode(self.model, x, self.batch)
        for latents, of, found in known:
            if of is self.model.vae and (rows := _rows_of(x, latents)) is not None:
                return found[rows]
        half = len(x) // 2
        alike = bool(half) and torch.equal(x[:half], x[half:])  # twins that have not parted yet
        made = decode(self.model, x[:half] if alike else x, self.batch)
        made = torch.cat([made, made]) if alike else made
        # what came first, the finished latents of a run, is kept, and what came last
        known[1:] = []
        known.append((x, self.model.vae, made))
        return made


class _Features(Decoder):
    """What a function makes of the images of latents.

    Args:
        model: the opened model.
        function: of images; it gets copies, as it may work in place and the images are kept.
        batch: so many images at once; None is all.
    """

    def __init__(
        self, model: HookedDiT, function: Callable[[Tensor], Tensor], batch: int | None
    ) -> None:
        super().__init__(model, batch)
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        """Features [n, feature] of latents x."""
        with torch.no_grad():
            found = self.function(super().__call__(x).clone())
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            got = (
                f"shape {list(found.shape)}"
                if isinstance(found, Tensor)
                else f"a {type(found).__name__}"
            )
            raise InvalidValue(
                f"The feature function gave {got} for {len(x)} images; expected a tensor "
                f"[{len(x)}, feature]."
            )
        if not found.isfinite().all():
            raise InvalidValue(
                f"The feature function gave values that are not finite for {len(x)} images."
            )
        return found.flatten(1)


_DECODED: ContextVar[list[tuple[Tensor, Any, Tensor]] | None] = ContextVar("decoded", default=None)


@contextmanager
def once() -> Iterator[None]:
    """Within the block, images of the same latents are decoded once: for several outcomes, and for
    a run's finished latents also in several measurements.
    """
    known = _DECODED.get()
    token = _DECODED.set([] if known is None else known)
    try:
        yield
    finally:
        _DECODED.reset(token)


def _rows_of(x: Tensor, known: Tensor) -> slice | None:
    """Which rows of `known` x is a view of; None if it is not."""
    if x.untyped_storage().data_ptr() != known.untyped_storage().data_ptr():
        return None
    if x.shape[1:] != known.shape[1:] or x.stride() != known.stride() or not len(x):
        return None
    first, rest = divmod(int(x.storage_offset() - known.storage_offset()), known.stride(0))
    fits = not rest and 0 <= first and first + len(x) <= len(known)
    return slice(first, first + len(x)) if fits else None


def latents(bands: Bands, name: str = "latents") -> Outcome:
    """The finished latents as they are.

    Args:
        bands: of their pixel grid.
        name: of the outcome.

    >>> import dit_lens; latents(dit_lens.Bands.radial((16, 16), cut=0.25)).band_names
    ('low', 'high')
    """
    arguments.instance("bands", bands, Bands, "Bands of the latents' grid")
    return Outcome(name, _itself, bands)


def _itself(x: Tensor) -> Tensor:
    return x


def compared(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes to be compared, one or more, each with a name of its own; raises InvalidValue or
    InvalidType otherwise.
    """
    expected = "one or more of dit_lens.experiments.latents, images, features"
    found = arguments.listed("outcomes", outcomes, expected)
    for outcome in found:
        arguments.instance("outcomes", outcome, Outcome, expected)
    arguments.unlike("outcomes", [outcome.name for outcome in found])
    return found


def images(
    model: HookedDiT,
    bands: Bands | None = None,
    name: str = "images",
    cut: float = CUT,
    batch: int | None = None,
) -> Outcome:
    """The images that the finished latents decode to, through the VAE where there is one.

    Args:
        model: the opened model.
        bands: of the images' pixel grid; by default "low" and "high".
        name: of the outcome.
        cut: between low and high without `bands`, in cycles per pixel of the *latents*, so that the
            same waves are low in both.
        batch: so many go through the VAE at once; None is all.

    >>> import dit_lens; images(dit_lens.load("digits")).bands.edges[1]
    0.25
    """

    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    cut = arguments.number("cut", cut, above=0)

    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    of = Decoder(model, batch)
    if bands is None:
        height, width = of(torch.zeros(1, *model.cfg.latent_shape)).shape[-2:]
        bands = Bands.radial((height, width), cut=cut * model.cfg.pixels[1] / width)
    return Outcome(name, of, bands)


def features(
    model: HookedDiT,
    function: Callable[[Tensor], Tensor],
    name: str = "features",
    batch: int | None = None,
) -> Outcome:
    """What a function, such as a classifier or DINO, makes of the images; it counts as one band.

    Args:
        model: the opened model.
        function: of images [n, channel, height, width] in [0, 1]; gives [n, ...].
        name: of the outcome.
        batch: so many go through the VAE at once; None is all.

    Raises:
        InvalidValue: when compared, if the function gives anything but n rows of finite numbers.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> features(model, lambda x: x.mean((2, 3))).of(torch.zeros(3, 1, 16, 16)).shape
    torch.Size([3, 1])
    """

    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    arguments.function("function", function, "of images [n, channel, height, width]")
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    return Outcome(name, _Features(model, function, batch), None)
