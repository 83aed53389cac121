"""What a change to a model does: the same image, a different one, or a worse one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dit
from counting import forwards
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.commands.main import main
from dit_lens.errors import InvalidValue
from dit_lens.experiments import (
    Plan,
    cause_map,
    compare,
    couplings,
    measure_gap,
    reuse_plan,
    step_doubling,
)
from dit_lens.experiments.compare import compared_runs, sentences
from dit_lens.families import family_named
from dit_lens.groundtruth import gaussian
from dit_lens.patching.measure import compared

SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")
BANDS = Bands.radial((8, 8), cut=0.25)


@pytest.fixture(scope="module")
def exact():
    """An exact denoiser: whatever it draws is as good as the data."""
    truth = gaussian(layers=(1,), n_layers=3, decoys=(2,), in_channels=1)
    return HookedDiT(truth.transformer, scheduler=truth.scheduler)


@pytest.fixture(scope="module")
def run(exact):
    return dit_lens.sample(exact, [0] * 64, 0, 12)


def with_finished(run, finished):
    return replace(run, latents=torch.cat([run.latents[:-1], finished[None]]))


@pytest.fixture(scope="module")
def bands(run):
    return Bands.radial(tuple(run.latents.shape[-2:]), cut=0.25)


def test_other_seeds_are_a_different_sample_and_no_worse(exact, run, bands):
    verdicts = []
    for seed in range(5):
        other = dit_lens.sample(exact, [0] * 64, 1000 * (seed + 1), 12)
        found = compared_runs(run, other, bands, seed, 300)
        assert found.effect.values == pytest.approx(1, abs=0.3)
        verdicts.append(found.attrs["verdict"])
    assert verdicts.count("different") >= 4


@pytest.mark.parametrize(
    "spoil, name, above",
    [
        (lambda x: x + 0.5 * x.std() * torch.randn(x.shape, generator=GENERATOR), "error", True),
        (lambda x: 0.7 * x, "power", False),
        (lambda x: 1.4 * x, "power", True),
    ],
)
def test_spoiled_images_are_worse(run, bands, spoil, name, above):
    found = compared_runs(run, with_finished(run, spoil(run.latents[-1])), bands, 0, 300)
    assert found.attrs["verdict"] == "worse" and "worse ones" in found.attrs["sentence"]
    assert (found[name] > 1).any() == above


GENERATOR = torch.Generator().manual_seed(0)


def test_a_small_change_is_the_same_image(run, bands):
    x = run.latents[-1]
    found = compared_runs(run, with_finished(run, x + 0.01 * x.std()), bands, 0, 300)
    assert found.attrs["verdict"] == "same" and "The same images" in found.attrs["sentence"]


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)


def test_a_plan_by_hand(model):
    times = dit_lens.sample(model, [0], steps=8).timesteps
    plan = Plan.of(
        model, times, [(i, p, s) for i in range(3) for p in ("attn", "mlp") for s in (1, 3)]
    )
    found = compare(model, plan, items=16, steps=8, resamples=100)
    labels = [i % 2 for i in range(16)]
    plain = dit_lens.sample(model, labels, 0, 8).latents[-1].double()
    with dit_lens.reuse(model, plan):
        held = dit_lens.sample(model, labels, 0, 8).latents[-1].double()
    power = BANDS.energy(held).sum((0, 1)) / BANDS.energy(plain).sum((0, 1))
    np.testing.assert_allclose(found.power, power, rtol=1e-6)
    same = [(i, j) for i in range(16) for j in range(i) if labels[i] == labels[j]]
    apart = sum(BANDS.energy((plain[i] - plain[j])[None]).sum(1)[0] for i, j in same) / len(same)
    expected = BANDS.energy(held - plain).sum(1).mean(0) / apart
    np.testing.assert_allclose(found.effect, expected, rtol=1e-6)
    low, high = found.error_interval.values[0]
    assert low < found.error.values[0] < high and not model.instrumentation.busy


def test_nothing_changed_is_the_same(model):
    copy = HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)
    found = compare(model, copy, items=12, steps=4, resamples=50)
    assert found.attrs["verdict"] == "same" and (found.effect == 0).all()
    assert (found.later == 0).all() or found.later.isnull().any()
    for values, said in (
        ([1, 2], "later by low 1.00 [1.00, 1.00], high"),
        ([np.nan, 2], "by high"),
    ):
        found.later.values[:], found.later_interval.values[:] = values, np.array(values)[:, None]
        assert said in " ".join(sentences(found))
    found.later.values[:] = np.nan
    assert "decided" not in " ".join(sentences(found))


def test_no_more_images_at_once_than_asked_for(model):
    copy = HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)
    with forwards(model.transformer) as seen:
        compare(model, copy, items=10, steps=4, guidance=2.0, resamples=10, batch=4)
    assert max(seen["forwards"]) == 4


def test_the_same_video_model_is_the_same():
    """Whose DDIM has noise levels that its configuration does not say."""
    plain, copied = (
        HookedDiT(family_named("CogVideoXTransformer3DModel").small_pipeline()) for _ in range(2)
    )
    found = compare(plain, copied, items=18, steps=3, resamples=20)
    assert found.attrs["verdict"] == "same" and (found.effect == 0).all()


def test_prompts_are_handed_on_in_words():
    """Each model numbers those that it is given by itself."""
    plain, copied = (
        HookedDiT(family_named("PixArtTransformer2DModel").small_pipeline()) for _ in range(2)
    )
    dit_lens.sample(copied, ["something else"], steps=2)
    asked = ["a blue dog", "a red cat"]
    found = compare(plain, copied, items=10, labels=asked, steps=3, resamples=20)
    assert found.attrs["verdict"] == "same" and (found.effect == 0).all()


def test_another_noise_schedule_is_refused(model):
    other = HookedDiT(
        make_dit(channels=1, classes=2),
        scheduler=DDIMScheduler(1000, clip_sample=False, beta_end=0.01),
    )
    with pytest.raises(InvalidValue, match="The changed model's noise levels are others: log SNR"):
        compare(model, other, items=12, steps=4)
    # as diffusers' DDIMScheduler does unless it is told not to
    clipped = HookedDiT(make_dit(channels=1, classes=2), scheduler=DDIMScheduler(1000))
    with pytest.raises(InvalidValue, match="Only the changed model's scheduler clips the pred"):
        compare(model, clipped, items=12, steps=4)


def test_a_plan_is_not_judged_by_what_it_was_made_from(model):
    times = dit_lens.sample(model, [0], steps=8).timesteps
    plan = Plan.of(model, times, [(0, "attn", 2)], about={"seed": 5, "items": 8})
    for seed in (0, 5, 28):
        with pytest.raises(ValueError, match=f"seed={seed} gives samples that a plan was made fro"):
            compare(model, plan, items=16, steps=8, seed=seed, resamples=20)
    assert compare(model, plan, items=16, steps=8, seed=29, resamples=20).attrs["verdict"] == "same"


def test_one_item_alone_with_its_label_changes_nothing_of_the_others(model):
    """Their means are taken off, whether it is there or not."""
    plan = Plan.of(model, dit_lens.sample(model, [0], steps=6).timesteps, [(0, "attn", 3)])
    pairs = [0] * 12 + [1] * 12
    one, more = (
        compare(model, plan, items=n, labels=labels, steps=6, resamples=20)
        for n, labels in ((24, pairs), (25, [*pairs, 2]))
    )
    np.testing.assert_allclose(more.commitment, one.commitment)
    assert "1 of the items, alone with their label, say" in more.attrs["sentence"]
    assert one.attrs["alone"] == 0 and "alone" not in one.attrs["sentence"]
    options = {"steps": 4, "check": 0, "projections": 1, "resamples": 20}
    one, more = (
        cause_map(model, items=n, labels=labels, **options)
        for n, labels in ((24, pairs), (25, [*pairs, 2]))
    )
    np.testing.assert_allclose(more.decided, one.decided)
    assert more.attrs["alone"] == 1
    run = dit_lens.sample(model, [*pairs, 2], 0, 4)
    final = run.latents[-1:] + 0.1
    whole, part = (
        compared(BANDS, final[:, :n], *[run.select(range(n))] * 2).agreement for n in (25, 24)
    )
    np.testing.assert_allclose(whole, part)


def test_what_is_not_finite_is_not_judged(model):
    spoiled = HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)
    with torch.no_grad():
        spoiled.transformer.proj_out_2.bias.fill_(float("nan"))
    with pytest.raises(InvalidValue, match="of the changed model are not finite from step 1 of 4"):
        compare(model, spoiled, items=12, steps=4, resamples=20)
    with pytest.raises(InvalidValue, match="The latents of the model as it was are not finite"):
        compare(spoiled, model, items=12, steps=4, resamples=20)
    for measure in (
        lambda: measure_gap(spoiled, 16, 5, resamples=20, clones=False),
        lambda: step_doubling(spoiled, 16, 4, resamples=20),
        lambda: couplings(spoiled, [0, 1], pairs=8, steps=5, resamples=20),
        lambda: reuse_plan(spoiled, 0.8, items=8, steps=4, resamples=20),
    ):
        with pytest.raises(InvalidValue, match="are not finite from step 1 of . on; expected a"):
            measure()


def test_bad_input(model):
    with pytest.raises(ValueError, match="The changed model's latent_shape is .3, 8, 8., this"):
        compare(model, HookedDiT(make_dit(channels=3, classes=2), scheduler=SCHEDULER))
    with pytest.raises(ValueError, match="items=8 of 2 labels leave 6 to compare within labels"):
        compare(model, model, items=8)
    with pytest.raises(TypeError, match="changed=3 can't be used; expected a HookedDiT or a Plan"):
        compare(model, 3)


def test_the_command(tmp_path, capsys):
    out = str(tmp_path)
    options = ["--items", "12", "--steps", "3", "--out", out]
    assert main(["compare", "digits", "--dtype", "bfloat16", *options]) == 0
    assert "times that on its own" in capsys.readouterr().out.replace("\n", " ")
    assert main(["compare", "digits", "--lora", "nowhere", *options]) == 2
    assert "DiTTransformer2DModel takes no adapters" in capsys.readouterr().err
    assert main(["compare", "digits", "--with", "nowhere.json", *options]) == 2
    assert "There is no file 'nowhere.json'" in capsys.readouterr().err
