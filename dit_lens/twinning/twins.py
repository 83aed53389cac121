"""Twins: two trajectories tied together and then released, the instrument for *when* a model
decides.

- `tie="noise"` (the clones of Biroli et al. 2024, arXiv 2402.18491): one trajectory until
  `release`, then each twin draws noise of its own. They need a stochastic sampler: what they agree
  on at the end was decided by x_t at the release.
- `tie="attention"` (arXiv 2603.20987): the twins start at z+- = sqrt(1 - eps²) z +- eps xi, attend
  to each other with strength g (see `dit_lens.twinning.coupling`) until `release`, and run alone
  from there.

The batch is [A | B]; with guidance [A | B | A null | B null].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidValue
from ..model.conditions import Labels
from ..model.fingerprint import fingerprint
from ..model.hooked import HookedDiT
from ..sampling.guidance import n_passes
from ..sampling.noise import START, noise
from ..sampling.run import Change, Run, Settings, check_settings, denoise, is_stochastic, prepared
from ..sampling.schedulers import ETA, default_name
from ..tracing.probe import Probe
from ..tracing.trace import trace
from .coupling import CouplingForm, check_coupling, coupled


@dataclass(frozen=True)
class Twins:
    """Pairs of finished trajectories.

    Attributes:
        run: both twins of all pairs as one `Run`, batch [A | B].
        pairs: how many.
        release: the first step that the twins run untied.
        tie: "noise" or "attention".
        g: strength of the coupling.
    """

    run: Run
    pairs: int
    release: int
    tie: str
    g: float

    @property
    def a(self) -> Run:
        """Twin A of every pair."""
        return self.run.select(slice(0, self.pairs))

    @property
    def b(self) -> Run:
        """Twin B of every pair."""
        return self.run.select(slice(self.pairs, None))


def twins(
    model: Any,
    pairs: int = 64,
    labels: Labels | None = None,
    *,
    tie: Literal["noise", "attention"] = "noise",
    g: float = 0.0,
    form: CouplingForm = "mix",
    layers: Sequence[int] | None = None,
    eps: float = 0.1,
    release: int = 0,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float | None = None,
    seed: int = 0,
    probes: Sequence[Probe] = (),
    progress: Callable[[int], object] | None = None,
) -> Twins:
    """Run pairs of twins, under observation if there are probes.

        result = dit_lens.twins(model, pairs=16, release=20)
        result.a.images, result.b.images

    Args:
        pairs: number of pairs, run as one batch.
        labels: one a pair; by default the classes, or prompts, in turn.
        tie: "noise" or "attention"; see the module.
        g, form, layers: the coupling, of the attention tie only.
        eps: how far apart the attention tie starts its twins, 0 to 1.
        release: the first step without the tie, 0 to steps; `steps` never releases.
        eta: stochasticity of DDIM, or of Euler on a flow; by default 1 with the noise tie, 0 with
            the attention tie.
        seed: decides all noise. Raises ValueError, one sentence, for what is out of range and for
            twins that can't part.
    """
    model = model if isinstance(model, HookedDiT) else HookedDiT(model)
    model._require_eval()
    if tie not in ("noise", "attention"):
        raise InvalidValue(f"tie={tie!r} is unknown; expected 'noise' or 'attention'.")
    scheduler = scheduler or default_name(model.scheduler)
    if eta is None:  # DDIM and Euler on a flow are the samplers that have to be told to draw noise
        asked = scheduler in ("ddim", "euler-flow") or type(scheduler).__name__ in ETA
        eta = 1.0 if tie == "noise" and asked else 0.0
    settings = Settings(steps, float(guidance), "all", scheduler, float(eta))
    check_settings(settings)
    check_coupling(g, form)
    _check(model, settings, pairs, tie, g, eps, release)
    y = model.conditions.numbers(
        [i % model.conditions.n for i in range(pairs)] if labels is None else labels, model.device
    )
    if len(y) != pairs:
        raise InvalidValue(f"There are {len(y)} labels for {pairs} pairs; expected one a pair.")
    own, other = twin_seeds(seed, pairs)
    plan = prepared(model, settings)
    shape = model.cfg.latent_shape
    z = noise(own, START, shape, model.device)
    x, both = torch.cat([z, z]), torch.cat([y, y])
    if tie == "attention":
        xi = noise(other, START, shape, model.device)
        x = torch.cat([(1 - eps**2) ** 0.5 * z + sign * eps * xi for sign in (1, -1)])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    weights = fingerprint(model.transformer)
    halves = n_passes(model, settings.guidance)

    history = (Change(0, tuple(own + own)), Change(release, tuple(own + other)))

    def go(first: int, last: int) -> None:
        start = seen[-1][2] if seen else x
        for each in denoise(model, start, both, history, settings, plan, first, last):
            seen.append(each)
            if progress is not None:
                progress(len(seen) - 1)

    watch = trace(model, probes=probes) if probes else contextlib.nullcontext()
    with watch, _named(model, (("A",) * pairs + ("B",) * pairs) * halves):
        with coupled(model, g if tie == "attention" else 0.0, form, layers, halves):
            go(0, release)
        go(release, steps)
    x0, outputs, later = (torch.stack(part) for part in zip(*seen, strict=True))
    run = Run(
        model,
        both,
        history,
        settings,
        plan.timesteps.cpu(),
        torch.cat([x[None], later]),
        x0,
        outputs,
        weights,
        tied_until=release if g else 0,
    )
    return Twins(run, pairs, release, tie, g)


def paired_labels(model: HookedDiT, pairs: int) -> list[int]:
    """The classes (or prompts) in turn, as many as leave two pairs or more to each, so that a
    class's mean image can be taken off.
    """
    return [i % max(1, min(model.conditions.n, pairs // 2)) for i in range(pairs)]


def twin_seeds(seed: int, pairs: int) -> tuple[list[int], list[int]]:
    """The seeds of twin A and twin B of every pair, all different, from one seed."""
    words = np.random.SeedSequence(seed).generate_state(2 * pairs, np.uint64) >> np.uint64(2)
    return words[:pairs].tolist(), words[pairs:].tolist()


@contextlib.contextmanager
def _named(model: HookedDiT, names: tuple[str, ...]) -> Iterator[None]:
    model.instrumentation.twin = names
    try:
        yield
    finally:
        model.instrumentation.twin = None


def _check(
    model: HookedDiT, settings: Settings, pairs: int, tie: str, g: float, eps: float, release: int
) -> None:
    if not isinstance(pairs, int) or pairs < 1:
        raise InvalidValue(f"pairs={pairs!r} is no number of pairs; expected 1 or more.")
    if not 0 <= release <= settings.steps:
        raise InvalidValue(
            f"release={release} is outside the run; expected a step from 0 to {settings.steps} "
            "(never)."
        )
    if not 0 <= eps <= 1:
        raise InvalidValue(
            f"eps={eps} is out of range; expected 0 (equal starts) to 1 (opposite ones)."
        )
    if tie == "noise" and g:
        raise InvalidValue(
            f"g={g} is a coupling through attention; use tie='attention', or g=0 with tie='noise'."
        )
    draws = is_stochastic(model, settings)
    if not (draws and release < settings.steps) and (tie == "noise" or eps == 0):
        if release == settings.steps and draws:
            raise InvalidValue(
                f"The twins can't part: they are never released (release={release} of "
                f"{settings.steps} steps)."
            )
        raise InvalidValue(
            f"The twins can't part: the sampler {settings.scheduler!r} with eta={settings.eta} "
            "draws no noise and they start equal; "
            "use eta=1, scheduler='ddpm', or tie='attention' with eps > 0."
        )
