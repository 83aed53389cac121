"""Hook points that are safe to leave in: what is usually done with a model is done with an opened
one, and gives the same numbers.
"""

import copy
import pickle

import pytest
import torch
from conftest import make_dit, make_pipe, raw
from diffusers import DDIMScheduler, DiTTransformer2DModel
from peft import LoraConfig

import dit_lens
from dit_lens import HookedDiT
from dit_lens.families import family_named, small_inputs


def images(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        class_labels=[3], num_inference_steps=2, generator=generator, output_type="pt"
    ).images


def works(transformer, inputs, want):
    """An opened transformer, or a copy: same answer, and a trace of it that can be read."""
    with torch.no_grad():
        assert torch.equal(raw(transformer, *inputs), want)
        with dit_lens.trace(transformer, names="resid_post") as eager:
            raw(transformer, *inputs)
        with dit_lens.trace(transformer) as lazy:
            raw(transformer, *inputs)
    assert torch.equal(eager["resid_post", 1], lazy["resid_post", 1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_hooked_model_is_copied_and_pickled_with_its_hook_points(dit, inputs, copied):
    model, seen = HookedDiT(dit, scheduler=DDIMScheduler(1000)), []
    model.add_hook("hook_embed", lambda a, hook: seen.append(1))
    with torch.no_grad():
        want = model(*inputs)
    model.reset_hooks()
    seen.clear()
    twin = copied(model)
    works(twin.transformer, inputs, want)
    assert twin.transformer is not dit and twin.instrumentation is not model.instrumentation
    twin.transformer.proj_out_2.bias.data += 1
    assert torch.allclose(raw(twin.transformer, *inputs), want + 1, atol=1e-5)
    works(dit, inputs, want)
    twin.remove()
    assert not any("forward" in vars(m) for m in twin.transformer.modules()) and not seen
    works(dit, inputs, want)
    run = dit_lens.sample(copied(model), [3], steps=2)
    assert torch.equal(run.latents, dit_lens.sample(model, [3], steps=2).latents)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_under_a_plan_is_under_none(dit, inputs, copied):
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    run = dit_lens.sample(model, [3], steps=3)
    held = [(0, "attn", 1), (1, "attn", 2), (1, "mlp", 2)]
    with dit_lens.reuse(model, dit_lens.experiments.Plan.of(model, run.timesteps, held)):
        assert not torch.equal(dit_lens.sample(model, [3], steps=3).latents, run.latents)
        twins = copied(model), HookedDiT(copied(dit), scheduler=model.scheduler)
    for twin in twins:
        assert torch.equal(dit_lens.sample(twin, [3], steps=3).latents, run.latents)


def test_a_copy_made_inside_a_part_of_a_pass_runs_all_of_it(dit, inputs):
    model, copies = HookedDiT(dit), []
    want = raw(dit, *inputs)

    def fn(a, hook):
        copies.append(copy.deepcopy(dit))

    model.run_with_hooks(*inputs, fwd_hooks=[("hook_embed", fn)], stop_at_layer=2)
    with model.instrumentation.part((None, 1)):
        assert torch.equal(raw(copies[0], *inputs), want)


def test_a_whole_pipeline_is_copied(inputs):
    pipe = make_pipe()
    want = images(pipe)
    model = HookedDiT(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(images(twin), want) and torch.equal(images(pipe), want)
    model.remove()
    assert torch.equal(images(twin), want)


def test_what_is_saved_is_loaded(dit, inputs, tmp_path):
    with torch.no_grad():
        want = raw(dit, *inputs)
    model = HookedDiT(dit)
    dit.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert not any("forward" in vars(m) for m in again.modules())
    works(again, inputs, want)
    other = make_dit(seed=5)
    other.load_state_dict(dit.state_dict())
    works(other, inputs, want)
    dit.load_state_dict(make_dit(seed=6).state_dict())
    with torch.no_grad():
        works(dit, inputs, raw(make_dit(seed=6), *inputs))
    assert model.instrumentation.installed


def test_moved_and_cast(dit, inputs):
    x, t, y = inputs
    with torch.no_grad():
        want = raw(copy.deepcopy(dit).to(torch.bfloat16), x.bfloat16(), t, y)
        model = HookedDiT(dit)
        works(dit.to(torch.bfloat16), (x.bfloat16(), t, y), want)
        assert model.dtype == torch.bfloat16
        moved = dit.to("meta")
        assert raw(moved, x.bfloat16().to("meta"), t.to("meta"), y.to("meta")).shape == x.shape
    model.remove()
    assert not any("forward" in vars(m) for m in dit.modules())


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_adapters_are_loaded_switched_fused_and_unloaded(name):
    family = family_named(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, condition = family.small(1)
    inputs = small_inputs(family, plain, condition)
    reference, opened = copy.deepcopy(plain), copy.deepcopy(plain)
    model = HookedDiT(opened)

    def ask(each):
        with torch.no_grad():
            return each(**inputs, return_dict=False)[0]

    def load(each):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        each.add_adapter(config, adapter_name="style")

    changes = [
        load,
        lambda each: each.set_adapters(["style"], weights=[0.5]),
        lambda each: each.disable_adapters(),
        lambda each: each.enable_adapters(),
        lambda each: each.fuse_lora(),
        lambda each: each.unfuse_lora(),
        lambda each: each.unload_lora(),
    ]
    answers = [ask(plain)]
    for change in changes:
        change(reference)
        change(opened)
        answers.append(ask(reference))
        with dit_lens.trace(model, names="resid_post") as eager:
            assert torch.equal(ask(opened), answers[-1])
        with dit_lens.trace(model) as lazy:
            ask(opened)
        assert torch.equal(eager["resid_post", 1], lazy["resid_post", 1])
    assert not torch.allclose(answers[1], answers[0], atol=1e-3)
    assert torch.allclose(answers[-1], answers[0], atol=1e-5)  # fusing and unfusing rounds
    model.remove()
    assert torch.equal(ask(opened), answers[-1])


@pytest.mark.slow
def test_a_compiled_pipeline_step(inputs):
    """A pipeline's step compiled as a whole around an opened model: hooks put on later are seen,
    and it is the same without them.
    """
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    dit, scheduler = model.transformer, model.scheduler
    scheduler.set_timesteps(4)
    x, t, y = inputs
    alphas = scheduler.alphas_cumprod

    def step(x, t):
        eps = dit(x, timestep=t, class_labels=y, return_dict=False)[0]
        a = alphas[t][:, None, None, None]
        return (x - (1 - a).sqrt() * eps) / a.sqrt()

    zero = [("blocks.1.hook_attn_out", lambda a, hook: 0 * a)]
    with torch.no_grad():
        want = step(x, t)
        with model.hooks(zero):
            edited = step(x, t)
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager")
        assert torch.equal(compiled(x, t), want)
        with model.hooks(zero):
            assert torch.equal(compiled(x, t), edited)
        with dit_lens.trace(model) as lazy:
            assert torch.equal(compiled(x, t), want)
        assert torch.equal(compiled(x, t), want)
    with dit_lens.trace(model, names="resid_post") as eager, torch.no_grad():
        step(x, t)
    assert torch.equal(lazy["resid_post", 1], eager["resid_post", 1])
    assert not torch.equal(edited, want)
    model.remove()
    with torch.no_grad():
        assert torch.equal(compiled(x, t), want)
    torch._dynamo.reset()
