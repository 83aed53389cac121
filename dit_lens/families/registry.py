"""Which family opens which class of transformers.

The registry is keyed by the diffusers class name, so that a family's module is imported only when
such a model is met. A family can come from any package, by the entry-point group
`dit_lens.families`: `YourTransformer2DModel = "your_package.your_module"`, a module that calls
`register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from weakref import WeakKeyDictionary

from torch import nn

from .. import arguments
from ..errors import InvalidType, InvalidValue
from .adapter import Adapter
from .base import Family
from .layouts import layout_of, nearly
from .own import OwnFamily
from .readonly import read_only

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
_of_one: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()
"""Families of one transformer, which know it by its modules."""


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


def describe(
    transformer: nn.Module,
    blocks: str | Sequence[str] | None,
    parts: Mapping[str, str] | None,
    adapter: Adapter | None,
) -> Family:
    """Open a transformer from now on as its user describes it.

    Args:
        transformer: the transformer.
        blocks: paths of its blocks; None for one whose layout is known.
        parts: paths within a block, by name.
        adapter: how it is called.

    Returns:
        The family of this one transformer.

    Raises:
        InvalidType: without blocks, for a transformer of unknown layout.
        InvalidValue: for paths that lead nowhere, or an adapter that is not this model's.
    """
    arguments.instance("transformer", transformer, nn.Module, "a torch module")
    if adapter is not None:
        arguments.instance("adapter", adapter, Adapter, "a dit_lens.Adapter")
    if blocks is None:
        found: Family | None = layout_of(transformer, adapter)
        if found is None or parts is not None:
            what = "adapter" if parts is None else "parts"
            raise InvalidType(
                f"{what}= also needs blocks=, the path of the blocks of "
                f"{type(transformer).__name__}{_lists(transformer)}."
            )
    else:
        given = [blocks] if isinstance(blocks, str) else blocks
        paths = arguments.listed("blocks", given, "a path of modules, or a list of them", fewest=0)
        paths = [arguments.text(f"blocks[{i}]", path) for i, path in enumerate(paths)]
        if parts is not None:
            arguments.instance("parts", parts, Mapping, "a dict of paths by name")
            for name, path in parts.items():
                arguments.text("parts: a name", name)
                arguments.text(f"parts[{name!r}]", path)
        found = OwnFamily(transformer, paths, parts, adapter)
    found.described = blocks, parts, adapter
    _of_one[transformer] = found
    return found


def family_of(transformer: nn.Module) -> Family:
    """The family that opens this module: as its user described it; by the names of its class and
    base classes; by the layout of its modules; for other diffusers transformers a read-only one.

    Args:
        transformer: the transformer.

    Raises:
        InvalidType: if there is none, with the ways on.

    >>> family_of(family_named("PixArtTransformer2DModel").small(0)[0]).model_class
    'PixArtTransformer2DModel'
    """
    arguments.instance("transformer", transformer, nn.Module, "a diffusers transformer")
    if transformer in _of_one:
        return _of_one[transformer]
    for cls in type(transformer).__mro__:
        if family := family_named(cls.__name__):
            return family
    unknown = layout_of(transformer) or read_only(transformer)
    if unknown is not None:
        _of_one[transformer] = unknown
        return unknown
    if any(cls.__name__ == "PeftModel" for cls in type(transformer).__mro__):
        raise InvalidType(
            f"This is a {type(transformer).__name__}, a model in peft's wrapping; expected the "
            "model inside, with its adapters in it: open its .base_model.model."
        )
    known = ", ".join(sorted({*modules(), *_families}))
    raise InvalidType(
        f"{type(transformer).__name__} is not a Diffusion Transformer that dit_lens can open by "
        f"itself; it knows {known}, and the layouts of the original DiT, SiT and U-ViT."
        f"{nearly(transformer)} Three ways on (docs: Your own model): "
        "HookedDiT(module, blocks='path.of.blocks')"
        f"{_lists(transformer)}; the same with adapter=dit_lens.Adapter(...), to sample and "
        "measure; a family of your own."
    )


def _lists(transformer: nn.Module) -> str:
    """Where blocks may be, in words."""
    lists = [n for n, m in transformer.named_modules() if isinstance(m, nn.ModuleList) and n]
    return f" (its lists of modules: {', '.join(map(repr, lists[:4]))})" if lists else ""
