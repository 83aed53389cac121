"""What a module's answers depend on besides its inputs, as far as it can be seen at a glance.

It proves nothing (that is for witnesses); it names the likely cause when a recomputation departs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hooks.points import version

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
TENSORS = ("_parameters", "_buffers")
NUMBERS = (bool, int, float)


class Glance(NamedTuple):
    """What is seen of a parameter or buffer without reading it."""

    version: int
    dtype: torch.dtype
    device: torch.device
    place: int

    @classmethod
    def of(cls, x: Tensor) -> Glance:
        """It now."""
        return cls(version(x), x.dtype, x.device, x.data_ptr())

    def became(self, now: Glance) -> bool:
        """Whether it is the same, moved to another device maybe, as offloading does."""
        return self[:2] == now[:2] and (self.device != now.device or self.place == now.place)


@dataclass(frozen=True)
class State:
    """A glance at a module.

    Attributes:
        tensors: each parameter and buffer, by name.
        hooks: the module hooks of each module.
        adapters: each adapter layer's active adapters, and whether it is switched off or merged.
        settings: each module's plain numbers, such as `eps`.
    """

    tensors: Mapping[str, Glance]
    hooks: Mapping[str, tuple[int, ...]]
    adapters: Mapping[str, str]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, root: nn.Module) -> State:
        """A glance at it now."""
        tensors, hooks, adapters, settings = {}, {}, {}, {}
        for name, module in root.named_modules():
            own, prefix = vars(module), f"{name}." if name else ""
            for kind in TENSORS:
                for key, value in own[kind].items():
                    if value is not None:
                        tensors[prefix + key] = Glance.of(value)
            if attached := [key for kind in HOOKS for key in own[kind]]:
                hooks[name] = tuple(attached)
            for key, value in own.items():
                if type(value) in NUMBERS and key[0] != "_":
                    settings[prefix + key] = value
            if hasattr(type(module), "active_adapters"):  # asking the module itself is slow
                adapters[name] = _adapters(module)
        return cls(tensors, hooks, adapters, settings)

    def changes(self, now: State) -> list[str]:
        """What is different now, each in a few words. Weights on another device are the same."""
        found = []
        for what, before, after in (
            ("adapters", self.adapters, now.adapters),
            ("weights or buffers", self.tensors, now.tensors),
            ("module hooks", self.hooks, now.hooks),
            ("settings", self.settings, now.settings),
        ):
            odd = [k for k in {**before, **after} if not _same(before.get(k), after.get(k))]
            if odd:
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                found.append(f"the {what} at {odd[0]!r}{more} changed")
        return found


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, Glance) and isinstance(now, Glance):
        return before.became(now)
    return bool(before == now)


def _adapters(module: nn.Module) -> str:
    """Which adapters of a layer are active, and how."""
    active = getattr(module, "active_adapters", None)
    how = [getattr(module, each, None) for each in ("disable_adapters", "merged", "scaling")]
    return f"{active} {how}" if isinstance(active, (list, tuple)) else ""
