"""What hook points cost: `make bench`, or `python tests/benchmarks/bench.py [--repeats 12]
[--device cuda --dtype bfloat16]`.

Prints, stores nothing. Below the tables described here come those of `costs.py`: what witnesses,
reads, edits and runs cost, beside their targets, and of `reuse_cost.py`, what running a plan does.

Each row is one way to watch a forward. In every repeat all rows run once, in an order drawn anew,
so that drift of the machine falls on all alike; times are process time on one thread, which other
programs disturb least, and with a GPU the wall clock, waiting for it before and after. There the
wide model has all its 28 layers. Differences and ratios are to the bare forward of the same repeat;
figures are medians over repeats, with the quartiles beside them. Setting up (attaching hooks,
opening a trace) happens once a denoising run and is not in the rows; what it costs is the line
below each table. Hook points, plain hooks and nnsight each have modules of their own around the
same weights.

A ratio below 1 is no slip of the clock: a hooked block calls SDPA directly, where diffusers'
attention, among other things, inspects its processor's signature at every call.
"""

import argparse
import importlib.util
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from costs import (
    SMALL,
    SMALL_NAME,
    STREAMS,
    WIDE,
    Forward,
    Row,
    clock,
    make_model,
    seconds,
    show_costs,
    spread,
    twin_of,
    wide_name,
)
from diffusers import DiTTransformer2DModel
from reuse_cost import show_reuse
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dit_lens
from dit_lens.probes import SpectralSplit


def rows(model: DiTTransformer2DModel, batch: int) -> dict[str, Row]:
    """The ways to watch, each a context manager that sets up and gives the forward to time."""
    config = model.config
    place: dict[str, Any] = {"device": model.device}
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **place)
    x, t = x.to(model.dtype), torch.full((batch,), 500, **place)
    y = torch.zeros(batch, dtype=torch.long, **place)
    inputs = {"timestep": t, "class_labels": y}
    hooked, plain = dit_lens.HookedDiT(twin_of(model)), twin_of(model)
    watched = nnsight.NNsight(twin_of(model))
    bridged = dit_lens.to_nnsight(twin_of(model))
    # optional: it needs many packages, which a machine with a GPU may not have
    has_lens = importlib.util.find_spec("transformer_lens") is not None
    lensed: Any = dit_lens.to_transformer_lens(twin_of(model)) if has_lens else None
    bands = dit_lens.Bands.radial(hooked.cfg.grid)

    @contextmanager
    def bare() -> Iterator[Forward]:
        yield lambda: model(x, **inputs)

    @contextmanager
    def idle() -> Iterator[Forward]:
        yield lambda: hooked.transformer(x, **inputs)

    @contextmanager
    def plain_hooks(keep: Callable[[Tensor], Tensor]) -> Iterator[Forward]:
        kept: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda module, args, output, i=i: kept.__setitem__(i, keep(output))
            )
            for i, block in enumerate(plain.transformer_blocks)
        ]
        yield lambda: plain(x, **inputs)
        for handle in handles:
            handle.remove()

    @contextmanager
    def trace(names: str | None = None, probe: bool = False) -> Iterator[Forward]:
        with dit_lens.trace(
            hooked, names=names, probes=[SpectralSplit(STREAMS, bands)] if probe else []
        ):
            yield lambda: hooked.transformer(x, **inputs)

    @contextmanager
    def cache(names: str | None) -> Iterator[Forward]:
        yield lambda: hooked.run_with_cache(x, t, y, names_filter=names)

    @contextmanager
    def with_nnsight() -> Iterator[Forward]:
        def forward() -> object:
            with watched.trace(x, **inputs):
                outputs = nnsight.save([block.output for block in watched.transformer_blocks])
            return outputs

        yield forward

    @contextmanager
    def with_to_nnsight() -> Iterator[Forward]:
        def forward() -> object:
            with bridged.trace(x, t, y):
                outputs = nnsight.save([block.hook_resid_post.output for block in bridged.blocks])
            return outputs

        yield forward

    @contextmanager
    def with_transformer_lens(names: object) -> Iterator[Forward]:
        yield lambda: lensed.run_with_cache(x, t, y, names_filter=names)

    n = config.num_layers
    ways = {
        "bare forward": bare,
        "hook points, idle": idle,
        "trace, inputs kept": trace,
        f"streams, {n}: plain hooks": lambda: plain_hooks(lambda h: h),
        f"streams, {n}: trace(names=...)": lambda: trace(STREAMS),
        f"streams, {n}: run_with_cache": lambda: cache(STREAMS),
        f"streams, {n}: nnsight": with_nnsight,
        f"streams, {n}: to_nnsight": with_to_nnsight,
        f"streams, {n}: to_transformer_lens": lambda: with_transformer_lens(STREAMS),
        f"band energies, {n}: plain hooks": lambda: plain_hooks(bands.energy_tokens),
        f"band energies, {n}: SpectralSplit": lambda: trace(probe=True),
        f"everything, {len(hooked.names)}: run_with_cache": lambda: cache(None),
        f"everything, {len(hooked.names)}: to_transformer_lens": lambda: with_transformer_lens(
            None
        ),
    }
    return {name: way for name, way in ways.items() if has_lens or "transformer_lens" not in name}


def measure(
    ways: dict[str, Row], repeats: int, inner: int, title: str
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a forward by row and repeat, and seconds to open and close a trace."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    opening: list[float] = []
    order, rng = list(ways), random.Random(0)
    for _ in track(range(repeats), title):
        rng.shuffle(order)
        for name in order:
            with ways[name]() as forward:
                forward()
                times[name].append(seconds(forward, inner))
        began = clock()
        with ways["trace, inputs kept"]():
            pass
        opening.append(clock() - began)
    return times, opening


def show(title: str, times: dict[str, list[float]], opening: list[float], console: Console) -> None:
    table = Table("", "ms", "added, ms", "ratio to bare", title=title)
    base = times["bare forward"]
    for name, own in times.items():
        added = [1e3 * (t - b) for t, b in zip(own, base, strict=True)]
        ratio = [t / b for t, b in zip(own, base, strict=True)]
        beside = ("", "1") if own is base else (spread(added, "+.2f"), spread(ratio, ".3f"))
        table.add_row(name, spread([1e3 * t for t in own], ".2f"), *beside)
    console.print(table)
    console.print(
        f"opening and closing a trace, once a run: {spread([1e3 * t for t in opening], '.2f')} ms\n"
    )


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--repeats", type=int, default=12)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--dtype", default="float32", help="of the wide model")
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    console = Console(width=132)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, one thread"
    if args.device != "cpu":
        versions += f", {torch.cuda.get_device_name(args.device)}"
    console.print(f"{versions}; medians of {args.repeats} repeats, quartiles in brackets\n")
    place: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    small = make_model(**SMALL, device=args.device)
    wide = make_model(1 if args.device == "cpu" else 28, **WIDE, **place)
    for model, batch, inner, what in (
        (small, 1, 5, SMALL_NAME),
        (small, 16, 1, SMALL_NAME),
        (wide, 1, 2, wide_name(wide)),
    ):
        title = f"{what}, batch {batch}"
        show(title, *measure(rows(model, batch), args.repeats, inner, title), console)
    show_costs(args.repeats, console, **place)
    show_reuse(args.repeats, console, **place)


if __name__ == "__main__":
    main()
