"""The map of causes: where in the layers and when in the run an intervention moves the finished
image, band by band.

The effect of an intervention is E_b = |P_b (x_edited - x)|² / D_b on the finished latents, D_b the
mean of the same between unrelated samples of one label: 0 is no effect, 1 is as different as
strangers are. By default the intervention is a hold, what every cache for DiTs does: a part of a
layer adds at one step what it added the step before.

All cells are measured to first order at once (`dit_lens.patching.first_order`); some are also run
exactly (`dit_lens.patching.sweep`), those of the largest effect, where the first order is most in
doubt, and others at random. How well both agree is printed; where a cell was run exactly, the map
has that value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..hooks.hold import Added, before, line, parts, require_parts, stack
from ..measures import Array
from ..measures.agreement import not_alone
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, simultaneous
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching.first_order import Additions, check_gradients, directions, projected_at
from ..patching.patch import Patch, steps_text
from ..patching.sweeps import check_patches, sweep
from ..pictures.result import Result
from ..pieces import Engine, Piece, enough, measured, results
from ..sampling.kept import kept_run
from ..sampling.loop import prepared
from ..sampling.run import Run
from ..sampling.sample import sample
from ..sampling.schedulers import default_name
from ..sampling.settings import checked_settings
from .spread import Spread, decided, item_labels, log_interval

MapKind = Literal["hold", "zero", "mean"]
HALVES = ("early", "late")
PARTS = ("front", "rear")


@measured
def cause_map(
    model: HookedDiT,
    kind: MapKind = "hold",
    sites: Sequence[str] | None = None,
    windows: Sequence[range] | None = None,
    *,
    lag: int = 1,
    order: int = 0,
    items: int = 16,
    labels: Labels | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    cut: float = CUT,
    projections: int = 4,
    check: int = 16,
    exact: bool = False,
    seed: int = 0,
    resamples: int = 1000,
    batch: int = 64,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
    """How far an intervention in each layer and window of steps moves the finished image.

    Args:
        model: the opened model, with a scheduler.
        kind: "hold", what the site added `lag` steps before; "zero", nothing; "mean", the mean of
            what it adds over the items.
        sites: parts of a layer, "attn", "mlp", ..., each all that it adds to every stream; and
            "block", all that the layer adds. By default every part of every layer.
        windows: ranges of steps; by default each step by itself, for "hold" from the first that has
            one to be held from.
        lag: of "hold", how many steps back.
        order: of "hold", 0, or 1 for the line through two earlier steps.
        items: samples, 8 or more.
        labels: one an item, or fewer, which are then taken in turn; by default the model's own.
        steps: of denoising.
        guidance: strength of classifier-free guidance.
        scheduler: as for `dit_lens.sample`.
        eta: as for `dit_lens.sample`.
        cut: between low and high, in cycles per pixel of the latents.
        projections: random directions an item and band for the first order.
        check: so many cells are also run exactly, half of them those of the largest effect.
        exact: run every cell exactly, and none to first order.
        seed: of the samples, the directions, the checked cells and the bootstrap.
        resamples: of the items.
        batch: images that go through the model at once; in exact cells at least those of one cell,
            with kind="mean" all of them.
        progress: called with how much is done, and how much there is.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `effect` [site, layer, window, band] with `effect_interval` [..., bound], 95 %
            for all cells at once; `is_exact` [site, layer, window]; `decided` [step, band], the
            share of the finished image's variance that the predicted x0 has by then, less the mean
            of each label, without attrs["alone"] items that are alone with theirs; `spread`
            [band], D_b. With checked cells `checked_exact`, `checked_first_order` [checked, band]
            and their agreement, `ratio` [band, bound] (median and the middle 90 % of exact over
            first order). `quadrant` [half, part, band] with its interval: the mean effect of a cell
            early or late, in the front or rear layers; for "hold" also `quadrant_held`, the effect
            of holding that quadrant's layers together at every second step. NaN where a layer has
            no such site. attrs["sentence"] says it, a line each.

    Raises:
        InvalidValue: for what does not fit the model, too few items, or windows that have nothing
            to be held from.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = cause_map(model, items=8, steps=3, projections=1, check=0, resamples=100)
    >>> dict(found.effect.sizes)
    {'site': 2, 'layer': 28, 'window': 2, 'band': 2}
    """
    del store, engine  # `measured` sees to them
    # What is asked for fits the model.
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    arguments.choice("kind", kind, get_args(MapKind))
    steps = arguments.whole("steps", steps, 3)
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    lag, order = arguments.whole("lag", lag, 1, 1000), arguments.whole("order", order, 0, 1)
    projections = arguments.whole("projections", projections, 1, 1000)
    check, seed = arguments.whole("check", check, 0), arguments.seed("seed", seed)
    resamples, batch = (
        arguments.whole("resamples", resamples, 1),
        arguments.whole("batch", batch, 1),
    )
    arguments.flag("exact", exact)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    require_parts(model.names)
    of_layer = [parts(model.names, i) for i in range(model.cfg.n_layers)]
    known = list(dict.fromkeys(part for each in of_layer for part in each))
    chosen = known if sites is None else arguments.listed("sites", sites, "parts of a layer")
    for site in arguments.unlike("sites", chosen):
        arguments.choice("sites", site, [*known, "block"])
    first = lag * (order + 1) if kind == "hold" else 0
    if windows is None:
        windows = [range(s, s + 1) for s in range(first, steps)]
    windows = arguments.listed("windows", windows, "ranges of steps")
    cells = [
        (site, layer, window)
        for site in chosen
        for layer in range(model.cfg.n_layers)
        for window in windows
        if site == "block" or site in of_layer[layer]
    ]

    def patch(site: str, layer: int, window: range, depth: int = 1) -> Patch:
        if site == "block" and kind == "zero":
            return Patch("resid_post", layer, window, kind="skip")
        return Patch(site, layer, window, kind=kind, lag=lag, order=order, depth=depth)

    patches = [patch(*cell) for cell in cells]
    check_patches(patches, model, steps, items, batch=batch, progress=progress)
    own = item_labels(model, items, labels)
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    name = default_name(model.scheduler) if scheduler is None else scheduler
    plan = prepared(model, checked_settings(steps, guidance, "all", name, eta))
    if not exact:
        check_gradients(plan)

    # The run itself, and how far strangers are apart.
    run = kept_run(
        "the run",
        lambda: sample(model, own, seed, steps, guidance, scheduler, eta, batch=batch),
        model,
        name,
    )
    spread = Spread(run, bands, draws(items, resamples, seed))
    quadrants = _quadrants(model.cfg.n_layers, steps, first) if kind == "hold" else {}
    work = _Work(progress, steps * (not exact), (exact and len(cells)) or check, len(quadrants))

    # To first order, all cells; exactly, some or all.
    energy = np.full((len(cells), items, bands.n), np.nan)
    if not exact:
        aims = directions(run, bands, projections, seed)
        energy = _first_order(run, cells, aims, kind, lag, order, of_layer, batch, work.steps)
    number = len(cells) if exact else min(check, len(cells))
    tested = _tested(energy.mean(1) / spread.of_all, number, seed)
    guess = energy[tested].copy()
    whole = [
        Patch("block", a, w, kind="hold", lag=lag, order=order, depth=b - a)
        for (a, b), w in quadrants.values()
    ]
    if tested or whole:
        todo = [patches[i] for i in tested] + whole
        swept = sweep(run, run, todo, bands, batch=batch, progress=work.sweep)
        energy[tested] = swept.distance.values[: len(tested)]
    enough()
    is_exact = np.isin(np.arange(len(cells)), tested)

    # As a map.
    shape = (len(chosen), model.cfg.n_layers, len(windows))
    place = [(chosen.index(s), layer, windows.index(w)) for s, layer, w in cells]
    at = tuple(np.array(place).T)
    effects = spread.relative(energy)  # [1 + resample, cell, band]
    result = _dataset(run, chosen, windows, bands, spread)
    for name, values, dims in (
        ("effect", effects[0], ("band",)),
        ("effect_interval", _intervals(effects, items), ("band", "bound")),
        ("is_exact", is_exact, ()),
    ):
        full = np.full((*shape, *values.shape[1:]), False if values.dtype == bool else np.nan)
        full[at] = values
        result[name] = (("site", "layer", "window", *dims), full)
    if len(tested) and not exact:
        _compare(result, cells, tested, spread.relative(guess)[0], effects[0][tested])
    _by_quadrant(result, cells, effects, steps, items)
    if whole:
        held = spread.relative(swept.distance.values[len(tested) :])
        _held_quadrants(result, list(quadrants), held, items)
    result.attrs |= {"kind": kind, "lag": lag, "order": order, "steps": steps, "items": items}
    result.attrs |= {"seed": seed, "cut": cut, "n_layers": model.cfg.n_layers}
    result.attrs |= {"projections": 0 if exact else projections, "guidance": guidance, "eta": eta}
    result.attrs["sentence"] = "\n".join(sentences(result))
    return Result.of(result)


def _first_order(
    run: Run,
    cells: Sequence[tuple[str, int, range]],
    aims: Tensor,
    kind: str,
    lag: int,
    order: int,
    of_layer: Sequence[dict[str, tuple[Added, ...]]],
    batch: int,
    tick: Callable[[int], None],
) -> Array:
    """|P_b J change|² of every cell, [cell, item, band], the mean over directions."""
    names = run.model.names
    places = [
        stack(names, layer, layer + 1) if site == "block" else of_layer[layer][site]
        for site, layer, _ in cells
    ]
    every = list(dict.fromkeys(place for of_cell in places for place in of_cell))
    summed = np.zeros((len(cells), *aims.shape[:3]))  # [cell, band, direction, item]
    windows = list(dict.fromkeys(window for *_, window in cells))

    def changes(
        step: int, here: Additions, elsewhere: Callable[[int], Additions]
    ) -> list[Additions]:
        seen: dict[int, Additions] = {step: here}

        def at(s: int) -> Additions:
            if s not in seen:
                seen[s] = elsewhere(s)
            return seen[s]

        def put(window: range, s: int, place: Added) -> Tensor:
            if kind == "zero":
                return torch.zeros_like(here[place])
            if kind == "mean":
                halves = here[place].chunk(run.passes)
                return torch.cat([h.mean(0, keepdim=True).expand_as(h) for h in halves])
            if s not in window:
                return at(s)[place]
            return line([put(window, earlier, place) for earlier in before(s, lag, order)])

        return [
            {place: put(window, step, place) - here[place] for place in every}
            if step in window
            else {}
            for window in windows
        ]

    # a mean is over all items
    at_once = len(run.labels) if kind == "mean" else max(1, batch // run.passes)
    firsts = range(0, len(run.labels), at_once)
    slices = [slice(first, first + at_once) for first in firsts]
    parts_of_run = [(part, run.select(part)) for part in slices]
    pulls = aims
    for step in reversed(range(run.settings.steps)):
        active = [i for i, (*_, window) in enumerate(cells) if step in window]

        def at_step(step: int = step, active: list[int] = active, pulls: Tensor = pulls) -> Any:
            pulls = pulls.clone()
            of_cells = np.zeros((len(active), *aims.shape[:3]))
            for part, some in parts_of_run:
                own = pulls[:, :, part].contiguous()
                found = projected_at(some, step, every, own, changes)
                pulls[:, :, part] = own
                by_window = dict(zip(windows, found, strict=True))
                for row, i in zip(of_cells, active, strict=True):
                    for place in places[i]:
                        row[..., part] += by_window[cells[i][2]][place]
            return {"moved": of_cells, "pulls": pulls.cpu().numpy()}

        (found,) = results([Piece(f"first order, step {step}", at_step)])
        summed[active] += found["moved"]
        pulls = torch.from_numpy(np.array(found["pulls"])).to(aims)
        tick(run.settings.steps - step)
    moved: Array = np.square(summed).mean(2).swapaxes(1, 2)
    return moved


def _tested(effects: Array, number: int, seed: int) -> list[int]:
    """Which cells [cell, band] are run exactly: all, or the largest and as many at random."""
    n = len(effects)
    if number >= n:
        return list(range(n))
    largest = np.argsort(-effects.max(1))[: -(-number // 2)]
    rest = np.setdiff1d(np.arange(n), largest)
    drawn = np.random.default_rng(seed).choice(rest, number - len(largest), replace=False)
    return sorted({*largest.tolist(), *drawn.tolist()})


def _dataset(
    run: Run, sites: Sequence[str], windows: Sequence[range], bands: Bands, spread: Spread
) -> xr.Dataset:
    """The map's axes, the commitment curves above it, and D."""
    alone = len(run.labels) - len(not_alone(run.labels.cpu()))
    return xr.Dataset(
        {
            "decided": (("step", "band"), decided(run, bands)),
            "spread": ("band", spread.of_all),
            "first": ("window", np.array([w[0] for w in windows], float)),
            "last": ("window", np.array([w[-1] for w in windows], float)),
        },
        coords={
            "site": list(sites),
            "layer": np.arange(run.model.cfg.n_layers),
            "window": [steps_text(w) for w in windows],
            "step": np.arange(run.settings.steps),
            "log_snr": ("step", run.log_snr.numpy()),
            "band": list(bands.names),
            "bound": ["low", "high"],
        },
        attrs={"level": 0.95, "alone": alone},
    )


def _intervals(effects: Array, items: int) -> Array:
    """[cell, band, bound] for all cells at once, from effects [1 + resample, cell, band], on the
    scale of logarithms, since effects are positive and differ by factors.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(effects.reshape(len(effects), -1))
    logs[:, ~np.isfinite(logs[0])] = np.nan
    ends = np.exp(simultaneous(logs, items)).reshape(*effects.shape[1:], 2)
    return np.where(effects[0][..., None] == 0, 0.0, ends)


def _compare(
    result: xr.Dataset,
    cells: Sequence[tuple[str, int, range]],
    tested: Sequence[int],
    guess: Array,
    exact: Array,
) -> None:
    """How exact cells and their first order agree."""
    result["checked_exact"] = (("checked", "band"), exact)
    result["checked_first_order"] = (("checked", "band"), guess)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(guess > 0, exact / guess, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where no checked cell has an effect
        quantiles = np.nanquantile(ratio, [0.5, 0.05, 0.95], axis=0).T
    result["ratio"] = (("band", "quantile"), quantiles)
    sites, layers, windows = zip(*(cells[i] for i in tested), strict=True)
    result.coords["checked_site"] = ("checked", list(sites))
    result.coords["checked_layer"] = ("checked", list(layers))
    result.coords["checked_first"] = ("checked", [w.start for w in windows])
    result.coords["quantile"] = [0.5, 0.05, 0.95]


def _quadrants(
    n_layers: int, steps: int, first: int
) -> dict[tuple[str, str], tuple[tuple[int, int], range]]:
    """Early or late, front or rear: which layers, and every second step of which half."""
    middle, half = n_layers // 2, steps // 2
    spans = {"front": (0, middle), "rear": (middle, n_layers)}
    times = {"early": range(first, half, 2), "late": range(max(first, half), steps, 2)}
    return {
        (when, where): (span, window)
        for when, window in times.items()
        for where, span in spans.items()
        if span[0] < span[1] and len(window)
    }


def _by_quadrant(
    result: xr.Dataset,
    cells: Sequence[tuple[str, int, range]],
    effects: Array,
    steps: int,
    items: int,
) -> None:
    """The mean effect of a cell of each quadrant."""
    middle, half = result.sizes["layer"] // 2, steps // 2
    late = np.array([window.start >= half for *_, window in cells])
    rear = np.array([layer >= middle for _, layer, _ in cells])
    found = np.full((len(effects), 2, 2, effects.shape[-1]), np.nan)
    for i in range(2):
        for j in range(2):
            inside = (late == bool(i)) & (rear == bool(j))
            if inside.any():
                found[:, i, j] = effects[:, inside].mean(1)
    result["quadrant"] = (("half", "part", "band"), found[0])
    result["quadrant_interval"] = (("half", "part", "band", "bound"), log_interval(found, items))
    result.coords["half"], result.coords["part"] = list(HALVES), list(PARTS)
    _late_over_early(result, found, items)


def _late_over_early(result: xr.Dataset, found: Array, items: int) -> None:
    """How many times the late effect is the early one, from [1 + resample, half, part, band]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found[:, 1] / found[:, 0]
    ratio[:, ~np.isfinite(ratio[0])] = np.nan  # no effect to compare with
    result["late_over_early"] = (("part", "band"), ratio[0])
    result["late_over_early_interval"] = (("part", "band", "bound"), log_interval(ratio, items))


def _held_quadrants(
    result: xr.Dataset, keys: Sequence[tuple[str, str]], held: Array, items: int
) -> None:
    """The effect of holding each quadrant as a whole."""
    found = np.full((len(held), 2, 2, held.shape[-1]), np.nan)
    for k, (when, where) in enumerate(keys):
        found[:, HALVES.index(when), PARTS.index(where)] = held[:, k]
    result["quadrant_held"] = (("half", "part", "band"), found[0])
    result["quadrant_held_interval"] = (
        ("half", "part", "band", "bound"),
        log_interval(found, items),
    )
    _late_over_early(result, found, items)


class _Work:
    """Progress over steps of the first order and patch-steps of the sweep, by their rough cost."""

    def __init__(
        self, progress: Callable[[int, int], object] | None, steps: int, cells: int, quadrants: int
    ) -> None:
        self.progress, self.first, self.patches = progress, 10 * steps, cells + quadrants
        self.total = self.first + self.patches

    def steps(self, done: int) -> None:
        if self.progress is not None:
            self.progress(10 * done, self.total)

    def sweep(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(self.first + math.floor(self.patches * done / total), self.total)


def sentences(result: xr.Dataset) -> list[str]:
    """What the map says: where the largest effects are, what early and late steps do, and how far
    the first order can be trusted.

    Args:
        result: of `cause_map`.
    """
    found = [_largest(result), *_early_late(result)]
    if "ratio" in result and np.isfinite(result.ratio).any():
        by_band = ", ".join(
            f"{band} {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
            for band, ratio in zip(result.band.values, result.ratio.values, strict=True)
            if np.isfinite(ratio).all()
        )
        found.append(
            f"Of cells that were also run exactly ({result.sizes['checked']}) this is exact over "
            f"first order, the median and the middle 90 %: {by_band}."
        )
    return found


def _largest(result: xr.Dataset) -> str:
    """The cell of the largest effect in each band."""
    words = []
    for band in result.band.values:
        effect = result.effect.sel(band=band)
        if not (effect > 0).any():
            words.append(f"{band} none in any cell")
            continue
        flat = int(np.nanargmax(effect.values))
        site, layer, window = np.unravel_index(flat, effect.shape)
        ends = result.effect_interval.sel(band=band).values[site, layer, window]
        value = Estimate.of(effect.values[site, layer, window], ends)
        words.append(
            f"{band} {value:.2g} at {result.site.values[site]}, layer {layer}, step "
            f"{result.window.values[window]}"
        )
    return (
        f"The largest effects of a {result.attrs['kind']}, 1 being a stranger's distance: "
        f"{'; '.join(words)}; 95 % for all cells at once."
    )


def _early_late(result: xr.Dataset) -> list[str]:
    """Whether the early steps are the cheaper ones, for the front and the rear layers."""
    held = "quadrant_held" in result
    what = (
        "Held at every second step, the {} layers move the image"
        if held
        else "A cell of the {} layers moves the image"
    )
    lines = []
    for part in PARTS:
        words = []
        for band in result.band.values:
            one = result.sel(part=part, band=band)
            ratio = Estimate.of(one.late_over_early, one.late_over_early_interval)
            if not ratio.known:
                continue
            way = "more" if ratio.low > 1 else "less" if ratio.high < 1 else "neither more nor less"
            words.append(f"{way} in {band} ({ratio:.2g} times)")
        if words:
            lines.append(f"{what.format(part)} late against early: {', '.join(words)}.")
    return lines
