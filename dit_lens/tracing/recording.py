"""Activations to disk as they come, for what is trained on them: sparse autoencoders, probes.

A recording is a folder. `recording.safetensors` says what is in it; the shards hold the activations
of some items at some steps, with an index: of each row its item, label, seed and branch, of each
step its timestep, of each token its place. Items go through the model batch by batch, each batch a
denoising run of its own, and a shard is written as soon as it is full: nothing is held but one
shard and one batch's latents.

Every shard is a pure function of the recording's settings. So a recording that was killed goes on
where it was, batch by batch, and ends with the same files. One of another model, of other settings
or in use is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..hooks.names import NamesFilter, is_shorthand, select
from ..hooks.points import Editor
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..model.pinned import sent, synchronize, uses_pinned
from ..model.state import State
from ..patching.sweeps import scheduler_text
from ..pieces.content import digest
from ..sampling.guidance import model_inputs, n_passes
from ..sampling.loop import prepared
from ..sampling.noise import START, noise
from ..sampling.sample import sample
from ..sampling.schedulers import default_name
from ..sampling.settings import Progress, Seeds, Settings, checked_settings, item_seeds
from ..storage import check_seal, locked, save_tensors, try_folder
from .activations import EXPECTED, FORMAT, INDEX, Activations, Shard, read_plan
from .probe import Probe
from .schema import DTYPES, Recorded
from .site import Site
from .trace import trace

MB = 2**20
STORED_AS = ("float64", "float32", "bfloat16", "float16", "float8_e5m2")
"""What activations may be stored in: what is too large for these is infinite there. PyTorch cuts it
off in other floats of 8 bits, or can't copy them.
"""


def record(
    model: Any,
    names: NamesFilter,
    labels: Labels,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    tokens: arguments.Index | None = None,
    at: arguments.Index | None = None,
    seeds: Seeds = 0,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    batch: int = 16,
    shard: int = 256,
    progress: Progress | None = None,
) -> Activations:
    """Sample images and write activations to disk as they come, in shards.

        data = dit_lens.record(model, ("resid_post", 14), [0, 1, 2] * 100, "acts", at=range(20, 40))
        DataLoader(data, batch_size=4096, shuffle=True)        # or data.batches(4096, seed=0)

    Called again with the same arguments, it goes on where it was, and where nothing is missing it
    reads what is there.

    Args:
        model: a `HookedDiT`, or what it wraps.
        names: which hook points.
        labels: one an image: classes, or prompts in words or by number.
        out: a folder for the shards; it is made.
        dtype: that activations are stored in, such as torch.bfloat16 or "float16"; None is the
            model's. Values that it can't hold are an error.
        tokens: which tokens are stored; None is all.
        at: which steps are stored: numbers, a range, a slice; None is all.
        seeds: an int, image i then has seed + i, or one int an image.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 is none. With it both branches are stored.
        scheduler: as for `dit_lens.sample`.
        eta: how stochastic DDIM, or Euler on a flow, is, 0 to 1.
        batch: images that are run together.
        shard: MB that a file has at most, unless one step has more; about as much memory is used.
        progress: called with (steps done, steps in all), of all batches.

    Returns:
        Activations: the dataset of the first name, in the order given, or of the first that a
            pattern stands for; `.of(name)` is that of another.

    Raises:
        InvalidValue: for what is out of range; for a folder with another recording; if values are
            not finite, or too large for the dtype.
        InvalidState: if another process is recording there; under hooks, edits or a reuse plan.
        UnwritableFile: where nothing can be written.

    >>> import dit_lens, tempfile; model = dit_lens.load("digits")
    >>> data = dit_lens.record(model, ("resid_post", 5), [3, 7], tempfile.mkdtemp(), steps=4)
    >>> len(data), data[0]["activation"].shape    # 4 steps x 2 images x 64 tokens
    (512, torch.Size([64]))
    """
    batch = arguments.whole("batch", batch, 1)
    room = arguments.whole("shard", shard, 1, why="MB") * MB
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    folder = _folder(out)
    with HookedDiT.opening(model) as opened:
        opened.require_eval()
        _require_unedited(opened)
        scheduler = default_name(opened.scheduler) if scheduler is None else scheduler
        settings = checked_settings(steps, guidance, "all", scheduler, eta)
        plan = _planned(opened, names, labels, seeds, settings, at, tokens, dtype, batch, room)
        try_folder(folder)
        with locked(folder / INDEX):
            for left in folder.glob(".*.part"):  # of a process that was killed
                left.unlink(missing_ok=True)
            _settle_on(folder, plan, opened)
            _run(opened, folder, plan, settings, progress)
        first: NamesFilter = names
        if isinstance(names, Sequence) and not isinstance(names, str) and not is_shorthand(names):
            first = names[0]
        return Activations(folder, select(first, opened.names)[0])


def _folder(out: Any) -> Path:
    if not isinstance(out, (str, Path)) or not str(out):
        raise arguments.refusal("out", out, "a folder", wrong_type=not isinstance(out, str))
    return Path(out)


def _require_unedited(model: HookedDiT) -> None:
    """Raise InvalidState under hooks that may change what is recorded: the files would not say
    so.
    """
    edited = sorted(n for n, each in model.instrumentation.ears if isinstance(each, Editor))
    if edited:
        raise InvalidState(
            f"A hook or an edit is on at {edited[0]!r}, of which a recording would say nothing; "
            "expected a plain model: leave the trace, the plan or the hooks first."
        )
    if hooks := State.of(model.transformer).hooks:
        raise InvalidState(
            f"A module hook of PyTorch's is on at {next(iter(hooks))!r}, of which a recording "
            "would say nothing; expected a plain model: take it off first."
        )


# What will be recorded.


def _planned(
    model: HookedDiT,
    names: NamesFilter,
    labels: Labels,
    seeds: Seeds,
    settings: Settings,
    at: arguments.Index | None,
    tokens: arguments.Index | None,
    dtype: torch.dtype | str | None,
    batch: int,
    room: int,
) -> Recorded:
    """All that decides what is in the shards, checked; shapes are those of one pass."""
    chosen = select(names, model.names)
    numbers = model.conditions.numbers(labels).tolist()
    own, given = item_seeds(seeds, len(numbers)), _dtype(dtype)
    every = slice(None) if at is None else at
    steps = sorted(set(arguments.positions("at", every, settings.steps, axis="step").tolist()))
    if tokens is not None:
        bare = [name for name in chosen if model.sites[name][1:2] != ("token",)]
        if bare:
            raise InvalidValue(
                f"{bare[0]!r} has no tokens; its axes are {list(model.sites[bare[0]])}: record it "
                "without tokens=."
            )
        arguments.index("tokens", tokens)
        if known := model.cfg.axis_sizes().get("token"):  # refused before anything runs
            arguments.positions("tokens", tokens, known, axis="token")
    scheduler = prepared(model, settings)
    t, passes = scheduler.timesteps[0], n_passes(model, settings.guidance)
    asked = [*numbers, *[model.conditions.null] * (passes > 1)]
    answers, found = _first_passes(model, chosen, asked, own[0], t, settings, batch)
    shapes = {name: list(value.shape[1:]) for name, value in found.items()}
    places = None
    if tokens is not None:
        least = min(shape[0] for shape in shapes.values())
        places = sorted(set(arguments.positions("tokens", tokens, least, axis="token").tolist()))
        shapes = {name: [len(places), *shape[1:]] for name, shape in shapes.items()}
    kinds = {name: value.dtype if given is None else given for name, value in found.items()}
    images = min(batch, len(numbers)) * passes
    of_a_step = images * sum(math.prod(shapes[n]) * kinds[n].itemsize for n in chosen)
    prompts = (
        []
        if model.cfg.n_classes
        else [model.conditions.prompts[n] for n in dict.fromkeys(numbers) if n >= 0]
    )
    if prompts:  # numbered as they come here, whatever the model has been asked before
        words = model.conditions.words(numbers)
        numbers = [prompts.index(word) if word else model.conditions.null for word in words]
    described = model.family.described  # which modules are blocks, and how it is called
    return Recorded(
        model=answers if described is None else digest([answers, described]),
        names=tuple(chosen),
        axes=tuple(model.sites[name][1:] for name in chosen),
        shapes=tuple(tuple(shapes[name]) for name in chosen),
        dtypes=tuple(str(kinds[name]).removeprefix("torch.") for name in chosen),
        labels=tuple(numbers),
        prompts=tuple(prompts),
        seeds=tuple(own),
        steps=settings.steps,
        at=tuple(steps),
        timesteps=tuple(float(scheduler.timesteps[s]) for s in steps),
        tokens=None if places is None else tuple(places),
        guidance=settings.guidance,
        scheduler=scheduler_text(scheduler),
        eta=settings.eta,
        passes=passes,
        batch=batch,
        shard_steps=min(len(steps), max(1, room // of_a_step)),
    )


def _dtype(dtype: Any) -> torch.dtype | None:
    """A dtype of floating point, given as itself or by its name; None for the model's."""
    if dtype is None:
        return None
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in [DTYPES.get(name) for name in STORED_AS] or found is None:
        raise arguments.refusal(
            "dtype",
            dtype,
            f"one of floating point: {', '.join(STORED_AS)}",
            wrong_type=not isinstance(dtype, (str, torch.dtype)),
        )
    return found


@torch.no_grad()
def _first_passes(
    model: HookedDiT,
    names: Sequence[str],
    labels: Sequence[int],
    seed: int,
    t: Tensor,
    settings: Settings,
    batch: int,
) -> tuple[str, dict[str, Tensor]]:
    """One image of each label through the model, the first one as in the recording: a digest of the
    answers and of what will be recorded, by which the model is known again, and the first one's
    activations. The answers alone would not do: of a DiT with a last layer of zeros, as it is begun
    with, they are the same whatever is before it.
    """
    x = noise([seed], START, model.cfg.latent_shape, model.device)
    strength = settings.guidance if model.cfg.distilled_guidance else 1.0

    def inputs(some: Sequence[int]) -> Sequence[Any]:
        images = x.expand(len(some), *x.shape[1:])
        return model_inputs(model, images, t, torch.tensor(some), strength)

    made = hashlib.sha256()

    def seen(some: Sequence[int]) -> Mapping[str, Tensor]:
        answer, cache = model.run_with_cache(*inputs(some), names_filter=list(names))
        for value in (answer, *(cache[name] for name in names)):
            made.update(value.float().cpu().contiguous().numpy().tobytes())
        return cache

    first, *others = dict.fromkeys(labels)  # a label may have weights of its own
    cache = seen([first])
    if model.cfg.n_classes:
        for i in range(0, len(others), batch):
            seen(others[i : i + batch])
    else:  # some activations are as long as the text, or as the longest of a batch: one by one
        for other in others:
            _require_one_length(model, cache, seen([other]), (first, other))
    return made.hexdigest(), {name: cache[name] for name in names}


def _require_one_length(
    model: HookedDiT,
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    labels: tuple[int, int],
) -> None:
    """Refuse prompts whose texts are not of one length: a recording has one shape."""
    for name in one:
        a, b = list(one[name].shape[1:]), list(other[name].shape[1:])
        if a != b:
            of, than = map(repr, model.conditions.words(labels))
            raise InvalidValue(
                f"{name!r} is {a} for the prompt {of:.60} and {b} for {than:.60}; expected prompts "
                "of one length, or names that have no text."
            )


def _settle_on(folder: Path, plan: Recorded, model: HookedDiT) -> None:
    """Write down what the folder will hold, or find it there; refuse it for another recording."""
    index = folder / INDEX
    if not index.exists():
        stray = next(folder.glob("shard-*.safetensors"), None)
        if stray is not None:
            raise InvalidValue(
                f"{str(folder)!r} has {stray.name} and no {INDEX}; give another folder, or empty "
                "it."
            )
        save_tensors(index, FORMAT, plan.model_dump(mode="json"), {}, model.device)
        return
    known = read_plan(folder)
    if known == plan:
        return
    field, old, new = next(
        (name, getattr(known, name), getattr(plan, name))
        for name in sorted(Recorded.model_fields, key=lambda name: name == "model")
        if getattr(known, name) != getattr(plan, name)
    )
    what = (
        "of another model, or one whose weights have changed"
        if field == "model"
        else f"with {field}={arguments.shown(old)}, where this one has {arguments.shown(new)}"
    )
    raise InvalidValue(f"{str(folder)!r} holds a recording {what}; give another folder.")


# Recording it.


def _run(
    model: HookedDiT, folder: Path, plan: Recorded, settings: Settings, progress: Progress | None
) -> None:
    """Every batch of which a shard is missing."""
    batches = [list(g) for _, g in itertools.groupby(plan.shards, key=lambda shard: shard[1])]

    before = 0

    def tell(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, len(batches) * settings.steps)

    for shards in batches:
        missing = []
        for shard in shards:
            if (folder / shard[0]).exists():
                check_seal(folder / shard[0], f"{EXPECTED}, or no such file: delete it to go on")
            else:
                missing.append(shard)
        if missing:
            items = shards[0][1]
            labels: Any = [plan.labels[i] for i in items]
            if plan.prompts:
                labels = [plan.prompts[n] if n >= 0 else "" for n in labels]
            writer = _Writer(folder, plan, missing)
            with trace(model, probes=[writer]):
                sample(
                    model,
                    labels,
                    [plan.seeds[i] for i in items],
                    settings.steps,
                    settings.guidance,
                    settings.scheduler,
                    settings.eta,
                    progress=tell,
                )
            writer.flush()
        else:
            tell(settings.steps, 0)
        before += settings.steps


class _Writer(Probe):
    """Puts what it observes where it stands in a shard, and writes the shard when it is full."""

    in_parts = True

    def __init__(self, folder: Path, plan: Recorded, shards: Sequence[Shard]) -> None:
        self.names = list(plan.names)
        self.folder, self.plan = folder, plan
        self.at = {
            plan.at[place]: (shard, place - shard[2].start)
            for shard in shards
            for place in shard[2]
        }
        self.shard: Shard | None = None
        self.kept: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        self.tokens: Tensor | None = None  # where the model is

    def observe(self, activation: Tensor, site: Site) -> None:
        """Keep what is wanted of one activation."""
        if site.step not in self.at:
            return
        shard, place = self.at[site.step]
        if shard is not self.shard:
            self.flush()
            self._open(shard, activation.device)
        value = activation
        if self.plan.tokens is not None:
            if self.tokens is None:
                self.tokens = sent(torch.tensor(self.plan.tokens), value.device)
            value = value[:, self.tokens]
        kept = self.kept[site.name]
        part = site.call.context.part
        spans = [(slice(None), slice(None))] if part is None else part.spans()
        for here, there in spans:
            kept[place, there].copy_(value[here], non_blocking=uses_pinned(value.device))

    def _open(self, shard: Shard, device: torch.device) -> None:
        _, items, steps = self.shard = shard
        rows, self.device = len(items) * self.plan.passes, device
        for name, shape, dtype in zip(
            self.plan.names, self.plan.shapes, self.plan.dtypes, strict=True
        ):
            self.kept[name] = torch.empty(
                len(steps), rows, *shape, dtype=DTYPES[dtype], pin_memory=uses_pinned(device)
            )

    def flush(self) -> None:
        """Write the shard that is full."""
        if self.shard is None:
            return
        (file, items, steps), plan = self.shard, self.plan
        synchronize(self.device)
        for name, value in self.kept.items():
            if not bool(value.isfinite().all()):
                raise InvalidValue(
                    f"{name!r} has values at steps {plan.at[steps[0]]} to {plan.at[steps[-1]]} "
                    "that are not finite, or that "
                    f"{str(value.dtype).removeprefix('torch.')} can't hold; record it with "
                    "dtype='bfloat16' or 'float32'."
                )
        index = {
            "item": [*items] * plan.passes,
            "label": [plan.labels[i] for i in items] * plan.passes,
            "seed": [plan.seeds[i] for i in items] * plan.passes,
            "branch": [branch for branch in range(plan.passes) for _ in items],
            "step": [plan.at[s] for s in steps],
        }
        about = {"items": [items.start, items.stop], "steps": [steps.start, steps.stop]}
        tensors = {f"index/{key}": torch.tensor(value) for key, value in index.items()}
        tensors["index/timestep"] = torch.tensor([plan.timesteps[s] for s in steps])
        if plan.tokens is not None:
            tensors["index/token"] = torch.tensor(plan.tokens)
        save_tensors(self.folder / file, FORMAT, about, tensors | self.kept)
        self.shard, self.kept = None, {}

    def result(self) -> xr.Dataset:
        """Nothing: what was observed is on disk."""
        return xr.Dataset()
