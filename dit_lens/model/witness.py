"""Witnesses: checksums of the streams in one pass, which prove that a recomputation is the same.

While a run is watched, every stream that leaves a layer, and what the model returns, leaves two
numbers an item: a sum of its bit patterns, as wrapping 64-bit integers, and a sum of its values.
Both stay on the device. The first does not depend on the order of addition, and changes with any
bit and with the order of tokens or channels; so a recomputation with equal sums is equal bit for
bit, but for changes that cancel by chance. The second tells rounding (another kernel, another batch
size) from another computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from ..errors import DitLensError
from ..hooks.names import layer_of, site_of
from ..hooks.points import HookPoint, Listener, Observer
from ..storage.checksums import Checksum, checksum
from .kernels import may_use_tf32
from .taken import Layers

STREAMS = ("hook_resid_post", "text.hook_resid_post")


class Witness(Mapping[str, "Checksum"]):
    """The checksums of one pass, by hook name. Those that were taken together are kept together, as
    a tensor for each name would take a small model longer than the sums.

    Attributes:
        text_tokens: how long the batch's texts are in the pass, with padding; 0 where no stream is
            a text's.
    """

    text_tokens = 0

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Checksum, int]] = {}

    def add(self, names: Iterable[str], sums: Checksum) -> None:
        """Take in checksums [name, batch]."""
        self.rows |= {name: (sums, row) for row, name in enumerate(names)}

    def __getitem__(self, name: str) -> Checksum:
        sums, row = self.rows[name]
        return Checksum(sums.bits[row], sums.total[row])

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def together(self) -> Checksum:
        """All of them, [name, batch]."""
        return Checksum(*map(torch.stack, zip(*self.values(), strict=True)))

    def items_at(self, index: Tensor) -> Witness:
        """The checksums of some of the batch's items."""
        found, taken = Witness(), dict[int, Checksum]()
        for name, (sums, row) in self.rows.items():
            if id(sums) not in taken:
                taken[id(sums)] = Checksum(sums.bits[:, index], sums.total[:, index])
            found.rows[name] = taken[id(sums)], row
        return found


class NotReproduced(DitLensError, RuntimeError):
    """A recomputation that is not the computation that was traced or sampled."""


CAUSES = (
    "weights, adapters, module hooks or buffers that changed, or an edit that is not a pure "
    "function of its activation and step"
)
"""What usually makes a recomputation another one."""


class Prover(Listener):
    """Listens to the streams for whoever takes the checksums of the pass under way.

    Args:
        taking: gives them; None where nobody does.
    """

    late = True

    def __init__(self, taking: Layers[Witnessing | None]) -> None:
        super().__init__()
        self.taking, self.scope = taking, self

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        if (taking := self.taking.top) is not None:
            taking.see(x, point.name)
        return x


class Witnessing:
    """Takes the checksums of the streams of one pass.

    Small streams are copied, and their sums taken together at the end: one by one they would cost a
    small model several percent of its time, nearly all of it in calls. The sums of all streams are
    put together at the end too: a few bytes that are kept from the midst of a forward would keep
    the memory around them from being used again, at every step of a run.

    Attributes:
        witness: the checksums by hook name, once the pass is `finished`.
    """

    SMALL = 1 << 16  # bytes

    def __init__(self) -> None:
        self.witness = Witness()
        self.large: dict[str, Checksum] = {}
        self.small: dict[str, Tensor] = {}

    def see(self, value: Tensor, name: str) -> None:
        """Take the checksum of one stream."""
        if is_text(name):
            self.witness.text_tokens = value.shape[1]
        if value.numel() * value.element_size() > self.SMALL:  # nbytes is not traced by compilers
            self.large[name] = checksum(value)
        else:
            self.small[name] = (value.detach() if value.requires_grad else value).clone()

    def finished(self) -> None:
        """Take what sums are left."""
        for streams in _alike(self.small):
            sums = checksum(torch.cat(list(streams.values())))
            self.witness.add(streams, Checksum(*(part.view(len(streams), -1) for part in sums)))
        for streams in _alike({name: one.bits for name, one in self.large.items()}):
            each = zip(*(self.large[name] for name in streams), strict=True)
            self.witness.add(streams, Checksum(*map(torch.stack, each)))
        self.small, self.large = {}, {}


def _alike(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors that can be put together: of one shape and dtype, on one device."""
    found: dict[tuple[torch.Size, torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, value in values.items():
        found.setdefault((value.shape, value.dtype, value.device), {})[name] = value
    return list(found.values())


@lru_cache(maxsize=4096)  # asked at every stream of every pass
def is_text(name: str) -> bool:
    """Whether a stream is a text's.

    Args:
        name: its hook name.
    """
    return site_of(name).startswith("text.")


def witnessed(names: list[str]) -> list[str]:
    """The hook names that leave checksums: the streams that leave each layer, and the output."""
    return [n for n in names if site_of(n) in STREAMS or n == "hook_sample"]


def until(name: str, names: list[str], then: Mapping[str, Checksum]) -> str:
    """Where a pass has to go to prove an activation: to the end of its own layer.

    Args:
        name: the activation's hook name.
        names: the model's hook names, in forward order.
        then: the original's checksums.
    """
    last = name
    for later in islice(names, names.index(name), None):
        if later in then:
            if last in then and layer_of(later) != layer_of(last):
                break
            last = later
    return last


FINE = 1e-4
"""Precision at which a change that matters does not look like rounding; float16 has 1e-3."""


TF32 = 2.0**-10
"""Precision of float32 products on NVIDIA's tensor cores."""


def precision(value: Tensor) -> float:
    """The precision with which activations were computed: that of their dtype, or TF32's."""
    if value.dtype == torch.float32 and value.device.type == "cuda" and may_use_tf32():
        return TF32
    return torch.finfo(value.dtype).eps


def tolerance(precision: float) -> float:
    """How far activations may be off, relative to their norm, by rounding alone: an error of one
    unit in the last place grows on its way through the layers.
    """
    return 3 * float(precision ** (2 / 3))


@dataclass(frozen=True)
class Departure:
    """Where a recomputation first departs from what was traced.

    Attributes:
        name: the first hook name whose bits differ.
        rounding: whether all differences are of the size of rounding.
        worst: the first hook name that differs by more, or `name`.
        coarse: whether streams have so few bits that a change of some percent looks like rounding.
    """

    name: str
    rounding: bool
    worst: str
    coarse: bool = False

    def is_other(self, causes: Sequence[str]) -> bool:
        """Whether it is another computation, and not the same but for rounding: what looks like
        rounding at few bits is none where something changed.

        Args:
            causes: what is seen to have changed.
        """
        return not self.rounding or (self.coarse and bool(causes))

    def error(self, step: int, causes: Sequence[str]) -> NotReproduced:
        """The error for a departure that is more than rounding.

        Args:
            step: the denoising step.
            causes: what is seen to have changed.
        """
        layer = layer_of(self.worst)
        where = "the output" if layer is None else f"layer {layer}"
        seen = "; ".join(causes) or f"usual causes are {CAUSES}"
        return NotReproduced(
            f"Step {step} can't be recomputed: from {where} on ({self.worst!r}) it is another "
            f"computation than the one that was run; {seen}. Run it again, with names= for what "
            "you will read."
        )

    def warning(self, step: int, causes: Sequence[str]) -> str:
        """The sentence for a departure by rounding.

        Args:
            step: the denoising step.
            causes: what is seen to have changed.
        """
        seen = f", or a small effect: {'; '.join(causes)}" if causes else ""
        return (
            f"Step {step} was recomputed to within rounding, not bit for bit, from {self.name!r} "
            f"on: another kernel, batch size or number of threads than in the run{seen}."
        )


def compare(
    then: Mapping[str, Checksum], now: Mapping[str, tuple[Checksum, Tensor]]
) -> Departure | None:
    """Hold a recomputation against the witness of the original; None if they agree bit for bit.

    Args:
        then: the original's checksums, by hook name.
        now: the recomputation's checksums and norms [batch], by hook name in forward order, with
            the norm multiplied by the tolerance.
    """
    shared = [name for name in now if name in then]
    if not shared:
        return None
    odd = torch.stack([(then[n].bits != now[n][0].bits).any() for n in shared])
    if not bool(odd.any()):
        return None
    far = torch.stack(
        [~((then[n].total - now[n][0].total).abs() <= now[n][1]).all() for n in shared]
    )
    different, beyond = odd.tolist(), (odd & far).tolist()
    first = shared[different.index(True)]
    worst = shared[beyond.index(True)] if any(beyond) else first
    return Departure(first, not any(beyond), worst)


class Proof:
    """Holds one recomputation against the witness of the original.

        proof = Proof(call.witness, model.names, until)
        ... run with proof.listeners ...
        departure = proof.departure()

    Args:
        then: the original's checksums.
        names: the model's hook names, in forward order.
        last: the name at which the recomputation ends.
        texts: how many text tokens each item had. A text's stream that has another padding now is
            not held against them.

    Attributes:
        padded: whether there was such a stream.
        coarse: as of a `Departure`.
    """

    def __init__(
        self, then: Mapping[str, Checksum], names: list[str], last: str, texts: Sequence[int] = ()
    ) -> None:
        self.then, self.texts, self.padded, self.coarse = then, set(texts), False, False
        self.names = [n for n in names[: names.index(last) + 1] if n in then]
        self.now: dict[str, tuple[Checksum, Tensor]] = {}

    @property
    def listeners(self) -> list[tuple[str, Observer]]:
        """What takes the checksums of the recomputation."""
        return [(name, Observer(self.see)) for name in self.names]

    def see(self, value: Tensor, point: HookPoint) -> None:
        """Take the checksum of one stream of the recomputation."""
        if self.texts and is_text(point.name) and self.texts != {value.shape[1]}:
            self.padded = True
            self.names.remove(point.name)
            return
        held = precision(value)
        self.coarse |= held > FINE
        flat = value.detach().reshape(len(value), -1)
        norm = torch.linalg.vector_norm(flat.float(), dim=1)
        self.now[point.name] = checksum(value), norm * tolerance(held)

    def departure(self) -> Departure | None:
        """Where the recomputation departs; None if it is the same bit for bit."""
        absent = [name for name in self.names if name not in self.now]
        if absent:
            return Departure(absent[0], False, absent[0])
        found = compare(self.then, self.now)
        return None if found is None else replace(found, coarse=self.coarse)
