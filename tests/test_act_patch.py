"""TransformerLens's patching functions: each cell is what running that patch by hand gives, in
TransformerLens's shapes.
"""

import pytest
import torch
from conftest import make_dit

import dit_lens
from dit_lens import HookedDiT
from dit_lens.families import family_named
from dit_lens.patching import act_patch as ours

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting():
    model = HookedDiT(make_dit(layers=3))
    gen = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, 2, 4, 8, 8, generator=gen)
    t, y = torch.tensor([300, 300]), torch.tensor([3, 4])
    _, cache = model.run_with_cache(clean, t, y)
    target = model(clean, t, y)

    def metric(output):
        return (output - target).square().mean()

    return model, (corrupted, t, y), cache, metric


@pytest.mark.parametrize(
    ("name", "site", "shape"),
    [
        ("resid_pre", "hook_resid_pre", "token"),
        ("resid_mid", "hook_resid_mid", "token"),
        ("attn_out", "hook_attn_out", "token"),
        ("mlp_out", "hook_mlp_out", "token"),
        ("attn_head_out_all_pos", "attn.hook_z", "head"),
        ("attn_head_v_all_pos", "attn.hook_v", "head"),
        ("attn_head_k_by_pos", "attn.hook_k", "both"),
        ("attn_head_pattern_all_pos", "attn.hook_pattern", "pattern"),
    ],
)
def test_every_cell_is_the_patch_by_hand(setting, name, site, shape):
    model, inputs, cache, metric = setting
    found = getattr(ours, f"get_act_patch_{name}")(model, inputs, cache, metric)
    assert (
        found.shape
        == {"token": (3, 16), "head": (3, 2), "both": (3, 16, 2), "pattern": (3, 2)}[shape]
    )
    for layer, token, head in ((0, 5, 1), (2, 15, 0)):
        where = {
            "token": (slice(None), token),
            "head": (slice(None), slice(None), head),
            "both": (slice(None), token, head),
            "pattern": (slice(None), head),
        }[shape]
        full = f"blocks.{layer}.{site}"

        def put(activation, hook, where=where, full=full):
            activation[where] = cache[full][where]
            return activation

        by_hand = metric(model.run_with_hooks(*inputs, fwd_hooks=[(full, put)])).detach()
        cell = found[
            (
                layer,
                *{"token": (token,), "head": (head,), "both": (token, head), "pattern": (head,)}[
                    shape
                ],
            )
        ]
        assert float(cell) == pytest.approx(float(by_hand), rel=1e-4)
    assert model.instrumentation.listening == 0


def test_the_stacks_of_several(setting):
    model, inputs, cache, metric = setting
    every = ours.get_act_patch_block_every(model, inputs, cache, metric)
    assert every.shape == (3, 3, 16) and torch.equal(
        every[1], ours.get_act_patch_attn_out(model, inputs, cache, metric)
    )
    heads = ours.get_act_patch_attn_head_all_pos_every(model, inputs, cache, metric)
    assert heads.shape == (5, 3, 2) and torch.equal(
        heads[3], ours.get_act_patch_attn_head_v_all_pos(model, inputs, cache, metric)
    )
    one_by_one = ours.generic_activation_patch(model, inputs, cache, metric, "resid_pre", batch=1)
    assert torch.allclose(one_by_one, every[0], rtol=1e-4)


def test_names_and_argument_order_are_those_of_transformer_lens():
    import inspect

    theirs = pytest.importorskip("transformer_lens.patching")
    names = [name for name in dir(ours) if name.startswith("get_act_patch_")]
    assert len(names) == 15
    for name in names:
        order = list(inspect.signature(getattr(theirs, name)).parameters)[:4]
        assert (
            len(order) == 4
            and order[0] == "model"
            and order[1].startswith("corrupted")
            and order[2] == "clean_cache"
        ), (name, order)


@pytest.mark.parametrize(
    ("family", "site", "axes", "last", "cell"),
    [
        # three frames of 4x4 tokens
        ("WanTransformer3DModel", "attn_out", ("layer", "pos"), 48, (1, 47)),
        ("WanTransformer3DModel", "attn.hook_z", ("layer", "head"), 2, (0, 1)),
        ("CogVideoXTransformer3DModel", "resid_pre", ("layer", "pos"), 32, (1, 31)),
        ("CogVideoXTransformer3DModel", "text.attn_out", ("layer", "pos"), 7, (0, 6)),
        ("SanaTransformer2DModel", "cross_attn.hook_z", ("layer", "pos", "head"), 2, (1, 3, 1)),
        ("ZImageTransformer2DModel", "attn.hook_q", ("layer", "head"), 4, (1, 1)),
    ],
)
def test_video_and_text(family, site, axes, last, cell):
    transformer, y = family_named(family).small(0)
    model = HookedDiT(transformer)
    gen = torch.Generator().manual_seed(3)
    clean, corrupted = torch.randn(2, 2, *model.cfg.latent_shape, generator=gen)
    t = torch.tensor([300.0, 500.0])
    _, cache = model.run_with_cache(clean, t, y, names_filter=site)
    before = model(corrupted, t, y).detach()
    found = ours.generic_activation_patch(
        model, (corrupted, t, y), cache, lambda out: (out - before).norm(), site, axes, batch=6
    )
    assert found.shape[0] == model.cfg.n_layers and found.shape[-1] == last
    layer, *index = cell
    name = model.resolve(site, layer)
    where = [slice(None)] * cache[name].ndim
    for axis, i in zip(axes[1:], index, strict=True):
        where[next(p for p, a in enumerate(model.sites[name]) if a in ours.AXES[axis])] = i

    def put(activation, hook):
        activation[tuple(where)] = cache[name][tuple(where)]
        return activation

    out = model.run_with_hooks(corrupted, t, y, fwd_hooks=[(name, put)]).detach()
    moved = float((out - before).norm())
    assert moved > 1e-5 and float(found[cell]) == pytest.approx(moved, rel=0.05)


def test_each_is_a_function_of_its_own():
    import inspect

    names = [name for name in ours.__dict__ if name.startswith("get_act_patch_")]
    assert len(names) == 15
    for name in names:
        function = getattr(ours, name)
        assert inspect.isfunction(function) and function.__name__ == name
        assert all(
            f"        {p}: " in function.__doc__ for p in inspect.signature(function).parameters
        )
        assert getattr(dit_lens.patching, name) is function


def test_bad_input(setting):
    model, (x, t, y), cache, metric = setting
    with pytest.raises(
        ValueError, match="has the axes .*; index_axis_names=.* asks for one that it does not have"
    ):
        ours.generic_activation_patch(
            model, (x, t, y), cache, metric, "resid_pre", ("layer", "head")
        )
    with pytest.raises(ValueError, match="index_axis_names is .*; expected 'layer' first"):
        ours.generic_activation_patch(model, (x, t, y), cache, metric, "resid_pre", ("pos",))
    text = "The clean cache has a batch of 2 and the corrupted inputs one of 1; expected the same"
    with pytest.raises(ValueError, match=text):
        ours.get_act_patch_resid_pre(model, (x[:1], t[:1], y[:1]), cache, metric)
    _, few = model.run_with_cache(x, t, y, names_filter="mlp_out")
    with pytest.raises(KeyError):
        ours.get_act_patch_resid_pre(model, (x, t, y), few, metric)
    assert model.instrumentation.listening == 0
