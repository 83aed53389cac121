"""Recorded activations as a dataset: what `dit_lens.record` wrote, one vector an example."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.utils.data
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidValue, MissingFile
from ..hooks.names import UnknownName, resolve
from ..storage import check_seal, load_tensors, mapped_tensors
from ..storage.schema import conform
from .schema import DTYPES, Recorded

FORMAT = "dit_lens.record/1"
INDEX = "recording.safetensors"
EXPECTED = "a file that dit_lens.record wrote"
BRANCHES = ("cond", "uncond")
OPEN = 64
"""So many shards are kept open; they are mapped into memory, not read."""
Shard: TypeAlias = tuple[str, range, range]
"""Its file name, its items, and its steps as places in the recorded ones."""


class Activations(torch.utils.data.Dataset[dict[str, Tensor]]):
    """What `dit_lens.record` wrote at one hook point, one token's vector an example.

        data = dit_lens.Activations("acts", "blocks.14.hook_resid_post")
        for batch in data.batches(4096, seed=0):              # shuffled, a few shards at a time
            batch["activation"], batch["label"], batch["step"], batch["token"]
        DataLoader(data, batch_size=4096, shuffle=True)       # as well, in any order

    An example is a dict: `activation`, what is at one token ([d_model], or [head, d_head]; the
    whole of what has no token), and `item`, `label` (class, or place in `prompts`, -1 for none),
    `seed`, `step`, `timestep`, `branch` (0 cond, 1 uncond) and `token` (-1 where there is none),
    each a tensor. Examples are in the order of the recording: by batch, step, branch, item, token.

    Files are mapped and not loaded; each is held against its checksum when first read.

    Args:
        folder: that `dit_lens.record` wrote.
        name: the hook point, or a shorthand such as ("resid_post", 14); may be left out where one
            only was recorded.

    Attributes:
        folder: as given.
        name: the hook point.
        names: all that were recorded.
        shape: of an example's activation.
        dtype: of an example's activation.
        prompts: of a model that is given text, what labels are the places of.
        about: all that was decided for the recording.

    Raises:
        MissingFile: if there is no recording.
        InvalidState: if it is not finished.
        InvalidValue: if it is damaged.
        UnknownName: for a name that was not recorded, and without one where several were.
    """

    def __init__(self, folder: str | Path, name: Any = None) -> None:
        if not isinstance(folder, (str, Path)):
            raise arguments.refusal("folder", folder, "a folder", wrong_type=True)
        self.folder = Path(folder)
        self.about = read_plan(self.folder)
        self.names = list(self.about.names)
        if name is None and len(self.names) > 1:
            raise UnknownName(
                f"{str(folder)!r} has {len(self.names)} hook points; say which: "
                f"Activations(folder, {self.names[0]!r})."
            )
        self.name = self.names[0] if name is None else resolve(name, self.names)
        place = self.names.index(self.name)
        shape, axes = self.about.shapes[place], self.about.axes[place]
        self.tokens = axes[:1] == ("token",)
        self.shape = torch.Size(shape[1:] if self.tokens else shape)
        self.dtype = DTYPES[self.about.dtypes[place]]
        self.prompts = list(self.about.prompts)
        self._each = shape[0] if self.tokens else 1
        self._shards = self.about.shards
        missing = [file for file, *_ in self._shards if not (self.folder / file).exists()]
        if missing:
            raise InvalidState(
                f"{str(folder)!r} is not finished: {len(missing)} of {len(self._shards)} shards "
                "are missing; call dit_lens.record again with the same arguments to go on."
            )
        sizes = [len(i) * self.about.passes * len(s) * self._each for _, i, s in self._shards]
        self._ends = torch.tensor(list(itertools.accumulate(sizes)))
        self._open: dict[int, dict[str, Tensor]] = {}
        self._verified: set[int] = set()

    def of(self, name: Any) -> Activations:
        """The same recording at another hook point.

        Args:
            name: the hook point, or a shorthand.
        """
        return Activations(self.folder, name)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return (
            f"Activations({str(self.folder)!r}, {self.name!r}): {len(self)} of {list(self.shape)}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        number = arguments.whole("i", i)
        if not -len(self) <= number < len(self):
            raise IndexError(f"There are {len(self)} examples; got {number}.")  # ends a `for` loop
        return {key: value[0] for key, value in self.take([number % len(self)]).items()}

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several at once, which is how a DataLoader asks."""
        found = self.take(places)
        return [{key: value[i] for key, value in found.items()} for i in range(len(places))]

    def take(self, places: Any) -> dict[str, Tensor]:
        """Several examples as one dict of tensors [example, ...].

        Args:
            places: numbers from 0, a slice, or a mask.

        Raises:
            InvalidValue: for one that is not there.
        """
        wanted = arguments.positions("places", places, len(self), axis="example")
        shards = torch.searchsorted(self._ends, wanted, right=True)
        found: dict[str, Tensor] = {}
        for number in shards.unique().tolist():
            here = (shards == number).nonzero()[:, 0]
            start = int(self._ends[number - 1]) if number else 0
            for key, value in self._rows(number, wanted[here] - start).items():
                if key not in found:
                    found[key] = value.new_empty(len(wanted), *value.shape[1:])
                found[key][here] = value
        return found

    def batches(
        self, size: int, *, seed: int | None = None, window: int = 8
    ) -> Iterator[dict[str, Tensor]]:
        """All examples once, in dicts of tensors [example, ...]; the last may be shorter.

        Args:
            size: examples in a batch.
            seed: of the shuffling, another for each epoch; None keeps the order.
            window: so many shards, drawn at random, are mixed at a time: as many are read from at
                once, however large the recording is.
        """
        size, window = arguments.whole("size", size, 1), arguments.whole("window", window, 1)
        seed = arguments.optional(arguments.seed, "seed", seed)
        return self._batches(size, seed, window)

    def _batches(self, size: int, seed: int | None, window: int) -> Iterator[dict[str, Tensor]]:
        left = torch.zeros(0, dtype=torch.long)
        for places in self._windows(seed, window):
            left = torch.cat([left, places])
            while len(left) >= size:
                yield self.take(left[:size])
                left = left[size:]
        if len(left):
            yield self.take(left)

    def _windows(self, seed: int | None, window: int) -> Iterator[Tensor]:
        """The places of all examples, some shards' at a time, mixed if there is a seed."""
        order = torch.arange(len(self._shards))
        draw = torch.Generator()
        if seed is not None:
            draw.manual_seed(seed)
            order = torch.randperm(len(self._shards), generator=draw)
        for some in order.split(window):
            parts = [
                torch.arange(int(self._ends[n - 1]) if n else 0, int(self._ends[n]))
                for n in some.tolist()
            ]
            places = torch.cat(parts)
            yield places if seed is None else places[torch.randperm(len(places), generator=draw)]

    def _rows(self, number: int, places: Tensor) -> dict[str, Tensor]:
        """Examples of one shard."""
        shard = self._shard(number)
        value, n = shard[self.name], self._each
        rows = value.shape[1]
        step, row, token = places // (rows * n), places // n % rows, places % n
        flat = value.flatten(0, 2) if self.tokens else value.flatten(0, 1)
        tokens = shard.get("index/token")
        if not self.tokens:
            token = torch.full_like(token, -1)
        elif tokens is not None:
            token = tokens[token]
        found = {"activation": flat[places]}
        found |= {key: shard[f"index/{key}"][row] for key in ("item", "label", "seed")}
        found |= {key: shard[f"index/{key}"][step] for key in ("step", "timestep")}
        return found | {"branch": shard["index/branch"][row], "token": token}

    def _shard(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped; the first time it is held against its checksum."""
        if number not in self._open:
            while len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open)))
            file, items, steps = self._shards[number]
            path = self.folder / file
            if number not in self._verified:
                check_seal(path, EXPECTED)
            about, tensors = mapped_tensors(path, FORMAT, EXPECTED)
            expected = {"items": [items.start, items.stop], "steps": [steps.start, steps.stop]}
            shape = (len(steps), len(items) * self.about.passes)
            value = tensors.get(self.name)
            if about != expected or value is None or value.shape[:2] != shape:
                raise InvalidValue(f"{str(path)!r} is a shard of another recording.")
            self._open[number] = tensors
            self._verified.add(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """For a DataLoader's workers, each of which opens the files itself."""
        return self.__dict__ | {"_open": {}}


def read_plan(folder: Path) -> Recorded:
    """What a folder says that it holds.

    Raises:
        MissingFile: if there is no recording.
        InvalidValue: if that is damaged, or can't be read.
    """
    path = folder / INDEX
    try:
        there = path.exists()
    except OSError as error:  # too long, or in a folder that may not be looked into
        raise InvalidValue(f"{str(folder)!r} can't be read ({error.strerror}).") from None
    if not there:
        raise MissingFile(
            f"There is no recording at {str(folder)!r}; expected a folder that dit_lens.record "
            "wrote."
        )
    about, _ = load_tensors(path, FORMAT, EXPECTED)
    return conform(about, Recorded, repr(str(path)))
