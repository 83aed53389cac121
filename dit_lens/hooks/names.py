"""Hook names: how a user's words become hook points.

A name is TransformerLens's (`blocks.5.attn.hook_q`). Three things can stand for one or many of
them:

- a *key* names one: the full name, or TransformerLens's shorthand `("q", 5)`, `("normalized", 5,
  "ln1")`; layers count from the end when negative, as everywhere in Python;
- a *filter* chooses many, as `names_filter` does in TransformerLens: None (all), a name, a glob
  (`blocks.*.attn.hook_q`, or `attn.*` in every layer), a shorthand without layer (`"resid_post"`:
  every layer's), a list or tuple of these, or a callable on names.

A filter that matches nothing is an error here, with the nearest names: an empty cache that looks
like a result is worse.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence, Set
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple, TypeGuard

from ..arguments import is_whole, shown
from ..errors import DitLensError

ASIDE = ("text.", "cross_attn.", "attn2.")
"""Streams and attentions beside the main one, which a shorthand means only by name:
`"cross_attn.pattern"`.
"""

Key = str | tuple[str, int] | tuple[str, int, str]
NamesFilter = None | str | tuple[str, int] | Sequence[str] | Callable[[str], bool]


class UnknownName(DitLensError, KeyError):
    """A hook name, shorthand or pattern that this model does not have."""

    def __str__(self) -> str:  # KeyError shows its message in quotes
        return str(self.args[0])


@lru_cache(maxsize=8192)  # a read asks this of every name of the model
def layer_of(name: str) -> int | None:
    """The block a name belongs to, or None: `layer_of("blocks.5.hook_resid_pre") == 5`."""
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "blocks" and rest else None


@lru_cache(maxsize=8192)
def site_of(name: str) -> str:
    """A name without its block: `site_of("blocks.5.attn.hook_q") == "attn.hook_q"`."""
    return name if layer_of(name) is None else name.split(".", 2)[2]


class Addition(NamedTuple):
    """One place in a layer where something is added to a stream.

    Attributes:
        layer: the block.
        before: the stream's hook name ahead of the addition.
        added: the hook names whose values are added there.
        after: the stream's hook name behind it; `before + sum(added) == after` bit for bit.
    """

    layer: int
    before: str
    added: tuple[str, ...]
    after: str


def by_site(names: Iterable[str]) -> dict[str, list[str]]:
    """Names under their site's, the same one of every layer together.

    >>> by_site(["hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_attn_out"])["hook_embed"]
    ['hook_embed']
    """
    found: dict[str, list[str]] = {}
    for name in names:
        site = site_of(name)
        found.setdefault(name if name == site else f"blocks.{{i}}.{site}", []).append(name)
    return found


def additions(names: Iterable[str], stream: str = "") -> list[Addition]:
    """All that the layers add to one stream, in forward order: the one rule of what a layer adds.

    What a layer adds are its hook points `hook_..._out` between two of `hook_resid_...`: attention
    and MLP, in some families cross-attention, a second attention, or both fused in one.

    Args:
        names: hook names in forward order, such as `model.names`.
        stream: "" for the image's, "text." for the text's.

    >>> [a.added for a in additions(["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out",
    ...     "blocks.0.hook_resid_mid"])]
    [('blocks.0.hook_attn_out',)]
    """
    found: list[Addition] = []
    before: str = ""
    added: list[str] = []
    for name in names:
        layer, site = layer_of(name), site_of(name)
        if layer is None or not site.startswith(f"{stream}hook_"):
            continue
        own = site.removeprefix(f"{stream}hook_")
        if own.startswith("resid_"):
            if added:
                found.append(Addition(layer, before, tuple(added), name))
            before, added = name, []
        elif own.endswith("_out"):
            added.append(name)
    return found


def resolve(key: Key, names: Sequence[str], depth: int | None = None) -> str:
    """The one full name that `key` stands for.

    Args:
        key: a name, or a shorthand and its layer, a negative one from the end of the model.
        names: hook names, in forward order.
        depth: how many layers the model has; None where the names are of all of them.

    >>> resolve(("q", -1), ["blocks.0.attn.hook_q", "blocks.1.attn.hook_q"])
    'blocks.1.attn.hook_q'

    Raises:
        UnknownName: if there is no such name or layer, or the shorthand fits several sites.
    """
    if isinstance(key, str):
        if key in names:
            return key
        found = _by_shorthand(key, names)
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownName(
                f"{key!r} is at {len(found)} hook points, such as {found[0]!r}; say which layer: "
                f"({key!r}, 0)."
            )
        raise _unknown(key, names)
    if not (
        isinstance(key, tuple)
        and len(key) in (2, 3)
        and isinstance(key[0], str)
        and is_whole(key[1])
        and all(isinstance(part, str) for part in key[2:])
    ):
        raise UnknownName(
            f"{shown(key)} is not a hook name; use a string, or a shorthand such as "
            "('resid_post', 5)."
        )
    short, layer = key[0], int(key[1])
    if short in names and layer_of(short) is not None:
        raise UnknownName(
            f"{short!r} says its layer itself; expected it alone, or its site with a layer: "
            f"({site_of(short).removeprefix('hook_')!r}, {layer})."
        )
    found = _by_shorthand(f"{key[2]}.{short}" if len(key) == 3 else short, names)
    if not found:
        raise _unknown(short, names)
    layers = sorted({i for n in found if (i := layer_of(n)) is not None})
    if not layers:
        raise UnknownName(f"{found[0]!r} belongs to no layer; ask for it by its name alone.")
    if depth is None:  # and not how many have it: Flux's single blocks come behind others
        depth = 1 + max(i for n in names if (i := layer_of(n)) is not None)
    index = layer + depth if layer < 0 else layer
    at_layer = [n for n in found if layer_of(n) == index]
    if not at_layer:
        raise UnknownName(
            f"There is no layer {layer} for {short!r}: layers are {layers[0]} to {layers[-1]}."
        )
    return at_layer[0]


def is_shorthand(names_filter: object) -> TypeGuard[tuple[str, int]]:
    """Whether a filter is one name as a shorthand with its layer, and not several names.

    >>> is_shorthand(("resid_post", 5)), is_shorthand(("hook_embed", "hook_sample"))
    (True, False)
    """
    return isinstance(names_filter, tuple) and len(names_filter) >= 2 and is_whole(names_filter[1])


def select(names_filter: NamesFilter, names: Sequence[str]) -> list[str]:
    """All names that the filter chooses, in forward order.

    >>> select("blocks.*.hook_resid_post", ["hook_embed", "blocks.0.hook_resid_post"])
    ['blocks.0.hook_resid_post']

    Raises:
        UnknownName: if the filter, or any one pattern in a list of them, matches nothing.
    """
    if names_filter is None:
        return list(names)
    if callable(names_filter) and not isinstance(names_filter, type):
        chosen = {n for n in names if names_filter(n)}
        if not chosen:
            raise UnknownName(
                f"The names filter {names_filter!r} accepts none of the model's {len(names)} hook "
                "names."
            )
    elif isinstance(names_filter, str):
        return _match(names_filter, names)
    elif is_shorthand(names_filter):
        chosen = {resolve(names_filter, names)}
    else:
        chosen = set()
        if not isinstance(names_filter, (Sequence, Set)):
            raise UnknownName(
                f"{shown(names_filter)} is no filter of names; expected a name, a pattern, a list "
                "of them, a function on names, or None for every hook point."
            )
        for item in names_filter:
            chosen |= set(_match(item, names)) if isinstance(item, str) else {resolve(item, names)}  # type: ignore[arg-type]
        if not chosen:
            raise UnknownName("The names filter is empty; pass None for every hook point.")
    return [n for n in names if n in chosen]


def _match(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    is_glob = any(c in pattern for c in "*?[")
    globbed = [
        n for n in names if is_glob and any(fnmatchcase(form, pattern) for form in _forms(n))
    ]
    found = globbed or _by_shorthand(pattern, names)
    if not found:
        raise _unknown(pattern, names)
    return found


def _forms(name: str) -> tuple[str, str, str]:
    """What a glob may match: the name, its site in any layer, and that without TransformerLens's
    `hook_`.
    """
    site = site_of(name)
    return name, site, site.replace("hook_", "")


def _by_shorthand(short: str, names: Iterable[str]) -> list[str]:
    """Names whose site is `short` with TransformerLens's `hook_` understood; refused when sites of
    two kinds fit.
    """
    module, _, last = short.rpartition(".")
    last = last if last.startswith("hook_") else f"hook_{last}"
    wanted = f"{module}.{last}" if module else last
    exact = [n for n in names if site_of(n) == wanted]
    if exact:
        return exact
    found = [n for n in names if site_of(n).endswith(f".{wanted}")]
    # "pattern" is the image's own attention's
    own = [n for n in found if not site_of(n).startswith(ASIDE)]
    found = own or found
    sites = sorted({site_of(n) for n in found})
    if len(sites) > 1:
        raise UnknownName(f"{short!r} could be any of {', '.join(map(repr, sites))}; write it out.")
    return found


def _unknown(word: str, names: Sequence[str]) -> UnknownName:
    shorts = {site_of(n).rpartition("hook_")[2] for n in names}
    near = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    near = near or difflib.get_close_matches(
        word.rpartition("hook_")[2], list(shorts), n=3, cutoff=0.5
    )
    hint = f"nearest: {', '.join(map(repr, near))}" if near else "model.names lists them all"
    return UnknownName(f"No hook point matches {word!r}; {hint}.")
