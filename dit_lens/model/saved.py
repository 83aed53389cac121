"""Saved models, looked at before anything is built: what a configuration may say, and whether the
weights are those of the model that it describes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, DummyObject
from safetensors import SafetensorError, safe_open

from ..errors import InvalidValue, MissingFile

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline's index may name, besides those of diffusers' own pipelines."""

MOST = {
    "layers": 256,
    "timesteps": 100_000,
    "side": 2_048,
    "number": 1 << 24,
    "embedding": 1 << 30,
}
"""Bounds: of layers, training steps, the side of a sample, any whole number, and the numbers in a
table of positions."""

SIDES = ("sample_size", "sample_height", "sample_width", "sample_frames", "pos_embed_max_size")
LAYERS = re.compile(r"(^|_)(layers|depth|blocks)$")
COUNTS = re.compile(r"(^num_|_(dim|channels|heads|layers)$)")
"""Names of what is counted in whole numbers."""
POSITIVE = (*SIDES, "patch_size", "num_attention_heads", "attention_head_dim", "in_channels")

Shapes = dict[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """A configuration.

    Args:
        path: of the file.

    Raises:
        InvalidValue: if it is no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidValue(f"{str(path)!r} holds {found!r:.60}; expected a configuration, a dict.")
    return found


def named_class(config: Mapping[str, Any], base: type, where: str) -> Any:
    """The class that a configuration names: one of diffusers', of the kind that belongs there.

    Args:
        config: the configuration.
        base: what it has to be derived from.
        where: the file, for the error.

    Raises:
        InvalidValue: for anything else.
        MissingFile: where diffusers needs a package for it that is not installed.
    """
    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(cls, DummyObject):
        absent = [each for each in cls._backends if find_spec(each) is None]
        raise MissingFile(
            f"{where} is of {name}, which needs {' and '.join(absent or cls._backends)}, "
            "not installed or too old; "
            "pip install 'dit-lens[pipelines]'."
        )
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise InvalidValue(
            f"{where} does not name a diffusers class that fits: {name!r:.60}; expected a "
            f"{base.__name__}."
        )
    return cls


def check_config(config: Mapping[str, Any], where: str, layers: int = MOST["layers"]) -> None:
    """Refuse a configuration whose numbers would take minutes or all memory to build from.

    Args:
        config: of a model or a scheduler.
        where: the file, for the error.
        layers: as many layers as there may be.

    Raises:
        InvalidValue: for a number out of bounds, with what was expected.
    """
    for name, value in config.items():
        numbers = list(_numbers(value))
        least = -MOST["number"]
        most = MOST["number"]
        if LAYERS.search(name):
            least, most = 0, layers
        elif name == "num_train_timesteps":
            least, most = 1, MOST["timesteps"]
        elif name in POSITIVE:
            least, most = 1, MOST["side" if name in SIDES else "number"]
        # -inf is diffusers' own default of lambda_min_clipped
        counted = name in POSITIVE or COUNTS.search(name)
        if counted and any(isinstance(n, float) for n in numbers):
            raise InvalidValue(f"{where} has {name}={value!r:.60}; expected whole numbers.")
        odd = [n for n in numbers if not least <= n <= most and n != -math.inf]
        if odd or len(numbers) > MOST["timesteps"]:
            shown = f"{odd[0]:.4g}" if odd and abs(odd[0]) < 1e300 else "a list or number too long"
            raise InvalidValue(
                f"{where} has {name}={shown}; expected numbers from {least} to {most}."
            )

    # tables of positions are computed as the model is built, also without memory for its weights
    def at(name: str) -> float:
        return max(_numbers(config.get(name)), default=1)

    side = max(map(at, SIDES)) / max(1, at("patch_size"))
    width = at("num_attention_heads") * at("attention_head_dim")
    if side**2 * width > MOST["embedding"]:
        raise InvalidValue(
            f"{where} asks for positions of {side:.0f} x {side:.0f} tokens of {width:.0f} numbers; "
            f"expected {MOST['embedding']} numbers or fewer."
        )


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value of a configuration; whole ones as they are."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _numbers(each)


def skeleton(cls: Any, config: Mapping[str, Any], where: str) -> Any:
    """The modules that a configuration describes, without memory for their weights (on torch's meta
    device).

    Args:
        cls: the model's class.
        config: its configuration.
        where: the file, for the error.

    Raises:
        InvalidValue: if it can't be built.
    """
    try:
        with torch.device("meta"):
            return cls.from_config(dict(config))
    except Exception as error:  # the constructors raise what they come across
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise InvalidValue(f"{where} is not a configuration of {cls.__name__}: {reason}") from error


def check_weights(cls: Any, folder: Path) -> None:
    """Refuse a saved model whose weights are not exactly those that its configuration asks for, by
    names and shapes; only headers are read.

    Args:
        cls: the model's class.
        folder: with config.json and safetensors.

    Raises:
        InvalidValue: with the missing, unexpected and misshapen tensors.
        MissingFile: if there are no weights.
    """
    config, where = read_json(folder / "config.json"), repr(str(folder / "config.json"))
    found = shapes(folder)
    check_config(config, where, most_layers(found))
    if "quantization_config" in config:  # their names and shapes are the quantizer's
        return
    model = skeleton(cls, config, where)
    model._fix_state_dict_keys_on_load(found)  # old names of attention, as diffusers loads them
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    unexpected = [
        name
        for name in found
        if name not in wanted and not any(re.search(p, name) for p in ignored)
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": unexpected,
        "misshapen": [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
    }
    texts = [
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for kind, names in problems.items()
        if names
    ]
    if texts:
        raise InvalidValue(
            f"The weights in {str(folder)!r} are not those of the {cls.__name__} that its "
            f"config.json describes ({'; '.join(texts)})."
        )


def most_layers(found: Mapping[str, Any]) -> int:
    """As many layers as a configuration may ask for, by the numbers in the names of its weights.

    Args:
        found: weights by name.
    """
    numbers = [int(n) for name in found for n in re.findall(r"\.(\d{1,6})(?=\.)", f".{name}")]
    return max([100, *(n + 1 for n in numbers)])


def has_weights(folder: Path) -> bool:
    """Whether there are weights at all: for names and sizes a configuration is enough.

    Args:
        folder: of a saved model.
    """
    files = (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME)
    return any((folder / name).is_file() for name in files)


def shapes(folder: Path) -> Shapes:
    """The shape of each tensor of a saved model, from the headers of its files.

    Args:
        folder: with safetensors: one file, or several and their index.

    Raises:
        InvalidValue: for a damaged file, or an index that does not fit its files.
        MissingFile: if there are no weights.
    """
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return _shards(folder)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise MissingFile(
            f"{str(folder)!r} has no weights; expected {SAFETENSORS_WEIGHTS_NAME}, or several "
            f"files and {SAFE_WEIGHTS_INDEX_NAME}."
        )
    return _header(path)


def _shards(folder: Path) -> Shapes:
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise InvalidValue(f"{str(path)!r} has no weight_map; expected tensors and their files.")
    found: Shapes = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidValue(
                f"{str(path)!r} names the file {name!r:.60}; expected a safetensors file beside it."
            )
        if not (folder / name).is_file():
            raise MissingFile(f"{str(path)!r} names {name!r}, which is not there.")
        own = _header(folder / name)
        odd = [t for t in own if index.get(t) != name] + [
            t for t, file in index.items() if file == name and t not in own
        ]
        if odd:
            raise InvalidValue(f"{str(path)!r} and {name!r} do not agree on where {odd[0]!r} is.")
        found |= own
    return found


def _header(path: Path) -> Shapes:
    try:
        with safe_open(str(path), "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise InvalidValue(
            f"{str(path)!r} can't be loaded: it is not a whole safetensors file ({error})."
        ) from None


def check_pipeline(folder: Path) -> None:
    """Look at all parts of a saved pipeline, as `check_weights` and `check_config` do at one.

    Args:
        folder: with model_index.json.

    Raises:
        InvalidValue: for parts of other libraries, weights that do not fit, numbers out of bounds.
    """
    path = folder / "model_index.json"
    index, where = read_json(path), repr(str(path))
    named_class(index, diffusers.DiffusionPipeline, where)
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or Path(part).name != part:
            raise InvalidValue(f"{where} has {part!r:.60} = {entry!r:.60}; expected two names.")
        library, name = entry
        if library is None:
            continue
        known = library in LIBRARIES or (
            isinstance(library, str) and hasattr(diffusers.pipelines, library)
        )
        if not known or not isinstance(name, str):
            raise InvalidValue(
                f"{where} names {name!r:.60} of {library!r:.60} for {part!r:.60}; expected a class "
                "of diffusers or transformers."
            )
        check_part(folder / part, getattr(diffusers, name, None))


def check_part(folder: Path, cls: Any) -> None:
    """Look at one part of a pipeline; of what is no model or scheduler of diffusers nothing is
    known.

    Args:
        folder: of the part.
        cls: its class.
    """
    if not isinstance(cls, type) or not folder.is_dir():
        return
    if issubclass(cls, diffusers.SchedulerMixin):
        path = folder / "scheduler_config.json"
        check_config(read_json(path), repr(str(path)))
    elif issubclass(cls, diffusers.ModelMixin):
        check_weights(cls, folder)


__all__ = [
    "check_config",
    "check_part",
    "check_pipeline",
    "check_weights",
    "has_weights",
    "named_class",
    "read_json",
    "skeleton",
]
