"""Pieces on a Ray cluster: one warm model for each worker, the weights in each node's memory once.

Nothing is needed of the cluster but that dit_lens is installed there, in the same version: pieces
go through its memory, and the process that measures keeps them in its own store.
"""

from __future__ import annotations

import os
import platform
import socket
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DitLensError, InvalidState, MissingFile
from ..storage import versions
from .deaths import Deaths
from .sending import Call
from .store import Arrays, Store
from .work import stopped
from .worker import helped

ANSWER = 10.0
"""Seconds in which an address must answer."""


class Board:
    """What the workers of one measurement share: finished pieces, and who is at which."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[Arrays, float]] = {}
        self.at: dict[str, str] = {}

    def there(self, names: Sequence[str]) -> set[str]:
        """Which of these pieces are there."""
        return set(names) & set(self.done)

    def names(self) -> list[str]:
        """All pieces that are there."""
        return list(self.done)

    def read(self, name: str) -> tuple[Arrays, float]:
        """A piece's arrays, and how many seconds it took."""
        return self.done[name]

    def write(self, name: str, arrays: Arrays, seconds: float) -> None:
        """Keep a finished piece."""
        # copied: what came belongs to its worker, and goes with it
        held = {key: np.array(value) for key, value in arrays.items()}
        self.done.setdefault(name, (held, seconds))
        self.at.pop(name, None)

    def claim(self, name: str, worker: str) -> bool:
        """Take a piece that nobody is at."""
        return name not in self.done and self.at.setdefault(name, worker) == worker

    def release(self, worker: str) -> None:
        """Give up what a worker had taken."""
        self.at = {name: by for name, by in self.at.items() if by != worker}


class OnBoard:
    """The board as a store, for one worker.

    Args:
        board: Ray's handle of it.
        worker: the name under which pieces are claimed.
    """

    def __init__(self, board: Any, worker: str) -> None:
        import ray

        self.get, self.board, self.worker = ray.get, board, worker

    def there(self, names: Sequence[str]) -> set[str]:
        """Which of these pieces are there."""
        return set(self.get(self.board.there.remote(list(names))))

    def names(self) -> list[str]:
        """All pieces that are there."""
        return list(self.get(self.board.names.remote()))

    def read(self, name: str) -> tuple[dict[str, Any], float]:
        """A piece's arrays, and how many seconds it took."""
        arrays, seconds = self.get(self.board.read.remote(name))
        return {k: np.array(v) for k, v in arrays.items()}, seconds

    def write(self, name: str, arrays: Arrays, seconds: float) -> None:
        """Keep a finished piece."""
        held = {k: np.asarray(v) for k, v in arrays.items()}
        self.get(self.board.write.remote(name, held, seconds))

    def claim(self, name: str) -> bool:
        """Take a piece that nobody is at."""
        return bool(self.get(self.board.claim.remote(name, self.worker)))

    def release(self) -> None:
        """Give up the piece that was taken."""
        self.get(self.board.release.remote(self.worker))


class Worker:
    """One process of the cluster."""

    def about(self) -> dict[str, str]:
        """What it is, to be compared before anything is run."""
        return about_here()

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def work(
        self,
        packed: bytes,
        weights: list[Any],
        board: Any,
        name: str,
        key: str,
        threads: int,
        device: str,
    ) -> str | None:
        """Run pieces until there are no more; a mistake of the user's is given back.

        Args:
            packed: the call.
            weights: its tensors, in this node's memory.
            board: what is shared.
            name: of this worker.
            key: of the measurement.
            threads: of torch.
            device: the kind of device.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the weights can't be written to, and are not
            tensors = [_tensor(*each) for each in weights]
        try:
            helped(packed, tensors, OnBoard(board, name), key, threads, device)
        except (DitLensError, OSError) as error:
            return f"{socket.gethostname()}: {' '.join(str(error).split())}"
        return None


def about_here() -> dict[str, str]:
    """The versions of this process, with Python's."""
    return versions() | {"python": platform.python_version()}


def _raw(x: Tensor) -> tuple[Any, str, tuple[int, ...]]:
    flat = x.contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    return raw, str(x.dtype).removeprefix("torch."), tuple(x.shape)


def _tensor(raw: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = getattr(torch, dtype)
    return (
        torch.from_numpy(raw).view(kind).reshape(shape)
        if raw.size
        else torch.empty(shape, dtype=kind)
    )


class RayWorkers:
    """Workers on a Ray cluster. One that dies is started again, somewhere.

    Args:
        workers: how many; None is one for each GPU, or else one for each processor.
        address: of the cluster; None is that of RAY_ADDRESS, or of the one this machine is in.
        store: where pieces are kept.
        key: of the measurement.
        call: the measurement.
        on: the kind of device.

    Raises:
        MissingFile: where Ray is not installed.
        InvalidState: if no cluster answers, or its versions differ.
    """

    def __init__(
        self,
        workers: int | None,
        address: str | None,
        store: Store,
        key: str,
        call: Call,
        on: str,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise MissingFile(
                "The engine 'ray' needs Ray, which is not installed; pip install 'dit-lens[scale]'."
            ) from None
        self.ray, self.store = ray, store
        self.own = not ray.is_initialized()
        self._connect(address)
        try:
            total = ray.cluster_resources()
            gpus = int(total.get("GPU", 0))
            n = workers or gpus or max(1, int(total.get("CPU", 1)))
            self.options = {"num_gpus": 1} if gpus else {"num_cpus": 1}
            self.n, self.deaths = n, Deaths(n)
            self.board = ray.remote(Board).options(num_cpus=0).remote()
            for name in store.names():
                arrays, seconds = store.read(name)
                ray.get(self.board.write.remote(name, arrays, seconds))
            self.call = (
                ray.put(call.packed),
                ray.put([_raw(x) for x in call.tensors]),
                self.board,
            )
            self.rest = (key, torch.get_num_threads(), "cuda" if gpus else on)
            self.working: dict[Any, tuple[str, Any]] = {}
            self.made = 0
            for _ in range(n):
                self._start()
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None) -> None:
        """Join the cluster, or say that there is none."""
        if not self.own:
            return
        where = address or os.environ.get("RAY_ADDRESS") or "auto"
        advice = "expected one that runs, as 'ray start --head' starts it, given by --address"
        try:
            if where == "auto":  # may be one that is gone, for which Ray would wait for minutes
                with suppress(AttributeError):  # no public way, which another version may lack
                    services = self.ray._private.services  # noqa: SLF001
                    where = services.canonicalize_bootstrap_address(where)
            host, _, port = where.rpartition("//")[2].rpartition(":")
            if port.isdigit():
                socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
            self.ray.init(where, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise InvalidState(
                f"No Ray cluster answers at {where!r} ({reason}); {advice}."
            ) from None

    def _start(self) -> None:
        self.made += 1
        name = f"worker {self.made}"
        # its first answer comes when there is room for it
        actor = self.ray.remote(Worker).options(**self.options, max_restarts=0).remote()
        about = actor.about.remote()
        self.working[about] = name, actor

    def __call__(self, missing: Sequence[str]) -> None:
        """See to it that somebody is at these pieces, and keep what is finished."""
        self.deaths.progress(len(missing))
        ray = self.ray
        try:
            for name in ray.get(self.board.there.remote(list(missing))):
                arrays, seconds = ray.get(self.board.read.remote(name))
                self.store.write(name, arrays, seconds)
            ready, _ = ray.wait(list(self.working), num_returns=len(self.working), timeout=0)
        except ray.exceptions.RayError as error:
            raise self._lost(error) from None
        for reference in ready:
            self._answered(reference)
        if not self.working:
            self.deaths.one("each came to an end of its own")
            self._start()

    def _answered(self, reference: Any) -> None:
        """A worker has said what it is, has come to its end, or has died."""
        ray = self.ray
        name, actor = self.working.pop(reference)
        try:
            said = ray.get(reference)
        except ray.exceptions.RayActorError:
            self.deaths.one("the process is gone")
            ray.get(self.board.release.remote(name))
            self._start()
            return
        except ray.exceptions.RayError as error:
            raise self._lost(error) from None
        if isinstance(said, dict):
            here = about_here()
            odd = [k for k in here if said.get(k) != here[k]]
            if odd:
                raise InvalidState(
                    f"A worker of the cluster has {odd[0]} {said.get(odd[0])} and this process "
                    f"{here[odd[0]]}; expected the same versions everywhere."
                )
            packed, weights, board = self.call
            work = actor.work.remote(packed, weights, board, name, *self.rest)
            self.working[work] = name, actor
        elif said is not None:
            raise InvalidState(f"A worker stopped on {said}")

    def _lost(self, error: Exception) -> InvalidState:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        said = lines[-1].strip()[:200] if lines else repr(error)
        return stopped(f"The Ray cluster failed ({type(error).__name__}: {said})")

    def close(self) -> None:
        """End them."""
        for _, actor in getattr(self, "working", {}).values():
            self.ray.kill(actor)
        if hasattr(self, "board"):
            self.ray.kill(self.board)
        if self.own and self.ray.is_initialized():
            self.ray.shutdown()
