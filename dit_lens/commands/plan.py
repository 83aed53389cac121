"""Make a plan of which computations can be skipped within a budget, or measure one again."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InvalidValue
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
    labels_of,
    open_model,
    progress_bar,
    refuse,
    share,
    stored,
)
from .keeping import add_store, keeping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.reuse_plan` takes."""
    add_model(parser)
    parser.add_argument(
        "--budget",
        type=share,
        help="the share of multiply-accumulates that may be left (default: 0.5)",
    )
    parser.add_argument(
        "--aim",
        choices=["same", "good"],
        help="the same image, or one as good (default: same)",
    )
    parser.add_argument(
        "--items", type=at_least(8), default=64, help="samples, 8 or more (default: 64)"
    )
    parser.add_argument("--steps", type=count, help="denoising steps (default: 50)")
    add_seed(parser)
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    add_store(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="the plan's file (default: plan-MODEL.json); with --side-by-side, a folder",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--check", type=Path, metavar="PLAN", help="measure this plan again, and make none"
    )
    again.add_argument(
        "--side-by-side",
        type=Path,
        nargs="+",
        metavar="PLAN",
        help="measure these plans beside published ways to spend as little, and make none",
    )
    parser.add_argument(
        "--no-lines",
        action="store_true",
        help="hold only what was last added, for tools that can't do lines",
    )


def check(args: argparse.Namespace) -> None:
    """Files that are not there, and options that would be passed over."""
    fixed = ("budget", "aim", "steps", "labels", "prompts", "no_lines")
    if args.check is not None:
        refuse(args, "--check", "the plan says what it was made with", *fixed)
        refuse(args, "--check", "no file is written", "out")
    elif args.side_by_side is not None:
        refuse(args, "--side-by-side", "the plans say what they were made with", *fixed)
        why = "it times whole runs in this process"
        refuse(args, "--side-by-side", why, "batch", "store", "workers", "address")
        if args.engine != "local":
            raise InvalidValue(f"--engine does nothing beside --side-by-side: {why}; leave it out.")
    for path in [args.check] if args.check else args.side_by_side or []:
        existing(path, "a plan written by Plan.save")
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """Make the plan, or check one, and say what it does."""
    from ..experiments.reuse_plan import OTHER_SAMPLES, check_plan, plan_sentence, reuse_plan
    from ..pieces import helping
    from ..plans.plan import Plan
    from ..report.style import plain_console
    from ..storage import file_name, try_file

    console = plain_console(120)
    if args.side_by_side is not None:
        return _side_by_side(args)
    if args.check is not None:
        plan = Plan.load(args.check)
        model, seed = open_model(args), args.seed + OTHER_SAMPLES
        batch = batch_of(args, model, args.items)
        with keeping(args, model, batch, Path()):
            plan = check_plan(model, plan, items=args.items, seed=seed, batch=batch)
        if helping():
            return Answer(None)
        console.print(plan_sentence(plan), soft_wrap=True)
        return Answer({"plan": str(args.check), "sentence": plan_sentence(plan)})
    out = args.out or Path(f"plan-{file_name(str(args.model))}.json")
    try_file(out)  # before minutes are spent
    model = open_model(args)
    batch = batch_of(args, model, args.items)
    with keeping(args, model, batch, out.parent), progress_bar() as bar:
        task = bar.add_task("plan", total=None)
        plan = reuse_plan(
            model,
            args.budget or 0.5,
            args.aim or "same",
            items=args.items,
            labels=labels_of(args),
            steps=args.steps or 50,
            seed=args.seed,
            lines=not args.no_lines,
            batch=batch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        if helping():
            return Answer(None)
        plan.save(out)
    console.print(plan_sentence(plan), soft_wrap=True)
    console.print(f"plan: {out}", style="dim", soft_wrap=True)
    return Answer({"plan": str(out), "sentence": plan_sentence(plan)})


def _side_by_side(args: argparse.Namespace) -> Answer:
    """Measure plans beside published ways to spend as little."""
    from ..experiments import Plan, side_by_side
    from ..experiments.reuse_plan import OTHER_SAMPLES
    from ..report import side_by_side as report
    from ..storage import file_name, try_folder

    plans = [Plan.load(path) for path in args.side_by_side]
    out = args.out or Path(f"plans-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    model = open_model(args)
    with progress_bar() as bar:
        task = bar.add_task("side by side", total=None)
        result = side_by_side(
            model,
            plans,
            items=args.items,
            seed=args.seed + OTHER_SAMPLES,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    report.show(result, report.store(result, out))
    return stored(out)
