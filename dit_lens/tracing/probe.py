"""Probes: measurements that run inside the forward pass and keep only what they reduce to."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import xarray as xr
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.names import NamesFilter
from ..model.hooked import HookedDiT
from ..sampling.sample import sample
from .site import Site
from .trace import trace


class Probe:
    """Subclass this: say which hook points in `names`, reduce each activation in `observe`, give
    the answer in `result`.

        class Norms(dit_lens.Probe):
            names = "resid_post"
            def start(self, model): self.norm = {}
            def observe(self, activation, site):
                self.norm[site.layer, site.step] = activation.norm(dim=-1).mean().item()
            def result(self): ...                         # an xarray.Dataset

        Norms().run(model, labels=[3, 7], steps=50)       # sample under observation

        with dit_lens.trace(pipe, probes=[Norms()]) as t: ...   # or watch any other run
        t.probes[0].result()

    `observe(activation, site)` gets the live tensor, detached, in the middle of the forward pass:
    read it, reduce it, do not keep or change it. It is called for each name at every step, with the
    whole batch ([cond | uncond], [A | B]); `site` tells which item is which. One probe watches one
    run; `start(model)` is called first and must forget the last.

    A probe that makes runs of its own, such as pairs of twins, defines `run` and leaves `names`
    empty.

    Attributes:
        names: which hook points are observed; None is all, () none.
        in_parts: whether `observe` may be given a step's batch in several parts, one call of it
            each, as it is with `batch=` (`site.rows` says which items; `dit_lens.Series` puts them
            together). If not, a run in parts is refused.
        of_twins: whether `run` makes pairs of twins and takes the settings of `dit_lens.twins`
            (`pairs`, `seed`), and not those of `dit_lens.sample` (`labels`, `seeds`).
        of_each_label: how many images of a label it needs, where nobody says what is sampled.
    """

    names: NamesFilter = None
    of_twins: bool = False
    of_each_label: int = 1
    in_parts: bool = False

    def start(self, model: HookedDiT) -> None:
        """Called when a trace opens: forget earlier runs, look up sizes.

        Args:
            model: what is traced.
        """

    def observe(self, activation: Tensor, site: Site) -> None:
        """Called inside the forward pass at each of `names`.

        Args:
            activation: [batch, ...], live and detached.
            site: where and when it was seen.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define observe(self, activation, site)."
        )

    def result(self) -> xr.Dataset:
        """What was measured, with named dimensions."""
        raise NotImplementedError(f"{type(self).__name__} must define result(self).")

    def run(self, model: Any, labels: Any = None, **settings: Any) -> xr.Dataset:
        """Sample under observation, and give the result.

        Args:
            model: a `HookedDiT`, or what it wraps.
            labels: one an image; by default eight, the classes or prompts in turn.
            **settings: those of `dit_lens.sample`: steps, seeds, guidance, scheduler, ...
        """
        model = HookedDiT.of(model)
        if labels is None:
            each = self.of_each_label
            labels = [i // each % model.conditions.n for i in range(8 * each)]
        with trace(model, probes=[self]):
            sample(model, labels, **settings)
        return self.result()


def registered_probes() -> dict[str, EntryPoint]:
    """Every installed probe by name, from the entry-point group `dit_lens.probes`: built in and
    strangers' alike.
    """
    found = entry_points(group="dit_lens.probes")
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def load_probe(name: str) -> type[Probe]:
    """The probe class registered under a name.

    Raises:
        ValueError: for an unknown name, with the nearest, or one that is no probe.
    """
    probes = registered_probes()
    if name not in probes:
        near = difflib.get_close_matches(name, probes, n=3, cutoff=0.3) or sorted(probes)
        raise InvalidValue(f"No probe is called {name!r}; installed: {', '.join(map(repr, near))}.")
    try:
        probe: type[Probe] = probes[name].load()
    except (Exception, SystemExit) as error:  # a stranger's package, broken in any way
        raise InvalidValue(
            f"The entry point {name!r} ({probes[name].value}) can't be loaded: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not (isinstance(probe, type) and issubclass(probe, Probe)):
        raise InvalidValue(
            f"The entry point {name!r} is {probe!r}, which is not a subclass of dit_lens.Probe."
        )
    return probe
