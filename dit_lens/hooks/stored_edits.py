"""Edits that outlive the process: what is put in at a hook point, at which steps, as JSON with a
checksum.

A stored edit says what goes on in place of an activation: nothing ("zero"), or numbers that are
stored with it ("set"), one for each of its steps. It depends on the step and on nothing else, so it
acts alike in a trace, in a run and in a single call.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidValue
from ..pieces.content import config_digest, weights_digest
from ..storage import load_document, save_document
from .names import select
from .points import HookFunction, HookPoint
from .regions import Region

FORMAT = "dit_lens.hooks.stored_edits/2"
EXPECTED = "edits written by save_edits"
Axes = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class StoredEdit:
    """One edit.

    Attributes:
        name: the hook point.
        steps: at which it acts, 0 the noisiest.
        kind: "zero", or "set" to `values`.
        heads: only these heads.
        tokens: only these tokens.
        values: of "set", [step, row, ...]: one row for every item alike, one for each half of a
            guided batch, [cond | uncond], or one for each row.
    """

    name: str
    steps: tuple[int, ...]
    kind: Literal["zero", "set"]
    heads: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    values: Tensor | None = field(default=None, repr=False)

    def fn(self, axes: Axes, step: int | None = None) -> HookFunction:
        """What acts at the hook point, fn(activation, hook).

        Args:
            axes: of the hook points by name, `model.sites`.
            step: which of its steps it is; None is the hook point's, as within a trace.
        """
        heads = None if self.heads is None else list(self.heads)
        tokens = None if self.tokens is None else list(self.tokens)
        region = Region(heads=heads, tokens=tokens)
        places = {own: i for i, own in enumerate(self.steps)}

        def edit(activation: Tensor, hook: HookPoint) -> Tensor:
            place = places[hook.step if step is None else step]  # type: ignore[index]
            new = self._new(activation, place, hook.branch)
            return region.merge(activation, new, axes[self.name])

        edit.in_parts = self.alike  # type: ignore[attr-defined]
        return edit

    @property
    def alike(self) -> bool:
        """Whether every item is edited alike."""
        return self.values is None or self.values.shape[1] == 1

    def _new(self, activation: Tensor, place: int, branch: str) -> Tensor:
        """What is put in, [row, ...]."""
        if self.values is None:
            return torch.zeros_like(activation)
        rows = self.values[place].to(activation)
        if len(rows) > 1 and branch not in ("", "cond", "cond | uncond"):
            if branch != "uncond | cond" or len(rows) % 2:
                raise InvalidValue(
                    f"The edit at {self.name!r} holds {len(rows)} rows, as a run has them in one "
                    f"batch, [cond | uncond] with guidance, and this call is {branch!r}; expected "
                    "a loop that guides in one batch, such as dit_lens.sample."
                )
            rows = rows.roll(len(rows) // 2, 0)
        if rows.shape[1:] != activation.shape[1:] or len(activation) % len(rows):
            raise InvalidValue(
                f"The edit at {self.name!r} holds {list(rows.shape)} for a step, and the "
                f"activation is {list(activation.shape)}."
            )
        return rows.repeat_interleave(len(activation) // len(rows), 0)


def shown_steps(steps: Sequence[int]) -> str:
    """Steps as text.

    >>> shown_steps((3, 4, 5)), shown_steps((3, 7))
    ('3-5', '3, 7')
    """
    if len(steps) > 2 and list(steps) == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]}-{steps[-1]}"
    return ", ".join(map(str, steps))


def at_step(edits: Sequence[StoredEdit], axes: Axes, step: int) -> list[tuple[str, HookFunction]]:
    """The edits that act at a step as (name, fn), for `model.run_with_hooks(fwd_hooks=)`.

    Args:
        edits: stored ones.
        axes: of the hook points by name, `model.sites`.
        step: 0 is the noisiest.
    """
    return [(edit.name, edit.fn(axes, step)) for edit in edits if step in edit.steps]


def by_step(edits: Sequence[StoredEdit], axes: Axes) -> dict[int, list[tuple[str, HookFunction]]]:
    """The edits by step, for `Run.replay(edits=)`.

    Args:
        edits: stored ones.
        axes: of the hook points by name, `model.sites`.
    """
    steps = sorted({step for edit in edits for step in edit.steps})
    return {step: at_step(edits, axes, step) for step in steps}


def save_edits(path: str | Path, edits: Sequence[StoredEdit], about: Mapping[str, Any]) -> Path:
    """Write edits as JSON.

    Args:
        path: the file; its folder is made.
        edits: what is written.
        about: what else is kept with them, by name; what JSON can hold.
    """
    content = {
        "format": FORMAT,
        "about": dict(about),
        "edits": [
            {
                "name": e.name,
                "steps": list(e.steps),
                "kind": e.kind,
                "heads": None if e.heads is None else list(e.heads),
                "tokens": None if e.tokens is None else list(e.tokens),
                "shape": None if e.values is None else list(e.values.shape),
                "values": None if e.values is None else _text(e.values),
            }
            for e in edits
        ],
    }
    return save_document(path, content)


def load_edits(path: str | Path) -> tuple[list[StoredEdit], dict[str, Any]]:
    """Read edits, and what was kept with them.

    Args:
        path: a file that `save_edits` wrote.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for another file, or one that is not as it was written.
    """
    content = load_document(path, FORMAT, "a file of edits", EXPECTED)
    return _conformed(content, repr(str(path))), content["about"]


def _conformed(content: dict[str, Any], where: str) -> list[StoredEdit]:
    """The edits of a file, each held against its schema."""
    from ..storage.schema import Listed, Schema, Size, conform  # pydantic takes a while

    class One(Schema):
        name: str
        steps: Listed[Size]
        kind: Literal["zero", "set"]
        heads: Listed[Size] | None
        tokens: Listed[Size] | None
        shape: Listed[Size] | None
        values: str | None

    class Content(Schema):
        format: str
        about: dict[str, Any]
        edits: Listed[One]

    found = []
    for one in conform(content, Content, where).edits:
        values = None
        if (one.kind == "set") != (one.values is not None and one.shape is not None):
            raise InvalidValue(f"{where}: an edit at {one.name!r} has no values to set.")
        if one.values is not None and one.shape is not None:
            values = _numbers(one.values, one.shape, where)
            if len(values) != len(one.steps):
                raise InvalidValue(
                    f"{where}: the edit at {one.name!r} has values for {len(values)} steps; "
                    f"expected {len(one.steps)}."
                )
        found.append(StoredEdit(one.name, one.steps, one.kind, one.heads, one.tokens, values))
    return found


def edits_for(
    path: str | Path, transformer: Any, names: Sequence[str]
) -> tuple[list[StoredEdit], list[float]]:
    """The edits of a file for a model, and the timesteps of the run that they were made for.

    Args:
        path: a file that `save_edits` wrote.
        transformer: the model's.
        names: the model's hook points.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for another file, a damaged one, or one that was made for another model.
        UnknownName: for hook points that the model does not have.
    """
    edits, about = load_edits(path)
    for what, own in made_for(transformer).items():
        if own != (theirs := about.get(what)):
            raise InvalidValue(
                f"{str(path)!r} was made for another model: its {what} is {theirs!r}, this one's "
                f"{own!r}; expected the model that was diagnosed."
            )
    for edit in edits:
        select(edit.name, names)
    times = about.get("timesteps")
    if not isinstance(times, list) or not all(isinstance(t, (int, float)) for t in times):
        raise InvalidValue(f"{str(path)!r} does not say for which timesteps its edits are.")
    if any(step >= len(times) for edit in edits for step in edit.steps):
        raise InvalidValue(f"{str(path)!r} has edits after the last of its {len(times)} steps.")
    return edits, [float(t) for t in times]


def made_for(transformer: Any) -> dict[str, str]:
    """What the model is known by that edits are made for: its class and digests of its
    configuration and weights.

    Args:
        transformer: a diffusers transformer.
    """
    return {
        "architecture": f"{type(transformer).__name__} {config_digest(transformer)}",
        "weights": weights_digest(transformer),
    }


def _text(values: Tensor) -> str:
    small = values.detach().cpu().float().numpy().astype("<f4")
    return base64.b64encode(small.tobytes()).decode()


def _numbers(text: str, shape: Sequence[int], where: str) -> Tensor:
    try:
        raw = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        values = torch.from_numpy(raw.reshape(tuple(shape)).copy())
    except ValueError:
        raise InvalidValue(f"{where}: values do not have the shape {list(shape)}.") from None
    if not bool(values.isfinite().all()):
        raise InvalidValue(f"{where}: values that are not finite.")
    return values
