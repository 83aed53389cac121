"""The coupling sweep: exact answers where there are some (E1 to E6 in docs/checks.md), sentences
for every outcome, and what it refuses.
"""

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.experiments.coupling_sweep import collapse, couplings, quality
from dit_lens.families import family_named
from dit_lens.groundtruth import gaussian, planted, random_weights

STEPS = 40


@pytest.mark.parametrize(("low", "high"), [(4.0, 0.25), (0.25, 4.0)])
def test_uncoupled_twins_part_where_half_is_decided(low, high):
    """E1: on Gaussian data Var(x0hat) is half of Var(x0) at abar = 1/(1 + lambda), and the twins'
    difference grows with it.
    """
    truth = gaussian(low, high, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    told = []
    found = couplings(
        model,
        [0.0, 1.0],
        eps=0.3,
        pairs=16,
        steps=STEPS,
        cut=0.1,
        progress=lambda *done: told.append(done),
    )
    assert told == [(1, 2), (2, 2)]
    scheduler = DDIMScheduler.from_config(truth.scheduler.config)
    scheduler.set_timesteps(STEPS)
    abar = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    exact = [
        np.interp(-np.log(lam), np.log(abar / (1 - abar)), np.arange(STEPS)) for lam in (low, high)
    ]
    # a sampler of 40 steps is that far from the flow (E2)
    assert np.allclose(found.parting.sel(g=0), exact, atol=0.7)
    assert np.sign(found.gap.sel(g=0, sense="parting")) == np.sign(low - high)
    # E6: all of the gap is made by one layer's attention, and at g = 1 attention passes no
    # difference on.
    assert (
        abs(float(found.gap.sel(g=1, sense="parting"))) < 1e-3
        and "it collapses" in found.sentence_parting
    )
    assert (
        "there is none to collapse at the weakest" in found.sentence_size
    )  # E2: the finished twins differ alike in both bands


def test_attention_without_queries_and_keys_responds_by_rho():
    """E4: uniform attention passes a difference through its values alone, so coupling multiplies it
    by rho, at any g, and there is no part of patterns.
    """
    truth = planted(layers=(0, 1), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=DDIMScheduler(1000))
    gs = [0.0, 0.5, 1.0, 3.0]
    for form in ("mix", "joint"):
        found = couplings(model, gs, form=form, pairs=8, steps=8, cut=0.1)
        rho = np.array([(1 - g) / (1 + g) for g in gs])
        assert np.allclose(found.rho, rho)
        assert np.allclose(found.routing, rho[:, None], atol=1e-5)
        assert np.allclose(found.xi, [1 / (1 + g) for g in gs]) and found.pattern.isnull().all()


def test_the_two_parts_of_attention_are_those_of_its_linearisation():
    """Routing by rho; the pattern's part between xi and 1, for the queries' share is each twin's
    own (`linear_response` is the whole, to first order).
    """
    model = HookedDiT(random_weights(0, n_layers=2).transformer, scheduler=DDIMScheduler(1000))
    found = couplings(model, [0.0, 0.5, 1.0], eps=0.02, pairs=8, steps=6, resamples=50)
    np.testing.assert_allclose(found.routing.sel(g=0), 1)
    np.testing.assert_allclose(found.pattern.sel(g=0), 1)
    assert np.abs(found.routing - found.rho).max() < 0.05
    assert (found.pattern.sel(g=1) < 0.9).all() and (found.pattern.sel(g=1) > 0.1).all()


def test_quality_says_when_the_model_is_pushed_off():
    model = HookedDiT(planted(layers=(0, 1), n_layers=2).transformer, scheduler=DDIMScheduler(1000))
    base = couplings(model, [0.0, 1.0], pairs=8, steps=6, cut=0.1, resamples=50)
    assert np.allclose(base.energy.sel(g=0), 1) and (base.read_change_interval[0] == 0).all()
    made = base.copy(deep=True)
    made.energy_interval[1] = [[0.9, 1.1]] * 2
    made.read_change_interval[1] = [-0.1, 0.1]
    assert quality(made).startswith("Quality: no strength is shown to push the model off its")
    made.energy[1], made.energy_interval[1] = 0.5, [[0.4, 0.6]] * 2
    said = quality(made)
    assert "off its distribution at g = 1 (low energy 0.50 [0.40, 0.60], high energy" in said
    read = couplings(
        model,
        [0.0, 1.0],
        pairs=8,
        steps=6,
        cut=0.1,
        resamples=50,
        reader=lambda images: torch.ones(len(images)),
    )
    assert (read["read"] == 0).all() and "by the reader given (0%" in read.sentence_quality


def test_the_same_pairs_at_every_strength_and_again():
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    size = {"pairs": 8, "steps": 6, "cut": 0.1, "resamples": 50}
    a, b = (couplings(model, [0, 0.5], seed=3, **size) for _ in range(2))
    assert a.identical(b)
    assert (a.change.sel(g=0) == 0).all() and (a.change_interval.sel(g=0) == 0).all()
    plain = dit_lens.twins(model, 8, [0] * 8, tie="attention", g=0.0, steps=6, release=6, seed=3)
    assert plain.tie == "attention" and model.instrumentation.listening == 0


def test_every_outcome_has_its_sentence():
    model = HookedDiT(random_weights(0, n_layers=3).transformer, scheduler=DDIMScheduler(1000))
    base = couplings(model, [0, 1], pairs=8, steps=6, resamples=50)

    def sentence(before, after, change):
        made = base.copy(deep=True)
        for g, (value, low, high) in zip((0, 1), (before, after), strict=True):
            made.gap.loc[{"g": g}] = value
            made.gap_interval.loc[{"g": g}] = np.array([low, high])
        made.change_interval.loc[{"g": 1}] = np.array(change)
        return collapse(made, "size")

    assert sentence((3, 2, 4), (0.1, -1, 1), (-4, -2)).startswith(
        "The gap (log ratio of the finished difference): it collapses: none can be told"
    )
    assert "it shrinks but does not collapse; +3.00 [+2.00, +4.00] at g = 0, +1.00" in sentence(
        (3, 2, 4), (1, 0.5, 1.5), (-3, -1)
    )
    assert "does not collapse but changes sign" in sentence((3, 2, 4), (-1, -2, -0.5), (-5, -3))
    assert "does not collapse but grows" in sentence((3, 2, 4), (6, 5, 7), (1, 4))
    assert "no change can be told with this many pairs" in sentence((3, 2, 4), (2, 1, 4), (-2, 1))
    assert "there is none to collapse at the weakest" in sentence((0.1, -1, 1), (3, 2, 4), (1, 4))
    assert "can't be given at both ends" in sentence((np.nan,) * 3, (3, 2, 4), (1, 4))


def test_bad_input():
    model = dit_lens.load("digits")
    for kwargs, text in [
        (
            dict(strengths=[0.5]),
            "strengths is [0.5]; expected two or more in increasing order, the weakest first, such "
            "as 0, 0.5, 1.",
        ),
        (
            dict(strengths=[1, 0]),
            "strengths is [1.0, 0.0]; expected two or more in increasing order",
        ),
        (
            dict(strengths=[0, -1]),
            "g=-1 can't be used; expected a finite number of 0 or more",
        ),
        (dict(strengths=[0, np.inf]), "g=inf can't be used; expected a finite number"),
        (
            dict(pairs=4),
            "pairs=4 can't be used; expected a whole number of 8 or more, for an interval",
        ),
        (
            dict(eps=0),
            "The twins can't part: the sampler 'ddim' with eta=0.0 draws no noise and they start "
            "equal",
        ),
        (dict(form="max"), "form='max' can't be used; expected one of 'mix', 'joint'"),
    ]:
        with pytest.raises(ValueError) as error:
            couplings(model, **{"pairs": 8, "steps": 6} | kwargs)
        assert str(error.value).startswith(text), error.value


def test_strengths_that_are_close_are_pieces_of_their_own(tmp_path):
    pytest.importorskip("zarr")
    model = HookedDiT(family_named("DiTTransformer2DModel").small_pipeline())
    close = [0, 1, 1.0000001]
    found = couplings(model, close, pairs=8, steps=5, resamples=20, store=tmp_path / "store")
    assert found.g.values.tolist() == close


def test_a_reader_gives_one_label_an_image():
    """A single number would be held against every label, and a column against all pairs."""
    model = HookedDiT(make_dit(channels=1, classes=4, layers=1), scheduler=DDIMScheduler(1000))
    settings = {"pairs": 16, "steps": 5, "resamples": 10}
    for given in (torch.zeros(1).long(), torch.zeros(16, 1), np.array(["3"] * 16)):
        with pytest.raises(ValueError, match="The reader gave .* for 16 images; expected 16 whole"):
            couplings(model, [0.0, 0.5], reader=lambda _, given=given: given, **settings)
    found = couplings(model, [0.0, 0.5], reader=lambda _: np.arange(16)[::-1], **settings)
    assert found.read.shape == (2,)
