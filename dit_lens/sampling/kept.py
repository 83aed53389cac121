"""Runs as pieces of a measurement: kept as arrays, and put together again for the same model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.hooked import HookedDiT
from ..model.kernels import Kernels
from ..model.state import State
from ..model.trajectories import room
from ..model.witness import Checksum, Witness
from ..pieces import Piece, current, results
from .loop import prepared
from .parts import Split
from .run import Run
from .settings import Change, Settings


def kept_run(
    name: str,
    make: Callable[[], Run],
    model: HookedDiT,
    scheduler: Any = None,
    history: Sequence[Change] = (),
) -> Run:
    """A run as one piece: made, or found made.

    Args:
        name: of the piece.
        make: samples it, without edits, or replays another, with no others than that one's.
        model: that is sampled.
        scheduler: of the run, where it is an object and no name.
        history: of the run that is replayed.
    """
    if current() is None:
        return make()
    made: list[Run] = []

    def piece() -> dict[str, NDArray[Any]]:
        made.append(make())
        return arrays_of(made[0])

    (arrays,) = results([Piece(name, piece)])
    return made[0] if made else run_of(arrays, model, scheduler, history)


def kept_latents(made: Mapping[str, Callable[[], Tensor]], run: Run) -> list[Tensor]:
    """Latents as pieces, each made, or found made.

    Args:
        made: what makes them, by the name of the piece.
        run: of the same model, whose device they are on.
    """

    def piece(make: Callable[[], Tensor]) -> dict[str, NDArray[Any]]:
        return {"latents": make().cpu().numpy()}

    found = results([Piece(name, partial(piece, make)) for name, make in made.items()])
    return [torch.from_numpy(np.array(each["latents"])).to(run.finished) for each in found]


def arrays_of(run: Run) -> dict[str, NDArray[Any]]:
    """All of a run but its model and its edits, as arrays.

    Args:
        run: that is taken apart.
    """
    witnessed = [list(witness) for witness in run.witnesses]  # under a plan fewer at some steps
    about = {
        "settings": {k: v for k, v in vars(run.settings).items() if k != "scheduler"},
        "scheduler": run.settings.scheduler if isinstance(run.settings.scheduler, str) else None,
        "history": [[c.from_step, list(c.seeds), bool(c.edits)] for c in run.history],
        "splits": [[list(map(list, s.parts)), s.size, s.copied, s.texts] for s in run.splits],
        "witnessed": witnessed,
        "tied_until": run.tied_until,
        "selected": run.selected,
        "kernels": vars(run.kernels),
        "batch": run.batch,
    }
    found = {
        name: getattr(run, name).cpu().numpy() for name in ("labels", "latents", "x0", "outputs")
    }
    for part in ("bits", "total"):
        # one transfer for all steps and names: each would wait for the device
        every = [getattr(w[name], part) for w in run.witnesses for name in w]
        found[part] = torch.stack(every).cpu().numpy()
    found["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return found


def run_of(
    arrays: Mapping[str, NDArray[Any]],
    model: HookedDiT,
    scheduler: Any = None,
    history: Sequence[Change] = (),
) -> Run:
    """The run that `arrays_of` took apart.

    Args:
        arrays: as it gave them.
        model: the same model.
        scheduler: the one that was given, where it was an object and no name.
        history: that has the run's edits.
    """
    about = json.loads(arrays["about"].tobytes())
    settings = Settings(scheduler=about["scheduler"] or scheduler, **about["settings"])
    plan, edited = prepared(model, settings), (c for c in history if c.edits)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[name])).to(model.device)

    def trajectory(name: str) -> Tensor:
        if model.trajectories is None:
            return tensor(name)
        like = torch.from_numpy(np.empty(0, arrays[name].dtype))
        kept = room(model.trajectories, arrays[name].shape, like)
        kept.numpy()[...] = arrays[name]  # which may be read-only
        return kept

    witnesses, of_steps = list[Witness](), list(map(len, about["witnessed"]))
    parts = (tensor(name).split(of_steps) for name in ("bits", "total"))
    for names, bits, total in zip(about["witnessed"], *parts, strict=True):
        witnesses.append(Witness())
        witnesses[-1].add(names, Checksum(bits, total))

    return Run(
        model=model,
        labels=torch.from_numpy(np.array(arrays["labels"])),
        history=tuple(
            replace(next(edited) if edits else Change(step, ()), seeds=tuple(seeds))
            for step, seeds, edits in about["history"]
        ),
        settings=settings,
        timesteps=plan.timesteps.cpu(),
        latents=trajectory("latents"),
        x0=trajectory("x0"),
        outputs=trajectory("outputs"),
        witnesses=tuple(witnesses),
        scheduler=copy.deepcopy(plan),
        kernels=Kernels(**about["kernels"] | {"sdpa": tuple(about["kernels"]["sdpa"])}),
        state=State.of(model.transformer),
        splits=tuple(
            Split(tuple(map(tuple, parts)), size, copied, texts=tuple(texts))
            for parts, size, copied, texts in about["splits"]
        ),
        tied_until=about["tied_until"],
        selected=about["selected"],
        batch=about["batch"],
    )
