"""Release sweeps and the one-pass estimator on an exact denoiser (E1 in docs/checks.md), and what
they say of wrong input.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.experiments import (
    commitment_difference,
    features,
    images,
    latents,
    measure_gap,
    one_pass,
    release_sweep,
)
from dit_lens.experiments.attributes import Categories
from dit_lens.experiments.outcomes import Outcome, once
from dit_lens.experiments.release import steepest
from dit_lens.families import family_named
from dit_lens.groundtruth import ddim_agreement, gaussian
from dit_lens.measures.agreement import Agreement, Contrasts
from dit_lens.model.quiet import quiet

STEPS, LAM = 16, (4.0, 0.25)


@pytest.fixture(scope="module")
def exact():
    truth = gaussian(*LAM, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    scheduler = DDIMScheduler.from_config(truth.scheduler.config)
    scheduler.set_timesteps(STEPS)
    visited = scheduler.alphas_cumprod[scheduler.timesteps]
    curves = np.array(
        [[float(ddim_agreement([lam], visited, r)[0]) for lam in LAM] for r in range(STEPS)]
    )
    return model, dit_lens.twins(model, 96, [0] * 96, steps=STEPS), curves


SPLIT = Bands.radial((8, 8), cut=0.1)  # the token mean alone is low


def test_clones_and_one_pass_are_the_exact_curve(exact):
    model, pair, curves = exact
    clones = release_sweep(pair, [latents(SPLIT)], releases=[4, 8, 12])
    # of a correlation; the low band has three modes a pair
    error = (1 - curves[[4, 8, 12]] ** 2) / np.sqrt(96 * 3)
    assert clones.estimator == "clones" and clones.releases == (4, 8, 12)
    assert (np.abs(clones.agreement("latents") - curves[[4, 8, 12]]) < 3 * error + 0.01).all()
    for quantity in ("x0", "x_t"):  # for one mode x0 is x_t times a number, so both are the curve
        one = one_pass(pair, [latents(SPLIT)], quantity)
        assert (np.abs(one.agreement("latents") - curves) < 0.15).all() and one.releases == tuple(
            range(STEPS)
        )
    one = one_pass(pair, [latents(SPLIT)])
    apart = commitment_difference(one, clones, "latents")
    assert (
        "no difference above 0.16 steps (1 % of the run) can be told with 96 pairs"
        in apart.attrs["sentence"]
    )
    assert apart.attrs["paired"] and "an exact denoiser's has 0.50" in apart.attrs["sentence"]
    # half of the variance is predicted where half is decided, in any number of steps
    assert np.abs(apart.variance - 0.5).max() < 0.1
    low, high = apart.variance_interval.values.T
    assert (low < 0.5).all() and (0.5 < high).all()
    # the same runs move both: the interval is narrower than that of independent ones
    alone = commitment_difference(replace(one, source="another"), clones, "latents")
    assert not alone.attrs["paired"]
    width, wide = (np.ptp(d.commitment_interval.values, axis=1) for d in (apart, alone))
    assert (width < wide).all()


def test_a_wrong_denoiser_is_seen_by_the_difference():
    """An x0 that is four steps behind: one pass then says what clones do not."""
    truth = gaussian(1.0, 1.0, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    pair = dit_lens.twins(model, 64, [0] * 64, steps=STEPS)
    one = one_pass(pair, [latents(SPLIT)])
    clones = release_sweep(pair, [latents(SPLIT)], releases=6)
    backwards, late = (
        replace(one, stats={"latents": Agreement(*(part[order] for part in one.stats["latents"]))})
        for order in (np.arange(STEPS)[::-1], np.clip(np.arange(STEPS) - 4, 0, None))
    )
    assert (
        "this difference says nothing about the denoiser"
        in commitment_difference(backwards, clones, "latents").attrs["sentence"]
    )
    assert (
        "they differ in low, high (0 is outside the interval and the estimate beyond 0.16 steps, "
        "1 % of the run): the denoiser is measurably not the exact one there"
        in commitment_difference(late, clones, "latents").attrs["sentence"]
    )


def test_one_pass_tells_its_progress(exact):
    _, pair, _ = exact
    told = []
    one_pass(pair, [latents(SPLIT)], progress=lambda *done: told.append(done))
    assert told == [(done, STEPS) for done in range(1, STEPS + 1)]


def test_modes_that_several_outcomes_compare_are_computed_once(exact, monkeypatch):
    """And are those that each outcome alone compares."""
    _, pair, _ = exact
    fine = Bands.radial((8, 8), n=3)
    other = Bands.dct((8, 8), n=3)  # of other modes, so for itself
    outcomes = [latents(SPLIT, "a"), latents(fine, "b"), latents(other, "c")]
    made, own = [], Contrasts.modes
    monkeypatch.setattr(Contrasts, "modes", lambda *args: made.append(1) or own(*args))
    one, clones = one_pass(pair, outcomes), release_sweep(pair, outcomes, [4, 8, 12])
    assert len(made) == 2 * (STEPS + 1) + 2 * (3 + 1)  # two bases; each step, release and the end
    for o in outcomes:
        for whole, alone in (
            (one, one_pass(pair, [o])),
            (clones, release_sweep(pair, [o], [4, 8, 12])),
        ):
            for a, b in zip(whole.statistics(o.name), alone.statistics(o.name), strict=True):
                assert (a == b).all()


def test_releases_are_spent_where_the_curve_rises(exact):
    _, pair, curves = exact
    told = []
    found = release_sweep(
        pair, [latents(SPLIT)], releases=6, progress=lambda *done: told.append(done)
    )
    assert len(found.releases) == 6 and told == [(done, 6) for done in range(1, 7)]
    rising = np.flatnonzero(((curves > 0.05) & (curves < 0.95)).any(1))
    # the first guesses are made blindly
    assert sum(rising[0] - 1 <= r <= rising[-1] + 1 for r in found.releases) >= 5
    assert (
        steepest({}, 10) == 4
        and steepest({4: np.array([0.1])}, 10) == 7
        and steepest({4: np.array([0.9])}, 10) == 1
    )


def test_images_and_features_are_read_too(exact):
    model, pair, _ = exact
    outcomes = [images(model), features(model, lambda x: x.mean((2, 3)))]
    found = release_sweep(pair, outcomes, releases=[4, 8, 12])
    assert found.bands == {"images": ("low", "high"), "features": ("features",)}
    assert (
        found.agreement("features").shape == (3, 1)
        and (np.diff(found.agreement("features")[:, 0]) > 0).all()
    )
    direct = (pair.a.latents[-1] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(outcomes[0].of(pair.a.latents[-1]), direct)


def test_a_coupled_sweep_runs_both_twins_alone_from_the_release():
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    tied = dit_lens.twins(
        model, 8, [3] * 8, tie="attention", g=0.7, eps=0.5, steps=6, release=6, seed=5
    )
    found = release_sweep(tied, [latents(SPLIT)], releases=[0, 3, 5])
    assert found.estimator == "coupled"
    whole = dit_lens.twins(
        model, 8, [3] * 8, tie="attention", g=0.7, eps=0.5, steps=6, release=3, seed=5
    )
    by_hand = latents(SPLIT).compare(whole.a.latents[-1], whole.b.latents[-1], [3] * 8)
    assert np.allclose(found.stats["latents"].xy[1], by_hand.xy, rtol=1e-4)


def test_bad_input(exact):
    model, pair, _ = exact
    outcome = [latents(SPLIT)]
    tied = dit_lens.twins(model, 8, [0] * 8, tie="attention", g=0.5, steps=6, release=3)
    other = HookedDiT(make_dit(channels=3, classes=1), scheduler=DDIMScheduler(1000))
    for call, text in [
        (
            lambda: release_sweep(pair, outcome, releases=2),
            "releases=2 can't be used; expected a whole number from 3 to 16",
        ),
        (
            lambda: release_sweep(pair, outcome, releases=[1, 2, 16]),
            "releases[2]=16 can't be used; expected a whole number from 0 to 15",
        ),
        (
            lambda: release_sweep(tied, outcome),
            "These twins were released at step 3; a sweep needs them coupled throughout, "
            "release=6.",
        ),
        (
            lambda: one_pass(tied, outcome),
            "These twins were tied up to step 3; one pass needs independent runs, release=0.",
        ),
        (
            lambda: one_pass(pair, outcome).agreement("image"),
            "outcome='image' can't be used; expected one of 'latents'",
        ),
        (
            lambda: one_pass(pair, [features(model, lambda x: x.mean((1, 2, 3)))]),
            "The feature function gave shape [192] for 192 images; expected",
        ),
        (
            lambda: one_pass(pair, [features(model, lambda x: x[:3])]),
            "The feature function gave shape [3, 3, 8, 8] for 192 images; expected",
        ),
        (
            lambda: one_pass(pair, [features(model, lambda x: None)]),
            "The feature function gave a NoneType for 192 images; expected a tensor",
        ),
        (
            lambda: one_pass(pair, [features(model, lambda x: x.log())]),
            "The feature function gave values that are not finite for 192",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(text), error.value
    a = one_pass(dit_lens.twins(model, 16, [0] * 16, steps=6), outcome)
    b = one_pass(dit_lens.twins(other, 16, [0] * 16, steps=6), outcome)
    c = one_pass(dit_lens.twins(model, 16, [0] * 16, steps=7), outcome)
    with pytest.raises(ValueError, match="The curves come from different models"):
        commitment_difference(a, b, "latents")
    with pytest.raises(
        ValueError, match="The curves come from runs of 6 and 7 steps; expected the same steps"
    ):
        commitment_difference(a, c, "latents")


@pytest.fixture(scope="module")
def wide():
    """A small pipeline with a VAE, whose latents are 4 high and 8 wide."""
    with quiet():
        pipe = family_named("SD3Transformer2DModel").small_pipeline()
    with HookedDiT(pipe, size=(4, 8)) as opened:
        yield opened


def test_images_of_latents_that_are_not_square(wide):
    outcome = images(wide)
    x = torch.randn(2, *wide.cfg.latent_shape)
    height, width = outcome.of(x).shape[-2:]
    assert outcome.bands.grid == (height, width) and height * 2 == width
    # the same waves are low as in the latents
    assert outcome.bands.edges[1] == pytest.approx(0.25 * 8 / width)
    stats = outcome.compare(x, x, [0, 0])
    assert np.allclose(stats.xy, stats.xx)
    found = measure_gap(wide, pairs=16, steps=4, labels=["a", "b"], clones=False, resamples=20)
    assert found.sizes["band"] > 1


def test_images_of_a_video_that_is_not_square():
    with quiet():
        pipe = family_named("WanTransformer3DModel").small_pipeline()
    with HookedDiT(pipe, size=(2, 4, 8)) as model:
        outcome = images(model)
        found = outcome.of(torch.randn(2, *model.cfg.latent_shape))
        assert (
            outcome.bands.grid == tuple(found.shape[-2:]) and found.shape[-1] == 2 * found.shape[-2]
        )


def in_place(x):
    return x.mul_(0).add_(1).mean((2, 3)) + torch.arange(len(x))[:, None]


def test_a_function_that_works_in_place_changes_nothing_else(wide):
    """The images are decoded once for all outcomes, and the finished latents are the run's."""
    pair = dit_lens.twins(wide, 8, ["a"] * 8, steps=4)
    kept = pair.run.latents.clone()
    plain = one_pass(pair, [images(wide)])
    changing = [
        features(wide, in_place),
        Outcome("by hand", lambda x: x.mul_(0).add_(torch.arange(8.0)), Bands.radial((4, 8))),
        Categories(
            "read", images(wide).of, None, lambda x: {"n": in_place(x)[:, 0].long()}, ("n",)
        ),
    ]
    with once():
        both = one_pass(pair, [*changing[:2], images(wide)])
        again = release_sweep(pair, [*changing, images(wide)], [1, 2, 3])
    assert np.array_equal(plain.agreement("images"), both.agreement("images"))
    direct = release_sweep(pair, [images(wide)], [1, 2, 3])
    assert np.array_equal(direct.agreement("images"), again.agreement("images"))
    assert torch.equal(pair.run.latents, kept)


def test_each_is_given_twins_of_its_own(exact):
    _, pair, _ = exact
    kept = pair.run.latents.clone()
    release_sweep(pair, [latents(SPLIT)], [4, 8, 12], each=lambda _, a, b: (a.zero_(), b.zero_()))
    assert torch.equal(pair.run.latents, kept)
