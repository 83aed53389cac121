"""Plans: their files, what they refuse, and running them."""

import contextlib
import copy
import json
import random
import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from test_storage import mutated

import dit_lens
from dit_lens import HookedDiT
from dit_lens.errors import InvalidState, InvalidValue
from dit_lens.experiments import Plan, reuse_plan
from dit_lens.experiments.reuse_plan import check_plan
from dit_lens.families import family_named
from dit_lens.hooks.hold import parts as model_parts
from dit_lens.pieces.content import weights_digest
from dit_lens.plans.plan import Costs
from dit_lens.storage import save_document

STEPS = 6
SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=10), scheduler=SCHEDULER)


def sampled(model, guidance=1.0, steps=STEPS, **options):
    return dit_lens.sample(model, [1, 2], steps=steps, guidance=guidance, **options)


def cells_of(*places):
    return [(layer, part, step) for layer, part, steps in places for step in steps]


CELLS = cells_of(
    (0, "attn", [1, 2]), (1, "mlp", [3]), (1, "attn", [3, 4]), (2, "attn", [5]), (2, "mlp", [5])
)


@pytest.fixture(scope="module")
def plan(model):
    return Plan.of(model, sampled(model).timesteps, CELLS, {"aim": "same"})


def forwards_left(module):
    return [name for name, m in module.named_modules() if "forward" in vars(m)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_under_a_plan_is_the_run_with_its_cells_held(model, plan, guidance):
    with dit_lens.trace(model) as t:
        for (layer, part), steps in plan.held.items():
            t.hold(f"blocks.{layer}.{part}", steps)
        expected = sampled(model, guidance).latents
    before = forwards_left(model.transformer)
    with dit_lens.reuse(model, plan):
        found = sampled(model, guidance).latents
        again = sampled(model, guidance).latents
    assert torch.equal(found, expected) and torch.equal(again, expected)
    assert not model.instrumentation.busy and forwards_left(model.transformer) == before
    assert not torch.equal(sampled(model, guidance).latents, expected)


LINES = [(0, "mlp", 3), (0, "mlp", 4), (1, "attn", 5), (2, "attn", 5), (2, "mlp", 5)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_lines_go_through_the_last_two_computed_steps(model, guidance):
    """Beside hooks written by hand."""
    plan = Plan.of(model, sampled(model).timesteps, CELLS_OF_LINES, lines=LINES)
    at, seen, now = plan.timesteps, {}, [-1]

    def by_hand(layer, part):
        def fn(value, hook):
            step, cell = now[0], (layer, part, now[0])
            known = seen.setdefault((layer, part), [])
            if cell not in plan.cells:
                known.append((at[step], value))
                return None
            (t, last), (u, earlier) = known[-1], known[-2 if cell in plan.lines else -1]
            return (
                last
                if cell not in plan.lines
                else (last + (at[step] - t) / (t - u) * (last - earlier))
            )

        return fn

    def count(value, hook):
        now[0] += 1

    hooks = [(f"blocks.{i}.hook_{p}_out", by_hand(i, p)) for i in range(3) for p in ("attn", "mlp")]
    with model.hooks([("hook_embed", count), *hooks]):
        expected = sampled(model, guidance).latents
    with dit_lens.reuse(model, plan):
        found = sampled(model, guidance).latents
        assert torch.equal(found, sampled(model, guidance).latents)
    plain = sampled(model, guidance).latents
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    with dit_lens.reuse(model, Plan.of(model, plan.timesteps, plan.cells)):
        assert (sampled(model, guidance).latents - found).abs().max() > 1e-3


CELLS_OF_LINES = [*CELLS, (0, "mlp", 1), (0, "mlp", 3), (0, "mlp", 4), (1, "attn", 5)]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([(0, "mlp", 2)], "lines has .0, 'mlp', 2., which is not held; expected some of cells"),
        ([(0, "attn", 1)], "before it the part is computed at 1 other time; expected two"),
        ([(0, "attn", 2)], "can't be held along a line"),
    ],
)
def test_lines_that_are_none(model, plan, lines, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(model, plan.timesteps, CELLS, lines=lines)


def test_a_run_that_begins_in_the_midst_has_nothing_to_hold_from(model, plan):
    run = sampled(model)
    with dit_lens.reuse(model, plan):
        run.replay(from_step=0)
        with pytest.raises(RuntimeError, match="holds it from step 0, and there was none"):
            run.replay(from_step=1)
    assert not model.instrumentation.busy


def test_a_pipeline_under_a_plan_skips_and_is_left_as_it_was():
    pipe, ran = make_pipe(), []
    call = {"class_labels": [3, 7], "num_inference_steps": 4, "output_type": "np"}

    def image():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    plain = image()
    with dit_lens.trace(pipe) as t:
        t.hold(["blocks.1.attn", "blocks.2"], [2, 3])
        held = image()
    model = HookedDiT(pipe)
    cells = cells_of((1, "attn", [2, 3]), (2, "attn", [2, 3]), (2, "mlp", [2, 3]))
    plan = Plan.of(model, t.timesteps, cells)
    model.remove()
    counted = pipe.transformer.transformer_blocks[1].attn1.to_q, pipe.transformer.proj_out_1
    for module in (*counted, pipe.transformer.transformer_blocks[2].norm1.linear):
        module.register_forward_hook(lambda m, *_: ran.append(m))
    with dit_lens.reuse(pipe, plan):
        found = image()
    assert [ran.count(m) for m in counted] == [2, 4] and len(ran) == 8
    # a whole block is added part by part
    assert abs(found - held).max() < 1e-5 < abs(plain - held).max()
    assert not forwards_left(pipe.transformer)
    assert (image() == plain).all()


def test_a_module_hook_is_shown_what_the_module_computes():
    pipe, shown = make_pipe(), []
    call = {"class_labels": [3, 7], "num_inference_steps": 4, "output_type": "np"}

    def image():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    model = HookedDiT(pipe)
    with dit_lens.trace(pipe) as t:
        image()
    plan = Plan.of(model, t.timesteps, cells_of((1, "attn", [2])))
    with dit_lens.reuse(pipe, plan):
        found = image()
        attention = pipe.transformer.transformer_blocks[1].attn1
        handle = attention.register_forward_hook(lambda *args: shown.append(args[-1].clone()))
        assert (image() == found).all()
        handle.remove()
        assert (image() == found).all()
    assert len(shown) == 4 and all(bool(each.any()) for each in shown)


def test_what_fails_inside_leaves_the_model_as_it_was(model, plan):
    before = forwards_left(model.transformer)
    with pytest.raises(ZeroDivisionError), dit_lens.reuse(model, plan):
        sampled(model)
        raise ZeroDivisionError
    assert not model.instrumentation.busy and forwards_left(model.transformer) == before


def test_a_trace_around_a_plan_reads_what_was_held(model, plan):
    with dit_lens.trace(model) as t, dit_lens.reuse(model, plan):
        sampled(model)
    added = t.get("blocks.0.hook_attn_out")["blocks.0.hook_attn_out"]
    assert torch.equal(added[1], added[0]) and torch.equal(added[2], added[0])
    assert not torch.equal(added[3], added[2])


def test_a_file_is_what_was_saved(model, plan, tmp_path):
    path = plan.save(tmp_path / "plans" / "plan.json")
    assert Plan.load(path) == plan
    with dit_lens.reuse(model, path):
        found = sampled(model).latents
    with dit_lens.reuse(model, plan):
        assert torch.equal(found, sampled(model).latents)


def damaged(text, path):
    content = json.loads(text)
    content["cells"][0][2] = 4
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text, path: path.unlink(), "There is no file"),
        (lambda text, path: path.write_text(text[:100]), "is not JSON"),
        (lambda text, path: path.write_text("[1]"), "is not a plan of th"),
        (
            lambda text, path: path.write_text('{"format": "other"}'),
            "is not a plan of this version",
        ),
        (damaged, "is damaged: it is not what was written, by its checksum"),
    ],
)
def test_a_file_that_is_none_is_refused(model, plan, tmp_path, damage, message):
    path = plan.save(tmp_path / "plan.json")
    damage(path.read_text(), path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with dit_lens.reuse(model, path):
            pass
    assert not model.instrumentation.busy


def test_other_models_are_refused(plan):
    others = {
        "class": HookedDiT(make_dit(channels=1, classes=10), scheduler=SCHEDULER),
        "layers": HookedDiT(make_dit(layers=2, channels=1, classes=10), scheduler=SCHEDULER),
        "weights": HookedDiT(make_dit(channels=1, classes=10, seed=5), scheduler=SCHEDULER),
    }
    for what in ("layers", "weights"):
        with pytest.raises(ValueError, match=f"for another model: its {what} is"):
            with dit_lens.reuse(others[what], plan):
                pass
    with dit_lens.reuse(others["class"], plan):  # a copy is the same model
        sampled(others["class"])
    with torch.no_grad():  # a part of one weight is enough to be another model
        others["class"].transformer.transformer_blocks[1].attn1.to_out[0].weight[:, -4:] *= 1.5
    with pytest.raises(ValueError, match="for another model: its weights is"):
        with dit_lens.reuse(others["class"], plan):
            pass


def test_weights_are_the_same_in_any_dtype_that_holds_them():
    transformer = make_dit().half()
    half = weights_digest(transformer)
    assert weights_digest(transformer.float()) == half
    transformer.register_buffer("empty", torch.zeros(0))
    transformer.register_buffer("scale", torch.tensor(2.0))
    before = weights_digest(transformer)
    transformer.scale += 1
    assert len({half, before, weights_digest(transformer)}) == 3


@pytest.mark.parametrize("steps", [4, 9])
def test_other_steps_are_refused_or_remapped(model, plan, steps):
    message = re.escape(f"The plan is for {STEPS} steps, and step ")
    with pytest.raises(ValueError, match=message), dit_lens.reuse(model, plan):
        sampled(model, steps=steps)
    assert not model.instrumentation.busy
    with dit_lens.reuse(model, plan, remap=True):
        with pytest.warns(UserWarning, match="made for 6 other timesteps"):
            found = sampled(model, steps=steps)
    # what each step does, by the nearest of the plan's timesteps
    times, held = torch.tensor(plan.timesteps), {}
    for step, t in enumerate(found.timesteps.tolist()):
        near = max(int((times - t).abs().argmin()), 1)
        for place, of_place in plan.held.items():
            if step and near in of_place:
                held.setdefault(place, []).append(step)
    with dit_lens.trace(model) as t:
        for (layer, part), of_place in held.items():
            t.hold(f"blocks.{layer}.{part}", of_place)
        expected = sampled(model, steps=steps).latents
    assert torch.allclose(found.latents, expected, atol=1e-5)
    with warnings.catch_warnings(), dit_lens.reuse(model, plan, remap=True):
        warnings.simplefilter("error")
        sampled(model)


@pytest.mark.parametrize(
    "cells, message",
    [
        ([(0, "attn", 0)], "holds step 0; expected steps 1 to 5, those that have one before"),
        ([(0, "attn", 6)], "holds step 6; expected steps 1 to 5"),
        ([(3, "attn", 1)], "holds 'attn' in layer 3, which the model does not have"),
        ([(0, "cross_attn", 1)], "expected layers 0 to 2 and attn, mlp"),
        ([(0, "attn", 1.5)], "step=1.5 can't be used"),
    ],
)
def test_cells_that_are_none(model, cells, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(model, range(STEPS, 0, -1), cells)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "HunyuanDiT2DModel"])
def test_timesteps_that_are_rounded_to_bfloat16_are_the_plans(name):
    """Along lines through the times that the plan says, and not the rounded ones."""
    model = HookedDiT(family_named(name).small_pipeline().to(torch.bfloat16))
    run = sampled(model)
    part = next(iter(model_parts(model.names, 0)))
    plan = Plan.of(model, run.timesteps, [(0, part, 3)], lines=[(0, part, 3)])
    seen = []
    with dit_lens.reuse(model, plan):
        runner = model.instrumentation.watchers[-1]
        with model.observing("hook_embed", lambda *_: seen.append(runner.time)):
            assert sampled(model).latents.isfinite().all()
    assert seen == list(plan.timesteps)


def test_two_plans_at_once_and_train_mode_are_refused(model, plan):
    with dit_lens.reuse(model, plan):
        with pytest.raises(RuntimeError, match="under a plan already"):
            with dit_lens.reuse(model, plan):
                pass
        sampled(model)
    with pytest.raises(TypeError, match="expected a Plan, or the path of one"):
        with dit_lens.reuse(model, 3):
            pass


def test_costs_are_those_counted_by_hand(model):
    costs, d, n = Costs.of(model), 16, 16  # width, tokens
    assert costs.parts[0, "attn"] == 4 * n * d * d + 2 * n * n * d
    assert costs.parts[1, "mlp"] == 8 * n * d * d
    assert costs.rest[2] == 6 * d * d + 256 * d + d * d
    everything = [(i, p, s) for i in range(3) for p in ("attn", "mlp") for s in (1, 2, 3)]
    left = 1 - 3 / 4 * (sum(costs.parts.values()) + sum(costs.rest)) / costs.whole
    assert costs.share(everything, 4) == pytest.approx(left)
    assert costs.share([], 4) == 1


def test_costs_count_no_text_encoder():
    """Which runs in the first call only."""
    for name in ("SD3Transformer2DModel", "WanTransformer3DModel"):
        model = HookedDiT(family_named(name).small_pipeline())
        assert Costs._counted(model, 0) == Costs._counted(model, 0) == Costs.of(model)


def test_costs_are_counted_anew_for_a_prompt_of_another_length():
    model = HookedDiT(family_named("SD3Transformer2DModel").small_pipeline())
    before, prompt = Costs.of(model), model.conditions.prompts[0]
    known = model.conditions.of(torch.tensor([0]))
    twice = {k: torch.cat([v, v], 1) if v.ndim == 3 else v for k, v in known.items()}
    model.conditions.add({prompt: twice})
    assert Costs.of(model) == Costs._counted(model, 0) and Costs.of(model).whole > before.whole


def test_costs_have_no_part_in_an_open_trace():
    model = HookedDiT(make_dit(channels=1, classes=10), scheduler=SCHEDULER)
    with dit_lens.trace(model, names="blocks.*.attn.hook_result") as t:
        found = Costs.of(model)
        sampled(model)
    assert found == Costs._counted(model, torch.tensor([0])) and len(t.steps) == STEPS


# For other tools.


def test_other_tools_have_no_lines(model, plan):
    lines = Plan.of(model, plan.timesteps, CELLS, lines=[(1, "attn", 4), (2, "mlp", 5)])
    for export in (lines.to_smoothcache, lines.to_cache_dit):
        with pytest.raises(ValueError, match="holds 2 cells along lines, which .* can't say"):
            export()


def test_a_schedule_of_smoothcache(plan):
    schedule = plan.to_smoothcache()
    assert list(schedule) == [f"{part}-{i}" for i in range(3) for part in ("attn1", "ff")]
    assert schedule["attn1-0"] == [1, 0, 0, 1, 1, 1] and schedule["ff-0"] == [1] * STEPS


def whole_steps(first, steps):
    layers = range(first, 3)
    return cells_of(*((i, part, steps) for i in layers for part in ("attn", "mlp")))


def test_whole_steps_for_cache_dit(model, plan):
    times = plan.timesteps
    found = Plan.of(model, times, whole_steps(1, [2, 4])).to_cache_dit()
    assert found["Fn_compute_blocks"] == 1 and found["steps_computation_policy"] == "static"
    assert found["steps_computation_mask"] == [1, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="holds layer 0, which cache-dit always computes"):
        plan.to_cache_dit()
    part = Plan.of(model, times, [*whole_steps(1, [2]), (2, "mlp", 3)])
    with pytest.raises(ValueError, match="At step 3 the plan holds nothing in layer 1; cache-dit"):
        part.to_cache_dit()


def test_cache_dit_takes_it(model, plan):
    cache_dit = pytest.importorskip("cache_dit")
    found = Plan.of(model, plan.timesteps, whole_steps(1, [2, 4])).to_cache_dit()
    assert cache_dit.DBCacheConfig(**found, num_inference_steps=STEPS).steps_computation_mask


@pytest.mark.parametrize(
    "cells, lines",
    [(CELLS, ()), (CELLS_OF_LINES, LINES), (whole_steps(0, [1, 3, 4]), whole_steps(0, [3, 4]))],
)
def test_a_file_runs_a_plan_on_plain_diffusers(cells, lines, tmp_path):
    call = {"class_labels": [3, 7], "num_inference_steps": STEPS, "output_type": "np"}

    def image(pipe):
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    pipe = make_pipe()
    pipe.scheduler.set_timesteps(STEPS)
    model = HookedDiT(pipe)
    plan = Plan.of(model, pipe.scheduler.timesteps.tolist(), cells, lines=lines)
    with dit_lens.reuse(pipe, plan):
        expected = image(pipe)
    model.remove()
    plain = image(pipe)
    file = plan.to_script(tmp_path / "fast.py")
    text = file.read_text()
    assert "import dit_lens" not in text and len(text.splitlines()) <= 60
    scope = {}
    exec(compile(text, str(file), "exec"), scope)
    with scope["plan"](pipe.transformer):
        found = image(pipe)
    assert abs(found - expected).max() < 1e-5 < abs(plain - expected).max()
    assert not forwards_left(pipe.transformer) and (image(pipe) == plain).all()
    with pytest.raises(RuntimeError, match="the plan has"), scope["plan"](pipe.transformer):
        pipe(**call | {"num_inference_steps": 3})


def test_a_file_takes_the_time_by_place_too(plan, tmp_path):
    scope, dit, x = {}, make_dit(channels=1, classes=10), torch.randn(2, 1, 8, 8)
    exec(plan.to_script(tmp_path / "fast.py").read_text(), scope)
    with torch.no_grad(), scope["plan"](dit):
        for time in map(torch.tensor, plan.timesteps):
            by_place = dit(x, time.expand(2), torch.tensor([1, 2])).sample
        for time in map(torch.tensor, plan.timesteps):
            by_name = dit(x, timestep=time.expand(2), class_labels=torch.tensor([1, 2])).sample
    assert torch.equal(by_place, by_name)


def test_a_file_leaves_another_tools_forward_alone(model, plan, tmp_path):
    scope, pipe = {}, make_pipe()
    exec(plan.to_script(tmp_path / "fast.py").read_text(), scope)
    block = pipe.transformer.transformer_blocks[1]
    block.forward = theirs = block.forward
    with pytest.raises(RuntimeError, match="something else replaces a block's forward"):
        with scope["plan"](pipe.transformer):
            pass
    assert vars(block)["forward"] == theirs and not pipe.transformer._forward_pre_hooks


def test_other_families_have_no_file():
    from dit_lens.plans.exports import script

    flux = Plan({"class": "FluxTransformer2DModel"}, (1.0,), (("attn",),), frozenset(), 1.0)
    with pytest.raises(ValueError, match="for a FluxTransformer2DModel; a file can be written for"):
        script(flux)
    other = {"class": "DiTTransformer2DModel"}
    unknown = Plan(other, (1.0,), (("attn", "memory", "mlp"),), frozenset(), 1.0)
    with pytest.raises(ValueError, match="does not say which modules compute 'memory'"):
        unknown.to_smoothcache()


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"])
def test_hooks_at_a_block_of_which_all_is_held_are_called(model, name):
    """The block is left out only where nobody listens."""
    times = sampled(model).timesteps
    plan = Plan.of(model, times, cells_of((0, "attn", [2, 3]), (0, "mlp", [2, 3])))
    found, seen = [], []
    for held_by_plan in (True, False):
        with contextlib.ExitStack() as stack:
            t = stack.enter_context(dit_lens.trace(model))
            if held_by_plan:
                stack.enter_context(dit_lens.reuse(model, plan))
            else:
                t.hold(["blocks.0.attn", "blocks.0.mlp"], steps=[2, 3])
            late = stack.enter_context(dit_lens.trace(model))
            late.edit(name, lambda value, hook: 2 * value, steps=[3])
            stack.enter_context(model.hooks([(name, lambda value, hook: seen.append(1))]))
            found.append(sampled(model).latents)
        assert len(seen) == STEPS * len(found)
        assert t["resid_post", 2].isfinite().all()
        seen[STEPS * len(found) :] = []
    assert torch.equal(*found)


def test_what_a_plan_left_out_is_not_read_as_if_it_had_been_computed(model, plan):
    """Neither the zeros that stand in for it, nor what it would have been."""
    names = ["blocks.0.attn.hook_out", "blocks.0.attn.hook_q", "blocks.0.hook_attn_out"]
    with dit_lens.reuse(model, plan), dit_lens.trace(model, names=names) as t:
        sampled(model)
    for name in names[:2]:
        assert torch.equal(t.get(name, steps=0)[name], t.get([*names], steps=0)[name])
        for steps in (1, None):
            with pytest.raises(InvalidState, match=f"'{name}' was not computed in call 1 of the"):
                t.get(name, steps=steps)
    with pytest.raises(InvalidState, match="a reuse plan held what it belongs to"):
        t.stack("attn.hook_z", steps=1)
    assert torch.equal(t[names[2]][1], t[names[2]][0])
    whole = Plan.of(model, t.timesteps, [(1, "attn", 1), (1, "mlp", 1)])
    with dit_lens.reuse(model, whole), dit_lens.trace(model) as t:
        sampled(model)
    for site in ("hook_cond", "adaln.hook_gate_mlp", "ln2.hook_normalized", "mlp.hook_in"):
        with pytest.raises(InvalidState, match=f"'blocks.1.{site}' was not computed"):
            t.get(f"blocks.1.{site}")
    found = t.get([f"blocks.1.hook_{site}" for site in ("resid_pre", "attn_out", "resid_post")])
    assert all(len(value) == len(t.steps) for value in found.values())


def test_a_sealed_file_of_other_content_is_no_plan_or_one_that_can_be_run(model, plan, tmp_path):
    path, rng = plan.save(tmp_path / "plan.json"), random.Random(0)
    base = json.loads(path.read_text())
    base.pop("sha256")
    loaded = 0
    for _ in range(300):
        content = mutated(copy.deepcopy(base), rng)
        save_document(path, content)
        try:
            found = Plan.load(path)
        except InvalidValue as error:
            assert str(error).startswith(repr(str(path))) and str(error).count("\n") == 0
            continue
        loaded += 1
        for use in (found.__repr__, found.to_smoothcache, found.to_cache_dit):
            with contextlib.suppress(InvalidValue):
                use()
        with contextlib.suppress(InvalidValue), dit_lens.reuse(model, found):
            pass
    assert 30 < loaded < 270 and not model.instrumentation.busy


@pytest.mark.parametrize(
    "change, text",
    [
        ({"timesteps": []}, "has timesteps = "),
        ({"cells": [[10**30, "attn", 2]]}, "The plan holds 'attn' in layer 1e+30, which the model"),
        ({"cells": [[0, "attn", 6]]}, "The plan holds step 6; expected steps 1 to 5"),
        ({"model": {"class": "DiTTransformer2DModel"}}, "expected it to have"),
        ({"macs": 7.0}, "has macs = 7"),
        ({"about": {"items": "8"}}, "'about' of"),
        ({"about": {"longest": -1}}, "has longest = -1"),
        ({"about": {"longest": 10**9}}, "has longest = 1000000000"),
        ({"about": {"seed": "a"}}, "has seed = 'a'"),
        ({"about": {"labels": {"a": 1}}}, "has labels"),
        ({"about": {"steps": 7}}, "has steps=7 in 'about', and 6 timesteps; expected as many"),
    ],
)
def test_what_a_plan_has_to_say(plan, tmp_path, change, text):
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text()) | change
    content.pop("sha256")
    save_document(path, content)
    with pytest.raises(InvalidValue, match=re.escape(text)):
        Plan.load(path)


@pytest.mark.parametrize("layers, part", [(3, "memory"), (4, "attn")])
def test_parts_that_the_model_does_not_have(model, plan, layers, part):
    own = [*plan.parts, *[("attn", "mlp")] * (layers - 3)]
    own[-1] = ("attn", "mlp", part) if layers == 3 else own[-1]
    other = replace(plan, parts=tuple(own), cells=plan.cells | {(layers - 1, part, 1)})
    with pytest.raises(InvalidValue, match=f"The plan is for {layers} layers with"):
        with dit_lens.reuse(model, other):
            pass


def test_a_cost_is_counted_anew_where_a_plan_is_checked(model):
    plan = reuse_plan(model, 0.8, items=8, steps=4, rounds=0, resamples=20)
    assert check_plan(model, replace(plan, macs=0.01), items=8, resamples=20).macs == plan.macs
