"""Families of Diffusion Transformers: the only place that knows how a block computes.

A family teaches dit_lens one model class. `families/dit.py` is the first and the pattern; what a
family provides is `Family` in `families/base.py`. The registry is keyed by the diffusers class
name, so that a family's module is imported only when such a model is met. A family can come from
any package, by the entry-point group `dit_lens.families`: `YourTransformer2DModel =
"your_package.your_module"`, a module that calls `register`. docs/families.md is the guide.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from torch import nn

from ..errors import InvalidType, InvalidValue
from .base import Family

_OURS = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "DiTTransformer2DModel": "dit",
    "FluxTransformer2DModel": "flux",
    "HunyuanDiT2DModel": "hunyuan",
    "Lumina2Transformer2DModel": "lumina2",
    "PixArtTransformer2DModel": "pixart",
    "QwenImageTransformer2DModel": "qwenimage",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "zimage",
}
_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known. Its `model_class` is the class name of the transformers it handles.

    Raises:
        ValueError: if another family has that class already.
    """
    if family.model_class in _FAMILIES:
        raise InvalidValue(
            f"There is a family for {family.model_class!r} already: "
            f"{_FAMILIES[family.model_class]!r}."
        )
    _FAMILIES[family.model_class] = family
    return family


@cache
def modules() -> dict[str, str]:
    """The module of each family that can be had, by model class: ours, and those of installed
    packages.

    Raises:
        ValueError: if two of them are for one class.
    """
    found = {name: f"{__name__}.{module}" for name, module in _OURS.items()}
    for entry in entry_points(group="dit_lens.families"):
        if entry.name in found:
            raise InvalidValue(
                f"There is a family for {entry.name!r} already, {found[entry.name]!r}; the package "
                "that registers "
                f"{entry.value!r} for it must be removed."
            )
        found[entry.name] = entry.value
    return found


def family_named(model_class: str) -> Family | None:
    """The family for a class name, or None."""
    if model_class not in _FAMILIES and model_class in modules():
        importlib.import_module(modules()[model_class])
    return _FAMILIES.get(model_class)


def family_of(transformer: nn.Module) -> Family:
    """The family that handles this module, by the names of its class and base classes; for other
    diffusers transformers a read-only one.

    Raises:
        TypeError: if there is none (a U-Net, say).
    """
    for cls in type(transformer).__mro__:
        if family := family_named(cls.__name__):
            return family
    from .readonly import read_only

    if (unknown := read_only(transformer)) is not None:
        return unknown
    known = ", ".join(sorted({*modules(), *_FAMILIES}))
    raise InvalidType(
        f"{type(transformer).__name__} is not a Diffusion Transformer that dit_lens can open; it "
        f"knows {known}."
    )
