"""Every sentence, over a grid of extreme results: what was found, in grammar, without "nan"."""

import itertools
import re

import numpy as np
import pytest
import torch
import xarray as xr

from dit_lens import HookedDiT
from dit_lens.experiments import measure_gap
from dit_lens.experiments.coupling_sweep import NEAREST, SENSES, collapse, quality
from dit_lens.experiments.data_gap import data_sentence
from dit_lens.experiments.effects import MATTERS, effects_sentence
from dit_lens.experiments.gap_sentences import NO_DEPTH, headline, pairs_for
from dit_lens.experiments.interchange import interchange_sentence
from dit_lens.experiments.null_profiles import depth_sentence
from dit_lens.experiments.release import difference_sentence
from dit_lens.experiments.shapley import shapley_sentence
from dit_lens.experiments.smallest_set import smallest_sentence
from dit_lens.experiments.step_doubling import doubling_sentence
from dit_lens.groundtruth import gaussian
from dit_lens.measures.estimate import Estimate
from dit_lens.measures.onset import onset
from dit_lens.report import gap as gap_report
from dit_lens.report import knock_outs as cause_report

torch.set_num_threads(1)
BOUND = ["low", "high"]
ESTIMATES = [
    (0.0, -0.1, 0.1),
    (3.0, 2.0, 4.0),
    (-3.0, -4.0, -2.0),
    (0.3, 0.2, 0.4),
    (2.0, -50.0, 60.0),
    (1.0, np.nan, np.nan),
    (np.nan, np.nan, np.nan),
]


def check(sentence: str) -> str:
    """What holds for every sentence."""
    assert sentence[0].isupper() and sentence.endswith("."), sentence
    for wrong in ("nan", "inf", "None", "  ", "+-", " ,", "..", " .", "[]"):
        assert not re.search(rf"(?<![a-z]){re.escape(wrong)}(?![a-z])", sentence), (wrong, sentence)
    assert not re.search(r"(?<![0-9.])1 steps", sentence), sentence
    assert not re.search(r"\b1 (layers|bands)\b(?! move)", sentence.replace("of 1 layers", "")), (
        sentence
    )
    return sentence


@pytest.mark.parametrize("layers", [3, 6, 7, 28])
def test_onsets(layers):
    rng, depth, seen = np.random.default_rng(0), np.arange(layers), set()
    shapes = [
        0 * depth,
        1.0 * (depth >= layers // 2),
        1.0 * (depth >= 1),
        1.0 * (depth == layers - 1),
        depth / layers,
        1.0 * (depth == 1),
        np.sin(depth),
        rng.normal(size=layers).cumsum(),
    ]
    for shape, size, noise, matters in itertools.product(
        shapes, (0.1, 3.0, 1e6), (0.0, 0.02, 1.0), (0.25, 1.0)
    ):
        p = size * shape + noise * rng.normal(size=layers)
        boot = p + noise * rng.normal(size=(200, layers))
        last = max(1, round(layers * 5 / 28))
        found = onset(p, boot, 24, matters=matters, first=-1, unit="steps", last=last)
        said = check(found.message)
        seen.add(found.verdict)
        back = re.search(
            r"departs at layer (-?\d+) but is at its early level in layer (-?\d+)", said
        )
        assert not back or int(back[2]) > int(back[1]), said
        # an onset is in the words if and only if it is in the verdict
        assert ("leaves its early level at layer" in said) == (found.layer is not None)
        if found.layer is not None:
            assert found.interval[1] - found.interval[0] <= layers / 2
            ending = f"the last {last} of" if last > 1 else "the last of"
            assert f"{ending} {layers - 1} layers make" in said
        elif found.verdict == "none":
            assert said.endswith("no onset.")
        else:
            assert said.startswith(("Cannot tell with", "The profile leaves its early level, but"))
    assert seen == {"found", "none", "cannot tell"}


def knocked(effects, n_layers=6, steps=25):
    """A dataset as `knock_outs` gives it."""
    values = np.array(effects, dtype=float)
    layers = np.arange(len(values))
    matters = MATTERS * steps
    value, low, high = values.T
    causes = [int(i) for i in layers if (low[i] > 0 or high[i] < 0) and abs(value[i]) > matters]
    found = xr.Dataset(
        {
            "gap": ("layer", 2.0 + value),
            "effect": ("layer", value),
            "effect_interval": (("layer", "bound"), values[:, 1:]),
        },
        {"layer": layers, "bound": BOUND},
        {
            "gap": 2.0,
            "gap_interval": [1.0, 3.0],
            "causes": causes,
            "matters": matters,
            "done": "knocked out",
            "n_layers": n_layers,
            "steps": steps,
        },
    )
    return found.assign_attrs(sentence=effects_sentence(found))


def ways(*results):
    """Results side by side, as `dit-lens patch` stores them."""
    hows = ("zero", "mean", "resample")
    return cause_report.side_by_side(
        [one.assign_attrs(how=how) for one, how in zip(results, hows, strict=False)]
    )


def patched(layers, value, half_width=0.1):
    shape = (layers, 2, 2, 2)
    dims = ("layer", "site", "window", "band")
    coords = {"layer": np.arange(layers), "band": ["low", "high"], "bound": BOUND}
    coords |= {"site": ["attn_out", "mlp_out"], "window": ["4-7", "8-11"]}
    ends = np.full((*shape, 2), [value - half_width, value + half_width])
    moved = {"move": (dims, np.full(shape, value)), "move_together": ((*dims, "bound"), ends)}
    return xr.Dataset(moved, coords)


@pytest.mark.parametrize("layers", [1, 2, 6, 28])
def test_knock_outs(layers):
    for one, other in itertools.product(ESTIMATES, ESTIMATES):
        found = knocked([one] + [other] * (layers - 1), layers)
        both = ways(found, knocked([other] * layers, layers))
        causes, text = found.attrs["causes"], found.attrs["sentence"]
        assert cause_report.causes(both, "zero") == causes
        assert "0.25 steps, 1% of the run, or more" in text
        assert ("move" in text and "measurably" in text) == (not causes)
        if np.isnan(one[0]):
            assert "Without layer" in text and "does not commit at all." in text
        for onsets in ({}, {"lens": -1}, {"lens": 0, "growth": -1}):
            check(cause_report.against(both, onsets))
        end = max(1, round(layers * 5 / 28))
        late = sum(layer >= layers - end for layer in causes)
        where = f"the last {end} of" if end > 1 else "the last of"
        for move in (0.0, 0.3, -2.0):
            lines = cause_report.sentences(both, patched(layers, move))
            for line in lines:
                check(line)
            if causes:
                told = f"in {where} {layers} layers lie {late} of the {len(causes)} that"
                assert told in lines[-1]
            assert ("by none and high by none" in lines[-2]) == (move <= 0.1)


def test_one_layer_without_which_half_of_the_gap_is_left_is_sure_or_said_not_to_be():
    calm = [(0.0, -0.1, 0.1)] * 5
    for effect, start in (
        ((-2.0, -2.5, -1.5), "Without layer 0 at most half of the gap is left; "),
        ((-1.5, -2.5, -0.5), "Without layer 0 less than half of the gap is left, but not for sure"),
        ((-0.9, -1.0, -0.8), "No single layer takes away half of the gap; "),
    ):
        found = ways(knocked([effect, *calm]))
        assert cause_report.sentences(found, patched(6, 0.0))[-1].startswith(start)


def test_of_a_gap_that_cannot_be_told_from_0_no_half_is_spoken_of():
    found = knocked([(-1.5, -2.5, -0.5)] + [(0.0, -0.1, 0.1)] * 5)
    found.attrs["gap_interval"] = [-0.5, 4.5]
    line = cause_report.sentences(ways(found), patched(6, 0.0))[-1]
    assert line.startswith("The gap can't be told from 0, so nothing is said of half of it")


def test_with_too_few_pairs_no_patch_is_said_to_carry_anything():
    line = cause_report.sufficiency(patched(3, 0.9, np.nan))
    assert line.endswith("no patch has an interval, so none is said to carry anything.")


def test_layer_2_of_6_is_not_among_the_last():
    found = knocked([(0.0, -0.1, 0.1)] * 2 + [(2.0, 1.0, 3.0)] + [(0.0, -0.1, 0.1)] * 3)
    line = cause_report.sentences(ways(found), patched(6, 0.0))[-1]
    assert line == (
        "No single layer takes away half of the gap; in the last of 6 layers lie 0 of the 1 that "
        "move it."
    )


def grid_of(axes, one, other):
    """A dataset of effects over axes, the first cell one estimate, the others another."""
    shape = tuple(len(labels) for labels in axes.values())
    cells = np.full((*shape, 3), other)
    cells[(0,) * len(shape)] = one
    result = xr.Dataset(
        {
            "effect": (tuple(axes), cells[..., 0]),
            "effect_interval": ((*axes, "bound"), cells[..., 1:]),
        },
        {**axes, "bound": BOUND},
        {
            "gap": 2.0,
            "gap_interval": [1.0, 3.0],
            "matters": 0.25,
            "done": "knocked out",
            "estimator": "one pass",
        },
    )
    return effects_sentence(result)


@pytest.mark.parametrize(
    "axes, first",
    [
        ({"layer": [4, 7], "window": ["0-4", "5-9"]}, "4 at steps 0-4"),
        ({"set": ["0-3, 5", "4"]}, "0-3, 5"),
        ({"set": ["0-3"]}, "0-3"),
        ({"end": ["first", "last"], "depth": [1, 4]}, "first 1"),
    ],
)
def test_effects_of_sets_and_windows(axes, first):
    for one, other in itertools.product(ESTIMATES, ESTIMATES):
        said = check(grid_of(axes, one, other))
        sure = (one[1] > 0 or one[2] < 0) and abs(one[0]) > 0.25
        assert (f"{first} ({one[0]:+.2f}" in said) == sure, said
        assert "by one pass" in said
        lost = not np.isfinite(one[0])
        assert (f"{first} a band" in said or f"{first}, " in said) or not lost, said


@pytest.mark.parametrize("players", [2, 3])
@pytest.mark.parametrize("lost, every", [(0, 1), (0, 0), (2, 0), (6, 0)])
def test_shares(players, lost, every):
    names = [str(i) for i in range(players)]
    for one, other, both in itertools.product(ESTIMATES, ESTIMATES[:4], ESTIMATES):
        share = np.array([one] + [other] * (players - 1))
        interaction = np.broadcast_to(both, (players, players, 3))
        result = xr.Dataset(
            {
                "share": ("player", share[:, 0]),
                "share_interval": (("player", "bound"), share[:, 1:]),
                "monte_carlo": ("player", [np.nan if lost else 0.1] * players),
                "interaction": (("one", "other"), interaction[..., 0]),
                "interaction_interval": (("one", "other", "bound"), interaction[..., 1:]),
            },
            {"player": names, "one": names, "other": names, "bound": BOUND},
            {"total": 2.0, "total_interval": [1.0, 3.0], "orders": 6, "lost": lost, "every": every}
            | {"matters": 0.25},
        )
        said = check(shapley_sentence(result))
        if lost == 6:
            assert said.endswith("in every one of 6 orders a band does not commit at some point.")
            continue
        drawing = 0.0 if every else np.nan if lost else 0.1
        reach = [np.hypot(e[0] - (e[1] if e[0] > 0 else e[2]), 2 * drawing) for e in (one, other)]
        sure = [
            e
            for e, r in zip((one, other), reach, strict=True)
            if (e[1] > 0 or e[2] < 0) and abs(e[0]) > max(0.25, r)
        ]
        assert ("no player's share of it can be told from 0" in said) == (not sure or lost > 0)
        acting = (both[1] > 0 or both[2] < 0) and abs(both[0]) > 0.25
        assert ("Together they do more or less" in said) == acting
        assert ("are left out" in said) == (lost > 0)


def test_smallest_sets():
    for (left, low, high), size, gaps in itertools.product(
        ESTIMATES, (0, 1, 3), ([2.0, 1.0], [2.0, np.nan])
    ):
        sure = -0.5 <= low and high <= 0.5
        result = xr.Dataset(
            {"gap": ("tried", gaps), "left": ((), left), "left_interval": ("bound", [low, high])},
            {"tried": ["0", "1"], "bound": BOUND},
            {
                "share": 0.5,
                "size": size,
                "found": ["", "4", "4-6"][min(size, 2)],
                "sure": int(sure),
                "gap": 3.0,
                "gap_interval": [2.0, 4.0],
            },
        )
        unknown = result.assign_attrs(gap_interval=[-1.0, 7.0])
        assert "can't be told from 0, so nothing is said" in check(smallest_sentence(unknown))
        said = check(smallest_sentence(result))
        apart = low > 0.5 or high < -0.5
        assert ("it does not: " in said) == (bool(size) and apart and np.isfinite(left))
        assert ("No set of layers was found" in said) == (size == 0)
        assert ("layer 4, takes 50% of the gap away, or more (" in said) == (size == 1)
        assert ("for sure: " in said and "not for sure" not in said) == (
            bool(size) and sure and np.isfinite(left)
        )


def test_exchanges():
    for (value, low, high), layers, doses in itertools.product(
        ESTIMATES, (1, 3), ([1.0], [0.5, 1])
    ):
        axes = {"layer": range(layers), "head": [-1], "window": ["4-7"], "dose": doses}
        axes |= {"taken": ["low", "high"], "band": ["low", "high"]}
        shape = tuple(len(list(labels)) for labels in axes.values())
        result = xr.Dataset(
            {
                "move": (tuple(axes), np.full(shape, value)),
                "move_together": ((*axes, "bound"), np.full((*shape, 2), (low, high))),
            },
            {**{axis: list(labels) for axis, labels in axes.items()}, "bound": BOUND},
            {"heads": 0},
        )
        said = check(interchange_sentence(result))
        assert ("none surely moves" in said) == (not low > 0)
        assert "head" not in said
        assert (" Sure moves that grow with every dose (0.5, 1): 0 of " in said) == (
            low > 0 and len(doses) > 1
        )


def test_coupling_sweeps():
    for first, last, change in itertools.product(ESTIMATES, repeat=3):
        found = xr.Dataset(
            {
                "gap": (("g", "sense"), [[first[0]] * 3, [last[0]] * 3]),
                "gap_interval": (("g", "sense", "bound"), [[first[1:]] * 3, [last[1:]] * 3]),
                "change": (("g", "sense"), [[0.0] * 3, [change[0]] * 3]),
                "change_interval": (("g", "sense", "bound"), [[(0, 0)] * 3, [change[1:]] * 3]),
            },
            {"g": [0.0, 1.0], "sense": list(SENSES), "bound": BOUND},
        )
        for sense in SENSES:
            check(collapse(found, sense))


def difference(low, high, gap, slope, steps=50):
    bands = np.array([low, high], dtype=float)
    shares = np.array([slope, slope], dtype=float)
    return xr.Dataset(
        {
            "commitment": ("band", bands[:, 0]),
            "commitment_interval": (("band", "bound"), bands[:, 1:]),
            "gap": ((), gap[0]),
            "gap_interval": ("bound", list(gap[1:])),
            "variance": ("band", shares[:, 0]),
            "variance_interval": (("band", "bound"), shares[:, 1:]),
        },
        {"band": ["low", "high"], "bound": BOUND},
        {"of": "one pass less clones", "pairs": 16, "steps": steps, "paired": 1},
    )


def test_estimators_that_agree_are_no_proof_of_an_exact_denoiser():
    right, wrong = (0.5, 0.4, 0.6), (0.3, 0.2, 0.4)
    for low, high, slope in itertools.product(ESTIMATES, ESTIMATES, (right, wrong, ESTIMATES[-1])):
        text = check(difference_sentence(difference(low, high, low, slope)))
        assert "can't be told from an exact one" not in text
        blamed = {
            band
            for band, (value, lo, up) in (("low", low), ("high", high))
            if (lo > 0 or up < 0) and abs(value) > 0.5
        }
        assert ("they differ in" in text) == bool(blamed)
        assert ("by this the denoiser is measurably not the exact one" in text) == (slope is wrong)
    text = difference_sentence(difference((0.1, -1, 1), (0.2, -1, 2.0), (0, -2, 3), wrong))
    assert text == (
        "Commitment by one pass less clones, in steps: low +0.1 [-1.0, +1.0], high +0.2 [-1.0, "
        "+2.0], the gap +0.0 [-2.0, +3.0]; no difference above 0.5 steps (1 % of the run) can be "
        "told with 16 pairs, and one of up to 2.0 steps is not excluded. Where clones commit, the "
        "predicted x0 has this share of the finished image's variance: low 0.30 [0.20, 0.40], high "
        "0.30 [0.20, 0.40]; an exact denoiser's has 0.50, so by this the denoiser is measurably "
        "not the exact one in low, high (the interval lies more than 0.05 from 0.50)."
    )


def test_step_doublings():
    for first, second, shift in itertools.product(ESTIMATES, repeat=3):
        runs = np.array([first, second, second], dtype=float)
        found = xr.Dataset(
            {
                "gap": ("run", runs[:, 0]),
                "gap_interval": (("run", "bound"), runs[:, 1:]),
                "shift": ((), shift[0]),
                "shift_interval": ("bound", list(shift[1:])),
            },
            attrs={"steps": 50},
        )
        text = check(doubling_sentence(found))
        known = np.isfinite([*first, *second, *shift]).all()
        assert ("can be compared" in text) == (not known)


def test_gaps():
    """The headline and all that is printed below it."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = measure_gap(model, pairs=16, steps=8, cut=0.1, resamples=200)
    for one, clones, vae in itertools.product(ESTIMATES, ESTIMATES, (0, 1)):
        made = found.copy(deep=True)
        for kind in ("split", "band", "image"):
            made[f"{kind}_gap"][:] = np.array([[one[0]], [clones[0]]])
            made[f"{kind}_gap_interval"][:] = np.array([[one[1:]], [clones[1:]]])
        for of in ("gap", "band"):
            made[f"estimator_{of}_difference"] = one[0] - clones[0]
            made[f"estimator_{of}_difference_interval"][:] = np.array(one[1:]) - clones[2]
        if np.isnan(one[0]):
            made["cut_gap"][:] = np.nan
            made["x_t_gap"][:] = np.nan
        made.attrs["vae"] = vae
        made.attrs["headline"] = headline(made)
        for name, value in (("data_gap", clones), ("beyond_data", one)):
            made[name] = value[0]
            made[f"{name}_interval"][:] = np.array(value[1:])
        said = made.attrs["data"] = data_sentence(made)
        assert ("does not explain" in said) == (
            np.isfinite([clones[0], *one]).all() and (one[1] > 0 or one[2] < 0)
        )
        lines = gap_report.sentences(made)
        for line in lines:
            check(line)
        known = np.isfinite(clones).all()
        assert any("on the image" in line for line in lines) == bool(vae and known)
        # the headline's verdict is the clones'
        text = made.attrs["headline"]
        assert ("frequencies commit first" in text) == bool(known and clones[1] * clones[2] > 0)
        assert ("no gap can be given" in text) == bool(np.isnan(clones[0]))
        assert lines.count(NO_DEPTH) == 1  # and nothing else is said about depth
        assert not any("early level" in line or "of the change" in line for line in lines)
    wide = found.copy(deep=True)
    wide["layer_gap_interval"][:] = [-99, 99]
    assert any("is longer than the run" in line for line in gap_report.sentences(wide))
    assert pairs_for(Estimate(1.0, -0.5, 2.5), 16) == 16 * 1.5**2 * (2.8 / 1.96) ** 2 // 1 + 1
    noted = found.assign_attrs(
        notes="One pass: The interval of band low is cut off at the first release."
    )
    assert "One pass: The interval of band low is cut off" in " ".join(gap_report.sentences(noted))


@pytest.mark.parametrize("layers", [2, 6, 28])
def test_depth(layers):
    """An onset is named only if null models rarely change so late, and it is in the last layers."""
    last = max(1, round(layers * 5 / 28))
    for own, more, onset_layer in itertools.product(
        (0.0, 0.9, np.nan), (0, 1, 19), (-1, 0, layers - 1)
    ):
        p = (1 + more) / 20 if np.isfinite(own) else np.nan
        found = xr.Dataset(
            {
                "late_share": ("profile", [own]),
                "null_p": ("profile", [p]),
                "null_late_share": (("profile", "null"), np.zeros((1, 19))),
                "null_profile": (("profile", "null", "layer"), np.zeros((1, 19, layers + 1))),
            },
            {"profile": ["lens"], "null": np.arange(19), "layer": np.arange(-1, layers)},
            {
                "onset_lens": "The profile leaves its early level somewhere.",
                "onset_layer_lens": onset_layer,
                "null_pairs": 16,
                "null_steps": 12,
            },
        )
        said = check(depth_sentence("lens", "Stream read by the last layer", found))
        named = p == 0.05 and onset_layer >= layers - last
        assert ("leaves its early level" in said) == named
        assert ("no claim about depth" in said) == (not p <= 0.05)


def test_quality():
    for low, high, read in itertools.product(
        [(1.0, 1.0, 1.0), (0.5, 0.4, 0.6), (2.0, 0.5, 3.0), (np.nan,) * 3], repeat=3
    ):
        bands = np.array([[(1.0, 1.0, 1.0)] * 2, [low, high]])
        found = xr.Dataset(
            {
                "energy": (("g", "band"), bands[..., 0]),
                "energy_interval": (("g", "band", "bound"), bands[..., 1:]),
                "read": ("g", [0.8, 0.3]),
                "read_interval": (("g", "bound"), [[0.7, 0.9], [0.2, 0.4]]),
                "read_change_interval": (("g", "bound"), [[0, 0], [read[1] - 1, read[2] - 1]]),
            },
            {"g": [0.0, 2.0], "band": ["low", "high"], "bound": BOUND},
            {"reader": NEAREST},
        )
        said = check(quality(found))
        moved = any(e[1] > 1 or e[2] < 1 for e in (low, high, read))
        assert ("pushed off its distribution at g = 2" in said) == moved
