"""Patches: what of a run's activations is replaced, with what, and at which steps.

A `Patch` is a description; `plan` checks it against a model and a run, refuses what does not fit,
and gives a `Planned`, which knows the hook point and computes the new activation from the old one.
`dit_lens.patching.sweep` runs them.

A patch's text is for people. What identifies it is a digest of what it does (`Planned.digest`): the
hook point, the steps, the heads and tokens that are chosen, the modes of the band, the numbers of
the direction, the kind and its seed. So two descriptions of one intervention are one patch, and two
interventions that read alike are two.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import arguments
from ..arguments import Index
from ..errors import InvalidType, InvalidValue
from ..hooks.edits import ablation
from ..hooks.hold import Added, check_steps, held_places, parts, require_parts, stack
from ..hooks.names import layer_of, select, site_of
from ..hooks.regions import Region
from ..measures.bands import Bands
from ..model.hooked import HookedDiT

Kind = Literal["swap", "zero", "mean", "resample", "skip", "hold"]
KINDS: tuple[str, ...] = get_args(Kind)
OF_BLOCKS = ("hold", "swap", "mean", "resample")
"""The kinds that a whole block, or a stack of them, can be patched by."""
STREAMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def steps_text(steps: range | None) -> str:
    """A window of steps as text; None is all.

    >>> steps_text(range(20, 25)), steps_text(range(0, 49, 2)), steps_text(None)
    ('20-24', '0-48 by 2', 'all')
    """
    if steps is None or not len(steps):
        return "all" if steps is None else "none"
    ends = str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    return ends if steps.step == 1 or len(steps) == 1 else f"{ends} by {steps.step}"


@dataclass(frozen=True, eq=False)
class Patch:
    """One intervention on the target run: a part of one activation, replaced at some steps.

    Args:
        site: a hook point in a layer, "resid_post", "attn_out", "attn.hook_z", ...; or a part of
            it, "attn", "mlp", ..., all that the layer adds by that to the streams of image and
            text; or "block", all that the layer adds. A "skip" is always at "resid_post".
        layer: the block; negative ones count from the end.
        steps: a range of steps, 0 the noisiest; None is every step.
        heads: only these heads.
        tokens: only these image tokens, indices or a mask over the grid, as `tokens` of
            `dit_lens.hooks.regions`. What a layer adds to a stream of text is then left alone.
        bands: a partition of the token grid, for `band`.
        band: only this frequency band of the image's, P_band h_source + (1 - P_band) h_target.
        direction: [d] of the activation's last axis; only the component along it is replaced.
        dose: how much of the change is made: 0 is none, 1 all of it, 2 twice as far.
        kind: what comes in: the source's activation ("swap"), 0 ("zero"), the mean over the
            source's items ("mean"), the source's activation of another item ("resample", a
            permutation drawn from `seed` that moves every item), the stream that entered the
            layer ("skip": the layer is knocked out, resid_post = resid_pre), or what the target
            itself added there at an earlier step ("hold").
        seed: of "resample".
        lag: of "hold": from how many steps before.
        order: of "hold": 0, what was added then; 1, the next point of the line through that and
            what was added `lag` steps before it.
        depth: at "block": so many layers from `layer` on are patched as one.

    Raises:
        ValueError: for an unknown kind, a band without bands, a direction without length.
        TypeError: for steps that are not a range.

    >>> print(Patch("attn_out", 5, range(20, 25)))
    swap attn_out, layer 5, steps 20-24
    >>> print(Patch("attn.hook_z", 3, heads=[0, 2], kind="zero"))
    zero attn.hook_z, layer 3, every step, heads [0, 2]
    """

    site: str
    layer: int
    steps: range | None = None
    heads: Index | None = None
    tokens: Index | None = None
    bands: Bands | None = None
    band: int | str | None = None
    direction: Tensor | None = field(default=None, repr=False)
    dose: float = field(default=1.0, kw_only=True)
    kind: Kind = "swap"
    seed: int = 0
    lag: int = 1
    order: int = 0
    depth: int = 1

    def __post_init__(self) -> None:
        # NumPy's and PyTorch's whole numbers become Python's.
        checked: dict[str, Any] = {
            "site": arguments.text("site", self.site),
            "layer": arguments.whole("layer", self.layer),
            "kind": arguments.choice("kind", self.kind, KINDS),
            "seed": arguments.seed("seed", self.seed),
            "dose": arguments.number("dose", self.dose),
            "lag": arguments.whole("lag", self.lag, 1, 1000),
            "order": arguments.whole("order", self.order, 0, 1),
            "depth": arguments.whole("depth", self.depth, 1),
            "heads": arguments.optional(arguments.index, "heads", self.heads),
            "tokens": arguments.optional(arguments.index, "tokens", self.tokens),
        }
        arguments.optional(arguments.tensor, "direction", self.direction)
        arguments.optional(
            arguments.instance, "bands", self.bands, Bands, "a Bands of the token grid"
        )
        if self.steps is not None and not isinstance(self.steps, range):
            raise InvalidType(
                f"steps={arguments.shown(self.steps)} is not a window; expected a range, such as "
                "range(20, 25), or None for every step."
            )
        if self.steps is not None and self.steps.step < 0:
            checked["steps"] = self.steps[::-1]  # a window has no order
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.depth > 1 and (self.site != "block" or self.kind not in OF_BLOCKS):
            raise InvalidValue(
                f"depth={self.depth} at {self.site!r} with kind={self.kind!r}; expected 1: only "
                "blocks are held or swapped as one, Patch('block', 3, kind='hold', depth=5)."
            )
        if (self.bands is None) != (self.band is None):
            raise InvalidValue(
                f"band={arguments.shown(self.band)} with bands={self.bands!r}; expected both or "
                "neither: bands=Bands.radial(...), band='low'."
            )
        if self.bands is not None and self.band is not None:
            object.__setattr__(self, "band", self.bands.number(self.band))
        if self.direction is not None:
            norm = float(self.direction.detach().norm())
            if self.direction.ndim != 1 or not 0 < norm < float("inf"):
                raise InvalidValue(
                    f"The direction has shape {list(self.direction.shape)} and length {norm:.3g}; "
                    "expected a vector [d] of finite length above 0."
                )

    @property
    def window(self) -> str:
        """The steps as text."""
        return steps_text(self.steps)

    def __str__(self) -> str:
        when = {"all": "every step", "none": "no step"}.get(
            self.window
        ) or f"step{'s'[: len(self.steps or ()) > 1]} {self.window}"
        where = f"layer {self.layer}"
        if self.depth > 1:
            where = f"layers {self.layer}-{self.layer + self.depth - 1}"
        parts = ["skip" if self.kind == "skip" else f"{self.kind} {self.site}", where, when]
        if self.kind == "resample" and self.seed:
            parts.append(f"seed {self.seed}")
        if self.kind == "hold" and (self.lag, self.order) != (1, 0):
            parts.append(f"lag {self.lag}, order {self.order}")
        for name, index in (("heads", self.heads), ("tokens", self.tokens)):
            if index is not None:
                parts.append(f"{name} {_index_text(index)}")
        if self.bands is not None and self.band is not None:
            number = self.bands.number(self.band)
            edges = ", ".join(f"{edge:.4g}" for edge in self.bands.edges)
            name, size = self.bands.names[number], self.bands.sizes[number]
            parts.append(f"band {name!r} ({size} modes) of {self.bands.kind} at {edges}")
        if self.direction is not None:
            parts.append(f"direction [{len(self.direction)}] {_digest(self.direction)[:8]}")
        if self.dose != 1:
            parts.append(f"dose {self.dose:g}")
        return ", ".join(parts)


def grid(
    layers: Iterable[int],
    sites: str | Iterable[str],
    windows: Iterable[range | None],
    **options: Any,
) -> list[Patch]:
    """Every combination of layer, site and window, windows running fastest.

    Args:
        layers: the blocks.
        sites: one hook point of a layer, or several.
        windows: ranges of steps; None is every step.
        **options: the other fields of `Patch`, the same for all.

    Returns:
        The patches, for `sweep`.

    >>> [str(p) for p in grid([3], ["attn_out", "mlp_out"], [range(0, 5)])]
    ['swap attn_out, layer 3, steps 0-4', 'swap mlp_out, layer 3, steps 0-4']
    """
    names = [sites] if isinstance(sites, str) else arguments.listed("sites", sites, "hook points")
    layers = arguments.listed("layers", layers, "whole numbers")
    windows = arguments.listed("windows", windows, "ranges of steps, or None for every step")
    return [
        Patch(site, layer, steps, **options)
        for layer, site, steps in itertools.product(layers, names, windows)
    ]


def default_sites(model: HookedDiT) -> tuple[str, ...]:
    """Where the layers of a model are patched if nobody says: what attention and MLP add, or, if a
    layer does both at once or has only one, what the whole block adds.

    Args:
        model: the opened model.

    >>> import dit_lens; default_sites(dit_lens.load("digits"))
    ('attn_out', 'mlp_out')
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    sites = ("attn_out", "mlp_out")
    wanted = (f"blocks.{n}.hook_{site}" for n in range(model.cfg.n_layers) for site in sites)
    return sites if set(wanted) <= set(model.names) else ("block",)


def tiles(first: int, stop: int, n: int | None = None) -> list[range]:
    """Windows that cover the steps first..stop-1 without overlap, as equal as they can be.

    Args:
        first: the first step.
        stop: the step after the last.
        n: how many windows; by default five, or one a step where there are fewer.

    Returns:
        `n` ranges, for `grid`.

    Raises:
        ValueError: if there are fewer steps than windows.

    >>> tiles(20, 30, 3)
    [range(20, 23), range(23, 26), range(26, 30)]
    """
    first, stop = arguments.whole("first", first, 0), arguments.whole("stop", stop, 0)
    n = min(5, stop - first) if n is None else arguments.whole("n", n, 0)
    if stop <= first:
        raise InvalidValue(
            f"There are no steps from {first} on before {stop}, to be cut into windows; expected "
            "some, as with a release before the last step."
        )
    if not 1 <= n <= stop - first:
        raise InvalidValue(
            f"n={n} windows over {stop - first} steps ({first} to {stop - 1}); expected 1 to "
            f"{max(1, stop - first)}."
        )
    edges = [first + (stop - first) * i // n for i in range(n + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Planned:
    """A patch checked against a model.

    Attributes:
        patch: the description.
        places: the hook points that are patched, several where a layer writes to several streams;
            for a "skip" and for blocks with the stream that enters.
        layer: its first block, 0 or more.
        axes: the hook points', by name.
        inside: the part of each activation that is replaced, by name.
        steps: the window.
        key: a digest of what is done; patches of one key differ in their windows only.
    """

    patch: Patch
    places: tuple[Added, ...]
    layer: int
    axes: dict[str, tuple[str, ...]]
    inside: dict[str, Region]
    steps: range
    key: str

    @property
    def name(self) -> str:
        """The first hook point that is patched."""
        return self.places[0].name

    @property
    def site(self) -> str:
        """What is patched in the layer, in the user's words."""
        site, spelled = self.patch.site, site_of(self.name).replace("hook_", "")
        words = self.patch.kind != "skip" and (site == "block" or spelled == f"{site}_out")
        return site if words else spelled

    @property
    def digest(self) -> str:
        """What identifies the patch: `key` and the steps."""
        return _digest(self.key, sorted(self.steps))

    @property
    def from_source(self) -> bool:
        """Whether the source's activation is needed."""
        return self.patch.kind in ("swap", "mean", "resample")

    @property
    def reach(self) -> int:
        """How many steps back a "hold" takes from, at most; 0 for other kinds."""
        return self.patch.lag * (self.patch.order + 1) if self.patch.kind == "hold" else 0

    @property
    def whole(self) -> bool:
        """Whether nothing of the old activation is left."""
        everything = all(part.everything for part in self.inside.values()) and self.patch.dose == 1
        return everything and self.patch.direction is None

    @property
    def whole_stream(self) -> bool:
        """Whether the image's whole residual stream becomes the source's: then nothing before this
        point matters.
        """
        place = self.places[0]
        stream = not place.entered and site_of(place.name) in STREAMS
        return self.patch.kind == "swap" and stream and self.whole

    def new(
        self,
        place: Added,
        old: Tensor,
        source: Tensor | None,
        entered: Tensor | None,
        held: Tensor | None,
        passes: int,
    ) -> Tensor:
        """The activation to go on with.

        Args:
            place: which of the hook points.
            old: the target's own, [batch, ...].
            source: what the source has there, of blocks what they added, if it is needed.
            entered: the stream that entered the layer, for "skip" and for blocks.
            held: what was added earlier, for "hold".
            passes: 2 if the batch is [cond | null].
        """
        # What comes in.
        if self.patch.kind == "skip":
            assert entered is not None
            coming = entered
        elif self.patch.kind == "hold":
            assert held is not None
            coming = place.put(held, entered)
        elif self.patch.kind == "zero":
            coming = ablation("zero")(old, None)
        else:
            assert source is not None
            if source.shape != old.shape:
                raise InvalidValue(
                    f"{str(self.patch)!r}: {place.name!r} is {list(source.shape)} in the source "
                    f"and {list(old.shape)} in the target ({', '.join(self.axes[place.name])}); "
                    "expected the same, prompts of one length."
                )
            # [cond | null]: a null item is not another item of the cond half
            halves = source.chunk(passes)
            coming = place.put(torch.cat([self._of_items(half) for half in halves]), entered)

        # What of it is let in.
        if self.patch.direction is not None:
            self.check_direction(old.shape[-1])
            unit = torch.nn.functional.normalize(self.patch.direction.detach().to(old), dim=0)
            coming = old + ((coming - old) @ unit)[..., None] * unit
        if self.patch.dose != 1:
            coming = old + self.patch.dose * (coming - old)
        return self.inside[place.name].merge(old, coming, self.axes[place.name])

    def _of_items(self, source: Tensor) -> Tensor:
        if self.patch.kind == "mean":
            mean: Tensor = ablation("mean")(source, None)
            return mean
        return (
            source[moved(len(source), self.patch.seed).to(source.device)]
            if self.patch.kind == "resample"
            else source
        )

    def check_direction(self, size: int | None) -> None:
        """Raise ValueError for a direction that is not of the last axis's size, where both are
        known: the number of text tokens is not before the first forward.
        """
        direction = self.patch.direction
        if direction is not None and size is not None and len(direction) != size:
            raise InvalidValue(
                f"{str(self.patch)!r}: the direction has {len(direction)} entries; {self.name!r} "
                f"has {size} ({self.axes[self.name][-1]})."
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
    """The patch checked against a model and a run of so many steps and items.

    Raises:
        ValueError: for what does not fit, in one sentence.
        UnknownName: for a site that the model does not have.
    """
    # Where it is.
    cfg = model.cfg
    if not -cfg.n_layers <= patch.layer < cfg.n_layers:
        raise InvalidValue(
            f"{str(patch)!r}: there is no layer {patch.layer}; the model has {cfg.n_layers}, 0 to "
            f"{cfg.n_layers - 1}."
        )
    layer = patch.layer % cfg.n_layers
    places = _places(patch, model, layer)
    if patch.tokens is not None or patch.band is not None:
        of_image = tuple(place for place in places if "token" in model.sites[place.name])
        places = of_image or places  # a name of text is refused below

    # When, and with what.
    window = range(steps) if patch.steps is None else patch.steps
    outside = [s for s in window if not 0 <= s < steps]
    if outside:
        raise InvalidValue(
            f"{str(patch)!r}: step {outside[0]} is outside the run; it has {steps} steps, 0 (the "
            f"noisiest) to {steps - 1}."
        )
    if patch.kind == "hold":
        try:
            check_steps(min(window, default=None), patch.lag, patch.order)
        except InvalidValue as error:
            raise InvalidValue(f"{str(patch)!r}: {error}") from None
    if patch.kind == "resample" and items < 2:
        raise InvalidValue(
            f"{str(patch)!r}: resampling takes another item's activation, and the source has "
            f"{items}; expected 2 or more."
        )

    # Which part of it.
    band = _band(patch, cfg.grid)
    inside = Region(heads=patch.heads, tokens=patch.tokens, band=band)
    axes = {place.name: model.sites[place.name] for place in places}
    first = axes[places[0].name]
    try:
        sizes = cfg.axis_sizes()
        for name, own in axes.items():
            inside.check(name, own, sizes)
        heads = _chosen("heads", patch.heads, "head", sizes)
        tokens = _chosen("tokens", patch.tokens, "token" if "token" in first else "query", sizes)
    except ValueError as error:
        raise InvalidValue(f"{str(patch)!r}: {error}") from None
    key = _digest(
        patch.kind,
        [tuple(place) for place in places],
        patch.seed if patch.kind == "resample" else None,
        (patch.lag, patch.order) if patch.kind == "hold" else None,
        heads,
        tokens,
        None if band is None else band[0].digest(band[1]),
        patch.direction,
        *([] if patch.dose == 1 else [patch.dose]),
    )
    planned = Planned(patch, places, layer, axes, dict.fromkeys(axes, inside), window, key)
    planned.check_direction(sizes.get(first[-1]))
    return planned


def joined(patches: Sequence[Planned]) -> Planned:
    """Patches that differ only in where they are, made at once, as one.

    Args:
        patches: one or more.
    """
    first = min(patches, key=lambda planned: planned.layer)
    places = tuple(dict.fromkeys(place for planned in patches for place in planned.places))
    axes = {name: own for planned in patches for name, own in planned.axes.items()}
    inside = {name: own for planned in patches for name, own in planned.inside.items()}
    key = _digest(*sorted({planned.key for planned in patches}))
    return (
        replace(first, places=places, axes=axes, inside=inside, key=key)
        if len(patches) > 1
        else first
    )


def _places(patch: Patch, model: HookedDiT, layer: int) -> tuple[Added, ...]:
    """The hook points of a patch in its layer."""
    names, n = model.names, model.cfg.n_layers
    if patch.kind == "skip":
        return (Added(f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_resid_pre"),)
    if patch.site == "block":
        if patch.kind not in OF_BLOCKS:
            raise InvalidValue(
                f"{str(patch)!r}: a whole block can't be patched so; expected one of "
                f"{', '.join(map(repr, OF_BLOCKS))}, or kind='skip'."
            )
        if layer + patch.depth > n:
            raise InvalidValue(
                f"{str(patch)!r}: there are {n - layer} layers from layer {layer} on; expected "
                f"depth={n - layer} or less."
            )
        require_parts(names)
        return stack(names, layer, layer + patch.depth)
    of_layer = parts(names, layer)
    if patch.site in of_layer:
        return of_layer[patch.site]
    found = select(patch.site, names)
    if any(layer_of(name) is None for name in found):
        raise InvalidValue(
            f"{str(patch)!r}: the hook point {found[0]!r} is in no layer; expected one that is, "
            "such as 'resid_post'."
        )
    name = model.resolve(patch.site, layer)
    try:
        return tuple(held_places(name, names)) if patch.kind == "hold" else (Added(name),)
    except InvalidValue as error:
        raise InvalidValue(f"{str(patch)!r}: {error}") from None


def _band(patch: Patch, grid: tuple[int, ...]) -> tuple[Bands, int | str] | None:
    bands, band = patch.bands, patch.band
    if bands is None or band is None:
        return None
    number = bands.number(band)
    if bands.grid != grid:
        raise InvalidValue(
            f"{str(patch)!r}: the bands are of a {_grid_text(bands.grid)} grid; expected the "
            f"tokens' {_grid_text(grid)}."
        )
    if not bands.sizes[number]:
        full = [name for name, size in zip(bands.names, bands.sizes, strict=True) if size]
        raise InvalidValue(
            f"{str(patch)!r}: band {band!r} holds no mode; the bands with modes are {full}."
        )
    return bands, band


def _chosen(field: str, index: Index | None, axis: str, sizes: dict[str, int]) -> Tensor | None:
    """Which places of an axis an index chooses, as a mask."""
    if index is None:
        return None
    mask = torch.zeros(sizes[axis], dtype=torch.bool)
    mask[arguments.positions(field, index, sizes[axis], axis=axis)] = True
    return mask


def _grid_text(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _index_text(index: Index) -> str:
    if isinstance(index, (int, slice)):
        return str(index)
    value = torch.as_tensor(index)
    return (
        str(value.flatten().tolist())
        if value.dtype != torch.bool
        else f"mask of {int(value.sum())}, {_digest(value)[:8]}"
    )


def _digest(*parts: Any) -> str:
    """A digest of numbers, texts and tensors, by their values."""
    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().double().contiguous()
            made.update(repr(tuple(values.shape)).encode() + values.numpy().tobytes())
        else:
            made.update(repr(part).encode())
        made.update(b";")
    return made.hexdigest()
