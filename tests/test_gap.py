"""`dit-lens gap` on models whose answer is known by construction: the layers it names are the layers that do it."""

import numpy as np
import pytest

from dit_lens import HookedDiT, gap
from dit_lens.groundtruth import ddim_agreement, gaussian


@pytest.mark.parametrize("layer", [1, 4, 7])
@pytest.mark.parametrize("low, high", [(4.0, 0.25), (0.25, 4.0)])
def test_the_layer_that_makes_the_gap_is_named(layer, low, high):
    """E6, early, in the middle, last, and with either sign: an exact denoiser whose one layer makes all of the gap.

    The lens must say "none" here: each band of x0 is the band of x_t times a number, in every layer, which a
    correlation does not see.
    """
    truth = gaussian(lam_low=low, lam_high=high, layers=(layer,), n_layers=8)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    result = gap.measure(model, pairs=24, steps=16, cut=0.1, resamples=200)  # below 0.1 there is the mean alone
    assert result.attrs["onset_layer_divergence"] == layer
    assert result.attrs["onset_verdict_lens"] == "none"

    scheduler = type(truth.scheduler).from_config(truth.scheduler.config)
    scheduler.set_timesteps(16)
    visited = scheduler.alphas_cumprod[scheduler.timesteps]
    exact = np.array([[float(ddim_agreement([lam], visited, r)[0]) for lam in (low, high)] for r in range(16)])
    crossing = [np.interp(0.5, exact[:, b], np.arange(16)) for b in (0, 1)]
    low_end, high_end = result.split_gap_interval.sel(estimator="one_pass", quantity="step").values
    slack = 0.5  # half a step: the exact curve is interpolated, the measured one fitted by a logistic
    assert low_end - slack < crossing[1] - crossing[0] < high_end + slack
    assert np.sign(float(result.split_gap.sel(estimator="one_pass", quantity="step"))) == np.sign(low - high)


def test_without_a_gap_none_is_claimed():
    """The same data variance in both bands: no gap, and nothing in any layer through the lens."""
    truth = gaussian(lam_low=1.0, lam_high=1.0, layers=(3,), n_layers=8)
    result = gap.measure(
        HookedDiT(truth.transformer, scheduler=truth.scheduler), pairs=24, steps=16, cut=0.1, resamples=200
    )
    assert result.attrs["onset_layer_lens"] == -1 == result.attrs["onset_layer_divergence"]
    low, high = result.split_gap_interval.sel(estimator="one_pass", quantity="step").values
    assert low < 0.5 and high > -0.5


def test_bad_input():
    model = HookedDiT(gaussian(n_layers=2, layers=(1,)).transformer)
    for kwargs, text in [
        (dict(pairs=8), "There are 8 pairs; intervals over pairs with class means removed need 16 or more"),
        (dict(steps=3), "steps=3 is too short a run to see anything settle in; expected 4 or more"),
        (dict(cut=0.9), "Band 1 \\(high\\) with inner edges"),
    ]:
        with pytest.raises(ValueError, match=text):
            gap.measure(model, **{"pairs": 16, "steps": 8} | kwargs)
