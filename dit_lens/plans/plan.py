"""A reuse plan as data: the cells that are held, what it is for, and its file.

A cell is a part of a layer ("attn", "mlp", ...) at a step: there the layer adds what it added the
step before, which may have been held itself. A plan knows the model and the steps that it was made
for, so that it can't be run on others unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import arguments
from ..errors import InvalidState, InvalidValue, MissingFile
from ..hooks.hold import parts
from ..model.hooked import HookedDiT
from ..storage import replacing
from ..storage.schema import Listed, Schema, conform
from . import exports

FORMAT = "dit_lens.plans.plan/1"
EXPECTED = "a plan written by Plan.save"
CELLS = "cells, each (layer, part, step) such as (5, 'attn', 12)"
Cell = tuple[int, str, int]
"""A layer, a part of it, and a step."""


class Content(Schema):
    """What a plan's file says."""

    format: str
    model: dict[str, str]
    timesteps: Listed[float]
    parts: Listed[Listed[str]]
    cells: Listed[Annotated[tuple[int, str, int], Field(strict=False)]]
    macs: float
    about: dict[str, Any]


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
    """

    model: Mapping[str, str]
    timesteps: tuple[float, ...]
    parts: tuple[tuple[str, ...], ...]
    cells: frozenset[Cell]
    macs: float
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: HookedDiT,
        timesteps: Iterable[float],
        cells: Iterable[Cell],
        about: Mapping[str, Any] | None = None,
        y: Any = None,
    ) -> Plan:
        """A plan for a model, with its cost.

        Args:
            model: the opened model.
            timesteps: of the run, in the scheduler's units, such as `run.timesteps`.
            cells: (layer, part, step), parts as `dit_lens.hooks.hold.parts` names them.
            about: what else is kept with it.
            y: a condition for one item, to count the cost with, where the model has neither classes
                nor a pipeline that encodes prompts.

        Raises:
            InvalidValue: for a cell that the model or the run does not have; the first step can't
                be held.

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
        of_layer = tuple(tuple(parts(model.names, i)) for i in range(n))
        held = frozenset(_checked(cell, n) for cell in arguments.listed("cells", cells, CELLS, 0))
        about = arguments.optional(arguments.instance, "about", about, Mapping, "a dict, or None")
        try:
            json.dumps(dict(about or {}), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise arguments.refusal("about", about, "what JSON can hold, by name") from None
        for layer, part, step in sorted(held):
            if not 0 <= layer < len(of_layer) or part not in of_layer[layer]:
                raise InvalidValue(
                    f"The plan holds {part!r} in layer {layer}, which the model does not have; "
                    f"expected layers 0 to {len(of_layer) - 1} and {', '.join(of_layer[0])}."
                )
            if not 1 <= step < len(times):
                raise InvalidValue(
                    f"The plan holds step {step}; expected steps 1 to {len(times) - 1}, those that "
                    "have one before them."
                )
        share = Costs.of(model, y).share(held, len(times))
        return cls(identity(model), times, of_layer, held, share, dict(about or {}))

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
            "macs": self.macs,
            "about": dict(self.about),
        }
        with replacing(arguments.path("path", path)) as part:
            part.write_text(json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")
        return Path(path)

    def to_smoothcache(self) -> dict[str, list[int]]:
        """The plan as a schedule of SmoothCache (Liu et al. 2024, arXiv 2411.10510): for each
        module a 1 for every call that is computed, and a 0 where its output is taken again.

        SmoothCache takes a module's output again, before the gate of that step, where a plan takes
        what was added; so its images differ a little from those that the plan was measured on. It
        counts calls: a pipeline must make one a step.

        Returns:
            `steps` numbers for each module and layer, such as "ff-0".

        Raises:
            InvalidValue: for a model whose family does not say which modules compute a part.

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
                or all parts of the layers from one on, and never layer 0.

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
        path = arguments.path("path", path)
        where = repr(str(path))
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise MissingFile(f"There is no file {where}; expected {EXPECTED}.") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise InvalidValue(f"{where} is not JSON ({reason}); expected {EXPECTED}.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InvalidValue(f"{where} is no plan of this version; expected {EXPECTED}.")
        if content.pop("sha256", None) != _digest(content):
            raise InvalidValue(
                f"{where} is damaged: it is not what was written, by its checksum; expected "
                f"{EXPECTED}."
            )
        read = conform(content, Content, where)
        cells = frozenset(read.cells)
        return cls(read.model, read.timesteps, read.parts, cells, read.macs, read.about)

    def __repr__(self) -> str:
        return (
            f"Plan({self.steps} steps, {len(self.parts)} layers: {len(self.cells)} of "
            f"{self.steps * sum(map(len, self.parts))} cells held, {self.macs:.1%} of the "
            "multiply-accumulates)"
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


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identity(model: HookedDiT) -> dict[str, str]:
    """What a model is known by: its class, and digests of its configuration and of the first
    numbers of each of its weights.
    """
    transformer = model.transformer
    own = getattr(transformer, "config", {})  # which only diffusers' classes all have
    own = own if isinstance(own, Mapping) else {}
    config = sorted((k, str(v)) for k, v in own.items() if not k.startswith("_"))
    weights = hashlib.sha256()
    for name, value in transformer.state_dict().items():
        if value.device.type == "meta":
            raise InvalidState(
                f"The weights are offloaded ({name} is on no device), so a plan's model can't be "
                "told by them; expected a model without accelerate's cpu_offload or disk_offload."
            )
        first = value.detach().flatten()[:8].to("cpu", torch.float32)
        weights.update(f"{name} {tuple(value.shape)}".encode() + first.numpy().tobytes())
    return {
        "class": type(transformer).__name__,
        "layers": str(model.cfg.n_layers),
        "configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one forward for one item.

    Attributes:
        parts: of each part of each layer.
        rest: of each layer besides its parts, such as its modulation.
        whole: of the whole forward.
    """

    parts: Mapping[tuple[int, str], float]
    rest: tuple[float, ...]
    whole: float

    @classmethod
    def of(cls, model: HookedDiT, y: Any = None) -> Costs:
        """Counted in a forward.

        Args:
            model: the opened model.
            y: a condition for one item; by default the first of the model's own.
        """
        blocks = model.family.blocks(model.transformer)
        names = {module: name for name, module in model.transformer.named_modules()}
        x = torch.zeros(1, *model.cfg.latent_shape, device=model.device, dtype=model.dtype)
        t = torch.full((1,), 500.0, device=model.device)
        y = torch.zeros(1, dtype=torch.long, device=model.device) if y is None else y
        counter = FlopCounterMode(display=False)
        # the fused kernels of some devices are not counted; this one is, and does the same work
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(x, t.long() if model.cfg.n_classes else t, y)
        counts = counter.get_flop_counts()
        top = type(model.transformer).__name__

        def of_module(module: Any) -> float:
            return sum(counts.get(f"{top}.{names[module]}", {}).values()) / 2

        by_part: dict[tuple[int, str], float] = {}
        rest = []
        for i, block in enumerate(blocks):
            whole = of_module(block)
            own = parts(model.names, i)
            for part in own:
                children = [getattr(block, c, None) for c in model.family.computes.get(part, ())]
                found = sum(of_module(child) for child in children if child is not None)
                by_part[i, part] = whole if len(own) == 1 else found
            rest.append(whole - sum(by_part[i, part] for part in own))
        return cls(by_part, tuple(rest), sum(counts["Global"].values()) / 2)

    def share(self, cells: Iterable[Cell], steps: int) -> float:
        """The share of the multiply-accumulates of a run that is left.

        Args:
            cells: that are held.
            steps: of the run.
        """
        cells = set(cells)
        saved = sum(self.parts[layer, part] for layer, part, _ in cells)
        for layer, rest in enumerate(self.rest):
            of_layer = [place for place in self.parts if place[0] == layer]
            held = [{s for i, p, s in cells if (i, p) == place} for place in of_layer]
            saved += rest * len(set.intersection(*held)) if held else 0
        return float(np.clip(1 - saved / (self.whole * steps), 0, 1))
