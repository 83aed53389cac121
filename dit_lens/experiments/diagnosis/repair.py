"""Repairs: edits that take a fault away, verified by running them, with what else they do.

What is tried, the smallest first: the part of the layer that is to blame left out; one head of it;
what it adds set to the mean over good runs, at each step of the window; and, which can't be carried
over to another image, to what the good run itself has there. Where noise is to blame, noise from a
step on that is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import arguments
from ...errors import InvalidValue
from ...hooks.hold import parts
from ...hooks.stored_edits import StoredEdit, by_step, edits_for, made_for, save_edits
from ...measures.estimate import Estimate
from ...measures.proportion import proportion
from ...model.hooked import HookedDiT
from ...sampling.kept import kept_latents
from ...sampling.run import Run
from .chances import Spent
from .fault import Fault, Images
from .inside import Inside
from .pairs import Pairs

COLLATERAL = 0.1
"""The most that a repair may move what is not the fault, 1 being how far two samples of the label
are apart.
"""


@dataclass(frozen=True)
class Repair:
    """A repair, and what it does.

    Attributes:
        name: in words.
        edits: what is put in; none for noise that is drawn anew.
        from_step: of noise that is drawn anew, the step.
        seed: of that noise.
        score: of the repaired image.
        works: whether the fault is gone.
        collateral: how far what is not the fault was moved, 1 being two samples' distance.
        moved: how far the image as a whole was moved.
        cured: of other seeds that had the fault, the share that it is gone from; None where there
            were none, or the fault is one image's own.
        harmed: of other seeds that did not have it, the share that it came to.
        values: how many numbers are put in.
        image: repaired, [c, h, w].
        about: what is saved with the edits.

        found = dit_lens.experiments.diagnose(model, run, fault)
        found.repair.save("repair.json")
    """

    name: str
    edits: tuple[StoredEdit, ...]
    from_step: int | None
    seed: int | None
    score: float
    works: bool
    collateral: float
    moved: float
    cured: Estimate | None
    harmed: Estimate | None
    values: int
    image: Tensor = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tidy(self) -> bool:
        """Whether it leaves alone what is not the fault: its collateral is 0.1 or less."""
        return self.collateral <= COLLATERAL

    def save(self, path: str | Path) -> Path:
        """Write the edits as JSON, for `t.load_edits(path)` and `dit_lens.experiments.load_edits`.

        Args:
            path: the file.

        Raises:
            InvalidValue: for noise that is drawn anew, which is no edit.
        """
        if not self.edits:
            raise InvalidValue(
                f"This repair draws the noise from step {self.from_step} on anew, which is no "
                f"edit; run it with run.replay({self.from_step}, seeds={self.seed})."
            )
        return save_edits(path, self.edits, self.about)


@dataclass
class Workshop:
    """Where repairs are tried.

    Attributes:
        run: the bad one.
        fault: the score.
        images: of latents.
        pairs: bad and good runs.
        others: of other seeds.
        good: the given good run, where nothing but the weights tells it from the bad one: its image
            is what the repaired one should be.
        spread: how far two samples are apart: where the fault is not, and in all.
        spent: the account.
        batch: images at once.
    """

    run: Run
    fault: Fault
    images: Images
    pairs: Pairs | None
    others: Run
    good: Run | None
    spread: Sequence[float]
    spent: Spent
    batch: int

    def _replayed(self, name: str, run: Run, edits: Sequence[StoredEdit]) -> Tensor:
        """The finished latents of a run with edits."""
        first, steps = min(e.steps[0] for e in edits), run.settings.steps

        def finished() -> Tensor:
            return run.replay(first, by_step(edits, run.model.sites)).finished

        (found,) = kept_latents({name: finished}, run)
        self.spent.add(len(run.labels) * (steps - first) / steps)
        return found

    def tried(
        self, name: str, edits: Sequence[StoredEdit], values: int, about: Mapping[str, Any]
    ) -> Repair:
        """A repair by edits, run on the bad run.

        Args:
            name: in words.
            edits: what is put in.
            values: how many numbers that is.
            about: what is kept with it.
        """
        image = self.images(self._replayed(name, self.run, edits))
        return self._judged(name, tuple(edits), None, None, image, values, about)

    def redrawn(self, step: int, seed: int) -> Repair:
        """Noise from a step on drawn anew.

        Args:
            step: the first with other noise.
            seed: of it.
        """
        n = len(self.run.labels)
        name, seeds = f"noise from step {step} on drawn anew", [seed + i for i in range(n)]

        def finished() -> Tensor:
            return self.run.replay(step, seeds=seeds).finished

        (latents,) = kept_latents({f"{name}, seed {seed}": finished}, self.run)
        image = self.images(latents)
        self.spent.add(n * (1 - step / self.run.settings.steps))
        return self._judged(name, (), step, seed, image, 0, {})

    def _judged(
        self,
        name: str,
        edits: tuple[StoredEdit, ...],
        step: int | None,
        seed: int | None,
        image: Tensor,
        values: int,
        about: Mapping[str, Any],
    ) -> Repair:
        scores = self.fault.scores(image)
        aim = self.images((self.good or self.run).finished)
        rest, whole = (
            float(part(image - aim).square().flatten(1).sum(1).mean()) / max(1e-12, spread)
            for part, spread in zip((self.fault.rest, lambda x: x), self.spread, strict=True)
        )
        works = not self.fault.bad(scores).any()
        return Repair(
            name,
            edits,
            step,
            seed,
            float(scores.max()),
            bool(works),
            rest,
            whole,
            None,
            None,
            values,
            image[0],
            about,
        )

    def carried_over(self, repair: Repair) -> Repair:
        """The same repair with what it does to other seeds.

        Args:
            repair: of edits that depend on no item.
        """
        if self.fault.own or not repair.edits:
            return repair
        before = self.fault.bad(self.fault.scores(self.images(self.others.finished)))
        finished = self._replayed(f"{repair.name}, other seeds", self.others, repair.edits)
        after = self.fault.bad(self.fault.scores(self.images(finished)))
        had, free = int(before.sum()), int((~before).sum())
        cured = proportion(int((before & ~after).sum()), had) if had else None
        harmed = proportion(int((~before & after).sum()), free) if free else None
        return replace(repair, cured=cured, harmed=harmed)


def load_edits(
    path: str | Path, model: HookedDiT
) -> dict[int, list[tuple[str, Callable[..., Any]]]]:
    """A repair that was saved, for a model: the edits of each step.

        edits = load_edits("repair.json", model)
        run.replay(min(edits), edits)                                # the whole run
        model.run_with_hooks(x, t, y, fwd_hooks=edits[40])           # one call

    Args:
        path: a file that `Repair.save` wrote.
        model: the opened model.

    Returns:
        {step: [(name, fn)]}.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for another file, a damaged one, or one that was made for another model.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> try: load_edits("nowhere.json", model)
    ... except FileNotFoundError as error: print(error)
    There is no file 'nowhere.json'; expected edits written by save_edits.
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    edits, _ = edits_for(path, model.transformer, model.names)
    return by_step(edits, model.sites)


def repairs(
    shop: Workshop, blamed: Sequence[Inside], window: range | None, good_others: Run | None
) -> list[Repair]:
    """Every repair that was tried, the best first.

    Args:
        shop: where they are tried.
        blamed: the layers.
        window: the steps; None is none.
        good_others: runs whose mean can be put in: of other seeds, without the fault.
    """
    found: list[Repair] = []
    if blamed and window is not None and shop.pairs is not None:
        times = {"timesteps": shop.run.timesteps.tolist()}
        about: dict[str, Any] = made_for(shop.run.model.transformer) | times
        for name, edits, values in _candidates(shop, blamed, window, good_others):
            repair = shop.tried(name, edits, values, about | {"repair": name})
            general = all(e.values is None or e.values.shape[1] == 1 for e in edits)
            found.append(shop.carried_over(repair) if repair.works and general else repair)
        if shop.good is not None and not any(r.works and r.tidy for r in found):
            # nearly all of a strong fault comes from the window: what is left can be much
            steps = tuple(range(shop.pairs.since, shop.run.settings.steps))
            names = _names(shop.run.model, [(each.layer, None) for each in blamed])
            edits = [_set(shop.good, name, steps, False) for name in names]
            name = f"all of {_words(blamed)} set to what the good run has, from step {steps[0]} on"
            found.append(shop.tried(name, edits, _count(edits), about | {"repair": name}))
    return sorted(found, key=_rank)


def _rank(repair: Repair) -> tuple[Any, ...]:
    """Those that work come first, then those that do little else, cure others, and are small."""
    cured = 0.0 if repair.cured is None else repair.cured.value
    harmed = 0.0 if repair.harmed is None else repair.harmed.value
    good = not repair.works, not repair.tidy, round(harmed - cured, 2)
    return *good, repair.values, repair.collateral


def _candidates(
    shop: Workshop, blamed: Sequence[Inside], window: range, good_others: Run | None
) -> list[tuple[str, list[StoredEdit], int]]:
    """Edits to try, in words, and how many numbers they put in."""
    model, steps, where = shop.run.model, tuple(window), _words(blamed)
    found: list[tuple[str, list[StoredEdit], int]] = []
    heads = [
        StoredEdit(f"blocks.{e.layer}.attn.hook_result", steps, "zero", heads=(e.head,))
        for e in blamed
        if e.head is not None
    ]
    if len(heads) == len(blamed):
        words = ", ".join(str(e.head) for e in blamed)
        found.append((f"head {words} of {where} left out", heads, 0))
    names = _names(model, [(each.layer, each.part) for each in blamed])
    what = " and ".join(dict.fromkeys(e.part for e in blamed if e.part)) or "all"
    found.append((f"{what} of {where} left out", [StoredEdit(n, steps, "zero") for n in names], 0))
    assert shop.pairs is not None
    sources = [(good_others, "the mean over good runs of other seeds", True)]
    if shop.pairs.n > 1:
        sources.append((shop.pairs.good, "the mean over its good runs", True))
    sources.append((shop.good, "what the good run has there", False))
    for source, words, mean in sources:
        if source is not None:
            edits = [_set(source, name, steps, mean) for name in names]
            found.append((f"{what} of {where} set to {words}", edits, _count(edits)))
    return found


def _words(blamed: Sequence[Inside]) -> str:
    return f"layer{'s' * (len(blamed) > 1)} {', '.join(str(each.layer) for each in blamed)}"


def _names(model: HookedDiT, wanted: Sequence[tuple[int, str | None]]) -> list[str]:
    """What a part of a layer, or all of it, writes into the stream."""
    return [
        place.name
        for layer, chosen in wanted
        for part, places in parts(model.names, layer).items()
        if chosen in (None, part)
        for place in places
    ]


def _count(edits: Sequence[StoredEdit]) -> int:
    return sum(e.values.numel() for e in edits if e.values is not None)


def _set(source: Run, name: str, steps: tuple[int, ...], mean: bool) -> StoredEdit:
    """What a good run has at a hook point at each step, its mean over items or item by item."""
    seen = [source.activations(name, step=s) for s in steps]
    if mean:
        halves = [[h.mean(0) for h in x.chunk(source.passes)] for x in seen]
        return StoredEdit(name, steps, "set", values=torch.stack([torch.stack(h) for h in halves]))
    return StoredEdit(name, steps, "set", values=torch.stack(seen))


def good_of(run: Run, fault: Fault, images: Images) -> Run | None:
    """The runs without the fault; None if there are none.

    Args:
        run: of other seeds.
        fault: the score.
        images: of latents.
    """
    chosen = np.flatnonzero(~fault.bad(fault.scores(images(run.finished)))).tolist()
    return run.select(chosen) if chosen else None
