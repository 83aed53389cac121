"""Engines: where a measurement's pieces are run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import arguments
from ..errors import InvalidState
from .deaths import Deaths
from .sending import MISTAKE, Call
from .store import Store
from .work import stopped


@dataclass(frozen=True)
class Engine:
    """Where pieces are run.

        measure_gap(model, engine=Engine("local", workers=4))
        measure_gap(model, store="gap", engine=Engine("ray", address="10.0.0.1:6379"))

    Attributes:
        kind: "local", on this machine, or "ray", on a cluster.
        workers: how many processes; by default one for each accelerator of the machine or the
            cluster. Without accelerators "local" is this process, and "ray" takes one a CPU core.
        address: of Ray; by default that of RAY_ADDRESS, or of the cluster this machine is in.

    >>> Engine("local", workers=2).elsewhere
    True
    """

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        arguments.choice("kind", self.kind, ["local", "ray"])
        arguments.optional(arguments.whole, "workers", self.workers, 1, 10_000)
        arguments.optional(arguments.text, "address", self.address)
        if self.address is not None and self.kind != "ray":
            raise arguments.refusal("address", self.address, "one with the engine 'ray' only")

    @property
    def elsewhere(self) -> bool:
        """Whether the pieces are run in other processes than this one."""
        return self.kind == "ray" or (self.workers or torch.accelerator.device_count()) > 1

    def started(self, store: Store, key: str, call: Call, on: str) -> Any:
        """The processes that run the pieces; called with names that are waited for, it sees to it
        that they do; `close` ends them.

        Args:
            store: where pieces are kept.
            key: of the measurement.
            call: the measurement.
            on: the kind of device.
        """
        if self.kind == "ray":
            from .on_ray import RayWorkers

            return RayWorkers(self.workers, self.address, store, key, call, on)
        return LocalWorkers(self, store, key, call, on)


def checked_engine(engine: Any) -> Engine:
    """An engine, given as itself or by its name.

    Args:
        engine: "local", "ray" or an `Engine`.

    Raises:
        InvalidValue: for another name.
        InvalidType: for anything else.

    >>> checked_engine("ray").kind
    'ray'
    """
    if isinstance(engine, Engine):
        return engine
    expected = "'local', 'ray', or a dit_lens.experiments.Engine"
    arguments.instance("engine", engine, str, expected)
    return Engine(arguments.choice("engine", engine, ["local", "ray"]))


class LocalWorkers:
    """Processes on this machine, each with the measurement's call and a device of its own. One that
    dies is started again.

    Args:
        engine: how many.
        store: where pieces are kept.
        key: of the measurement.
        call: the measurement.
        on: the kind of device.
    """

    def __init__(self, engine: Engine, store: Store, key: str, call: Call, on: str) -> None:
        n = engine.workers or torch.accelerator.device_count()
        many = torch.accelerator.device_count() if on != "cpu" else 0
        self.folder = tempfile.TemporaryDirectory(prefix="dit-lens-")
        place = Path(self.folder.name)
        said: Mapping[str, Any] = {
            "store": str(store.folder),
            "about": store.about,
            "key": key,
            "threads": torch.get_num_threads(),
            "path": [place for place in sys.path if place],
            "devices": [f"{on}:{i}" for i in range(many)] or [on],
        }
        (place / "call.json").write_text(json.dumps(said))
        (place / "call.pickle").write_bytes(call.packed)
        torch.save(list(call.tensors), place / "tensors.pt")
        self.n, self.deaths = n, Deaths(n)
        self.running = {str(i): self._start(str(i)) for i in range(n)}

    def _start(self, number: str) -> subprocess.Popen[bytes]:
        with (Path(self.folder.name) / f"errors-{number}").open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "dit_lens.pieces.worker", self.folder.name, number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def __call__(self, missing: Sequence[str]) -> None:
        """See to it that somebody is at these pieces."""
        self.deaths.progress(len(missing))
        for number, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            if code == 0:  # it has come to the end of what there is to run
                del self.running[number]
                continue
            place = Path(self.folder.name)
            if code == MISTAKE:
                raise InvalidState(f"A worker stopped: {(place / f'mistake-{number}').read_text()}")
            if code > 0:
                said = (place / f"errors-{number}").read_text(errors="replace").strip()
                raise stopped(f"A worker failed: {said.splitlines()[-1] if said else code}")
            if code < 0:
                self.deaths.one(f"signal {-code}")
            self.running[number] = self._start(number)
        if not self.running:
            self.deaths.one("each came to an end of its own")
            self.running["0"] = self._start("0")

    def close(self) -> None:
        """End them."""
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait()
        self.folder.cleanup()
