"""Say what a change does to a model: a reuse plan, an adapter, another type of numbers."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    Answer,
    add_device,
    add_labels,
    add_model,
    add_seed,
    add_size,
    at_least,
    batch_of,
    count,
    existing,
    frequency,
    labels_of,
    open_model,
    progress_bar,
    stored,
)
from .keeping import add_store, keeping

if TYPE_CHECKING:
    from ..model.hooked import HookedDiT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the change, and what `dit_lens.experiments.compare` takes."""
    add_model(parser)
    change = parser.add_mutually_exclusive_group(required=True)
    change.add_argument("--with", dest="plan", type=Path, metavar="PLAN", help="a reuse plan")
    change.add_argument("--lora", metavar="FILE", help="an adapter, a file or a hub id")
    change.add_argument(
        "--dtype", dest="changed_dtype", help="of the changed model's weights, such as bfloat16"
    )
    parser.set_defaults(dtype="float32")  # of the model as it was
    parser.add_argument(
        "--items", type=at_least(8), default=64, help="samples, 8 or more (default: 64)"
    )
    parser.add_argument("--steps", type=count, help="denoising steps (default: a plan's, or 50)")
    add_seed(parser)
    add_labels(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel (default: 0.25)",
    )
    add_size(parser)
    add_device(parser, dtype=False)
    add_store(parser)
    parser.add_argument("--out", type=Path, help="folder for the figures (default: compare-MODEL)")


def check(args: argparse.Namespace) -> None:
    """Files that are not there."""
    if args.plan is not None:
        existing(args.plan, "a plan written by Plan.save")
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """Run the model and the changed one, and say what differs."""
    from ..experiments import Plan, compare
    from ..experiments.reuse_plan import OTHER_SAMPLES
    from ..pieces import helping
    from ..report import compare as report
    from ..storage import file_name, try_folder

    out = args.out or Path(f"compare-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    plan = None if args.plan is None else Plan.load(args.plan)
    model = open_model(args)
    changed = plan or _changed(args, model)
    options = {}
    if plan is not None and "sampler" in plan.about:
        options = {name: plan.about[name] for name in ("guidance", "eta") if name in plan.about}
        options["scheduler"] = plan.about["sampler"]
    labels = labels_of(args)
    if labels is None and plan is not None:
        labels = plan.about.get("labels")
    steps = args.steps or (50 if plan is None else plan.steps)
    batch = batch_of(args, model, args.items)
    with keeping(args, model, batch, out), progress_bar() as bar:
        task = bar.add_task("compare", total=None)
        result = compare(
            model,
            changed,
            items=args.items,
            labels=labels,
            steps=steps,
            seed=args.seed + (0 if plan is None else OTHER_SAMPLES),
            cut=args.cut,
            batch=batch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
        if helping():
            return Answer(None)
        kept = report.store(result, out)
    report.show(result, kept)
    return stored(out)


def _changed(args: argparse.Namespace, model: HookedDiT) -> HookedDiT:
    """The model once more, changed."""
    from ..errors import InvalidValue, MissingFile
    from ..model.loading import load

    size = None if args.size is None else tuple(args.size)
    dtype = args.changed_dtype or "float32"
    changed = load(args.model, dtype, str(model.device), size, model.trajectories)
    if args.lora is None:
        return changed
    if not hasattr(changed.transformer, "load_lora_adapter"):
        raise InvalidValue(
            f"{type(changed.transformer).__name__} takes no adapters in diffusers (it has no "
            "load_lora_adapter); expected a model that does, or fuse the adapter and compare the "
            "models in Python: dit_lens.experiments.compare(model, changed)."
        )
    if find_spec("peft") is None:
        raise MissingFile(
            "An adapter needs peft, which is not installed; pip install 'dit-lens[pipelines]'."
        )
    changed.transformer.load_lora_adapter(args.lora)
    return changed
