"""Which family opens which class of transformers.

The registry is keyed by the diffusers class name, so that a family's module is imported only when
such a model is met. A family can come from any package, by the entry-point group
`dit_lens.families`: `YourTransformer2DModel = "your_package.your_module"`, a module that calls
`register`.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from weakref import WeakKeyDictionary

from torch import nn

from .. import arguments
from ..errors import InvalidType, InvalidValue
from .base import Family
from .readonly import ReadOnlyFamily, read_only

OURS = {
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "QwenImageTransformer2DModel": "qwenimage",
    "SanaTransformer2DModel": "sana",
    "HunyuanDiT2DModel": "hunyuan",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "zimage",
    "CogVideoXTransformer3DModel": "cogvideox",
    "WanTransformer3DModel": "wan",
}
"""The modules of this package's own families, by model class, in the order of the docs."""

_families: dict[str, Family] = {}
_read_only: WeakKeyDictionary[nn.Module, ReadOnlyFamily] = WeakKeyDictionary()


def register(family: Family) -> Family:
    """Make a family known.

    Args:
        family: an instance; its `model_class` is the class name of the transformers it opens.

    Returns:
        The family.

    Raises:
        InvalidValue: if another family has that class already.

        register(MyFamily())
    """
    if family.model_class in _families:
        raise InvalidValue(
            f"There is a family for {family.model_class!r} already: "
            f"{_families[family.model_class]!r}."
        )
    _families[family.model_class] = family
    return family


@cache
def modules() -> dict[str, str]:
    """The module of each family that can be had, by model class: ours, and those of installed
    packages.

    Raises:
        InvalidValue: if two of them are for one class.

    >>> modules()["DiTTransformer2DModel"]
    'dit_lens.families.dit'
    """
    found = {name: f"{__package__}.{module}" for name, module in OURS.items()}
    for entry in entry_points(group="dit_lens.families"):
        if entry.name in found:
            raise InvalidValue(
                f"There is a family for {entry.name!r} already, {found[entry.name]!r}; the package "
                f"that registers {entry.value!r} for it must be removed."
            )
        found[entry.name] = entry.value
    return found


def family_named(model_class: str) -> Family | None:
    """The family for a class name, or None.

    Args:
        model_class: the name of a transformer's class.

    >>> family_named("DiTTransformer2DModel").batch_order
    ('cond', 'uncond')
    """
    arguments.text("model_class", model_class)
    if model_class not in _families and model_class in modules():
        importlib.import_module(modules()[model_class])
    return _families.get(model_class)


def family_of(transformer: nn.Module) -> Family:
    """The family that opens this module, by the names of its class and base classes; for other
    diffusers transformers a read-only one, which remembers what was seen of this one.

    Args:
        transformer: the transformer.

    Raises:
        InvalidType: if there is none (a U-Net, say).

    >>> family_of(family_named("PixArtTransformer2DModel").small(0)[0]).model_class
    'PixArtTransformer2DModel'
    """
    arguments.instance("transformer", transformer, nn.Module, "a diffusers transformer")
    for cls in type(transformer).__mro__:
        if family := family_named(cls.__name__):
            return family
    unknown = _read_only.get(transformer) or read_only(transformer)
    if unknown is not None:
        _read_only[transformer] = unknown
        return unknown
    known = ", ".join(sorted({*modules(), *_families}))
    raise InvalidType(
        f"{type(transformer).__name__} is not a Diffusion Transformer that dit_lens can open; it "
        f"knows {known}."
    )
