"""The contract of a family, held against its own small random models: `dit-lens check-family`, and
`check_family(family)` in a test.

The checks (`dit_lens.testing.family_checks`, `dit_lens.testing.pipeline_checks`) are functions that
raise `AssertionError` with what is wrong; the docstring is what the table says. They use only what
users use, so a family from another package is held to exactly what ours are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..errors import InvalidValue
from ..families import Family, family_named, modules
from ..model.loading import usable_device
from .family_checks import CHECKS, VARIANTS, Case
from .pipeline_checks import PIPELINE_CHECKS, InPipeline, Saved


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, where tiny models are fastest: several threads wait for each other, and
    for very long when another process runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Row:
    """The outcome of one check on one small model."""

    check: str
    where: str
    ok: bool
    message: str = ""


def examine(family: str | Family, where: str | None = None, device: str = "cpu") -> list[Row]:
    """Run every check on each of the family's small models and, if it has one, its small pipeline.

    Args:
        family: a family, or the name of its model class.
        where: only there: "small(0)", "small(1)", "small(2)" or "pipeline".
        device: where the models are, such as "cuda".

    Returns:
        A row for each check and model.

    Raises:
        InvalidValue: for a class without a family; for a device that is not there.
    """
    found = _family(family) if isinstance(family, str) else family
    device = str(usable_device(device))
    tasks: list[tuple[Any, str, Callable[[], Any]]] = [
        (check, f"small({v})", partial(Case, found, v, device))
        for v in VARIANTS
        for check in CHECKS
    ]
    if where in (None, "pipeline") and found.small_pipeline() is not None:
        saved = cache(partial(Saved, found, device))  # once, as all checks leave it alone
        tasks += [
            (check, "pipeline", lambda: InPipeline(found, device, saved()))
            for check in PIPELINE_CHECKS
        ]
    tasks = [task for task in tasks if where in (None, task[1])]
    rows = []
    for check, where, case in tasks:
        with torch.random.fork_rng(), one_thread():
            torch.manual_seed(0)
            try:
                check(case())
                rows.append(Row(check.__name__, where, True))
            except AssertionError as error:
                rows.append(Row(check.__name__, where, False, str(error)))
            # a family under construction may raise anything; the others are still worth knowing
            except Exception as error:
                rows.append(Row(check.__name__, where, False, f"{type(error).__name__}: {error}"))
    return rows


def check_family(family: str | Family, device: str = "cpu") -> None:
    """Hold a family against the contract, as a test of the family's package does.

    Args:
        family: a model class with a registered family, or the family.
        device: where its small models are, such as "cuda".

    Raises:
        AssertionError: with every check that fails.
        ValueError: for a class without a family; for a device that is not there.

    >>> check_family("DiTTransformer2DModel")
    """
    failed = [
        f"{row.where}: {row.check}: {row.message}"
        for row in examine(family, device=device)
        if not row.ok
    ]
    assert not failed, "\n".join(failed)


def table(name: str, rows: list[Row]) -> Any:
    """A family's outcome as a rich table, one line a check, with what the first failing model says.

    Args:
        name: the family's model class.
        rows: the outcome, from `examine`.
    """
    from rich.table import Table
    from rich.text import Text

    failed = sum(not row.ok for row in rows)
    shown = Table("check", "models", "", title=f"{name}: {len(rows)} checks, {failed} failed")
    for check in dict.fromkeys(row.check for row in rows):
        mine = [row for row in rows if row.check == check]
        wrong = next((row for row in mine if not row.ok), None)
        text = (
            (BY_NAME[check].__doc__ or "").strip()
            if wrong is None
            else Text(f"{wrong.where}: {wrong.message}", "red")
        )
        shown.add_row(
            check.replace("_", " "), f"{sum(row.ok for row in mine)} of {len(mine)}", text
        )
    return shown


COLUMNS = {
    "output bit for bit": ("same_output",),
    "names, additions, edits": (
        "names_in_order",
        "shapes_as_named",
        "adds_up",
        "layers_add_what_is_named",
        "edits_reach_the_stream",
    ),
    "patterns": ("attention_is_what_it_says",),
    "lazy reading": ("reading_is_recording",),
    "coupled twins": ("twins_couple",),
    "lens": ("lens_reads_the_last_stream",),
    "gradients": ("reaches_backward",),
    "pipeline": ("pipeline_is_left_alone", "branches_are_right", "sampler_agrees"),
    "`dit-lens gap`": ("gap_is_measured",),
}
"""What the README's table says of a family, and the checks that it says it by."""


def markdown(rows: dict[str, list[Row]]) -> str:
    """The README's table: what works in each family, by the checks and the small models.

    Args:
        rows: the outcomes, from `examine`, by model class.
    """
    head = ["family", *COLUMNS, "start at a layer", "guidance", "hook points a block"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for name, some in rows.items():
        case = Case(_family(name), 0)
        cells = [f"`{name}`"]
        for column, checks in COLUMNS.items():
            mine = [row for row in some if row.check in checks]
            has = column != "patterns" or any(
                n.endswith("attn.hook_pattern") for n in case.model.names if ".attn" in n
            )
            cells.append(
                "yes"
                if mine and all(row.ok for row in mine) and has
                else "no"
                if has
                else "none: linear"
            )
        cells.append("yes" if case.cfg.restartable else "no")
        distilled = any(Case(case.family, v).cfg.distilled_guidance for v in VARIANTS)
        cells.append(
            ("two calls" if case.family.batch_order is None else "one batch")
            + (", or distilled" if distilled else "")
        )
        cells.append(str(sum(n.startswith("blocks.0.") for n in case.model.names)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _family(name: str) -> Family:
    found = family_named(name)
    if found is None:
        near = difflib.get_close_matches(name, modules(), n=1, cutoff=0.3)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"expected one of {', '.join(sorted(modules()))}."
        )
        raise InvalidValue(f"There is no family for {name!r}; {hint}")
    return found


BY_NAME = {check.__name__: check for check in (*CHECKS, *PIPELINE_CHECKS)}
