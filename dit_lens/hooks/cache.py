"""The activations of one forward pass, by name: what `run_with_cache` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..arguments import text
from ..errors import InvalidState
from .names import Key, UnknownName, layer_of, resolve, select
from .points import HookPoint, version


class Caching:
    """Keeps the activations of one pass, as an observer of each.

    What comes after an activation in the pass may change it in place, so a copy is kept. One
    through which a gradient flows is kept itself: only that one can be asked for its gradient.

    Args:
        device: where they are kept; None is where they are.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = device
        self.kept: dict[str, tuple[Tensor, int]] = {}

    def keep(self, value: Tensor, point: HookPoint) -> None:
        """Keep an activation."""
        own = value.to(self.device or value.device, copy=not value.requires_grad)
        self.kept[point.name] = own, version(own)

    def values(self) -> dict[str, Tensor]:
        """What was kept, by hook name.

        Raises:
            InvalidState: if one through which a gradient flows was changed in place.
        """
        for name, (value, before) in self.kept.items():
            if version(value) != before:
                raise InvalidState(
                    f"{name!r} was changed in place after its hook point, by a module or a hook of "
                    "somebody else's; expected gradients off (torch.no_grad()), where a copy is "
                    "kept."
                )
        return {name: value for name, (value, _) in self.kept.items()}


class ActivationCache(Mapping[str, Tensor]):
    """Recorded activations in forward order, read like TransformerLens's cache.

    `cache["blocks.5.hook_resid_post"]` and `cache["resid_post", 5]` are one tensor;
    `cache.stack("resid_post")` has every recorded layer along a new first axis.

    Args:
        activations: by hook name, in forward order.
        depth: how many layers the model has, for ("resid_post", -1); None is those recorded.

    Raises:
        UnknownName: for what was not recorded, with the nearest that was.

    >>> import torch; cache = ActivationCache({"blocks.0.hook_resid_post": torch.zeros(1, 4, 8)})
    >>> cache["resid_post", 0].shape, cache.stack("resid_post").shape
    (torch.Size([1, 4, 8]), torch.Size([1, 1, 4, 8]))
    """

    def __init__(self, activations: dict[str, Tensor], depth: int | None = None) -> None:
        self._activations, self._depth = activations, depth

    def __getitem__(self, key: Key) -> Tensor:
        return self._activations[resolve(key, list(self._activations), self._depth)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except KeyError:
            return False
        return True

    def stack(self, site: str) -> Tensor:
        """One site of every recorded layer, [layer, ...].

        Args:
            site: a hook point without its layer, such as "resid_post".
        """
        found = select(text("site", site), list(self._activations))
        names = [n for n in found if layer_of(n) is not None]
        if not names:
            raise UnknownName(f"{site!r} is in no layer; expected a site such as 'resid_post'.")
        return torch.stack([self._activations[n] for n in names])

    def to(self, device: str | torch.device) -> ActivationCache:
        """The same activations on another device.

        Args:
            device: where they go.
        """
        return ActivationCache(
            {name: value.to(device) for name, value in self._activations.items()}, self._depth
        )

    def __repr__(self) -> str:
        mb = sum(v.numel() * v.element_size() for v in self._activations.values()) / 1e6
        return f"ActivationCache({len(self)} activations, {mb:.1f} MB)"
