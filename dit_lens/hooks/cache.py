"""The activations of one forward pass, by name: what `run_with_cache` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..arguments import text
from .names import Key, UnknownName, layer_of, resolve, select


class ActivationCache(Mapping[str, Tensor]):
    """Recorded activations in forward order, read like TransformerLens's cache.

    `cache["blocks.5.hook_resid_post"]` and `cache["resid_post", 5]` are one tensor;
    `cache.stack("resid_post")` has every recorded layer along a new first axis.

    Args:
        activations: by hook name, in forward order.

    Raises:
        UnknownName: for what was not recorded, with the nearest that was.

    >>> import torch; cache = ActivationCache({"blocks.0.hook_resid_post": torch.zeros(1, 4, 8)})
    >>> cache["resid_post", 0].shape, cache.stack("resid_post").shape
    (torch.Size([1, 4, 8]), torch.Size([1, 1, 4, 8]))
    """

    def __init__(self, activations: dict[str, Tensor]) -> None:
        self._activations = activations

    def __getitem__(self, key: Key) -> Tensor:
        return self._activations[resolve(key, list(self._activations))]

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
            {name: value.to(device) for name, value in self._activations.items()}
        )

    def __repr__(self) -> str:
        mb = sum(v.numel() * v.element_size() for v in self._activations.values()) / 1e6
        return f"ActivationCache({len(self)} activations, {mb:.1f} MB)"
