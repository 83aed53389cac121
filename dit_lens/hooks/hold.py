"""Hold: in place of what a site adds at a step, what it added some steps earlier.

It is the third kind of intervention beside knocking out and patching from a twin, and what every
caching method for DiTs does. What is held at a step may have been held itself: with a lag of 1,
steps 1 to 15 held are fifteen times what was added at step 0, or (order 1) points of the line
through steps 0 and 1.

A site is one of three: a hook point whose own value is held, such as `hook_attn_out`; a part of a
block, all that it adds to the streams of image and text; a block or a stack of neighbouring blocks,
for which what is added to a stream is the stream that leaves less the stream that entered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..errors import InvalidState, InvalidValue
from .names import Addition, NamesFilter, UnknownName, additions, layer_of, select, site_of
from .points import Editor, HookPoint, Listener, checked
from .regions import Region

STREAMS = ("", "text.")
BLOCKS = re.compile(r"blocks\.(?:(-?\d+)|(-?\d*):(-?\d*)|\*)(?:\.((?!hook_)[a-z0-9_]+))?")


class Added(NamedTuple):
    """Something that is added to a stream.

    Attributes:
        name: the hook point that gives it; of blocks, the stream that leaves them.
        entered: of blocks, the stream that enters them; "" for a hook point that gives it itself.
    """

    name: str
    entered: str = ""

    def of(self, value: Tensor, entered: Tensor | None) -> Tensor:
        """What was added, from the value at `name` and at `entered`."""
        return value if entered is None else value - entered

    def put(self, held: Tensor, entered: Tensor | None) -> Tensor:
        """The value at `name` with this addition."""
        return held if entered is None else entered + held


@lru_cache(maxsize=16)
def _additions(names: tuple[str, ...], stream: str) -> list[Addition]:
    return additions(names, stream)  # asked for every layer anew


def parts(names: Iterable[str], layer: int) -> dict[str, tuple[Added, ...]]:
    """What a block adds, by part: "attn", "mlp", in some families "cross_attn", "attn2" or both
    in one, each to every stream that it writes to.

    Args:
        names: hook names in forward order, such as `model.names`.
        layer: the block, 0 or more.

    >>> parts(["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid"], 0)
    {'attn': (Added(name='blocks.0.hook_attn_out', entered=''),)}
    """
    found: dict[str, tuple[Added, ...]] = {}
    names = tuple(names)
    for stream in STREAMS:
        for place in _additions(names, stream):
            for name in place.added if place.layer == layer else ():
                part = site_of(name).removeprefix(f"{stream}hook_").removesuffix("_out")
                found[part] = (*found.get(part, ()), Added(name))
    return found


def require_parts(names: Sequence[str]) -> None:
    """Raise InvalidState for a model of which no hook point gives what its blocks add: one that is
    opened by the boundaries of its modules.

    Args:
        names: the model's hook names.
    """
    layers = {layer for name in names if (layer := layer_of(name)) is not None}
    if not any(parts(names, layer) for layer in layers):
        raise InvalidState(
            "What this model's blocks add has no hook points, so that it can't be held, left out "
            "or exchanged: it is opened by the boundaries of its modules; expected a model of a "
            "known family (docs: Families)."
        )


def stack(names: Iterable[str], first: int, stop: int) -> tuple[Added, ...]:
    """What the blocks from `first` to before `stop` add to each stream that passes through them.

    Args:
        names: hook names in forward order, such as `model.names`.
        first: the first block.
        stop: the block after the last.

    >>> names = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"]
    >>> stack(names, 0, 1)
    (Added(name='blocks.0.hook_resid_post', entered='blocks.0.hook_resid_pre'),)
    """
    names, found = tuple(names), []
    for stream in STREAMS:
        chain = [a for a in _additions(names, stream) if first <= a.layer < stop]
        # a text that ends within the blocks is read by nobody behind them
        if chain and chain[-1].layer == stop - 1:
            found.append(Added(chain[-1].after, chain[0].before))
    return tuple(found)


def held_places(wanted: NamesFilter, names: Sequence[str]) -> list[Added]:
    """What a user's words for sites to be held stand for.

    Args:
        wanted: hook points as any names filter chooses them; or "blocks.5", "blocks.3:12",
            "blocks.*" (each block by itself is "blocks.*", all as one is "blocks.:"), behind which
            a part may stand, "blocks.3:12.attn"; or a list of such words.
        names: the model's hook names, in forward order.

    Raises:
        UnknownName: for what the model does not have.
        InvalidValue: for a stream, to which is added and which is not added itself.
        InvalidState: for a model of which it is not known what its blocks add.

    >>> names = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"]
    >>> [each.name for each in held_places("blocks.0.mlp", names)]
    ['blocks.0.hook_mlp_out']
    """
    if isinstance(wanted, (list, set, frozenset)):
        if not wanted:
            raise UnknownName("The list of sites to hold is empty; expected such as ['attn_out'].")
        found = [place for each in wanted for place in held_places(each, names)]
        return list(dict.fromkeys(found))
    words = BLOCKS.fullmatch(wanted) if isinstance(wanted, str) else None
    if words is not None:
        return _of_blocks(words, names)
    chosen = select(wanted, names)
    streams = [n for n in chosen if "hook_resid_" in n or n.endswith("hook_embed")]
    if streams:
        raise InvalidValue(
            f"{streams[0]!r} is a stream, to which is added, and can't be held; expected what is "
            "added, such as 'attn_out', or a whole block, such as 'blocks.5'."
        )
    return [Added(name) for name in chosen]


def _of_blocks(words: re.Match[str], names: Sequence[str]) -> list[Added]:
    """The places that "blocks...." means."""
    require_parts(names)
    one, start, stop, part = words.groups()
    n = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    if one is not None:
        if not -n <= int(one) < n:
            raise UnknownName(f"There is no layer {one}: layers are 0 to {n - 1}.")
        layers = [int(one) % n]
    else:
        layers = list(range(n))[slice(*(int(word) if word else None for word in (start, stop)))]
    if not layers:
        raise UnknownName(f"{words[0]!r} is no block: layers are 0 to {n - 1}.")
    if part is None:
        together = start is not None
        spans = [(layers[0], layers[-1] + 1)] if together else [(i, i + 1) for i in layers]
        return [place for span in spans for place in stack(names, *span)]
    found = [place for layer in layers for place in parts(names, layer).get(part, ())]
    if not found:
        known = list(dict.fromkeys(p for layer in layers for p in parts(names, layer)))
        near = difflib.get_close_matches(part, known, n=1, cutoff=0)[:1]
        raise UnknownName(
            f"{words[0]!r} matches nothing: there these parts are added, "
            f"{', '.join(map(repr, known))} (nearest: {', '.join(map(repr, near))})."
        )
    return found


def before(step: int, lag: int, order: int) -> list[int]:
    """The earlier steps that what is held at a step is made of, the latest first."""
    return [step - lag * (i + 1) for i in range(order + 1)]


def after(step: int, lag: int, order: int) -> list[int]:
    """The later steps that would be made of what is added at a step."""
    return [step + lag * (i + 1) for i in range(order + 1)]


def line(values: Sequence[Tensor]) -> Tensor:
    """What is held, from what was added at the steps of `before`: the same, or the next point on
    the line through two.
    """
    return values[0] if len(values) == 1 else 2 * values[0] - values[1]


def check_steps(early: int | None, lag: int, order: int) -> None:
    """Raise InvalidValue where there would be nothing to hold.

    Args:
        early: the first step that would be held; None is none.
        lag: how many steps back.
        order: 0 or 1.
    """
    first = lag * (order + 1)
    if early is not None and early < first:
        raise InvalidValue(
            f"Step {early} can't be held with lag={lag} and order={order}, which takes what was "
            f"added at step {early - first}; expected steps of {first} or more, such as "
            f"steps=slice({first}, None)."
        )


class Clock(NamedTuple):
    """Where a run is.

    Attributes:
        run: which run, if there are several one after the other.
        step: of the run.
        branch: which branches of guidance a call is, in words: each may be a call of its own.
        rows: which items of the step's batch a call has, where that is run in several.
    """

    run: Hashable
    step: int
    branch: str = ""
    rows: tuple[int, ...] | None = None


class Hold:
    """Holds one place at some steps; `listeners` are attached to the model's hook points.

    What is held is kept, as long as a later step needs it. So are the values that a call was run
    with (`frozen`), with which a recomputation puts in the same bits.

    Args:
        place: what is held.
        held: whether a step is.
        now: where the run is.
        lag: how many steps back.
        order: 0, what was added then; 1, the line through that and what was added `lag` earlier.
        inside: the part of it that is held.
        axes: of the place's hook point.
    """

    def __init__(
        self,
        place: Added,
        held: Callable[[int], bool],
        now: Callable[[], Clock],
        lag: int,
        order: int,
        inside: Region,
        axes: tuple[str, ...],
    ) -> None:
        self.place, self.held, self.now, self.lag, self.order = place, held, now, lag, order
        self.inside, self.axes = inside, axes
        self.kept: dict[Clock, Tensor] = {}
        self.entered: Tensor | None = None
        self.made: tuple[Tensor, Tensor] | None = None  # what was put in, and what was held for it

    @property
    def listeners(self) -> list[tuple[str, Listener]]:
        """What is attached, by hook name."""
        found: list[tuple[str, Listener]] = [(self.place.name, Holding(self))]
        if self.place.entered:
            found.insert(0, (self.place.entered, Entering(self)))
        for _, listener in found:
            # each part is held from itself, but items would be counted in each
            listener.in_parts = self.inside.items is None
        return found

    def value(self) -> Tensor | None:
        """What is held in the call under way; None where nothing is."""
        clock = self.now()
        if not self.held(clock.step):
            return None
        steps = before(clock.step, self.lag, self.order)
        found = [self.kept.get(clock._replace(step=step)) for step in steps]
        absent = [s for s, value in zip(steps, found, strict=True) if value is None]
        if absent:
            branch = f" of the branch {clock.branch!r}" if clock.branch else ""
            raise InvalidState(
                f"{self.place.name!r} can't be held at step {clock.step}: step {absent[0]}{branch} "
                f"was not run before it, or with other items; start at step {absent[-1]} or "
                "earlier, in one batch."
            )
        return line([value for value in found if value is not None])

    def remember(self, value: Tensor, point: HookPoint) -> None:
        """Keep what was added, without edits that are given after the hold: they act on what is
        put in.
        """
        # a sum less what entered is not to the bit what was held
        same = self.made is not None and self.made[0] is value
        self._keep(self.made[1] if same and self.made else self.place.of(value, self.entered))

    def _keep(self, added: Tensor) -> None:
        """Keep what is added at a step from which a later one is held, and drop what is no longer
        needed.
        """
        clock = self.now()
        if any(map(self.held, after(clock.step, self.lag, self.order))):
            self.kept[clock] = added.detach().clone()
        oldest = clock.step - self.lag * (self.order + 1)
        for each in [c for c in self.kept if c.run != clock.run or c.step < oldest]:
            del self.kept[each]
        self.entered = self.made = None

    def put(self, value: Tensor, x: Tensor, point: HookPoint, clock: Clock) -> Tensor:
        """The activation x, of the call at this clock, with what is held in its place."""
        new = self.place.put(value, self.entered)
        if new.shape != x.shape:
            raise InvalidValue(
                f"{point.name!r} is {list(x.shape)} at step {clock.step} and was "
                f"{list(new.shape)} where it is held from ({', '.join(self.axes)}); a hold needs "
                "one batch and one size throughout."
            )
        new = new.clone() if new is value else new  # what flows on may be changed in place
        self.made = new, value
        region, rows = self.inside.of_branch(point.name, clock.branch, len(x))
        if region is self.inside:
            return checked(region.merge(x, new, self.axes), x, point)
        found = x.clone()
        found[rows] = region.merge(x[rows], new[rows], self.axes)
        return checked(found, x, point)


def _nothing(*_: object) -> None:
    """What an editor's function does, where its class does it all."""


class Entering(Editor):
    """Notes the stream that enters held blocks. It changes nothing; it is an editor since these are
    what a recomputation repeats.
    """

    late = True  # also of edits that come after the hold

    def __init__(self, hold: Hold) -> None:
        super().__init__(_nothing)
        self.hold = hold

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        self.hold.entered = x.clone()
        return x

    def frozen(self) -> Editor | None:
        return self if self.hold.held(self.hold.now().step) else None


class Holding(Editor):
    """Puts in what is held; `frozen`, what was held in one call."""

    def __init__(self, hold: Hold, value: Tensor | None = None, at: Clock | None = None) -> None:
        super().__init__(_nothing)
        self.hold, self.fixed, self.at = hold, value, at

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        value = self.hold.value() if self.fixed is None else self.fixed
        if value is not None:
            clock = self.at or self.hold.now()
            point.step, point.changed = clock.step, True
            x = self.hold.put(value, x, point, clock)
        if self.fixed is None:
            self.hold.remember(x, point)
        return x

    def frozen(self) -> Editor | None:
        value = self.hold.value() if self.fixed is None else self.fixed
        if value is None:
            return None
        twin = Holding(self.hold, value, self.at or self.hold.now())
        twin.order = self.order
        return twin
