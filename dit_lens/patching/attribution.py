"""Attribution: what every patch would do, estimated at once from gradients, with how well the
estimate agrees with the exact sweep.

To first order a patch moves the outcome by ⟨dOutcome/dh, h_source - h_target⟩ (attribution
patching, Nanda 2023; Syed et al. 2023, arXiv 2310.10348). The derivative goes back through the rest
of the denoising run: each step is run once more with its graph and pulled back, the last step
first, so memory is that of one step and time that of one forward and one backward of the run. With
`integrate` = n the derivative of the model is the mean over n points on the way from the target's
x_t to the source's (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365; of the
inputs, as in Hanna et al. 2024, arXiv 2403.17806), which sees what a single point does not; that of
the distance at the end stays the target's, since a single patch hardly moves it. Half-way between
two unrelated runs no run ever is, so for those the plain gradient is the better estimate: `check`
shows it.

The estimates of a window are the sums of its steps. That is an approximation too; `check` measures
all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..hooks.names import layer_of, select
from ..hooks.points import HookPoint
from ..measures.bands import Bands
from ..model.hooked import HookedDiT
from ..sampling.loop import advance, model_output
from ..sampling.run import Run
from ..sampling.settings import Progress, edits_at
from .first_order import check_gradients
from .measure import energy, latent_bands
from .patch import Patch
from .sweeps import check_kind_of_runs, check_runs, sweep


def attribute(
    source: Run,
    target: Run,
    sites: str | Sequence[str] = ("attn_out", "mlp_out"),
    *,
    bands: Bands | None = None,
    integrate: int = 1,
    check: int = 0,
    window: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The estimated move of every patch of `source` into `target`: one layer, one site, one step.

    Args:
        source: the run that patches would be taken from, such as twin A.
        target: the run that would be patched, such as twin B; see `check_runs` for what fits.
        sites: one hook point that every layer has, or several.
        bands: of the latents' pixel grid; by default "low" and "high".
        integrate: points of the integral; 1 is the gradient at the target alone.
        check: so many random patches are also run exactly.
        window: how many steps each of these has.
        seed: what they are drawn from.
        progress: called with the steps done and in all.

    Returns:
        Dataset with `estimate` [layer, site, step, band], the move as `sweep` defines it: 0
        nothing, 1 the source made of the target. Sum over steps for a window's estimate. With
        `check` also `checked_exact`, `checked_estimate` [checked, band] with coordinates
        checked_layer, checked_site and checked_first (step), and their `correlation` [band];
        attrs["sentence"] says it.

    Raises:
        ValueError: for runs that do not fit each other, a site that not every layer has, schedulers
            with a memory (the gradient would have to go back through it), or inside
            torch.inference_mode.
        RuntimeError: if the weights have changed since.

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=1, release=1, steps=3)
    >>> attribute(pair.a, pair.b).estimate.sizes
    Frozen({'layer': 28, 'site': 2, 'step': 3, 'band': 2})
    """
    # What is asked for fits the runs.
    check_kind_of_runs(source, target)
    model, settings = target.model, target.settings
    if torch.is_inference_mode_enabled() or target.latents.is_inference():
        raise InvalidValue(
            "Gradients are asked of a model in torch.inference_mode(); leave it, or use "
            "torch.no_grad() for what comes before."
        )
    integrate = arguments.whole("integrate", integrate, 1)
    check = arguments.whole("check", check, 0)
    window = arguments.whole("window", window, 1, settings.steps if check else arguments.MANY)
    seed = arguments.seed("seed", seed)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    check_gradients(target.scheduler)
    for run in (source, target):
        run.require_released(0)  # the derivative goes back to the first step
    sites = [sites] if isinstance(sites, str) else arguments.listed("sites", sites, "hook points")
    names = [_in_every_layer(model, arguments.text("sites", site)) for site in sites]
    arguments.unlike("sites", list(sites))
    bands = latent_bands(bands, target)
    check_runs(source, target)

    # The derivative at the end, of the distance |P_b(x - source)|²: 2 P_b(x - source).
    away = target.finished - source.finished
    apart = energy(away, bands).sum(0)
    end = [2 * bands.project(away, b) for b in range(bands.n)]

    # Step by step it is pulled back, for every point of the integral through a run of its own.
    shares = [0.0] if integrate == 1 else [(i + 0.5) / integrate for i in range(integrate)]
    pulls = [list(end) for _ in shares]
    found = np.zeros((model.cfg.n_layers, len(sites), settings.steps, bands.n))
    for step in reversed(range(settings.steps)):
        begin, goal = (run.here(run.latents[step]) for run in (target, source))
        theirs, ours = (
            _activations(run, x, step, names)[0] for run, x in ((source, goal), (target, begin))
        )
        change = [a - h for a, h in zip(theirs, ours, strict=True)]
        for share, pull in zip(shares, pulls, strict=True):
            x = torch.lerp(begin, goal, share).requires_grad_()
            with torch.enable_grad():
                seen, following = _activations(target, x, step, names, graph=True)
            for b in range(bands.n):
                pull[b], *gradients = torch.autograd.grad(
                    following,
                    [x, *seen],
                    pull[b],
                    retain_graph=b + 1 < bands.n,
                    materialize_grads=True,  # what an edit behind it leaves unread: nothing
                )
                moved = torch.stack([(g * d).sum() for g, d in zip(gradients, change, strict=True)])
                with np.errstate(invalid="ignore", divide="ignore"):  # equal runs: NaN
                    per_site = moved.double().cpu().numpy() / integrate / apart[b]
                found[:, :, step, b] -= per_site.reshape(len(sites), -1).T
        if progress is not None:
            progress(settings.steps - step, settings.steps)

    result = xr.Dataset(
        {"estimate": (("layer", "site", "step", "band"), found)},
        coords={
            "layer": np.arange(model.cfg.n_layers),
            "site": sites,
            "step": np.arange(settings.steps),
            "band": list(bands.names),
        },
        attrs={"integrate": integrate},
    )
    return _against_exact(result, source, target, bands, check, window, seed) if check else result


def _against_exact(
    result: xr.Dataset, source: Run, target: Run, bands: Bands, check: int, window: int, seed: int
) -> xr.Dataset:
    """The estimates, with exact patches at random places to compare them with."""
    # Where.
    rng, steps = np.random.default_rng(seed), target.settings.steps
    places = [
        (
            int(rng.integers(result.sizes["layer"])),
            str(rng.choice(result.site.values)),
            int(rng.integers(steps - window + 1)),
        )
        for _ in range(check)
    ]

    # Exactly, and as estimated.
    patches = [Patch(site, layer, range(first, first + window)) for layer, site, first in places]
    exact = sweep(source, target, patches, bands).move.values
    guess = np.stack(
        [
            result.estimate.sel(layer=layer, site=site)
            .isel(step=slice(first, first + window))
            .sum("step")
            .values
            for layer, site, first in places
        ]
    )
    layers, sites, firsts = zip(*places, strict=True)
    result = result.assign(
        checked_exact=(("checked", "band"), exact), checked_estimate=(("checked", "band"), guess)
    ).assign_coords(
        checked_layer=("checked", list(layers)),
        checked_site=("checked", list(sites)),
        checked_first=("checked", list(firsts)),
    )

    # How well they agree.
    with np.errstate(invalid="ignore", divide="ignore"):
        agree = [float(np.corrcoef(exact[:, b], guess[:, b])[0, 1]) for b in range(bands.n)]
        slope = [
            float((exact[:, b] * guess[:, b]).sum() / (guess[:, b] ** 2).sum())
            for b in range(bands.n)
        ]
    result["correlation"] = ("band", agree)
    by_band = ", ".join(
        f"{name} r = {r:.2f}, exact/estimate {s:.2f}"
        for name, r, s in zip(bands.names, agree, slope, strict=True)
    )
    result.attrs["sentence"] = f"Against {check} exact patches of {window} steps: {by_band}."
    return result


def _activations(
    run: Run, x: Tensor, step: int, names: list[list[str]], graph: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The sites' activations at one step of the run from x_t, site by site and layer by layer, and
    the next x_t.
    """
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, point: HookPoint) -> None:
        seen[point.name] = value if graph else value.clone()

    model, settings = run.model, run.settings
    scheduler = run.fresh_scheduler()
    wanted = [name for some in names for name in some]
    with (
        run.restored(),
        torch.set_grad_enabled(graph),
        model.hooks(edits_at(run.history, step)),
        model.observing(wanted, keep),
    ):
        output = model_output(model, x, step, run.labels, settings, scheduler)
        following = advance(scheduler, output, x, run.seeds_at(step), step, settings.eta)
    return [seen[name] for name in wanted], following


def _in_every_layer(model: HookedDiT, site: str) -> list[str]:
    found = [name for name in select(site, model.names) if layer_of(name) is not None]
    if len(found) != model.cfg.n_layers:
        raise InvalidValue(
            f"site={site!r} is {len(found)} hook points; attribution needs one in each of "
            f"{model.cfg.n_layers} layers, such as 'resid_post'."
        )
    return found
