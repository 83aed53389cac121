"""What using dit_lens costs, beside the targets: the second half of `make bench`.

Each row is some work, timed against other work of the same repeat. Where a ratio near 1 is to be
told from 1, the two are timed in turns, this, that, that, this, and again. The targets were set
before anything was measured. One is met if the median is at or below it, and open if the median is
above but the lower quartile is not: then this machine was too noisy to tell.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dit_lens
from dit_lens.hooks.points import StopForward
from dit_lens.measures import agreement
from dit_lens.model.witness import Witnessing
from dit_lens.probes import LayerLens

STREAMS = "blocks.*.hook_resid_post"
STEPS = 5  # of a sampled run
Forward = Callable[[], object]
Row = Callable[[], AbstractContextManager[Forward]]


SMALL: dict[str, Any] = {
    "layers": 28,
    "heads": 4,
    "d_head": 16,
    "channels": 1,
    "size": 16,
    "classes": 10,
}
SMALL_NAME = "28 layers, width 64, 64 tokens"
WIDE: dict[str, Any] = {"heads": 16, "d_head": 72, "channels": 4, "size": 32, "classes": 1000}
"""DiT-XL/2, of as many layers as are asked for."""


def wide_name(model: DiTTransformer2DModel) -> str:
    """What the tables call a model of DiT-XL/2's width."""
    layers, dtype = model.config.num_layers, str(model.dtype).removeprefix("torch.")
    part = {28: "", 1: "one block of "}.get(layers, f"{layers} layers of ")
    return f"{part}DiT-XL/2 (width 1152, 256 tokens), {dtype}"


def make_model(
    layers: int,
    heads: int,
    d_head: int,
    channels: int,
    size: int,
    classes: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiTTransformer2DModel:
    """A DiT with random weights; time does not depend on them."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=d_head,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=1,
    ).eval()
    # diffusers' own `to` warns of nothing here
    return torch.nn.Module.to(model, device, dtype)


def twin_of(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Other modules around the same weights: no copy is luckier in the cache."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def clock() -> float:
    """Process time; with a GPU, the wall clock once it has done what it was given."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(forward: Forward, inner: int) -> float:
    """The clock's time of one forward."""
    began = clock()
    for _ in range(inner):
        forward()
    return (clock() - began) / inner


def spread(values: list[float], form: str) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}}  ({low:{form}} to {high:{form}})"


@dataclass(frozen=True)
class Cost:
    """One row: some work, and what it is held against.

    Attributes:
        row: sets up and gives the work.
        of: the row that it is held against.
        times: how many of those.
        turns: how often the two are timed in turns; 0 is each by itself, in the order drawn.
        target: what the ratio should not pass.
        once: whether the work is timed once a repeat, and not as often as a forward.
    """

    row: Row
    of: str = "bare forward"
    times: float = 1
    turns: int = 0
    target: float | None = None
    once: bool = False


def simply(work: Forward) -> Row:
    """Work that needs no setting up."""
    return lambda: nullcontext(work)


class Bench:
    """One model in the ways that rows use it: bare, with plain hooks, and opened."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        config, device = model.config, model.device
        self.bare = model
        self.plain = twin_of(model)
        self.model = dit_lens.HookedDiT(twin_of(model), scheduler=DDIMScheduler(1000))
        self.layers: int = config.num_layers
        shape = config.in_channels, config.sample_size, config.sample_size
        self.inputs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {
            batch: (
                torch.randn(batch, *shape, device=device, dtype=model.dtype),
                {
                    "timestep": torch.full((batch,), 500, device=device),
                    "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
                },
            )
            for batch in (1, 2)
        }
        with dit_lens.trace(self.model) as self.traced:
            self.forward()
        self.stream = self.traced["resid_post", 0][0]

    def bare_forward(self, batch: int = 1) -> object:
        x, inputs = self.inputs[batch]
        return self.bare(x, **inputs)

    def forward(self) -> object:
        x, inputs = self.inputs[1]
        return self.model.transformer(x, **inputs)

    @contextmanager
    def plain_hooks(self) -> Iterator[Forward]:
        """Every block's output kept by a forward hook of PyTorch's."""
        kept: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda module, args, output, i=i: kept.__setitem__(i, output)
            )
            for i, block in enumerate(self.plain.transformer_blocks)
        ]
        x, inputs = self.inputs[1]
        yield lambda: self.plain(x, **inputs)
        for handle in handles:
            handle.remove()

    @contextmanager
    def stopped(self) -> Iterator[Forward]:
        """The first layer alone: a forward hook of PyTorch's ends the forward there. To compute
        that layer anew can't take less.
        """
        x, inputs = self.inputs[1]

        def stop(module: object, args: object, output: Tensor) -> None:
            raise StopForward

        def forward() -> None:
            with suppress(StopForward):
                self.plain(x, **inputs)

        handle = self.plain.transformer_blocks[0].register_forward_hook(stop)
        yield forward
        handle.remove()

    @contextmanager
    def watching(self, names: str | None = None, lens: bool = False) -> Iterator[Forward]:
        """Forwards inside of an open trace."""
        probes = [LayerLens()] if lens else []
        with dit_lens.trace(self.model, names=names, probes=probes):
            yield self.forward

    @contextmanager
    def editing(self, name: str) -> Iterator[Forward]:
        """Forwards with an edit that scales an activation."""
        with self.model.hooks([(name, lambda a, hook: 0.5 * a)]):
            yield self.forward

    def sums(self) -> None:
        """The checksums that one watched pass takes."""
        taking, inst = Witnessing(), self.model.instrumentation
        for name in inst.witnessed:
            taking.see(self.stream, name)
        taking.finished()

    def patterns(self) -> object:
        x, inputs = self.inputs[1]
        return self.model.run_with_cache(x, *inputs.values(), names_filter="attn.hook_pattern")

    def open_and_close(self) -> None:
        with dit_lens.trace(self.model):
            pass

    def read(self, layer: int) -> Row:
        """One stream of the one step that was traced, recomputed."""
        name = f"blocks.{layer}.hook_resid_post"
        return simply(lambda: self.traced.get(name, steps=0))


def common(b: Bench, witness: float) -> dict[str, Cost]:
    """The rows that models of both sizes have."""
    n = b.layers
    rows = {
        "bare forward": Cost(simply(b.bare_forward)),
        "hook points, idle": Cost(simply(b.forward)),
        "watched: witness, inputs kept": Cost(
            b.watching, "hook points, idle", turns=2, target=witness
        ),
        "the witness's sums alone": Cost(simply(b.sums), target=witness - 1, once=True),
        f"{n} streams kept: plain hooks": Cost(b.plain_hooks),
        f"{n} streams kept: trace(names=...)": Cost(
            lambda: b.watching(STREAMS), f"{n} streams kept: plain hooks", turns=1, target=1.0
        ),
        "edit of one layer": Cost(lambda: b.editing(f"blocks.{n // 2}.hook_attn_out")),
        f"edits of {n} layers": Cost(lambda: b.editing("hook_attn_out")),
        f"patterns of {n} layers": Cost(simply(b.patterns)),
        f"LayerLens, {n + 1} readings": Cost(
            lambda: b.watching(lens=True), "watched: witness, inputs kept", turns=1, target=1.4
        ),
        "layer 0: plain hook that stops there": Cost(b.stopped),
    }
    for layer in sorted({0, n // 2, n - 1}):
        limit = 1.15 * (layer + 1) / n + 0.02
        rows[f"lazy read, layer {layer}"] = Cost(b.read(layer), target=limit)
    return rows


def wide_rows(wide: Bench, small: Bench) -> dict[str, Cost]:
    """The rows at DiT-XL/2 width."""
    # Opening looks at modules, and not at what they compute: a narrow model of 28 layers has as
    # many as DiT-XL/2, whose forward is 28 / n times that of n of its layers.
    opening = Cost(simply(small.open_and_close), times=28 / wide.layers, target=0.02, once=True)
    return common(wide, 1.01) | {"opening and closing, 28 layers": opening}


def small_rows(b: Bench, half: Bench) -> dict[str, Cost]:
    """The rows of a small model, those of whole runs among them."""

    def sampled(guidance: float = 1.0) -> Forward:
        return lambda: dit_lens.sample(b.model, [3], steps=STEPS, guidance=guidance)

    def twins() -> object:
        return dit_lens.twins(b.model, pairs=1, steps=STEPS, release=2)

    bands = dit_lens.Bands.radial((32, 32), 6)
    a, c = torch.randn(2, 64, 4, 32, 32, device=b.bare.device)

    def by_band() -> object:
        """What agreement is, as it is written down: each twin's part in each band, multiplied."""
        return [
            [(p * q).flatten(1).sum(1) for p, q in ((x, y), (x, x), (y, y))]
            for x, y in ((bands.project(a, b), bands.project(c, b)) for b in range(bands.n))
        ]

    apart = "agreement of 64 pairs, band by band"
    run, pair = f"{STEPS} bare forwards", f"{STEPS} bare forwards of batch 2"
    return common(b, 1.03) | {
        "opening and closing": Cost(simply(b.open_and_close), once=True),
        run: Cost(simply(lambda: [b.bare_forward() for _ in range(STEPS)]), times=STEPS, once=True),
        pair: Cost(
            simply(lambda: [b.bare_forward(2) for _ in range(STEPS)]), times=STEPS, once=True
        ),
        f"sample, {STEPS} steps": Cost(simply(sampled()), of=run, once=True),
        "the same, guidance": Cost(simply(sampled(4.0)), of=pair, once=True),
        f"twins, 1 pair, {STEPS} steps": Cost(simply(twins), of=pair, once=True),
        "bare forward, bfloat16": Cost(simply(half.bare_forward)),
        apart: Cost(simply(by_band), once=True),
        "agreement of 64 pairs": Cost(
            simply(lambda: agreement(a, c, bands)), of=apart, target=0.2, once=True
        ),
        "watched, bfloat16": Cost(half.watching, of="bare forward, bfloat16", turns=1),
    }


def measure(
    costs: dict[str, Cost], repeats: int, inner: int, warm: bool, title: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and ratios by row and repeat; in each repeat all rows run once, in an order drawn
    anew.
    """
    times: dict[str, list[float]] = {name: [] for name in costs}
    ratios: dict[str, list[float]] = {name: [] for name in costs}
    order, rng = list(costs), random.Random(0)

    def once(name: str) -> float:
        with costs[name].row() as work:
            if warm and not costs[name].once:
                work()
            return seconds(work, 1 if costs[name].once else inner)

    for _ in track(range(repeats), title):
        rng.shuffle(order)
        beside: dict[str, float] = {}
        for name in order:
            of, turns = costs[name].of, range(costs[name].turns)
            seen = [(who, once(who)) for _ in turns for who in (of, name, name, of)]
            if seen:
                beside[name] = statistics.median(t for who, t in seen if who == of)
            own = [t for who, t in seen if who == name] or [once(name)]
            times[name].append(statistics.median(own))
        for name, cost in costs.items():
            base = beside.get(name, times[cost.of][-1])
            ratios[name].append(times[name][-1] / (cost.times * base))
    return times, ratios


def verdict(values: list[float], target: float | None) -> tuple[str, str]:
    """The target, and whether it is met."""
    if target is None:
        return "", ""
    low, middle, _ = statistics.quantiles(values, n=4)
    return f"{target:.3f}", "met" if middle <= target else "open" if low <= target else "missed"


def show(
    title: str, costs: dict[str, Cost], repeats: int, inner: int, warm: bool, out: Console
) -> None:
    """Measure and print one table."""
    times, ratios = measure(costs, repeats, inner, warm, title)
    table = Table("", "ms", "ratio", "to", "target", "", title=title)
    for name, cost in costs.items():
        own = 1e3 * statistics.median(times[name])
        figure = "1" if name == cost.of else spread(ratios[name], ".3f")
        base = cost.of.replace("bare forward", "bare")
        base = "" if name == cost.of else f"{cost.times:.3g} x {base}" if cost.times > 1 else base
        table.add_row(name, f"{own:.2f}", figure, base, *verdict(ratios[name], cost.target))
    out.print(table)
    out.print("")


def cases_of(script: str) -> list[dict[str, Any]]:
    """What a script prints, in a process of its own from which freed memory leaves."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "32768"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def show_memory(out: Console) -> None:
    """Print what reading and saving take, and what is counted."""
    if not Path("/proc/self/clear_refs").exists():
        out.print("Memory is measured on Linux only.")
        return
    table = Table("", "MB given", "MB taken", "ratio", "target", "", title="Memory at its highest")
    for case in cases_of("memory.py"):
        ratio = case["taken"] / case["given"]
        sizes = [f"{case[key] / 1e6:.1f}" for key in ("given", "taken")]
        met = "met" if ratio <= case["target"] else "missed"
        table.add_row(case["name"], *sizes, f"{ratio:.3f}", f"{case['target']:.3f}", met)
    out.print(table)
    out.print("")
    table = Table("", "", "target", "", title="Counted")
    for case in cases_of("counts.py"):
        met = "met" if case["figure"] <= case["target"] else "missed"
        table.add_row(case["name"], f"{case['figure']:.3f}", f"{case['target']:g}", met)
    out.print(table)


def show_costs(
    repeats: int, out: Console, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Measure and print everything.

    Args:
        repeats: how often each row is run.
        out: where to.
        device: where the models are.
        dtype: of the wide model.
    """
    small = Bench(make_model(**SMALL, device=device))
    half = Bench(make_model(**SMALL, device=device, dtype=torch.bfloat16))
    layers = 3 if device == "cpu" else 28
    wide = Bench(make_model(layers, **WIDE, device=device, dtype=dtype))
    show(f"{wide_name(wide.bare)}, batch 1", wide_rows(wide, small), repeats, 1, False, out)
    title = f"{SMALL_NAME}, batch 1"
    show(title, small_rows(small, half), 3 * repeats // 2, 5, True, out)
    if device == "cpu":  # bytes and counts are the same on every device
        show_memory(out)
