"""Onset on planted profiles: the right layer, and seldom a layer where there is none.

Noise is shared over depth.

python tests/test_onset.py 1000        # the table of error rates
"""

import math
import re
import sys

import numpy as np
import pytest

from dit_lens.measures.onset import onset

LAYERS = 28


def planted(rng, shape, pairs=64, corr=0.8, size=6.0, heavy=False, resamples=300):
    """(profile, bootstrap, layer): pairs' profiles with noise shared over depth, their mean, its
    resamples.

    The mean over pairs has noise of standard deviation 1 in every layer; `size` is a step's height,
    or a ramp's rise per layer (over five layers).
    """
    layer = int(rng.integers(1, LAYERS)) if shape != "ramp" else int(rng.integers(1, LAYERS - 1))
    depth = np.arange(LAYERS)
    truth = {"flat": 0 * depth, "step": depth >= layer, "ramp": np.clip(depth - layer + 1, 0, 5)}[
        shape
    ] * size
    truth = truth * rng.choice([-1, 1])
    draw = (
        rng.standard_t(4, (pairs, LAYERS)) / np.sqrt(2)
        if heavy
        else rng.standard_normal((pairs, LAYERS))
    )
    # neighbours in depth are correlated, as layers that see the same pairs are
    for j in range(1, LAYERS):
        draw[:, j] = corr * draw[:, j - 1] + np.sqrt(1 - corr**2) * draw[:, j]
    sample = truth + draw * np.sqrt(pairs)
    counts = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
    return sample.mean(0), counts @ sample / pairs, layer if shape != "flat" else None


def rates(shape, repeats, seed=0, **kwargs):
    """Shares of repeats: the right layer named, any layer named, the interval holds it, "cannot
    tell", "none".
    """
    out = []
    for i in range(repeats):
        pairs = kwargs.get("pairs", 64)
        p, boot, layer = planted(np.random.default_rng([seed, i]), shape, **kwargs)
        found = onset(p, boot, pairs)
        held = (
            found.interval is not None
            and layer is not None
            and found.interval[0] <= layer <= found.interval[1]
        )
        right, named = layer is not None and found.layer == layer, found.layer is not None
        out.append((right, named, held, found.verdict == "cannot tell", found.verdict == "none"))
    return np.mean(out, 0)


def test_null_profiles_have_no_onset():
    for corr in (0.0, 0.9):
        right, named, *_ = rates("flat", 150, seed=1, corr=corr)
        # 5 % of 150 is 7.5; above 12 once in 20 seeds were it exactly 5 %
        assert named <= 0.08 and right == 0


@pytest.mark.parametrize(("shape", "size"), [("step", 8.0), ("ramp", 7.0)])
def test_the_planted_layer_is_named(shape, size):
    right, _, held, *_ = rates(shape, 100, seed=2, size=size)
    assert right >= 0.95 and held >= 0.95


@pytest.mark.parametrize("layer", [1, 2, 3, 14, 23, 26, 27])
@pytest.mark.parametrize("sign", [-1, 1])
def test_steps_anywhere(layer, sign):
    rng = np.random.default_rng(layer)
    truth = sign * 10.0 * (np.arange(LAYERS) >= layer)
    found = onset(truth + rng.normal(size=LAYERS), truth + rng.normal(size=(400, LAYERS)), pairs=64)
    assert (
        found.verdict == "found"
        and found.layer == layer
        and found.interval[0] <= layer <= found.interval[1]
    )
    assert str(found).startswith(
        f"The profile leaves its early level at layer {layer} (95% interval "
    )
    assert (found.share_last > 0.5) == (layer >= 23)
    assert found.share_interval[0] <= found.share_last <= found.share_interval[1]


def test_without_noise_the_answer_is_exact():
    # gain 1.3 in each of the last five layers
    p = np.clip(np.arange(LAYERS) - 22, 0, 5) * np.log(1.3) + 0.7
    found = onset(p, np.tile(p, (200, 1)), pairs=64)
    assert (found.layer, found.interval) == (23, (23, 23)) and found.share_last == pytest.approx(1)
    flat = 0.7 + 1e-12 * np.arange(LAYERS)  # rounding is no departure
    assert onset(flat, np.tile(flat, (200, 1)), pairs=64).verdict == "none"


def test_a_certain_but_immaterial_drift_does_not_count():
    depth = np.arange(LAYERS)
    p = 0.005 * depth + 10.0 * (depth >= 20)
    assert onset(p, np.tile(p, (200, 1)), pairs=64).layer == 20
    assert onset(p, np.tile(p, (200, 1)), pairs=64, material=0.0).layer == 1


def test_a_profile_that_comes_back_has_none():
    depth, rng = np.arange(LAYERS), np.random.default_rng(0)
    p = 10.0 * ((depth >= 8) & (depth < 14)) + 0.1 * rng.normal(size=LAYERS)
    found = onset(p, p + 0.1 * rng.normal(size=(400, LAYERS)), pairs=64)
    assert found.verdict == "none" and found.layer is None
    assert found.message.startswith(
        "The profile departs at layer 8 but is at its early level in layer "
    )
    assert 14 <= int(found.message.split()[-3].rstrip(":"))
    p += 10.0 * (depth >= 20)
    assert onset(p, p + 0.1 * rng.normal(size=(400, LAYERS)), pairs=64).layer == 20


def test_an_onset_that_could_be_anywhere_is_not_named():
    """A weak step: no layer is named from an interval over most of the depth."""
    said = 0
    for i in range(60):
        p, boot, _ = planted(np.random.default_rng([5, i]), "step", size=3.0)
        found = onset(p, boot, 64)
        if found.layer is not None:
            assert found.interval[1] - found.interval[0] <= LAYERS / 2
        if "anywhere" in found.message:
            said += 1
            assert found.verdict == "cannot tell" and found.message.endswith(
                "over more than half of the depth: no onset can be named with 64 pairs."
            )
    assert said >= 2


@pytest.mark.parametrize("until", [12, LAYERS])
def test_a_departure_that_is_certain_and_too_small(until):
    """It used to read "departs at layer 8 but is at its early level in layer 8"."""
    depth = np.arange(LAYERS)
    p = 0.3 * ((depth >= 8) & (depth < until))
    boot = p + 1e-3 * np.random.default_rng(0).normal(size=(300, LAYERS))
    found = onset(p, boot, 64, unit="steps")
    back = re.search(r"departs at layer 8 but is at its early level in layer (\d+)", found.message)
    assert found.verdict == "none" and (not back or int(back[1]) >= 12)
    if until == LAYERS:
        assert found.message == (
            "The profile departs at layer 8 by less than the 1 step that count, and no larger "
            "departure stays: no onset."
        )


def test_none_when_quiet_and_cannot_tell_when_noisy():
    rng = np.random.default_rng(1)
    p, draws = rng.normal(size=LAYERS), rng.normal(size=(400, LAYERS))
    quiet = onset(0.05 * p, 0.05 * (p + draws), pairs=32)
    assert quiet.verdict == "none" and quiet.pairs_needed is None and math.isnan(quiet.share_last)
    assert quiet.message.endswith("; one of 1 would count): no onset.")
    assert quiet.message.startswith("No layer leaves the early level: every departure is below 0.")
    noisy = onset(p, p + draws, pairs=32)
    assert noisy.verdict == "cannot tell" and noisy.layer is None
    assert noisy.message == (
        "Cannot tell with 32 pairs: a departure of 1 is neither shown nor excluded; "
        f"about {noisy.pairs_needed} pairs would be needed."
    )
    # with as many pairs, and the profile at its early level, it can tell
    shrink = np.sqrt(32 / noisy.pairs_needed)
    assert onset(0 * p, shrink * draws, pairs=noisy.pairs_needed, matters=1.0).verdict == "none"
    assert onset(p, p + draws, pairs=32, matters=0.1).pairs_needed > noisy.pairs_needed


def test_a_weak_step_is_not_called_none():
    *_, none = rates("step", 100, seed=4, size=2.5)
    assert none <= 0.05


def test_few_layers_and_lost_resamples():
    rng = np.random.default_rng(0)
    p = np.array([0.0, 9, 9])
    draws = p + 0.1 * rng.normal(size=(300, 3))
    draws[:20, 1] = np.nan
    assert onset(p, draws, pairs=16).layer == 1


flat = np.zeros(5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: onset(flat, np.zeros((300, 5)), pairs=7),
            "pairs=7 can't be used; expected a whole number of 8 or more, for an onset",
        ),
        (
            lambda: onset(flat[:2], np.zeros((300, 2)), pairs=8),
            "profile has shape (2,); expected [layer], with 3",
        ),
        (
            lambda: onset(flat, np.zeros((300, 4)), pairs=8),
            "boot has shape (300, 4); expected [resample, 5]",
        ),
        (
            lambda: onset(flat, np.zeros((100, 5)), pairs=8),
            "boot has shape (100, 5); expected [resample, 5]",
        ),
        (
            lambda: onset(flat, np.zeros((300, 5)), pairs=8, last=0),
            "last=0 can't be used; expected a whole number of 1 or more",
        ),
        (
            lambda: onset([0, 1, np.nan, 1, 1], np.zeros((300, 5)), pairs=8),
            "The profile is not finite in layers [2]; its bands did not cross within the run "
            "there.",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(text)


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    settings = [
        (64, 0.0, False),
        (64, 0.8, False),
        (64, 0.98, False),
        (16, 0.8, False),
        (32, 0.8, True),
    ]
    print(f"{'profile':7s} size pairs corr heavy | right  named  held   cannot tell  none")
    for shape, size in (
        ("flat", 0.0),
        ("step", 8.0),
        ("step", 6.0),
        ("step", 4.0),
        ("ramp", 8.0),
        ("ramp", 6.0),
    ):
        for pairs, corr, heavy in settings:
            row = [
                f"{x:.3f}"
                for x in rates(shape, repeats, pairs=pairs, corr=corr, heavy=heavy, size=size)
            ]
            print(
                f"{shape:7s} {size:4.1f} {pairs:5d} {corr:4.2f} {heavy!s:5s} | {'  '.join(row)}",
                flush=True,
            )
