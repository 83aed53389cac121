"""What `dit-lens gap --attributes` does: find the function that reads them, measure, show."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue
from .common import progress_bar
from .users_code import of_the_users

if TYPE_CHECKING:
    from ..experiments.attributes import Reader
    from ..model.hooked import HookedDiT

OWN = "own"
"""What stands for the bundled model's own attributes."""
BUNDLED = {"portraits": "dit_lens.groundtruth.portraits:attributes"}
"""The bundled models whose attributes can be read, and the functions that do."""
EXPECTED = "path/to/file.py:function or package.module:function"


def find(where: str, model: str) -> Reader:
    """The function that reads attributes off images.

    Args:
        where: the name of a bundled model, a place such as path/to/file.py:function, or `OWN`.
        model: that is measured.

    Raises:
        InvalidValue: if there is none.

    >>> find(OWN, "portraits").__module__
    'dit_lens.groundtruth.portraits'
    """
    from ..testing.probe_checks import imported

    name = model if where == OWN else where
    place = BUNDLED.get(name, where)
    if ":" not in place:
        what = (
            f"No attributes are bundled for {name!r}"
            if where == OWN
            else f"{where!r} names no function"
        )
        raise InvalidValue(
            f"{what}; give a function of your own, --attributes {EXPECTED}, or one of "
            f"{', '.join(map(repr, BUNDLED))}."
        )
    source, _, function = place.rpartition(":")
    module = imported(source, EXPECTED)
    found = getattr(module, function, None)
    if not callable(found) or isinstance(found, type):
        own = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        near = difflib.get_close_matches(function, own, n=1, cutoff=0)
        raise InvalidValue(
            f"{source!r} has no function {function!r}; expected {EXPECTED}"
            f"{f' (nearest: {near[0]!r})' if near else ''}."
        )
    read: Reader = found
    return read


def measure(
    model: HookedDiT, read: Reader, out: Path, *, pairs: int | None, **settings: Any
) -> None:
    """When each attribute is decided: measure, print, draw and store.

    Args:
        model: the opened model.
        read: what `find` gave.
        out: folder for pictures and results.
        pairs: of twins; None is the default of `dit_lens.experiments.attributes`.
        **settings: further arguments of it.
    """
    from ..experiments.attributes import PAIRS, attributes
    from ..pieces import helping
    from ..report import attributes as report

    with progress_bar() as bar, of_the_users(read):
        task = bar.add_task("attributes", total=None)
        found = attributes(
            model,
            read,
            pairs=PAIRS if pairs is None else pairs,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **settings,
        )
    if not helping():
        report.write(found, out)
