"""The contract of the hooked DiT: every name, bit for bit, and nothing left behind."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import make_dit, raw
from diffusers.models.attention_processor import AttnProcessor

import dit_lens
from dit_lens import HookedDiT
from dit_lens.families import register
from dit_lens.hooks.names import resolve
from dit_lens.model.instrumentation import Instrumentation

BLOCK = 27


@pytest.mark.parametrize("layers", [1, 3, 28])
def test_names_are_complete_and_in_forward_order(layers):
    model = HookedDiT(make_dit(layers=layers, channels=1))
    x, t, y = torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1])
    seen = []
    for name in model.names:
        model.add_hook(name, lambda a, hook: seen.append(hook.name))
    model(x, t, y)
    assert len(model.names) == 7 + BLOCK * layers and sorted(seen) == sorted(model.names)
    by_hand = [n for n in seen if not n.startswith("blocks")]
    assert by_hand == [n for n in model.names if not n.startswith("blocks")]
    assert [n for n in model.names if n.endswith("resid_mid")] == [
        n for n in seen if n.endswith("resid_mid")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("grad", [False, True])
def test_bit_for_bit(dtype, batch, grad):
    dit = make_dit(layers=28, channels=4, out_channels=8).to(dtype)
    gen = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, 8, 8, generator=gen).to(dtype)
    t, y = (
        torch.randint(1000, (batch,), generator=gen),
        torch.randint(1001, (batch,), generator=gen),
    )
    state = {k: v.clone() for k, v in dit.state_dict().items()}

    def gradients():
        return [p.grad.clone() for p in dit.parameters() if p.grad is not None]

    def run(f):
        dit.zero_grad()
        with torch.set_grad_enabled(grad):
            out = f()
            if grad:
                out.float().square().sum().backward()
        return out.detach(), gradients()

    want, want_grads = run(lambda: raw(dit, x, t, y))
    model = HookedDiT(dit)
    cases = {
        "idle": lambda: model(x, t, y),
        "all recorded": lambda: model.run_with_cache(x, t, y)[0],
        "all hooked": lambda: model.run_with_hooks(
            x, t, y, fwd_hooks=[(None, lambda a, hook: None)]
        ),
        "through diffusers": lambda: raw(dit, x, t, y),
    }
    for case, f in cases.items():
        got, grads = run(f)
        assert torch.equal(got, want), case
        assert len(grads) == len(want_grads) and all(map(torch.equal, grads, want_grads)), case
    with torch.no_grad():
        _, cache = model.run_with_cache(x, t, y)
        for i in range(28):
            assert torch.equal(cache["resid_pre", i] + cache["attn_out", i], cache["resid_mid", i])
            assert torch.equal(cache["resid_mid", i] + cache["mlp_out", i], cache["resid_post", i])
            gate = cache["adaln.hook_gate_attn", i][:, None]
            assert torch.equal(gate * cache["attn.hook_out", i], cache["attn_out", i])
    model.remove()
    got, grads = run(lambda: raw(dit, x, t, y))
    assert torch.equal(got, want) and all(map(torch.equal, grads, want_grads))
    assert not any("forward" in m.__dict__ for m in dit.modules())
    assert list(dit.state_dict()) == list(state) and all(
        torch.equal(v, state[k]) for k, v in dit.state_dict().items()
    )


def test_every_shape_is_that_of_the_table(dit, inputs):
    model = HookedDiT(dit)
    sizes = dict(
        batch=2,
        token=16,
        d_model=16,
        head=2,
        d_head=8,
        query=16,
        key=16,
        d_mlp=64,
        patch=16,
        channel=4,
        height=8,
        width=8,
    )
    _, cache = model.run_with_cache(*inputs)
    for name, axes in model.sites.items():
        assert cache[name].shape == tuple(sizes[a] for a in axes), name


def test_derived_activations_agree(dit, inputs):
    model = HookedDiT(dit)
    _, c = model.run_with_cache(*inputs)
    attn = dit.transformer_blocks[1].attn1
    scores = torch.einsum("bqhd,bkhd->bhqk", c["q", 1], c["k", 1]) / 8**0.5
    assert torch.allclose(c["attn_scores", 1], scores, atol=1e-6)
    assert torch.allclose(c["pattern", 1].sum(-1), torch.ones(2, 2, 16))
    assert torch.allclose(
        torch.einsum("bhqk,bkhd->bqhd", c["pattern", 1], c["v", 1]), c["z", 1], atol=1e-6
    )
    assert torch.allclose(
        c["result", 1].sum(2) + attn.to_out[0].bias, c["attn.hook_out", 1], atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_attn_scores",
        "blocks.1.attn.hook_result",
        "blocks.1.hook_cond",
        "blocks.1.adaln.hook_gate_mlp",
        "final.hook_scale",
        "blocks.1.mlp.hook_pre",
        "blocks.1.attn.hook_k",
        "hook_sample",
    ],
)
def test_an_edit_reaches_the_output_and_only_what_follows(dit, inputs, name):
    model = HookedDiT(dit)
    out, cache = model.run_with_cache(*inputs)
    with model.hooks([(name, lambda a, hook: a + 0.5 * a.roll(1, -1) + 0.1)]):
        edited, after = model.run_with_cache(*inputs)
    assert not torch.equal(edited, out)
    seen = model.names.index(name)
    same = [n for n in model.names[:seen] if not torch.equal(cache[n], after[n])]
    assert same == []


def test_editing_resid_mid_changes_the_stream_itself(dit, inputs):
    model = HookedDiT(dit)
    with model.hooks([("blocks.1.hook_resid_mid", lambda a, hook: a + 1)]):
        _, c = model.run_with_cache(*inputs)
    assert torch.equal(c["resid_mid", 1] + c["mlp_out", 1], c["resid_post", 1])
    assert torch.equal(c["resid_mid", 1], c["resid_pre", 1] + c["attn_out", 1] + 1)


def test_in_place_edits_and_their_order(dit, inputs):
    model, seen = HookedDiT(dit), []

    def zero_first_token(a, hook):
        a[:, 0] = 0
        return a

    hooks = [
        ("blocks.1.hook_resid_pre", zero_first_token),
        ("blocks.1.hook_resid_pre", lambda a, hook: seen.append(a[:, 0].clone())),
    ]
    with model.hooks(hooks):
        _, c = model.run_with_cache(*inputs)
    assert (seen[0] == 0).all() and (c["resid_pre", 1][:, 0] == 0).all()
    # one tensor under two names; the earlier record is not overwritten
    assert (c["resid_post", 0][:, 0] != 0).any()
    with pytest.raises(
        RuntimeError,
        match="at 'hook_embed' changed its activation in place and returned None; return it",
    ):
        model.run_with_hooks(
            *inputs, fwd_hooks=[("hook_embed", lambda a, hook: a.zero_().data is None or None)]
        )


def through_data(a, hook):
    a.data.mul_(0)


def through_numpy(a, hook):
    a.detach().numpy()[:] = 0


def through_itself(a, hook):
    a.mul_(0)


@pytest.mark.parametrize("change", [through_data, through_numpy, through_itself])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_changes_in_place_unseen_by_version_counters_is_refused(dit, inputs, change, mode):
    model = HookedDiT(dit)
    with mode(), pytest.raises(RuntimeError, match="'hook_embed' changed its activation in place"):
        model.run_with_hooks(*inputs, fwd_hooks=[("hook_embed", change)])
    with dit_lens.trace(model) as t, mode():
        t.edit("hook_embed", change, tokens=[0])
        with pytest.raises(RuntimeError, match="changed its activation in place"):
            model(*inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over CPU attention
def test_hooks_that_return_none_may_look_at_values_that_are_no_numbers(dit, inputs):
    model = HookedDiT(dit)
    x, t, y = inputs
    broken = [("hook_embed", lambda a, hook: a / 0 * 0), ("hook_embed", lambda a, hook: None)]
    with torch.inference_mode():
        assert model.run_with_hooks(*inputs, fwd_hooks=broken).isnan().all()
        twice = torch.func.vmap(
            lambda x: model.run_with_hooks(x[None], t[:1], y[:1], fwd_hooks=broken[1:])
        )
        assert twice(x).shape[:2] == (2, 1)


def test_gradients_changed_in_place_are_refused(dit, inputs):
    model = HookedDiT(dit)
    x, t, y = inputs
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_post", through_data)]):
        out = model(x.requires_grad_(), t, y).sum()
        with pytest.raises(RuntimeError, match="changed its gradient in place and returned None"):
            out.backward()


def test_hook_functions_are_called_as_transformer_lens_does(dit, inputs):
    from functools import partial

    model, seen = HookedDiT(dit), []

    def with_keyword(a, *, hook, store):
        store.append((hook.name, hook.layer()))

    model.run_with_hooks(
        *inputs, fwd_hooks=[("blocks.2.attn.hook_q", partial(with_keyword, store=seen))]
    )
    model.run_with_hooks(
        *inputs, fwd_hooks=[("hook_embed", lambda a, h: seen.append((h.name, h.layer())))]
    )
    assert seen == [("blocks.2.attn.hook_q", 2), ("hook_embed", None)]
    with model.observing("hook_embed", lambda a, *, hook: seen.append(hook.name)):
        model(*inputs)
    assert seen[2:] == ["hook_embed"]


@pytest.mark.parametrize(
    "fn", [lambda a: a, lambda: None, lambda a, hook, more: a, lambda hook, a: a, lambda a, **_: a]
)
def test_hooks_of_another_signature_are_refused_before_anything_runs(dit, fn):
    model = HookedDiT(dit)
    said = r"The hook <lambda>\(.*\) can't be called with an activation and a hook"
    attempts = [
        lambda: model.add_hook("hook_embed", fn),
        lambda: model.add_hook("hook_embed", fn, dir="bwd"),
        lambda: model.hooks([("hook_embed", fn)]).__enter__(),
        lambda: model.observing("hook_embed", fn).__enter__(),
        lambda: dit_lens.trace(model).edit("hook_embed", fn),
        lambda: dit_lens.trace(model).patch("hook_embed", fn, tokens=[0]),
    ]
    for attempt in attempts:
        with pytest.raises(TypeError, match=said):
            attempt()
    assert not model.instrumentation.busy


def test_hooks_of_any_signature_that_can_be_called_are_taken(dit, inputs):
    model = HookedDiT(dit)
    by_position = [lambda a, h, more=1: None, lambda a, hook, /: None, lambda *a: None]
    for fn in [*by_position, lambda a, *rest, hook: None]:
        model.run_with_hooks(*inputs, fwd_hooks=[("hook_embed", fn)])


def test_names_filters_and_shorthand(dit, inputs):
    model = HookedDiT(dit)

    def got(f):
        return list(model.run_with_cache(*inputs, names_filter=f)[1])

    posts = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert got(None) == model.names
    for f in (
        "blocks.*.hook_resid_post",
        "resid_post",
        posts,
        tuple(posts),
        lambda n: n.endswith("resid_post"),
    ):
        assert got(f) == posts
    assert got(("q", -1)) == ["blocks.2.attn.hook_q"]
    assert got(["hook_embed", ("pattern", 0)]) == ["hook_embed", "blocks.0.attn.hook_pattern"]
    assert model.resolve("normalized", 1, "ln2") == "blocks.1.ln2.hook_normalized"
    for f, text in {
        "blocks.*.hook_resid_psot": "nearest: .*resid_post",
        ("q", 3): "There is no layer 3 for 'q': layers are 0 to 2",
        "normalized": "could be any of 'ln1.hook_normalized', "
        "'ln2.hook_normalized', 'ln_final.hook_normalized'; write it out",
        "nonsense": "No hook point matches 'nonsense'; model.names lists them all",
        ("blocks.1.hook_resid_post", 1): "says its layer itself; .*: \\('resid_post', 1\\)",
    }.items():
        with pytest.raises(dit_lens.UnknownName, match=text):
            got(f)
    with pytest.raises(dit_lens.UnknownName, match="accepts none of the model's 88 hook names"):
        got(lambda n: False)
    with pytest.raises(dit_lens.UnknownName, match="is at 3 hook points"):
        model.resolve("resid_post")


def test_negative_layers_count_from_the_end_of_the_model(dit, inputs):
    """Also where the first blocks have no such site, and in a cache of some layers."""
    names = ["blocks.0.hook_a", "blocks.1.hook_a", "blocks.1.hook_b", "blocks.2.hook_b"]
    assert resolve(("b", -1), names) == "blocks.2.hook_b"
    assert resolve(("b", -2), names) == "blocks.1.hook_b"
    with pytest.raises(dit_lens.UnknownName, match="There is no layer -1 for 'a': layers are 0 t"):
        resolve(("a", -1), names)
    _, cache = HookedDiT(dit).run_with_cache(*inputs, names_filter=["hook_embed", ("q", 0)])
    with pytest.raises(dit_lens.UnknownName, match="There is no layer -1"):
        cache["q", -1]
    assert cache.to("cpu")["q", 0] is not None and ("q", -1) not in cache.to("cpu")


def test_backward_hooks(dit, inputs):
    model = HookedDiT(dit)
    grads = {}
    with model.hooks(bwd_hooks=[("resid_post", lambda g, hook: grads.__setitem__(hook.name, g))]):
        out, cache = model.run_with_cache(*inputs, names_filter="resid_post")
        out.sum().backward()
    want = torch.autograd.grad(raw(dit, *inputs).sum(), dit.transformer_blocks[2].ff.net[2].bias)[0]
    gate = model.run_with_cache(*inputs, names_filter="blocks.2.adaln.hook_gate_mlp")[1][
        "blocks.2.adaln.hook_gate_mlp"
    ]
    assert torch.allclose(
        (grads["blocks.2.hook_resid_post"].sum(1) * gate).sum(0), want, rtol=1e-4, atol=1e-5
    )
    dit.zero_grad()
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_post", lambda g, hook: torch.zeros_like(g))]):
        model(*inputs).sum().backward()
    assert dit.transformer_blocks[1].ff.net[2].bias.grad.abs().sum() == 0
    assert dit.transformer_blocks[2].ff.net[2].bias.grad.abs().sum() > 0
    with (
        pytest.raises(
            RuntimeError, match="backward hook waits at 'hook_embed', but no gradient flows there"
        ),
        torch.no_grad(),
    ):
        model.run_with_hooks(*inputs, bwd_hooks=[("hook_embed", lambda g, hook: None)])


def test_start_and_stop(dit, inputs):
    model = HookedDiT(dit)
    x, t, y = inputs
    out, cache = model.run_with_cache(*inputs)
    for i in (0, 1, 2, -1):
        stream = model(*inputs, stop_at_layer=i)
        assert torch.equal(stream, cache["resid_pre", i])
        assert torch.equal(model(stream, t, y, start_at_layer=i), out)
    assert torch.equal(model(*inputs, stop_at_layer=3), cache["resid_post", 2])
    _, partial = model.run_with_cache(
        cache["resid_pre", 1], t, y, start_at_layer=1, stop_at_layer=2
    )
    assert {n.split(".")[1] for n in partial} == {"1"}
    stream = cache["resid_pre", 2]
    for i in (0, 1, 2, 3):  # no block at all
        assert torch.equal(model(stream, t, y, start_at_layer=i, stop_at_layer=i), stream)
    for stop in (1, -2):
        with pytest.raises(
            ValueError, match=f"stop_at_layer={stop} can't be used; expected one of 2 to 3"
        ):
            model(stream, t, y, start_at_layer=2, stop_at_layer=stop)
    with pytest.raises(
        ValueError, match="stop_at_layer=9 can't be used; expected a whole number from -3 to 3"
    ):
        model(*inputs, stop_at_layer=9)
    with pytest.raises(
        ValueError, match=r"takes the residual stream \[batch, token, 16\] in place of latents"
    ):
        model(x, t, y, start_at_layer=1)


def test_add_and_reset_hooks_are_ones_own(dit, inputs):
    one, two, seen = HookedDiT(dit), HookedDiT(dit), []
    one.add_hook("hook_embed", lambda a, hook: seen.append(1))
    two.add_hook("hook_embed", lambda a, hook: seen.append(2))
    one(*inputs)
    one.reset_hooks()
    one(*inputs)
    assert seen == [1, 2, 2]
    two.remove()
    with pytest.raises(RuntimeError, match="hook points were removed; wrap it again"):
        one(*inputs)
    with pytest.raises(
        ValueError, match="dir='forward' can't be used; expected one of 'fwd', 'bwd'"
    ):
        HookedDiT(dit).add_hook("hook_embed", print, dir="forward")


def test_copies_and_pickles_compute_with_their_own_weights(dit, inputs):
    model = HookedDiT(dit)
    seen = []
    model.add_hook("hook_embed", lambda a, hook: seen.append(1))
    want = model(*inputs)
    for twin in (copy.deepcopy(dit), pickle.loads(pickle.dumps(dit))):
        assert torch.equal(raw(twin, *inputs), want) and len(seen) == 1
        twin.proj_out_2.bias.data += 1
        assert torch.allclose(raw(twin, *inputs), want + 1, atol=1e-5)
        HookedDiT(twin).remove()
        assert not any("forward" in m.__dict__ for m in twin.modules())
        assert torch.equal(raw(dit, *inputs), want)
        seen.pop()


def test_saving_is_unchanged(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    HookedDiT(pipe)
    pipe.save_pretrained(tmp_path / "hooked")
    for file in (tmp_path / "plain").rglob("*"):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "hooked" / file.relative_to(tmp_path / "plain")).read_bytes()
            ), file
    buffer = io.BytesIO()
    torch.save(pipe.transformer.state_dict(), buffer)
    again = dit_lens.load(tmp_path / "hooked")
    x, t, y = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1])
    assert torch.equal(again(x, t, y), raw(pipe.transformer, x, t, y)) and again.vae is not None


@pytest.mark.slow
def test_honoured_or_refused(inputs):
    def fresh():
        return make_dit()

    want = raw(fresh(), *inputs)
    dit = fresh()
    dit.transformer_blocks[1].set_chunk_feed_forward(4, dim=1)
    with pytest.raises(ValueError, match="Block 1 has chunked feed-forward switched on"):
        HookedDiT(dit)
    dit = fresh()
    dit.transformer_blocks[2].attn1.set_processor(AttnProcessor())
    with pytest.raises(ValueError, match="Block 2 has the attention processor AttnProcessor"):
        HookedDiT(dit)
    model = HookedDiT(dit := fresh())
    dit.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match="attention processor was changed to AttnProcessor"):
        model(*inputs)
    model.remove()
    assert torch.allclose(raw(dit, *inputs), want, atol=1e-5)
    with pytest.raises(ValueError, match="cross_attention_kwargs={'scale': 1.0} is not honoured"):
        (opened := HookedDiT(d := fresh())) and d(
            inputs[0],
            timestep=inputs[1],
            class_labels=inputs[2],
            cross_attention_kwargs={"scale": 1.0},
        )
    opened.remove()
    with pytest.raises(RuntimeError, match="The model is compiled"):
        HookedDiT(torch.compile(fresh()))
    dit = fresh()
    dit.compile()
    with pytest.raises(RuntimeError, match="The model is compiled"):
        HookedDiT(dit)
    with pytest.raises(ValueError, match="activation_fn='geglu'"):
        HookedDiT(make_dit(activation_fn="geglu"))


@pytest.mark.parametrize("path", ["", ".attn1", ".ff"])
def test_a_module_in_two_places_is_refused(inputs, path):
    """As where a layer is repeated: a hook at the first place would act at the second one."""
    dit = make_dit()
    first, last = (f"transformer_blocks.{i}{path}" for i in (0, 2))
    holder, _, name = last.rpartition(".")
    setattr(dit.get_submodule(holder), name, dit.get_submodule(first))
    want = raw(dit, *inputs)
    with pytest.raises(ValueError, match=f"'{first}.*' and '{last}.*' are one module"):
        HookedDiT(dit)
    assert not [n for n, m in dit.named_modules() if "forward" in vars(m)]
    assert torch.equal(raw(dit, *inputs), want)


def test_gradient_checkpointing(dit, inputs):
    dit.enable_gradient_checkpointing()
    model = HookedDiT(dit)
    x = inputs[0].clone().requires_grad_()
    model(x, *inputs[1:]).sum().backward()  # idle: as without dit_lens
    with pytest.raises(
        RuntimeError,
        match="would run each hook twice; call transformer.disable_gradient_checkpointing",
    ):
        model.run_with_cache(*inputs)
    with torch.no_grad():
        assert len(model.run_with_cache(*inputs)[1]) == len(model.names)


@pytest.mark.slow
def test_hooks_added_after_compiling_a_hooked_model_are_seen(dit, inputs):
    model = HookedDiT(dit)
    want = model(*inputs)
    compiled = torch.compile(dit, backend="eager")
    assert torch.equal(raw(compiled, *inputs), want)
    with model.hooks([("blocks.1.hook_resid_pre", lambda a, hook: a * 0)]):
        edited = raw(compiled, *inputs)
        assert torch.equal(edited, model(*inputs)) and not torch.equal(edited, want)
    assert torch.equal(raw(compiled, *inputs), want)


@pytest.mark.parametrize("before", [True, False])
def test_accelerate_offload_is_honoured(dit, inputs, before):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    with torch.no_grad():
        want = raw(dit, *inputs)
        if before:
            cpu_offload(dit, execution_device=torch.device("cpu"), offload_buffers=True)
        model = HookedDiT(dit)
        if not before:
            cpu_offload(dit, execution_device=torch.device("cpu"), offload_buffers=True)
        assert next(dit.parameters()).device.type == "meta"
        out, cache = model.run_with_cache(*inputs)
        assert torch.equal(out, want) and torch.equal(
            cache["resid_pre", 1] + cache["attn_out", 1], cache["resid_mid", 1]
        )
        model.remove()
        assert torch.equal(raw(dit, *inputs), want)
        remove_hook_from_submodules(dit)
        assert torch.equal(raw(dit, *inputs), want)


def test_a_pipelines_offload_puts_its_hooks_anew_after_every_run(pipe):
    """`enable_model_cpu_offload`, the common way to run large models: the wrapper that accelerate
    leaves on the transformer has the attributes of what it wraps, ours among them.
    """
    pipe.enable_model_cpu_offload(device="cpu")

    def images():
        gen = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=2, generator=gen, output_type="np").images

    want = images()
    for names in (None, "resid_post", None):
        with dit_lens.trace(pipe, names=names) as t:
            assert (images() == want).all()
        assert t["resid_post", 1].shape == (2, 4, 16, 16)
        assert Instrumentation.found(pipe.transformer) is None
    model = HookedDiT(pipe)
    del model
    assert (images() == want).all()


def test_other_tools_forwards_are_respected(dit, inputs):
    block = dit.transformer_blocks[0]
    block.forward = lambda *a, **k: None
    with pytest.raises(
        RuntimeError, match="BasicTransformerBlock was already replaced on the instance"
    ):
        HookedDiT(dit)
    assert [n for n, m in dit.named_modules() if "forward" in m.__dict__] == [
        "transformer_blocks.0"
    ]
    del block.forward
    model = HookedDiT(dit)
    block.forward = theirs = lambda *a, **k: None
    with pytest.raises(RuntimeError, match="was replaced by .* after dit_lens; undo that first"):
        model.remove()
    assert block.forward is theirs


def test_bad_input(dit, inputs):
    model = HookedDiT(dit)
    x, t, y = inputs
    for bad, text in [
        ((torch.zeros(2, 4, 8, 6), t, y), "latents are 8x6; diffusers' DiT silently scrambles"),
        (
            (torch.zeros(2, 3, 8, 8), t, y),
            r"latents have shape \[2, 3, 8, 8\]; expected \[batch, 4, 8, 8\]",
        ),
        (
            (torch.zeros(2, 4, 7, 7), t, y),
            "latents are 7 wide; expected a multiple of the patch size 2",
        ),
        (
            (x, torch.tensor(5), y),
            r"timesteps are shape \[\]; expected a tensor of shape \[2\], one for each item",
        ),
        ((x, 5, y), r"timesteps are 5; expected a tensor of shape \[2\]"),
        ((x, np.zeros((2, 2)), y), r"timesteps are an array \[2, 2\] of float64; expected"),
        ((x, t, None), r"class labels are None; expected a tensor of shape \[2\]"),
        (
            (x, t, torch.tensor([3, 1001])),
            "Class label 1001 is out of range; expected 0 to 999, or 1000 for no class",
        ),
        ((x, t, torch.tensor([-1, 3])), "Class label -1 is out of range"),
        ((x.to("meta"), t, y), "latents are on meta, the model is on cpu; use x.to"),
    ]:
        with pytest.raises(ValueError, match=text):
            model(*bad)
    for fn, error, text in [
        (
            lambda a, hook: a[:, :1],
            ValueError,
            r"hook at 'hook_embed' returned shape \[2, 1, 16\]; expected \[2, 16, 16\]",
        ),
        (
            lambda a, hook: a.double(),
            ValueError,
            "returned torch.float64 on cpu; expected torch.float32 on cpu",
        ),
        (lambda a, hook: 3, TypeError, "returned a int; expected a tensor or None"),
        ("no function", TypeError, r"expected a function fn\(activation, hook\)"),
    ]:
        with pytest.raises(error, match=text):
            model.run_with_hooks(x, t, y, fwd_hooks=[("hook_embed", fn)])
    dit.train()
    with pytest.raises(RuntimeError, match="train mode.*call model.eval"):
        model.run_with_cache(x, t, y)
    assert model.instrumentation.listening == 0 and all(
        not p.listeners for p in model.instrumentation.points.values()
    )


def test_the_registry_refuses_duplicates():
    from dit_lens.families import dit as family

    with pytest.raises(ValueError, match="There is a family for 'DiTTransformer2DModel' already"):
        register(family.DiTFamily())


def test_nothing_outside_families_knows_the_block():
    import pathlib

    package = pathlib.Path(dit_lens.__file__).parent
    parts = ("transformer_blocks", "attn1", "norm1", "proj_out")
    scanned, knowing = 0, set()
    for file in package.rglob("*.py"):
        folder, text = file.relative_to(package).parts[0], file.read_text()
        scanned += 1
        knowing |= {folder for part in parts if part in text}
    assert scanned > 80 and knowing == {"families", "groundtruth"}


def test_pipelines_work_through(pipe):
    gen = [torch.Generator().manual_seed(0) for _ in range(2)]
    want = pipe(class_labels=[1, 2], num_inference_steps=3, generator=gen, output_type="pt").images
    model = HookedDiT(pipe)
    gen = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(
        pipe(class_labels=[1, 2], num_inference_steps=3, generator=gen, output_type="pt").images,
        want,
    )
    assert model.scheduler is pipe.scheduler and model.vae is pipe.vae and "3 layers" in repr(model)
