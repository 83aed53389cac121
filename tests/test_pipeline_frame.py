"""Which branch and which step a call is, where diffusers itself says so."""

import copy
import types
import warnings

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.wan import WanBlocks, encoders

import dit_lens
from dit_lens.families import family_named
from dit_lens.families.upstream import small_inputs
from dit_lens.model.quiet import quiet


def wan():
    family = family_named("WanTransformer3DModel")
    transformer, condition = family.small(0)
    return transformer, small_inputs(family, transformer, condition)


def test_branch_and_step_are_taken_from_cache_context():
    transformer, inputs = wan()
    with torch.no_grad(), dit_lens.trace(transformer) as t:
        for step in range(2):
            for name in ("uncond", "cond"):  # not in the order that would be guessed
                with transformer.cache_context(name, step_index=step):
                    transformer(**inputs)
    assert [c.branch for c in t.record.calls] == [("uncond",) * 2, ("cond",) * 2] * 2
    assert t.record.calls_at == {0: [0, 1], 1: [2, 3]}
    name = "blocks.0.hook_resid_post"
    both, cond = t.get(name, steps=1)[name], t.get(name, steps=1, branch="cond")[name]
    assert both.shape[1] == 4 and torch.equal(both[:, 2:], cond)


def test_cache_context_is_given_back_and_copies_have_their_own():
    transformer, inputs = wan()
    before = dict(vars(transformer))
    model = dit_lens.HookedDiT(transformer)
    twin = copy.deepcopy(model)
    assert vars(twin.transformer)["cache_context"].module is twin.transformer
    with torch.no_grad(), dit_lens.trace(twin) as t, twin.transformer.cache_context("uncond"):
        twin.transformer(**inputs)
    assert t.record.calls[0].branch == ("uncond", "uncond")
    model.remove()
    assert "cache_context" not in vars(transformer) and vars(transformer).keys() == before.keys()


def test_outside_of_cache_context_nothing_is_said():
    transformer, inputs = wan()
    with torch.no_grad(), dit_lens.trace(transformer) as t:
        with transformer.cache_context("uncond"):
            pass
        transformer(**inputs)
    assert t.record.calls[0].branch is None and t.record.calls[0].place is None


def pipeline(name):
    family = family_named(name)
    with quiet():
        pipe = family.small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


@pytest.mark.parametrize("name", ["SD3", "Wan", "Flux", "Lumina2"])
def test_what_a_callback_calls_is_none_of_the_loops_steps(name):
    dims = "3DModel" if name == "Wan" else "2DModel"
    family, pipe = pipeline(f"{name}Transformer{dims}")
    asked = family.small_call(True) | {"output_type": "latent"}

    def run(then=None):
        with dit_lens.trace(pipe) as t, quiet():
            t.ablate(("attn_out", 0), steps=[1])
            pipe(**asked, callback_on_step_end=then)
        return t.record

    def again(pipe, i, time, values):
        with torch.no_grad():
            pipe.transformer(**given)
        return {}

    plain = run()
    given = plain.calls[0].inputs
    found = run(again)
    a_step = len(plain.calls_at[0])
    # the loop's steps, and behind each a run of one step
    steps = len(plain.calls_at)
    assert [len(found.calls_at[row]) for row in range(2 * steps)] == [a_step, 1] * steps
    for row, step in enumerate(plain.calls_at):
        mine, theirs = found.calls_at[2 * row], plain.calls_at[step]
        assert [found.calls[c].branch for c in mine] == [plain.calls[c].branch for c in theirs]
        assert {found.calls[c].place for c in mine} == {(1, step)}
        assert [bool(found.calls[c].edits) for c in mine] == [step == 1] * a_step
        (alone,) = found.calls_at[2 * row + 1]
        assert found.calls[alone].branch is None and not found.calls[alone].edits


def test_a_run_in_a_callback_is_a_run_of_its_own():
    family, pipe = pipeline("SD3Transformer2DModel")
    model = dit_lens.HookedDiT(pipe)

    def sampling(pipe, i, time, values):
        if i == 0:
            dit_lens.sample(model, ["a fox"], steps=3)
        return {}

    with dit_lens.trace(model) as t, quiet():
        t.ablate(("attn_out", 0), steps=[2])
        pipe(**family.small_call(True), callback_on_step_end=sampling, output_type="latent")
    record = t.record
    places = [record.calls[calls[0]].place for calls in record.calls_at.values()]
    assert places == [(1, 0), None, None, None, *((1, i) for i in range(1, len(t.steps) - 3))]
    assert [record.calls[c].context.step for c in (1, 2, 3)] == [0, 1, 2]
    assert record.calls[3].edits and not record.calls[2].edits and record.calls[1].prompts is None


def test_a_modular_pipeline_tells_step_and_branch(monkeypatch):
    monkeypatch.setattr(encoders, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)
    _, usual = pipeline("WanTransformer3DModel")
    pipe = WanBlocks().init_pipeline()
    parts = {k: v for k, v in usual.components.items() if k in pipe._component_specs}
    pipe.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=4.0))
    asked = dict(height=32, width=32, num_frames=9, num_inference_steps=3, output="latents")
    with dit_lens.trace(pipe, names=("attn_out", 0)) as t, quiet():
        t.ablate(("attn_out", 0), steps=[1])
        pipe(prompt="a fox", negative_prompt="x", **asked)
    assert t.record.calls_at == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert [c.branch for c in t.record.calls] == [("cond",), ("uncond",)] * 3
    assert [bool((v == 0).all()) for v in t["attn_out", 0]] == [False, True, False]


def test_a_pipeline_of_two_transformers_is_not_sampled_with_one():
    family, first = pipeline("WanTransformer3DModel")
    parts = {k: v for k, v in first.components.items() if k != "transformer_2"}
    second = copy.deepcopy(first.transformer)
    pipe = type(first)(**parts, transformer_2=second, boundary_ratio=0.875)
    model = dit_lens.HookedDiT(pipe)
    pipe.set_progress_bar_config(disable=True)
    for measure in (
        lambda: dit_lens.sample(pipe, ["a fox"], steps=2),
        lambda: dit_lens.twins(pipe, pairs=1, steps=4),
        lambda: dit_lens.record(pipe, "resid_post", ["a fox"], "never", steps=2),
        lambda: dit_lens.experiments.measure_gap(model, pairs=16, steps=4),
    ):
        with pytest.raises(RuntimeError, match="with a second transformer, transformer_2, and"):
            measure()
    with pytest.warns(UserWarning, match="acts in pipe.transformer only") as said:
        t = dit_lens.trace(pipe).ablate("attn_out").ablate("mlp_out")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = dit_lens.trace(pipe).ablate("attn_out", steps=[0])
        dit_lens.trace(second).ablate("attn_out")
    with t, quiet():
        pipe(**family.small_call(True), output_type="latent")
    assert t.steps == [0]
    # without a ratio the first transformer does all steps
    alone = type(first)(**parts, transformer_2=second)
    assert len(dit_lens.sample(alone, ["a fox"], steps=2).x0) == 2


def test_a_block_without_a_step_is_refused():
    class Pipe:
        register_components = None

        def __init__(self, transformer):
            self.transformer = transformer

        def __call__(self, **inputs):
            return self.transformer(**inputs)

    transformer, inputs = wan()
    with pytest.raises(RuntimeError, match="Pipe calls the transformer in a modular pipeline with"):
        with dit_lens.trace(transformer):
            Pipe(transformer)(**inputs)
