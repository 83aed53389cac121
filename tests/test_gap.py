"""`dit-lens gap` on models whose answer is known by construction: the layers it names are the
layers that do it. "E6" and the others are in docs/checks.md.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import dit_lens
from dit_lens import Bands, HookedDiT, twins
from dit_lens.experiments import knock_outs, latents, measure_gap, release_sweep
from dit_lens.experiments.data_gap import as_latents, data_gap
from dit_lens.experiments.gap_sentences import NO_DEPTH
from dit_lens.experiments.layer_profile import VIEWS
from dit_lens.groundtruth import ddim_agreement, gaussian
from dit_lens.pictures.result import Result
from dit_lens.probes import LayerLens
from dit_lens.sampling.run import decode


def abar_of(run):
    return run.scheduler.alphas_cumprod[run.timesteps].numpy()


@pytest.mark.parametrize("low, high", [(4.0, 0.25), (0.25, 4.0), (1.0, 1.0)])
def test_the_gap_is_the_exact_one_and_belongs_to_the_data(low, high):
    """E1 with either sign and without a gap: by clones and by one pass, in every layer's stream,
    and of the data's spectrum, to within the intervals. No claim is made about depth.
    """
    truth = gaussian(lam_low=low, lam_high=high, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    # below 0.1 there is the mean alone
    result = measure_gap(model, pairs=32, steps=16, cut=0.1, seed=1, resamples=300)
    scheduler = type(truth.scheduler).from_config(truth.scheduler.config)
    scheduler.set_timesteps(16)
    visited = scheduler.alphas_cumprod[scheduler.timesteps]
    exact = np.array(
        [[float(ddim_agreement([lam], visited, r)[0]) for lam in (low, high)] for r in range(16)]
    )
    exact = np.clip(exact, 1e-9, 1 - 1e-9)
    odds = np.log(exact / (1 - exact))
    crossing = [np.interp(0, odds[:, b], np.arange(16)) for b in (0, 1)]
    gap, slack = crossing[1] - crossing[0], 0.5  # the fit's own error
    for estimator in ("clones", "one_pass"):
        one = result.sel(estimator=estimator, quantity="step")
        below, above = one.split_gap_interval.values
        assert below - slack < gap < above + slack
        assert below * above < 0 if low == high else np.sign(one.split_gap) == np.sign(low - high)
    below, above = result.data_gap_interval.values
    assert below - slack < gap < above + slack
    below, above = result.beyond_data_interval.values
    assert below < 0 < above and "the spectrum alone may make the gap" in result.attrs["data"]
    in_layers = result.layer_gap_together.sel(view="stream")
    assert (in_layers[:, 0] - slack < gap).all() and (gap < in_layers[:, 1] + slack).all()
    # an exact denoiser's predicted x0 has half of the variance where half is decided
    ends = result.split_variance_interval.values
    assert (ends[:, 0] < 0.5).all() and (0.5 < ends[:, 1]).all()
    assert {result.attrs[f"onset_layer_{view}"] for view in VIEWS} == {-1}
    assert {result.attrs[f"onset_{view}"] for view in VIEWS} == {NO_DEPTH}


def test_patch_and_gap_give_the_same_number_by_one_pass():
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    size = {"pairs": 16, "steps": 8, "cut": 0.1, "seed": 3, "resamples": 200}
    one = measure_gap(model, **size).sel(estimator="one_pass", quantity="step")
    knocked = knock_outs(model, [1], **size)
    assert knocked.attrs["gap"] == float(one.split_gap)
    assert list(knocked.attrs["gap_interval"]) == one.split_gap_interval.values.tolist()


def test_the_spectrum_of_given_images_is_the_data():
    """Images of two variances around the means of two classes, held against a white model: in log
    SNR E1 puts the data's low band where its variance says, and their high band later.
    """
    truth = gaussian(0.5, 0.5, layers=(1,), n_layers=2)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    rng = np.random.default_rng(0)
    high = 0.1 * rng.normal(size=(400, 3, 8, 8))
    low = 0.8 * np.tanh(2 * rng.normal(size=(400, 3, 1, 1))) / 8
    classes = np.arange(400) % 2
    # variance 0.01 in the high band; in the mean's mode, 8 times the mean
    x = high - high.mean((2, 3), keepdims=True) + low
    lam = np.var(8 * low), 0.01
    images = torch.as_tensor((x + 0.3 * (classes - 0.5).reshape(-1, 1, 1, 1)) / 2 + 0.5)
    pair = twins(model, 16, [0] * 16, steps=25)
    split = Bands.radial((8, 8), cut=0.1)
    clones = release_sweep(pair, [latents(split)], range(25))
    known = as_latents(model, images)
    found = data_gap(pair, clones, split, "latents", known, classes.tolist(), resamples=50)
    snr = np.interp(found.data_commitment, np.arange(25), clones.log_snr)
    exact = [ddim_agreement([v], abar_of(pair.run), r)[0] for r in range(25) for v in lam]
    odds = np.array(exact).clip(1e-9, 1 - 1e-9).reshape(25, 2)
    odds = np.log(odds / (1 - odds))
    np.testing.assert_allclose(
        snr, [np.interp(0, odds[:, b], clones.log_snr) for b in (0, 1)], atol=0.25
    )
    np.testing.assert_allclose(found.data_gap_interval, found.data_gap)  # they count as known
    # the class means are no spectrum
    mixed = data_gap(pair, clones, split, "latents", known, resamples=50)
    assert mixed.data_commitment[0] < found.data_commitment[0] - 1
    size = {"pairs": 16, "steps": 8, "cut": 0.1, "resamples": 50}
    for wrong, text in [
        ({"images": images[:, :2]}, "images have shape"),
        ({"images": 3 * images + 2}, "with values from 0 to 1"),
        ({"images": images, "image_labels": [0]}, "There are 1 image_labels for 400 images"),
        ({"image_labels": [0]}, "image_labels are given without images; expected both."),
        ({"null": 5}, "null=5 can't be used; expected 0, for no claim about depth, or 19 or more"),
    ]:
        with pytest.raises(ValueError, match=text):
            measure_gap(model, **size, **wrong)


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
    assert (result.cut_gap.values > 0).all()  # wherever the cut is made, the mean is below it


@pytest.fixture(scope="module")
def with_features():
    """A measurement with a feature, and all else that needs no null models."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=3)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    feature = {"feature": lambda x: x.mean((2, 3))}
    return measure_gap(model, pairs=32, steps=16, cut=0.1, resamples=200, **feature)


@pytest.fixture(scope="module")
def with_everything():
    """A small measurement with all that can be in it, and what its progress was."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    told: list[tuple[int, int]] = []
    size = {"pairs": 16, "steps": 5, "cut": 0.1, "null": 19, "resamples": 50}
    asked = {"feature": lambda x: x.mean((2, 3)), "progress": lambda *done: told.append(done)}
    return measure_gap(model, **size, **asked), told


def test_progress_ends_with_everything_done(with_everything):
    _, told = with_everything
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0]
    assert list(done) == sorted(done) and len(told) == 5 + 4 + 20
    # steps of the twins, releases, and the model with its null models


def test_every_outcome_of_the_finished_twins(with_features):
    """On x_t, the predicted x0, the image and a feature of it; clones as well as one pass; the
    spectrum, and the gap against the cut.
    """
    result = with_features
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
        result[name].sel(estimator="clones", quantity="step").values
        for name in ("split_gap", "split_gap_interval")
    )
    # four of five: the interval's half-width is 1.96 standard errors, and 0.84 are added
    needed = int(np.ceil(16 * ((high - low) / 2 * 2.8 / 1.96 / abs(value)) ** 2))
    assert (
        low < 0 < high
        and "With 16 pairs no gap can be told from zero; if it is as large as measured, "
        f"about {needed} would show it in four of five runs"
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


def test_every_variable_is_documented_with_its_dimensions(with_everything):
    """In the docstring of `measure_gap` and in the table of docs/gap.md, neither more nor fewer."""
    result, _ = with_everything
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gap_of_a_model_in_half_precision(dtype):
    """Half precision rounds the model; what is summed over pairs and places is in float32."""
    gaps = []
    for kind in (torch.float32, dtype):
        truth = gaussian(4.0, 0.25, (1,), 3, sample_size=4)
        model = HookedDiT(truth.transformer, scheduler=truth.scheduler).to(kind)
        found = measure_gap(model, pairs=16, steps=6, cut=0.1, resamples=50)
        gaps.append(found.split_gap.sel(quantity="step").values)
        assert np.isfinite(found.difference_energy).all()
    np.testing.assert_allclose(*gaps, atol=0.3)


def test_the_images_are_what_they_say():
    model = dit_lens.load("digits")
    found = measure_gap(model, pairs=16, steps=4, seed=2, resamples=20)
    lens = LayerLens()
    pair = twins(model, 16, [i % 8 for i in range(16)], steps=4, seed=2, probes=[lens])
    assert found.shown_layer[0] == -1 and found.shown_layer[-1] == 27
    for layer, step in ((-1, 0), (27, 3), (int(found.shown_layer[2]), int(found.shown_step[3]))):
        shown = found.lens_image.sel(shown_layer=layer, shown_step=step).values
        np.testing.assert_array_equal(shown, decode(model, lens.x0(layer, step)[:1])[0])
    ends = {}
    all_at_once = release_sweep(
        pair,
        [latents(Bands.radial((16, 16), cut=0.25))],
        found.release.values.tolist(),
        seed=2,
        each=lambda release, *both: ends.update({release: both}),
    )
    assert list(all_at_once.releases) == found.release.values.tolist()
    for release, both in ends.items():
        for twin, x in zip("AB", both, strict=True):
            shown = found.end.sel(release=release, twin=twin).values
            np.testing.assert_allclose(shown, decode(model, x[: len(shown)]), atol=1e-5)
    assert "end" not in measure_gap(model, pairs=16, steps=4, resamples=20, clones=False)
    assert not {"twins"} & {*found.drop_vars("end").pipe(Result.of).plot.names}
    with pytest.raises(ValueError, match="pairs=0 can't be used"):
        found.plot.twins(pairs=0)
    ax = found.plot.twins(pairs=2)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["twins 1", "twins 2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(r) for r in ends]
    ax = found.plot.lens()
    assert ax.get_yticklabels()[0].get_text() == "embedding"
    plt.close("all")
