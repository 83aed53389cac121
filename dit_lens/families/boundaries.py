"""What can be said of a diffusers transformer that nobody has described: which of its modules are
blocks, attention, MLP, and where a block's stream is.

By what diffusers has registered of a block's class; else by the names under which it registers
modules, and by the source of the block, which shows how often and when it calls each. What is not
clear is left out.
"""

from __future__ import annotations

import inspect
import re
import tokenize
from collections.abc import Sequence
from typing import Any

from torch import nn

Argument = tuple[str, int]
PARTS = {
    "attn.": ("attn", "attn1", "self_attn", "attention", "self_attention"),
    "mlp.": ("ff", "ffn", "mlp", "img_mlp", "feed_forward"),
}
SIDE_LISTS = re.compile(
    "text|txt|context|caption|refiner|audio|control|vace|face|motion|adapter|head"
)
"""Lists of blocks that do not carry the image's stream: refiners, control branches, other
modalities.
"""
OUT_PROJECTION = re.compile("to_out|out_proj|out_layer|o_proj|proj|.*attn_proj")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
JOINS_TOKENS = re.compile(r"\b(?:cat|concat)\(\s*[\[(][^\])]*[\])],\s*(?:dim=|axis=)?1\b")


def known_of(block: nn.Module) -> Any:
    """What diffusers itself has registered of a block's class, its `TransformerBlockMetadata`:
    which argument and which returned value is the image's stream. None where it says nothing.

    Args:
        block: the block.
    """
    # imported here, for it costs seconds
    from diffusers.hooks._helpers import TransformerBlockRegistry  # noqa: PLC2701 (its only place)

    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def main_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of all lists directly on the transformer that carry its stream, in the order of
    their registration.

    Args:
        transformer: the transformer.
    """

    def attends(module: nn.Module) -> bool:
        return any("attn" in name or "attention" in name for name, _ in module.named_modules())

    lists = [
        child
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList) and not SIDE_LISTS.search(name)
    ]
    return [block for blocks in lists if all(map(attends, blocks)) for block in blocks]


def argument_of(module: nn.Module) -> Argument:
    """Name and position of the argument in which a module is given its stream: the one that
    diffusers has registered for a block, else `hidden_states`, else the first.

    Args:
        module: a block, or a part of one.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    known = known_of(module)
    wanted = "hidden_states" if known is None else known.hidden_states_argument_name
    name = wanted if wanted in names else names[0]
    return name, names.index(name)


def given(argument: Argument, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An argument by name, or else by position; None where it is not given.

    Args:
        argument: its name and position.
        args: the positional arguments of a call.
        kwargs: the arguments by name.
    """
    name, position = argument
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None


def registered_output(block: nn.Module, returned: Any) -> Any:
    """Of several values that a block returned, the one that diffusers has registered as the image's
    stream; what was returned where diffusers says nothing, or it is one value.

    Args:
        block: the block.
        returned: what it returned.
    """
    known = known_of(block) if isinstance(returned, (tuple, list)) else None
    index = None if known is None else known.return_hidden_states_index
    return returned if index is None or index >= len(returned) else returned[index]


def parts(block: nn.Module) -> list[tuple[str, str]]:
    """A block's attention and MLP, as (prefix of the hook names, child's name), in the order in
    which the block calls them.

    Only those are named of which the block's source shows that they are called once, before text
    and image are joined in one sequence, and which are a whole attention with its output
    projection, or a plain MLP.

    Args:
        block: the block.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(block).forward))
    # without its source nothing of it is clear
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return []
    joined, found = JOINS_TOKENS.search(source), []
    for prefix, names in PARTS.items():
        called = [
            n
            for n in names
            if isinstance(getattr(block, n, None), nn.Module) and f"self.{n}(" in source
        ]
        if (
            len(called) == 1
            and source.count(f"self.{called[0]}(") == 1
            and _whole(prefix, getattr(block, called[0]))
        ):
            at = source.index(f"self.{called[0]}(")
            if joined is None or at < joined.start():
                found.append((at, prefix, called[0]))
    return [(prefix, name) for _, prefix, name in sorted(found)]


def _whole(prefix: str, module: nn.Module) -> bool:
    """Whether a part is what its name says: no attention with the MLP inside or the output
    projection elsewhere, no convolutions.
    """
    if prefix == "attn.":
        out = [child for name, child in module.named_children() if OUT_PROJECTION.fullmatch(name)]
        projects = any(isinstance(m, nn.Linear) for child in out for m in child.modules())
        return projects and not any("mlp" in name for name, _ in module.named_modules())
    return not any(isinstance(m, CONVOLUTIONS) for m in module.modules())
