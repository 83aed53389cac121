"""Knocking layers out of a run: what they add to their streams is replaced, at every step or in a
window of steps, by something that knows nothing of the item.

What comes in its place is said by `how`, and the three answer different questions:

- "zero": nothing, so that the streams leave the layer as they came. It takes away the layer's
  constant part too, which may be all that the later layers need of it.
- "mean": the mean over the run's items at that step. The constant part stays.
- "resample": what the layer adds for another item of the same label at that step. The size of the
  addition stays as well, and belongs to another image.

Means and other items are those of the knocked-out run itself, as it goes, as in `trace.ablate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidType, InvalidValue
from ..hooks.hold import require_parts
from ..hooks.names import additions, site_of
from ..model.hooked import HookedDiT
from ..model.pinned import sent
from ..patching.patch import moved, tiles
from ..sampling.guidance import n_passes
from ..sampling.run import Run
from ..sampling.settings import Edits

Part = Literal["layer", "attn", "mlp"]
How = Literal["zero", "mean", "resample"]
STREAMS = ("", "text.")


def added_by(model: HookedDiT, layer: int, part: Part = "layer") -> list[str]:
    """The hook names of what a layer adds to the image's stream and to the text's.

    Args:
        model: the opened model.
        layer: the block; negative ones count from the end.
        part: "layer" for everything; "attn" or "mlp" for those additions alone.

    Returns:
        list[str]: in forward order, the image's stream first.

    Raises:
        InvalidValue: for a layer or a part that does not exist.
        InvalidState: for a model that is opened by the boundaries of its modules.

    >>> import dit_lens; added_by(dit_lens.load("digits"), 5)
    ['blocks.5.hook_attn_out', 'blocks.5.hook_mlp_out']
    """
    (layer,) = arguments.layers([layer], model.cfg.n_layers)
    arguments.choice("part", part, get_args(Part))
    require_parts(model.names)
    found = [
        name
        for stream in STREAMS
        for place in additions(model.names, stream)
        if place.layer == layer
        for name in place.added
    ]
    chosen = [name for name in found if part in ("layer", _kind(name))]
    if not chosen:
        raise InvalidValue(
            f"Layer {layer} has no {part!r} part to knock out by itself; it adds "
            f"{', '.join(map(repr, found))}. Use part='layer'."
        )
    return chosen


def _kind(name: str) -> str:
    """What an addition is of: "attn", "mlp", or "attn mlp" if it holds both."""
    words = site_of(name).rpartition("hook_")[2].split("_")
    return " ".join(kind for kind in ("attn", "mlp") if any(w.startswith(kind) for w in words))


def knocked_out(
    run: Run,
    layers: Sequence[int],
    part: Part = "layer",
    direct: bool = False,
    *,
    how: How = "zero",
    window: range | None = None,
    seed: int = 0,
) -> Run:
    """The run again, from the same start and with the same noise, without what these layers add to
    their streams.

    Args:
        run: from `dit_lens.sample`, or a twin.
        layers: the blocks, negative ones from the end; none gives the run itself.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        direct: take the additions off the image's stream after the last layer only, so that the
            layers between work on as if nothing were missing: the direct effect. What the whole
            knock-out does beyond that is mediated by those layers.
        how: what comes in their place: nothing ("zero"), their mean over the run's items at that
            step ("mean"), or those of another item of the same label at that step ("resample").
        window: a range of steps, one after the other; None is every step.
        seed: of the other items; no item stays where it is.

    Returns:
        Run: as long as the first.

    Raises:
        InvalidValue: for a layer or a part that does not exist, a window that is none, or a label
            with one item only and how="resample".

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=2)
    >>> bool((knocked_out(run, [5]).x0 != run.x0).any())
    True
    """
    arguments.instance("run", run, Run, "a run of dit_lens.sample, or a twin")
    arguments.flag("direct", direct)
    arguments.choice("how", how, get_args(How))
    seed = arguments.seed("seed", seed)
    layers = arguments.layers(layers, run.model.cfg.n_layers, fewest=0)
    names = [name for layer in layers for name in added_by(run.model, layer, part)]
    span = checked_window(window, run.settings.steps)
    instead = _instead(run, how, seed) if names else torch.zeros_like
    edits = _directly(run, names, instead) if direct else _wholly(names, instead)
    return run.replay(span[0], edits, until=span[-1] + 1) if edits else run.replay(0)


def checked_window(window: Any, steps: int, first: int = 0) -> range:
    """A window of steps without gaps, None being all; raises InvalidValue or InvalidType for
    anything else.

    Args:
        window: a range or None.
        steps: of the run.
        first: step that it may begin with.
    """
    if window is None:
        return range(first, steps)
    expected = f"a range of steps within {first} to {steps - 1}, without gaps"
    if not isinstance(window, range):
        raise InvalidType(f"window={arguments.shown(window)} can't be used; expected {expected}.")
    inside = len(window) and first <= window[0] and window[-1] < steps
    if not inside or (len(window) > 1 and window.step != 1):
        raise InvalidValue(f"window={window} can't be used; expected {expected}.")
    return range(window[0], window[-1] + 1)


def windows_of(windows: Any, first: int, steps: int) -> list[range]:
    """Windows of a run from a step on: ranges, or how many equal ones to cut it into.

    Args:
        windows: ranges, or a number; None is as many as `tiles` takes by itself.
        first: step.
        steps: of the run.
    """
    if windows is None:
        return tiles(first, steps)
    if arguments.is_whole(windows):
        return tiles(first, steps, arguments.whole("windows", windows, 1, steps - first))
    spans = arguments.listed("windows", windows, "ranges of steps, or how many of them")
    return arguments.unlike("windows", [checked_window(span, steps, first) for span in spans])


def _instead(run: Run, how: How, seed: int) -> Callable[[Tensor], Tensor]:
    """What comes in place of an addition [batch, ...], the batch [cond | null] with guidance."""
    if how == "zero":
        return torch.zeros_like
    passes = n_passes(run.model, run.settings.guidance)
    order = others(run.labels, seed) if how == "resample" else None

    def half(added: Tensor) -> Tensor:
        if order is None:
            return added.mean(0, keepdim=True).expand_as(added)
        return added[sent(order, added.device)]

    return lambda added: torch.cat([half(each) for each in added.chunk(passes)])


def others(labels: Tensor, seed: int) -> Tensor:
    """Another item of the same label for each item, [item]: in each label one cycle at random.

    Args:
        labels: [item].
        seed: of the cycles.

    Raises:
        InvalidValue: for a label that only one item has.

    >>> others(torch.tensor([5, 7, 7, 5]), 0).tolist()
    [3, 2, 1, 0]
    """
    order = torch.arange(len(labels))
    for number, label in enumerate(labels.unique().tolist()):
        here = torch.nonzero(labels.cpu() == label)[:, 0]
        if len(here) < 2:
            raise InvalidValue(
                f"how='resample' takes what another item of the same label adds, and label {label} "
                "has 1 item; expected 2 or more, or how='mean'."
            )
        order[here] = here[moved(len(here), seed + number)]
    return order


def _wholly(names: Sequence[str], instead: Callable[[Tensor], Tensor]) -> Edits:
    def replace(added: Tensor, hook: Any) -> Tensor:
        return instead(added)

    replace.in_parts = instead is torch.zeros_like  # type: ignore[attr-defined]
    return [(name, replace) for name in names]


def _directly(run: Run, names: Sequence[str], instead: Callable[[Tensor], Tensor]) -> Edits:
    """The layers work on; the stream that the output is read from lacks what they added."""
    # the output is read from the image's stream alone
    own = [name for name in names if site_of(name).startswith("hook_")]
    last = f"blocks.{run.model.cfg.n_layers - 1}.hook_resid_post"
    missing: list[Tensor] = []

    def keep(added: Tensor, hook: Any) -> None:
        if hook.name == own[0]:  # an earlier pass may have stopped before the last layer
            missing.clear()
        missing.append(added - instead(added))

    def take_off(stream: Tensor, hook: Any) -> Tensor:
        left = stream - torch.stack(missing).sum(0) if missing else stream
        missing.clear()
        return left

    fn: Any
    for fn in (keep, take_off):
        fn.in_parts = instead is torch.zeros_like

    return [*((name, keep) for name in own), (last, take_off)] if own else []
