"""A recomputation is the run that was traced, bit for bit, or it says so: one test for each way in
which it was silently something else.
"""

import contextlib
import gc
import pickle
import types
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_lens
from dit_lens import HookedDiT, NotReproduced
from dit_lens.model.kernels import may_use_tf32
from dit_lens.model.state import State
from dit_lens.model.witness import Checksum, Witnessing, checksum, compare, tolerance


def call(model, x, t, y):
    with torch.no_grad():
        return model.transformer(x, t, class_labels=y, return_dict=False)[0]


def both(model, x, t, y, act=lambda: None):
    """An eager and a lazy trace of two passes, with `act` between them."""
    with dit_lens.trace(model, names="*") as eager, dit_lens.trace(model) as lazy:
        call(model, x, t, y)
        act()
        call(model, x, t, y)
    return eager, lazy


@pytest.fixture
def model(dit):
    return HookedDiT(dit, scheduler=DDIMScheduler(1000))


def see(values):
    """What is left of streams by name."""
    taking = Witnessing()
    for name, value in values.items():
        taking.see(value, name)
    taking.finished()
    return taking.witness


@pytest.mark.parametrize("tokens", [4, 4096])
def test_the_sums_of_a_pass_lie_together(tokens):
    """A few bytes from the midst of every forward would keep the memory around them in use."""
    values = {f"blocks.{i}.hook_resid_post": torch.randn(2, tokens, 8) for i in range(5)}
    found = see(values)
    assert all(torch.equal(found[n].bits, checksum(x).bits) for n, x in values.items())
    assert all(torch.equal(found[n].total, checksum(x).total) for n, x in values.items())
    for kind in Checksum._fields:
        places = {getattr(one, kind).untyped_storage().data_ptr() for one in found.values()}
        assert len(places) == 1


@pytest.mark.parametrize("tokens", [4, 4096])
def test_layers_on_several_devices(tokens):
    values = {"a": torch.randn(2, tokens, 8), "b": torch.randn(2, tokens, 8, device="meta")}
    assert {name: one.bits.device.type for name, one in see(values).items()} == {
        "a": "cpu",
        "b": "meta",
    }


# The checksum itself.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 7), (2, 1, 3, 3), (4, 1)])
def test_any_bit_of_any_item_shows(shape, dtype):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen).to(dtype)
    before = checksum(x)
    assert torch.equal(checksum(x.clone()).bits, before.bits) and len(before.bits) == shape[0]
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(checksum(strided).bits, before.bits), "the layout in memory is no matter"
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for place in np.ndindex(*shape):
        for bit in (1, torch.iinfo(integers).min):  # the last one, and the sign
            y = x.clone()
            y.view(integers)[place] ^= bit
            odd = checksum(y).bits != before.bits
            assert odd.nonzero().flatten().tolist() == [place[0]]


@pytest.mark.parametrize("shape", [(2, 4, 8), (3, 16, 6), (2, 4, 6, 6), (2, 9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_places_shows_and_is_no_rounding(shape, dtype):
    """A sum alone would be blind to shuffled tokens, a control that people do run."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(x)
    norm = x.flatten(1).float().norm(dim=1) * tolerance(torch.finfo(dtype).eps)
    for axis in range(len(shape)):
        for other in (x.flip(axis), x.roll(1, axis)):
            now = checksum(other)
            odd = now.bits != before.bits
            assert odd.any() if axis == 0 else odd.all()
            found = compare({"a": before}, {"a": (now, norm)})
            assert found is not None and not found.rounding


def test_an_edit_that_shuffles_tokens_otherwise_is_not_reproduced(model, inputs):
    x, t, y = inputs
    order = {"now": torch.tensor([1, 0, *range(2, 16)])}
    with dit_lens.trace(model) as trace:
        trace.edit("blocks.0.hook_resid_post", lambda a, hook: a[:, order["now"]])
        call(model, x, t, y)
    order["now"] = torch.tensor([0, 2, 1, *range(3, 16)])
    with pytest.raises(NotReproduced, match="layer 0"):
        trace["blocks.0.hook_resid_post"]


def test_rounding_is_told_from_another_computation():
    x = torch.randn(2, 64, 64)
    norm = x.flatten(1).norm(dim=1) * tolerance(torch.finfo(x.dtype).eps)
    assert compare({"a": checksum(x)}, {"a": (checksum(x), norm)}) is None
    near = compare({"a": checksum(x)}, {"a": (checksum(x * (1 + 1e-6)), norm)})
    assert near is not None and near.rounding
    far = compare({"a": checksum(x)}, {"a": (checksum(x + 0.01), norm)})
    assert far is not None and not far.rounding and far.name == "a"


# Inputs.


def change(x, how):
    if how == "data":
        x.data[0] += 1
    elif how == "numpy":
        x.numpy()[0] += 1
    else:
        x[0] += 1


@pytest.mark.parametrize("how", ["inference", "data", "numpy"])
def test_inputs_that_change_in_place_are_kept_as_they_were(model, inputs, how):
    x, t, y = inputs
    with torch.inference_mode(how == "inference"):
        x = x.clone()
        with dit_lens.trace(model, names="hook_embed") as eager, dit_lens.trace(model) as lazy:
            for _ in range(3):
                model.transformer(x, t, class_labels=y)
                change(x, how)
        assert torch.equal(eager["hook_embed"], lazy["hook_embed"])
        assert not torch.equal(lazy["hook_embed"][0], lazy["hook_embed"][1])


def test_a_large_condition_that_changes_unseen_is_copied_again():
    from dit_lens.model.call import Copies

    copies, x = Copies(), torch.randn(1, 300, 300)
    first = copies.of(x)
    assert copies.of(x) is first
    x.data[0, 0, 0] += 1
    assert copies.of(x) is not first and torch.equal(copies.of(x), x)


# What acts on the model besides its weights.


def test_another_tools_forward_is_refused_and_left_alone(dit, inputs):
    x, t, y = inputs
    block = dit.transformer_blocks[1]
    original = type(block).forward

    def cached(self, *args, **kwargs):
        return original(self, *args, **kwargs) * 0.5

    block.forward = types.MethodType(cached, block)
    with torch.no_grad():
        want = dit(x, t, class_labels=y)[0]
    for opening in (lambda: HookedDiT(dit), lambda: dit_lens.trace(dit)):
        with pytest.raises(RuntimeError, match="was already replaced on the instance"):
            opening()
    with torch.no_grad():
        assert torch.equal(dit(x, t, class_labels=y)[0], want)
    assert block.forward.__func__ is cached


def test_a_modules_own_bound_forward_is_given_back(dit):
    block = dit.transformer_blocks[0]
    mine = block.forward
    block.forward = mine
    HookedDiT(dit).remove()
    assert block.__dict__["forward"] is mine


def eps(dit):
    dit.transformer_blocks[1].norm3.eps = 0.5


def swap(dit):
    dit.transformer_blocks[1].ff.net[2].weight.data.mul_(2)


def module_hook(dit):
    dit.transformer_blocks[1].ff.register_forward_hook(lambda m, args, out: out * 2)


def buffer(dit):
    dit.pos_embed.pos_embed.add_(1)


@pytest.mark.parametrize(
    "act, layer, cause",
    [
        (eps, "layer 1", "the settings at 'transformer_blocks.1.norm3.eps' changed"),
        (swap, "layer 1", "usual causes are weights, adapters, module hooks or buffers"),
        (module_hook, "layer 1", "the module hooks at 'transformer_blocks.1.ff' changed"),
        (buffer, "layer 0", "the weights or buffers at 'pos_embed.pos_embed' changed"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_changes_between_steps_is_noticed_with_its_layer(model, inputs, act, layer, cause):
    eager, lazy = both(model, *inputs, act=lambda: act(model.transformer))
    with pytest.raises(
        NotReproduced, match=rf"Step 0 can't be recomputed: from {layer} on .*{cause}"
    ):
        lazy["resid_post", 2]
    assert torch.equal(
        lazy.get("resid_post", steps=1)["blocks.2.hook_resid_post"],
        eager.get("resid_post", steps=1)["blocks.2.hook_resid_post"],
    )


def test_weights_swapped_for_one_step_and_back(model, inputs):
    weight = model.transformer.transformer_blocks[1].ff.net[2].weight.data
    with dit_lens.trace(model) as t:
        call(model, *inputs)
        weight.mul_(2)
        call(model, *inputs)
        weight.div_(2)
    assert t.get(("resid_post", 2), steps=0)["blocks.2.hook_resid_post"].shape[0] == 1
    with pytest.raises(NotReproduced, match="Step 1 can't be recomputed: from layer 1 on"):
        t.get("resid_post", steps=1)


# Records.


def test_records_are_no_ones_memory(model, inputs):
    with dit_lens.trace(model, names="*") as t:
        out = call(model, *inputs)
    before = t["hook_sample"].clone()
    out.mul_(0)
    assert torch.equal(t["hook_sample"][0], before[0]) and before.abs().sum() > 0
    with dit_lens.trace(model, names="resid_post") as t, torch.no_grad():
        stream = model(*inputs, stop_at_layer=1)
    before = t.get(("resid_post", 0))["blocks.0.hook_resid_post"].clone()
    stream.mul_(0)
    assert torch.equal(t.get(("resid_post", 0))["blocks.0.hook_resid_post"], before)


def test_a_closed_trace_keeps_no_graph_and_no_live_input(model, inputs):
    x, t, y = inputs
    x = x.clone().requires_grad_()
    with dit_lens.trace(model, names="resid_post") as trace:
        out = model.transformer(x, t, class_labels=y, return_dict=False)[0]
    gone = weakref.ref(x), weakref.ref(out)
    del x, out
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
    assert not trace["resid_post", 0].requires_grad


# Kernels.


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch 2.9 has them first")
def test_precision_by_pytorchs_newer_names(dit, inputs, tmp_path):
    """After them the older ones raise when they are asked; each is given back by its own name."""
    before = torch.backends.cuda.matmul.fp32_precision
    model, (x, t, y) = HookedDiT(dit), inputs
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.no_grad(), dit_lens.trace(model) as lazy:
            model(x, t, y)
        assert lazy.record.calls[0].kernels.matmul == "tf32"
        assert lazy["resid_post", 1].isfinite().all()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        path = lazy.save(tmp_path / "trace.safetensors")
        torch.backends.cuda.matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
        again = dit_lens.load_trace(path, model)
        assert torch.equal(again["resid_post", 1], lazy["resid_post", 1])
        assert torch.get_float32_matmul_precision() == "highest"
        torch.backends.fp32_precision = "ieee"
        assert not may_use_tf32() and lazy["resid_post", 0].isfinite().all()
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_kernels_are_put_back_for_a_read(model, inputs):
    with sdpa_kernel(SDPBackend.MATH):
        eager, lazy = both(model, *inputs)
    assert torch.equal(lazy["resid_post", 2], eager["resid_post", 2]) and lazy.exact
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert not lazy.record.calls[0].kernels.sdpa[0]
    torch.set_float32_matmul_precision("high")
    try:
        _, lazy = both(model, *inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    lazy["resid_post", 2]
    assert lazy.record.calls[0].kernels.matmul == "high"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_change_of_weights_is_not_taken_for_rounding(dit, inputs, dtype):
    """At few bits a weight that changed by some percent moves the stream no more than another
    kernel does.
    """
    x, t, y = inputs
    model = HookedDiT(dit.to(dtype), scheduler=DDIMScheduler(1000))
    with dit_lens.trace(model) as trace:
        call(model, x.to(dtype), t, y)
    run = dit_lens.sample(model, [1, 2, 3], steps=2)
    one = run.select([0, 2])
    assert one.activations("resid_post", 1, step=0).shape[0] == 2
    with torch.no_grad():
        dit.transformer_blocks[1].attn1.to_out[0].weight.mul_(1.02)
    said = "weights or buffers at 'transformer_blocks.1.attn1.to_out.0.weight' changed"
    for read in (
        lambda: trace["blocks.1.hook_attn_out"],
        lambda: run.activations("resid_post", 1, step=0),
        lambda: one.activations("resid_post", 1, step=0),
    ):
        with pytest.raises(NotReproduced, match=said):
            read()


def test_a_hook_that_only_looks_is_no_other_computation(model, monkeypatch):
    """Set after the run; it is recomputed to within rounding, as of another batch size."""
    run = dit_lens.sample(model, [1, 2, 3], steps=2)
    gelu = torch.nn.functional.gelu  # of another kernel, as it were
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda *a, **k: gelu(*a, **k) * (1 + 1e-6))
    handle = model.transformer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="rounding, .*, or a small effect: the module hooks a"):
        run.activations("resid_post", 1, step=0)
    run.select([0, 2]).activations("resid_post", 1, step=0)  # of which rounding is expected
    handle.remove()


def test_rounding_warns_once(model, inputs, monkeypatch):
    _, lazy = both(model, *inputs)
    gelu = torch.nn.functional.gelu  # of another kernel, as it were
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda *a, **k: gelu(*a, **k) * (1 + 1e-6))
    with pytest.warns(UserWarning, match="Step 0 was recomputed to within rounding"):
        lazy["resid_post", 2]
    assert not lazy.exact
    lazy["resid_post", 2]  # and does not warn again (a warning is an error in the tests)


# Edits.


def test_edits_that_are_no_function_of_their_activation_are_noticed(model, inputs):
    count = []

    def counter(a, hook):
        count.append(1)
        return a * len(count)

    for fn in (lambda a, hook: a + torch.randn_like(a), counter):
        with dit_lens.trace(model) as t:
            t.edit("blocks.1.hook_attn_out", fn)
            call(model, *inputs)
        assert t["resid_post", 0].shape[0] == 1
        with pytest.raises(NotReproduced, match="from layer 1 on .*not a pure function"):
            t["resid_post", 2]


def test_tensors_given_to_patch_are_copied(model, inputs):
    put = torch.ones(2, 16, 16)
    with dit_lens.trace(model) as t:
        t.patch("blocks.1.hook_resid_post", put)
        call(model, *inputs)
    put.mul_(0)
    assert (t["resid_post", 1] == 1).all()


# Runs.


def zero(a, hook):
    return 0 * a


def test_a_run_made_under_edits_says_that_it_cant_be_read(model):
    with dit_lens.trace(model) as t:
        t.edit("blocks.1.hook_attn_out", zero)
        traced = dit_lens.sample(model, [3], steps=3)
    with model.hooks([("blocks.1.hook_attn_out", zero)]):
        hooked = dit_lens.sample(model, [3], steps=3)
    plain = dit_lens.sample(model, [3], steps=3)
    for run in (traced, hooked):
        assert not torch.equal(run.latents, plain.latents)
        assert run.activations("resid_post", 0, step=1).shape == (1, 16, 16)  # before the edit
        for act in (run.replay, run.forward, partial(read, run=run)):
            with pytest.raises(NotReproduced, match="edits or hooks, which are not in its history"):
                act(1)


def at_the_third_pass(model):
    """A module hook that acts in the third pass after it was put there."""
    block, passes = model.transformer.transformer_blocks[1], []
    return block.register_forward_hook(
        lambda _, args, out: out + 1 if passes.append(1) or len(passes) == 3 else out
    )


@pytest.mark.parametrize("kind", ["edit", "hold", "hooks", "module", "select"])
def test_a_later_step_made_under_edits_is_noticed(model, kind):
    """By whoever begins before it, whatever else is asked of the replay."""
    with contextlib.ExitStack() as stack:
        if kind == "module":
            stack.callback(at_the_third_pass(model).remove)
        elif kind == "hooks":
            calls = []

            def third(activation, hook):
                calls.append(hook.name)
                return 0 * activation if len(calls) == 3 else None

            stack.enter_context(model.hooks([("blocks.1.hook_attn_out", third)]))
        else:
            t = stack.enter_context(dit_lens.trace(model))
            act = t.hold if kind == "hold" else t.ablate
            act("blocks.1.hook_attn_out", steps=[2])
        run = dit_lens.sample(model, [3, 1], steps=4)
    if kind == "select":
        run = run.select([1])
    assert torch.allclose(run.replay(3).latents, run.latents, atol=1e-5)
    other = {"edits": [("blocks.0.hook_mlp_out", zero)]}
    for options in ({},) if kind == "module" else ({}, other, {"seeds": 9}, {"batch": 1}):
        for step in (0, 1, 2):
            with pytest.raises(NotReproduced, match="Step 2 can't be recomputed: from layer"):
                run.replay(step, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast_since_is_named(model, inputs, dtype):
    with dit_lens.trace(model) as t:
        model(*inputs)
    model.transformer.to(dtype)
    with pytest.raises(NotReproduced, match=r"Step 0 can't be recomputed.* changed\. Run it again"):
        t["resid_post", 1]
    assert model.instrumentation.listening == 0


def test_a_hook_that_changes_nothing_is_no_edit(model):
    with model.hooks([("blocks.1.hook_attn_out", lambda a, hook: a)]):
        run = dit_lens.sample(model, [3], steps=3)
    assert torch.equal(run.replay(0).latents, run.latents)


def read(step, run):
    return run.activations("resid_post", 2, step=step)


def test_a_plain_run_is_read_and_replayed_whatever_hooks_are_on(model):
    run = dit_lens.sample(model, [3], steps=3)
    want = read(1, run)
    with dit_lens.trace(model) as t, model.hooks([("blocks.1.hook_attn_out", zero)]):
        assert torch.equal(read(1, run), want)
        edited = run.replay(1)
    assert t.steps == [1, 2] and not torch.equal(edited.latents, run.latents)
    with pytest.raises(NotReproduced):
        read(1, edited)


def test_the_lens_reads_a_run_with_its_own_edits(model):
    from dit_lens.probes import LayerLens

    model.scheduler = DDIMScheduler(1000, clip_sample=False)
    run = dit_lens.sample(model, [3, 3], steps=3).replay(1, [("blocks.1.hook_attn_out", zero)])
    lens = LayerLens()
    lens.of_run(run)
    for step in range(3):
        assert torch.allclose(lens.x0(2, step), run.x0[step], atol=1e-5)


def test_steps_are_the_runs_steps(model):
    run = dit_lens.sample(model, [3], steps=5)
    seen = []
    with dit_lens.trace(model, names="resid_post", steps=range(2, 4)) as t:
        t.edit("blocks.0.hook_resid_post", lambda a, hook: seen.append(hook.step), steps=[2, 3])
        again = run.replay(from_step=2)
    assert seen == [2, 3] and t.steps == [2, 3, 4] and torch.equal(again.latents, run.latents)
    assert torch.equal(t["resid_post", 1][0], run.activations("resid_post", 1, step=2))
    assert torch.equal(
        t.get(("q", 1), steps=4)["blocks.1.attn.hook_q"][0], run.activations("q", 1, step=4)
    )
    assert model.hook_dict["blocks.0.hook_resid_post"].step is None


def test_steps_of_a_pipeline_called_twice(pipe):
    seen = []
    with dit_lens.trace(pipe) as t:
        t.edit("blocks.0.hook_resid_post", lambda a, hook: seen.append(hook.step), steps=1)
        for _ in range(2):
            pipe(class_labels=[3], num_inference_steps=3, generator=torch.manual_seed(0))
    assert seen == [1, 1] and t.steps == list(range(6))
    assert torch.equal(t["resid_post", 1][:3], t["resid_post", 1][3:])


# Files and copies.


def test_the_witness_travels_in_the_file(pipe, tmp_path):
    with dit_lens.trace(pipe) as t:
        pipe(class_labels=[3], num_inference_steps=2, generator=torch.manual_seed(0))
    path = t.save(tmp_path / "t.safetensors")
    again = dit_lens.load_trace(path, pipe)
    assert torch.equal(again["resid_post", 2], t["resid_post", 2])
    for mine, theirs in zip(t.record.calls, again.record.calls, strict=True):
        assert mine.witness.keys() == theirs.witness.keys() and mine.kernels == theirs.kernels
        for name, sums in mine.witness.items():
            assert torch.equal(sums.bits, theirs.witness[name].bits)
    other = make_pipe(seed=9)
    with pytest.raises(NotReproduced, match="Step 0 can't be recomputed: from layer 0 on"):
        dit_lens.load_trace(path, other)["resid_post", 2]


def test_a_saved_trace_of_coupled_twins_is_not_read_uncoupled(model, tmp_path):
    from dit_lens.twinning.coupling import coupled

    gen = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([9, 9]), torch.tensor([3, 3])
    with dit_lens.trace(model, names="resid_post") as trace, coupled(model, g=0.5):
        call(model, x, t, y)
    assert torch.equal(trace["attn_out", 1][0] + 0, trace["attn_out", 1][0])
    path = trace.save(tmp_path / "t.safetensors")
    again = dit_lens.load_trace(path, model)
    assert torch.equal(again["resid_post", 2], trace["resid_post", 2])
    with pytest.raises(
        RuntimeError, match="twins coupled inside the attention of layers 0 to 2 by a"
    ):
        again["attn_out", 1]


def test_a_trace_is_not_pickled(model, inputs):
    with dit_lens.trace(model) as t:
        call(model, *inputs)
    with pytest.raises(RuntimeError, match=r"use trace.save\(path\) and dit_lens.load_trace"):
        pickle.dumps(t)


def test_weights_that_are_loaded_for_a_forward_are_put_away_again(dit, inputs):
    accelerate = pytest.importorskip("accelerate")
    x, t, y = inputs
    accelerate.cpu_offload(dit, execution_device=torch.device("cpu"))
    meta = {n for n, p in dit.named_parameters() if p.device.type == "meta"}
    with dit_lens.trace(dit) as trace, torch.no_grad():
        dit(x, t, class_labels=y)
    for name in ("final.hook_shift", "hook_embed", "blocks.1.attn.hook_q"):
        assert trace[name].shape[0] == 1
        assert {n for n, p in dit.named_parameters() if p.device.type == "meta"} == meta
    with dit_lens.trace(dit) as again, torch.no_grad():
        dit(x, t, class_labels=y)
    assert torch.equal(again["final.hook_shift"], trace["final.hook_shift"])


def test_a_model_whose_weights_are_loaded_for_a_forward_is_sampled():
    from accelerate import cpu_offload

    def run_of(dit):
        return dit_lens.sample(HookedDiT(dit, scheduler=DDIMScheduler(1000)), [3], steps=3)

    want, dit = run_of(make_dit()), make_dit()
    cpu_offload(dit, execution_device=torch.device("cpu"))
    run = run_of(dit)
    assert run.model.device.type == "cpu" and torch.equal(run.latents, want.latents)
    assert torch.equal(run.replay(1).latents, want.latents)
    assert torch.equal(read(1, run), read(1, want))
    with pytest.raises(RuntimeError, match="The weights are offloaded"):
        dit_lens.experiments.Plan.of(run.model, run.timesteps, [])
    assert {p.device.type for p in dit.parameters()} == {"meta"}


def test_a_pass_is_not_ended_early_under_who_looks_after_its_modules(model):
    """Whatever is on the way out of the layer counts; what lies deeper in others does not."""
    blocks, ends = model.transformer.transformer_blocks, model.instrumentation.stopping
    name = "blocks.1.hook_resid_post"
    for module, passed_over in [
        (model.transformer, True),
        (model.transformer.pos_embed, True),
        (blocks[0], True),
        (blocks[1].ff.net[0], True),
        (blocks[2].ff.net[0], False),
    ]:
        module._hf_hook = object()
        assert (ends(name) == []) == passed_over and ends("final.hook_in") == []
        del module._hf_hook
    assert len(ends(name)) == len(ends("final.hook_in")) == 1


def test_select_reads_some_items_of_a_run():
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    run = dit_lens.sample(model, [3, 4, 5], steps=2, guidance=2.0)
    one = run.select([1])
    whole = run.activations("resid_post", 2, step=1)
    assert torch.allclose(one.activations("resid_post", 2, step=1), whole[[1, 4]], atol=1e-5)


def test_a_run_keeps_its_own_scheduler(model):
    run = dit_lens.sample(model, [3], steps=4, eta=1.0)
    snr = run.log_snr
    model.scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    assert torch.equal(run.replay(1).latents, run.latents)
    assert torch.equal(run.log_snr, snr)
    assert not torch.equal(dit_lens.sample(model, [3], steps=4, eta=1.0).log_snr, snr)


def test_masks_and_arrays_that_change_later_are_not_meant(model, inputs):
    mask = torch.tensor([True] + [False] * 15)
    with dit_lens.trace(model) as t:
        t.edit("blocks.1.hook_resid_post", zero, tokens=mask)
        call(model, *inputs)
    mask.logical_not_()
    assert (t["resid_post", 1][0, :, 0] == 0).all() and (t["resid_post", 1][0, :, 1:] != 0).all()


def test_data_parallel_is_refused_with_the_way_out(dit):
    with pytest.raises(TypeError, match=r"DataParallel runs copies .* HookedDiT\(model.module\)"):
        HookedDiT(torch.nn.DataParallel(dit))
    pipe = types.SimpleNamespace(transformer=torch.nn.DataParallel(dit), components={})
    with pytest.raises(TypeError, match=r"DataParallel runs copies .* HookedDiT\(model.module\)"):
        dit_lens.trace(pipe)


def test_steps_are_right_or_absent_for_whoever_asks(model, inputs):
    """Hooks older than a trace's edit come before it, and its step is not known to them yet."""
    older, younger, own, name = [], [], [], "blocks.1.hook_attn_out"
    model.add_hook(name, lambda a, hook: older.append(hook.step))
    with dit_lens.trace(model) as t:
        t.edit(name, lambda a, hook: own.append(hook.step), steps=[0, 2])
        model.add_hook(name, lambda a, hook: younger.append(hook.step))
        dit_lens.sample(model, [3], steps=4)
    assert older == [None] * 4 and own == [0, 2] and younger == [0, None, 2, None]
    model.reset_hooks()


def test_a_gradients_step_is_that_of_its_forward(model, inputs):
    x, t, y = inputs
    seen, name = [], "blocks.1.hook_attn_out"
    outs, x = [], x.clone().requires_grad_()
    with dit_lens.trace(model) as trace:
        trace.edit(name, lambda a, hook: None)
        with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(hook.step))]):
            for _ in range(3):
                outs.append(model.transformer(x, t, class_labels=y, return_dict=False)[0])
            for out in outs:
                out.sum().backward()
    assert seen == [0, 1, 2]


def test_weights_on_another_device_are_the_same_weights(dit):
    """Its kernels round otherwise, which is a warning; a model that moved has not changed."""
    before = State.of(dit)
    moved = {
        k: v._replace(device=torch.device("cuda:0"), place=7) for k, v in before.tensors.items()
    }
    assert not before.changes(replace(before, tensors=moved))
    name = next(iter(moved))
    moved[name] = moved[name]._replace(version=moved[name].version + 1)
    (said,) = before.changes(replace(before, tensors=moved))
    assert said == f"the weights or buffers at {name!r} changed"
