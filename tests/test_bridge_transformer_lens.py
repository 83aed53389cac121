"""The bridge to TransformerLens: its own functions on a DiT give what dit_lens's give, and leave
nothing behind.
"""

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dit, make_pipe, raw

import dit_lens
from dit_lens import HookedDiT
from dit_lens.bridges.transformer_lens import _bridge, to_transformer_lens
from dit_lens.patching import act_patch

theirs = pytest.importorskip("transformer_lens")
torch.set_num_threads(1)

PATCHES = [
    "resid_pre",
    "resid_mid",
    "attn_out",
    "mlp_out",
    "block_every",
    "attn_head_all_pos_every",
    *(f"attn_head_{of}_all_pos" for of in ("out", "q", "k", "v", "pattern")),
    *(f"attn_head_{of}_by_pos" for of in ("out", "q", "k", "v")),
]


@pytest.fixture
def model(dit):
    return HookedDiT(dit)


@pytest.fixture
def tl(model):
    return to_transformer_lens(model)


@pytest.fixture
def pair():
    """A model of two layers, its bridge, inputs of a clean and a corrupted run, and a metric."""
    model = HookedDiT(make_dit(layers=2))
    clean, corrupted = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([300, 300]), torch.tensor([3, 4])
    target = model(clean, t, y).detach()
    return (
        to_transformer_lens(model),
        (clean, t, y),
        (corrupted, t, y),
        lambda out: (out - target).square().mean(),
    )


def square(out):
    return out.square().mean()


def halve(activation, hook):
    return activation * 0.5


# What it is.


def test_it_is_a_hooked_root_module_with_the_models_names_and_sizes(tl, model):
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_protocol import TransformerLensModel

    assert isinstance(tl, theirs.HookedRootModule) and isinstance(tl, TransformerLensModel)
    assert list(tl.hook_dict) == model.names
    assert all(
        type(point) is HookPoint and point.name == name for name, point in tl.hook_dict.items()
    )
    assert tl.blocks[1].attn.hook_q is tl.hook_dict["blocks.1.attn.hook_q"] and len(tl.blocks) == 3
    assert tl.hook_dict["blocks.2.hook_resid_post"].layer() == 2
    c = tl.cfg
    assert (c.n_layers, c.d_model, c.n_heads, c.d_head, c.d_mlp, c.n_ctx) == (3, 16, 2, 8, 64, 16)
    assert (
        isinstance(c, theirs.TransformerBridgeConfig)
        and c.device == "cpu"
        and c.dtype is torch.float32
    )
    assert "TransformerLensDiT(HookedDiT(" in repr(tl)


def test_the_weights_are_the_transformers_own(tl, dit):
    assert [p.data_ptr() for p in tl.parameters()] == [p.data_ptr() for p in dit.parameters()]
    assert set(tl.state_dict()) == {f"transformer.{name}" for name in dit.state_dict()}
    # setup() would have left its mark
    assert not any(hasattr(module, "name") for module in dit.modules())
    assert not any(module.training for module in tl.modules())
    tl.to(torch.float64)
    assert dit.proj_out_2.weight.dtype is torch.float64 and tl.cfg.dtype is torch.float64


def test_it_takes_pipelines_and_transformers_too(inputs):
    pipe = make_pipe()
    assert torch.equal(to_transformer_lens(pipe)(*inputs), raw(pipe.transformer, *inputs))
    assert to_transformer_lens(to_transformer_lens(pipe).model).transformer is pipe.transformer
    with pytest.raises(TypeError, match="neither a transformer nor a pipeline"):
        to_transformer_lens(3)


# Running.


def test_run_with_cache_is_hooked_dits_bit_for_bit(tl, model, dit, inputs):
    plain, (out, cache), (_, ours) = (
        raw(dit, *inputs),
        tl.run_with_cache(*inputs),
        model.run_with_cache(*inputs),
    )
    assert torch.equal(tl(*inputs), plain) and torch.equal(out, plain)
    assert type(cache) is theirs.ActivationCache and list(cache) == model.names
    assert all(torch.equal(cache[name], ours[name]) for name in ours)
    with torch.inference_mode():
        out, cache = tl.run_with_cache(*inputs)
    assert torch.equal(out, plain) and all(torch.equal(cache[name], ours[name]) for name in ours)
    assert type(tl.run_with_cache(*inputs, return_cache_object=False)[1]) is dict


def test_the_options_of_run_with_cache(tl, model, inputs):
    x, t, y = inputs
    _, ours = model.run_with_cache(*inputs)
    for names, chosen in (
        ("blocks.1.attn.hook_q", ["blocks.1.attn.hook_q"]),
        (["hook_embed", "hook_sample"], ["hook_embed", "hook_sample"]),
        (
            lambda name: name.endswith("gate_mlp"),
            [f"blocks.{i}.adaln.hook_gate_mlp" for i in range(3)],
        ),
        ("attn.hook_z", [f"blocks.{i}.attn.hook_z" for i in range(3)]),
    ):
        assert list(tl.run_with_cache(*inputs, names_filter=names)[1]) == chosen
    stream, cache = tl.run_with_cache(*inputs, stop_at_layer=1, device="cpu")
    assert (
        torch.equal(stream, ours["resid_pre", 1]) and "blocks.1.hook_resid_pre" not in cache.keys()
    )
    assert torch.equal(tl(stream, t, y, start_at_layer=1), tl(*inputs))
    _, one = tl.run_with_cache(x[:1], t[:1], y[:1], remove_batch_dim=True)
    assert (
        one["q", 0].shape == (16, 2, 8)
        and one["gate_mlp", 0, "adaln"].shape == (16,)
        and not one.has_batch_dim
    )
    with pytest.raises(AssertionError, match="Cannot remove batch dimension"):
        tl.run_with_cache(tl.to_tokens(*inputs), remove_batch_dim=True)


def test_pos_slice_takes_tokens_and_leaves_what_has_none(tl, inputs):
    _, whole = tl.run_with_cache(*inputs)
    _, cut = tl.run_with_cache(*inputs, pos_slice=(3, 7))
    for name, value in whole.items():
        axes = tl.model.sites[name]
        axis = next((i for i, a in enumerate(axes) if a in ("token", "query")), None)
        assert torch.equal(cut[name], value if axis is None else value.narrow(axis, 3, 4)), name


def test_patterns_are_computed_only_when_asked_for(tl, inputs, monkeypatch):
    asked = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda self, *a, **k: asked.append(1) or softmax(self, *a, **k)
    )
    tl.run_with_cache(*inputs, names_filter="resid_post")
    tl(*inputs)
    assert not asked
    tl.run_with_cache(*inputs, names_filter="blocks.1.attn.hook_pattern")
    assert len(asked) == 1


# Editing.


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "blocks.0.hook_resid_mid",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_result",
        "blocks.2.adaln.hook_gate_mlp",
        "final.hook_scale",
        "hook_sample",
    ],
)
def test_edits_are_dit_lenss(tl, model, inputs, name):
    wanted = model.run_with_hooks(*inputs, fwd_hooks=[(name, halve)])
    plain = tl(*inputs)
    assert not torch.equal(wanted, plain)

    def in_place(activation, hook):  # in TransformerLens this is an edit, though it returns nothing
        activation *= 0.5

    with torch.no_grad():
        for fn in (halve, in_place):
            assert torch.equal(tl.run_with_hooks(*inputs, fwd_hooks=[(name, fn)]), wanted)
            with tl.hooks(fwd_hooks=[(name, fn)]):
                assert torch.equal(tl(*inputs), wanted)
        with torch.inference_mode():
            assert torch.equal(tl.run_with_hooks(*inputs, fwd_hooks=[(name, in_place)]), wanted)
        tl.add_hook(lambda n: n == name, halve)
        assert torch.equal(tl(*inputs), wanted) and model.instrumentation.listening == 0
        assert [h.user_hook for h in tl.list_hooks()[name]] == [halve]
        tl.reset_hooks()
    assert torch.equal(tl(*inputs), plain) and tl.list_hooks() == {}


def test_an_edit_is_not_seen_under_the_streams_other_name(tl, inputs):
    def zero(activation, hook):
        activation[:] = 0

    _, plain = tl.run_with_cache(*inputs)
    with torch.no_grad(), tl.hooks([("blocks.1.hook_resid_pre", zero)]):
        _, cache = tl.run_with_cache(*inputs)
    assert (
        torch.equal(cache["resid_post", 0], plain["resid_post", 0])
        and cache["resid_pre", 1].abs().max() == 0
    )


def test_it_stands_beside_hooks_of_dit_lens(tl, model, inputs):
    both = [("blocks.1.hook_mlp_out", halve), ("blocks.1.hook_mlp_out", lambda a, hook: a + 1)]
    wanted = model.run_with_hooks(*inputs, fwd_hooks=both)
    with model.hooks(both[:1]):
        assert torch.equal(tl.run_with_hooks(*inputs, fwd_hooks=both[1:]), wanted)
        assert model.instrumentation.listening == 1


def test_hooks_reach_a_pipeline(pipe):
    def image():
        noise = torch.Generator().manual_seed(0)
        return torch.tensor(
            pipe([3], num_inference_steps=3, generator=noise, output_type="np").images
        )

    tl = to_transformer_lens(pipe)
    plain, hooks = image(), [("attn_out", lambda a, hook: 0 * a)]
    with tl.model.hooks(hooks):
        wanted = image()
    with tl.hooks(hooks):
        assert torch.equal(image(), wanted)
    assert torch.equal(image(), plain) and not torch.equal(plain, wanted)


def test_nothing_is_left_behind(tl, model, dit, inputs):
    def fail(activation, hook):
        raise ZeroDivisionError

    def within(*hooks):
        with tl.hooks(hooks):
            raw(dit, *inputs)

    plain = raw(dit, *inputs)
    for run in (
        lambda: tl.run_with_hooks(
            *inputs, fwd_hooks=[("resid_post", halve), ("hook_sample", fail)]
        ),
        lambda: tl.run_with_cache(*inputs, metric=lambda out: 1 / 0, incl_bwd=True),
        lambda: within(("resid_post", fail)),
    ):
        with pytest.raises(ZeroDivisionError):
            run()
        assert model.instrumentation.listening == 0 and tl.list_hooks() == {} and not tl.attached
    tl.run_with_hooks(*inputs, fwd_hooks=[("resid_post", halve)], reset_hooks_end=False)
    assert model.instrumentation.listening == 0 and len(tl.list_hooks()) == 3
    assert torch.equal(raw(dit, *inputs), plain) and not torch.equal(tl(*inputs), plain)
    tl.reset_hooks()
    tl.run_with_cache(*inputs)
    model.remove()
    assert torch.equal(raw(dit, *inputs), plain) and "forward" not in vars(dit)
    with pytest.raises(RuntimeError, match="hook points were removed"):
        tl(*inputs)


def test_copies_start_with_nobody_listening(tl, inputs):
    plain = tl(*inputs)
    tl.add_hook("resid_mid", halve)
    for twin in (copy.deepcopy(tl), pickle.loads(pickle.dumps(tl))):
        assert torch.equal(twin(*inputs), plain) and twin.list_hooks() == {}
        assert twin.transformer is not tl.transformer and twin.transformer is twin.model.transformer


def test_traces(tl, inputs):
    with dit_lens.trace(tl.model) as trace:
        _, cache = tl.run_with_cache(*inputs)
    assert torch.equal(trace["pattern", 1][0], cache["pattern", 1])
    advice = re.escape("make it with trace.edit('hook_embed', fn)")
    with dit_lens.trace(tl.model), pytest.raises(RuntimeError, match=advice):
        tl.run_with_hooks(*inputs, fwd_hooks=[("hook_embed", halve)])


# Gradients.


def test_gradients_are_autograds(tl, model, inputs):
    x, t, y = inputs
    # which lie beside the fused kernel
    names = [n for n in model.names if not re.search("scores|pattern|result", n)]
    kept = {}
    with model.hooks([(names, lambda a, hook: kept.__setitem__(hook.name, a))]):
        grads = torch.autograd.grad(square(model(*inputs)), [kept[n] for n in names])
    loss, cache = tl.run_with_cache(*inputs, metric=square, incl_bwd=True, names_filter=names)
    assert loss.shape == () and list(cache)[: len(names)] == names and len(cache) == 2 * len(names)
    for name, grad in zip(names, grads, strict=True):
        assert torch.allclose(cache[f"{name}_grad"], grad, rtol=1e-5, atol=1e-9), name
    tl.zero_grad()


def test_gradients_of_patterns_and_backward_edits_are_dit_lenss(tl, model, inputs):
    def gradients(of, name, fn):
        x = inputs[0].clone().requires_grad_()
        with of.hooks(bwd_hooks=[(name, fn)]):
            square(of(x, *inputs[1:])).backward()
        return x.grad

    for name in (
        "blocks.1.attn.hook_pattern",
        "blocks.0.attn.hook_result",
        "blocks.1.hook_resid_pre",
    ):
        ours, seen = [], []
        gradients(model, name, lambda g, hook, ours=ours: ours.append(g))
        gradients(tl, name, lambda g, hook, seen=seen: seen.append(g))
        assert torch.allclose(seen[0], ours[0], rtol=1e-5, atol=1e-9) and ours[0].abs().max() > 0
        doubled = gradients(model, name, lambda g, hook: 2 * g)
        assert torch.allclose(
            gradients(tl, name, lambda g, hook: 2 * g), doubled, rtol=1e-5, atol=1e-9
        )
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="A backward hook waits at 'hook_embed', but no"),
    ):
        tl.run_with_hooks(*inputs, bwd_hooks=[("hook_embed", halve)])
    with pytest.raises(ValueError, match=re.escape("pass metric=fn, with fn(output) a scalar")):
        tl.run_with_cache(*inputs, incl_bwd=True)


# TransformerLens's own functions.


def test_the_functions_of_its_cache(tl, model, inputs):
    _, cache = tl.run_with_cache(*inputs)
    _, ours = model.run_with_cache(*inputs)
    for key in (
        ("resid_post", -1),
        ("q", 1),
        ("gate_attn", 0, "adaln"),
        ("normalized", 2, "ln2"),
        "embed",
        "pre1",
    ):
        name = theirs.utilities.get_act_name(*([key] if isinstance(key, str) else key)).replace(
            "-1", "2"
        )
        assert torch.equal(cache[key], ours[name])
    assert torch.equal(cache.stack_activation("pattern"), ours.stack("pattern"))
    assert torch.equal(
        cache.stack_activation("scale_mlp", sublayer_type="adaln"),
        ours.stack("adaln.hook_scale_mlp"),
    )
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert torch.equal(streams[-1], ours["resid_post", 2]) and torch.equal(
        streams[3], ours["resid_mid", 1]
    )
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"] and len(parts) == 7
    assert torch.allclose(parts.sum(0), ours["resid_post", 2], atol=1e-5)
    assert torch.allclose(
        cache.decompose_resid(1, mlp_input=True, mode="all").sum(0), ours["resid_mid", 1], atol=1e-5
    )
    # Heads come before the gate: with it, and the bias, they are what attention adds.
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]
    gates = cache.stack_activation("gate_attn", sublayer_type="adaln")[:, :, None]
    bias = torch.stack([block.attn1.to_out[0].bias for block in tl.transformer.transformer_blocks])[
        :, None, None
    ]
    summed = gates * (heads.unflatten(0, (3, 2)).sum(1) + bias)
    assert torch.allclose(summed, ours.stack("attn_out"), atol=1e-5)
    assert torch.equal(cache.apply_slice_to_batch_dim(1)["z", 1], ours["z", 1][1])
    _, one = tl.run_with_cache(*(v[:1] for v in inputs))
    assert one.remove_batch_dim()["resid_pre", 0].shape == (16, 16)
    assert one.to("cpu").accumulated_resid().shape == (4, 16, 16)


@pytest.mark.parametrize("name", PATCHES)
def test_its_patching_functions_run_as_they_are(pair, name):
    tl, clean, corrupted, metric = pair
    (_, cache), (_, ours) = tl.run_with_cache(*clean), tl.model.run_with_cache(*clean)
    with torch.no_grad():
        patch = getattr(theirs.patching, f"get_act_patch_{name}")
        found = patch(tl, tl.to_tokens(*corrupted), cache, metric)
    wanted = getattr(act_patch, f"get_act_patch_{name}")(tl.model, corrupted, ours, metric)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4)


def test_its_patches_of_patterns_on_a_smaller_image(pair):
    tl, (x, t, y), (other, _, _), _ = pair
    clean, corrupted = (x[..., :4, :4], t, y), (other[..., :4, :4], t, y)
    _, cache = tl.run_with_cache(*clean)
    with torch.no_grad():
        run = tl.to_tokens(*corrupted), cache, square
        by_query = theirs.patching.get_act_patch_attn_head_pattern_by_pos(tl, *run)
        assert by_query.shape == (2, 2, 4)  # [layer, head, query]
        assert theirs.patching.get_act_patch_attn_head_by_pos_every(tl, *run).shape == (5, 2, 4, 2)
        cells = theirs.patching.get_act_patch_attn_head_pattern_dest_src_pos(tl, *run)

        def put(activation, hook):
            activation[:, 1, 2, 3] = cache["pattern", 0][:, 1, 2, 3]
            return activation

        by_hand = square(
            tl.model.run_with_hooks(*corrupted, fwd_hooks=[("blocks.0.attn.hook_pattern", put)])
        )
    assert cells.shape == (2, 2, 4, 4) and torch.equal(cells[0, 1, 2, 3], by_hand)


def test_its_statistics_over_a_batch(pair):
    tl, clean, corrupted, _ = pair
    _, cache = tl.run_with_cache(*clean)
    found = theirs.patching.get_act_patch_mlp_out(
        tl,
        tl.to_tokens(*corrupted),
        cache,
        lambda out: out.flatten(1).mean(1),
        reduce="none",
        baseline=True,
    )
    assert found.values.shape == (2, 16, 2)
    assert (
        torch.allclose(found.baseline, tl(*corrupted).flatten(1).mean(1))
        and found.effect().abs().max() > 0
    )


def test_its_attribution_patching(pair):
    from transformer_lens.tools.analysis import attribution_patch

    tl, clean, corrupted, _ = pair
    result = attribution_patch(tl, tl.to_tokens(*clean), tl.to_tokens(*corrupted), square)
    scores = {(n.hook_name, n.position, n.head): score for n, score in result.node_scores.items()}
    wanted = dict.fromkeys(scores, 0.0)
    for item in range(2):  # it takes items one by one and averages
        _, there = tl.run_with_cache(*(v[item : item + 1] for v in clean))
        _, here = tl.run_with_cache(
            *(v[item : item + 1] for v in corrupted), metric=square, incl_bwd=True
        )
        for name, position, head in scores:
            product = ((there[name] - here[name]) * here[f"{name}_grad"])[0, position]
            wanted[name, position, head] += (
                float((product if head is None else product[head]).sum()) / 2
            )
    assert len(scores) == 16 * (1 + 2 * 3)
    assert all(scores[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-9) for key in scores)


def test_its_interchange_interventions(pair):
    from transformer_lens.tools.analysis import interchange

    tl, clean, corrupted, _ = pair
    base, source, where = tl.to_tokens(*corrupted), tl.to_tokens(*clean), torch.tensor([3, 9])
    point = "blocks.0.hook_resid_post"

    def task(tokens):
        return tl(tokens).flatten(1)[:, :4]

    with torch.no_grad():
        acts = interchange.collect_activations(
            tl, point, source, task, positions=where, batch_size=1
        )
        assert torch.allclose(acts, tl.run_with_cache(*clean)[1][point][[0, 1], where], atol=1e-5)
        whole = interchange.SubspaceInterchange(torch.eye(16))
        found = interchange.intervened_logits(tl, point, whole, base, acts, task, positions=where)

        def put(activation, hook):
            activation[[0, 1], where] = acts
            return activation

        wanted = tl.model.run_with_hooks(*corrupted, fwd_hooks=[(point, put)]).flatten(1)[:, :4]
    assert torch.allclose(found, wanted, atol=1e-6) and not torch.equal(wanted, task(base))
    places = {"base_positions": where, "source_positions": where}
    learned = interchange.fit_das(
        tl, point, base, source, torch.tensor([0, 1]), task, rank=2, epochs=3, **places
    )
    assert learned.losses[-1] < learned.losses[0] and all(p.requires_grad for p in tl.parameters())
    assert not torch.equal(
        task(base), interchange.reinitialized(tl, seed=0)(base).flatten(1)[:, :4]
    )


def test_tokens(tl, inputs):
    tokens = tl.to_tokens(*inputs)
    assert (
        tokens.shape == (2, 16)
        and len(tokens) == 2
        and tokens.ndim == 2
        and tl.to_tokens(tokens) is tokens
    )
    assert torch.equal(tl(tokens), tl(*inputs)) and "2 inputs" in repr(tokens)
    for index in (1, [1], slice(1, 2), torch.tensor([1]), torch.tensor([False, True])):
        assert all(torch.equal(a, b[1:]) for a, b in zip(tokens[index].inputs, inputs, strict=True))
    x, t, y = inputs
    more = tl.to_tokens(x, t[:1], {"labels": y, "scale": 2.0})[[1, 0, 1]]
    assert torch.equal(more.inputs[1], t[:1]) and more.inputs[2]["scale"] == 2.0
    assert torch.equal(more.inputs[2]["labels"], y[[1, 0, 1]])
    with pytest.raises(
        TypeError, match=re.escape("timesteps t and condition y, not (str, NoneType, NoneType)")
    ):
        tl.to_tokens("a cat")


# What a DiT does not have, and says so.


def test_what_does_not_apply_says_so(tl, inputs):
    _, cache = tl.run_with_cache(*inputs)
    for wrong in ("resid_pots", "blocks.3.hook_resid_post", ["resid_post", "attn.hook_qq"]):
        with pytest.raises(dit_lens.UnknownName, match="No hook point matches .*; nearest: "):
            tl.run_with_cache(*inputs, names_filter=wrong)
    with pytest.raises(KeyError, match="nearest: 'blocks.2.hook_resid_post'"):
        tl.run_with_hooks(*inputs, fwd_hooks=[("blocks.3.hook_resid_post", halve)])
    with pytest.raises(dit_lens.UnknownName, match="accepts none of"):
        tl.add_hook(lambda name: False, halve)
    with pytest.raises(dit_lens.UnknownName):
        tl.add_caching_hooks("resid_pots")
    for method in (
        lambda: cache.stack_neuron_results(1),
        lambda: cache.logit_attrs(cache.decompose_resid(), 3),
    ):
        with pytest.raises(
            AttributeError, match="is not part of the bridge: it gives TransformerLens a DiT's hook"
        ):
            method()
    with pytest.raises(NotImplementedError, match=re.escape("use tl.model.unembed(stream, t, y)")):
        cache.accumulated_resid(apply_ln=True)
    with pytest.raises(KeyError, match="Cached LN scale not found"):
        cache.decompose_resid(1, apply_ln=True)
    with pytest.raises(ValueError, match="returned shape"):
        tl.run_with_hooks(*inputs, fwd_hooks=[("hook_embed", lambda a, hook: a[:1])])
    tl.train()
    with pytest.raises(RuntimeError, match="train mode"):
        tl.run_with_cache(*inputs)
    assert tl.list_hooks() == {}


def test_without_transformer_lens(monkeypatch, dit):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    _bridge.cache_clear()
    with pytest.raises(
        ImportError, match=re.escape("use pip install 'dit_lens[transformer-lens]'")
    ):
        to_transformer_lens(dit)


@pytest.mark.slow
def test_the_page_runs(capsys):
    page = Path(__file__).parent.parent / "docs" / "transformer-lens-bridge.md"
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([28, 64])\n")
