"""diffusers' own hooks and adapters on an opened model, put on before and after it was opened:
either they work, or a sentence says no.
"""

import copy

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    apply_group_offloading,
    apply_layer_skip,
)
from peft import LoraConfig

import dit_lens
from dit_lens.families import family_named, small_inputs

CPU = torch.device("cpu")


def skip(model, **what):
    chosen = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False} | what
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **chosen))


def lora(model):
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_out.0", "proj_out", "net.0.proj"]
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    )


HOOKS = {
    "layerwise casting": lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "skip a block": lambda m: apply_layer_skip(
        m, LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    ),
    "skip attention": lambda m: skip(m, skip_attention=True),
    "skip scores": lambda m: skip(m, skip_attention_scores=True),
    "skip the MLP": lambda m: skip(m, skip_ff=True),
    "offload groups": lambda m: apply_group_offloading(
        m, CPU, CPU, "block_level", num_blocks_per_group=1
    ),
    "offload leaves": lambda m: apply_group_offloading(m, CPU, CPU, "leaf_level"),
    "LoRA": lora,
}
# diffusers knows the blocks of these
SKIPS = ("skip a block", "skip attention", "skip scores", "skip the MLP")
CASES = [("DiTTransformer2DModel", hook) for hook in HOOKS if hook != "LoRA"]
CASES += [
    (family, hook)
    for family in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    for hook in HOOKS
    if hook not in SKIPS
]


def small(name, variant=1):
    family = family_named(name)
    plain, condition = family.small(variant)
    inputs = small_inputs(family, plain, condition)

    def ask(model):
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return plain, ask


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("name", "hook"), CASES)
def test_they_go_together(name, hook, before):
    plain, ask = small(name)
    reference, opened = copy.deepcopy(plain), copy.deepcopy(plain)
    HOOKS[hook](reference)
    want = ask(reference)
    if before:
        HOOKS[hook](opened)
    model = dit_lens.HookedDiT(opened)
    if not before:
        HOOKS[hook](opened)
    assert torch.equal(ask(opened), want)
    assert dit_lens.HookedDiT(opened).instrumentation is model.instrumentation
    with dit_lens.trace(model, names="resid_post") as eager:
        assert torch.equal(ask(opened), want)
    with dit_lens.trace(model) as lazy:
        ask(opened)
    for layer in range(model.cfg.n_layers):
        if hook == "skip a block" and layer == 1:
            with pytest.raises(
                RuntimeError,
                match="'blocks.1.hook_resid_post' did not run in call 0.*its block was skipped",
            ):
                lazy["resid_post", 1]
        else:
            assert torch.equal(lazy["resid_post", layer], eager["resid_post", layer])
    with model.hooks([("blocks.0.hook_resid_pre", lambda a, hook: a * 2)]):
        assert not torch.equal(ask(opened), want)
    model.remove()
    assert torch.equal(ask(opened), want)
    again = dit_lens.HookedDiT(opened)
    assert torch.equal(ask(opened), want)
    again.remove()


def test_heads_of_an_adapted_projection_sum_to_its_output():
    plain, ask = small("SD3Transformer2DModel")
    lora(plain)
    model = dit_lens.HookedDiT(plain)
    with dit_lens.trace(model) as t:
        ask(plain)
    rest = (t["attn.hook_out", 0] - t["attn.hook_result", 0].sum(3))[0]
    assert torch.allclose(rest, rest[:1, :1].expand_as(rest), atol=1e-5)  # the bias


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "SanaTransformer2DModel"])
def test_what_is_put_in_after_opening_is_seen(name):
    """An adapter that wraps a module, and another block: read and edited as if opened since."""
    plain, ask = small(name)
    later, last = small(name)[0].transformer_blocks[:2]
    model = dit_lens.HookedDiT(plain)
    for change in (lora, lambda each: each.transformer_blocks.__setitem__(1, last)):
        change(plain)
        other = copy.deepcopy(plain)
        dit_lens.HookedDiT(other).remove()
        with dit_lens.trace(model, names=None) as mine, dit_lens.trace(other) as theirs:
            ask(plain)
            ask(other)
        assert all(torch.equal(mine[n], theirs[n]) for n in model.names)
        with model.hooks([(("attn_out", 1), lambda a, hook: 0 * a)]):
            edited = ask(plain)
        with dit_lens.trace(other) as theirs:
            theirs.ablate(("attn_out", 1))
            assert torch.equal(edited, ask(other)) and not torch.equal(edited, ask(plain))
    want = ask(plain)
    with (
        dit_lens.trace(model),
        pytest.raises(RuntimeError, match="at 'transformer_blocks.0' was r"),
    ):
        plain.transformer_blocks[0] = later
        ask(plain)
    model.remove()
    assert not torch.equal(ask(plain), want)
    assert not any("forward" in vars(module) for module in plain.modules())


def test_adapters_that_come_between_are_noticed():
    plain, ask = small("SD3Transformer2DModel")
    model = dit_lens.HookedDiT(plain)
    with dit_lens.trace(model) as t:
        ask(plain)
    lora(plain)
    with pytest.raises(RuntimeError, match="the adapters at .* changed"):
        t["resid_post", 0]


def test_caches_are_refused_whenever_they_come():
    plain, ask = small("FluxTransformer2DModel")
    model = dit_lens.HookedDiT(plain)
    plain.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(
        RuntimeError, match=r"A diffusers cache is on.*call transformer.disable_cache\(\) first"
    ):
        model.add_hook("resid_post", lambda a, hook: None)
        ask(plain)
    model.remove()
    with pytest.raises(RuntimeError, match="A diffusers cache is on"):
        dit_lens.HookedDiT(plain)
    plain.disable_cache()
    assert dit_lens.HookedDiT(plain).names
