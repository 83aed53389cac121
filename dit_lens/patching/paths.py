"""Path patching: what a layer does to the outcome directly, or through one later layer alone.

Patching a layer's output moves the outcome in every way at once: through all that read it. A path
is one of these ways (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv
2304.05969). At every step of the window

1. the sender puts out what it does in the source, and everything between it and the receiver what
   it does in the target at that x_t; so the receiver sees the sender's change only through the
   residual stream;
2. with what the receiver then puts out, and nothing else changed, the target's step is taken.

Without a receiver the sender's change reaches only the last layer, which is the direct effect on
the output; what is left of the whole effect is mediated by later layers. The next x_t differs, and
from there on everything runs freely, as in any patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..hooks.names import additions, site_of
from ..hooks.points import HookFunction, HookPoint
from ..model.hooked import HookedDiT
from ..sampling.guidance import model_inputs
from ..sampling.loop import denoise
from ..sampling.run import Run
from ..sampling.settings import check_step, edits_at
from .sweeps import check_kind_of_runs, check_runs

Point = tuple[str, int]
"""What a layer adds to the image's stream, such as "attn_out" or "mlp_out", and the layer."""


def path_patch(
    source: Run, target: Run, sender: Point, receiver: Point | None, steps: range
) -> Tensor:
    """The target's finished latents if the sender's output in `source` reached it by one path only,
    at these steps.

    Args:
        source: the run that the sender's output is taken from, such as twin A.
        target: the run that is patched, such as twin B; see `check_runs` for what fits.
        sender: ("attn_out", 5), say.
        receiver: a later one, or None for the direct effect on the output.
        steps: the window, 0 the noisiest.

    Returns:
        Latents, [item, channel, height, width].

    Raises:
        ValueError: for runs that do not fit each other, points that add nothing to the stream, or a
            receiver that does not come after the sender.
        RuntimeError: if the weights have changed since.

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=1, steps=3)
    >>> path_patch(pair.a, pair.b, ("attn_out", 5), ("mlp_out", 9), range(1, 2)).shape
    torch.Size([2, 1, 16, 16])
    """
    # What is asked for fits the runs and the model.
    check_kind_of_runs(source, target)
    model = target.model
    if not model.cfg.restartable:
        raise InvalidValue(
            f"The blocks of {type(model.transformer).__name__} hand on more than the image's "
            "stream, which would carry the sender's change past what is frozen; expected a model "
            "of one stream, such as DiT or PixArt. A whole patch works: dit_lens.patching.sweep."
        )
    points = [
        (site_of(name).removeprefix("hook_"), layer)
        for layer, _, added, _ in additions(model.names)
        for name in added
    ]
    sender = _point("sender", sender)
    receiver = None if receiver is None else _point("receiver", receiver)
    for point in (sender, *([receiver] if receiver is not None else [])):
        if point not in points:
            sites = " or ".join(map(repr, dict.fromkeys(site for site, _ in points)))
            raise InvalidValue(
                f"{point!r} is no end of a path; expected ({sites}, a layer from 0 to "
                f"{model.cfg.n_layers - 1})."
            )
    first = points.index(sender)
    last = len(points) if receiver is None else points.index(receiver)
    if last <= first:
        raise InvalidValue(
            f"The receiver {receiver!r} does not come after the sender {sender!r}, so nothing goes "
            "from one to the other."
        )
    steps = arguments.instance("steps", steps, range, "a range of steps, such as range(20, 25)")
    for step in steps:
        check_step(step, target.settings.steps)
    begin = min(steps, default=target.settings.steps)
    for run in (source, target):
        run.require_released(begin)
    check_runs(source, target)

    # The target's run from there on, each step of the window with one path patched.
    between = [_name(point) for point in points[first + 1 : last]]
    scheduler, x = target.scheduler_at(begin), target.here(target.latents[begin])
    for step in range(begin, target.settings.steps):
        edits: list[tuple[str, HookFunction]] = []
        if step in steps:
            with torch.no_grad(), model.hooks(edits_at(target.history, step)):
                theirs = source.here(source.latents[step])
                sent = _activations(source, theirs, step, [_name(sender)])
                edits = _constants(sent | _activations(target, x, step, between))
                if receiver is not None:
                    with model.hooks(edits):
                        answer = _activations(target, x, step, [_name(receiver)])
                    edits = _constants(answer)
        with target.restored(), model.hooks(edits):
            past = (target.labels, target.history, target.settings, scheduler)
            x = next(denoise(model, x, *past, step, step + 1)).following
    return x


def _point(name: str, given: Any) -> Point:
    """One end of a path, its layer in Python's type."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not arguments.is_whole(given[1]):
        expected = "a site and a layer, such as ('attn_out', 5)"
        raise arguments.refusal(name, given, expected, wrong_type=True)
    return arguments.text(name, given[0]), int(given[1])


def _name(point: Point) -> str:
    return f"blocks.{point[1]}.hook_{point[0]}"


def _constants(values: Mapping[str, Tensor]) -> list[tuple[str, HookFunction]]:
    """Hooks that put these values in, whatever is computed there."""

    def put(_: Tensor, hook: HookPoint) -> Tensor:
        return values[hook.name]

    return [(name, put) for name in values]


def _activations(run: Run, x: Tensor, step: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of one forward at x_t, after whatever edits are in force."""
    seen: dict[str, Tensor] = {}
    if not names:
        return seen
    model: HookedDiT = run.model

    def keep(value: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = value.clone()

    with run.restored(), model.observing(list(names), keep):
        model(*model_inputs(model, x, run.timesteps[step], run.labels, run.settings.guidance))
    return seen
