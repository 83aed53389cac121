"""`dit_lens.load`: from a name, a folder or a hub id to a hooked model."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import InvalidValue, MissingFile
from ..families import family_of
from ..families.base import Family
from ..families.config import Size
from .hooked import HookedDiT

BUNDLED = Path(__file__).parent.parent / "bundled"


def load(
    model: Any,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    size: Size | None = None,
) -> HookedDiT:
    """Open a model: a bundled one by name, a folder, a hub id, or an object.

    A folder is either a saved pipeline (`model_index.json`) or a saved transformer (`config.json`),
    which may have `scheduler/` and `vae/` inside. Weights are safetensors; a pickle is not opened.

    Args:
        model: "digits", a folder, "owner/name", or what is a pipeline or transformer already.
        dtype: of the weights.
        device: where they go.
        size: (height, width) of the latents, if not the model's own.

    Raises:
        FileNotFoundError: if there is no such bundled model or folder.
        ValueError: for damaged or pickled weights.
        TypeError: if the model is no DiT that dit_lens knows.

    >>> import dit_lens
    >>> dit_lens.load("digits").cfg.n_layers
    28
    """
    if not isinstance(model, (str, Path)):
        return HookedDiT(model, size=size)
    folder = _folder_of(model)
    if folder.is_dir():
        return _load_folder(folder, dtype, device, size)
    if _is_hub_id(model):
        pipe = _from_pretrained(
            diffusers.DiffusionPipeline, model, dtype=dtype, use_safetensors=True
        )
        return HookedDiT(pipe.to(device), size=size)
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
    return BUNDLED / model if model in _bundled() else Path(model)


def _load_folder(
    folder: Path, dtype: torch.dtype, device: str | torch.device, size: Size | None
) -> HookedDiT:
    if (folder / "model_index.json").exists():
        pipe = _weights(diffusers.DiffusionPipeline, folder, dtype=dtype)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        return HookedDiT(pipe.to(device), size=size)
    if not (folder / "config.json").exists():
        raise MissingFile(
            f"{str(folder)!r} has neither model_index.json (a pipeline) nor config.json (a "
            "transformer)."
        )
    transformer = _part(folder, "config.json", dtype)
    scheduler = _part(folder / "scheduler", "scheduler_config.json")
    vae = _part(folder / "vae", "config.json", dtype)
    return HookedDiT(
        transformer.to(device).eval(),
        scheduler=scheduler,
        vae=vae.to(device) if vae is not None else None,
        size=size,
    )


def _is_hub_id(model: str | Path) -> bool:
    return isinstance(model, str) and model.count("/") == 1 and model[0] not in "./~"


def _part(folder: Path, config: str, dtype: torch.dtype | None = None) -> Any:
    """A pipeline's part from its own folder, by the class that its config names; None where there
    is no such folder.
    """
    if not (folder / config).exists():
        return None
    try:
        cls = getattr(diffusers, _read_json(folder / config)["_class_name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidValue(
            f"{str(folder / config)!r} does not name a diffusers class ({error!r})."
        ) from None
    return _weights(cls, folder, **({} if dtype is None else {"dtype": dtype}))


def _weights(cls: Any, folder: Path, **kwargs: Any) -> Any:
    if not issubclass(cls, diffusers.SchedulerMixin):
        pickles = [p for p in folder.rglob("*.bin") if not p.with_suffix(".safetensors").exists()]
        if pickles:
            raise InvalidValue(
                f"{str(pickles[0])!r} is a pickle, which can run code when opened; save the model "
                "as safetensors."
            )
        kwargs |= {
            "use_safetensors": True,
            "low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None,
        }
    return _from_pretrained(cls, folder, local_files_only=True, **kwargs)


def _from_pretrained(cls: Any, where: str | Path, **kwargs: Any) -> Any:
    try:
        return cls.from_pretrained(str(where), **kwargs)
    except Exception as error:  # diffusers and safetensors raise many kinds for damaged files
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InvalidValue(
            f"The model in {str(where)!r} can't be loaded as {cls.__name__}: {first}"
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
        where, config = str(folder / "config.json"), _read_json(folder / "config.json")
    elif folder.is_dir() or not _is_hub_id(model):
        raise MissingFile(
            f"There is no model at {str(model)!r}; expected a bundled name, a folder with "
            "config.json, or a hub id."
        )
    else:
        # the config's own class is not known yet; every model class reads any model's config.json
        reader = diffusers.DiTTransformer2DModel
        where, config = str(model), reader.load_config(str(model), subfolder="transformer")

    # Build the modules without memory for their weights.
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "from_config"):
        raise InvalidValue(f"{where!r} names the class {name!r}, which diffusers does not have.")
    try:
        with torch.device("meta"):
            skeleton = cls.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidValue(f"{where!r} is not a configuration of {name}: {error}") from error
    return family_of(skeleton), skeleton


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InvalidValue(f"{str(path)!r} is not JSON: {error}") from None
