"""TransformerLens's patching functions: each cell is what running that patch by hand gives, in
TransformerLens's shapes.
"""

import pytest
import torch
from conftest import make_dit

from dit_lens import HookedDiT
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
    with pytest.raises(
        ValueError,
        match="The clean cache has a batch of 2 and the corrupted inputs one of 1; expected the same",
    ):
        ours.get_act_patch_resid_pre(model, (x[:1], t[:1], y[:1]), cache, metric)
    _, few = model.run_with_cache(x, t, y, names_filter="mlp_out")
    with pytest.raises(KeyError):
        ours.get_act_patch_resid_pre(model, (x, t, y), few, metric)
    assert model.instrumentation.listening == 0
