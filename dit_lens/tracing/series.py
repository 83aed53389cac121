"""What a probe keeps of a run, step by step, put where it belongs."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState
from ..model.pinned import Fetched, sent
from .site import Site

HOST = "cpu"
ROOM = 64
"""Steps that memory is taken for at first, where nobody says how many there will be; then twice as
many, and so on.
"""


class Series:
    """One tensor [batch, ...] an observation, kept by key and step.

        class Norms(dit_lens.Probe):
            names, in_parts = "resid_post", True

            def start(self, model): self.norms = dit_lens.Series()
            def observe(self, activation, site): self.norms.put(site, activation.norm(dim=-1))
            def result(self): ...  # self.norms.keys, self.norms.steps, self.norms.stacked()

    A step whose batch goes through the model in parts (`batch=`) comes together in the batch's
    order. Memory is taken for many steps at once: small results that lie between a pass's large
    tensors would keep the memory of those. Nothing is waited for; a file is a step behind.

    Args:
        on_disk: keep what is finished in a temporary file, in place of memory.

    >>> kept = Series(); kept.steps, kept.keys
    ([], [])
    """

    def __init__(self, on_disk: bool = False) -> None:
        self.on_disk = arguments.flag("on_disk", on_disk)
        self._slots: dict[int, int] = {}  # of each step its place
        self._missing: dict[tuple[Any, int], set[int]] = {}  # rows that have not come yet
        self._seen: dict[tuple[Any, int], int] = {}  # on disk: where
        self._rooms: dict[Any, Tensor] = {}
        self._waiting: list[tuple[int, Tensor]] = []  # for the disk, and where: a device's step
        self._sent: tuple[list[tuple[int, int]], Fetched] | None = None  # where, how much: the last
        self._file: Any = None
        self._end = 0
        if on_disk:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (for as long as this lives)
            weakref.finalize(self, self._file.close)
        self._shapes: dict[tuple[Any, int], tuple[int, ...]] = {}

    @property
    def keys(self) -> list[Any]:
        """What was kept, in the order of its coming."""
        return list(dict.fromkeys(key for key, _ in self._seen))

    @property
    def steps(self) -> list[int]:
        """The steps seen, rising."""
        return sorted(self._slots)

    def put(self, site: Site, value: Tensor, key: Any = None, *, whole: bool = False) -> None:
        """Keep a tensor of the step under way.

        Args:
            site: where and when it was seen.
            value: [batch, ...], a row for each item of `site.x`.
            key: under which it is kept; by default the hook point's name.
            whole: its rows are all that the step has, as of something put together from parts.
        """
        key, step = site.name if key is None else key, site.step
        part = None if whole else site.call.context.part
        if part is not None:
            missing = self._missing.setdefault((key, step), set(range(part.size)))
            missing.difference_update(part.rows)
        size = len(value) if part is None else part.size
        shape = (size, *value.shape[1:])
        spans = [(slice(None), slice(0, size))] if part is None else part.spans()
        if self.on_disk:
            self._put_on_disk((key, step), shape, spans, value.detach())
            return
        slot = self._slots.setdefault(step, len(self._slots))
        least = site.call.context.steps or ROOM
        room = self._room(key, slot, shape, value, least)
        for here, there in spans:
            room[there] = value.detach()[here]
        self._seen[key, step] = 1

    def _room(
        self, key: Any, slot: int, shape: tuple[int, ...], like: Tensor, least: int
    ) -> Tensor:
        """The place of one key at one step."""
        room = self._rooms.get(key)
        if room is not None and room.shape[1:] != shape:
            raise InvalidState(
                f"A step has {list(shape)} at {key!r} and an earlier one {list(room.shape[1:])}; "
                "expected the same batch in every step."
            )
        if room is None or slot >= len(room):
            more = like.new_empty(max(least, 2 * slot), *shape)
            if room is not None:
                more[: len(room)] = room
            room = self._rooms[key] = more
        return room[slot]

    def _put_on_disk(
        self,
        place: tuple[Any, int],
        shape: tuple[int, ...],
        spans: Iterable[tuple[slice, slice]],
        value: Tensor,
    ) -> None:
        """Write rows of one key at one step; from a device, all of a step in one go."""
        if place[1] not in self._slots:
            self._send()
        self._slots.setdefault(place[1], len(self._slots))
        if self._shapes.get(place) != shape:
            self._seen[place], self._shapes[place] = self._end, shape
            self._end += 4 * torch.Size(shape).numel()
        at, size = self._seen[place], 4 * torch.Size(shape[1:]).numel()
        rows = [(at + size * there.start, here) for here, there in spans]
        if value.device.type == HOST:
            for start, here in rows:
                self._store(start, value[here].float())
            return
        value = value.clone()  # it may be changed before it is written
        self._waiting += [(start, value[here]) for start, here in rows]

    def _send(self) -> None:
        """Let what waits go to the host, and write what went before."""
        sent, self._sent = self._sent, None
        if self._waiting:
            flat = [value.float().flatten() for _, value in self._waiting]
            places = [(at, len(f)) for (at, _), f in zip(self._waiting, flat, strict=True)]
            whole = flat[0] if len(flat) == 1 else torch.cat(flat)
            self._sent, self._waiting = (places, Fetched(whole)), []
        if sent is not None:
            places, fetched = sent
            values = fetched.arrived().split([n for _, n in places])
            for (at, _), value in zip(places, values, strict=True):
                self._store(at, value)

    def _store(self, at: int, value: Tensor) -> None:
        """Write values at their place in the file."""
        self._file.seek(at)
        self._file.write(value.contiguous().numpy().data)

    def _write(self) -> None:
        """All that was put goes to the file."""
        while self._waiting or self._sent is not None:
            self._send()

    def at(self, key: Any, step: int, device: torch.device | None = None) -> Tensor:
        """What was kept under a key at a step, [batch, ...]; of a file, float32.

        Args:
            key: as for `put`.
            step: the denoising step.
            device: where it is wanted; None is where it lies, of a file the host.
        """
        self._require(key, step)
        if not self.on_disk:
            kept = self._rooms[key][self._slots[step]]
            return kept.clone() if device is None else kept.to(device, copy=True)
        self._write()
        shape = self._shapes[key, step]
        self._file.seek(self._seen[key, step])
        data = bytearray(4 * torch.Size(shape).numel())
        self._file.readinto(data)
        kept = torch.frombuffer(data, dtype=torch.float32).view(shape)
        return kept if device is None else sent(kept, device)

    def stacked(self, keys: Any = None) -> Tensor:
        """[key, step, batch, ...], steps rising.

        Args:
            keys: which, in which order; by default all.
        """
        keys = self.keys if keys is None else list(keys)
        for key in keys:
            for step in self.steps:
                self._require(key, step)
        if self.on_disk:
            return torch.stack([torch.stack([self.at(k, s) for s in self.steps]) for k in keys])
        first = self._rooms[keys[0]]
        whole = first.new_empty(len(keys), len(self.steps), *first.shape[1:])
        for i, key in enumerate(keys):
            for j, step in enumerate(self.steps):
                whole[i, j] = self._rooms[key][self._slots[step]]
        return whole

    def _require(self, key: Any, step: int) -> None:
        if (key, step) not in self._seen:
            raise InvalidState(
                f"Nothing was kept of {key!r} at step {step}: it did not run there, or the run was "
                "broken off."
            )
        if self._missing.get((key, step)):
            raise InvalidState(
                f"Of {key!r} at step {step} only a part of the batch was kept: the run was broken "
                "off there."
            )
