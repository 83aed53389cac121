"""Plans beside published ways to spend as little."""

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.experiments import Plan, reuse_plan, side_by_side
from dit_lens.experiments.baselines import (
    at_random,
    front_and_rear,
    pairs,
    similarity,
    uniform,
    unlike,
)
from dit_lens.experiments.whole_steps import even_steps, number_of_steps, whole_steps

SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)


@pytest.fixture(scope="module")
def run(model):
    return dit_lens.sample(model, [0, 1] * 4, 0, STEPS)


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.34])
def test_each_keeps_the_budget_and_uses_most_of_it(model, run, budget):
    times = run.timesteps.tolist()
    for plan in (
        uniform(model, times, budget),
        uniform(model, times, budget, lines=True),
        at_random(model, times, budget),
        front_and_rear(model, times, budget),
        similarity(run, budget),
    ):
        assert budget - 0.17 < plan.macs <= budget + 0.5 / STEPS
    assert 0.8 < pairs(model, times).macs < 0.9


def test_what_they_hold(model, run):
    times = run.timesteps.tolist()
    steps_of = [frozenset(range(1, STEPS, 2))] * 6
    assert list(uniform(model, times, 0.53).held.values()) == steps_of
    lines = uniform(model, times, 0.53, lines=True)
    assert lines.lines == {cell for cell in lines.cells if cell[2] > 2}
    deep = front_and_rear(model, times, 0.6)
    early, late = ({i for i, _, s in deep.cells if (s < 6) == half} for half in (True, False))
    assert early == {1, 2} and late == {0, 1}
    assert {s for *_, s in pairs(model, times).cells} == {1, 3}
    assert {s for *_, s in pairs(model, times, late=True).cells} == {11, 9}
    random = at_random(model, times, 0.5)
    assert random == at_random(model, times, 0.5) != at_random(model, times, 0.5, seed=1)


def test_likeness_is_what_it_says(model, run):
    apart = unlike(run, 3)
    values = [run.activations("attn_out", i) for i in range(3)]
    by_hand = [float((v[7] - v[5]).abs().mean() / v[7].abs().mean()) for v in values]
    assert apart["attn"][7, 2] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert np.isnan(apart["mlp"][1, 2]) and apart["mlp"].shape == (STEPS, 4)
    plan = similarity(run, 0.5)
    at = plan.about["threshold"]
    for (layer, part), steps in plan.held.items():
        assert steps == plan.held[0, part], "a part of all layers is held together"
        for s in steps if layer == 0 else ():
            (source,) = plan.sources[0, part, s]
            assert unlike(run, 15)[part][s, s - source] < at


def test_whole_steps(model):
    times = list(range(10, 0, -1))
    assert even_steps(10, 3) == [0, 3, 6] and number_of_steps(model, 10, 1.0) == 10
    for n in range(1, 10):
        share = whole_steps(model, times, even_steps(10, n)).macs
        assert number_of_steps(model, 10, share) == n
        assert number_of_steps(model, 10, share - 1e-3) == max(1, n - 1)


def test_side_by_side(model):
    options = {"items": 8, "resamples": 100}
    plan = reuse_plan(model, 0.5, steps=STEPS, rounds=1, **options)
    found = side_by_side(
        model, [plan], judge=lambda x, labels: {"bright": float(x.mean())}, **options
    )
    by = {m: found.sel(way=m).isel(budget=0) for m in found.way.values}
    # a row by hand: whole steps held evenly
    labels = [i % 2 for i in range(8)]
    plain = dit_lens.sample(model, labels, 1000, STEPS)
    with dit_lens.reuse(model, uniform(model, plan.timesteps, plan.macs)):
        held = dit_lens.sample(model, labels, 1000, STEPS)
    psnr = -10 * (plain.images - held.images).square().flatten(1).mean(1).log10()
    assert by["even (FORA)"].psnr.item() == pytest.approx(float(psnr.mean()), rel=1e-4)
    assert by["even (FORA)"].bright.item() == pytest.approx(float(held.images.mean()), rel=1e-5)
    fewer = dit_lens.sample(model, labels, 1000, round(plan.macs * STEPS))
    psnr = -10 * (plain.images - fewer.images).square().flatten(1).mean(1).log10()
    assert by["fewer steps"].psnr.item() == pytest.approx(float(psnr.mean()), rel=1e-4)
    assert float(by["plan"].over_plan) == 1
    assert all(by[m].macs <= plan.macs + 0.5 / STEPS for m in by if " pairs" not in m)
    low, high = by["random"].over_plan_interval.values
    assert low < by["random"].over_plan.item() < high
    ratio = by["late pairs"].effect / by["early pairs (L2C's structure)"].effect
    np.testing.assert_allclose(found.late_over_early, ratio, rtol=1e-9)
    assert "early steps need less precision, in the high band" in found.attrs["sentence"]
    assert "plain_bright" in found.attrs and "times [" in found.attrs["sentence"]
    assert not model.instrumentation.busy


def test_bad_input(model):
    plan = reuse_plan(model, 0.6, items=8, steps=6, rounds=0, resamples=20)
    with pytest.raises(ValueError, match="seed=10 gives samples that a plan was made from"):
        side_by_side(model, [plan], items=8, seed=10)
    bare = Plan.of(model, plan.timesteps, plan.cells)
    with pytest.raises(ValueError, match="does not say with which steps it was made"):
        side_by_side(model, [bare], items=8)
    other = reuse_plan(model, 0.6, items=8, steps=5, rounds=0, resamples=20)
    with pytest.raises(ValueError, match="made with steps=6 and 5; expected one setting"):
        side_by_side(model, [plan, other], items=8)
    labelled = reuse_plan(model, 0.6, labels=[0], items=8, steps=6, rounds=0, resamples=20)
    with pytest.raises(ValueError, match=r"made with labels=None and \[0\]; expected one setting"):
        side_by_side(model, [plan, labelled], items=8)
    with pytest.raises(ValueError, match="plans=. . can't be used|plans="):
        side_by_side(model, [], items=8)
    assert torch.is_grad_enabled()
