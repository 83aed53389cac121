"""Bands: a partition of the modes of an (h, w) grid, or a video's (frame, h, w), into orthonormal
bands, low to high.

Real Fourier (cosines and sines), DCT-II and Haar (the pooling pyramid) bases are all separable, so
one formula serves: coefficients = Wy X Wxᵀ with orthonormal Wy [h, h], Wx [w, w], and an integer
for each mode says which band it is in. A video has one matrix more, for its frames, and is split in
space or in time. Modes learnt from data are not separable and use one matrix [h w, h w].
Orthonormality is what gives Parseval: the energies of the bands sum to the whole, exactly. The
transform is two small matmuls, cheap enough for a hook.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from .bases import cosine, fourier, haar, halvings

CUT = 0.25
"""The usual cut between "low" and "high", cycles per token: half the Nyquist frequency of an axis
(4 tokens a wave).
"""
LONGEST = 2**12
"""The longest side of a grid: an orthonormal basis of it is a matrix of this size."""


class Bands:
    """A partition of a grid's modes; make one with `radial`, `dct`, `temporal`, `pooling` or
    `eigen`.

    Fields are images [..., h, w] (videos [..., frame, h, w]), or, in the methods that end in
    `_tokens`, token activations [..., token, d] (token = row * w + column, frame by frame).
    Energies are sums of squares, without any 1/n. Half precision is computed in float32.

    Attributes:
        grid: (h, w) or (frame, h, w).
        kind: "radial", "dct", "temporal", "pooling" or "eigen".
        basis: the orthonormal modes, a factor for each axis of the grid, or one for all.
        names: of the bands, low to high.
        sizes: modes per band; they sum to the grid's places.
        frequency: [mode] in cycles per token; pooling: the level, 0 the mean; eigen: the rank, 0
            the largest variance.
        index: [mode], the band of each mode.
        edges: n + 1 frequencies; band b holds edges[b] <= f < edges[b + 1].

    >>> bands = Bands.radial((8, 8), cut=0.25)
    >>> bands.names, bands.energy(torch.ones(8, 8)).round().tolist()
    (('low', 'high'), [64.0, 0.0])
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        kind: str,
        basis: tuple[Tensor, ...],
        frequency: Tensor,
        edges: Sequence[float],
        names: Sequence[str],
    ) -> None:
        self.grid, self.kind, self.names, self.frequency = (
            grid,
            kind,
            tuple(names),
            frequency.flatten(),
        )
        self.edges = tuple(float(e) for e in edges)
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64)
        self.index = _which(self.frequency, inner)
        self.sizes = tuple(torch.bincount(self.index, minlength=self.n).tolist())
        # (Wy, Wx), with frames (Wt, Wy, Wx), or (W,): rows are modes, float64 on the CPU
        self._basis = basis
        self._cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
        self._digests: dict[int, str] = {}

    @property
    def n(self) -> int:
        """How many bands there are."""
        return len(self.names)

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name} ({size})" for name, size in zip(self.names, self.sizes, strict=True)
        )
        return f"Bands.{self.kind} on {_sides(self.grid)}: {inside} modes"

    # How to make one

    @classmethod
    def radial(
        cls,
        grid: tuple[int, ...],
        n: int | None = None,
        *,
        edges: Sequence[float] | None = None,
        cut: float | None = None,
    ) -> Bands:
        """Bands of the 2-D Fourier transform by radial frequency sqrt(fy² + fx²), in cycles per
        token; the mean is in the lowest. A video's frames are each split so: bands in space.

        Args:
            grid: (h, w), or (frames, h, w).
            n: bands of equal width from 0 to the corner of the grid's spectrum (sqrt(1/2) when h, w
                are even); by default 6, or as many as a small grid fills.
            edges: the inner edges, in place of `n`.
            cut: one edge, between "low" and "high", in place of `n` (0.25 is usual; a frequency
                equal to the cut is high).

        Raises:
            InvalidValue: for an empty band; the message says what would do.

        >>> Bands.radial((8, 8)).sizes
        (1, 8, 12, 24, 14, 5)
        """
        *frames, h, w = _grid(grid)
        basis, f = zip(fourier(h), fourier(w), strict=True)
        return cls._ringed("radial", (*frames, h, w), basis, _radius(frames, *f), n, edges, cut)

    @classmethod
    def dct(
        cls,
        grid: tuple[int, ...],
        n: int | None = None,
        *,
        edges: Sequence[float] | None = None,
        cut: float | None = None,
    ) -> Bands:
        """The same with the DCT-II, whose mode k of n has k / (2 n) cycles per token: no
        wrap-around at the image's borders.

        Args:
            grid: (h, w), or (frames, h, w).
            n: bands of equal width; by default 6, or as many as a small grid fills.
            edges: the inner edges, in place of `n`.
            cut: one edge, between "low" and "high", in place of `n`.

        Raises:
            InvalidValue: for an empty band; the message says what would do.

        >>> Bands.dct((4, 4), n=2).sizes
        (6, 10)
        """
        *frames, h, w = _grid(grid)
        basis, f = zip(cosine(h), cosine(w), strict=True)
        return cls._ringed("dct", (*frames, h, w), basis, _radius(frames, *f), n, edges, cut)

    @classmethod
    def temporal(
        cls,
        grid: tuple[int, int, int],
        n: int | None = None,
        *,
        edges: Sequence[float] | None = None,
        cut: float | None = None,
    ) -> Bands:
        """Bands of a video in time: by the frequency, in cycles per frame, with which each place
        changes; what stays is lowest.

        Args:
            grid: (frames, h, w).
            n: bands of equal width; by default 6, or as many as the frames fill.
            edges: the inner edges, in place of `n`.
            cut: one edge, between "low" and "high", in place of `n`.

        Raises:
            InvalidValue: for a grid without frames, or an empty band.

        >>> Bands.temporal((4, 2, 2), cut=0.25).sizes
        (4, 12)
        """
        if len(_grid(grid)) != 3:
            raise InvalidValue(
                f"grid is {tuple(grid)}; bands in time need a video's: (frames, height, width)."
            )
        t, h, w = _grid(grid)
        rows, f = fourier(t)
        eyes = tuple(torch.eye(side, dtype=torch.float64) for side in (h, w))
        return cls._ringed(
            "temporal", (t, h, w), (rows, *eyes), f[:, None, None].expand(t, h, w), n, edges, cut
        )

    @classmethod
    def pooling(cls, grid: tuple[int, ...]) -> Bands:
        """The pooling pyramid: the mean, then what each finer grid of cell means adds (Haar, if h,
        w are powers of 2).

        A side is halved while even, then pooled to 1. Bands are named by the grid they add: "mean",
        "2x2", "4x4", ...

        Args:
            grid: (h, w).

        Raises:
            InvalidValue: for a video's grid.

        >>> Bands.pooling((8, 8)).names, Bands.pooling((8, 8)).sizes
        (('mean', '2x2', '4x4', '8x8'), (1, 3, 12, 48))
        """
        if len(_grid(grid)) != 2:
            raise InvalidValue(
                f"grid is {tuple(grid)}; the pooling pyramid is of images, (height, width)."
            )
        h, w = _grid(grid)
        chains = halvings(h), halvings(w)
        levels = max(map(len, chains))
        (wy, ly), (wx, lx) = (haar(chain, levels) for chain in chains)
        level = torch.maximum(ly[:, None], lx[None, :])
        # the shorter side stays pooled to 1 for longer
        sides = [[1] * (levels - len(c)) + c for c in chains]
        names = ["mean"] + [f"{a}x{b}" for a, b in zip(*sides, strict=True)][1:]
        return cls((h, w), "pooling", (wy, wx), level, range(levels + 1), names)

    @classmethod
    def eigen(
        cls, x: Tensor, grid: tuple[int, ...], n: int = 2, *, sizes: Sequence[int] | None = None
    ) -> Bands:
        """Eigenmodes of a covariance over the grid, by decreasing variance: a fixed basis learnt
        from the twins.

        Args:
            x: a covariance [token, token], images [sample, ..., h, w] or activations [sample, ...,
                token, d] (channels count as samples; differences of twins have mean 0, so no mean
                is taken off).
            grid: (h, w), or (frames, h, w).
            n: bands of as equal numbers of modes as can be; two are "leading" and "trailing".
            sizes: the number of modes in each band, in place of `n`.

        Raises:
            InvalidValue: for another shape, a covariance that is all 0 or not finite, or sizes that
                don't sum to the modes.

        >>> Bands.eigen(torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.0])), (2, 2)).sizes
        (2, 2)
        """
        sides = _grid(grid)
        t, x = math.prod(sides), arguments.tensor("x", x).detach().double().cpu()
        if x.ndim == 2 and x.shape == (t, t):
            covariance = x
        elif x.ndim >= 3 and x.shape[-len(sides) :] == sides:
            covariance = x.reshape(-1, t).T @ x.reshape(-1, t)
        elif x.ndim >= 3 and x.shape[-2] == t:
            rows = x.transpose(-1, -2).reshape(-1, t)
            covariance = rows.T @ rows
        else:
            raise InvalidValue(
                f"x has shape {tuple(x.shape)}; expected a covariance [{t}, {t}], images "
                f"[sample, ..., {', '.join(map(str, sides))}] or activations [sample, ..., {t}, d]."
            )
        if not covariance.isfinite().all() or not covariance.any():
            raise InvalidValue(
                "x gives a covariance that is not finite or is all 0; eigenmodes need finite "
                "differences that differ."
            )
        if sizes is None:
            n = arguments.whole("n", n, 1, t, f"the modes of a {_sides(sides)} grid")
            sizes = [t // n + (b < t % n) for b in range(n)]
        sizes = arguments.wholes("sizes", sizes, 1, t)
        if sum(sizes) != t:
            raise InvalidValue(
                f"sizes are {list(sizes)}; expected numbers above 0 that sum to {t}, the modes of "
                f"a {_sides(sides)} grid."
            )
        modes = (
            torch.linalg.eigh((covariance + covariance.T) / 2).eigenvectors.flip(1).T.contiguous()
        )
        edges = [sum(sizes[:b]) for b in range(len(sizes) + 1)]
        names = (
            ["leading", "trailing"]
            if len(sizes) == 2
            else [f"modes {a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
        )
        return cls(sides, "eigen", (modes,), torch.arange(t, dtype=torch.float64), edges, names)

    def split(self, at: int) -> Bands:
        """The same modes in two bands, "low" and "high"; for the gap against the cut.

        Args:
            at: how many bands are low.

        Raises:
            InvalidValue: unless both have a band.

        >>> Bands.pooling((8, 8)).split(2).sizes
        (4, 60)
        """
        if self.n < 2:
            raise InvalidValue(f"There is {self.n} band; a split needs 2 or more.")
        at = arguments.whole("at", at, 1, self.n - 1)
        edges = self.edges[0], self.edges[at], self.edges[-1]
        return Bands(self.grid, self.kind, self._basis, self.frequency, edges, ("low", "high"))

    @classmethod
    def _ringed(
        cls,
        kind: str,
        grid: tuple[int, ...],
        basis: tuple[Tensor, ...],
        frequency: Tensor,
        n: int | None,
        edges: Sequence[float] | None,
        cut: float | None,
    ) -> Bands:
        if len(basis) < len(grid):  # frames are left as they are
            basis = (torch.eye(grid[0], dtype=torch.float64), *basis)
        top, size = frequency.max().item(), _sides(grid)
        if edges is not None and cut is not None:
            raise InvalidValue(
                f"Both edges={arguments.shown(edges)} and cut={arguments.shown(cut)} are given; "
                "expected one of them."
            )
        if cut is not None:
            edges = [arguments.number("cut", cut, above=0)]
        if n is None:
            n = _most_bands(frequency, 6)
        n = arguments.whole("n", n, 1, frequency.numel(), "no more than there are modes")
        if edges is None:
            inner = [top * b / n for b in range(1, n)]
        else:
            edges = arguments.listed("edges", edges, "frequencies in increasing order", fewest=0)
            inner = [arguments.number(f"edges[{i}]", e) for i, e in enumerate(edges)]
            if sorted(set(inner)) != inner:
                raise InvalidValue(
                    f"The edges are {inner}; expected finite frequencies in increasing order, in "
                    "cycles per token."
                )
        made = [0.0, *inner, top]
        names = (
            ["low", "high"]
            if len(inner) == 1
            else [f"{a:.3g}-{b:.3g}" for a, b in zip(made, made[1:], strict=False)]
        )
        counts = torch.bincount(
            _which(frequency.flatten(), torch.tensor(inner, dtype=torch.float64)),
            minlength=len(names),
        ).tolist()
        if 0 in counts:
            b = counts.index(0)
            end = f"no mode of the {size} grid, whose {kind} frequencies go from 0 to {top:.4g}"
            if edges is None:
                raise InvalidValue(
                    f"Band {b} ({names[b]}) of n={n} holds {end}; the largest n that works is "
                    f"{_most_bands(frequency, n)}."
                )
            raise InvalidValue(
                f"Band {b} ({names[b]}) with inner edges {inner} holds {end}; an edge must lie "
                f"above 0 and at or below {top:.4g}, and neighbours must have a mode between them."
            )
        return cls(grid, kind, basis, frequency, made, names)

    # What it does with fields

    def coefficients(self, x: Tensor) -> Tensor:
        """The transform of images, in the order of `index` and `frequency`.

        Args:
            x: [..., h, w].

        Returns:
            Tensor: [..., mode].

        Raises:
            InvalidValue: for another grid.

        >>> Bands.radial((2, 2), n=1).coefficients(torch.ones(2, 2)).round().tolist()
        [2.0, 0.0, 0.0, 0.0]
        """
        x = _float(self._image(x))
        _, *frames, last = self._on(x)
        if len(self._basis) == 1:
            return x.flatten(-len(self.grid)) @ last.T
        x = frames.pop() @ x @ last.T
        return (torch.einsum("st,...thw->...shw", frames[0], x) if frames else x).flatten(
            -len(self.grid)
        )

    def coefficients_tokens(self, x: Tensor) -> Tensor:
        """The transform of token activations, in the order of `index` and `frequency`.

        Args:
            x: [..., token, d].

        Returns:
            Tensor: [..., mode, d].

        Raises:
            InvalidValue: for another number of tokens.

        >>> Bands.radial((2, 2), n=1).coefficients_tokens(torch.ones(4, 3)).shape
        torch.Size([4, 3])
        """
        x = _float(self._tokens(x))
        return self._turn(x, inverse=False)

    def shares_modes(self, other: Bands) -> bool:
        """Whether other bands are made of the same modes, so that coefficients serve both.

        Args:
            other: the other bands.

        >>> Bands.radial((8, 8), cut=0.25).shares_modes(Bands.radial((8, 8), n=4))
        True
        """
        own, theirs = self._basis, other._basis
        return (
            self.grid == other.grid
            and len(own) == len(theirs)
            and all(a is b or torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
        )

    def total(self, values: Tensor) -> Tensor:
        """What has one value for each mode, added up over each band's modes.

        Args:
            values: [..., mode], in the order of `index`.

        Returns:
            Tensor: [..., band].

        >>> Bands.radial((4, 4), cut=0.3).total(torch.ones(16)).tolist()
        [5.0, 11.0]
        """
        return values @ self._on(_float(values))[0]

    def cross(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products of images per band; `cross(x, x)` is the energy.

        Args:
            x: [..., h, w].
            y: [..., h, w].

        Returns:
            Tensor: [..., band].

        >>> bands = Bands.radial((4, 4), cut=0.3)
        >>> bands.cross(torch.ones(4, 4), 2 * torch.ones(4, 4)).round().tolist()
        [32.0, 0.0]
        """
        return self.total(self.coefficients(x) * self.coefficients(y))

    def cross_tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products of token activations per band, summed over d.

        Args:
            x: [..., token, d].
            y: [..., token, d].

        Returns:
            Tensor: [..., band].

        >>> bands = Bands.radial((4, 4), cut=0.3)
        >>> bands.cross_tokens(torch.ones(16, 3), torch.ones(16, 3)).round().tolist()
        [48.0, 0.0]
        """
        return (self.coefficients_tokens(x) * self.coefficients_tokens(y)).sum(-1) @ self._on(
            _float(x)
        )[0]

    def energy(self, x: Tensor) -> Tensor:
        """Energy of images per band; the sum over bands is (x**2).sum((-2, -1)).

        Args:
            x: [..., h, w].

        Returns:
            Tensor: [..., band].

        >>> Bands.radial((4, 4), cut=0.3).energy(torch.ones(3, 4, 4)).shape
        torch.Size([3, 2])
        """
        return self.coefficients(x).square() @ self._on(_float(x))[0]

    def energy_tokens(self, x: Tensor) -> Tensor:
        """Energy of token activations per band, summed over d.

        Args:
            x: [..., token, d].

        Returns:
            Tensor: [..., band].

        >>> Bands.radial((4, 4), cut=0.3).energy_tokens(torch.ones(16, 3)).round().tolist()
        [48.0, 0.0]
        """
        return self.coefficients_tokens(x).square().sum(-1) @ self._on(_float(x))[0]

    def project(self, x: Tensor, band: int | str) -> Tensor:
        """The part of images in one band; the parts of all bands sum to x.

        Args:
            x: [..., h, w].
            band: a number or a name.

        Returns:
            Tensor: as x, in its dtype.

        Raises:
            InvalidValue: for a band that does not exist.

        >>> Bands.radial((4, 4), cut=0.3).project(torch.eye(4), "low").sum().round().item()
        4.0
        """
        return self.project_tokens(self._image(x).flatten(-len(self.grid))[..., None], band).view(
            x.shape
        )

    def project_tokens(self, x: Tensor, band: int | str) -> Tensor:
        """The part of token activations in one band; the parts of all bands sum to x.

        Args:
            x: [..., token, d].
            band: a number or a name.

        Returns:
            Tensor: as x, in its dtype.

        Raises:
            InvalidValue: for a band that does not exist.

        >>> Bands.radial((4, 4), cut=0.3).project_tokens(torch.ones(16, 2), "low").sum().round()
        tensor(32.)
        """
        b = self.number(band)
        coefficients = self.coefficients_tokens(x)
        kept = coefficients * self._on(coefficients)[0][:, b, None]
        part = self._turn(kept, inverse=True)
        return part.to(x.dtype) if x.is_floating_point() else part

    def middles(self) -> list[float]:
        """The mean frequency (pooling: level, eigen: rank) of each band's modes, to draw it at.

        >>> Bands.temporal((4, 2, 2), cut=0.5).middles()
        [0.16666666666666666, 0.5]
        """
        return [float(self.frequency[self.index == b].double().mean()) for b in range(self.n)]

    def spectrum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The full spectrum of images by ring.

        A ring holds the modes whose frequency times max(h, w) rounds to the same integer (pooling,
        eigen: level, rank).

        Args:
            x: [..., h, w].

        Returns:
            tuple[Tensor, Tensor]: frequency [ring], and energy [..., ring].

        >>> Bands.radial((4, 4)).spectrum(torch.ones(4, 4))[0].tolist()
        [0.0, 0.25, 0.5, 0.75]
        """
        return self._rings(self.coefficients(x).square())

    def spectrum_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The full spectrum of token activations by ring, summed over d.

        Args:
            x: [..., token, d].

        Returns:
            tuple[Tensor, Tensor]: frequency [ring], and energy [..., ring].

        >>> Bands.radial((4, 4)).spectrum_tokens(torch.ones(16, 3))[1].round().tolist()
        [48.0, 0.0, 0.0, 0.0]
        """
        return self._rings(self.coefficients_tokens(x).square().sum(-1))

    def number(self, band: int | str) -> int:
        """The number of a band.

        Args:
            band: a number or a name.

        Raises:
            InvalidValue: if there is none; the message has the nearest names.

        >>> Bands.radial((4, 4), cut=0.3).number("high")
        1
        """
        if isinstance(band, str) and band in self.names:
            return self.names.index(band)
        if arguments.is_whole(band) and 0 <= band < self.n:
            return int(band)
        near = difflib.get_close_matches(str(band), self.names, n=3, cutoff=0.4) or self.names
        raise InvalidValue(
            f"There is no band {arguments.shown(band)}; expected 0 to {self.n - 1} or a name: "
            f"{', '.join(map(repr, near))}."
        )

    def digest(self, band: int | str) -> str:
        """A digest of what a band holds: equal for bands that keep the same modes of one basis.

        Args:
            band: a number or a name.

        >>> a, b, c = (Bands.radial((8, 8), cut=cut) for cut in (0.24, 0.249, 0.3))
        >>> a.digest("low") == b.digest(0), a.digest("low") == c.digest("low")
        (True, False)
        """
        b = self.number(band)
        if b not in self._digests:
            made = hashlib.sha256(repr(self.grid).encode())
            for part in (self.index == b, *self._basis):
                made.update(part.contiguous().numpy().tobytes())
            self._digests[b] = made.hexdigest()
        return self._digests[b]

    # Inside

    def _turn(self, x: Tensor, inverse: bool) -> Tensor:
        """The transform over tokens [..., token, d], or back."""
        basis = [m.T if inverse else m for m in self._on(x)[1:]]
        if len(basis) == 1:
            return basis[0] @ x
        (*frames, h, w), d = self.grid, x.shape[-1]
        lead = (*x.shape[:-2], *frames)
        rows = basis[-2] @ x.reshape(*lead, h, w * d)
        turned = basis[-1] @ rows.view(*lead, h, w, d)
        if frames:
            turned = torch.einsum("st,...thwd->...shwd", basis[0], turned)
        return turned.reshape(x.shape)

    def _rings(self, energy: Tensor) -> tuple[Tensor, Tensor]:
        scale = {
            "radial": max(self.grid[-2:]),
            "dct": max(self.grid[-2:]),
            "temporal": self.grid[0],
        }.get(self.kind, 1)
        rings, ring = (self.frequency * scale).round().unique(return_inverse=True)
        onehot = torch.nn.functional.one_hot(ring).to(energy)
        return rings / scale, energy @ onehot

    def _on(self, x: Tensor) -> tuple[Tensor, ...]:
        """(indicator [mode, band], *basis) on x's device, in the dtype its coefficients are
        computed in.
        """
        key = x.device, x.dtype
        if key not in self._cache:
            onehot = torch.nn.functional.one_hot(self.index, self.n)
            self._cache[key] = tuple(
                m.to(device=x.device, dtype=x.dtype) for m in (onehot, *self._basis)
            )
        return self._cache[key]

    def _image(self, x: Tensor) -> Tensor:
        arguments.instance("x", x, Tensor, "a tensor of images")
        if x.is_complex() or x.shape[-len(self.grid) :] != self.grid:
            raise InvalidValue(
                f"x has shape {tuple(x.shape)}; expected images [..., "
                f"{', '.join(map(str, self.grid))}] "
                "(for token activations use the method that ends in _tokens)."
            )
        return x

    def _tokens(self, x: Tensor) -> Tensor:
        places = math.prod(self.grid)
        arguments.instance("x", x, Tensor, "a tensor of activations")
        if x.is_complex() or x.ndim < 2 or x.shape[-2] != places:
            raise InvalidValue(
                f"x has shape {tuple(x.shape)}; expected activations [..., {places}, d], tokens of "
                f"a {_sides(self.grid)} grid."
            )
        return x


def _grid(grid: Sequence[int]) -> tuple[int, ...]:
    expected = "(height, width) or (frames, height, width)"
    sides = arguments.listed("grid", grid, expected)
    if len(sides) not in (2, 3):
        raise arguments.refusal("grid", grid, expected)
    return tuple(arguments.whole(f"grid[{i}]", n, 1, LONGEST) for i, n in enumerate(sides))


def _sides(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _radius(frames: Sequence[int], fy: Tensor, fx: Tensor) -> Tensor:
    """Radial frequency of every mode, the same in all frames."""
    return (fy[:, None] ** 2 + fx**2).sqrt().expand(*frames, len(fy), len(fx))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _which(frequency: Tensor, inner: Tensor) -> Tensor:
    """The band of each frequency; the tolerance puts sqrt(2)/4, however rounded, above an edge at
    sqrt(2)/4.
    """
    return torch.bucketize(frequency.double() + 1e-9, inner, right=True)


def _most_bands(frequency: Tensor, n: int) -> int:
    """The largest number up to n of bands of equal width that all hold a mode."""
    top = frequency.max().item()
    for m in range(n, 1, -1):
        inner = torch.tensor([top * k / m for k in range(1, m)], dtype=torch.float64)
        if len(_which(frequency.flatten(), inner).unique()) == m:
            return m
    return 1
