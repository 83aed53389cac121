"""Find the layers that cause the gap: knock-outs, and patches between twins."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue
from . import cost
from .common import (
    Answer,
    add_device,
    add_labels,
    add_model,
    add_quick,
    add_seed,
    add_size,
    batch_of,
    calibrating,
    count,
    frequency,
    labels_of,
    open_model,
    progress_bar,
    sizes,
    stored,
)
from .keeping import add_store, keeping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.hooked import HookedDiT

WAYS = ("zero", "mean", "resample")
PATCHED_PAIRS, PATCH_WINDOWS = 10, 4
"""Patches run on fewer pairs than knock-outs, in so many windows."""
EXCHANGED_LAYERS = 7
"""Bands are exchanged in at most so many layers, evenly spaced."""
DOSES = (0.25, 0.5, 1.0)
"""Of a band, so much of what the twins differ in is exchanged, for a dose-response."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.knock_outs` takes."""
    add_model(parser)
    add_quick(parser, pairs=(24, 16), steps=(25, 12), fewest=(16, 1))
    add_seed(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel (default: 0.25)",
    )
    parser.add_argument(
        "--how",
        nargs="+",
        choices=WAYS,
        default=["zero", "mean"],
        help="what comes in place of what a layer adds, side by side (default: zero mean); the "
        "options below use the first",
    )
    parser.add_argument("--direct", action="store_true", help="also the direct part of each effect")
    parser.add_argument(
        "--sets",
        action="store_true",
        help="also the first k and the last k layers, and the smallest set that takes half of the "
        "gap away",
    )
    parser.add_argument(
        "--shapley",
        type=count,
        metavar="N",
        help="also order-averaged shares and interactions of the N layers that move the gap most",
    )
    parser.add_argument(
        "--windows", type=count, metavar="N", help="also each layer in each of N windows of steps"
    )
    parser.add_argument(
        "--interchange",
        choices=["stream", "heads"],
        help="also bands exchanged between twins, in the stream or head by head, in three doses",
    )
    add_size(parser)
    add_device(parser)
    add_store(parser)
    add_labels(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it would cost, and run nothing else"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the picture and results (default: patch-MODEL)"
    )


def check(args: argparse.Namespace) -> None:
    """Files that are not there."""
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """Knock out every layer, and patch every layer of twin A into twin B."""
    from ..experiments.cost import patch_cost
    from ..storage import file_name, try_folder

    pairs, steps = sizes(args)
    out = args.out or Path(f"patch-{file_name(str(args.model))}")
    labels = labels_of(args)
    if not args.dry_run:
        try_folder(out)  # before minutes are spent
    model = open_model(args)
    batch, how = batch_of(args, model, 2 * pairs), list(dict.fromkeys(args.how))
    if args.dry_run:
        with calibrating() as progress:
            planned = patch_cost(
                model,
                pairs,
                steps,
                ways=len(how),
                direct=args.direct,
                patched=PATCHED_PAIRS,
                windows=PATCH_WINDOWS,
                batch=batch,
                progress=progress,
            )
        cost.show([planned])
        more = [n for n in ("sets", "shapley", "windows", "interchange") if getattr(args, n)]
        if more:
            print(f"not counted: {', '.join(f'--{name}' for name in more)}")
        return Answer(vars(planned))
    with keeping(args, model, batch, out):
        find_causes(
            model,
            pairs,
            steps,
            args.seed,
            args.cut,
            out,
            how=how,
            direct=args.direct,
            sets=args.sets,
            shapley=args.shapley,
            windows=args.windows,
            interchange=args.interchange,
            batch=batch,
            labels=labels,
        )
    return stored(out)


def find_causes(
    model: HookedDiT,
    pairs: int,
    steps: int,
    seed: int,
    cut: float,
    out: Path,
    onsets: Mapping[str, int] | None = None,
    *,
    how: list[Any] | None = None,
    direct: bool = False,
    sets: bool = False,
    shapley: int | None = None,
    windows: int | None = None,
    interchange: str | None = None,
    batch: int | None = None,
    labels: list[int] | list[str] | None = None,
) -> None:
    """All experiments with their progress, and their report in `out`.

    Args:
        model: a model with a sampler.
        pairs: twins of the knock-outs; the patches need fewer.
        steps: denoising steps of both.
        seed: decides all noise.
        cut: between low and high, in cycles per pixel.
        out: folder for the pictures and the results.
        onsets: the onset layer by each view of `dit-lens gap` (-1: none), to hold the causes
            against.
        how: ways of knocking out, the first of which the rest uses.
        direct: also direct effects.
        sets: also cumulative knock-outs and the smallest set.
        shapley: also shares, of so many layers.
        windows: also layers by so many windows of steps.
        interchange: also exchanged bands, of the "stream" or of "heads".
        batch: images that go through the model at once, of knock-outs by zero and of patches.
        labels: classes or prompts, taken in turn; None is the model's own.
    """
    from ..experiments import ablation
    from ..experiments.interchange import interchange as exchange
    from ..experiments.knock_outs import accumulated, checked_depths, knocked
    from ..experiments.knocked_gap import KnockedGap
    from ..experiments.shapley import likely_players, shares
    from ..experiments.smallest_set import found_set
    from ..experiments.twin_patches import twin_patches
    from ..pieces import helped, helping
    from ..report import cause_details
    from ..report import knock_outs as report

    n = model.cfg.n_layers
    if shapley is not None and min(shapley, n) < 2:
        raise InvalidValue(
            f"--shapley {shapley} of a model of {n} layer{'s' * (n > 1)} gives no shares; expected "
            "2 or more of a model with as many."
        )
    release, layers = steps // 3, [[layer] for layer in range(n)]
    spans = None if windows is None else ablation.windows_of(windows, 0, steps)  # or refused
    results, engine = [], None
    for way in how or ["zero", "mean"]:
        with _bar(f"knock-outs ({way})") as progress:
            known = KnockedGap(
                model,
                "layer",
                way,
                pairs=pairs,
                steps=steps,
                seed=seed,
                cut=cut,
                resamples=1000,
                # the others take what they put in from the whole batch
                batch=batch if way == "zero" else None,
                labels=labels,
            )
            results.append(helped(knocked, known, "layer", layers, None, direct, progress))
        engine = engine or known
    assert engine is not None
    if not helping():
        found = report.side_by_side(results)
        kept = report.store_knock_outs(found, out)
    with _bar("patches") as progress:
        patched = twin_patches(
            model,
            pairs=min(PATCHED_PAIRS, pairs),
            windows=min(PATCH_WINDOWS, steps - release),
            release=release,
            steps=steps,
            seed=seed,
            cut=cut,
            batch=16 if batch is None else batch,
            labels=labels,
            progress=progress,
        )
    if patched is not None:
        report.show(found, patched, (kept, report.store_patches(patched, out)), onsets)

    def write(name: str, result: Any) -> None:
        if not helping():
            cause_details.write(name, result, out)

    # what else was asked for, each shown as soon as it is known
    if sets:
        depths = sorted({max(1, round(n * k / 7)) for k in range(1, 8)})
        with _bar("cumulative") as progress:
            summed = helped(accumulated, engine, checked_depths(depths, n), progress)
        write("cumulative.nc", summed)
        with _bar("smallest set") as progress:
            smallest = helped(found_set, engine, 0.5, progress)
        write("smallest_set.nc", smallest)
    if shapley is not None:
        with _bar("shares") as progress:
            split = helped(shares, engine, likely_players(engine, max(2, shapley)), 16, progress)
        write("shapley.nc", split)
    if spans is not None:
        with _bar("windows") as progress:
            timed = helped(knocked, engine, "layer", layers, spans, False, progress)
        write("windows.nc", timed)
    if interchange is not None:
        with _bar("exchanged bands") as progress:
            taken = exchange(
                model,
                sorted(
                    {round(i * (n - 1) / (EXCHANGED_LAYERS - 1)) for i in range(EXCHANGED_LAYERS)}
                ),
                windows=min(PATCH_WINDOWS, steps - release),
                heads=interchange == "heads",
                doses=DOSES,
                release=release,
                pairs=min(PATCHED_PAIRS, pairs),
                labels=labels,
                steps=steps,
                seed=seed,
                cut=cut,
                batch=16 if batch is None else batch,
                progress=progress,
            )
        write("interchange.nc", taken)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (done, total)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
