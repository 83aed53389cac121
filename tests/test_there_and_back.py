"""There and back: the third estimator against E1, beside the two others."""

import numpy as np
import pytest

import dit_lens
from dit_lens.experiments import latents, there_and_back
from dit_lens.groundtruth import gaussian


def exact(lam, log_snr):
    snr = np.exp(log_snr)
    return lam * snr / (1 + lam * snr)


@pytest.fixture(scope="module")
def truth():
    found = gaussian(4.0, 0.25, (1,), 3, sample_size=4)
    return dit_lens.HookedDiT(found.transformer, scheduler=found.scheduler)


@pytest.mark.parametrize("tie", [{"release": 3}, {"tie": "attention", "g": 0.5, "eta": 1.0}])
def test_twins_that_are_no_independent_runs_are_refused(truth, tie):
    """The mean of a label would take off what tied twins share twice."""
    pair = dit_lens.twins(truth, 8, [0] * 8, steps=6, **tie)
    bands = dit_lens.Bands.radial((4, 4), cut=0.01)
    with pytest.raises(dit_lens.DitLensError, match="expected independent runs, twins with rel"):
        there_and_back(pair, [latents(bands)], [1, 3, 5])
    alone = there_and_back(pair.a, [latents(bands)], [1, 3, 5])
    assert alone.agreement("latents").shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_curve_is_the_exact_one(truth, eta):
    steps, items = 100, 200
    run = dit_lens.sample(truth, [0] * items, seeds=0, steps=steps, eta=eta)
    bands = dit_lens.Bands.radial((4, 4), cut=0.01)  # the token mean, and the rest
    curves = there_and_back(run, [latents(bands)], [40, 60, 75, 85])
    found = curves.agreement("latents")
    for i, release in enumerate(curves.releases):
        for b, lam in enumerate((4.0, 0.25)):
            wanted = float(exact(lam, curves.log_snr[release]))
            modes = bands.sizes[b] * 3
            r = wanted**0.5 if eta == 0 else wanted
            error = (1 - r**2) / (items * modes) ** 0.5
            error *= 2 * r if eta == 0 else 1
            assert abs(found[i, b] - wanted) < 4 * error + 0.015, (release, b)
    assert curves.squared == (eta == 0)
