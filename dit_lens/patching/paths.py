"""Path patching: what a layer does to the outcome directly, or through one later layer alone.

Patching a layer's output moves the outcome in every way at once: through all that read it. A path
is one of these ways (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv
2304.05969). At every step of the window

1. the sender puts out what it does in the source, everything between it and the receiver what it does in the target at that x_t; so the
   receiver is told the sender's news by the stream alone, and answers;
2. with that answer, and nothing else changed, the target's step is taken.

Without a receiver the sender's news reaches only the last layer, which is the direct effect on the
output; what is left of the whole effect is mediated by later layers. The next x_t differs, and from
there on everything runs freely, as in any patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.points import HookPoint, Observer
from ..model.hooked import HookedDiT
from ..sampling.guidance import model_inputs
from ..sampling.loop import denoise
from ..sampling.run import Run
from ..sampling.settings import check_step, edits_at
from .sweep import Patch, sweep

Point = tuple[str, int]
"""What a layer adds to the stream, such as "attn_out" or "mlp_out", and the layer."""


def path_patch(
    source: Run, target: Run, sender: Point, receiver: Point | None, steps: range
) -> Tensor:
    """The target's finished latents [item, c, h, w] if the sender's output in `source` reached it
    by one path only, at these steps.

    Args:
        source, target: runs of one model with the same settings; see
            `dit_lens.patching.sweep.sweep`, which says what fits.
        sender: ("attn_out", 5), say.
        receiver: a later one, or None for the direct effect on the output.

    Raises:
        ValueError: for runs that do not fit each other, points that are none, or a receiver that
            does not come after the sender.

        finished = path_patch(twins.a, twins.b, ("attn_out", 5), ("mlp_out", 9), range(25, 30))
    """
    model = target.model
    sweep(source, target, [Patch("attn_out", 0, range(0))])  # refuses what does not fit
    if not model.cfg.restartable:
        raise InvalidValue(
            f"The blocks of {type(model.transformer).__name__} hand on more than the image's "
            "stream, which would carry the news past "
            "what is frozen; expected a model of one stream, such as DiT or PixArt. A whole patch "
            "works: dit_lens.patching.sweep.sweep."
        )
    all_points = [_point(name) for name in model.names if ADDED.fullmatch(name)]
    sites = list(dict.fromkeys(site for site, _ in all_points))
    for point in (sender, *([receiver] if receiver is not None else [])):
        if tuple(point) not in all_points:
            what = " or ".join(map(repr, sites))
            raise InvalidValue(
                f"{point!r} is no end of a path; expected ({what}, a layer from 0 to "
                f"{model.cfg.n_layers - 1})."
            )
    first, last = (
        all_points.index(sender),
        len(all_points) if receiver is None else all_points.index(receiver),
    )
    if last <= first:
        raise InvalidValue(
            f"The receiver {receiver!r} does not come after the sender {sender!r}, so nothing goes "
            "from one to the other."
        )
    for step in steps:
        check_step(step, target.settings.steps)
    between = [_name(point) for point in all_points[first + 1 : last]]
    begin = steps[0] if len(steps) else target.settings.steps
    for run in (source, target):
        run.require_released(begin)
    scheduler, x = target.scheduler_at(begin), target.latents[begin]
    for step in range(begin, target.settings.steps):
        edits: list[Any] = []
        if step in steps:
            with torch.no_grad(), model.hooks(edits_at(target.history, step)):
                said = _read(source, source.latents[step], step, [_name(sender)])
                frozen = _read(target, x, step, between)
                told: list[Any] = [(name, _put(value)) for name, value in (said | frozen).items()]
                if receiver is None:
                    edits = told
                else:
                    with model.hooks(told):
                        answer = _read(target, x, step, [_name(receiver)])
                    edits = [(name, _put(value)) for name, value in answer.items()]
        with model.hooks(edits):
            past = (target.labels, target.history, target.settings, scheduler)
            x = next(denoise(model, x, *past, step, step + 1)).following
    return x


ADDED = re.compile(r"blocks\.(\d+)\.hook_(\w+_out)")
"""The hook points whose value is added to the stream, in forward order."""


def _point(name: str) -> Point:
    found = ADDED.fullmatch(name)
    assert found is not None
    return found[2], int(found[1])


def _name(point: Point) -> str:
    return f"blocks.{point[1]}.hook_{point[0]}"


def _put(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda activation, hook: value


def _read(run: Run, x: Tensor, step: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of one forward at x_t, after whatever edits are in force."""
    seen: dict[str, Tensor] = {}
    if not names:
        return seen
    model: HookedDiT = run.model

    def keep(value: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = value.clone()

    handles = [model.instrumentation.attach(name, Observer(keep)) for name in names]
    try:
        model(*model_inputs(model, x, run.timesteps[step], run.labels, run.settings.guidance))
    finally:
        for handle in handles:
            handle.remove()
    return seen
