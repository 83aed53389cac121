"""Attention that people can read: where in the image its tokens attend to words of the prompt.

Patterns are reduced as they are computed, to one number a word, head and image token: all of a
large model's would fill any memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..families.parts.words import Token, places_of, tokens_of, unknown_word, words_of
from ..hooks.edits import Steps
from ..hooks.names import layer_of, site_of
from ..model.conditions import PROMPTS
from ..model.hooked import HookedDiT
from ..pictures.attention import AttentionMap
from .recompute import Rows, order_of, recompute, rows_of, split, steps_of
from .record import Record

AVERAGED = ("layer", "step", "head")
Wanted = list[tuple[str, list[int]]]
"""Words, each with the positions of its tokens among the text's keys."""


def attention_map(
    record: Record,
    traced: HookedDiT | None,
    words: str | Sequence[str] | None,
    *,
    layers: Any,
    steps: Steps,
    heads: Any,
    over: Sequence[str],
    prompt: str | None,
    branch: str,
) -> AttentionMap:
    """See `Trace.attention_map`."""
    model = _with_tokenizers(traced)
    arguments.choice("branch", branch, ["cond", "uncond", "skip"])
    given = [over] if isinstance(over, str) else over
    averaged = [
        arguments.choice(f"over[{i}]", axis, list(AVERAGED))
        for i, axis in enumerate(arguments.listed("over", given, "axes to average", fewest=0))
    ]
    asked = None
    if words is not None:
        listed = [words] if isinstance(words, str) else words
        listed = arguments.listed("words", listed, "a word, or a list of them")
        asked = [arguments.text(f"words[{i}]", word) for i, word in enumerate(listed)]
    names = _patterns(model, layers)
    n_all = model.cfg.axis_sizes()[model.sites[names[0]][1]]
    chosen = None if heads is None else arguments.positions("heads", heads, n_all).tolist()

    # which items have the words, and where
    rows = {s: _rows(record, s, branch) for s in steps_of(record, steps)}
    said = {s: _prompts(model, record, rows[s], prompt, branch) for s in rows}
    has = _with_words(said, asked)
    prompts = list(dict.fromkeys(p for of_step in said.values() for p in of_step))
    if asked is None and len(prompts) > 1:
        raise InvalidValue(
            f"There are {len(prompts)} different prompts, whose words can't share an axis; "
            "expected words=, one or a list of them, or steps= of a run with one prompt."
        )

    labels = asked if asked is not None else [w for w, _ in words_of(prompts[0])]
    seen: dict[tuple[str, int], Tensor] = {}
    known: dict[tuple[str, int], Wanted] = {}

    def reduced(name: str, c: int, pattern: Tensor) -> None:
        call = record.calls[c]
        at = model.family.text_keys(model.transformer, call.inputs, pattern.shape[3])
        found = []
        for item in range(len(pattern)):
            keys = _keys(at, item, pattern.shape[3])
            own = of_item.get((c, item))
            if own is None:
                found.append(pattern.new_full((len(labels), *pattern.shape[1:3]), float("nan")))
                continue
            which = own, len(keys)
            if which not in known:
                real = model.family.text_length(call.inputs, item)
                known[which] = _wanted(model, own, asked, len(keys), real)
            found.append(
                torch.stack(
                    [
                        pattern[item, :, :, keys[torch.tensor(places, device=keys.device)]].sum(-1)
                        for _, places in known[which]
                    ]
                )
            )
        whole = torch.stack(found).detach()  # [item, word, head, query]
        whole = whole if chosen is None else whole[:, :, chosen]
        seen[name, c] = (whole.mean(2, keepdim=True) if "head" in averaged else whole).float()

    of_item: dict[tuple[int, int], str] = {}
    for step, of_step in rows.items():
        for place, at in enumerate(_in_order(record, of_step)):
            if place in has:
                of_item[at] = said[step][place]
    calls = [c for of_step in rows.values() for c in of_step]
    grid = record.calls[calls[0]].grid
    if any(record.calls[c].grid != grid for c in calls):
        raise InvalidValue(
            "The steps are of images of different sizes; expected steps= of one run."
        )
    recorded, missing = split(record, names, calls)
    for name in recorded:
        for c in calls:
            reduced(name, c, record.activations[name][c])
    recompute(record, model, missing, calls, reduced)

    steps_in = []
    for of_step in rows.values():
        order = order_of(record, of_step)
        parts = [
            torch.stack([seen[n, c] for n in names])[:, slice(None) if i is None else i]
            for c, i in of_step.items()
        ]
        whole = torch.cat(parts, dim=1)
        whole = whole if order is None else whole[:, order]
        steps_in.append(whole[:, has].cpu())
    values = torch.stack(steps_in, 1).permute(3, 0, 1, 4, 2, 5)  # word layer step head item query
    if prod(grid) != values.shape[-1]:
        raise InvalidState(
            f"The pattern has {values.shape[-1]} queries and the token grid is {grid}; expected "
            "the whole image's."
        )
    found = AttentionMap(
        values.unflatten(-1, grid).numpy(),
        dims=["word", *AVERAGED, "batch", *(["frame"] if len(grid) == 3 else []), "row", "column"],
        coords={
            "word": labels,
            "layer": [layer_of(name) for name in names],
            "step": list(rows),
            "batch": has,
        },
        name="attention",
        attrs={"prompts": "\n".join(prompts), "names": site_of(names[0])},
    )
    if "head" not in averaged:
        found = found.assign_coords(head=np.arange(n_all) if chosen is None else chosen)
    found = found.mean(averaged, keep_attrs=True) if averaged else found
    return found.isel(word=0) if isinstance(words, str) else found


def _with_tokenizers(model: HookedDiT | None) -> HookedDiT:
    if model is None:
        raise InvalidState(
            "This trace was loaded without its model, whose tokenizers are needed; load it with "
            "load_trace(path, model)."
        )
    if model.conditions.pipe is None:
        raise InvalidState(
            "The words of a prompt are not known without the pipeline's tokenizers; open the "
            "pipeline, dit_lens.HookedDiT(pipe), and not its transformer."
        )
    return model


def _patterns(model: HookedDiT, layers: Any) -> list[str]:
    """The patterns of the image's attention to the text, layer by layer."""
    cross = [n for n in model.names if site_of(n) == "cross_attn.hook_pattern"]
    own = [n for n in model.names if site_of(n) == "attn.hook_pattern" and model.cfg.joint]
    names = cross or own
    if not names:
        raise InvalidValue(
            f"{type(model.transformer).__name__} has no attention to a text with a pattern; "
            "expected a model that is given prompts."
        )
    if layers is None:
        return names
    wanted = arguments.layers(layers, model.cfg.n_layers)
    of_layer = {layer_of(n): n for n in names}
    absent = [layer for layer in wanted if layer not in of_layer]
    if absent:
        raise InvalidValue(
            f"Layer {absent[0]} has no attention to the text; expected layers from "
            f"{sorted(layer for layer in of_layer if layer is not None)}."
        )
    return [of_layer[layer] for layer in wanted]


def _rows(record: Record, step: int, branch: str) -> Rows:
    """A step's items of one branch; all of them where no guidance ran."""
    words = {w for c in record.calls_at[step] for w in record.calls[c].branch_words(-1)}
    return rows_of(record, step, None if words == {""} else branch)


def _in_order(record: Record, rows: Rows) -> list[tuple[int, int]]:
    """A step's items in the order of its batch, each as its call and its place there."""
    found = [
        (c, i)
        for c, items in rows.items()
        for i in (range(len(record.calls[c].x)) if items is None else items)
    ]
    order = order_of(record, rows)
    return found if order is None else [found[i] for i in order.tolist()]


def _with_words(said: Mapping[int, Sequence[str]], asked: Sequence[str] | None) -> list[int]:
    """The items whose prompt has all the words; the same at each step, or they share no axis."""
    has = {
        s: [i for i, p in enumerate(of) if asked is None or all(places_of(w, p) for w in asked)]
        for s, of in said.items()
    }
    what = "each word" if asked is None else arguments.shown(asked)
    without = [s for s in has if not has[s]]
    if len(without) == len(has):
        prompts = [p for of_step in said.values() for p in of_step]
        lost = next(w for w in asked or [""] if not any(places_of(w, p) for p in prompts))
        raise unknown_word(lost, list(dict.fromkeys(prompts)))
    first = next(s for s in has if has[s])
    alike = [s for s in has if has[s] == has[first]]
    if without:
        raise InvalidValue(
            f"No prompt has {what} at step {without[0]}, which is of another "
            f"run; expected steps= of those that have it, such as steps={alike}."
        )
    other = next((s for s in has if has[s] != has[first]), None)
    if other is not None:
        raise InvalidValue(
            f"{what} is said of items {has[first]} at step {first} and of items "
            f"{has[other]} at step {other}, which can't share an axis; expected steps= of one run, "
            f"such as steps={alike}."
        )
    return has[first]


def _prompts(
    model: HookedDiT, record: Record, rows: Rows, prompt: str | None, branch: str
) -> list[str]:
    """The prompt of each item of a step, in the order of its batch."""
    known: dict[int, list[str | None]] = {}
    for c in rows:
        call = record.calls[c]
        n = len(call.x)
        of_call: list[str | None] = [None] * n
        if (call.negatives if branch == "uncond" else call.prompts) == ():
            names = " and ".join(model.family.prompt_names)
            raise InvalidValue(
                f"The text encoders were given different prompts ({names}), so that a word has no "
                "one place among the text's tokens; expected the same for all."
            )
        if call.prompts is not None:
            branches = call.branch or ("",) * n
            asked, negative = (
                [None] * n if not each else _spread(model, each, n, branches)
                for each in (call.prompts, call.negatives)
            )
            each = zip(branches, asked, negative, strict=True)
            of_call = [no if branch == "uncond" else yes for branch, yes, no in each]
        elif call.labels is not None and not model.cfg.n_classes:
            # a file has the numbers of the model that it was traced with, which may have been asked
            # others
            prompts = PROMPTS if record.file else model.conditions.prompts
            numbers = call.labels.expand(n).tolist()
            if max(numbers) < len(prompts):
                of_call = [prompts[i] if i >= 0 else "" for i in numbers]
        if prompt is not None:
            words = {arguments.text("prompt", prompt), model.family.said(prompt)}
            items = rows[c]
            own = of_call if items is None else [of_call[i] for i in items]
            other = next((p for p in own if p is not None and p not in words), None)
            if branch == "cond" and other is not None:
                raise InvalidValue(
                    f"prompt={prompt!r:.60} is not what this run was asked for, {other!r:.60}; "
                    "expected it left out."
                )
            of_call = [prompt] * n
        known[c] = of_call
    found = [known[c][i] for c, i in _in_order(record, rows)]
    if None in found:
        raise InvalidValue(
            "The prompt of this run is not known; say what the text encoders were given: "
            "t.attention_map(..., prompt='a red fox')."
        )
    return [each for each in found if each is not None]


def _spread(
    model: HookedDiT, prompts: Sequence[str], items: int, branches: Sequence[str]
) -> Sequence[str | None]:
    """One of several prompts for each item of a batch: each in a row for its images, and so in each
    branch; None for each where they do not come out even.
    """
    halves = 2 if len(set(branches)) == 2 else 1
    times = items // halves // len(prompts)
    found = [model.family.said(p) for p in prompts for _ in range(times)] * halves
    return found if len(found) == items else [None] * items


def _keys(at: slice | Tensor, item: int, keys: int) -> Tensor:
    """The positions of one item's text among the keys."""
    if isinstance(at, slice):
        return torch.arange(keys)[at]
    return at[item if len(at) > 1 else 0].cpu()


def _wanted(
    model: HookedDiT, prompt: str, asked: list[str] | None, keys: int, real: int | None
) -> Wanted:
    """The positions of each word's tokens among the text's keys, of which so many are no padding,
    if that is known.
    """
    pipe = model.conditions.pipe
    texts = model.family.texts(pipe, prompt)
    said = None if len(texts) > 1 else texts[0].tokens(keys)
    if None not in (said, real) and said != real:
        raise InvalidState(
            f"The prompt {prompt!r:.60} makes {said} tokens, and the text encoder was given "
            f"{real}; expected the prompt of this run."
        )
    tokens = tokens_of(texts, prompt, keys)
    if not tokens:
        raise InvalidState(
            f"The prompt {prompt!r} is not found among the tokens of {type(pipe).__name__}'s "
            "tokenizer, which changes it; expected plain words."
        )
    spans = (
        [(word, [span]) for word, span in words_of(prompt)]
        if asked is None
        else [(word, places_of(word, prompt)) for word in asked]
    )
    return [(word, _within(tokens, word, of_word, prompt)) for word, of_word in spans]


def _within(
    tokens: Sequence[Token], word: str, spans: Sequence[tuple[int, int]], prompt: str
) -> list[int]:
    found = [
        t.key for t in tokens if any(t.span[0] < end and t.span[1] > start for start, end in spans)
    ]
    if not found:
        raise InvalidValue(
            f"{word!r} was cut off: the text encoder reads the first {len(tokens)} tokens of "
            f"{prompt!r:.60}; expected a shorter prompt."
        )
    return found
