"""`dit-lens gap` on models whose answer is known by construction: the layers it names are the
layers that do it. "E6" and the others are in docs/checks.md.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from dit_lens import HookedDiT
from dit_lens.experiments import measure_gap
from dit_lens.groundtruth import ddim_agreement, gaussian


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 4, 7])
@pytest.mark.parametrize("low, high", [(4.0, 0.25), (0.25, 4.0)])
def test_the_layer_that_makes_the_gap_is_named(layer, low, high):
    """E6, early, in the middle, last, and with either sign: an exact denoiser whose one layer makes
    all of the gap.

    The lens must say "none" here: each band of x0 is the band of x_t times a number, in every
    layer, which a correlation does not see.
    """
    truth = gaussian(lam_low=low, lam_high=high, layers=(layer,), n_layers=8)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    # below 0.1 there is the mean alone
    result = measure_gap(model, pairs=24, steps=16, cut=0.1, resamples=200)
    assert result.attrs["onset_layer_divergence"] == layer
    assert result.attrs["onset_verdict_lens"] == "none"

    scheduler = type(truth.scheduler).from_config(truth.scheduler.config)
    scheduler.set_timesteps(16)
    visited = scheduler.alphas_cumprod[scheduler.timesteps]
    exact = np.array(
        [[float(ddim_agreement([lam], visited, r)[0]) for lam in (low, high)] for r in range(16)]
    )
    crossing = [np.interp(0.5, exact[:, b], np.arange(16)) for b in (0, 1)]
    low_end, high_end = result.split_gap_interval.sel(estimator="one_pass", quantity="step").values
    # half a step: the exact curve is interpolated, the measured one fitted by a logistic
    slack = 0.5
    assert low_end - slack < crossing[1] - crossing[0] < high_end + slack
    assert np.sign(float(result.split_gap.sel(estimator="one_pass", quantity="step"))) == np.sign(
        low - high
    )


@pytest.mark.slow
def test_without_a_gap_none_is_claimed():
    """The same data variance in both bands: no gap, and nothing in any layer through the lens."""
    truth = gaussian(lam_low=1.0, lam_high=1.0, layers=(3,), n_layers=8)
    result = measure_gap(
        HookedDiT(truth.transformer, scheduler=truth.scheduler),
        pairs=24,
        steps=16,
        cut=0.1,
        resamples=200,
    )
    assert result.attrs["onset_layer_lens"] == -1 == result.attrs["onset_layer_divergence"]
    low, high = result.split_gap_interval.sel(estimator="one_pass", quantity="step").values
    assert low < 0.5 and high > -0.5


def test_bad_input():
    model = HookedDiT(gaussian(n_layers=2, layers=(1,)).transformer)
    for kwargs, text in [
        (
            dict(pairs=8),
            "pairs=8 can't be used; expected a whole number of 16 or more, for intervals",
        ),
        (
            dict(steps=3),
            "steps=3 can't be used; expected a whole number of 4 or more, to see anything",
        ),
        (
            dict(bands="wavelet"),
            "bands=.wavelet. can't be used; expected one of .radial., .dct., .pooling., .eigen.",
        ),
        (dict(cut=0.9), "Band 1 \\(high\\) with inner edges"),
    ]:
        with pytest.raises(ValueError, match=text):
            measure_gap(model, **{"pairs": 16, "steps": 8} | kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cut"), [("dct", 0.05), ("pooling", 0.1), ("eigen", 0.25)])
def test_other_bands_find_the_same_gap(kind, cut):
    """The token mean is the lowest mode of the DCT and of the pyramid, and the leading eigenmode of
    these data.
    """
    truth = gaussian(lam_low=16.0, lam_high=0.0625, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    result = measure_gap(model, pairs=16, steps=12, cut=cut, bands=kind, resamples=200)
    low, _ = result.split_gap_interval.sel(estimator="one_pass", quantity="log_snr").values
    assert low > 0 and result.attrs["bands"] == kind
    assert (
        result.attrs["onset_layer_divergence"] == 1 or kind == "eigen"
    )  # its leading sixth holds ten modes beside the mean
    assert (result.cut_gap.values > 0).all()  # wherever the cut is made, the mean is below it


@pytest.fixture(scope="module")
def with_features():
    """A measurement with everything in it, and what its progress was."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    told: list[tuple[int, int]] = []
    result = measure_gap(
        model,
        pairs=32,
        steps=16,
        cut=0.1,
        feature=lambda x: x.mean((2, 3)),
        resamples=200,
        progress=lambda *done: told.append(done),
    )
    return result, told


def test_progress_ends_with_everything_done(with_features):
    _, told = with_features
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0]
    assert list(done) == sorted(done) and len(told) == 16 + 8  # steps of the twins, and releases


def test_every_outcome_of_the_finished_twins(with_features):
    """On x_t, the predicted x0, the image and a feature of it; clones as well as one pass; the
    spectrum, and the gap against the cut.
    """
    result, _ = with_features
    one = result.sel(quantity="step")
    exact = 4.6  # of 16 steps, by `ddim_agreement` (tests/test_gap.py's first test computes it)
    # images clip what is beyond [0, 1], so no exact answer
    assert (one.image_gap_interval.sel(bound="low") > 0).all()
    for low, high in (one.x_t_gap_interval, *one.split_gap_interval):
        assert low - 0.75 < exact < high + 0.75
    assert (
        result.features_commitment.shape == (2,)
        and np.abs(result.features_commitment - result.split_commitment.sel(split="low")).max()
        < 1.5
    )
    ratio = (
        result.variance_ratio.values - result.agreement_one_pass.values
    )  # equal for an exact denoiser
    assert np.abs(ratio[4:, 1:]).max() < 0.1
    at = int(np.abs(result.cut.values - 0.1).argmin())
    assert float(result.cut_gap[at]) == pytest.approx(
        float(one.split_gap.sel(estimator="one_pass")), abs=1e-6
    )
    assert np.ptp(result.spectrum_commitment.values[1:]) < 1.5 and result.attrs[
        "estimators"
    ].startswith("Commitment by one pass less clones")


def test_a_gap_that_cannot_be_told_says_how_many_pairs_would():
    truth = gaussian(1.3, 1.0, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    result = measure_gap(model, pairs=16, steps=12, cut=0.1, resamples=200)
    value, (low, high) = (
        result[name].sel(estimator="one_pass", quantity="step").values
        for name in ("split_gap", "split_gap_interval")
    )
    needed = int(np.ceil(16 * ((high - low) / 2 / abs(value)) ** 2))
    assert (
        low < 0 < high
        and "With 16 pairs no gap can be told from zero; "
        f"about {needed} would show one of this size"
        in result.headline
    )


def test_images_are_parted_at_the_same_cut():
    """Pixels well inside [0, 1] are the latents halved and shifted, so their gap is the latents' at
    any cut.
    """
    truth = gaussian(0.04, 0.0025, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    result = measure_gap(model, pairs=16, steps=16, cut=0.1, resamples=100)
    assert np.isfinite(result.split_gap).all()
    np.testing.assert_allclose(result.image_gap, result.split_gap, rtol=1e-3, atol=1e-3)


def test_every_variable_is_documented_with_its_dimensions(with_features):
    """In the docstring of `measure_gap` and in the table of docs/gap.md, neither more nor fewer."""
    result, _ = with_features
    page = (Path(__file__).parent.parent / "docs" / "gap.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", page, re.M)
    table = {}
    for names, dims in rows:
        for name in re.findall(r"`(\w+)`", names):
            if dims.startswith("["):
                table[name] = dims
                if "+ interval" in names:
                    table[f"{name}_interval"] = f"{dims[:-1]}, bound]".replace("[, ", "[")
    dims = {name: f"[{', '.join(map(str, value.dims))}]" for name, value in result.items()}
    assert table == dims
    words = set(re.findall(r"`([\w{}]+)`", page[page.index("## What `gap.nc` holds") :]))
    doc = measure_gap.__doc__
    shown = set(re.findall(r"`([\w{}]+)`", doc[doc.index("Returns:") :]))
    onsets = {f"onset_{kind}{{view}}" for kind in ("", "layer_", "verdict_")}
    attrs = {name for name in result.attrs if not name.startswith("onset_")} | onsets
    plain = {name for name in dims if not name.endswith("_interval")} | set(result.coords) | attrs
    assert not plain - words and not plain - shown
    assert {name.format(view="lens") for name in onsets} <= set(result.attrs)
    flat = " ".join(doc.split())
    for name, axes in dims.items():
        if not name.endswith("_interval"):
            assert re.search(rf"`{name}`[^;:.]*?{re.escape(axes)}", flat), name
