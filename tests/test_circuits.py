"""Causes that act together, on models of which every effect is computed and not sampled
(`dit_lens.groundtruth.exact_agreement`); `python tests/checks.py --only causes` does it at length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

import dit_lens
from dit_lens import HookedDiT
from dit_lens.errors import InvalidValue
from dit_lens.experiments import (
    cumulative,
    interchange,
    knock_outs,
    knocked_out,
    shapley,
    smallest_set,
)
from dit_lens.experiments.ablation import others
from dit_lens.experiments.shapley import drawn_orders, monte_carlo, shapley_sentence
from dit_lens.groundtruth import GroundTruth, exact_agreement, gaussian, redundant, relayed
from dit_lens.groundtruth.closed_forms import sampler_agreement
from dit_lens.measures import Agreement
from dit_lens.measures.commitment import commitment_draws
from dit_lens.patching import Patch, grid, sweep, tiles

torch.set_num_threads(1)
SHORT = {"pairs": 16, "steps": 10, "cut": 0.1, "resamples": 200}


def exact_gap(
    truth: GroundTruth, steps: int, removed: Sequence[int] = (), window: range | None = None
) -> float:
    """The gap that any number of pairs would give, in steps, by the same fit."""
    agreement, log_snr = exact_agreement(truth, steps, removed, window)
    xy = np.sqrt(agreement)[:, None].repeat(8, 1)
    stats = Agreement(xy, np.ones_like(xy), np.ones_like(xy))
    low, high = commitment_draws(stats, range(steps), log_snr, squared=True, resamples=1)[0]
    return float(high - low)


def opened(truth: GroundTruth) -> HookedDiT:
    return HookedDiT(truth.transformer, scheduler=truth.scheduler)


class Found(NamedTuple):
    """One layer of one model: the exact effect of taking it out, the measured one with its
    interval, whether it was named, and whether it was a decoy.
    """

    kind: str
    exact: float
    value: float
    low: float
    high: float
    named: bool
    decoy: bool
    matters: float


def random_circuit(seed: int) -> tuple[str, GroundTruth]:
    """A model drawn at random: noisy neutral layers and so an inexact denoiser, causes that oppose
    each other, that stand in for each other, or that act through each other.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 7))
    a, b, c = sorted(rng.permutation(n)[:3].tolist())
    lam = (4.0, 0.25) if rng.random() < 0.5 else (0.25, 4.0)
    kind = ("noisy", "opposite", "redundant", "relayed")[seed % 4]
    if kind == "redundant":
        return kind, redundant(*lam, (a, b), n)
    if kind == "relayed":
        return kind, relayed(*lam, (a, b), n, float(rng.uniform(0.2, 0.8)))
    shares = [1.0] if kind == "noisy" else [1.6, -0.6]
    layers = [a] if kind == "noisy" else [a, c]
    noise = float(rng.uniform(0.03, 0.1))
    options = {"decoys": [b], "noise": noise, "seed": seed, "sample_size": 4}
    return kind, gaussian(*lam, layers, n, shares=shares, **options)


def found_causes(models: int, pairs: int = 24, steps: int = 16) -> list[Found]:
    """Knock-outs of every layer of random models, beside the exact effects."""
    rows = []
    for seed in range(models):
        kind, truth = random_circuit(seed)
        decoys = truth.answer.get("decoys", [])
        whole = exact_gap(truth, steps)
        found = knock_outs(
            opened(truth), pairs=pairs, steps=steps, cut=0.1, seed=seed, resamples=300
        )
        for layer in found.layer.values.tolist():
            one = found.sel(layer=layer)
            rows.append(
                Found(
                    kind,
                    exact_gap(truth, steps, [layer]) - whole,
                    float(one.effect),
                    *one.effect_interval.values.tolist(),
                    layer in found.attrs["causes"],
                    layer in decoys,
                    found.attrs["matters"],
                )
            )
    return rows


# the truth itself


@pytest.mark.slow
def test_the_exact_gap_is_what_many_pairs_give():
    """And that of a model without a layer is what knocking the layer out of it gives."""
    truth = gaussian(4.0, 0.25, (1,), 3, noise=0.1, sample_size=4)
    found = knock_outs(opened(truth), pairs=192, steps=12, cut=0.1, resamples=200)
    low, high = found.attrs["gap_interval"]
    assert low < exact_gap(truth, 12) < high and high - low < 0.8
    for layer in range(3):
        exact = exact_gap(truth, 12, [layer]) - exact_gap(truth, 12)
        low, high = found.effect_interval.sel(layer=layer).values
        assert low - 0.02 <= exact <= high + 0.02, layer
    assert abs(exact_gap(truth, 12, [1])) < 1e-4  # noise is the same in both bands
    assert exact_gap(truth, 12, [0]) != exact_gap(truth, 12)


def test_the_exact_agreement_of_an_exact_denoiser_is_that_of_the_formula():
    """Measured on the model, against what the data's spectrum alone gives."""
    truth = gaussian(4.0, 0.25, (1,), 2, sample_size=4)
    found, log_snr = exact_agreement(truth, 20)
    signal = np.append(1 / np.sqrt(1 + np.exp(-log_snr)), 1.0)
    formula = sampler_agreement([4.0, 0.25], signal, np.sqrt(1 - signal**2))[1]
    assert np.allclose(found, formula[:-1], atol=1e-3)


def test_decoys_and_empty_layers_are_inert_and_causes_are_not():
    truth = gaussian(4.0, 0.25, (1,), 4, decoys=[2], sample_size=4)
    whole = exact_gap(truth, 12)
    effects = [exact_gap(truth, 12, [layer]) - whole for layer in range(4)]
    assert np.allclose(effects, [0, -whole, 0, 0], atol=1e-4) and whole > 2


def test_either_of_two_suffices():
    truth = redundant()
    whole = exact_gap(truth, 12)
    assert whole == pytest.approx(
        exact_gap(gaussian(4.0, 0.25, (1,), 2, sample_size=4), 12), rel=1e-3
    )
    for removed, left in (((1,), whole), ((3,), whole), ((1, 3), 0.0)):
        assert exact_gap(truth, 12, removed) == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: redundant(layers=(3, 1)), "layers is [3, 1]; expected two, the earlier one first"),
        (lambda: relayed(direct=2), "direct=2 can't be used; expected a finite number from 0 to 1"),
        (
            lambda: gaussian(layers=(1,), noise=1.0),
            "noise=1.0 can't be used; expected a finite number from 0 to 0.99",
        ),
    ],
)
def test_what_cannot_be_built(call, text):
    with pytest.raises(InvalidValue) as caught:
        call()
    assert str(caught.value).startswith(text)


# ways of knocking out


def test_what_comes_in_place_of_an_addition():
    model = dit_lens.load("digits")
    run = dit_lens.sample(model, [3, 3, 7, 7], steps=2)
    name = "blocks.5.hook_mlp_out"
    without = knocked_out(run, [5], "mlp", how="mean")
    own = run.activations(name, step=0)  # the first step's inputs are the same
    assert torch.allclose(
        without.activations(name, step=0), own.mean(0, keepdim=True).expand_as(own)
    )
    swapped = knocked_out(run, [5], "mlp", how="resample")
    assert torch.equal(swapped.activations(name, step=0), own[[1, 0, 3, 2]])
    assert not knocked_out(run, [5], "mlp").activations(name, step=0).any()


def test_guided_halves_are_replaced_each_by_its_own():
    run = dit_lens.sample(dit_lens.load("digits"), [3, 3, 7], steps=1, guidance=2.0)
    name = "blocks.5.hook_mlp_out"
    own = run.activations(name, step=0)
    found = knocked_out(run, [5], "mlp", how="mean").activations(name, step=0)
    halves = torch.cat([half.mean(0, keepdim=True).expand_as(half) for half in own.chunk(2)])
    assert torch.allclose(found, halves, atol=1e-6)


def test_a_reading_that_stops_early_leaves_nothing_for_the_next_pass():
    truth = relayed(n_layers=5)
    run = dit_lens.sample(
        HookedDiT(truth.transformer, scheduler=truth.scheduler), [0, 0], steps=4, eta=1
    )
    direct = knocked_out(run, [1], direct=True)
    want = direct.activations("resid_post", 4, step=2)
    direct.activations("resid_post", 2, step=1)  # ends before what is missing is taken off
    assert torch.equal(direct.activations("resid_post", 4, step=2), want)
    direct.activations("resid_post", 2, step=1)
    assert torch.equal(direct.replay(1).latents, direct.latents)


def test_another_item_is_never_the_same_and_has_the_same_label():
    labels = torch.tensor([0, 1, 0, 1, 1, 2, 0, 2])
    for seed in range(20):
        order = others(labels, seed)
        assert sorted(order.tolist()) == list(range(8))
        assert (order != torch.arange(8)).all() and torch.equal(labels[order], labels)


def test_a_window_leaves_the_steps_before_it_alone_and_ends():
    """Bit for bit the run before it; within it what the whole knock-out does at the same x_t."""
    run = dit_lens.sample(dit_lens.load("digits"), [3], steps=5)
    part = knocked_out(run, [5], window=range(2, 4))
    assert torch.equal(part.latents[:3], run.latents[:3])
    acted = [bool(part.activations("blocks.5.hook_attn_out", step=s).any()) for s in range(5)]
    assert acted == [True, True, False, False, True]
    free = run.replay(4, latents=part.latents[4])
    assert torch.equal(free.latents[-1], part.latents[-1])
    assert torch.equal(part.replay(0).latents, part.latents)


# effects, where both parts are known


@pytest.mark.parametrize("direct", [0.0, 0.3, 1.0])
def test_direct_and_mediated_parts_are_those_of_the_construction(direct):
    """What goes straight to the output, and what a later layer hands on."""
    truth = relayed(direct=direct, n_layers=4, layers=(1, 2))
    found = knock_outs(opened(truth), [1, 2], direct=True, **SHORT | {"pairs": 96})
    whole = exact_gap(truth, 10)
    # taking the direct part off leaves what the other model leaves without its relay
    left = exact_gap(relayed(direct=1 - direct, n_layers=4, layers=(1, 2)), 10, [2])
    one = found.sel(layer=1)
    for name, exact in (("direct_effect", left - whole), ("mediated_effect", -left)):
        low, high = one[f"{name}_interval"].values
        assert low - 0.05 <= exact <= high + 0.05, (name, exact, low, high)
        assert abs(float(one[name]) - exact) < 0.35
    # all that the relay does is its own
    assert abs(float(found.mediated_effect.sel(layer=2))) < 1e-3
    assert float(found.direct_effect.sel(layer=2)) == pytest.approx(
        float(found.effect.sel(layer=2)), abs=1e-3
    )


@pytest.mark.slow
def test_redundant_causes_are_missed_one_by_one_and_found_together():
    truth = redundant(n_layers=4, layers=(1, 2))
    model = opened(truth)
    alone = knock_outs(model, **SHORT)
    assert alone.attrs["causes"] == [] and "Effects of up to" in alone.sentence
    both = knock_outs(model, [[1, 2], [0, 3]], **SHORT)
    assert both.set.values.tolist() == ["1-2", "0, 3"]
    assert both.sentence.startswith("Knocked out one by one, 1 of 2 sets moves the gap of ")
    assert "1-2 (-" in both.sentence and "causes" not in both.attrs
    few = smallest_set(model, **SHORT)
    assert few.found == "1-2" and "The smallest set found that takes 50%" in few.sentence
    split = shapley(model, **SHORT, orders=6)
    share = split.share.values
    assert np.allclose(share[[0, 3]], 0, atol=1e-3) and share[1] == pytest.approx(
        share[2], abs=1e-3
    )
    assert share.sum() == pytest.approx(split.total, abs=1e-9) and split.sum_error < 1e-9
    assert float(split.interaction[1, 2]) == pytest.approx(split.total, abs=1e-3)
    assert "1 and 2 (-" in split.sentence


def test_shares_add_up_in_every_order_and_sets_can_be_players():
    truth = gaussian(4.0, 0.25, (0, 2), 3, shares=[1.6, -0.6], noise=0.1, sample_size=4)
    split = shapley(opened(truth), [[0, 1], [2]], **SHORT)
    assert split.player.values.tolist() == ["0-1", "2"] and split.attrs["every"] == 1
    sums = split.marginal.sum("player").values
    assert np.allclose(sums, split.total, atol=1e-9) and len(sums) == 2
    assert (split.monte_carlo == 0).all()
    exact = [exact_gap(truth, 10, removed) for removed in ((), (0, 1), (2,), (0, 1, 2))]
    first = ((exact[1] - exact[0]) + (exact[3] - exact[2])) / 2
    low, high = split.share_interval.values[0]
    assert low < first < high


def test_orders_are_drawn_with_their_reverse_or_all_gone_through():
    orders, every = drawn_orders(6, 9, 0)
    assert len(orders) == 10 and not every
    assert all(a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    assert len({tuple(order) for order in orders}) == 10
    assert drawn_orders(3, 6, 0)[1] and len(drawn_orders(3, 6, 0)[0]) == 6
    spread = np.random.default_rng(0).normal(size=(4000, 2))
    assert np.allclose(monte_carlo(spread, False), 1 / 4000**0.5, rtol=0.1)
    assert np.isnan(monte_carlo(spread[:2], False)).all()


def test_sets_without_which_nothing_commits_do_not_become_numbers(monkeypatch):
    """A layer whose loss destroys the model has no share, and no set that holds it is found."""
    from dit_lens.experiments import knocked_gap

    plain = knocked_gap.KnockedGap.all

    def destroyed(self, cells, *told):
        return [
            np.full_like(found, np.nan) if {0, 2} <= set(layers) else found
            for (layers, *_), found in zip(cells, plain(self, cells, *told), strict=True)
        ]

    monkeypatch.setattr(knocked_gap.KnockedGap, "all", destroyed)
    model = opened(gaussian(4.0, 0.25, (1,), 3, sample_size=4))
    with pytest.raises(InvalidValue) as caught:
        shapley(model, [0, 2], **SHORT)
    assert str(caught.value).startswith(
        "Without layers 0, 2 a band does not commit, so there is no"
    )
    summed = cumulative(model, [1, 3], **SHORT)
    assert np.isnan(summed.effect.sel(depth=3)).all()
    assert "Without sets first 3, last 3 a band does not commit at all." in summed.sentence
    few = smallest_set(model, **SHORT)
    assert few.found == "1"


def test_orders_that_pass_through_a_destroyed_model_are_left_out_and_said(monkeypatch):
    from dit_lens.experiments import knocked_gap

    plain = knocked_gap.KnockedGap.all

    def destroyed(self, cells, *told):
        return [
            np.full_like(found, np.nan) if set(layers) == {0, 2} else found
            for (layers, *_), found in zip(cells, plain(self, cells, *told), strict=True)
        ]

    monkeypatch.setattr(knocked_gap.KnockedGap, "all", destroyed)
    split = shapley(opened(gaussian(4.0, 0.25, (1,), 3, sample_size=4)), **SHORT)
    assert split.attrs["lost"] == 2 and split.attrs["orders"] == 6
    assert float(split.share.sum()) == pytest.approx(split.total, abs=1e-9)
    assert "2 of them pass a set without which a band does not commit" in split.sentence
    lost = split.assign_attrs(lost=6)
    assert "no shares can be given" in shapley_sentence(lost)


def test_windows_are_those_of_the_construction():
    """A layer that opposes another at every step, in each third of the run."""
    truth = gaussian(4.0, 0.25, (0, 2), 3, shares=[1.6, -0.6], sample_size=4)
    found = knock_outs(opened(truth), [0, 1, 2], windows=2, **SHORT | {"pairs": 96})
    assert found.effect.dims == ("layer", "window")
    assert found.window.values.tolist() == ["0-4", "5-9"]
    whole = exact_gap(truth, 10)
    for layer in (0, 1, 2):
        for window in tiles(0, 10, 2):
            exact = exact_gap(truth, 10, [layer], window) - whole
            text = f"{window[0]}-{window[-1]}"
            low, high = found.effect_interval.sel(layer=layer, window=text).values
            assert low - 0.05 <= exact <= high + 0.05, (layer, window, exact, low, high)
    assert "at steps 5-9" in found.sentence and "cells (layer and window)" in found.sentence


def test_cumulative_knock_outs_are_sets():
    model = opened(gaussian(4.0, 0.25, (1,), 3, sample_size=4))
    found = cumulative(model, [2], **SHORT)
    sets = knock_outs(model, [[0, 1], [1, 2]], **SHORT)
    assert np.array_equal(found.gap.values.ravel(), sets.gap.values)


# bands exchanged between twins


def test_a_dose_is_that_part_of_the_change():
    pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=1, steps=3)
    seen = [
        sweep(pair.a, pair.b, [Patch("attn_out", 9, range(2, 3), dose=dose)], lambda x: x)
        for dose in (0, 0.5, 1)
    ]
    none, half, whole = (each.outcome.values[0] for each in seen)
    assert np.array_equal(none, seen[0].outcome_target.values)
    assert not np.array_equal(half, none) and np.allclose(half, (none + whole) / 2, atol=0.02)
    plain = sweep(pair.a, pair.b, grid([9], "attn_out", [range(2, 3)]), lambda x: x)
    assert np.array_equal(whole, plain.outcome.values[0])
    assert str(Patch("attn_out", 9, dose=0.5)).endswith("dose 0.5")


def test_a_band_taken_from_a_twin_moves_that_band_alone():
    """The exact denoiser does not mix bands: the stream's low band says nothing of the high."""
    model = opened(gaussian(4.0, 0.25, (1,), 2, sample_size=4))
    found = interchange(
        model, [1], windows=[range(5, 6)], doses=(0.5, 1), release=3, pairs=8, steps=8, cut=0.1
    )
    move = found.move.isel(layer=0, head=0, window=0)
    for taken, other in (("low", "high"), ("high", "low")):
        own = move.sel(taken=taken, band=taken).values
        assert np.allclose(move.sel(taken=taken, band=other), 0, atol=1e-3)
        assert (np.abs(own) > 0.01).all() and abs(own[1]) > abs(own[0])
    assert found.move_together.sizes["bound"] == 2 and "from twin A" in found.sentence


def test_heads_are_exchanged_one_by_one():
    model = dit_lens.load("digits")
    found = interchange(model, [9], heads=True, windows=1, pairs=8, steps=3, release=1)
    assert found["head"].values.tolist() == [0, 1, 2, 3]
    assert len(np.unique(found.move.values)) == found.move.size


@pytest.mark.slow
def test_effects_are_held_by_their_intervals_and_decoys_are_not_blamed():
    rows = found_causes(4)
    assert all(row.low - 0.3 <= row.exact <= row.high + 0.3 for row in rows)
    assert not any(row.named for row in rows if row.decoy)
    assert all(row.named for row in rows if abs(row.exact) > 2)
    assert not any(row.named for row in rows if row.kind == "redundant")
