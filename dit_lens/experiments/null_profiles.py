"""Profiles over depth of null models: the same layers in another order.

A shuffled model still amplifies what it was trained to amplify, only at another depth. So whatever
a profile of the model shows, it says something about depth only if the same of shuffled models
rarely does. What is compared was settled before any was measured: the *late share*, what the last
layers (the paper's last five of 28) change of the profile, as a share of its range over depth. If
the order of the layers did not matter, each of the N + 1 models would be equally likely to have the
largest, so (1 + how many null models have as much) / (N + 1) is a p-value, exactly, for each view
by itself. The model is measured as its nulls are, with as few pairs and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr

from dit_lens.probes import LayerLens, TwinDivergence

from ..errors import InvalidValue
from ..groundtruth.nulls import shuffle_layers
from ..measures import Array
from ..measures.commitment import commitment_draws
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pieces import Piece, results
from ..twinning.twins import labels_of_fewer, twins
from .layer_profile import VIEWS, Streams, last_layers, profile_values
from .modes import Modes
from .release import release_sweep

FEWEST = 19
"""Fewer null models than this can't give a p-value of 0.05."""
PAIRS, STEPS, RELEASES = 16, 12, 6


def shuffled(model: HookedDiT, seed: int) -> HookedDiT:
    """The model with its layers in another order, opened; the model itself is left alone.

    Args:
        model: the opened model, with two layers of a kind or more.
        seed: of the order.

    >>> import dit_lens; shuffled(dit_lens.load("digits"), 0).cfg.n_layers
    28
    """
    copy = shuffle_layers(model.transformer, seed, model.family.blocks)
    null = HookedDiT(
        copy, scheduler=model.scheduler, size=model.size, trajectories=model.trajectories
    )
    null.conditions = model.conditions
    return null


def null_profiles(
    model: HookedDiT,
    nulls: int,
    modes: Modes,
    *,
    labels: Labels | None = None,
    steps: int = STEPS,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> xr.Dataset:
    """The profiles of a model and of null models made from it, and how late they change.

    Args:
        model: the opened model, with a scheduler.
        nulls: how many null models, 19 or more.
        modes: of the views.
        labels: of the twins, in turn; by default the model's own.
        steps: of denoising, 12 or fewer.
        seed: of the twins, the same for all models; null model i has the layers of seed + i.
        batch: images that go through a model at once; None is all.
        progress: called with how many models are done.

    Returns:
        xr.Dataset: `late_share` [profile] of the model, `null_late_share` [profile, null] and
            `null_p` [profile], NaN where the model's profile is not known throughout;
            `null_profile` [profile, null, layer].
    """
    steps, asked = min(steps, STEPS), labels_of_fewer(model, PAIRS, labels)
    done = 0

    def profile(i: int) -> dict[str, Array]:
        one = shuffled(model, seed + i) if i else model
        return _profiles(one, modes, asked, steps, seed, batch)

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done)

    pieces = [Piece(f"null model {i}", partial(profile, i)) for i in range(nulls + 1)]
    found = results(pieces, told)
    own, null = found[0], found[1:]
    shares = {view: np.array([late_share(one[view]) for one in found]) for view in VIEWS}
    return xr.Dataset(
        {
            "late_share": ("profile", [shares[view][0] for view in VIEWS]),
            "null_late_share": (("profile", "null"), [shares[view][1:] for view in VIEWS]),
            "null_p": ("profile", [rank_p(shares[view][0], shares[view][1:]) for view in VIEWS]),
            "null_profile": (
                ("profile", "null", "layer"),
                np.array([[one[view] for one in null] for view in VIEWS]),
            ),
        },
        {
            "profile": list(VIEWS),
            "null": np.arange(1, nulls + 1),
            "layer": np.arange(-1, len(own[VIEWS[0]]) - 1),
        },
        {"null_pairs": PAIRS, "null_steps": steps},
    )


def late_share(profile: Array) -> float:
    """What the last layers change of a profile [layer], the embedding first, as a share of its
    range; NaN where it is not known throughout, 0 where it is flat.

    >>> late_share(np.r_[np.zeros(24), np.arange(1.0, 6)])
    1.0
    """
    if not np.isfinite(profile).all():
        return float("nan")
    span = float(np.ptp(profile))
    change = float(abs(profile[-1] - profile[-1 - last_layers(len(profile) - 1)]))
    return change / span if span else 0.0


def rank_p(own: float, null: Array) -> float:
    """The share of the models, own and null, with as much as this one; an unknown null counts as
    much, and the p-value of what is unknown is NaN.

    >>> rank_p(0.9, np.full(19, 0.5))
    0.05
    """
    if not np.isfinite(own):
        return float("nan")
    return float((1 + (~(null < own)).sum()) / (1 + len(null)))


def _profiles(
    model: HookedDiT, modes: Modes, labels: list[int], steps: int, seed: int, batch: int | None
) -> dict[str, Array]:
    """Every view of one model, [layer], without intervals; those in energy at two thirds."""
    divergence, lens = TwinDivergence(modes.token_spectrum), LayerLens(modes.split)
    probes = [divergence, lens]
    pair = twins(model, PAIRS, labels, steps=steps, seed=seed, probes=probes, batch=batch)
    streams = Streams.of_twins(pair, modes.token_split, batch)
    clones = release_sweep(pair, [streams], min(RELEASES, steps - 1), seed=seed, batch=batch)
    ones = np.ones((1, PAIRS))
    commits = commitment_draws(
        clones.stats["stream"], clones.releases, clones.log_snr, resamples=1, seed=seed
    )
    seen, lensed = divergence.result(), lens.result(pair.run.finished)
    values = profile_values(
        seen, lensed, commits[:1], modes.token_split, modes.token_spectrum, ones, 2 * steps // 3
    ).values
    return {view: value[0] for view, value in values.items()}


def depth_sentence(view: str, title: str, results: xr.Dataset) -> str:
    """What may be said of a profile's depth, held against its nulls.

    Args:
        view: one of the four.
        title: of the view.
        results: of `null_profiles`, with the onset's sentence as an attribute.
    """
    one = results.sel(profile=view)
    n, p = one.sizes["null"], float(one.null_p)
    layers = results.sizes["layer"] - 1
    last = last_layers(layers)
    where = (
        f"the last {last} of {layers} layers make"
        if last > 1
        else (f"the last of {layers} layers makes")
    )
    if not np.isfinite(p):
        return (
            f"{title}: the profile is not known in every layer with {results.attrs['null_pairs']} "
            f"pairs and {results.attrs['null_steps']} steps, so it can't be held against null "
            "models: no claim about depth."
        )
    what = f"{title}: {where} {float(one.late_share):.0%} of the profile's range"
    more = round(p * (n + 1)) - 1
    if p > 0.05:
        return (
            f"{what}; so much or more in {more} of {n} models with the same layers in another "
            f"order (p = {p:.2f}): no claim about depth."
        )
    rarely = f"in {more} of" if more else "in none of"
    named = results.attrs[f"onset_layer_{view}"] >= layers - last
    onset = results.attrs[f"onset_{view}"] if named else "No onset lies in these layers."
    return (
        f"{what}; so much or more {rarely} {n} models with the same layers in another order "
        f"(p = {p:.2g}, for this view by itself). {onset}"
    )


def checked_nulls(nulls: int) -> int:
    """How many null models, 0 or as many as a p-value needs; raises InvalidValue otherwise."""
    if nulls and nulls < FEWEST:
        raise InvalidValue(
            f"null={nulls} can't be used; expected 0, for no claim about depth, or {FEWEST} or "
            "more: fewer null models can't give a p-value of 0.05."
        )
    return nulls
