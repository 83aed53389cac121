"""What a plan costs: multiply-accumulates, counted in a forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..hooks.hold import parts
from ..model.hooked import HookedDiT
from ..model.state import State
from ..pieces.content import digest

Cell = tuple[int, str, int]
"""A layer, a part of it, and a step."""


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one forward for one item.

    Attributes:
        parts: of each part of each layer.
        rest: of each layer besides its parts, such as its modulation.
        whole: of the whole forward of the transformer.
    """

    parts: Mapping[tuple[int, str], float]
    rest: tuple[float, ...]
    whole: float

    @classmethod
    def of(cls, model: HookedDiT, y: Any = None) -> Costs:
        """Counted in a forward, and once for a model as it is.

        Args:
            model: the opened model.
            y: a condition for one item; by default the first of the model's own.
        """
        if y is not None:
            return cls._counted(model, y)
        y = model.conditions.numbers([0], model.device)
        # the first prompt of another pipeline of the transformer may be a longer one
        asked = model.cfg.latent_shape, digest(dict(model.conditions.of(y)))
        state, known = State.of(model.transformer), _COUNTED.get(model.transformer)
        if known is not None and known[0] == asked and not known[1].changes(state):
            return known[2]
        found = cls._counted(model, y)
        _COUNTED[model.transformer] = asked, state, found
        return found

    @classmethod
    def _counted(cls, model: HookedDiT, y: Any) -> Costs:
        blocks = model.family.blocks(model.transformer)
        names = {module: name for name, module in model.transformer.named_modules()}
        x = torch.zeros(1, *model.cfg.latent_shape, device=model.device, dtype=model.dtype)
        t = torch.full((1,), 500.0, device=model.device)
        counter = FlopCounterMode(display=False)
        # the fused kernels of some devices are not counted; this one is, and does the same work
        math = sdpa_kernel(SDPBackend.MATH)
        # alone: what open traces listen to has a cost of its own, and this is none of their steps
        with model.instrumentation.alone([]), math, counter, torch.no_grad():
            model(x, t.long() if model.cfg.n_classes else t, y)
        counts = counter.get_flop_counts()
        top = type(model.transformer).__name__

        def of_module(module: Any) -> float:
            return sum(counts.get(f"{top}.{names[module]}", {}).values()) / 2

        by_part: dict[tuple[int, str], float] = {}
        rest = []
        for i, block in enumerate(blocks):
            whole = of_module(block)
            own = parts(model.names, i)
            for part in own:
                children = [getattr(block, c, None) for c in model.family.computes.get(part, ())]
                found = sum(of_module(child) for child in children if child is not None)
                by_part[i, part] = whole if len(own) == 1 else found
            rest.append(whole - sum(by_part[i, part] for part in own))
        # and not what was counted in all: the first call also encodes the prompt
        return cls(by_part, tuple(rest), sum(counts[top].values()) / 2)

    def share(self, cells: Iterable[Cell], steps: int) -> float:
        """The share of the multiply-accumulates of a run that is left.

        Args:
            cells: that are held.
            steps: of the run.
        """
        cells = set(cells)
        held: dict[tuple[int, str], set[int]] = {place: set() for place in self.parts}
        saved = 0.0
        for layer, part, step in cells:
            saved += self.parts[layer, part]
            held[layer, part].add(step)
        for layer, rest in enumerate(self.rest):
            of_layer = [s for place, s in held.items() if place[0] == layer]
            saved += rest * len(set.intersection(*of_layer)) if of_layer else 0
        return float(np.clip(1 - saved / (self.whole * steps), 0, 1))


_COUNTED: WeakKeyDictionary[nn.Module, tuple[Any, State, Costs]] = WeakKeyDictionary()
"""What was counted last for a transformer: for which latents and condition, in which state, and the
costs.
"""
