"""Find the layer and the step in which a fault of an image arises, and repair it.

One image by its label and seed, or with --all every faulty image of many.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import InvalidValue
from .attributes import EXPECTED
from .common import (
    Answer,
    add_device,
    add_model,
    add_seed,
    add_size,
    batch_of,
    count,
    open_model,
    progress_bar,
    refuse,
    seed,
    stored,
    strength,
)
from .keeping import add_store, keeping
from .users_code import of_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.diagnose` takes."""
    add_model(parser)
    parser.add_argument("--label", type=seed, help="class of the bad image")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--fault",
        help="digits: 'read as another digit'; portraits: 'no legal avatar' or a factor; or "
        f"{EXPECTED}, which gives scores (default: the model's first by name)",
    )
    one.add_argument(
        "--mask",
        type=seed,
        nargs=4,
        metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"),
        help="in place of a fault: what is wrong in these rows and columns, the last ones left out",
    )
    one.add_argument(
        "--band", choices=["low", "high"], help="in place of a fault: what is wrong in this band"
    )
    parser.add_argument(
        "--good", metavar="MODEL", help="another state of the weights, which does it right"
    )
    parser.add_argument("--steps", type=count, default=50, help="denoising steps (default: 50)")
    parser.add_argument(
        "--eta", type=strength, default=1.0, help="how stochastic the sampler is (default: 1)"
    )
    parser.add_argument("--pairs", type=count, help="pairs to patch (default: 8)")
    parser.add_argument("--all", action="store_true", help="every fault of many samples")
    parser.add_argument("--samples", type=count, help="with --all, so many (default: 1000)")
    parser.add_argument("--most", type=count, help="with --all, faults of a kind (default: 12)")
    add_seed(parser)
    add_size(parser)
    add_device(parser)
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for the page and figures (default: diagnosis-MODEL)"
    )


def check(args: argparse.Namespace) -> None:
    """One image or many, and options that would be passed over."""
    if args.all == (args.label is not None):
        raise InvalidValue(
            f"{'Both' if args.all else 'Neither'} of --label and --all "
            f"{'are' if args.all else 'is'} given; expected --label L for one image, or --all."
        )
    if args.all:
        refuse(args, "--all", "it is of one image", "mask", "band", "good", "pairs")
    else:
        refuse(args, "--label", "it is of --all", "samples", "most")


def run(args: argparse.Namespace) -> Answer:
    """Diagnose, store it and show it."""
    from ..storage import file_name, try_folder

    out = args.out or Path(f"diagnosis-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    (_every if args.all else _one)(args, out)
    return stored(out)


def _one(args: argparse.Namespace, out: Path) -> None:
    from ..experiments import diagnose
    from ..model.loading import load
    from ..pieces import helping
    from ..report import diagnosis as report
    from ..sampling.sample import sample

    model = open_model(args)
    fault = _fault(args, model)
    options: dict[str, Any] = {"seeds": args.seed, "steps": args.steps, "eta": args.eta}
    bad, good = sample(model, [args.label], **options), None
    if args.good is not None:
        size = None if args.size is None else tuple(args.size)
        other = load(args.good, args.dtype, str(model.device), size, model.trajectories)
        good = sample(other, [args.label], **options)
    batch = batch_of(args, model, 32) or 32
    with keeping(args, model, batch, out), progress_bar() as bar, of_the_users(fault):
        task = bar.add_task("diagnosis", total=None)
        found = diagnose(
            model,
            bad,
            fault,
            good,
            pairs=args.pairs or 8,
            seed=args.seed,
            batch=batch,
            progress=lambda images: bar.update(task, completed=images),
        )
        if helping():
            return
        more: tuple[Path, ...] = ()
        if found.repair is not None and found.repair.edits:
            more = (found.repair.save(out / "repair.json"),)
        kept = report.store(found.result, out)
    report.show(found.result, kept, more)


def _every(args: argparse.Namespace, out: Path) -> None:
    from ..experiments import diagnose_all
    from ..pieces import helping
    from ..report import diagnoses as report

    model = open_model(args)
    faults = {} if args.fault is None else {args.fault: _fault(args, model)}
    batch = batch_of(args, model, 32) or 32
    with (
        keeping(args, model, batch, out),
        progress_bar() as bar,
        of_the_users(faults.get(args.fault)),
    ):
        task = bar.add_task("samples", total=None)
        result = diagnose_all(
            model,
            args.samples or 1000,
            faults or None,
            steps=args.steps,
            eta=args.eta,
            most=args.most or 12,
            seed=args.seed,
            batch=batch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        if helping():
            return
        kept = report.store(result, out)
    report.show(result, kept)


def _fault(args: argparse.Namespace, model: Any) -> Any:
    """The fault that was asked for."""
    import torch

    from ..experiments.diagnosis.fault import names_of
    from ..measures.bands import CUT, Bands
    from ..sampling.run import decode
    from .attributes import find

    if args.mask is not None or args.band is not None:
        shape = decode(model, torch.zeros(1, *model.cfg.latent_shape)).shape
        side = (int(shape[-2]), int(shape[-1]))
        if args.band is not None:
            return Bands.radial(side, cut=CUT * model.cfg.pixels[0] / side[0]), args.band
        top, bottom, left, right = args.mask
        mask = torch.zeros(side, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        if not (0 <= top < bottom <= side[0] and 0 <= left < right <= side[1]):
            raise InvalidValue(
                f"--mask {top} {bottom} {left} {right} does not lie in an image of {side[0]}x"
                f"{side[1]}; expected TOP below BOTTOM up to {side[0]}, LEFT below RIGHT up to "
                f"{side[1]}."
            )
        return mask
    known = names_of(model)
    if args.fault is None and known:
        return known[0]
    if args.fault is None:
        raise InvalidValue(
            f"There is no fault by name for this model; expected --fault {EXPECTED}, --mask or "
            "--band."
        )
    return args.fault if args.fault in known or ":" not in args.fault else find(args.fault, "")
