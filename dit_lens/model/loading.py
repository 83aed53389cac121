"""`dit_lens.load`: from a name, a folder or a hub id to a hooked model."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import InvalidType, InvalidValue, MissingFile
from ..families import family_of
from ..families.base import Family
from ..families.config import Size
from .hooked import HookedDiT
from .saved import (
    check_config,
    check_part,
    check_pipeline,
    check_weights,
    has_weights,
    named_class,
    read_json,
    skeleton,
)
from .trajectories import checked_place

BUNDLED = Path(__file__).parent.parent / "bundled"


def load(
    model: Any,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    size: Size | None = None,
    trajectories: str | Path | None = None,
) -> HookedDiT:
    """Open a model: a bundled one by name, a folder, a hub id, or an object.

    A folder is either a saved pipeline (`model_index.json`) or a saved transformer (`config.json`),
    which may have `scheduler/` and `vae/` inside. Weights are safetensors; a pickle is not opened.
    Their names and shapes must be those that the configuration asks for.

    Args:
        model: "digits", a folder, "owner/name", or what is a pipeline or transformer already.
        dtype: of the weights, such as torch.float16 or "float16".
        device: where they go, such as "cpu" or "cuda".
        size: (height, width) of the latents, if not the model's own.
        trajectories: where runs keep theirs: by default on the device; "cpu", or a folder for
            temporary files, if they do not fit there.

    Raises:
        FileNotFoundError: if there is no such bundled model or folder.
        ValueError: for damaged, missing, unexpected, misshapen or pickled weights, a configuration
            with numbers out of bounds, and a device that is not there.
        TypeError: if the model is no DiT that dit_lens knows, or the dtype none of floating point.

    >>> import dit_lens
    >>> dit_lens.load("digits").cfg.n_layers
    28
    """
    if not isinstance(model, (str, Path)):
        return HookedDiT(model, size=size, trajectories=trajectories)
    place = checked_place(trajectories)  # before gigabytes of weights are read
    dtype, device = _dtype(dtype), usable_device(device)
    _check_computing(dtype, device)
    folder = _folder_of(model)
    if str(model) and _is_folder(folder):
        return _load_folder(folder, dtype, device, size, place)
    if _is_hub_id(model):
        return _load_folder(_downloaded(str(model)), dtype, device, size, place)
    bundled = _bundled()
    near = difflib.get_close_matches(str(model), bundled, n=1, cutoff=0.4)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"bundled models: {', '.join(map(repr, bundled)) or 'none'}."
    )
    raise MissingFile(
        f"{str(model)!r} is neither a bundled model nor a folder nor a hub id such as "
        f"'owner/name'; {hint}"
    )


def _bundled() -> list[str]:
    return sorted(p.name for p in BUNDLED.iterdir() if p.is_dir()) if BUNDLED.exists() else []


def _folder_of(model: str | Path) -> Path:
    """Where a bundled model lies, or the folder that was named, which may not be there."""
    if isinstance(model, str) and model.endswith("/") and _is_folder(Path(model)):
        return Path(model)
    name = str(model).rstrip("/")
    return BUNDLED / name if name in _bundled() else Path(model)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for any
        return False


def _dtype(dtype: Any) -> torch.dtype:
    """A dtype of floating point, given as itself or by its name."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidType(
            f"dtype={dtype!r} is none that weights can have; expected one of floating point, such "
            "as torch.float32, torch.bfloat16 or 'float16'."
        )
    return found


def usable_device(device: Any) -> torch.device:
    """A device that is there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValue(
            f"device={device!r:.60} can't be used ({reason}); expected 'cpu', or one that is here, "
            "such as 'cuda'."
        ) from None


def _check_computing(dtype: torch.dtype, device: torch.device) -> None:
    """Raise InvalidValue for a dtype that the device can't compute in: seen by trying."""
    try:
        x = torch.ones(2, 2, device=device, dtype=dtype)
        torch.nn.functional.layer_norm(x @ x, (2,))
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValue(
            f"The device '{device}' can't compute in {dtype} ({reason}); expected torch.float32, "
            "or another that it has."
        ) from None


def _downloaded(name: str) -> Path:
    """The folder into which the hub's client puts a pipeline; nothing of it is built yet."""
    return Path(
        _tried(name, "a pipeline", diffusers.DiffusionPipeline.download, name, use_safetensors=True)
    )


def _load_folder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    size: Size | None,
    trajectories: str | None,
) -> HookedDiT:
    if (folder / "model_index.json").exists():
        _refuse_pickles(folder)
        check_pipeline(folder)
        texts = _text_parts(folder, dtype)
        pipe = _weights(diffusers.DiffusionPipeline, folder, dtype=dtype, **texts)
        _refuse_not_finite(getattr(pipe, "transformer", None), folder)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        return HookedDiT(pipe.to(device), size=size, trajectories=trajectories)
    if not (folder / "config.json").exists():
        inside = folder / "transformer"
        near = f"; did you mean {str(inside)!r}?" if (inside / "config.json").exists() else "."
        raise MissingFile(
            f"{str(folder)!r} has neither model_index.json (a pipeline) nor config.json (a "
            f"transformer, with scheduler/ inside){near}"
        )
    # every part is looked at before any is built: a wrong scheduler costs no gigabytes of weights
    classes = {
        "": _checked(folder, "config.json", diffusers.ModelMixin),
        "scheduler": _checked(
            folder / "scheduler", "scheduler_config.json", diffusers.SchedulerMixin
        ),
        "vae": _checked(folder / "vae", "config.json", diffusers.ModelMixin),
    }
    made: dict[str, Any] = {
        name: cls and _weights(cls, folder / name, dtype=dtype) for name, cls in classes.items()
    }
    _refuse_not_finite(made[""], folder)
    return HookedDiT(
        made[""].to(device).eval(),
        scheduler=made["scheduler"],
        vae=made["vae"] and made["vae"].to(device),
        size=size,
        trajectories=trajectories,
    )


def _refuse_not_finite(module: Any, folder: Path) -> None:
    """Refuse weights with which everything that is computed would be NaN."""
    for name, weight in module.named_parameters() if module is not None else ():
        if not bool(weight.isfinite().all()):
            raise InvalidValue(
                f"The weights in {str(folder)!r} are damaged: {name} has values that are not "
                "finite."
            )


def _is_hub_id(model: str | Path) -> bool:
    return isinstance(model, str) and bool(re.fullmatch(r"[^./~][^/]*/[^/]+", model))


def _text_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a pipeline that are models of transformers, which fills what is missing with
    random weights and only warns.
    """
    parts = {}
    for part, entry in read_json(folder / "model_index.json").items():
        if part.startswith("_") or not isinstance(entry, list) or entry[0] != "transformers":
            continue
        import transformers

        cls = getattr(transformers, entry[1], None)
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
            continue  # a tokenizer
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        where = str(folder / part)
        made, info = _tried(where, cls.__name__, cls.from_pretrained, where, dtype=dtype, **options)
        odd = [*info["missing_keys"], *(str(each[0]) for each in info["mismatched_keys"])]
        if odd:
            more = f" and {len(odd) - 3} more" if odd[3:] else ""
            raise InvalidValue(
                f"The weights in {where!r} are not those of the {cls.__name__} that its "
                f"config.json describes (missing or misshapen: {', '.join(sorted(odd)[:3])}{more})."
            )
        parts[part] = made.eval()
    return parts


def _checked(folder: Path, config: str, base: type) -> type | None:
    """The class that a part's config names, with all that is on disk checked; None where there is
    no such folder.
    """
    if not (folder / config).exists():
        return None
    cls = named_class(read_json(folder / config), base, repr(str(folder / config)))
    if base is not diffusers.SchedulerMixin:
        _refuse_pickles(folder)
    check_part(folder, cls)
    return cls


def _refuse_pickles(folder: Path) -> None:
    pickles = [p for p in folder.rglob("*.bin") if not p.with_suffix(".safetensors").exists()]
    if pickles:
        raise InvalidValue(
            f"{str(pickles[0])!r} is a pickle, which can run code when opened; save the model as "
            "safetensors."
        )


def _weights(cls: Any, folder: Path, **kwargs: Any) -> Any:
    if issubclass(cls, diffusers.SchedulerMixin):
        kwargs = {}  # it has no weights
    else:
        kwargs |= {
            "use_safetensors": True,
            "low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None,
        }
    return _tried(
        folder, cls.__name__, cls.from_pretrained, str(folder), local_files_only=True, **kwargs
    )


def _tried(where: str | Path, what: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return load(*args, **kwargs)
    except Exception as error:  # diffusers and safetensors raise many kinds for damaged files
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InvalidValue(
            f"The model in {str(where)!r} can't be loaded as {what}: {first}"
        ) from error


def load_skeleton(model: str | Path) -> tuple[Family, Any]:
    """A model's family and its modules without weights (on torch's meta device): sizes and names,
    for any size of model.

    Raises like `load`.
    """
    folder = _folder_of(model)
    if (folder / "model_index.json").exists():
        folder = folder / "transformer"
    if (folder / "config.json").exists():
        where, config = str(folder / "config.json"), read_json(folder / "config.json")
    elif _is_folder(folder) or not _is_hub_id(model):
        raise MissingFile(
            f"There is no model at {str(model)!r}; expected a bundled name, a folder with "
            "config.json, or a hub id."
        )
    else:
        # the config's own class is not known yet; every model class reads any model's config.json
        reader = diffusers.DiTTransformer2DModel
        read = reader.load_config
        where = str(model)
        config = _tried(where, "a transformer", read, where, subfolder="transformer")

    where = repr(where)
    cls = named_class(config, diffusers.ModelMixin, where)
    check_config(config, where)
    made = skeleton(cls, config, where)
    if has_weights(folder):
        check_weights(cls, folder)
    return family_of(made), made
