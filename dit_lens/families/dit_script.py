"""A file that runs a reuse plan on diffusers' DiT without dit_lens (`dit_lens.plans`)."""

SCRIPT = '''"""Runs a reuse plan on diffusers' DiTTransformer2DModel, written by dit_lens:
`with plan(pipe.transformer): pipe(...)`. HELD: steps at which a part adds what it added when it
was last computed (0), or the line through the last two times (1)."""

from contextlib import contextmanager
from functools import partial

TIMESTEPS = {times}
HELD = {{
{held}
}}


@contextmanager
def plan(transformer):
    now, kept = {{"step": -1, "t": None}}, {{}}

    def count(module, args, kwargs):
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = float(t.flatten()[0])
        if t == now["t"]:
            raise RuntimeError("this plan needs one call a step")
        now["step"], now["t"] = (now["step"] + 1) % len(TIMESTEPS), t
        if abs(TIMESTEPS[now["step"]] - t) > 1e-3 * max(TIMESTEPS):
            raise RuntimeError(f"timestep {{t}}; the plan has {{TIMESTEPS[now['step']]}} here")

    def block_forward(block, i, x, timestep=None, class_labels=None, **_):
        def added(part, make=None):
            line = HELD.get((i, part), {{}}).get(now["step"])
            if line is None:
                kept[i, part] = [(now["t"], make()), *kept.get((i, part), [])[:1]]
            (t, value), *earlier = kept[i, part]
            if not line:
                return value
            return value + (now["t"] - t) / (t - earlier[0][0]) * (value - earlier[0][1])

        if all(now["step"] in HELD.get((i, part), ()) for part in ("attn", "mlp")):
            return x + added("attn") + added("mlp")
        n, gate, shift, scale, gate_mlp = block.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype)
        x = x + added("attn", lambda: gate[:, None] * block.attn1(n))
        return x + added("mlp", lambda: gate_mlp[:, None] * block.ff(
            block.norm3(x) * (1 + scale[:, None]) + shift[:, None]))

    blocks = transformer.transformer_blocks
    if any("forward" in vars(block) for block in blocks):
        raise RuntimeError("something else replaces a block's forward; take it off first")
    handle = transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(block_forward, block, i)
        yield transformer
    finally:
        handle.remove()
        for block in blocks:
            vars(block).pop("forward", None)
'''
