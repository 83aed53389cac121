"""Twins: two trajectories tied together and then released, the instrument for *when* a model
decides.

The batch is [A | B]; with guidance [A | B | A null | B null]. How they are tied says
`dit_lens.twinning.ties`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from .. import arguments
from ..errors import InvalidValue
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..model.kernels import Kernels
from ..model.state import State
from ..pictures import notebook
from ..pictures.images import beside
from ..sampling.guidance import n_passes
from ..sampling.loop import Kept, denoise, drawing, prepared
from ..sampling.parts import Splitter
from ..sampling.run import Run, made_of, require_finite
from ..sampling.schedulers import default_name
from ..sampling.settings import Change, Progress, Settings, checked_settings
from ..tracing.probe import Probe
from ..tracing.trace import observed
from .coupling import CouplingForm
from .ties import NoiseTie, Tie, make_tie


@dataclass(frozen=True, repr=False)
class Twins:
    """Pairs of finished trajectories.

        pair = dit_lens.twins(model, pairs=16, release=20)
        pair.a.images, pair.b.images
        pair.run.replay(30, seeds=[...])               # both twins of all pairs, [A | B]

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

    def __repr__(self) -> str:
        tie = f"attention at g={self.g:g}" if self.tie == "attention" else self.tie
        steps = self.run.settings.steps
        return f"Twins({self.pairs} pairs, tied by {tie} up to step {self.release} of {steps})"

    def _repr_html_(self) -> str:
        """For notebooks: the two of each pair side by side, where nothing has to be decoded."""
        if self.run.model.vae is not None and "images" not in vars(self.run):
            return notebook.shown(repr(self))
        a, b = self.run.images.cpu().numpy().reshape(2, self.pairs, *self.run.images.shape[1:])
        pairs = [f"pair {i}" for i in range(self.pairs)]
        return notebook.shown(repr(self), notebook.strip(beside(a, b), pairs))

    @cached_property
    def a(self) -> Run:
        """Twin A of every pair."""
        return self.run.select(slice(0, self.pairs))

    @cached_property
    def b(self) -> Run:
        """Twin B of every pair."""
        return self.run.select(slice(self.pairs, None))


def twins(
    model: Any,
    pairs: int = 64,
    labels: Labels | None = None,
    *,
    tie: Literal["noise", "attention"] = "noise",
    g: float | None = None,
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
    progress: Progress | None = None,
    batch: int | None = None,
) -> Twins:
    """Run pairs of twins, under observation if there are probes.

        result = dit_lens.twins(model, pairs=16, release=20)
        result.a.images, result.b.images

    Args:
        model: a `HookedDiT`, or what it wraps.
        pairs: number of pairs, run as one batch.
        labels: one a pair; by default the classes, or prompts, in turn.
        tie: "noise" (clones) or "attention"; see `dit_lens.twinning.ties`.
        g: strength of the coupling, which the attention tie needs and the noise tie has not; 0
            couples nothing.
        form: of the coupling, "mix" or "joint".
        layers: which layers are coupled, negative ones from the end; None is all.
        eps: how far apart the attention tie starts its twins, 0 to 1.
        release: the first step without the tie, 0 to `steps`; `steps` never releases.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 is none.
        scheduler: as for `dit_lens.sample`.
        eta: stochasticity of DDIM, or of Euler on a flow; by default 1 with the noise tie, 0 with
            the attention tie.
        seed: decides all noise.
        probes: `Probe` instances that observe the run.
        progress: called with (steps done, steps in all).
        batch: images that go through the model at once, twins together; as for `dit_lens.sample`.

    Raises:
        ValueError: for what is out of range, and for twins that can't part.
        RuntimeError: in train mode, and as for `dit_lens.sample`.

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, steps=4, release=2)
    >>> bool((pair.a.latents[2] == pair.b.latents[2]).all())
    True
    """
    with HookedDiT.opening(model) as model:
        # What is asked for fits the model, and the twins can part.
        model.require_eval()
        scheduler = default_name(model.scheduler) if scheduler is None else scheduler
        if layers is not None:
            layers = arguments.layers(layers, model.cfg.n_layers)
        if tie == "attention" and g is None:
            raise InvalidValue(
                "tie='attention' also needs g=, the strength of the coupling, such as g=0.5; g=0 "
                "couples nothing."
            )
        held = make_tie(tie, 0.0 if g is None else g, form, layers, eps)
        eta = held.eta(scheduler) if eta is None else eta
        settings = checked_settings(steps, guidance, "all", scheduler, eta)
        steps, pairs = settings.steps, arguments.whole("pairs", pairs, 1)
        release = arguments.whole("release", release, 0, steps, "the last of them never")
        seed = arguments.seed("seed", seed)
        probes = arguments.listed("probes", probes, "a list of probes", fewest=0)
        arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
        batch = arguments.optional(arguments.whole, "batch", batch, 1)
        _check_parting(model, settings, held, release)
        chosen = [i % model.conditions.n for i in range(pairs)] if labels is None else labels
        y = model.conditions.numbers(chosen)
        if len(y) != pairs:
            raise InvalidValue(f"There are {len(y)} labels for {pairs} pairs; expected one a pair.")

        # Where they start, and where their noise comes from.
        own, other = twin_seeds(seed, pairs)
        x, both = held.start(model, own, other), torch.cat([y, y])
        history = (Change(0, tuple(own + own)), Change(release, tuple(own + other)))
        kernels, state = Kernels.of_sampling(model.device), State.of(model.transformer)

        # Tied to the release, alone from there on.
        plan, passes = prepared(model, settings), n_passes(model, settings.guidance)
        fresh = copy.deepcopy(plan)
        kept = Kept(model, x, steps)

        def go(first: int, last: int) -> None:
            for _ in denoise(
                model, kept.now, both, history, settings, plan, first, last, splitter, kept
            ):
                if progress is not None:
                    progress(kept.done, steps)

        names = (("A",) * pairs + ("B",) * pairs) * passes
        watch = observed(model, probes) if probes else contextlib.nullcontext()
        with watch, model.instrumentation.under(twin=names, run=object()):
            # clones are one until they part, unless somebody wants to see two
            alike = release if isinstance(held, NoiseTie) and not model.instrumentation.busy else 0
            splitter = Splitter(batch, passes, pairs=True, copied_until=alike)
            with held.holding(model, passes):
                go(0, release)
            go(release, steps)
        tied_until = release if held.g else 0
        batch = splitter.batch
        run = made_of(
            kept, model, both, history, settings, fresh, kernels, state, batch, tied_until
        )
        require_finite(run, "the twins")
        return Twins(run, pairs, release, held.name, held.g)


def paired_labels(model: HookedDiT, pairs: int) -> list[int]:
    """The classes (or prompts) in turn, as many as leave two pairs or more to each, so that a
    class's mean image can be taken off.
    """
    return [i % max(1, min(model.conditions.n, pairs // 2)) for i in range(pairs)]


def in_turn(model: HookedDiT, pairs: int, labels: Labels) -> list[int]:
    """One label a pair, by number: those given, taken in turn; of more than pairs the first."""
    given: list[int] = model.conditions.numbers(labels).tolist()
    return [given[i % len(given)] for i in range(pairs)]


def labels_of_fewer(model: HookedDiT, pairs: int, labels: Labels | None) -> list[int]:
    """As `chosen_labels`, for fewer pairs than the labels were checked for: of too many labels
    those are left out that would have a single pair.

    Args:
        model: whose labels.
        pairs: how many pairs.
        labels: that `chosen_labels` takes for more pairs.
    """
    if labels is None:
        return paired_labels(model, pairs)
    given = model.conditions.numbers(labels).tolist()
    few = list(dict.fromkeys(given))[: max(1, pairs // 2)]
    return in_turn(model, pairs, few if len(few) < len(set(given)) else given)


def chosen_labels(model: HookedDiT, pairs: int, labels: Labels | None) -> list[int]:
    """One label a pair, each of them two times or more, by number: as given, or `paired_labels`.

    Args:
        model: whose labels.
        pairs: how many pairs.
        labels: one a pair, or fewer, which are then taken in turn; None is the model's own.

    Raises:
        InvalidValue: for labels that the model does not have, or more of them than pairs allow.
    """
    if labels is None:
        return paired_labels(model, pairs)
    given, found = model.conditions.numbers(labels).tolist(), in_turn(model, pairs, labels)
    alone = [label for label in given if found.count(label) < 2]
    if alone:
        raise InvalidValue(
            f"Label {alone[0]} would have {found.count(alone[0])} of {pairs} pairs; expected two "
            "or more for each, since the mean of a label's images is taken off: fewer labels, or "
            "more pairs."
        )
    return found


def twin_seeds(seed: int, pairs: int) -> tuple[list[int], list[int]]:
    """The seeds of twin A and twin B of every pair, all different, from one seed."""
    words = np.random.SeedSequence(seed).generate_state(2 * pairs, np.uint64) >> np.uint64(2)
    return words[:pairs].tolist(), words[pairs:].tolist()


def _check_parting(model: HookedDiT, settings: Settings, tie: Tie, release: int) -> None:
    """Raise InvalidValue for twins that can't part."""
    free = range(release, settings.steps)
    if not tie.starts_equal or next(drawing(model, settings, free), None) is not None:
        return
    last = max(drawing(model, settings, range(settings.steps)), default=None)
    if last is None:
        raise InvalidValue(
            f"The twins can't part: the sampler {settings.scheduler!r} with eta={settings.eta} "
            "draws no noise and they start equal; use eta=1, scheduler='ddpm', or "
            "tie='attention' with eps > 0."
        )
    if release == settings.steps:
        raise InvalidValue(
            f"The twins can't part: they are never released (release={release} of "
            f"{settings.steps} steps); expected {last} or less."
        )
    raise InvalidValue(
        f"The twins can't part: the sampler {settings.scheduler!r} draws no noise from their "
        f"release={release} on; expected {last} or less."
    )
