"""A reuse plan as data: the cells that are held, what it is for, and its file.

A cell is a part of a layer ("attn", "mlp", ...) at a step. Held, the layer adds there what it added
when the part was last computed; or, held along a line, the point at this step's time of the line
through the last two steps at which it was (the first order of TaylorSeer, Liu et al. 2025, arXiv
2503.06923). A plan knows the model and the steps that it was made for, so that it can't be run on
others unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .. import arguments
from ..arguments import LAST_SEED, MANY
from ..errors import InvalidValue
from ..hooks.hold import parts, require_parts
from ..model.hooked import HookedDiT
from ..pieces.content import config_digest, weights_digest
from ..storage import load_document, replacing, save_document
from ..storage.schema import Listed, Schema, conform, fits
from . import exports
from .costs import Cell, Costs

FORMAT = "dit_lens.plans.plan/2"
EXPECTED = "a plan written by Plan.save"
CELLS = "cells, each (layer, part, step) such as (5, 'attn', 12)"


KNOWN_BY = ("class", "layers", "configuration", "weights")
"""What a model is known by."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(Schema):
    """What a plan's file says."""

    format: str
    model: Annotated[
        dict[str, str], fits(lambda known: set(known) == set(KNOWN_BY), f"have {KNOWN_BY}")
    ]
    timesteps: Annotated[Listed[Finite], Field(min_length=1)]
    parts: Annotated[Listed[Listed[str]], Field(min_length=1)]
    cells: Listed[Annotated[tuple[int, str, int], Field(strict=False)]]
    lines: Listed[Annotated[tuple[int, str, int], Field(strict=False)]]
    macs: Annotated[float, Field(ge=0, le=1)]
    about: dict[str, Any]


class About(Schema):
    """What `about` of a plan's file says of the run that it was made from, where it says so; a plan
    by hand may keep anything else there.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    steps: Annotated[int, Field(ge=2)] = 2
    guidance: Finite = 1.0
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    cut: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] = 0
    items: Annotated[int, Field(ge=1, le=MANY)] = 1
    longest: Annotated[int, Field(ge=1, le=1000)] = 1
    sampler: str | None = None
    labels: Annotated[Listed[int] | Listed[str], Field(min_length=1)] = (0,)


@dataclass(frozen=True)
class Plan:
    """Which cells of a denoising run are held.

        plan = Plan.of(model, timesteps, [(layer, "attn", step), ...])
        with dit_lens.reuse(pipe, plan):
            pipe(class_labels=[207], num_inference_steps=50)
        plan.save("plan.json")

    Attributes:
        model: what it was made for: the class, and digests of its configuration and weights.
        timesteps: of the steps that it was made for, in the scheduler's units.
        parts: of each layer, what it adds by: "attn", "mlp", ...
        cells: (layer, part, step) that are held.
        macs: the share of the multiply-accumulates that is left.
        about: how it was made and what was measured of it, by name.
        lines: those of the cells that are held along a line.
    """

    model: Mapping[str, str]
    timesteps: tuple[float, ...]
    parts: tuple[tuple[str, ...], ...]
    cells: frozenset[Cell]
    macs: float
    about: Mapping[str, Any] = field(default_factory=dict)
    lines: frozenset[Cell] = frozenset()

    @classmethod
    def of(
        cls,
        model: HookedDiT,
        timesteps: Iterable[float],
        cells: Iterable[Cell],
        about: Mapping[str, Any] | None = None,
        y: Any = None,
        lines: Iterable[Cell] = (),
    ) -> Plan:
        """A plan for a model, with its cost.

        Args:
            model: the opened model.
            timesteps: of the run, in the scheduler's units, such as `run.timesteps`.
            cells: (layer, part, step), parts as `dit_lens.hooks.hold.parts` names them.
            about: what else is kept with it.
            y: a condition for one item, to count the cost with, where the model has neither classes
                nor a pipeline that encodes prompts.
            lines: those of the cells that are held along a line.

        Raises:
            InvalidValue: for a cell that the model or the run does not have; the first step can't
                be held, nor one along a line that has not two computed ones before it.

        >>> import dit_lens; model = dit_lens.load("digits")
        >>> Plan.of(model, [900, 500, 100], [(0, "attn", 1), (0, "mlp", 1)])
        Plan(3 steps, 28 layers: 2 of 168 cells held, 98.8 % of the multiply-accumulates)
        """
        arguments.instance("model", model, HookedDiT, "a HookedDiT")
        times = tuple(
            arguments.number("timesteps", t)
            for t in arguments.listed("timesteps", timesteps, "those of a run, run.timesteps")
        )
        n = model.cfg.n_layers
        require_parts(model.names)
        of_layer = tuple(tuple(parts(model.names, i)) for i in range(n))
        held = frozenset(_checked(cell, n) for cell in arguments.listed("cells", cells, CELLS, 0))
        about = arguments.optional(arguments.instance, "about", about, Mapping, "a dict, or None")
        try:
            json.dumps(dict(about or {}), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise arguments.refusal("about", about, "what JSON can hold, by name") from None
        _require_cells(held, of_layer, len(times))
        along = frozenset(_checked(cell, n) for cell in arguments.listed("lines", lines, CELLS, 0))
        share = Costs.of(model, y).share(held, len(times))
        plan = cls(identity(model), times, of_layer, held, share, dict(about or {}), along)
        plan._require_lines()
        return plan

    @property
    def steps(self) -> int:
        """How many steps the run has that it is for."""
        return len(self.timesteps)

    @cached_property
    def held(self) -> dict[tuple[int, str], frozenset[int]]:
        """The steps at which each part of each layer is held."""
        found: dict[tuple[int, str], set[int]] = {}
        for layer, part, step in self.cells:
            found.setdefault((layer, part), set()).add(step)
        return {place: frozenset(steps) for place, steps in found.items()}

    @cached_property
    def sources(self) -> dict[Cell, tuple[int, ...]]:
        """The steps that each held cell is made of, the latest first: one, or two along a line."""
        found = {}
        for (layer, part), held in self.held.items():
            for step in held:
                computed = [s for s in range(step) if s not in held]
                number = 1 + ((layer, part, step) in self.lines)
                found[layer, part, step] = tuple(reversed(computed[-number:]))
        return found

    def _require_lines(self) -> None:
        """Raise InvalidValue for a line that there is none through."""
        for cell in sorted(self.lines):
            if cell not in self.cells:
                raise InvalidValue(f"lines has {cell}, which is not held; expected some of cells.")
            times = [self.timesteps[s] for s in self.sources[cell]]
            if len(set(times)) < 2:
                raise InvalidValue(
                    f"{cell} can't be held along a line: before it the part is computed at "
                    f"{len(set(times))} other time; expected two, or a cell held without a line."
                )

    def require_model(self, model: HookedDiT) -> None:
        """Raise InvalidValue for a model that the plan was not made for.

        Args:
            model: the opened model.
        """
        own = identity(model)
        differs = [name for name in own if own[name] != self.model.get(name)]
        if differs:
            raise InvalidValue(
                f"The plan was made for another model: its {differs[0]} is "
                f"{self.model.get(differs[0])!r}, this one's {own[differs[0]]!r}; make one with "
                "dit_lens.experiments.reuse_plan(model)."
            )
        layers = range(model.cfg.n_layers)
        if self.parts != (of_layer := tuple(tuple(parts(model.names, i)) for i in layers)):
            raise InvalidValue(
                f"The plan is for {len(self.parts)} layers with {self.parts[:1]}, ..., and the "
                f"model has {len(of_layer)} with {of_layer[:1]}, ...; expected the model's own."
            )

    def save(self, path: str | Path) -> Path:
        """Write it as JSON with a checksum.

        Args:
            path: the file; its folder is made.

        Returns:
            The path.
        """
        content = {
            "format": FORMAT,
            "model": dict(self.model),
            "timesteps": list(self.timesteps),
            "parts": [list(of_layer) for of_layer in self.parts],
            "cells": [list(cell) for cell in sorted(self.cells)],
            "lines": [list(cell) for cell in sorted(self.lines)],
            "macs": self.macs,
            "about": dict(self.about),
        }
        return save_document(path, content)

    def to_smoothcache(self) -> dict[str, list[int]]:
        """The plan as a schedule of SmoothCache (Liu et al. 2024, arXiv 2411.10510): for each
        module a 1 for every call that is computed, and a 0 where its output is taken again.

        SmoothCache takes a module's output again, before the gate of that step, where a plan takes
        what was added; so its images differ a little from those that the plan was measured on. It
        counts calls: a pipeline must make one a step.

        Returns:
            `steps` numbers for each module and layer, such as "ff-0".

        Raises:
            InvalidValue: for a model whose family does not say which modules compute a part; for a
                plan with lines, which SmoothCache has not.

        >>> import dit_lens; model = dit_lens.load("digits")
        >>> Plan.of(model, [900, 500, 100], [(0, "mlp", 1)]).to_smoothcache()["ff-0"]
        [1, 0, 1]
        """
        return exports.smoothcache(self)

    def to_cache_dit(self) -> dict[str, Any]:
        """The plan as arguments of cache-dit's `DBCacheConfig`, which holds whole steps.

        Returns:
            The arguments by name: the first layers, which are always computed
            (`Fn_compute_blocks`), and `steps_computation_mask`, a 1 for every step that is.

        Raises:
            InvalidValue: for a plan that cache-dit can't run: it must hold, at every step, nothing
                or all parts of the layers from one on, never layer 0, and nothing along a line.

        >>> import dit_lens; model = dit_lens.load("digits")
        >>> rear = [(layer, part, 1) for layer in range(1, 28) for part in ("attn", "mlp")]
        >>> Plan.of(model, [900, 500, 100], rear).to_cache_dit()["steps_computation_mask"]
        [1, 0, 1]
        """
        return exports.cache_dit(self)

    def to_script(self, path: str | Path) -> Path:
        """Write a Python file that runs the plan on diffusers' DiT without dit_lens: `with
        plan(pipe.transformer): pipe(...)`.

        Args:
            path: the file; its folder is made.

        Returns:
            The path.

        Raises:
            InvalidValue: for a plan of another class of model.

        >>> import dit_lens, tempfile; model = dit_lens.load("digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Plan.of(model, [900, 100], [(0, "mlp", 1)]).to_script(f"{folder}/fast.py")
        ...     len(path.read_text().splitlines()) <= 60
        True
        """
        with replacing(arguments.path("path", path)) as part:
            part.write_text(exports.script(self))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read one back.

        Args:
            path: a file written by `save`.

        Raises:
            MissingFile: if it is not there.
            InvalidValue: for a file that is no plan, or is not as it was written.
        """
        content, where = load_document(path, FORMAT, "a plan", EXPECTED), repr(str(path))
        read = conform(content, Content, where)
        about = conform(dict(read.about), About, f"'about' of {where}")
        cells, lines = frozenset(read.cells), frozenset(read.lines)
        if "steps" in read.about and about.steps != len(read.timesteps):
            raise InvalidValue(
                f"{where} has steps={about.steps} in 'about', and {len(read.timesteps)} timesteps; "
                "expected as many."
            )
        try:
            _require_cells(cells, read.parts, len(read.timesteps))
            plan = cls(read.model, read.timesteps, read.parts, cells, read.macs, read.about, lines)
            plan._require_lines()
        except InvalidValue as error:
            raise InvalidValue(f"{where} is no plan that could be run. {error}") from None
        return plan

    def __repr__(self) -> str:
        return (
            f"Plan({self.steps} steps, {len(self.parts)} layers: {len(self.cells)} of "
            f"{self.steps * sum(map(len, self.parts))} cells held"
            f"{f', {len(self.lines)} of them along lines' if self.lines else ''}, {self.macs:.1%} "
            "of the multiply-accumulates)"
        ).replace("%", " %")


def _checked(cell: Any, n: int) -> Cell:
    """A cell in Python's types; negative layers count from the end."""
    if not isinstance(cell, (tuple, list)) or len(cell) != 3:
        raise arguments.refusal(
            "cells", cell, CELLS, wrong_type=not isinstance(cell, (tuple, list))
        )
    layer = arguments.whole("layer", cell[0])
    layer += n if -n <= layer < 0 else 0
    return layer, arguments.text("part", cell[1]), arguments.whole("step", cell[2])


def _require_cells(cells: Iterable[Cell], of_layer: Sequence[Sequence[str]], steps: int) -> None:
    """Raise InvalidValue for a cell that the model or the run does not have."""
    for layer, part, step in sorted(cells):
        if not 0 <= layer < len(of_layer) or part not in of_layer[layer]:
            parts_of_it = ", ".join(of_layer[0]) if of_layer else "no parts"
            raise InvalidValue(
                f"The plan holds {part!r} in layer {layer:.6g}, which the model does not have; "
                f"expected layers 0 to {len(of_layer) - 1} and {parts_of_it}."
            )
        if not 1 <= step < steps:
            raise InvalidValue(
                f"The plan holds step {step:.6g}; expected steps 1 to {steps - 1}, those that have "
                "one before them."
            )


def identity(model: HookedDiT) -> dict[str, str]:
    """What a model is known by: its class, and digests of its configuration and of its weights."""
    transformer = model.transformer
    shape = str(model.cfg.n_layers), config_digest(transformer)
    known = type(transformer).__name__, *shape, weights_digest(transformer)
    return dict(zip(KNOWN_BY, known, strict=True))
