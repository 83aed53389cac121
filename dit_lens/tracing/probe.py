"""Probes: measurements that run inside the forward pass and keep only what they reduce to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.names import NamesFilter, layer_of
from ..model.call import Call

if TYPE_CHECKING:
    import xarray as xr

    from ..model.hooked import HookedDiT

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """Where and when an activation was seen.

    Attributes:
        name: the full hook name.
        layer: its block, or None before and after the blocks.
        step: 0 is the first, noisiest step of the trace.
        grid: height and width of the token grid, for video frames before them.
    """

    name: str
    step: int
    grid: tuple[int, ...]
    call: Call
    null_class: int

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def timestep(self) -> float:
        """The diffusion timestep of this call (of its first item, should they differ)."""
        return self._once("timestep", lambda: float(self.call.t[0]))

    @property
    def labels(self) -> Tensor | None:
        """The class, or the number of the prompt, of each batch item; None where the model was
        called with a condition of its own.
        """
        return self.call.labels

    @property
    def branch(self) -> tuple[str, ...]:
        """For each batch item "cond" or "uncond" (of guidance), as the running pipeline or the
        labels tell; "" if nothing does.

        "skip" are items of the extra pass of skip-layer guidance.
        """

        def find() -> tuple[str, ...]:
            items = len(self.call.x)
            if self.call.branch is not None:
                return self.call.branch
            if self.call.labels is None:
                return ("",) * items
            labels = self.call.labels.expand(items).tolist()
            return tuple("uncond" if y == self.null_class else "cond" for y in labels)

        return self._once("branch", find)

    @property
    def twin(self) -> tuple[str, ...]:
        """For each batch item "A" or "B" in a run of twins, otherwise ""."""
        return self.call.twin or ("",) * len(self.call.x)

    def where(self, *, branch: str | None = None, twin: str | None = None) -> Tensor:
        """The batch positions of one branch and/or twin: `activation[site.where(twin="A")]`."""

        def find() -> Tensor:
            items = enumerate(zip(self.branch, self.twin, strict=True))
            keep = [i for i, (b, w) in items if branch in (None, b) and twin in (None, w)]
            return torch.tensor(keep, dtype=torch.long, device=self.call.x.device)

        return self._once(("where", branch, twin), find)

    def _once(self, key: Any, find: Callable[[], T]) -> T:
        """Looked up once a call and not at every layer: reading a tensor's values makes a GPU wait."""
        if key not in self.call.memo:
            self.call.memo[key] = find()
        found: T = self.call.memo[key]
        return found


class Probe:
    """Subclass this: say which hook points in `names`, reduce each activation in `observe`, give
    the answer in `result`.

        class Norms(dit_lens.Probe):
            names = "resid_post"
            def start(self, model): self.norm = {}
            def observe(self, activation, site): self.norm[site.layer, site.step] = activation.norm(dim=-1).mean().item()
            def result(self): ...                         # an xarray.Dataset

        with dit_lens.trace(model, probes=[Norms()]) as t: ...
        t.probes[0].result()

    `observe(activation, site)` gets the live tensor, detached, in the middle of the forward pass:
    read it, reduce it, do not keep or change it. It is called for each name at every step, with the
    whole batch ([cond | uncond], [A | B]); `site` tells which item is which. One probe watches one
    run; `start(model)` is called first and must forget the last.
    """

    names: NamesFilter = None

    def start(self, model: HookedDiT) -> None:
        """Called when a trace opens: forget earlier runs, look up sizes."""

    def observe(self, activation: Tensor, site: Site) -> None:
        """Called inside the forward pass with [batch, ...] at each of `names`."""
        raise NotImplementedError(
            f"{type(self).__name__} must define observe(self, activation, site)."
        )

    def result(self) -> xr.Dataset:
        """What was measured, with named dimensions."""
        raise NotImplementedError(f"{type(self).__name__} must define result(self).")


def registered_probes() -> dict[str, Any]:
    """Every installed probe by name, from the entry-point group `dit_lens.probes`: built in and
    strangers' alike.
    """
    from importlib.metadata import entry_points

    return {e.name: e for e in sorted(entry_points(group="dit_lens.probes"), key=lambda e: e.name)}


def load_probe(name: str) -> type[Probe]:
    """The probe class registered under a name. Raises ValueError with the nearest names."""
    import difflib

    probes = registered_probes()
    if name not in probes:
        near = difflib.get_close_matches(name, probes, n=3, cutoff=0.3) or sorted(probes)
        raise InvalidValue(f"No probe is called {name!r}; installed: {', '.join(map(repr, near))}.")
    probe: type[Probe] = probes[name].load()
    if not (isinstance(probe, type) and issubclass(probe, Probe)):
        raise InvalidValue(
            f"The entry point {name!r} is {probe!r}, which is not a subclass of dit_lens.Probe."
        )
    return probe
