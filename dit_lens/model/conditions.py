"""What a model can be asked for, by number: classes, or prompts.

Runs, twins and measurements speak of labels [batch], whole numbers. For a class-conditional model
they are its classes. For a model that is given text they are the numbers of prompts, which the
pipeline's own text encoders encode once each, and anew when these have changed; -1 is the empty
prompt, as guidance needs it. So everything that groups, pairs or replays by label works for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidValue
from ..families.base import Family
from ..families.config import Condition, Config
from ..pieces.content import digest
from .pinned import sent
from .state import State

PROMPTS = (
    "a photograph of a red fox in snow",
    "a bowl of oranges on a wooden table",
    "a lighthouse on a cliff at sunset",
    "a portrait of an old sailor",
    "a city street at night in the rain",
    "a field of sunflowers under a blue sky",
    "a white cat sleeping on a sofa",
    "a steam train crossing a stone bridge",
    "a cup of coffee beside an open book",
    "a sailing boat on a calm lake",
)
"""What a text-conditioned model is asked for where nobody says: ten scenes, as different as classes
are.
"""

Labels = int | str | Sequence[int] | Sequence[str] | Tensor


@dataclass(frozen=True)
class AtHome:
    """Stands for a text encoder in a process that the model was sent to.

    Attributes:
        told: of the encoder.
    """

    told: str


class Conditions:
    """The conditions of one model.

    Attributes:
        prompts: the prompts so far, by number; empty for a class-conditional model.
        given: conditions that were given by hand, by prompt.
    """

    def __init__(self, family: Family, cfg: Config, pipe: Any = None) -> None:
        self.family, self.cfg, self.pipe = family, cfg, pipe
        self.prompts: list[str] = [] if cfg.n_classes else list(PROMPTS)
        self.given: dict[str, Condition] = {}
        self._encoded: dict[str, Condition] = {}
        self._batches: dict[tuple[int, ...], Condition] = {}
        self._encoders: dict[str, State] = {}  # a glance at each, as what is encoded was made

    @property
    def n(self) -> int:
        """How many there are to choose from."""
        return self.cfg.n_classes or len(self.prompts)

    @property
    def null(self) -> int:
        """The number that asks for nothing."""
        return self.cfg.null_class

    def add(self, conditions: Mapping[str, Condition | Mapping[str, Tensor]]) -> None:
        """Give prompts their conditions (batch axis 1) by hand, for a transformer that comes
        without text encoders; "" is the null one.
        """
        for prompt, condition in conditions.items():
            arguments.instance("conditions: a prompt", prompt, str, "a string")
            arguments.instance(f"conditions[{prompt!r}]", condition, Mapping, "a dict of arguments")
            self.family.check_condition(prompt, Condition(condition))
        for prompt, condition in conditions.items():
            self.given[prompt] = self._encoded[prompt] = Condition(condition)
            self._batches.clear()
            if prompt and prompt not in self.prompts:
                self.prompts.append(prompt)

    def numbers(self, labels: Labels, device: Any = "cpu") -> Tensor:
        """Classes or prompts, by number or in words, as a tensor [batch].

        Raises ValueError for what the model does not have.

        >>> import dit_lens
        >>> dit_lens.load("digits").conditions.numbers([3, 7])
        tensor([3, 7])
        """
        self._forget_stale()
        given = [labels] if isinstance(labels, str) or arguments.is_whole(labels) else labels
        found = arguments.listed("labels", given, "a label, or a list of them", fewest=0)
        if any(isinstance(v, str) for v in found):
            found = [self._number(v) for v in found]
        found = [arguments.whole(f"labels[{i}]", v, most=None) for i, v in enumerate(found)]
        null = [self.null] if self.cfg.has_null else []
        bad = [v for v in found if not 0 <= v < self.n and v not in null]
        if not found or bad:
            got = f"Label {bad[0]} is out of range" if bad else "There are no labels"
            what = "class" if self.cfg.n_classes else "prompt"
            or_null = f", or {self.null} for no {what}" if null else ""
            raise InvalidValue(f"{got}; expected 0 to {self.n - 1}{or_null}.")
        return sent(torch.tensor(found, device="cpu"), device)

    def _number(self, prompt: Any) -> int:
        if self.cfg.n_classes:
            raise InvalidValue(
                f"The model knows {self.cfg.n_classes} classes by number and takes no prompts; got "
                f"{prompt!r}."
            )
        if not isinstance(prompt, str):
            raise InvalidValue(
                f"{prompt!r} stands among prompts; expected all in words, or all by number."
            )
        if prompt and prompt not in self.prompts:
            self.prompts.append(prompt)
        return self.prompts.index(prompt) if prompt else self.null

    def words(self, numbers: Sequence[int]) -> list[int] | list[str]:
        """What any model knows these by: prompts in words, whose numbers are this model's own, or
        classes by number.

        >>> import dit_lens; dit_lens.load("digits").conditions.words([3, 7])
        [3, 7]
        """
        if self.cfg.n_classes:
            return list(numbers)
        return [self.prompts[n] if n >= 0 else "" for n in numbers]

    def of(self, labels: Tensor, device: Any = None) -> Condition:
        """The transformer's further arguments for these labels [batch], which a device is waited
        for if they lie there; `device` is where the condition is to know them.
        """
        there = labels if device is None else sent(labels, device)
        if self.cfg.n_classes:
            return Condition.numbered({self.family.labels_name: there}, there)
        return Condition.numbered(self._stacked(tuple(labels.tolist())), there)

    def _stacked(self, labels: tuple[int, ...]) -> Condition:
        """The same tensors for the same labels in every step of a run: a trace then keeps them
        once.
        """
        if labels not in self._batches:
            while len(self._batches) >= 4:
                self._batches.pop(next(iter(self._batches)))
            self._batches[labels] = self.family.stack(
                [self._one(str(prompt)) for prompt in self.words(labels)]
            )
        return self._batches[labels]

    def _one(self, prompt: str) -> Condition:
        if prompt not in self._encoded:
            if getattr(self.pipe, "encode_prompt", None) is None:
                raise InvalidValue(
                    f"The prompt {prompt!r} can't be encoded: this transformer was opened without "
                    "a pipeline. Open the pipeline, or "
                    "give conditions: model.conditions.add({prompt: {...}, '': {...}})."
                )
            self._forget_stale()
            with torch.no_grad():
                self._encoded[prompt] = self.family.encode(self.pipe, prompt)
            self._encoders = _encoders(self.pipe)
        return self._encoded[prompt]

    def encoders(self) -> dict[str, str]:
        """What is told of each text encoder of the pipeline, by name."""
        parts = {} if self.pipe is None else vars(self.pipe)
        return {
            name: part.told if isinstance(part, AtHome) else digest([part, State.of(part).adapters])
            for name, part in parts.items()
            if name.startswith("text_encoder") and isinstance(part, (nn.Module, AtHome))
        }

    def encoded(self) -> list[tuple[nn.Module, AtHome]]:
        """Each text encoder of the pipeline with what may stand for it: they are needed no more,
        since every prompt so far is encoded, and the empty one.
        """
        names = [] if self.pipe is None else list(_encoders(self.pipe))
        if names and not self.cfg.n_classes:
            for prompt in [*self.prompts, *[""] * self.cfg.has_null]:
                self._one(prompt)
        told = self.encoders() if names else {}
        return [(getattr(self.pipe, name), AtHome(told[name])) for name in names]

    def _forget_stale(self) -> None:
        """Forget what text encoders encoded that are others by now. One that is gone, to save its
        memory, leaves what it encoded.
        """
        now = _encoders(self.pipe) if self._encoders else {}
        before = self._encoders
        if any(name not in before or before[name].changes(now[name]) for name in now):
            self._encoded, self._encoders = dict(self.given), {}
            self._batches.clear()


def _encoders(pipe: Any) -> dict[str, State]:
    """A glance at each text encoder of a pipeline."""
    return {
        name: State.of(part)
        for name, part in vars(pipe).items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }
