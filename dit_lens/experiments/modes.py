"""The modes that a gap is measured in: what the grids of latents and stream are split into."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from ..errors import InvalidValue
from ..measures.bands import Bands
from ..model.hooked import HookedDiT
from ..twinning.twins import Twins

BandKind = Literal["radial", "dct", "pooling", "eigen"]
MOST_RINGS = 24


class Modes(NamedTuple):
    """Partitions of the latents' pixel grid, and of the stream's token grid."""

    spectrum: Bands
    fine: Bands
    split: Bands
    token_spectrum: Bands
    token_split: Bands

    @classmethod
    def of(cls, model: HookedDiT, kind: BandKind, cut: float, pilot: Twins | None) -> Modes:
        """By the kind of bands; eigenmodes are learnt from what the pilot's twins differ by.

        Args:
            model: the opened model.
            kind: "radial", "dct", "pooling" or "eigen".
            cut: between low and high, in cycles per place of a grid.
            pilot: twins, for kind "eigen".
        """
        finished = pilot.a.finished - pilot.b.finished if pilot else None
        stream = _stream_difference(pilot) if pilot else None
        pixels = partition(kind, model.cfg.pixels, cut, finished)
        token_spectrum, _, token_split = partition(kind, model.cfg.grid, cut, stream)
        return cls(*pixels, token_spectrum, token_split)


def _stream_difference(pilot: Twins) -> Tensor:
    """What twins differ by in the last layer's stream, two thirds through the run, [pair, token,
    d_model].
    """
    run = pilot.run
    stream = run.activations(
        "resid_post", run.model.cfg.n_layers - 1, step=2 * run.settings.steps // 3
    )
    return stream[: pilot.pairs] - stream[pilot.pairs :]


def partition(
    kind: BandKind, grid: tuple[int, ...], cut: float, sample: Tensor | None = None
) -> tuple[Bands, Bands, Bands]:
    """The modes of a grid as finely as they can be told apart, in a few bands, and in "low" and
    "high".

    Args:
        kind: "radial", "dct", "pooling" or "eigen".
        grid: height and width, or a video's frames, height and width.
        cut: between low and high, in cycles per place of the grid.
        sample: differences of twins, images or [..., token, d], for kind "eigen".

    Raises:
        InvalidValue: for an unknown kind, or a cut with no mode below or above it.

    >>> [b.n for b in partition("radial", (8, 8), 0.25)]
    [15, 6, 2]
    """
    if kind in ("radial", "dct"):
        make = Bands.radial if kind == "radial" else Bands.dct
        split, fine = make(grid, cut=cut), make(grid)
        return make(grid, edges=_ring_edges(split, cut)), fine, split
    if kind == "pooling":
        fine = Bands.pooling(grid)
        # a level of k cells holds waves up to k / 2
        sides = [grid[0] >> (fine.n - 1 - level) for level in range(fine.n)]
        below = sum(side <= 2 * cut * grid[0] for side in sides)
        return fine, fine, fine.split(min(max(1, below), fine.n - 1))
    if kind == "eigen":
        assert sample is not None
        fine = Bands.eigen(sample, grid, n=6)
        return fine, fine, fine.split(1)
    raise InvalidValue(
        f"bands={kind!r} is no partition of modes; expected 'radial', 'dct', 'pooling' or 'eigen'."
    )


def _ring_edges(split: Bands, cut: float) -> list[float]:
    """Edges between the distinct frequencies, the cut's among them; every k-th if there are many,
    for a band needs modes to fit.
    """
    distinct = sorted({round(float(f), 9) for f in split.frequency})
    every = -(-len(distinct) // MOST_RINGS)
    kept = {*range(every - 1, len(distinct) - 1, every), sum(f < cut - 1e-9 for f in distinct) - 1}
    return [(distinct[i] + distinct[i + 1]) / 2 for i in sorted(kept)]
