"""What a measurement will cost, before it is made: forwards, images, multiply-accumulates, memory,
and time on this very device.

Counts follow from the sizes, exactly, but for clones, whose releases are chosen as the curves are
seen: these are counted as if released evenly. Time and memory come from a short calibration: the
measurement itself with few steps and pairs.
"""

from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 (no public name)

from dit_lens.probes import LayerLens, TwinDivergence

from .. import arguments
from ..errors import InvalidValue
from ..measures.bands import Bands
from ..model.hooked import HookedDiT
from ..model.trajectories import HOST
from ..patching import default_sites, tiles
from ..plans.costs import Costs
from ..sampling.guidance import model_inputs
from ..sampling.loop import prepared
from ..sampling.parts import Split, is_out_of_memory
from ..sampling.schedulers import default_name
from ..sampling.settings import Progress, Settings
from ..twinning.twins import paired_labels, twins
from .outcomes import latents
from .release import RELEASES, one_pass

CALIBRATION = 3
"""Denoising steps of the calibration; the first one warms up."""
TIMED, AT_ONCE = 3, 16
"""Forwards that are timed by themselves, and the most images in one."""


@dataclass(frozen=True)
class Cost:
    """What one measurement takes.

    Attributes:
        what: the measurement.
        exact: whether the counts are exact.
        forwards: calls of the model.
        images: images that go through it; blocks are these times the layers.
        blocks: images times blocks.
        macs: multiply-accumulates.
        batch: images at once.
        memory: bytes on the device at most.
        stored: bytes on disk meanwhile.
        seconds: on this device; NaN where nothing was calibrated.
        available: bytes that the device has free for it.
        kept: bytes of trajectories that are kept elsewhere than on the device, at most.
        room: bytes that are free there.
    """

    what: str
    exact: bool
    forwards: int
    images: int
    blocks: int
    macs: float
    batch: int
    memory: int
    stored: int
    seconds: float
    available: int
    kept: int
    room: int

    def require_fit(self) -> None:
        """Raise InvalidValue if it does not fit the device, or trajectories not where they go."""
        if self.memory > self.available:
            raise InvalidValue(
                f"{self.what} takes about {self.memory / 1e9:.1f} GB and "
                f"{self.available / 1e9:.1f} GB are free; expected fewer images at once (--batch "
                f"{max(1, self.batch // 2)}), "
                f"{'trajectories elsewhere (--trajectories), ' * (not self.kept)}--dtype bfloat16, "
                "or fewer --pairs or --steps."
            )
        if self.kept > self.room:
            raise InvalidValue(
                f"The trajectories of {self.what} take {self.kept / 1e9:.1f} GB and "
                f"{self.room / 1e9:.1f} GB are free where they are kept; expected --trajectories "
                "with a folder that has room, or fewer --pairs or --steps."
            )


def gap_cost(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    *,
    batch: int | None = None,
    clones: bool = True,
    calibrate: bool = True,
    progress: Progress | None = None,
) -> Cost:
    """What `measure_gap` will cost.

    Args:
        model: the opened model, with a scheduler.
        pairs: of twins.
        steps: of denoising.
        batch: images at once; None is all.
        clones: whether clones are run.
        calibrate: whether time and memory are measured on a short run; else they are NaN and
            without activations.
        progress: called with the parts of the calibration that are done, and all of them.

    Raises:
        InvalidValue: for too few pairs or steps.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> gap_cost(model, 16, 10, clones=False, calibrate=False).images
    320
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    pairs = arguments.whole("pairs", pairs, 2, why="each label two times")
    steps = arguments.whole("steps", steps, 2)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    arguments.flag("clones", clones)
    arguments.flag("calibrate", calibrate)
    # twins; a release's first answer is stored, and the run is checked once
    images, forwards = 2 * pairs * steps, steps * len(Split.of(2 * pairs, batch, pairs=True).parts)
    after = 0
    if clones:
        releases = min(RELEASES, steps - 1)
        after = (
            round(releases * (steps / 2 - 0.5))
            if releases < steps - 1
            else steps * (steps - 1) // 2
        )
        parts = len(Split.of(pairs, batch).parts)
        # each end's streams are read as well, and those of the run's own
        read = releases + 1
        images += pairs * (after + 1 + read)
        forwards += parts * (after + 1 + read)
    layers, latent = model.cfg.n_layers, _bytes_of_latents(model)
    trajectories, elsewhere, room = _trajectories(model, 3 * 2 * pairs * (steps + 1) * latent)
    kept = (layers + 2) * 2 * pairs * latent  # the lens's, of the step under way
    weights = sum(p.numel() * p.element_size() for p in model.transformer.parameters())
    seconds, active = float("nan"), 0
    if calibrate:
        seconds, active = _calibrated(
            model, pairs, steps, min(batch or 2 * pairs, 2 * pairs), after, progress
        )
    return Cost(
        what="gap" if clones else "gap --one-pass",
        exact=not clones,
        forwards=forwards,
        images=images,
        blocks=images * layers,
        macs=images * Costs.of(model).whole,
        batch=min(batch or 2 * pairs, 2 * pairs),
        memory=weights + trajectories + kept + active,
        stored=(layers + 2) * 2 * pairs * steps * latent,
        seconds=seconds,
        available=free_memory(model.device) + weights,
        kept=elsewhere,
        room=room,
    )


def patch_cost(
    model: HookedDiT,
    pairs: int,
    steps: int,
    *,
    ways: int = 2,
    direct: bool = False,
    patched: int = 10,
    windows: int = 4,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Cost:
    """What the knock-outs and patches of `dit-lens patch` will cost.

    Args:
        model: the opened model, with a scheduler.
        pairs: of twins.
        steps: of denoising.
        ways: of knocking out.
        direct: whether effects are split.
        patched: pairs of the patches.
        windows: of the patches, from a third of the steps on.
        batch: images at once; None is all.
        progress: called with the parts of the calibration that are done, and all of them.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> patch_cost(model, 16, 12, ways=1, patched=2).images > 16 * 12 * 29
    True
    """
    layers, latent = model.cfg.n_layers, _bytes_of_latents(model)
    knocked = ways * 2 * pairs * steps * (1 + layers * (1 + direct))
    release, patched = steps // 3, min(patched, pairs)
    starts = [span.start for span in tiles(release, steps, min(windows, steps - release))]
    # each site of each layer, from its window on; in its first step only the layers above
    sites = len(default_sites(model))
    later = sum(steps - start - 1 for start in starts) * sites * layers * patched
    first = len(starts) * patched * sites * (layers + 1) // 2
    images = knocked + later + first + 2 * patched * steps
    at_once = min(batch or 2 * pairs, 2 * pairs)
    active, plain = _forward(model, at_once, _Parts(1 + TIMED, progress))
    weights = sum(p.numel() * p.element_size() for p in model.transformer.parameters())
    # the first way's twins, which stay, the latest one's, and the run without a layer
    run, held = 3 * 2 * (steps + 1) * latent, min(ways, 2) + 1
    trajectories, elsewhere, room = _trajectories(model, held * pairs * run)
    return Cost(
        what="patch",
        exact=False,
        forwards=-(-knocked // at_once) + -(-(later + first) // (batch or 16)) + steps,
        images=images,
        blocks=images * layers,
        macs=images * Costs.of(model).whole,
        batch=at_once,
        memory=int(weights + trajectories + active),
        stored=(ways * pairs + patched) * run,
        seconds=images * plain,
        available=free_memory(model.device) + weights,
        kept=elsewhere,
        room=room,
    )


def _trajectories(model: HookedDiT, size: int) -> tuple[int, int, int]:
    """Bytes of trajectories that lie on the device, those that lie elsewhere, and the bytes that
    are free there.
    """
    place = model.trajectories
    if place is None or place == model.device.type:
        return size, 0, 0
    free = free_memory(torch.device(HOST)) if place == HOST else shutil.disk_usage(place).free
    return 0, size, free


def _bytes_of_latents(model: HookedDiT) -> int:
    return 4 * int(torch.Size(model.cfg.latent_shape).numel())


def _inputs(model: HookedDiT, items: int) -> tuple[Any, ...]:
    """What a forward of so many images is given at the first step."""
    scheduler = prepared(model, Settings(steps=4, scheduler=default_name(model.scheduler)))
    labels = torch.tensor([i % model.conditions.n for i in range(items)], device=model.device)
    x = torch.zeros(items, *model.cfg.latent_shape, device=model.device)
    return model_inputs(model, x, scheduler.timesteps[0], labels, 1.0)


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free.

    Args:
        device: the device; of the CPU the host's memory.

    >>> free_memory(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        # what PyTorch holds and nothing is in is free as well
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    lines = Path("/proc/meminfo")
    if lines.exists():
        found = dict(line.split(":", 1) for line in lines.read_text().splitlines())
        return 1024 * int(found["MemAvailable"].split()[0])
    return 1 << 62  # not known: nothing is refused


class _Live(TorchDispatchMode):
    """Adds up the tensors that are alive, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key not in self.users:
                    self.now += size
                self.users[key] = self.users.get(key, 0) + 1
                weakref.finalize(x, self._gone, key, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


def _most_bytes(model: HookedDiT, work: Callable[[], object]) -> int:
    """The bytes that the tensors of some work take on the model's device at most."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Live() as live:
        work()
    return live.most


def _calibrated(
    model: HookedDiT,
    pairs: int,
    steps: int,
    batch: int,
    after: int,
    progress: Progress | None,
) -> tuple[float, int]:
    """Seconds of the whole measurement, and the bytes that a forward takes."""
    part_done = _Parts(1 + TIMED + CALIBRATION + 1, progress)
    few = max(2, min(pairs, batch // 2, AT_ONCE // 2))
    active, plain = _forward(model, batch, part_done)
    bands = Bands.radial(model.cfg.pixels, cut=0.25)
    took: list[float] = []
    lens = LayerLens(bands)
    probes = [TwinDivergence(), lens]
    labels, then = paired_labels(model, few), time.perf_counter()

    def tick(_done: int, _total: int) -> None:
        nonlocal then
        _wait(model)
        now = time.perf_counter()
        took.append(now - then)
        then = now
        part_done()

    pair = twins(model, few, labels, steps=CALIBRATION, probes=probes, batch=batch, progress=tick)
    watched = sorted(took[1:])[0] / (2 * few)
    began = time.perf_counter()
    lens.result(pair.run.finished)
    one_pass(pair, [latents(bands)])
    _wait(model)
    reading = (time.perf_counter() - began) / (CALIBRATION * 2 * few)
    part_done()
    images = 2 * pairs * steps
    unwatched = pairs * (after + 2 + RELEASES) if after else 0
    return images * (watched + reading) + unwatched * plain, active


@dataclass
class _Parts:
    """Counts the parts of a calibration; called as one is done."""

    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _wait(model: HookedDiT) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@torch.no_grad()
def _forward(model: HookedDiT, batch: int, part_done: Callable[[], None]) -> tuple[int, float]:
    """The bytes that a forward of so many images takes, and its seconds an image, at best."""
    inputs = _inputs(model, min(batch, AT_ONCE))
    most = _most_bytes(model, lambda: model(*inputs))
    part_done()
    took = []
    for _ in range(TIMED):
        began = time.perf_counter()
        model(*inputs)
        _wait(model)
        took.append(time.perf_counter() - began)
        part_done()
    return int(most * batch / len(inputs[0])), min(took) / len(inputs[0])


@torch.no_grad()
def fitting_batch(model: HookedDiT, images: int) -> int:
    """The most images, up to so many, that go through the model at once: found by trying, halved
    out of memory.

    Args:
        model: the opened model.
        images: how many are wanted.

    Raises:
        InvalidValue: if a single one does not fit.

    >>> import dit_lens; fitting_batch(dit_lens.load("digits"), 4)
    4
    """
    batch = arguments.whole("images", images, 1)
    while True:
        try:
            model(*_inputs(model, batch))
            return batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if batch == 1:
            raise InvalidValue(
                f"Not even one image fits the memory of {model.device}; expected --dtype bfloat16, "
                "a smaller --size, or a device with more memory."
            )
        batch //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
