"""Patches: what of a run's activations is replaced, with what, and at which steps.

A `Patch` is only words; `plan` holds it against a model and a run, refuses what does not fit, and
gives a `Planned`, which knows the hook point and computes the new activation from the old one.
`dit_lens.patching.sweep.sweep` runs them.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue
from ..families.base import Config
from ..hooks.edits import ablation
from ..hooks.names import layer_of, select
from ..hooks.regions import Index, Region
from ..measures.bands import Bands
from ..model.hooked import HookedDiT

Kind = Literal["swap", "zero", "mean", "resample", "skip"]
KINDS: tuple[str, ...] = get_args(Kind)
STREAMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@dataclass(frozen=True, eq=False)
class Patch:
    """One intervention on the target run: a part of one activation, replaced at some steps.

    Attributes:
        site: a hook point in a layer, "resid_post", "attn_out", "attn.hook_z", ...; "skip" patches
            "resid_post", whatever it says.
        layer: the block; negative ones count from the end.
        steps: a range of steps, 0 the noisiest; None is every step.
        heads: only these heads.
        region: only these tokens, indices or a mask over the grid, as `tokens` of
            `dit_lens.hooks.regions`.
        bands, band: only one frequency band of the token grid, P_band h_source + (1 - P_band)
            h_target.
        direction: [d] of the activation's last axis; only the component along it is replaced.
        kind: what comes in: the source's activation ("swap"), 0 ("zero"), the mean over the
            source's items ("mean"), the source's activation of another item ("resample", a
            permutation drawn from `seed` that moves every item), or the stream that entered the
            layer ("skip": the layer is knocked out, resid_post = resid_pre).

    Raises:
        ValueError: or.
        TypeError: for an unknown kind, steps that are no range, a band without bands, a direction
            without length.

    >>> print(Patch("attn_out", 5, range(20, 25)), "|", Patch("attn.hook_z", 3, heads=[0, 2], kind="zero"))
    swap attn_out, layer 5, steps 20-24 | zero attn.hook_z, layer 3, every step, heads [0, 2]
    """

    site: str
    layer: int
    steps: range | None = None
    heads: Index | None = None
    region: Index | None = None
    bands: Bands | None = None
    band: int | str | None = None
    direction: Tensor | None = field(default=None, repr=False)
    kind: Kind = "swap"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(str(self.kind), KINDS, n=1, cutoff=0)[0]
            raise InvalidValue(
                f"{self.kind!r} is no kind of patch; expected one of {', '.join(map(repr, KINDS))} "
                f"(nearest: {near!r})."
            )
        if self.steps is not None and not isinstance(self.steps, range):
            raise InvalidType(
                f"steps={self.steps!r} is no window; expected a range, such as range(20, 25), or "
                "None for every step."
            )
        if (self.bands is None) != (self.band is None):
            raise InvalidValue(
                f"band={self.band!r} with bands={self.bands!r}; expected both or neither: "
                "bands=Bands.radial(...), band='low'."
            )
        if self.direction is not None:
            norm = float(self.direction.detach().norm())
            if self.direction.ndim != 1 or not 0 < norm < float("inf"):
                raise InvalidValue(
                    f"The direction has shape {list(self.direction.shape)} and length {norm:.3g}; "
                    "expected a vector [d] of finite length above 0."
                )

    @property
    def window(self) -> str:
        """The steps in words: "20-24", "0-48 by 2", "all" or "none"."""
        s = self.steps
        if s is None or not len(s):
            return "all" if s is None else "none"
        ends = str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}"
        return ends if s.step == 1 or len(s) == 1 else f"{ends} by {s.step}"

    @property
    def what(self) -> str:
        """All but layer and window, in words; two patches that read the same do the same."""
        parts = [] if self.kind != "resample" or not self.seed else [f"seed {self.seed}"]
        parts += [
            f"{word} {_words(value)}"
            for word, value in (("heads", self.heads), ("tokens", self.region))
            if value is not None
        ]
        if self.bands is not None:
            assert self.band is not None
            number = self.bands.number(self.band)
            edges = ", ".join(f"{edge:.4g}" for edge in self.bands.edges)
            # learnt from data
            modes = "" if self.bands.kind != "eigen" else f", modes {_digest(self.bands._basis[0])}"
            parts.append(
                f"band {self.bands.names[number]!r} of {self.bands.kind} at {edges}{modes}"
            )
        if self.direction is not None:
            parts.append(f"direction [{len(self.direction)}] {_digest(self.direction)}")
        return ", ".join(parts)

    def __str__(self) -> str:
        when = {"all": "every step", "none": "no step"}.get(
            self.window
        ) or f"step{'s'[: len(self.steps or ()) > 1]} {self.window}"
        head = "skip" if self.kind == "skip" else f"{self.kind} {self.site}"
        return ", ".join(filter(None, (head, f"layer {self.layer}", when, self.what)))


def grid(
    layers: Iterable[int],
    sites: str | Iterable[str],
    windows: Iterable[range | None],
    **options: Any,
) -> list[Patch]:
    """Every combination of layer, site and window, windows running fastest; `options` are the other
    fields of `Patch`.

    >>> [str(p) for p in grid([3], ["attn_out", "mlp_out"], [range(0, 5)])]
    ['swap attn_out, layer 3, steps 0-4', 'swap mlp_out, layer 3, steps 0-4']
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    return [
        Patch(site, layer, steps, **options)
        for layer, site, steps in itertools.product(layers, names, list(windows))
    ]


def tiles(first: int, stop: int, n: int) -> list[range]:
    """`n` windows that cover the steps first..stop-1 without overlap, as equal as they can be;
    ValueError if there are too few steps.

    >>> tiles(20, 30, 3)
    [range(20, 23), range(23, 26), range(26, 30)]
    """
    if not 1 <= n <= stop - first:
        raise InvalidValue(
            f"n={n} windows over {stop - first} steps ({first} to {stop - 1}); expected 1 to "
            f"{max(1, stop - first)}."
        )
    edges = [first + (stop - first) * i // n for i in range(n + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Planned:
    """A patch held against a model.

    `key` tells apart all that is done; patches of one key differ in their windows only.
    """

    patch: Patch
    name: str
    layer: int
    axes: tuple[str, ...]
    inside: Region
    steps: range
    key: str

    @property
    def from_source(self) -> bool:
        return self.patch.kind in ("swap", "mean", "resample")

    @property
    def whole_stream(self) -> bool:
        """Whether the whole residual stream becomes the source's: then nothing before this point
        matters.
        """
        return (
            self.patch.kind == "swap"
            and self.name.endswith(STREAMS)
            and self.inside.everything
            and self.patch.direction is None
        )

    def new(
        self, old: Tensor, source: Tensor | None, entered: Tensor | None, passes: int
    ) -> Tensor:
        """The activation to go on with, from the target's own and the source's (or the stream that
        entered the layer), all [batch, ...].
        """
        if self.patch.kind == "skip":
            assert entered is not None
            coming = entered
        elif self.patch.kind == "zero":
            coming = ablation("zero")(old, None)
        else:
            assert source is not None
            # [cond | null]: a null item is not another item of the cond half
            halves = source.chunk(passes)
            coming = torch.cat([self._of_items(half) for half in halves])
        if self.patch.direction is not None:
            unit = torch.nn.functional.normalize(self.patch.direction.detach().to(old), dim=0)
            coming = old + ((coming - old) @ unit)[..., None] * unit
        return self.inside.merge(old, coming, self.axes)

    def _of_items(self, source: Tensor) -> Tensor:
        if self.patch.kind == "mean":
            mean: Tensor = ablation("mean")(source, None)
            return mean
        return (
            source[moved(len(source), self.patch.seed).to(source.device)]
            if self.patch.kind == "resample"
            else source
        )


def moved(items: int, seed: int) -> Tensor:
    """A random permutation [item] in one cycle, so that no item stays where it is.

    >>> bool((moved(5, 0) == torch.arange(5)).any())
    False
    """
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    where = torch.empty_like(order)
    where[order] = order.roll(1)
    return where


def plan(patch: Patch, model: HookedDiT, steps: int, items: int) -> Planned:
    """The patch held against a model and a run of so many steps and items.

    Raises ValueError or UnknownName, in one sentence.
    """
    cfg = model.cfg
    if not isinstance(patch.layer, int) or not -cfg.n_layers <= patch.layer < cfg.n_layers:
        raise InvalidValue(
            f"{str(patch)!r}: there is no layer {patch.layer}; the model has {cfg.n_layers}, 0 to "
            f"{cfg.n_layers - 1}."
        )
    layer = patch.layer % cfg.n_layers
    site = "resid_post" if patch.kind == "skip" else patch.site
    found = select(site, model.names)
    if any(layer_of(n) is None for n in found):
        raise InvalidValue(
            f"{str(patch)!r}: the hook point {found[0]!r} is in no layer; expected one that is, "
            "such as 'resid_post'."
        )
    name = model.resolve(site, layer)
    window = range(steps) if patch.steps is None else patch.steps
    outside = [s for s in window if not 0 <= s < steps]
    if outside:
        raise InvalidValue(
            f"{str(patch)!r}: step {outside[0]} is outside the run; it has {steps} steps, 0 (the "
            f"noisiest) to {steps - 1}."
        )
    if patch.kind == "resample" and items < 2:
        raise InvalidValue(
            f"{str(patch)!r}: resampling takes another item's activation, and the source has "
            f"{items}; expected 2 or more."
        )
    if patch.bands is not None:
        assert patch.band is not None
        number = patch.bands.number(patch.band)
        if patch.bands.grid != cfg.grid:
            raise InvalidValue(
                f"{str(patch)!r}: the bands are of a {_by(patch.bands.grid)} grid; expected the "
                f"tokens' {_by(cfg.grid)}."
            )
        if not patch.bands.sizes[number]:
            full = [
                name
                for name, size in zip(patch.bands.names, patch.bands.sizes, strict=True)
                if size
            ]
            raise InvalidValue(
                f"{str(patch)!r}: band {patch.band!r} holds no mode; the bands with modes are "
                f"{full}."
            )
    band = None if patch.bands is None or patch.band is None else (patch.bands, patch.band)
    inside, axes = Region(heads=patch.heads, tokens=patch.region, band=band), model.sites[name]
    _try(patch, name, inside, axes, cfg)
    return Planned(patch, name, layer, axes, inside, window, f"{patch.kind} {name} {patch.what}")


def _try(patch: Patch, name: str, inside: Region, axes: tuple[str, ...], cfg: Config) -> None:
    """Find out on an empty activation whether the parts exist, and not after an hour."""
    tokens = cfg.grid[0] * cfg.grid[1]
    sizes = {"batch": 1, "token": tokens, "query": tokens, "key": tokens, "head": cfg.n_heads}
    shape = [sizes[axis] if axis in sizes else getattr(cfg, axis) for axis in axes]
    for word, index in (("heads", patch.heads), ("region", patch.region)):
        if (
            index is not None
            and not isinstance(index, (int, slice))
            and not torch.as_tensor(index).numel()
        ):
            raise InvalidValue(
                f"{str(patch)!r}: {word}={index!r} chooses nothing; expected at least one, or None "
                "for all."
            )
    try:
        inside.check(name, axes)
        inside.merge(torch.zeros(shape), torch.zeros(shape), axes)
    except ValueError as error:
        raise InvalidValue(f"{str(patch)!r}: {error}") from None
    if patch.direction is not None and len(patch.direction) != shape[-1]:
        raise InvalidValue(
            f"{str(patch)!r}: the direction has {len(patch.direction)} entries; {name!r} has "
            f"{shape[-1]} ({axes[-1]})."
        )


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _words(index: Index) -> str:
    if isinstance(index, (int, slice)):
        return str(index)
    value = torch.as_tensor(index)
    return (
        str(value.flatten().tolist())
        if value.dtype != torch.bool
        else f"mask of {int(value.sum())}, {_digest(value)}"
    )


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().double().numpy().tobytes()).hexdigest()[:8]
