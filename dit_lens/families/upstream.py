"""Whether diffusers' blocks still are what our forwards repeat.

A family's forwards compute what diffusers' own did when they were written. A newer diffusers may
compute something else under the same name, and hooks would then show numbers of a model that nobody
runs. So each family notes a digest of every method it repeats. Where one differs, the family is put
to the test on its own small models: if every output still is bit for bit that of the unopened
model, only the wording has changed and nothing is said; if not, the model is refused.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn

from ..errors import InvalidState
from ..hooks.points import Observer
from .base import Family
from .forwards import Forward
from .small import flat, small_inputs


@cache
def digest(function: Any) -> str:
    """Eight hex digits of a function's source without blank lines and comment lines.

    Args:
        function: a function or method.
    """
    lines = (
        line.rstrip()
        for line in textwrap.dedent(inspect.getsource(inspect.unwrap(function))).splitlines()
    )
    text = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def methods(forwards: Sequence[Forward]) -> dict[str, str]:
    """The digests that a family has to note: of the forward of each class it replaces, and of their
    attention processors.

    Args:
        forwards: a family's forwards.
    """
    found = {}
    for forward in forwards:
        cls = type(forward.module)
        if cls.__module__.startswith("diffusers") and forward.repeats:
            found[f"{cls.__name__}.forward"] = digest(cls.forward)
            processor = getattr(forward.module, "processor", None)
            if processor is not None:
                found[f"{type(processor).__name__}.__call__"] = digest(type(processor).__call__)
    return dict(sorted(found.items()))


def check_sources(
    family: Family, forwards: Sequence[Forward], opened: Callable[[nn.Module], Any]
) -> None:
    """Refuse a model of which a method that the family repeats has changed, and with it what the
    model computes.

    Args:
        family: the model's family.
        forwards: its forwards for the model.
        opened: puts the family's forwards into a model, whatever they repeat.

    Raises:
        InvalidState: if the family's small models, opened, do not answer as unopened.
    """
    now = methods(forwards)
    changed = [
        name for name, value in now.items() if family.written_for.get(name) not in (value, None)
    ]
    if not changed:
        return
    key = str(now)
    if key not in family.verdicts:
        family.verdicts[key] = _difference(family, opened)
    if family.verdicts[key]:
        raise InvalidState(
            f"{changed[0]} of diffusers {diffusers.__version__} is not what dit_lens repeats for "
            f"{family.model_class}: {family.verdicts[key]}. Install the diffusers that this "
            "dit_lens was tested with, or a newer dit_lens."
        )


def _difference(family: Family, opened: Callable[[nn.Module], Any]) -> str:
    """What differs on the family's small models between the opened and the unopened one; empty if
    nothing.
    """
    for variant in range(3):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                plain, condition = family.small(variant)
            inputs = small_inputs(family, plain, condition)
            other = copy.deepcopy(plain)
            instrumentation = opened(other)
            with torch.no_grad():
                want, got = (flat(family.call(m, inputs)) for m in (plain, other))
                for name in instrumentation.points:
                    instrumentation.attach(name, Observer(lambda _, point: None))
                seen = flat(family.call(other, inputs))
        except Exception as error:  # whatever a changed block may raise
            first = str(error).partition("\n")[0]
            return f"its small model {variant} fails ({type(error).__name__}: {first})"
        if not (torch.equal(want, got) and torch.equal(want, seen)):
            return f"on its small model {variant} the opened model's answer is another"
    return ""
