"""What a diagnosis comes to, in words that claim no more than was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...measures.estimate import Estimate
from ...patching.patch import steps_text
from .chances import Chances
from .inside import Inside
from .pairs import Pairs
from .repair import COLLATERAL, Repair
from .where import Found

Kind = Literal["layer", "window", "noise", "no fault"]


def kind_of(base: Estimate, with_good: bool, pairs: Pairs | None, found: Found | None) -> Kind:
    """Which of the four it is.

    Args:
        base: the share of other seeds that have the fault.
        with_good: whether a good run was given.
        pairs: bad and good runs; None where none were found.
        found: where the fault arises; None where it was not looked for.
    """
    if not with_good and base.low > 0.5:
        return "no fault"
    if pairs is None or found is None or found.window is None:
        return "noise"
    return "layer" if found.blamed else "window"


def headline(
    kind: Kind, base: Estimate, n: int, seen: Chances, found: Found | None, pairs: Pairs | None
) -> str:
    """The verdict.

    Args:
        kind: of `kind_of`.
        base: the share of other seeds that have the fault.
        n: of how many.
        seen: the chance of the fault by the step up to which the past is shared.
        found: where it arises.
        pairs: bad and good runs.
    """
    if kind == "no fault":
        return (
            f"Not a fault of this run: {base:.0%} of {n} other seeds of its label have it too, so "
            "there is no good run of this model to compare it with; give one of another."
        )
    if kind == "noise":
        when = (
            "the start alone makes it more likely than not"
            if seen.from_the_start
            else _decided(seen)
        )
        blame = "no stack of layers takes it over from good to bad runs and back"
        if pairs is None:
            blame = "no good run with the same past was found"
        return f"The noise itself: {when}, and {blame}."
    assert found is not None and found.window is not None
    where = (
        f"steps {steps_text(found.window)}"
        if len(found.window) > 1
        else (f"step {found.window[0]}")
    )
    if kind == "window":
        best = f"{found.layers[0]} ({found.effects[0]:.2f})" if found.layers else "none"
        return (
            f"{where.capitalize()}, but no single layer: a stack of layers carries the fault there "
            f"({found.whole:.2f} of it); the layer that does most by itself is {best}."
        )
    named = " and ".join(str(layer) for layer in sorted(found.blamed))
    effects = {layer: e for layer, e in zip(found.layers, found.effects, strict=True)}
    if found.together is not None:
        return (
            f"Layers {named} together, {where}: put in from good runs, they take away, and put in "
            f"from bad runs, they make, this share of the fault: {found.together:.2f} "
            f"({_interval_words(pairs)})."
        )
    how = ", ".join(f"{effects[layer]:.2f}" for layer in sorted(found.blamed))
    return (
        f"Layer{'s' * (len(found.blamed) > 1)} {named}, {where}: put in from good runs, it takes "
        f"away, and put in from bad runs, it makes, this share of the fault: {how} "
        f"({_interval_words(pairs)})."
    )


def _interval_words(pairs: Pairs | None) -> str:
    n = pairs.n if pairs is not None else 0
    if n >= 8:
        return f"95 % for all layers compared, over {n} pairs"
    return f"the range over {n} pair{'s' * (n != 1)}, too few for an interval"


def _decided(seen: Chances) -> str:
    if seen.decided is None:
        last = seen.estimates[-1]
        return (
            f"with the past shared up to step {seen.steps[-1]} only {last:.0%} of {seen.of} runs "
            "have it"
        )
    return f"from step {seen.decided} on more than half of the runs with its past have it"


def lines(
    base: Estimate,
    n: int,
    seen: Chances,
    pairs: Pairs | None,
    insides: Sequence[Inside],
    repairs: Sequence[Repair],
    images: float,
) -> list[str]:
    """What else was measured, a line each.

    Args:
        base: the share of other seeds that have the fault.
        n: of how many.
        seen: the chance of the fault by the step up to which the past is shared.
        pairs: bad and good runs.
        insides: of the layers to blame.
        repairs: those that were tried, the best first.
        images: what it cost.
    """
    by = ", ".join(f"{step}: {e:.0%}" for step, e in zip(seen.steps, seen.estimates, strict=True))
    found = [
        f"Of {n} other seeds of the label {base:.0%} have the fault.",
        f"With the past shared up to a step ({seen.how}, {seen.of} each) it comes so often: {by}.",
    ]
    if pairs is not None and pairs.found:
        found.append(
            f"Compared with {pairs.n} near twins without it, whose past is shared and whose noise "
            f"is the same again from step {pairs.since} on."
        )
    for each in insides:
        found.append(_inside(each))
    found.append(_repaired(repairs))
    found.append(f"Cost: {images:.0f} images.")
    return found


def _inside(each: Inside) -> str:
    words = ", ".join(f"{name} {e:.2f}" for name, e in each.parts.items())
    text = f"In layer {each.layer}, each part by itself: {words}"
    if each.heads:
        by = ", ".join(f"{h} {e.value:.2f}" for h, e in enumerate(each.heads))
        text += f"; each head: {by}"
    if each.head is not None:
        text += f"; head {each.head} is enough"
    if each.covered is not None:
        text += f"; {len(each.covered)} tokens are enough: {list(each.covered)}"
    return text + "."


def _repaired(repairs: Sequence[Repair]) -> str:
    working = [r for r in repairs if r.works]
    if not repairs:
        return "No repair was tried: there is no layer to repair."
    if not working:
        tried = ", ".join(r.name for r in repairs)
        return f"It can't be repaired so; tried: {tried}."
    best = working[0]
    text = (
        f"Repair: {best.name}. The fault is gone (score {best.score:.2f}); what is not the fault "
        f"moved by {best.collateral:.2f} of two samples' distance"
    )
    if not best.tidy:
        text += f", more than {COLLATERAL:g}: it leaves another image"
    if best.cured is not None:
        text += f"; of other seeds with the fault it cures {best.cured:.0%}"
    if best.harmed is not None:
        text += f", and of those without it brings it to {best.harmed:.0%}"
    return text + "."
