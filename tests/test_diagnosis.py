"""Diagnosis of runs whose fault is known by construction; bad input; repairs on disk."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.commands.main import main
from dit_lens.experiments import diagnose, diagnose_all, load_edits
from dit_lens.experiments.diagnosis.fault import check_fault, made
from dit_lens.experiments.diagnosis.prober import Place
from dit_lens.families.registry import family_named
from dit_lens.groundtruth import random_weights
from dit_lens.groundtruth.faults import Fault, plant
from dit_lens.measures.proportion import proportion
from dit_lens.patching import Patch
from dit_lens.patching.lanes import Lanes
from dit_lens.patching.patch import plan
from dit_lens.report import diagnoses
from dit_lens.report import diagnosis as report

STEPS, SMALL = 8, {"others": 8, "clones": 2, "releases": 3, "pairs": 8}
OPTIONS = {"steps": STEPS, "eta": 1.0}


def model_of(*faults):
    truth = random_weights(0, n_layers=6, sample_size=8)
    planted = plant(truth.transformer, faults)
    return HookedDiT(planted, scheduler=truth.scheduler)


def away_from(good):
    """A score: how far from the good image, 1 where the label's images usually are."""
    aim = good.images

    def away(images):
        return (images - aim[:1]).abs().mean((1, 2, 3)) * 200

    return away


@pytest.fixture(scope="module")
def spoiled():
    return model_of(Fault(2, (250, 700), strength=8.0))


@pytest.fixture(scope="module")
def good():
    return dit_lens.sample(model_of(), [0], seeds=5, **OPTIONS)


@pytest.fixture(scope="module")
def bad(spoiled):
    return dit_lens.sample(spoiled, [0], seeds=5, **OPTIONS)


@pytest.fixture(scope="module")
def found(spoiled, bad, good):
    return diagnose(spoiled, bad, away_from(good), good, **SMALL)


def test_the_planted_layer_and_its_steps_are_found(found, bad):
    inside = [s for s, t in enumerate(bad.timesteps.tolist()) if 250 <= t < 700]
    assert found.kind == "layer" and found.layers == (2,)
    overlap = len(set(found.steps) & set(inside)) / len(set(found.steps) | set(inside))
    assert overlap >= 0.6, (found.steps, inside)
    assert found.sentence.startswith("Layer 2, step")
    assert found.result.attrs["images"] > 0


def test_its_repair_works_again_from_the_file(found, spoiled, bad, tmp_path):
    assert found.repair is not None and found.repair.works and found.repair.collateral < 0.1
    path = found.repair.save(tmp_path / "repair.json")
    edits = load_edits(path, spoiled)
    again = bad.replay(min(edits), edits)
    assert torch.equal(again.images[0], found.repair.image)
    with dit_lens.trace(spoiled) as t:
        t.load_edits(path)
        traced = dit_lens.sample(spoiled, [0], seeds=5, **OPTIONS)
    assert torch.allclose(traced.images[0], found.repair.image, atol=1e-5)
    step = min(edits)
    x, time = bad.latents[step], bad.timesteps[step][None]
    once = spoiled.run_with_hooks(x, time, torch.zeros(1).long(), fwd_hooks=edits[step])
    assert torch.allclose(once, again.outputs[step], atol=1e-5)
    with (
        dit_lens.trace(spoiled) as t,
        pytest.raises(ValueError, match=f"expected a run of {STEPS} steps"),
    ):
        t.load_edits(path)
        dit_lens.sample(spoiled, [0], seeds=5, steps=STEPS + 5, eta=1.0)
    with pytest.raises(ValueError, match="made for another model"):
        load_edits(path, dit_lens.load("digits"))
    others = random_weights(1, n_layers=6, sample_size=8)
    for other in (HookedDiT(others.transformer, scheduler=others.scheduler), model_of()):
        with pytest.raises(ValueError, match="made for another model: its weights is"):
            load_edits(path, other)
        with dit_lens.trace(other) as t, pytest.raises(ValueError, match="its weights is"):
            t.load_edits(path)
    said = json.loads(path.read_text())
    said["edits"][0]["steps"][0] += 1
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="is damaged"):
        load_edits(path, spoiled)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a file of edits of this version"):
        load_edits(path, spoiled)


def test_two_layers_that_each_make_the_fault_are_named_together(good):
    both = [Fault(layer, (250, 700), strength=8.0) for layer in (1, 4)]
    bad = dit_lens.sample(model_of(*both), [0], seeds=5, **OPTIONS)
    found = diagnose(bad.model, bad, away_from(good), good, **SMALL)
    assert found.layers == (1, 4) and found.sentence.startswith("Layers 1 and 4 together, step")
    assert float(found.result.together) > 0.9
    # neither is enough by itself, and what the good run has in both is
    assert max(found.result.effect.values) < 0.9
    assert found.repair is not None and found.repair.tidy and "layers 1, 4" in found.repair.name


def test_a_fault_that_leaves_a_rest_outside_the_window_is_repaired_from_its_start_on(good):
    bad = dit_lens.sample(model_of(Fault(2, (0, 1000), strength=8.0)), [0], seeds=5, **OPTIONS)
    found = diagnose(bad.model, bad, away_from(good), good, **SMALL)
    assert found.repair is not None and found.repair.tidy
    assert torch.allclose(found.repair.image, good.images[0], atol=0.1)


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "CogVideoXTransformer3DModel"])
def test_a_spoiled_layer_of_two_streams_and_of_a_video(kind, tmp_path):
    pipe = family_named(kind).small_pipeline()
    spoiled = copy.deepcopy(pipe)
    with torch.no_grad():
        for name, weight in spoiled.transformer.named_parameters():
            if "transformer_blocks.1." in name and "norm" not in name and weight.ndim == 2:
                draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
                weight.add_(3 * weight.std() * draw)
    good, bad = (dit_lens.sample(HookedDiT(p), [0], seeds=3, steps=4) for p in (pipe, spoiled))
    apart = float((good.images - bad.images).abs().mean())

    def away(images):
        return (images - good.images).abs().flatten(1).mean(1) / apart

    found = diagnose(bad.model, bad, away, good, others=4, clones=2, releases=2, pairs=2)
    assert found.layers == (1,) and found.repair is not None and found.repair.tidy
    report.show(found.result, report.store(found.result, tmp_path))


def test_a_good_run_tells_a_score_from_a_constant(spoiled, bad, good):
    """All of a spoiled model's images, and odd ones, can have the fault."""
    aim = good.images

    def other(images):
        return ((images - aim).abs().amax((1, 2, 3)) > 1e-3).float()

    assert diagnose(spoiled, bad, other, good, **SMALL).layers == (2,)


def test_the_page_is_drawn_and_drawn_again(found, tmp_path, capsys):
    stored = report.store(found.result, tmp_path)
    report.show(found.result, stored)
    said = capsys.readouterr().out
    assert "Layer 2" in said and (tmp_path / "diagnosis.png").stat().st_size > 10_000
    (tmp_path / "diagnosis.png").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said and (tmp_path / "diagnosis.png").exists()


def test_a_swapped_stack_of_blocks_is_the_sum_of_what_they_add(spoiled, bad, good):
    """Where nothing differs but one layer, its stack's swap makes the good run of the bad one."""
    window = range(STEPS)
    places = [Patch("block", 2, window), Patch("block", 1, window, depth=3)]
    lanes = Lanes(good, bad, 4)
    done = lanes.run([plan(p, spoiled, STEPS, 1) for p in places], lambda _: None)
    for x in done:
        assert torch.allclose(x, good.latents[-1], atol=1e-4)
    with pytest.raises(ValueError, match="can't be patched so"):
        plan(Patch("block", 2, kind="zero"), spoiled, STEPS, 1)


def test_layers_beside_a_stack_that_holds_them_change_nothing(spoiled, bad, good):
    """Whether they are its last one, whose stream both would write, or not."""
    stack = Place(0, 3, range(STEPS))
    places = [stack, *(stack._replace(beside=(layer,)) for layer in range(3))]
    done = Lanes(good, bad, 4).run([place.planned(bad) for place in places], lambda _: None)
    assert all(torch.equal(x, done[0]) for x in done)
    beside = Place(0, 2, range(STEPS), beside=(2,)).planned(bad)
    (x,) = Lanes(good, bad, 4).run([beside], lambda _: None)
    assert torch.allclose(x, good.latents[-1], atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_good_run_near_twins_are_found(eta):
    model = model_of()
    run = dit_lens.sample(model, [0], seeds=1, steps=STEPS, eta=eta)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    found = diagnose(model, run, mask, **SMALL)
    assert found.kind in ("noise", "window", "no fault") and not found.layers
    assert {"noise": "The noise itself", "window": "Step", "no fault": "Not a fault"}[
        found.kind
    ] in found.sentence


def test_a_fault_that_all_seeds_have_is_none_of_the_run(spoiled, bad):
    found = diagnose(
        spoiled,
        bad,
        lambda images: images.mean((1, 2, 3)) * 0 + images[:, 0, 0, 0] + 1,
        at=0.9,
        **SMALL,
    )
    assert found.kind == "no fault" and found.repair is None
    assert "of 8 other seeds of its label have it" in found.sentence


def refused(error, text, *args, **options):
    with pytest.raises(error, match=text):
        diagnose(*args, **(SMALL | options))


def test_bad_input_is_one_clear_sentence(spoiled, bad, good):
    away = away_from(good)
    refused(
        ValueError,
        "The run does not have the fault by its own score: away is 0, and 0.5",
        good.model,
        good,
        away,
    )
    refused(
        ValueError,
        "score is constant, 1 for every image",
        spoiled,
        bad,
        lambda images: torch.ones(len(images)),
    )
    refused(
        ValueError,
        "score is nan for one of",
        spoiled,
        bad,
        lambda images: torch.full((len(images),), float("nan")),
    )
    refused(ValueError, r"gave shape \[\] for 8 images", spoiled, bad, lambda images: images.mean())
    refused(ValueError, "gave 'no' for 8 images", spoiled, bad, lambda _: "no")
    refused(
        ValueError,
        "The mask is 4x8; expected the images' 8x8",
        spoiled,
        bad,
        torch.ones(4, 8, dtype=torch.bool),
    )
    refused(
        ValueError,
        "mask .h, w. of bool, true somewhere",
        spoiled,
        bad,
        torch.zeros(8, 8, dtype=torch.bool),
    )
    refused(
        ValueError, "is a name, and only the bundled models have those", spoiled, bad, "misread"
    )
    refused(TypeError, "expected a function of images", spoiled, bad, 3)
    bands = dit_lens.Bands.radial((4, 4), cut=0.25)
    refused(ValueError, "are of a 4x4 grid; expected the images' 8x8", spoiled, bad, (bands, "low"))
    refused(ValueError, "The run is of another model", model_of(), bad, away)
    refused(ValueError, "The good run has the fault too", spoiled, bad, away, bad)
    other = dit_lens.sample(good.model, [0], seeds=5, steps=STEPS, eta=0.0)
    refused(
        ValueError, "The good run has eta=0.0 and the bad one eta=1.0", spoiled, bad, away, other
    )
    other = dit_lens.sample(good.model, [0], seeds=5, steps=STEPS + 1, eta=1.0)
    refused(
        ValueError, "The good run has steps=9 and the bad one steps=8", spoiled, bad, away, other
    )
    other = dit_lens.sample(good.model, [0], seeds=5, steps=STEPS, scheduler="ddpm")
    refused(ValueError, "(?s)The good run .* expected the same sampler", spoiled, bad, away, other)
    digits = dit_lens.load("digits")
    three, four = (dit_lens.sample(digits, [k], steps=4, eta=1.0) for k in (3, 4))
    refused(
        ValueError,
        "The good run has the label 4 and the bad one 3",
        digits,
        three,
        lambda x: 1 - x.mean((1, 2, 3)),
        four,
    )
    both = dit_lens.sample(digits, [3, 4], steps=4, eta=1.0)
    refused(
        ValueError,
        r"The run has the labels \[3, 4\]; expected one",
        digits,
        both,
        "read as another digit",
    )
    refused(ValueError, "nearest: 'read as another digit'", digits, three, "misread")
    with pytest.raises(ValueError, match="A mask or band tells the fault of one image"):
        diagnose_all(digits, 4, {"x": torch.ones(16, 16, dtype=torch.bool)}, steps=4)
    with pytest.raises(ValueError, match="None of 4 samples has such a fault"):
        diagnose_all(digits, 4, {"x": lambda images: images.mean((1, 2, 3)) * 0}, steps=4)


def test_a_fault_by_name_says_the_same_as_its_reader():
    digits = dit_lens.load("digits")
    run = dit_lens.sample(digits, [3, 4], steps=6)
    assert check_fault("read as another digit", digits, 0.5) == 0.5
    score = made("read as another digit", 0.5, 3, run.images, run.images)
    read = dit_lens.groundtruth.digits.read(run.images).argmax(1)
    assert score.bad(score.scores(run.images)).tolist() == (read != 3).tolist()
    portraits = dit_lens.groundtruth.portraits
    images = portraits.draw(portraits.random_factors(4))
    images[0, :, 4:8] = 0.5
    score = made("no legal avatar", 0.5, 0, images, images)
    assert score.bad(score.scores(images)).tolist() == (~portraits.read(images).is_avatar).tolist()


def test_the_command_refuses_what_is_not_in_the_image_and_names_errors_of_the_users(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_dit(channels=1, classes=4, layers=2).save_pretrained("model")
    DDIMScheduler(1000, clip_sample=False).save_pretrained("model/scheduler")
    Path("mine.py").write_text("def boom(x):\n    raise KeyError('w')\n")
    command = ["diagnose", "model", "--label", "1", "--steps", "7", "--pairs", "4"]
    for mask in ("0 99 0 3", "3 3 0 2"):
        assert main([*command, "--mask", *mask.split()]) == 2
        assert f"--mask {mask} does not lie in an image of 8x8" in capsys.readouterr().err
    assert main([*command, "--fault", "mine.py:boom"]) == 2
    said = capsys.readouterr().err
    assert "boom failed in" in said and "mine.py, line 2 (boom): KeyError: 'w'." in said
    assert (
        main(["gap", "model", "--pairs", "16", "--steps", "4", "--attributes", "mine.py:boom"]) == 2
    )
    assert "mine.py, line 2 (boom): KeyError: 'w'." in capsys.readouterr().err
    size = ["--size", "4", "4", "--fault", "mine.py:bright"]
    Path("mine.py").write_text("def bright(x):\n    return x.mean((1, 2, 3)) > -9\n")
    assert main([*command, *size, "--good", "model"]) == 2
    assert "another architecture" not in capsys.readouterr().err


@pytest.mark.slow
def test_every_fault_of_many_samples(tmp_path, capsys):
    digits = dit_lens.load("digits")
    kinds = {
        "structure": lambda images: images[:, :, :8].mean((1, 2, 3)) * 4,
        "texture": lambda images: images[:, :, 8:].mean((1, 2, 3)) * 4,
    }
    result = diagnose_all(digits, 20, kinds, steps=4, most=1)
    assert result.sizes["fault"] == 2 and "arise later than those of structure" in result.sentence
    assert result.decided.min() >= 0 and result.decided.max() <= 4
    stored = diagnoses.store(result, tmp_path)
    diagnoses.show(result, stored)
    said = capsys.readouterr().out
    assert "faults in 20 samples" in said and (tmp_path / "diagnoses.png").exists()
    assert main(["report", str(tmp_path)]) == 0 and capsys.readouterr().out == said


def test_a_proportion_has_wilsons_interval():
    e = proportion(8, 16)
    assert (round(e.value, 3), round(e.low, 3), round(e.high, 3)) == (0.5, 0.28, 0.72)
    assert proportion(0, 4).low == 0 and proportion(4, 4).high == 1
    with pytest.raises(ValueError, match="a whole number from 0 to 4"):
        proportion(5, 4)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    scores = tmp_path / "scores.py"
    scores.write_text("def inked(images):\n    return images.mean((1, 2, 3)) * 6\n")
    out = tmp_path / "out"
    code = main(
        [
            "diagnose",
            "--label",
            "8",
            "--seed",
            "1",
            "--steps",
            "8",
            "--pairs",
            "4",
            "--fault",
            f"{scores}:inked",
            "--out",
            str(out),
        ]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert (out / "diagnosis.png").exists() and "other seeds of the label" in said.out
    assert main(["diagnose", "--steps", "8"]) == 2
    assert "expected --label L for one image, or --all" in capsys.readouterr().err
