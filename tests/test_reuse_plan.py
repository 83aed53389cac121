"""Plans that are found: against uniform reuse, and the true optimum on an exact denoiser."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.errors import InvalidValue
from dit_lens.experiments import Plan, plan_gradients, reuse_plan
from dit_lens.experiments.reuse_plan import check_plan, plan_sentence
from dit_lens.experiments.whole_steps import whole_steps
from dit_lens.families import family_named
from dit_lens.groundtruth import gaussian

SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)


def moved(model, plan, seed, items=16, labels=(0, 1)):
    """|x under the plan - x|² of the finished latents, all bands together."""
    labels = [labels[i % len(labels)] for i in range(items)]
    plain = dit_lens.sample(model, labels, seed, plan.steps).latents[-1]
    with dit_lens.reuse(model, plan):
        found = dit_lens.sample(model, labels, seed, plan.steps).latents[-1]
    return float((found - plain).square().sum())


@pytest.mark.parametrize("aim", ["same", "good"])
def test_a_plan_keeps_its_budget_and_beats_uniform_reuse(model, aim):
    plan = reuse_plan(model, 0.5, aim, items=16, steps=12, projections=4, resamples=50)
    assert 0.4 < plan.macs <= 0.5 and plan.about["aim"] == aim
    cells = [(i, p, s) for i in range(3) for p in ("attn", "mlp") for s in range(1, 12, 2)]
    uniform = Plan.of(model, plan.timesteps, cells)
    assert uniform.macs > plan.macs - 0.03
    assert moved(model, plan, 1000) < 0.7 * moved(model, uniform, 1000)


def test_its_figures_are_of_other_samples(model):
    plan = reuse_plan(model, 0.6, items=8, steps=6, projections=2, resamples=50, seed=3)
    labels = [i % 2 for i in range(8)]
    plain = dit_lens.sample(model, labels, 11, 6).latents[-1]
    with dit_lens.reuse(model, plan):
        found = dit_lens.sample(model, labels, 11, 6).latents[-1]
    bands = Bands.radial((8, 8), cut=0.25)
    same = [(i, j) for i in range(8) for j in range(i) if labels[i] == labels[j]]
    apart = sum(bands.energy((plain[i] - plain[j])[None].double()).sum(1)[0] for i, j in same)
    expected = bands.energy((found - plain).double()).sum(1).mean(0) / (apart / len(same))
    assert plan.about["effect_low"] == pytest.approx(float(expected[0]), rel=1e-6)
    low, high = plan.about["effect_high_interval"]
    assert low < plan.about["effect_high"] < high
    assert plan == reuse_plan(model, 0.6, items=8, steps=6, projections=2, resamples=50, seed=3)


def test_gradients_of_a_few_samples_at_once(model, monkeypatch):
    options = {"items": 8, "steps": 6, "resamples": 20}
    plan = reuse_plan(model, 0.6, **options)
    parts, whole = sum(map(len, plan.parts)), []
    monkeypatch.setattr(plan_gradients, "ROOM", 3 * parts * 6 * 16 * 16 * 4)  # of three items
    one_by_one = plan_gradients._slopes
    monkeypatch.setattr(
        plan_gradients,
        "_slopes",
        lambda run, *a: whole.append(len(run.labels)) or one_by_one(run, *a),
    )
    again = reuse_plan(model, 0.6, **options)
    assert whole[:3] == [3, 3, 2]
    assert again.cells == plan.cells and again.lines == plan.lines


def test_a_plan_of_the_empty_prompt_says_so():
    model = HookedDiT(family_named("PixArtTransformer2DModel").small_pipeline())
    asked = ["", "a blue dog"]
    plan = reuse_plan(model, 0.8, items=8, steps=3, rounds=0, resamples=20, labels=asked)
    assert plan.about["labels"] == asked


def test_a_plan_of_whole_steps_says_which_are_computed(model):
    about = {"even_macs": 0.5}
    about |= {f"{what}_{band}": 0.1 for what in ("effect", "even") for band in ("low", "high")}
    about |= {f"{name}_interval": [0.05, 0.2] for name in list(about) if name != "even_macs"}
    times = dit_lens.sample(model, [0], steps=6).timesteps.tolist()
    whole = replace(whole_steps(model, times, [0, 2, 5]), about=about)
    assert plan_sentence(whole).endswith(" It holds whole steps, and computes 0, 2, 5.")
    parts = replace(Plan.of(model, times, [(0, "attn", 3)]), about=about)
    assert "whole steps, and" not in plan_sentence(parts)


def test_a_plan_for_labels_of_ones_own(model):
    options = {"items": 8, "steps": 6, "projections": 2, "resamples": 20, "rounds": 0}
    plan = reuse_plan(model, 0.6, labels=[1], **options)
    assert plan.about["labels"] == [1] and "labels" not in reuse_plan(model, 0.6, **options).about
    moves = moved(model, plan, 50, 8, labels=[1])
    again = check_plan(model, plan, items=8, seed=50, resamples=20)
    with pytest.raises(InvalidValue, match="seed=7 gives samples that a plan was made from or"):
        check_plan(model, plan, items=8, seed=7)
    run = dit_lens.sample(model, [1] * 8, 50, 6)
    bands = Bands.radial(model.cfg.pixels, cut=0.25)
    apart = [
        run.latents[-1] - run.latents[-1][[(i + k) % 8 for i in range(8)]] for k in range(1, 8)
    ]
    spread = np.mean([bands.energy(d.double()).sum(1).mean(0).numpy() for d in apart], 0)
    effects = [again.about[f"effect_{band}"] for band in bands.names]
    assert float(effects @ spread) == pytest.approx(moves / 8, rel=1e-3)
    with pytest.raises(InvalidValue, match="There are 8 items and 9 labels"):
        reuse_plan(model, 0.6, labels=[0] * 9, **options)


def test_a_plan_for_prompts():
    """They are kept in words: their numbers are this process's own."""
    transformer, condition = family_named("PixArtTransformer2DModel").small(0)
    model = HookedDiT(transformer, scheduler=SCHEDULER)
    one = {key: value if value is None else value[:1] for key, value in condition.items()}
    model.conditions.add({"a cat": one, "a dog": one, "": one})
    model.conditions.prompts = ["a cat", "a dog"]  # without the examples
    options = {"items": 8, "steps": 4, "projections": 1, "resamples": 20, "rounds": 0}
    plan = reuse_plan(model, 0.7, labels=["a dog"], **options)
    assert plan.about["labels"] == ["a dog"]
    assert check_plan(model, plan, items=8, resamples=20).about["labels"] == ["a dog"]


def test_what_does_nothing_is_held_first():
    """MLPs and a decoy cause nothing in an exact denoiser, so they go before any causing cell."""
    truth = gaussian(layers=(1,), n_layers=3, decoys=(2,), in_channels=1)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    plan = reuse_plan(model, 0.6, items=8, steps=6, longest=6, projections=2, resamples=50)
    assert len(plan.cells) > 5 and (1, "attn") not in plan.held
    assert plan.about["effect_low"] < 1e-6 and plan.about["effect_high"] < 1e-6


def with_an_idle_layer(layer, timesteps):
    """A DiT in which all gates of a layer are 0 at these timesteps, for both classes, and as they
    were at the others of a run of 6 steps.
    """
    dit = make_dit(channels=1, classes=2)
    norm = dit.transformer_blocks[layer].norm1
    with torch.no_grad():
        times = torch.tensor(sampled_times()).repeat(2)
        labels = torch.arange(2).repeat_interleave(len(times) // 2)
        inner = torch.nn.functional.silu(norm.emb(times, labels))
        d = norm.linear.in_features
        for rows in (slice(2 * d, 3 * d), slice(5 * d, 6 * d)):
            weight, bias = norm.linear.weight[rows], norm.linear.bias[rows]
            wanted = inner @ weight.T + bias
            wanted[torch.isin(times, torch.tensor(timesteps))] = 0
            weight.copy_(torch.linalg.lstsq(inner.double(), wanted.double()).solution.T)
            bias.zero_()
    return HookedDiT(dit, scheduler=SCHEDULER)


def sampled_times():
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(6)
    return scheduler.timesteps.tolist()


def test_a_layer_that_is_idle_in_known_steps_is_held_there_first():
    model = with_an_idle_layer(1, sampled_times()[:4])
    idle = {(1, part, step) for part in ("attn", "mlp") for step in (1, 2, 3)}
    run = dit_lens.sample(model, [0, 1], steps=6)
    assert run.activations("attn_out", 1, step=3).abs().max() < 1e-4
    assert run.activations("attn_out", 1, step=4).abs().max() > 1e-2
    budget = Plan.of(model, run.timesteps, idle).macs + 1e-6
    plan = reuse_plan(model, budget, items=8, steps=6, rounds=1, resamples=20)
    assert plan.cells == idle and plan.about["effect_low"] < 1e-6


@pytest.mark.slow
def test_the_best_of_all_plans_of_an_exact_denoiser():
    """All choices of four cells of two causing layers, each run, against the plan that is found."""
    truth = gaussian(layers=(0, 1), n_layers=2, in_channels=1)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    steps = 5
    idle = [(i, "mlp", s) for i in range(2) for s in range(1, steps)]
    causing = [(i, "attn", s) for i in range(2) for s in range(1, steps)]
    times = dit_lens.sample(model, [0], steps=steps).timesteps.tolist()
    every = [
        Plan.of(model, times, [*idle, *chosen]) for chosen in itertools.combinations(causing, 4)
    ]
    budget = every[0].macs + 1e-6
    found = reuse_plan(
        model, budget, items=16, steps=steps, longest=steps, projections=8, resamples=20
    )
    errors = np.array([moved(model, plan, 500, 8, (0,)) for plan in every])
    mine = moved(model, found, 500, 8, (0,))
    assert mine <= np.quantile(errors, 0.06) and mine < 2 * errors.min()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.01}, "budget=0.01 can't be met: with every cell held for 15 steps in a row"),
        ({"budget": 0}, "budget=0 can't be used; expected a finite number above 0"),
        ({"aim": "best"}, "aim='best' can't be used; expected one of 'same', 'good'"),
        ({"scheduler": "dpm++"}, "remembers earlier steps"),
        ({"items": 4}, "items=4 can't be used"),
        ({"cut": 0}, "cut=0 can't be used; expected a finite number above 0"),
        ({"cut": 1.7}, "inner edges [1.7] holds no mode"),
        ({"labels": [0] * 9}, "There are 8 items and 9 labels"),
        ({"labels": [3]}, "Label 3 is out of range"),
    ],
)
def test_bad_input(model, options, message):
    forwards = []
    counted = model.transformer.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError) as error:
        reuse_plan(model, **({"items": 8, "steps": 6} | options))
    counted.remove()
    assert message in str(error.value)
    assert not forwards or "budget=0.01" in message  # which takes a count of what a forward costs
    assert torch.is_grad_enabled()
