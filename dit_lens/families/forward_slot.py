"""Where a module's own forward lies, and putting another one in its place.

diffusers' hooks and accelerate's both sit on `module.forward` and call what was there before. So
that they stay in force, ours goes to the bottom of the pile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import InvalidState, InvalidValue

Slot = tuple[dict[str, Any], str]
"""A dictionary and the key in it that holds a forward."""


def places(module: nn.Module) -> Iterator[Slot]:
    """Where a module's own forward may lie: at the bottom of diffusers' hooks, under accelerate's,
    or on the instance.
    """
    registry = module.__dict__.get("_diffusers_hook")
    for ref in registry._fn_refs if registry is not None else ():
        for slot in ("original_forward", "forward"):
            if ref.__dict__[slot] is not None:
                yield ref.__dict__, slot
                break
    if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__:
        yield module.__dict__, "_old_forward"
    yield module.__dict__, "forward"


Place = tuple[dict[str, Any], str, nn.Module, str]
"""The children of a module, the name of one of them, that child, and its path."""


def paths_to(root: nn.Module, modules: Sequence[nn.Module]) -> list[Place]:
    """Where these modules stand, and all that they stand in.

    Args:
        root: what they are parts of.
        modules: some of its parts.
    """
    wanted, found = set(map(id, modules)), dict[str, Place]()
    for path, module in root.named_modules(remove_duplicate=False):
        if id(module) not in wanted or not path:
            continue
        parent, parts = root, path.split(".")
        for i, name in enumerate(parts):
            children = vars(parent)["_modules"]
            parent = children[name]
            at = ".".join(parts[: i + 1])
            found[at] = children, name, parent, at
    return list(found.values())


def slot(module: nn.Module) -> Slot:
    """The place where the module's own forward lies now."""
    return next(places(module))


def find(module: nn.Module, forward: Any) -> Slot | None:
    """The place where `forward` lies now, if it lies anywhere."""
    for holder, key in places(module):
        if holder.get(key) is forward:
            return holder, key
    return None


def held(module: nn.Module, forward: Any) -> Slot:
    """The place where `forward` lies now.

    Raises:
        RuntimeError: if somebody has replaced it.
    """
    place = find(module, forward)
    if place is not None:
        return place
    theirs = module.__dict__.get("forward")
    raise InvalidState(
        f"The forward of {type(module).__name__} was replaced by {theirs!r} after dit_lens; "
        "undo that first, then call remove() again."
    )


def put_back(module: nn.Module, place: Slot, original: Any) -> None:
    """Give a module back what was there before."""
    holder, key = place
    if original is None and holder is module.__dict__ and key == "forward":
        del holder[key]
    else:  # accelerate or a diffusers hook sits on the module's forward and calls what is here
        holder[key] = original or type(module).forward.__get__(module)


def refuse_replaced(module: nn.Module) -> None:
    """Raise RuntimeError where another tool has put a forward of its own on the instance."""
    holder, key = slot(module)
    found = holder.get(key)
    on_instance = holder is module.__dict__ and key == "forward"
    own = getattr(found, "__func__", None) is type(module).forward
    if found is not None and on_instance and not own:
        raise InvalidState(
            f"The forward of {type(module).__name__} was already replaced on the instance by "
            f"{found!r}; undo that first (or wrap the model before it)."
        )


def refuse_shared(root: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Raise InvalidValue where two of these modules are one, which could hold one forward only.

    Args:
        root: what they are parts of.
        modules: some of its parts, one for each forward that is put in.
    """
    seen = set[nn.Module]()
    for module in modules:
        if module in seen:
            at = [path for path, m in root.named_modules(remove_duplicate=False) if m is module]
            raise InvalidValue(
                f"{' and '.join(map(repr, at))} are one module ({type(module).__name__}), whose "
                "hook points can't be told apart; expected a copy of it in each place: "
                "copy.deepcopy(module)."
            )
        seen.add(module)
