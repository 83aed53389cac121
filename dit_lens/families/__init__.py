"""Families of Diffusion Transformers: the only place that knows how a block computes.

A family teaches dit_lens one model class. `families/dit.py` is the first and the pattern for the next; what it must
provide is `Family` in `families/base.py`. The registry is keyed by the diffusers class name, so that a family's
module is imported only when such a model is met.
"""

from __future__ import annotations

import importlib

from torch import nn

from .base import Family

_MODULES = {"DiTTransformer2DModel": "dit_lens.families.dit"}
_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known. Its `model_class` is the class name of the transformers it handles.

    Raises:
        ValueError: if another family has that class already.
    """
    if family.model_class in _FAMILIES:
        raise ValueError(f"There is a family for {family.model_class!r} already: {_FAMILIES[family.model_class]!r}.")
    _FAMILIES[family.model_class] = family
    return family


def family_of(transformer: nn.Module) -> Family:
    """The family that handles this module, by the names of its class and base classes.

    Raises:
        TypeError: if there is none (a U-Net, say).
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _MODULES and cls.__name__ not in _FAMILIES:
            importlib.import_module(_MODULES[cls.__name__])
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    known = ", ".join(sorted({*_MODULES, *_FAMILIES}))
    raise TypeError(
        f"{type(transformer).__name__} is not a Diffusion Transformer that dit_lens can open; it knows {known}."
    )
