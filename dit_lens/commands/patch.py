"""Find the layers that cause the gap: knock-outs, and patches between twins.

An interrupted sweep of patches goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    add_device,
    add_model,
    add_quick,
    add_seed,
    add_size,
    batch_of,
    frequency,
    open_model,
    progress_bar,
    sizes,
)

if TYPE_CHECKING:
    from ..model.hooked import HookedDiT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.knock_outs` takes."""
    add_model(parser)
    add_quick(parser, pairs=(24, 16), steps=(25, 12))
    add_seed(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel (default: 0.25)",
    )
    add_size(parser)
    add_device(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for the picture and results (default: patch-MODEL)"
    )


def run(args: argparse.Namespace) -> None:
    """Knock out every layer, and patch every layer of twin A into twin B."""
    from ..storage import file_name, try_folder

    pairs, steps = sizes(args)
    out = args.out or Path(f"patch-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    model = open_model(args)
    batch = batch_of(args, model, 2 * pairs)
    find_causes(model, pairs, steps, args.seed, args.cut, out, batch=batch)


def find_causes(
    model: HookedDiT,
    pairs: int,
    steps: int,
    seed: int,
    cut: float,
    out: Path,
    onsets: Mapping[str, int] | None = None,
    batch: int | None = None,
) -> None:
    """Both experiments with their progress, and their report in `out`.

    Args:
        model: a model with a sampler.
        pairs: twins of the knock-outs; the patches need fewer.
        steps: denoising steps of both.
        seed: decides all noise.
        cut: between low and high, in cycles per pixel.
        out: folder for the picture, the results and the patches done so far.
        onsets: the onset layer by each view of `dit-lens gap` (-1: none), to hold the causes
            against.
        batch: images that go through the model at once; None is all.
    """
    from .. import probes
    from ..experiments import knock_outs
    from ..measures.bands import Bands
    from ..report import knock_outs as knock_out_report

    with progress_bar() as bar:
        first = bar.add_task("knock-outs", total=None)
        knocked = knock_outs(
            model,
            direct=True,
            pairs=pairs,
            steps=steps,
            seed=seed,
            cut=cut,
            batch=batch,
            progress=lambda done, total: bar.update(first, completed=done, total=total),
        )
        stored = knock_out_report.store_knock_outs(knocked, out)
        second = bar.add_task("patches", total=None)
        patched = probes.TwinPatching().run(
            model,
            pairs=8,
            windows=5,
            release=steps // 3,
            steps=steps,
            seed=seed,
            outcome=Bands.radial(model.cfg.pixels, cut=cut),
            batch=16 if batch is None else batch,
            resume=out / "sweep.safetensors",
            progress=lambda done, total: bar.update(second, completed=done, total=total),
        )
    both = stored, knock_out_report.store_patches(patched, out)
    knock_out_report.show(knocked, patched, both, onsets)
