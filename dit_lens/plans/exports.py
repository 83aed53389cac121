"""Plans for other tools: SmoothCache's schedule, cache-dit's mask of steps, and a file of plain
diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue

if TYPE_CHECKING:
    from .plan import Plan

MODULES = {"attn": "attn1", "mlp": "ff"}
"""What SmoothCache calls a layer's parts."""
LINES = 60
"""How long the file of plain diffusers may be."""


def smoothcache(plan: Plan) -> dict[str, list[int]]:
    """See `Plan.to_smoothcache`."""
    for layer, parts in enumerate(plan.parts):
        unknown = [part for part in parts if part not in MODULES]
        if unknown:
            raise InvalidValue(
                f"Layer {layer} adds by {', '.join(parts)}, and SmoothCache's schedule has no "
                f"{unknown[0]!r}; expected layers of an attention and an MLP."
            )
    return {
        f"{MODULES[part]}-{layer}": [
            int(step not in plan.held.get((layer, part), ())) for step in range(plan.steps)
        ]
        for layer, parts in enumerate(plan.parts)
        for part in parts
    }


def cache_dit(plan: Plan) -> dict[str, Any]:
    """See `Plan.to_cache_dit`."""
    steps = sorted({step for *_, step in plan.cells})
    first = min((layer for layer, *_ in plan.cells), default=1)
    if first < 1:
        raise InvalidValue(
            "The plan holds layer 0, which cache-dit always computes; expected one of layers from "
            "1 on."
        )
    for step in steps:
        for layer, parts in enumerate(plan.parts):
            held = [part for part in parts if (layer, part, step) in plan.cells]
            if len(held) != (len(parts) if layer >= first else 0):
                raise InvalidValue(
                    f"At step {step} the plan holds {' and '.join(held) or 'nothing'} in layer "
                    f"{layer}; cache-dit can hold only whole steps, all of layers {first} to "
                    f"{len(plan.parts) - 1} or nothing."
                )
    return {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": 0,
        "steps_computation_mask": [int(step not in steps) for step in range(plan.steps)],
        "steps_computation_policy": "static",
    }


def script(plan: Plan) -> str:
    """See `Plan.to_script`."""
    if plan.model["class"] != "DiTTransformer2DModel":
        raise InvalidValue(
            f"The plan is for a {plan.model['class']}; a file can be written for diffusers' "
            "DiTTransformer2DModel alone. Run it by dit_lens.reuse(pipe, plan)."
        )
    cells = [
        f"({layer}, {part!r}): {set(sorted(steps))},"
        for (layer, part), steps in sorted(plan.held.items())
    ]
    lines = max(1, LINES - SCRIPT.count("\n"))
    each = -(-len(cells) // lines) or 1  # several to a line, so that the file stays a page
    held = (" ".join(cells[i : i + each]) for i in range(0, len(cells), each))
    return SCRIPT.format(times=list(plan.timesteps), held="\n".join(f"    {line}" for line in held))


SCRIPT = '''"""Runs a reuse plan on diffusers' DiTTransformer2DModel, written by dit_lens:
`with plan(pipe.transformer): pipe(...)`. Held parts add what they added the step before."""

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
        t = float(kwargs["timestep"].flatten()[0])
        if t == now["t"]:
            raise RuntimeError("this plan needs one call a step")
        now["step"], now["t"] = (now["step"] + 1) % len(TIMESTEPS), t
        if abs(TIMESTEPS[now["step"]] - t) > 1e-3 * max(TIMESTEPS):
            raise RuntimeError(f"timestep {{t}}; the plan has {{TIMESTEPS[now['step']]}} here")

    def block_forward(block, i, x, timestep=None, class_labels=None, **_):
        def added(part, make):
            if now["step"] not in HELD.get((i, part), ()):
                kept[i, part] = make()
            return kept[i, part]

        if all(now["step"] in HELD.get((i, part), ()) for part in ("attn", "mlp")):
            return x + kept[i, "attn"] + kept[i, "mlp"]
        n, gate, shift, scale, gate_mlp = block.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype)
        x = x + added("attn", lambda: gate[:, None] * block.attn1(n))
        return x + added("mlp", lambda: gate_mlp[:, None] * block.ff(
            block.norm3(x) * (1 + scale[:, None]) + shift[:, None]))

    handle = transformer.register_forward_pre_hook(count, with_kwargs=True)
    blocks = transformer.transformer_blocks
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(block_forward, block, i)
        yield transformer
    finally:
        handle.remove()
        for block in blocks:
            vars(block).pop("forward", None)
'''
