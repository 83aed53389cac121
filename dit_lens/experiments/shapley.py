"""Whose is the gap, when layers act together: order-averaged (Shapley) shares and interactions.

The players are layers, or sets of layers; the value v(S) of a set of them is the gap of the model
that lacks S, with everybody at the same starts and noise. Along one order in which the players are
knocked out one after the other, each is given the change of the gap at its turn; these changes add
up to the whole change, v(all) - v(none), whatever the order. A player's share is its mean over
orders (Shapley 1953). A share below 0 took the gap away when it went; a layer that does nothing has
share 0; of two layers either of which suffices each has half.

A set without which a band no longer commits has no gap, so v has no value there, and none is made
up. If all players together are such a set there is nothing to share, and that is an error. An order
that passes through such a set is left out as a whole, so the shares still add up; how many were
left out is said, and the shares are then means over the orders that the model survives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xarray as xr

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.bands import CUT
from ..measures.bootstrap import interval
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pieces import Engine, enough, measured
from ..sampling.settings import Progress
from .ablation import How, Part
from .effects import MATTERS, first_few, together
from .knock_outs import Sets, checked_sets
from .knocked_gap import KnockedGap, gap_of, set_text


@measured
def shapley(
    model: HookedDiT,
    layers: Sets | None = None,
    orders: int = 16,
    part: Part = "layer",
    *,
    how: How = "zero",
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    batch: int | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> xr.Dataset:
    """Each player's share of what becomes of the gap when all of them are knocked out.

    Args:
        model: the opened model, with a scheduler.
        layers: the players, two or more: layers, or sets of layers that have none in common, as
            `[[0, 1], [2, 3]]`; by default every layer, which takes long.
        orders: how many are drawn, 2 or more, each with its reverse (antithetic); where there are
            no more than so many, all of them are gone through, and nothing is drawn.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        how: what comes in place of what a layer adds, see `dit_lens.experiments.knocked_out`.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins, the bootstrap, the orders and how="resample".
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        batch: images that go through the model at once; None is all. With how="zero" only.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; by default the
            model's own.
        progress: called with (done, total) sets, an upper bound of these.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: in steps, `share` [player] and `share_interval` [player, bound], 95 % for all
            players at once, over pairs; `monte_carlo` [player], the standard error that drawing
            orders adds, 0 where all were gone through; `marginal` [order, player], which add up to
            `total` in every order; `interaction` [one, other], what knocking out both does beyond
            the two by themselves, with its `_interval`, for all at once. Attributes: `gap`,
            `total`, `total_interval`, `lost`, the number of orders that pass through a set
            without which a band does not commit, `sum_error`, how far any order's sum is off, and
            the `sentence`.

    Raises:
        InvalidValue: for players that overlap, or without all of which a band does not commit; and
            as `knock_outs`.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = shapley(model, [20, 21], pairs=16, steps=3, resamples=100)
    >>> abs(float(found.share.sum()) - found.total) < 1e-9
    True
    """
    del store, engine  # `measured` sees to them
    _, players = checked_sets(model, layers, part, fewest=2)
    disjoint(players)
    orders = arguments.whole("orders", orders, 2)
    arguments.choice("how", how, get_args(How))
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    settings: dict[str, Any] = {"pairs": pairs, "steps": steps, "cut": cut, "resamples": resamples}
    known = KnockedGap(model, part, how, seed=seed, **settings, batch=batch, labels=labels)
    return shares(known, players, orders, progress)


def disjoint(players: Sequence[Sequence[int]]) -> None:
    """Raise InvalidValue for players that have a layer in common.

    Args:
        players: sets of layers.
    """
    for one, other in itertools.combinations(players, 2):
        both = sorted(set(one) & set(other))
        if both:
            raise InvalidValue(
                f"The players {list(one)} and {list(other)} both have layer {both[0]}; expected "
                "sets that have none in common."
            )


def shares(
    known: KnockedGap,
    players: Sequence[list[int]],
    orders: int,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The dataset of `shapley`, with an engine that is already there.

    Args:
        known: the gap with and without parts.
        players: sets of layers that have none in common.
        orders: how many are drawn.
        progress: called with (done, total) sets.
    """
    n = len(players)
    drawn, every = drawn_orders(n, orders, known.seed)
    pairs_of_players = list(itertools.combinations(range(n), 2))
    asked = {frozenset(o[:k]) for o in drawn for k in range(1, n + 1)}
    asked |= {frozenset(p) for p in [*pairs_of_players, *((i,) for i in range(n))]}
    values: dict[frozenset[int], Array] = {frozenset(): gap_of(known.before)}

    def layers_of(members: frozenset[int]) -> list[int]:
        return [layer for i in sorted(members) for layer in players[i]]

    def value(members: frozenset[int]) -> Array:  # [1 + resample]
        if members not in values:
            values[members] = gap_of(known.without(layers_of(members)))
            if progress is not None:
                progress(len(values) - 1, len(asked))
        return values[members]

    everybody = value(frozenset(range(n)))
    names = [set_text(layers) for layers in players]
    if not np.isfinite(everybody[0]):
        raise InvalidValue(
            f"Without layers {set_text(sum(players, []))} a band does not commit, so there is no "
            "gap left to share among them; expected players that the model survives the loss of, "
            "fewer ones or other ones, or how='mean'."
        )
    total = everybody - values[frozenset()]
    rest, done = sorted((m for m in asked if m not in values), key=sorted), len(values) - 1

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(asked))

    found = known.all([(layers_of(m), None, False) for m in rest], told)
    values |= {m: gap_of(taus) for m, taus in zip(rest, found, strict=True)}
    enough()

    # along each order, every player's change at its turn
    marginal = np.full((len(drawn), n, len(total)), np.nan)
    for o, order in enumerate(drawn):
        chain = [value(frozenset(order[:k])) for k in range(n + 1)]
        if all(np.isfinite(v[0]) for v in chain):
            marginal[o, order] = np.diff(np.stack(chain), axis=0)
    kept = np.isfinite(marginal[:, :, 0]).all(1)
    share = marginal[kept].mean(0).T if kept.any() else np.full((len(total), n), np.nan)
    off = np.abs(marginal[kept][:, :, 0].sum(1) - total[0]).max() if kept.any() else np.nan
    apart = np.stack(
        [
            value(frozenset((i, j)))
            - value(frozenset((i,)))
            - value(frozenset((j,)))
            + values[frozenset()]
            for i, j in pairs_of_players
        ],
        -1,
    )  # [resample, pair]
    bounds = together(apart, known.pairs)
    interaction, interaction_interval = np.full((n, n), np.nan), np.full((n, n, 2), np.nan)
    for k, (i, j) in enumerate(pairs_of_players):
        for at in ((i, j), (j, i)):
            interaction[at], interaction_interval[at] = apart[0, k], bounds[k]
    whole = Estimate.of(total[0], interval(total, known.pairs))
    result = xr.Dataset(
        {
            "share": ("player", share[0]),
            "share_interval": (("player", "bound"), together(share, known.pairs)),
            "monte_carlo": ("player", monte_carlo(marginal[..., 0], every)),
            "marginal": (("order", "player"), marginal[..., 0]),
            "interaction": (("one", "other"), interaction),
            "interaction_interval": (("one", "other", "bound"), interaction_interval),
        },
        coords={
            "player": names,
            "one": names,
            "other": names,
            "bound": ["low", "high"],
            "order": np.arange(len(drawn)),
        },
        attrs=known.attrs
        | {
            "gap": known.gap.value,
            "gap_interval": [known.gap.low, known.gap.high],
            "total": whole.value,
            "total_interval": [whole.low, whole.high],
            "orders": len(drawn),
            "lost": int((~kept).sum()),
            "every": int(every),
            "sum_error": float(off),
            "matters": MATTERS * known.steps,
        },
    )
    result.attrs["sentence"] = shapley_sentence(result)
    return result


def likely_players(known: KnockedGap, n: int) -> list[list[int]]:
    """At most n layers that by themselves move the gap most and that the model survives the loss
    of all together, as players of `shares`.

    Args:
        known: the gap with and without parts.
        n: how many.
    """
    layers = range(known.model.cfg.n_layers)
    alone = known.all([([i], None, False) for i in layers])
    effect = {i: abs(float((gap_of(alone[i]) - gap_of(known.before))[0])) for i in layers}
    found: list[int] = []
    for layer in sorted((i for i in layers if np.isfinite(effect[i])), key=lambda i: -effect[i]):
        if len(found) == n:
            break
        if np.isfinite(known.without([*found, layer])[0]).all():
            found.append(layer)
    return [[layer] for layer in sorted(found)]


def drawn_orders(n: int, orders: int, seed: int) -> tuple[list[list[int]], bool]:
    """Orders of n players, and whether these are all there are: each drawn one and its reverse.

    Args:
        n: players.
        orders: how many.
        seed: of the draw.

    >>> drawn_orders(2, 16, 0)
    ([[0, 1], [1, 0]], True)
    """
    if math.factorial(n) <= orders:
        return [list(order) for order in itertools.permutations(range(n))], True
    draw = np.random.default_rng(seed)
    found: list[list[int]] = []
    while len(found) < orders:
        order = draw.permutation(n).tolist()
        found += [one for one in (order, order[::-1]) if one not in found]
    return found[: orders + orders % 2], False


def monte_carlo(marginal: Array, every: bool) -> Array:
    """The standard error that drawing orders adds to a share, [player], of marginals [order,
    player] in which an order and its reverse are neighbours; NaN where it is not known.

    >>> monte_carlo(np.array([[1.0], [3.0], [2.0], [2.0]]), False).tolist()
    [0.0]
    """
    if every:
        lost = ~np.isfinite(marginal).all(1)
        return np.full(marginal.shape[1], np.nan if lost.all() else 0.0)
    both = marginal.reshape(-1, 2, marginal.shape[1])
    committing = [pair[np.isfinite(pair).all(1)] for pair in both]
    means = [pair.mean(0) for pair in committing if len(pair)]
    if len(means) < 2:
        return np.full(marginal.shape[1], np.nan)
    found: Array = np.std(means, axis=0, ddof=1) / np.sqrt(len(means))
    return found


def shapley_sentence(result: xr.Dataset) -> str:
    """Whose the change of the gap is, and which players act together.

    Args:
        result: of `shapley`.
    """
    players, attrs = result.player.values.tolist(), result.attrs
    total = Estimate.of(attrs["total"], attrs["total_interval"])
    who = "; ".join(players)
    head = f"With all of layers {who} knocked out the gap changes by {total:+.2f steps}"
    lost, orders = int(attrs["lost"]), int(attrs["orders"])
    if lost == orders:
        return (
            f"{head}; no shares can be given, since in every one of {orders} orders a band does "
            "not commit at some point."
        )
    found = {
        p: Estimate.of(v, ends)
        for p, v, ends in zip(
            players, result.share.values, result.share_interval.values, strict=True
        )
    }
    drawing = dict(zip(players, result.monte_carlo.values.tolist(), strict=True))
    sure = [
        p
        for p, e in found.items()
        if abs(e.value) > attrs["matters"] and _surely(e, 0.0 if attrs["every"] else drawing[p])
    ]
    sure.sort(key=lambda p: -abs(found[p].value))
    whose = (
        f"shares of it surely not 0: {first_few([f'{p} ({found[p]:+.2f})' for p in sure], 5)}"
        if sure
        else "no player's share of it can be told from 0"
    )
    drawn = "all" if attrs["every"] else f"{orders} drawn"
    error = float(result.monte_carlo.max())
    extra = (
        ""
        if attrs["every"]
        else f", drawing adds a standard error of up to {error:.2g}"
        if np.isfinite(error)
        else ", too few to say what drawing adds"
    )
    left = (
        f"; {lost} of them pass a set without which a band does not commit and are left out"
        if lost
        else ""
    )
    return f"{head}; {whose} (mean over {drawn} orders{extra}{left}). {_acting_together(result)}"


def _surely(share: Estimate, drawing: float) -> bool:
    """Whether it is not 0, whatever pairs and, by two standard errors, drawn orders move it by."""
    near = share.low if share.value > 0 else share.high
    reach = math.hypot(share.value - near, 2 * drawing)
    return bool(share.sign and abs(share.value) > reach)  # of an unknown error nothing is sure


def _acting_together(result: xr.Dataset) -> str:
    names, found = result.player.values.tolist(), {}
    for i, j in itertools.combinations(range(len(names)), 2):
        one = Estimate.of(result.interaction.values[i, j], result.interaction_interval.values[i, j])
        if one.sign and abs(one.value) > result.attrs["matters"]:
            found[f"{names[i]} and {names[j]}"] = one
    if not found:
        return "No two of them act otherwise together than by themselves, as far as can be told."
    order = sorted(found, key=lambda pair: -abs(found[pair].value))
    return (
        "Together they do more or less than by themselves: "
        f"{first_few([f'{pair} ({found[pair]:+.2f})' for pair in order], 5)}."
    )
