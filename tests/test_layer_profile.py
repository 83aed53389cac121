"""The layer that is planted is the layer that is named, and random layers are not blamed; `python
tests/checks.py` does it at length.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.experiments import latents
from dit_lens.experiments.layer_profile import VIEWS, Streams, profile_values, profiles
from dit_lens.experiments.modes import Modes
from dit_lens.experiments.null_profiles import null_profiles, rank_p, shuffled
from dit_lens.experiments.release import release_sweep
from dit_lens.groundtruth import gaussian, planted, random_planted, random_weights, shuffle_layers
from dit_lens.measures.agreement import Agreement, Contrasts, curve
from dit_lens.measures.bootstrap import draws, interval, simultaneous
from dit_lens.measures.commitment import commitment_draws
from dit_lens.probes import LayerLens, TwinDivergence

torch.set_num_threads(1)


class Named(NamedTuple):
    """What was planted (None in a null model), and the onset that each view names (None for
    none).
    """

    planted: int | None
    onsets: dict[str, int | None]


def named(model: HookedDiT, seed: int, cut: float, pairs: int, steps: int) -> dict[str, int | None]:
    """The onset by every view, as `dit-lens gap` finds it, at two thirds of the run."""
    fine, split = (
        Bands.radial(model.cfg.grid, edges=[cut, 0.6]),
        Bands.radial(model.cfg.grid, cut=cut),
    )
    divergence, lens = TwinDivergence(fine), LayerLens(Bands.radial(model.cfg.pixels, cut=cut))
    labels = [i % min(model.cfg.n_classes, pairs // 2) for i in range(pairs)]
    pair = dit_lens.twins(model, pairs, labels, steps=steps, seed=seed, probes=[divergence, lens])
    clones = release_sweep(pair, [Streams.of_twins(pair, split)], min(6, steps - 1), seed=seed)
    stats, at = clones.stats["stream"], 2 * steps // 3
    commits = commitment_draws(stats, clones.releases, clones.log_snr, resamples=300, seed=seed)
    seen, counts = divergence.result(), draws(pairs, 300, seed)
    lensed = lens.result(pair.run.latents[-1])
    values = profile_values(seen, lensed, commits, split, fine, counts, at)
    _, onsets = profiles(values, seen, split, fine, pairs, steps, at)
    return {view: None if isinstance(found, str) else found.layer for view, found in onsets.items()}


def planted_model(seed: int, pairs: int = 24, steps: int = 6) -> Named:
    """Layers planted anywhere, of either sign, in either band, with noise on top."""
    truth = random_planted(seed)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    return Named(truth.answer["onset"], named(model, seed, 0.1, pairs, steps))


def null_model(
    seed: int, kind: str = "random", pairs: int = 24, steps: int = 16, other_twins: int = 0
) -> Named:
    """Random weights, or `digits` with its layers in another order; `other_twins` is added to
    the seed of the twins.
    """
    digits = dit_lens.load("digits")
    if kind == "random":
        truth = random_weights(seed).transformer
    else:
        truth = shuffle_layers(digits.transformer, seed)
    model = HookedDiT(truth, scheduler=digits.scheduler)
    return Named(None, named(model, seed + other_twins, 0.25, pairs, steps))


@pytest.mark.slow
def test_planted_layers_are_named_by_the_growth_of_the_difference():
    found = [planted_model(seed) for seed in range(3)]
    assert [one.onsets["growth"] for one in found] == [one.planted for one in found]
    # a gain is no delay
    assert all(one.onsets["stream"] is None and one.onsets["lens"] is None for one in found)


def test_a_single_planted_layer_is_named_even_if_it_is_the_first():
    for layer in (0, 7, 11):
        truth = planted([layer], -0.2, 12, "high", noise=0.02)
        model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
        assert named(model, 1, 0.1, 16, 4)["growth"] == layer


@pytest.mark.slow
def test_random_layers_are_not_blamed():
    found = [null_model(seed, steps=10, pairs=16) for seed in range(2)]
    assert all(one.onsets["growth"] is None and one.onsets["lens"] is None for one in found), found


@pytest.mark.parametrize("band", ["low", "high"])
def test_bands_are_merged_by_the_cut(band):
    """Energies in three bands give the same profile as in two: merging adds them up."""
    truth = planted([2], 0.4, 4, band)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    got = []
    for fine in (
        Bands.radial(model.cfg.grid, edges=[0.1, 0.3, 0.5]),
        Bands.radial(model.cfg.grid, cut=0.1),
    ):
        seen, lens = TwinDivergence(fine), LayerLens(Bands.radial((8, 8), cut=0.1))
        pair = dit_lens.twins(model, 8, [0] * 8, steps=4, probes=[seen, lens])
        counts, split = np.ones((201, 8)), Bands.radial(model.cfg.grid, cut=0.1)
        seen, lensed = seen.result(), lens.result(pair.run.latents[-1])
        stream = np.ones((201, 2 * seen.sizes["layer"]))
        values = profile_values(seen, lensed, stream, split, fine, counts, 2)
        got.append(profiles(values, seen, split, fine, 8, 4, 2)[0])
    for name in ("log_ratio", "layer_gap", "difference_energy"):
        np.testing.assert_allclose(got[0][name], got[1][name], rtol=1e-4)
    growth = got[0].log_ratio.sel(energy="growth")
    np.testing.assert_allclose(
        np.diff(growth), [0, 0, 2 * np.log(1.4) * (1 if band == "low" else -1), 0], atol=1e-3
    )


def modes_of(model: HookedDiT, cut: float) -> Modes:
    split = Bands.radial(model.cfg.grid, cut=cut)
    pixels = Bands.radial(model.cfg.pixels, cut=cut)
    return Modes(pixels, pixels, pixels, split, split)


@pytest.mark.slow
def test_late_planted_layers_are_later_than_shuffled_ones_would_be():
    """Power of the null: of 12 layers the last two amplify, so the growth changes there alone."""
    truth = planted([10, 11], 0.4, 12, noise=0.01, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    found = null_profiles(model, 19, modes_of(model, 0.1), steps=4, seed=1)
    growth = found.sel(profile="growth")
    assert float(growth.null_p) == 0.05 and float(growth.late_share) > 0.9
    assert (growth.null_late_share < growth.late_share).all()
    # the model is as it was
    assert all(torch.equal(before[k], v) for k, v in model.transformer.state_dict().items())


def test_a_null_model_is_the_same_again_and_has_the_same_layers_in_another_order():
    model = HookedDiT(random_weights(0, n_layers=4).transformer, scheduler=DDIMScheduler(1000))
    a, b, c = (shuffled(model, seed).transformer.transformer_blocks for seed in (1, 1, 2))

    def weights(blocks):
        return [block.attn1.to_q.weight for block in blocks]

    assert all(torch.equal(*both) for both in zip(weights(a), weights(b), strict=True))
    own = weights(model.transformer.transformer_blocks)
    for null in (weights(a), weights(c)):
        where = [[torch.equal(one, other) for other in own].index(True) for one in null]
        assert sorted(where) == [0, 1, 2, 3] and where != [0, 1, 2, 3]


def late_claim(seed: int, nulls: int = 19, layers: int = 6) -> dict[str, float]:
    """p-values of a model with random weights, in which no order is special."""
    truth = random_weights(1000 + seed, n_layers=layers)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = null_profiles(model, nulls, modes_of(model, 0.25), steps=6, seed=100 * seed)
    return {view: float(found.null_p.sel(profile=view)) for view in VIEWS}


def white_stream(seed: int, pairs: int = 16, steps: int = 12) -> bool:
    """Whether clones of white data are said to have a gap in the stream of any layer, at once."""
    truth = gaussian(1.0, 1.0, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    split = Bands.radial(model.cfg.grid, cut=0.1)
    pair = dit_lens.twins(model, pairs, [0] * pairs, steps=steps, seed=seed)
    clones = release_sweep(pair, [Streams.of_twins(pair, split)], 6, seed=seed)
    stats = clones.stats["stream"]
    taus = commitment_draws(stats, clones.releases, clones.log_snr, resamples=300, seed=seed)
    # the finite steps' own gap is 0 too: both bands have the same curve
    ends = simultaneous(taus[:, 1::2] - taus[:, ::2], pairs)
    return bool((ends[:, 0] > 0).any() or (ends[:, 1] < 0).any())


def test_a_rank_is_a_p_value():
    null = np.arange(19.0)
    assert rank_p(20, null) == 0.05 and rank_p(18, null) == 0.1 and rank_p(-1, null) == 1
    # what is not known of a null model counts against a claim, and a model's own is none
    assert rank_p(20, np.append(null[1:], np.nan)) == 0.1 and np.isnan(rank_p(np.nan, null))


@pytest.mark.parametrize("lam", [(4.0, 0.25), (1.0, 1.0)])
def test_clones_agree_in_every_stream_as_in_the_image(lam):
    """E1: on Gaussian data the stream is linear in the image, so the image's commitment is that of
    every layer; a white spectrum has no gap in any.
    """
    truth = gaussian(*lam, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    pair = dit_lens.twins(model, 32, [0] * 32, steps=12)
    split = Bands.radial(model.cfg.grid, cut=0.1)
    outcomes = [latents(split), Streams.of_twins(pair, split)]
    clones = release_sweep(pair, outcomes, 6, by=["latents"])
    image, stream = (clones.agreement(name) for name in ("latents", "stream"))
    assert stream.shape == (6, 2 * 4) and clones.bands["stream"][2] == "layer 0, low"
    np.testing.assert_allclose(
        stream.reshape(6, 4, 2)[..., 1], image[:, 1:] + np.zeros(4), atol=0.02
    )
    np.testing.assert_allclose(
        stream.reshape(6, 4, 2)[..., 0], image[:, :1] + np.zeros(4), atol=0.2
    )
    taus = commitment_draws(clones.stats["stream"], clones.releases, clones.log_snr, resamples=300)
    gap = (taus[..., 1::2] - taus[..., ::2]) * np.sign(lam[0] - lam[1] or 1)
    ends = interval(gap, 32)
    assert (ends[:, 0] < 0.5).all() if lam[0] == lam[1] else (ends[:, 0] > 0).all()


def test_strangers_agree_in_nothing_and_constant_channels_do_not_count():
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    pair = dit_lens.twins(model, 64, [0] * 64, steps=8, seed=1)
    stream = Streams.of_twins(pair, Bands.radial(model.cfg.grid, cut=0.1))
    other = dit_lens.twins(model, 64, [0] * 64, steps=8, seed=2)
    a, b = pair.a.latents[-1], other.a.latents[-1]
    contrasts = Contrasts([0] * 64, 64)
    strangers, same = (curve(Agreement.of(stream.sums(a, x, contrasts))) for x in (b, a))
    assert (np.abs(strangers) < 4 / np.sqrt(64 * 3)).all()
    np.testing.assert_allclose(same, 1, atol=1e-6)
    parts = replace(stream, batch=48).sums(a, b, contrasts)
    np.testing.assert_allclose(parts, stream.sums(a, b, contrasts), rtol=1e-3, atol=1e-3)
