"""List a model's hook points and their shapes.

They follow from the configuration alone: no weights are read, no forward is run.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import Answer, add_model, console

if TYPE_CHECKING:
    from ..families.config import Config
    from ..families.parts.sites import Axes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --filter."""
    add_model(parser)
    parser.add_argument(
        "--filter", help="only names that match this pattern, such as 'attn.*' or 'resid_post'"
    )


def run(args: argparse.Namespace) -> Answer:
    """Print one row for each site; the same site of every layer is one row."""
    from rich.table import Table
    from rich.text import Text

    from ..hooks.names import by_site, select
    from ..model.loading import load_skeleton

    family, skeleton = load_skeleton(args.model)
    cfg, sites = family.config(skeleton), family.sites(skeleton)
    known = {} if family.read_only else cfg.axis_sizes()
    sizes = _printed_sizes(cfg, known, sites)

    chosen = select(args.filter, list(sites))
    shapes = {name: [sizes.get(axis, axis) for axis in sites[name]] for name in chosen}
    found = [{"name": n, "axes": sites[n], "shape": shape} for n, shape in shapes.items()]
    title = f"{args.model}: {len(chosen)} hook points, {cfg.n_layers} layers"
    table = Table("hook point", "shape", "axes", "of", title=title)
    for row, members in by_site(chosen).items():
        axes = sites[members[0]]
        shape = "[" + ", ".join(str(sizes.get(axis, axis)) for axis in axes) + "]"
        plural = "s" if len(members) > 1 else ""
        layers = f"{len(members)} layer{plural}" if row.startswith("blocks.{i}") else ""
        # Text, not str: rich would take the brackets for markup
        table.add_row(Text(row), Text(shape), ", ".join(axes), layers)
    console(width=120).print(table)
    return Answer({"model": str(args.model), "layers": cfg.n_layers, "hook_points": found})


def _printed_sizes(cfg: Config, known: dict[str, int], sites: dict[str, Axes]) -> dict[str, Any]:
    """How long each axis is, or its name where that is not known before a call."""
    sizes: dict[str, Any] = {"batch": "b", "d_model": cfg.d_model or "d_model", **known}
    if any("text" in axis for axes in sites.values() for axis in axes):
        sizes["key"] = "key"  # the prompt's tokens are among the keys, as many as it has
    return sizes
