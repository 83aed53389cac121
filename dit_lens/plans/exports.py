"""Plans for other tools: SmoothCache's schedule, cache-dit's mask of steps, and a file of plain
diffusers.
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidValue
from ..families import family_named
from ..families.dit_script import SCRIPT

LINES = 60
"""How long the file of plain diffusers may be."""


def _refuse_lines(plan: Any, tool: str) -> None:
    """Raise InvalidValue for a plan that holds cells along lines."""
    if plan.lines:
        raise InvalidValue(
            f"The plan holds {len(plan.lines)} cells along lines, which {tool} can't say; expected "
            "one without, such as reuse_plan(model, lines=False) makes."
        )


def smoothcache(plan: Any) -> dict[str, list[int]]:
    """See `Plan.to_smoothcache`."""
    _refuse_lines(plan, "SmoothCache")
    family = family_named(plan.model["class"])
    computes = {} if family is None else family.computes
    unknown = sorted({part for parts in plan.parts for part in parts} - set(computes))
    if unknown:
        raise InvalidValue(
            f"{plan.model['class']} does not say which modules compute {unknown[0]!r}, so "
            "SmoothCache can't be told; expected a family with `computes` for it."
        )
    return {
        f"{module}-{layer}": [
            int(step not in plan.held.get((layer, part), ())) for step in range(plan.steps)
        ]
        for layer, parts in enumerate(plan.parts)
        for part in parts
        for module in computes[part]
    }


def cache_dit(plan: Any) -> dict[str, Any]:
    """See `Plan.to_cache_dit`."""
    _refuse_lines(plan, "cache-dit's mask of steps")
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


def script(plan: Any) -> str:
    """See `Plan.to_script`."""
    if plan.model["class"] != "DiTTransformer2DModel":
        raise InvalidValue(
            f"The plan is for a {plan.model['class']}; a file can be written for diffusers' "
            "DiTTransformer2DModel alone. Run it by dit_lens.reuse(pipe, plan)."
        )
    cells = [
        f"({layer}, {part!r}): {_spelled(plan, layer, part, steps)},"
        for (layer, part), steps in sorted(plan.held.items())
    ]
    lines = max(1, LINES - SCRIPT.count("\n"))
    each = -(-len(cells) // lines) or 1  # several to a line, so that the file stays a page
    held = (" ".join(cells[i : i + each]) for i in range(0, len(cells), each))
    return SCRIPT.format(times=list(plan.timesteps), held="\n".join(f"    {line}" for line in held))


def _spelled(plan: Any, layer: int, part: str, steps: frozenset[int]) -> str:
    """A part's held steps, with whether each is along a line."""
    return str({step: int((layer, part, step) in plan.lines) for step in sorted(steps)})
