"""The command line: `dit-lens hooks | gap | patch | probe | check | check-family | report`.

Each command is a page that reads top down.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..model.hooked import HookedDiT

COMMANDS_HELP = "Open up Diffusion Transformers: hook points, twins, and which layer creates the synchronization gap."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; problems that a user can mend are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="dit-lens", description=COMMANDS_HELP)
    commands = parser.add_subparsers(dest="command", required=True)

    hooks = commands.add_parser("hooks", help="list a model's hook points and their shapes")
    hooks.add_argument(
        "model",
        nargs="?",
        default="digits",
        help="bundled name, folder or hub id (default: digits)",
    )
    hooks.add_argument(
        "--filter", help="only names that match this pattern, such as 'attn.*' or 'resid_post'"
    )
    hooks.set_defaults(run=hooks_command)

    gap = commands.add_parser("gap", help="measure the synchronization gap, layer by layer")
    gap.add_argument(
        "model",
        nargs="?",
        default="digits",
        help="bundled name, folder or hub id (default: digits)",
    )
    gap.add_argument("--pairs", type=int, help="twins (default: 48; with --quick 16)")
    gap.add_argument("--steps", type=int, help="denoising steps (default: 50; with --quick 25)")
    gap.add_argument("--quick", action="store_true", help="fewer twins and steps: a first look")
    gap.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same figures to the last digit"
    )
    gap.add_argument(
        "--cut",
        type=float,
        default=0.25,
        help="between low and high, in cycles per pixel and per token (default: 0.25)",
    )
    gap.add_argument(
        "--bands",
        default="radial",
        help="radial, dct, pooling or eigen (default: radial; --couple and --causes stay radial)",
    )
    gap.add_argument(
        "--couple",
        type=float,
        nargs="+",
        metavar="G",
        help="also couple twins with these strengths, such as 0 0.5 1",
    )
    gap.add_argument(
        "--causes",
        action="store_true",
        help="also what `dit-lens patch` does: the layers that cause the gap",
    )
    _size(gap)
    gap.add_argument(
        "--out", type=Path, help="folder for pictures and results (default: gap-MODEL)"
    )
    gap.set_defaults(run=gap_command)

    patch = commands.add_parser(
        "patch", help="find the layers that cause the gap: knock-outs, and patches between twins"
    )
    patch.add_argument(
        "model",
        nargs="?",
        default="digits",
        help="bundled name, folder or hub id (default: digits)",
    )
    patch.add_argument(
        "--pairs", type=int, help="twins of the knock-outs (default: 24; with --quick 16)"
    )
    patch.add_argument("--steps", type=int, help="denoising steps (default: 25; with --quick 12)")
    patch.add_argument("--quick", action="store_true", help="fewer twins and steps: a first look")
    patch.add_argument("--seed", type=int, default=0)
    patch.add_argument(
        "--cut",
        type=float,
        default=0.25,
        help="between low and high, in cycles per pixel (default: 0.25)",
    )
    _size(patch)
    patch.add_argument(
        "--out", type=Path, help="folder for the picture and results (default: patch-MODEL)"
    )
    patch.set_defaults(run=patch_command)

    probe = commands.add_parser(
        "probe", help="run an installed probe over a sampling run and store its result"
    )
    probe.add_argument("name", help="a probe registered in the entry-point group dit_lens.probes")
    probe.add_argument("model", nargs="?", default="digits")
    probe.add_argument("--items", type=int, default=8, help="images to sample")
    probe.add_argument("--steps", type=int, default=50)
    probe.add_argument("--seed", type=int, default=0)
    _size(probe)
    probe.add_argument("--out", type=Path, help="netCDF file (default: NAME.nc)")
    probe.set_defaults(run=probe_command)

    check = commands.add_parser(
        "check", help="hold a probe against models whose answer is known; exit code 1 if it fails"
    )
    check.add_argument(
        "probe", help="an installed probe, path/to/file.py:ClassName or package.module:ClassName"
    )
    check.set_defaults(run=check_command)

    family = commands.add_parser(
        "check-family",
        help="hold families of models against the contract, on small random models; exit code 1 if one fails",
    )
    family.add_argument(
        "families",
        nargs="*",
        help="model classes, such as DiTTransformer2DModel (default: all that are installed)",
    )
    family.add_argument(
        "--table",
        action="store_true",
        help="print what works in each as Markdown, as the README has it",
    )
    family.set_defaults(run=check_family_command)

    report = commands.add_parser(
        "report", help="print the table and draw the pictures of stored results again"
    )
    report.add_argument(
        "results",
        type=Path,
        help="the folder that `dit-lens gap` or `patch` wrote, or a file in it",
    )
    report.set_defaults(run=report_command)

    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        print(f"dit-lens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dit-lens: interrupted", file=sys.stderr)
        return 130


def _size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="height and width of the latents (video: frames first), if not the model's own",
    )


def hooks_command(args: argparse.Namespace) -> None:
    """Names and shapes from the configuration alone: no weights are read, no forward is run."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..hooks.names import select, site_of
    from ..model.loading import load_skeleton

    family, skeleton = load_skeleton(args.model)
    cfg, sites = family.config(skeleton), family.sites(skeleton)
    sizes: dict[str, Any] = {"batch": "b", "d_model": cfg.d_model or "d_model"}
    if not family.read_only:
        sizes |= cfg.axis_sizes()
    if any("text" in axis for axes in sites.values() for axis in axes):
        sizes["key"] = "key"  # also the text's tokens, as many as the prompt has
    chosen = select(args.filter, list(sites))
    rows: dict[str, list[str]] = {}  # the same site of every layer is one row
    for name in chosen:
        rows.setdefault(
            name if name == site_of(name) else f"blocks.{{i}}.{site_of(name)}", []
        ).append(name)
    table = Table(
        "hook point",
        "shape",
        "axes",
        "of",
        title=f"{args.model}: {len(chosen)} hook points, {cfg.n_layers} layers",
    )
    for row, members in rows.items():
        axes = sites[members[0]]
        count = (
            f"{len(members)} layer{'s' * (len(members) > 1)}"
            if row.startswith("blocks.{i}")
            else ""
        )
        shape = Text(
            "[" + ", ".join(str(sizes.get(a, a)) for a in axes) + "]"
        )  # as it stands: rich would take brackets for markup
        table.add_row(Text(row), shape, ", ".join(axes), count)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def gap_command(args: argparse.Namespace) -> None:
    """The whole measurement; see `dit_lens.experiments.gap`."""
    from ..experiments import couplings, measure_gap
    from ..experiments.coupling_sweep import checked_strengths
    from ..model.loading import load
    from ..report import coupling_sweep as coupling_report
    from ..report import gap as gap_report

    model = load(args.model, size=args.size and tuple(args.size))
    pairs, steps = (
        args.pairs or (16 if args.quick else 48),
        args.steps or (25 if args.quick else 50),
    )
    if args.couple:
        checked_strengths(args.couple)  # before minutes are spent
    with _bar() as bar:
        first = bar.add_task("twins", total=None)
        results = measure_gap(
            model,
            pairs=pairs,
            steps=steps,
            seed=args.seed,
            cut=args.cut,
            bands=args.bands,
            name=str(args.model),
            progress=lambda done, total: bar.update(first, completed=done, total=total),
        )
    out = args.out or Path(f"gap-{Path(str(args.model)).name}")
    gap_report.write(results, out)
    if args.couple:
        with _bar() as bar:
            task = bar.add_task("couplings", total=len(args.couple))
            swept = couplings(
                model,
                args.couple,
                pairs=pairs,
                steps=steps,
                seed=args.seed,
                cut=args.cut,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        coupling_report.write(swept, out)
    if args.causes:
        _causes(model, min(pairs, 24), min(steps, 25), args, out, gap_report.onsets(results))


def patch_command(args: argparse.Namespace) -> None:
    """Knock out every layer, and patch every layer of twin A into twin B; an interrupted sweep of
    patches goes on where it was.
    """
    from ..model.loading import load

    model = load(args.model, size=args.size and tuple(args.size))
    pairs, steps = (
        args.pairs or (16 if args.quick else 24),
        args.steps or (12 if args.quick else 25),
    )
    _causes(model, pairs, steps, args, args.out or Path(f"patch-{Path(str(args.model)).name}"))


def _causes(
    model: HookedDiT,
    pairs: int,
    steps: int,
    args: argparse.Namespace,
    out: Path,
    onsets: Mapping[str, int] | None = None,
) -> None:
    import importlib

    from ..experiments.knock_outs import knock_outs
    from ..measures.bands import Bands
    from ..report import knock_outs as cause_report

    out.mkdir(parents=True, exist_ok=True)
    with _bar() as bar:
        first = bar.add_task("knock-outs", total=model.cfg.n_layers)
        knocked = knock_outs(
            model,
            direct=True,
            pairs=pairs,
            steps=steps,
            seed=args.seed,
            cut=args.cut,
            progress=lambda done, total: bar.update(first, completed=done, total=total),
        )
        second = bar.add_task("patches", total=None)
        patched = (
            importlib.import_module("dit_lens.probes")
            .TwinPatching()
            .run(
                model,
                pairs=8,
                windows=5,
                release=steps // 3,
                steps=steps,
                seed=args.seed,
                outcome=Bands.radial(model.cfg.pixels, cut=args.cut),
                resume=out / "sweep.safetensors",
                progress=lambda done, total: bar.update(second, completed=done, total=total),
            )
        )
    cause_report.write(knocked, patched, out, onsets)


def _bar() -> Progress:
    """A live bar with the time left, gone when it is done."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    share = TextColumn("{task.percentage:.0f} %")
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        share,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )


def probe_command(args: argparse.Namespace) -> None:
    """One sampling run with a probe attached."""
    from .. import load, sample, trace
    from ..tracing.probe import load_probe

    probe = load_probe(args.name)()
    model = load(args.model, size=args.size and tuple(args.size))
    labels = [i % model.conditions.n for i in range(args.items)]
    with trace(model, probes=[probe]):
        sample(model, labels, seeds=args.seed, steps=args.steps)
    result = probe.result()
    print(result)
    out = args.out or Path(f"{args.name}.nc")
    result.to_netcdf(out, engine="scipy")
    print(f"stored in {out}")


def check_command(args: argparse.Namespace) -> int:
    """Whether a probe keeps the contract and finds what is there; see
    `dit_lens.testing.probe_checks`.
    """
    from rich.console import Console

    from ..testing import probe_checks as checking

    checks = checking.check(checking.find_probe(args.probe))
    failed = sum(not row.ok for row in checks)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        checking.table(checks, title=f"{args.probe}: {len(checks)} checks, {failed} failed")
    )
    return 1 if failed else 0


def check_family_command(args: argparse.Namespace) -> int:
    """Whether families keep the contract; see `dit_lens.families.contract`."""
    from rich.console import Console

    from ..families import modules
    from ..testing import family_contract as contract

    names = args.families or sorted(modules())
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = {}
    for name in names:
        rows[name] = contract.examine(name)
        if not args.table:
            console.print(contract.table(name, rows[name]))
    if args.table:
        print(contract.markdown(rows))
    return 1 if any(not row.ok for some in rows.values() for row in some) else 0


def report_command(args: argparse.Namespace) -> None:
    """Stored results, shown again."""
    from ..report.stored import show

    show(args.results)
