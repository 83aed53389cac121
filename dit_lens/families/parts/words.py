"""Where the words of a prompt lie among the tokens that a text encoder was given.

A pipeline's own tokenizer splits the very text that the pipeline gives it: the prompt, perhaps in a
template. Which characters a token stands for is read off what the tokens up to it decode to, which
every tokenizer can say: not all know offsets. Case, accents and spaces, which some of them drop, do
not count.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...errors import InvalidValue

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, eq=False)
class Text:
    """One stretch of the keys that come from a text encoder.

    Attributes:
        tokenizer: the pipeline's.
        text: what it is given.
        length: how many keys the stretch has; None is all that are left.
        dropped: so many of its tokens, from the first on, are no keys.
        behind: what a template has behind the prompt.
    """

    tokenizer: Any
    text: str
    length: int | None = None
    dropped: int = 0
    behind: str = ""

    def tokens(self, keys: int) -> int:
        """How many keys it fills, of so many.

        Args:
            keys: how many there are.
        """
        ids = self.tokenizer(self.text, truncation=False)["input_ids"]
        return min(len(ids) - self.dropped, keys)


def plain(text: str) -> str:
    """A text without case, accents and spaces, in which tokens and prompt are compared.

    >>> plain("Un CAFÉ noir")
    'uncafenoir'
    """
    apart = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in apart if not (c.isspace() or unicodedata.combining(c)))


@dataclass(frozen=True)
class Token:
    """One token of a prompt.

    Attributes:
        key: its position among the text's keys.
        text: what it says.
        span: the first of its characters in the plain prompt, and the one behind its last.
    """

    key: int
    text: str
    span: tuple[int, int]


def tokens_of(texts: Sequence[Text], prompt: str, keys: int) -> list[Token]:
    """The prompt's own tokens, in the order of the keys; none of a template, no padding, no marks
    of beginning and end.

    Args:
        texts: the stretches of the keys, one behind the other.
        prompt: the prompt.
        keys: how many keys the text has.
    """
    found, start = [], 0
    for text in texts:
        length = keys - start if text.length is None else text.length
        most = length + text.dropped
        for place, said, span in _placed(text.tokenizer, text.text, text.behind, prompt, most):
            if place >= text.dropped:
                found.append(Token(start + place - text.dropped, said, span))
        start += length
    return found


@lru_cache(maxsize=64)
def _placed(
    tokenizer: Any, text: str, behind: str, prompt: str, most: int
) -> tuple[tuple[int, str, tuple[int, int]], ...]:
    """(position, text, span in the plain prompt) of the prompt's tokens that fit."""
    ids = list(tokenizer(text, truncation=False)["input_ids"])
    said = [
        plain(tokenizer.decode(ids[:n], skip_special_tokens=True)).rstrip("\ufffd")
        for n in range(len(ids) + 1)
    ]
    ends, whole = [len(each) for each in said], said[-1]
    marked = tokenizer(behind)["input_ids"] if behind else []
    behind = plain(tokenizer.decode(marked, skip_special_tokens=True))
    before = whole.removesuffix(behind).rfind(plain(prompt))
    if before < 0:
        return ()
    after = before + len(plain(prompt))
    marks = next((n for n in range(len(ids)) if ends[-1 - n] != ends[-2 - n]), 0)
    fit = len(ids) if len(ids) <= most else most - marks
    spans = [(i, max(ends[i], before), min(ends[i + 1], after)) for i in range(fit)]
    return tuple(
        (i, tokenizer.decode(ids[i : i + 1]).strip(), (low - before, high - before))
        for i, low, high in spans
        if high > low
    )


def words_of(prompt: str) -> list[tuple[str, tuple[int, int]]]:
    """The words of a prompt, each with its place in the plain prompt.

    >>> words_of("A cat, a cat's hat")[1:3]
    [('cat', (1, 4)), ('a', (5, 6))]
    """
    return [(m[0], _span(prompt, m.start(), m.end())) for m in WORD.finditer(prompt)]


def places_of(word: str, prompt: str) -> list[tuple[int, int]]:
    """Every place of a word, or of several in a row, in the plain prompt; case does not count.

    Args:
        word: the word.
        prompt: the prompt.
    """
    asked = re.escape(word.strip())
    bounded = rf"(?<!\w){asked}(?!\w)" if word.strip() else r"(?!)"
    hits = list(re.finditer(bounded, prompt, re.I))
    # where words are not set apart by spaces
    if not hits and word.strip() and not word.strip().isascii():
        hits = list(re.finditer(asked, prompt, re.I))
    return [_span(prompt, m.start(), m.end()) for m in hits]


def _span(prompt: str, start: int, end: int) -> tuple[int, int]:
    return len(plain(prompt[:start])), len(plain(prompt[:end]))


def unknown_word(word: str, prompts: Sequence[str]) -> InvalidValue:
    """The error for a word that stands in none of the prompts.

    Args:
        word: the word.
        prompts: the prompts.
    """
    known = list(dict.fromkeys(found for prompt in prompts for found, _ in words_of(prompt)))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known[:20])}."
    said = repr(prompts[0]) if len(set(prompts)) == 1 else f"any of {len(prompts)} prompts"
    return InvalidValue(f"{word!r} is no word of {said}; {hint}")
