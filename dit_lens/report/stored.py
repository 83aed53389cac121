"""Stored results, read back and shown again: what `dit-lens report` does. Nothing that is stored is
written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import arguments
from ..errors import InvalidValue, MissingFile
from ..experiments.cause_map import HALVES, PARTS
from ..experiments.side_by_side import WAYS
from ..pictures.result import Result
from ..storage import is_whole, load_dataset, made_with
from . import (
    attributes,
    cause_details,
    cause_map,
    compare,
    coupling_sweep,
    diagnoses,
    diagnosis,
    gap,
    knock_outs,
    side_by_side,
)

ENDS = "bound"
"""The axis of an interval's ends."""
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "gap.nc": {
        "layer_commitment": ("view", "layer", "split"),
        "layer_gap": ("view", "layer"),
        "layer_gap_interval": ("view", "layer", ENDS),
        "layer_gap_together": ("view", "layer", ENDS),
        "band_commitment": ("estimator", "band"),
        "band_commitment_interval": ("estimator", "band", ENDS),
        "split_commitment": ("estimator", "split"),
        "split_commitment_interval": ("estimator", "split", ENDS),
        "split_gap": ("estimator", "quantity"),
        "split_gap_interval": ("estimator", "quantity", ENDS),
        "image_gap": ("estimator", "quantity"),
        "image_gap_interval": ("estimator", "quantity", ENDS),
        "x_t_gap": ("quantity",),
        "x_t_gap_interval": ("quantity", ENDS),
        "cut_gap": ("cut",),
        "cut_gap_interval": ("cut", ENDS),
        "log_ratio": ("energy", "layer"),
        "log_ratio_interval": ("energy", "layer", ENDS),
        "log_ratio_together": ("energy", "layer", ENDS),
        "spectrum_commitment": ("frequency",),
        "spectrum_commitment_interval": ("frequency", ENDS),
        "difference_spectrum": ("layer", "token_frequency"),
        "agreement_one_pass": ("step", "band"),
        "agreement_clones": ("release", "band"),
        "band_gap": ("estimator", "quantity"),
        "band_gap_interval": ("estimator", "quantity", ENDS),
        "band_variance": ("band",),
        "band_variance_interval": ("band", ENDS),
        "split_variance": ("split",),
        "split_variance_interval": ("split", ENDS),
        "estimator_band_difference": (),
        "estimator_band_difference_interval": (ENDS,),
    },
    "attributes.nc": {
        "commitment": ("attribute", "quantity"),
        "commitment_interval": ("attribute", "quantity", ENDS),
        "readable": ("attribute", "quantity"),
        "readable_interval": ("attribute", "quantity", ENDS),
        "band_commitment": ("band", "quantity"),
        "band_commitment_interval": ("band", "quantity", ENDS),
        "split_commitment": ("split", "quantity"),
        "split_commitment_interval": ("split", "quantity", ENDS),
        "agreement": ("release", "attribute"),
        "agrees": ("release", "pair", "attribute"),
        "end": ("release", "twin", "shown", "channel", "row", "column"),
    },
    "diagnosis.nc": {
        "chance": ("release",),
        "chance_interval": ("release", ENDS),
        "base_rate": (),
        "base_rate_interval": (ENDS,),
        "picture": ("shown", "channel", "row", "column"),
    },
    "diagnoses.nc": {
        "decided": ("fault",),
        "effect": ("fault", "window", "stack"),
        "depth": ("fault",),
        "when": ("fault",),
        "mean_decided": ("kind",),
        "mean_decided_interval": ("kind", ENDS),
        "mean_depth": ("kind",),
        "mean_depth_interval": ("kind", ENDS),
    },
    "coupling_sweep.nc": {
        "parting": ("g", "band"),
        "gap": ("g", "sense"),
        "gap_interval": ("g", "sense", ENDS),
        "rho": ("g",),
        "xi": ("g",),
        "routing": ("g", "layer"),
        "pattern": ("g", "layer"),
        "energy": ("g", "band"),
        "energy_interval": ("g", "band", ENDS),
        "read": ("g",),
        "read_interval": ("g", ENDS),
    },
    "knock_outs.nc": {
        "gap": ("how", "layer"),
        "effect": ("how", "layer"),
        "effect_interval": ("how", "layer", ENDS),
    },
    "side_by_side.nc": {
        name: ("budget", "way", *more)
        for kind, more in {
            "macs": (),
            "time": (),
            "effect": ("band",),
            "total": (),
            "over_plan": (),
            "psnr": (),
        }.items()
        for name, more in (
            (kind, more),
            *([] if kind in ("macs", "time") else [(f"{kind}_interval", (*more, ENDS))]),
        )
    },
    "compare.nc": {
        name: axes
        for kind in ("effect", "power", "error", "later")
        for name, axes in ((kind, ("band",)), (f"{kind}_interval", ("band", ENDS)))
    },
    "cause_map.nc": {
        "effect": ("site", "layer", "window", "band"),
        "effect_interval": ("site", "layer", "window", "band", ENDS),
        "decided": ("step", "band"),
        "quadrant": ("half", "part", "band"),
        "quadrant_interval": ("half", "part", "band", ENDS),
        "late_over_early": ("part", "band"),
        "late_over_early_interval": ("part", "band", ENDS),
        "first": ("window",),
        "last": ("window",),
    },
    "patches.nc": {
        "move": ("layer", "site", "window", "band"),
        "move_together": ("layer", "site", "window", "band", ENDS),
    },
    "cumulative.nc": {
        "effect": ("end", "depth"),
        "effect_interval": ("end", "depth", ENDS),
    },
    "smallest_set.nc": {"gap": ("tried",), "left": (), "left_interval": (ENDS,)},
    "shapley.nc": {
        "share": ("player",),
        "share_interval": ("player", ENDS),
        "monte_carlo": ("player",),
        "interaction": ("one", "other"),
    },
    "windows.nc": {
        "effect": ("layer", "window"),
        "effect_interval": ("layer", "window", ENDS),
    },
    "interchange.nc": {"move": ("layer", "head", "window", "dose", "taken", "band")},
}
"""The files that the commands write, and the figures in each that a report shows, with their
axes."""

LABELS: dict[str, dict[str, set[Any]]] = {
    "gap.nc": {
        "view": {"stream", "lens"},
        "energy": {"ratio", "growth"},
        "split": {"low", "high"},
        "estimator": {"one_pass", "clones"},
        "quantity": {"step", "log_snr"},
        ENDS: {"low", "high"},
    },
    "attributes.nc": {
        "split": {"low", "high"},
        "quantity": {"step"},
        "twin": {"A", "B"},
        ENDS: {"low", "high"},
    },
    "coupling_sweep.nc": {"band": {"low", "high"}, "sense": {"agreement", "parting", "size"}},
    "diagnosis.nc": {"shown": {"bad"}, ENDS: {"low", "high"}},
    "diagnoses.nc": {ENDS: {"low", "high"}},
    "knock_outs.nc": {ENDS: {"low", "high"}},
    "side_by_side.nc": {"way": set(WAYS), ENDS: {"low", "high"}},
    "compare.nc": {"band": {"low", "high"}, ENDS: {"low", "high"}},
    "cause_map.nc": {"half": set(HALVES), "part": set(PARTS), ENDS: {"low", "high"}},
    "patches.nc": {"band": {"low", "high"}, ENDS: {"low", "high"}},
    "cumulative.nc": {"end": {"first", "last"}, ENDS: {"low", "high"}},
    "smallest_set.nc": {ENDS: {"low", "high"}},
    "shapley.nc": {ENDS: {"low", "high"}},
    "windows.nc": {ENDS: {"low", "high"}},
    "interchange.nc": {"band": {"low", "high"}, "taken": {"low", "high"}},
}
"""Labels that an axis must have."""

NUMBERS, TEXTS = "numbers", "texts"
ATTRS: dict[str, dict[str, str]] = {
    "gap.nc": {
        **dict.fromkeys(("headline", "estimators", "data", "title", "bands", "notes"), TEXTS),
        **dict.fromkeys(("commitment_step", "cut", "steps"), NUMBERS),
        **{f"onset_{view}": TEXTS for view in gap.VIEWS},
        **{f"onset_layer_{view}": NUMBERS for view in gap.VIEWS},
    },
    "attributes.nc": {
        **dict.fromkeys(("headline", "title", "notes"), TEXTS),
        "steps": NUMBERS,
    },
    "coupling_sweep.nc": {
        **dict.fromkeys(("form", "sentence_quality"), TEXTS),
        **{f"sentence_{sense}": TEXTS for sense in coupling_sweep.SENSES},
        **dict.fromkeys(("eps", "step"), NUMBERS),
    },
    "knock_outs.nc": dict.fromkeys(("gap", "matters", "n_layers"), NUMBERS),
    "patches.nc": {},
    "side_by_side.nc": {"sentence": TEXTS, "items": NUMBERS},
    "compare.nc": {"sentence": TEXTS, "items": NUMBERS},
    "diagnosis.nc": {
        **dict.fromkeys(("sentence", "layers", "how", "window"), TEXTS),
        **dict.fromkeys(("steps", "n_layers", "clones"), NUMBERS),
    },
    "diagnoses.nc": {"sentence": TEXTS, "steps": NUMBERS, "n_layers": NUMBERS},
    "cause_map.nc": {"sentence": TEXTS, "kind": TEXTS, "steps": NUMBERS},
    "cumulative.nc": {"sentence": TEXTS, "how": TEXTS, "gap": NUMBERS},
    "smallest_set.nc": {"sentence": TEXTS},
    "shapley.nc": {"sentence": TEXTS, "every": NUMBERS, "orders": NUMBERS},
    "windows.nc": {"sentence": TEXTS, "gap": NUMBERS, "matters": NUMBERS},
    "interchange.nc": {"sentence": TEXTS},
}
"""What else a report shows."""

COORDINATES = {
    **dict.fromkeys(("layer", "step", "release", "depth", "head"), "i"),
    **dict.fromkeys(("g", "cut", "dose", "budget", "frequency", "token_frequency"), "f"),
}
"""Axes whose labels are numbers, and of which kind."""

EXPECTED = (
    f"one of {', '.join(FILES)}, as `dit-lens gap`, `patch`, `map`, `plan` and `compare` write them"
)


def show(path: Path) -> None:
    """Print the tables and sentences of stored results and draw their pictures again.

    Args:
        path: a folder that `dit-lens gap` or `dit-lens patch` wrote, for all that is in it, or one
            of the files in it, by whatever name.

    Raises:
        MissingFile: if there is nothing at the path, or no result in the folder.
        InvalidValue: for a file that is no result, or is damaged.
    """
    found = files_at(path)
    if note := of_several_models(found):
        print(f"{note}\n")
    kinds = {kind: (file, results) for file in found for kind, results in [read(file)]}
    for kind, (file, results) in kinds.items():
        if kind == "gap.nc":
            gap.show(results, file)
        elif kind == "attributes.nc":
            attributes.show(results, file)
        elif kind == "coupling_sweep.nc":
            coupling_sweep.show(results, file)
        elif kind == "cause_map.nc":
            cause_map.show(results, file)
        elif kind == "side_by_side.nc":
            side_by_side.show(results, file)
        elif kind == "compare.nc":
            compare.show(results, file)
        elif kind == "diagnosis.nc":
            diagnosis.show(results, file)
        elif kind == "diagnoses.nc":
            diagnoses.show(results, file)
        elif kind in cause_details.SHOWN:
            cause_details.show(kind, results, file)
        elif kind == "knock_outs.nc" or "knock_outs.nc" not in kinds:
            _show_causes(kind, file)


def results_at(path: Path) -> dict[str, xr.Dataset]:
    """Every stored result, by the name of its file.

    Args:
        path: a folder, or one file.

    Raises:
        MissingFile: if there is none.
        InvalidValue: for a file that is no result, or is damaged.
    """
    return {file.name: read(file)[1] for file in files_at(path)}


def load_result(path: str | Path) -> Result:
    """A stored result, of any kind, whole as it was written.

    Args:
        path: its file, such as "gap-digits/gap.nc", or a folder that holds one result.

    Returns:
        Result: an `xarray.Dataset`, with pictures: `result.plot.profile()`, ...

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for a file that is no result of dit_lens, or is damaged; for a folder that
            holds several.

        load_result("gap-digits/gap.nc").plot.profile("lens")
    """
    found = files_at(arguments.path("path", path))
    if len(found) > 1:
        raise InvalidValue(
            f"The folder {str(path)!r} holds {len(found)} results; expected one of "
            f"{', '.join(repr(str(file)) for file in found)}."
        )
    return read(found[0])[1]


def of_several_models(files: Sequence[Path]) -> str:
    """A sentence where results side by side are of several models, as their commands named them;
    "" where they are not.

    Args:
        files: of `save_dataset`; those that are damaged are left out.
    """
    known = [(file, made_with(file).get("model")) for file in files if is_whole(file)]
    models = {model for _, model in known if model is not None}
    if len(models) < 2:
        return ""
    of = ", ".join(f"{file.name} of {model!r}" for file, model in known if model is not None)
    return f"The results in {str(files[0].parent)!r} are of {len(models)} models: {of}."


def files_at(path: Path) -> list[Path]:
    """The results in a folder, or the one file.

    Args:
        path: a folder, or one file.

    Raises:
        MissingFile: if there is none.
    """
    try:
        files = [path / name for name in FILES] if path.is_dir() else [path]
        found = [file for file in files if file.exists()]
    except OSError as error:
        raise InvalidValue(f"{str(path)!r} can't be read ({error.strerror}).") from None
    if not found:
        raise MissingFile(
            f"There are no results at {str(path)!r}; expected the folder that `dit-lens gap` or "
            f"`dit-lens patch` wrote, or one of {', '.join(FILES)} in it."
        )
    return found


def read(path: Path) -> tuple[str, Result]:
    """One stored result, and which of `FILES` it is.

    Args:
        path: of the file, by any name.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for a file that is no result of dit_lens, or is not as it was written.
    """
    kind, results = load_dataset(path, EXPECTED)
    if kind not in FILES:
        raise InvalidValue(f"{str(path)!r} is of the kind {kind!r:.60}; expected {EXPECTED}.")
    for name, axes in FILES[kind].items():
        if name not in results or results[name].dims != axes or results[name].dtype.kind != "f":
            raise InvalidValue(f"{str(path)!r} has no {name} {list(axes)}; expected {EXPECTED}.")
    for axis in {axis for axes in FILES[kind].values() for axis in axes}:
        if not _labelled(results, axis, LABELS[kind].get(axis, set())):
            raise InvalidValue(
                f"{str(path)!r} has no such labels on its axis {axis!r} as it was written with; "
                f"expected {EXPECTED}."
            )
    for name, what in ATTRS[kind].items():
        value = results.attrs.get(name)
        number = isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))
        if not (number if what == NUMBERS else isinstance(value, str)):
            raise InvalidValue(f"{str(path)!r} has {name}={value!r:.60}; expected {EXPECTED}.")
    if kind == "knock_outs.nc":
        for way in results.how.values.tolist():
            said = results.attrs.get(f"sentence_{way}")
            if way not in knock_outs.REPLACED or not isinstance(said, str):
                raise InvalidValue(
                    f"{str(path)!r} has how={way!r:.60} and the sentence {said!r:.60}; expected "
                    f"{', '.join(knock_outs.REPLACED)} with a sentence each."
                )
    return kind, Result.of(results)


def _labelled(results: xr.Dataset, axis: str, wanted: set[Any]) -> bool:
    """Whether an axis has labels, of the right kind, each once, and among them those wanted."""
    # without clones there are no releases
    if axis not in results.coords or not (results.sizes[axis] or axis == "release"):
        return False
    values = results[axis].values
    kind = COORDINATES.get(axis)
    if kind is not None and values.dtype.kind != kind:
        return False
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return False
    labels = values.tolist()
    return len(set(labels)) == len(labels) and wanted <= set(labels)


def _show_causes(kind: str, file: Path) -> None:
    """Knock-outs and patches together, compared with the layer profiles where they are known."""
    (first, knocked), (second, patched) = causes_at(kind, file)
    onsets = None
    beside = file.with_name("gap.nc")
    if beside.exists():
        profiles = _read_as(beside, "gap.nc")
        # the profiles of another model say nothing of the causes in this one
        if made_with(beside).get("model") == made_with(first).get("model"):
            onsets = gap.onsets(profiles)
    knock_outs.show(knocked, patched, (first, second), onsets)


def causes_at(kind: str, file: Path) -> list[tuple[Path, xr.Dataset]]:
    """The knock-outs and the patches of one run: of a file by whatever name, and the other by its
    usual name in the same folder; each with its file.

    Args:
        kind: of the file, knock_outs.nc or patches.nc.
        file: of one of them.

    Raises:
        MissingFile: if one is not there.
        InvalidValue: for files that are damaged, or of different runs.
    """
    names = ("knock_outs.nc", "patches.nc")
    paths = [file if name == kind else file.with_name(name) for name in names]
    found = [(path, _read_as(path, name)) for path, name in zip(paths, names, strict=True)]
    layers = [one.layer.values.tolist() for _, one in found]
    steps = [one.attrs.get("steps") for _, one in found]
    made = [made_with(path).get("command") for path in paths]
    differ = [
        f"{len(layers[0])} and {len(layers[1])} layers, {steps[0]} and {steps[1]} steps"
        if layers[0] != layers[1] or steps[0] != steps[1]
        else "",
        # the later of two commands was interrupted
        f"one is by {made[0]!r}, the other by {made[1]!r}"
        if None not in made and made[0] != made[1]
        else "",
    ]
    if any(differ):
        raise InvalidValue(
            f"{str(paths[0])!r} and {str(paths[1])!r} are of different experiments: "
            f"{'; '.join(filter(None, differ))}; expected those of one run."
        )
    return found


def _read_as(path: Path, kind: str) -> xr.Dataset:
    """A stored result that must be of one kind, whatever its name."""
    found, results = read(path)
    if found != kind:
        raise InvalidValue(f"{str(path)!r} holds what {found} does; expected what {kind} does.")
    return results
