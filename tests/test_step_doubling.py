"""The finite-step error of commitment on exact Gaussian data, and that doubling the steps shows it
(E1 in docs/checks.md).
"""

import numpy as np
import pytest
import torch

from dit_lens import HookedDiT
from dit_lens.errors import InvalidValue
from dit_lens.experiments import step_doubling
from dit_lens.groundtruth import commitment_log_snr, ddim_agreement, gaussian

torch.set_num_threads(1)
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def crossing(lam: float, steps: int) -> float:
    """The log SNR at which the sampler's exact agreement passes 1/2."""
    abar = ALPHAS[(np.arange(steps) * (1000 // steps))[::-1]]
    r = np.array([float(ddim_agreement([lam], abar, s)[0]) for s in range(steps)])
    r = np.clip(r, 1e-9, 1 - 1e-9)
    return float(np.interp(0, np.log(r / (1 - r)), np.log(abar / (1 - abar))))


@pytest.mark.parametrize(("lam", "early"), [(4.0, 0.13), (1.0, 0.21), (0.25, 0.35)])
def test_few_steps_decide_earlier_and_the_limit_is_the_continuous_answer(lam, early):
    exact = float(commitment_log_snr(lam))
    once, twice = crossing(lam, 50), crossing(lam, 100)
    assert exact - once == pytest.approx(early, abs=0.01)
    assert abs(2 * twice - once - exact) < 0.15 * early


def test_doubling_on_an_exact_denoiser():
    """In 16 steps the low band's answer is 0.4 early, the high one's 0.8; the limit is E1's."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=8)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = step_doubling(model, pairs=64, steps=16, cut=0.1, resamples=200)
    e1 = commitment_log_snr([4.0, 0.25])
    low, high = found.commitment_interval.sel(run="limit").values.T
    first = found.commitment.sel(run="steps").values
    assert (first < e1 - 0.2).all() and abs(first[1] - crossing(0.25, 16)) < 0.15
    # what is left is of second order (0.17 in the high band)
    assert (low - 0.25 < e1).all() and (e1 < high + 0.25).all()
    assert (
        found.sentence.startswith("The gap by one pass, in log SNR, is +")
        and "in 16 steps" in found.sentence
    )
    assert float(found["shift"]) == pytest.approx(float(found.gap[1] - found.gap[0]))


def test_bad_input():
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    for wrong in ({"pairs": 8}, {"steps": 3}):
        with pytest.raises(InvalidValue, match="; expected 16 pairs or more, for intervals with"):
            step_doubling(model, **wrong)
