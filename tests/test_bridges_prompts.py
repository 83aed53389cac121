"""Both bridges on models that are given text: the same names and values as dit_lens's own."""

import pytest
import torch
from test_prompts import call, pipeline

import dit_lens

T = torch.tensor([500.0, 20.0])


@pytest.fixture(scope="module")
def flux():
    return pipeline("FluxTransformer2DModel")


def test_transformer_lens_on_two_streams(flux):
    with dit_lens.HookedDiT(flux, size=(8, 8)) as model:
        x, y = torch.randn(2, *model.cfg.latent_shape), model.conditions.numbers(["a fox", ""])
        want, cache = model.run_with_cache(x, T, y)
        tl = dit_lens.to_transformer_lens(model)
        got, theirs = tl.run_with_cache(x, T, y)
        assert torch.equal(got, want) and list(tl.hook_dict) == model.names
        assert all(torch.equal(theirs[name], cache[name]) for name in model.names)
        edit = ("blocks.0.text.hook_attn_out", lambda a, hook: 0 * a)
        assert torch.equal(
            tl.run_with_hooks(x, T, y, fwd_hooks=[edit]),
            model.run_with_hooks(x, T, y, fwd_hooks=[edit]),
        )


def test_nnsight_on_a_pipeline_that_calls_twice_a_step(flux):
    """To nnsight an iteration is a call of the transformer: with true guidance, cond and uncond in
    turn.
    """
    asked = {
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "true_cfg_scale": 3.0,
        "negative_prompt": "a dog",
        "output_type": "pt",
    }
    with dit_lens.trace(flux, names="blocks.1.hook_resid_post") as t:
        call(
            flux, **{k: v for k, v in asked.items() if k not in ("height", "width", "output_type")}
        )
    m = dit_lens.to_nnsight(flux)
    with m.generate("a fox", generator=[torch.Generator().manual_seed(0)], **asked) as tracer:
        seen = list().save()
        for _ in tracer.iter[:]:
            seen.append(m.blocks[1].hook_resid_post.output)
    assert len(seen) == 4
    assert torch.equal(
        torch.stack([torch.cat(seen[:2]), torch.cat(seen[2:])]), t["blocks.1.hook_resid_post"]
    )
    m.dit.remove()
