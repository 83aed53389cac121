"""Attributes against what is known: twins by construction, a model that decides each attribute at a
known step, the mixture E3; and the command as a user meets it.
"""

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_dit
from diffusers import DDIMScheduler
from scipy.optimize import brentq
from scipy.stats import norm

import dit_lens
from dit_lens import HookedDiT
from dit_lens.commands import main
from dit_lens.commands.attributes import find
from dit_lens.errors import DitLensError, InvalidValue
from dit_lens.experiments import attributes
from dit_lens.experiments.attributes import Categories, headline
from dit_lens.groundtruth import mixture_agreement, portraits, sides, two_scale
from dit_lens.measures import Agreement, curve, fit_commitment
from dit_lens.report import attributes as report
from dit_lens.report.stored import read as read_stored
from dit_lens.report.stored import show

torch.set_num_threads(1)
STEPS = np.linspace(-5, 5, 51)
"""log SNR of a run, its middle at step 25."""


def columns(names):
    """Latents that are the categories themselves, [n, attribute]."""

    def read(x):
        return {name: x[:, i].long() for i, name in enumerate(names)}

    return Categories("attribute", lambda x: x, None, read, tuple(names))


def kappa(a, b, labels):
    """Cohen's kappa of each column, as the curves have it."""
    return curve(columns([str(i) for i in range(a.shape[1])]).compare(a, b, labels))


def drawn(rng, labels, marginals):
    """A category for each label's marginals [label, attribute, category]; [pair, attribute]."""
    edges = marginals[labels].cumsum(-1)
    return torch.tensor((rng.random(edges.shape[:2])[..., None] > edges).sum(-1))


# Agreement beyond chance.


@pytest.mark.parametrize("categories", [2, 3, 6])
def test_twins_that_are_one_agree_fully_and_strangers_not_at_all(categories):
    """Also where labels prefer values of their own: what the label gives is no agreement."""
    rng, labels = np.random.default_rng(0), np.arange(2_000) % 8
    # columns are independent, and cost less than pairs
    marginals = rng.dirichlet(np.full(categories, 0.7), size=(8, 20))
    a, b = (drawn(rng, labels, marginals) for _ in range(2))
    assert (a == b).double().mean() > 1 / categories + 0.1
    assert kappa(a, a, labels) == pytest.approx([1] * 20)
    assert kappa(a, b, labels).mean() == pytest.approx(0, abs=0.02)


def test_it_is_cohens_kappa():
    """By hand, of one label: (observed - expected) / (1 - expected)."""
    a = torch.tensor([[0], [0], [1], [1], [2], [2], [0], [1]])
    b = torch.tensor([[0], [1], [1], [1], [2], [0], [0], [2]])
    p, q = (np.bincount(x[:, 0], minlength=3) / 8 for x in (a, b))
    cov = (a == b).double().mean() - p @ q
    variance = 1 - (p @ p + q @ q) / 2
    assert kappa(a, b, [0] * 8)[0] == pytest.approx(float(cov / variance))


def test_half_of_the_pairs_being_one_is_an_agreement_of_a_half():
    rng, labels = np.random.default_rng(1), np.arange(2_000) % 4
    marginals = rng.dirichlet(np.ones(4), size=(4, 20))
    a, b = (drawn(rng, labels, marginals) for _ in range(2))
    one = torch.tensor(rng.random(a.shape) < 0.5)
    assert kappa(a, torch.where(one, a, b), labels).mean() == pytest.approx(0.5, abs=0.02)


def test_names_of_categories_do_not_matter():
    rng = np.random.default_rng(2)
    a, b = (torch.tensor(rng.integers(0, 3, (60, 1))) for _ in range(2))
    renamed = torch.tensor([-1, 10**9, 7])
    assert kappa(a, b, [0] * 60) == pytest.approx(kappa(renamed[a], renamed[b], [0] * 60))


def test_what_the_label_decides_has_no_commitment():
    rng, labels = np.random.default_rng(3), np.arange(32) % 4
    fixed, free = torch.tensor(labels)[:, None], torch.tensor(rng.integers(0, 2, (32, 1)))
    a = torch.cat([fixed, free], 1)
    stats = Agreement.stack([columns(["fixed", "free"]).compare(a, a, labels)] * 3)
    found = fit_commitment(stats, [0, 1, 2], [0.0, 1, 2], names=["fixed", "free"], what="attribute")
    assert np.isnan(found.commitment.values).all()
    assert str(found.reason.values[0]) == (
        "Attribute fixed does not vary once the mean is removed, so its agreement is undefined."
    )
    assert str(found.reason.values[1]).startswith(
        "The agreement of attribute free goes from 1.00 at the first release to 1.00"
    )


# Commitment at known steps.


def planted(rng, pairs, labels, centres, releases, categories=3):
    """Clones of a model that decides attribute k at log SNR centres[k]: a pair shares it with the
    chance that its agreement is, the same pairs at every release.
    """
    number = np.arange(pairs) % labels
    marginals = rng.dirichlet(np.full(categories, 3.0), size=(labels, len(centres)))
    a, luck = drawn(rng, number, marginals), rng.random((pairs, len(centres)))
    stats = []
    for release in releases:
        shared = torch.tensor(luck < 1 / (1 + np.exp(-(STEPS[release] - np.array(centres)))))
        b = torch.where(shared, a, drawn(rng, number, marginals))
        stats.append(columns([f"a{i}" for i in range(len(centres))]).compare(a, b, number))
    return Agreement.stack(stats)


def test_planted_commitments_are_found():
    releases = [2, 10, 16, 21, 25, 29, 34, 40, 48]
    stats = planted(np.random.default_rng(0), 4000, 8, [-2.0, 0.0, 2.0], releases)
    found = fit_commitment(stats, releases, STEPS, resamples=50).sel(quantity="step")
    assert found.commitment.values == pytest.approx([15, 25, 35], abs=0.7)


@pytest.mark.slow
def test_the_intervals_hold_the_truth():
    releases, hits = [4, 10, 16, 20, 25, 30, 36, 44], []
    for repeat in range(60):
        rng = np.random.default_rng(repeat)
        centres = rng.uniform(-1, 1, 8)
        stats = planted(rng, 48, 8, centres, releases)
        ends = fit_commitment(stats, releases, STEPS, resamples=300).commitment_interval.sel(
            quantity="log_snr"
        )
        low, high = ends.values.T
        hits += list((low <= centres) & (centres <= high))
    assert 0.91 <= np.mean(hits) <= 0.985


# The mixture of E3.


@pytest.fixture(scope="module")
def mixture():
    truth = two_scale(n_layers=2, low_layer=0, high_layer=1)
    return truth, HookedDiT(truth.transformer, scheduler=truth.scheduler)


@pytest.fixture(scope="module")
def bits(mixture):
    """The global bit and the sixteen tokens' bits of finished latents, as attributes."""
    truth, _ = mixture

    def read(x):
        low, high = sides(x, truth)
        return {"low": low, **{f"high{i}": high[:, i] for i in range(high.shape[1])}}

    return Categories("bits", lambda x: x, None, read, ("low", *(f"high{i}" for i in range(16))))


@pytest.mark.slow
def test_clones_and_predictions_agree_as_the_mixture_says(mixture, bits):
    """Clones: 2 phi - 1. The predicted x0 reads as the likelier side, which is the finished one
    with the chance Phi(m sqrt(abar / Gamma)): readable is another, earlier quantity.
    """
    truth, model = mixture
    pairs, steps, sigma = 150, 120, truth.answer["sigma"]
    pair = dit_lens.twins(model, pairs, [0] * pairs, steps=steps)
    abars = truth.scheduler.alphas_cumprod[pair.run.timesteps].double().numpy()
    for step in (48, 60, 84):
        clones = pair.a.replay(step, seeds=10**7 + step).latents[-1]
        decided = curve(bits.compare(pair.a.latents[-1], clones, [0] * pairs))
        seen = curve(bits.compare(pair.run.x0[step], pair.run.latents[-1], [0] * 2 * pairs))
        for size, part, n in (("low", slice(0, 1), 1), ("high", slice(1, None), 16)):
            m, abar = truth.answer["m"][size], abars[step]
            phi = mixture_agreement(m, sigma, abar)
            right = norm.cdf(m * (abar / (1 - abar + sigma**2 * abar)) ** 0.5)
            # the sampler's steps move both by less than 0.015 here
            within = 3 / (pairs * n) ** 0.5 + 0.015
            assert decided[part].mean() == pytest.approx(2 * phi - 1, abs=within)
            assert seen[part].mean() == pytest.approx(2 * right - 1, abs=within)
            assert right >= phi


def test_a_bit_is_readable_before_it_is_decided():
    """By how much says docs/attributes.md."""

    def crossing(m, curve):
        return brentq(lambda snr: curve(m, 1 / (1 + np.exp(-snr))) - 0.5, -8, 2)

    def decided(m, abar):
        return 2 * mixture_agreement(m, 0.25, abar) - 1

    def readable(m, abar):
        return 2 * norm.cdf(m * (abar / (1 - abar + 0.25**2 * abar)) ** 0.5) - 1

    level = 1 / (1 + 1 - 0.25**2)  # sqrt(abar) = sqrt(Gamma)
    assert decided(1.0, level) == pytest.approx(0.55, abs=0.005)
    assert readable(1.0, level) == pytest.approx(0.68, abs=0.005)
    for m in (1.0, 4.0):
        assert crossing(m, decided) - crossing(m, readable) == pytest.approx(0.6, abs=0.06)


# The whole measurement.


@pytest.fixture(scope="module")
def tiny():
    return HookedDiT(make_dit(channels=1, classes=4), scheduler=DDIMScheduler(1000))


def halves(x):
    """Whether either half of an image is bright, and something that never changes."""
    bright = (x.mean(1) > 0.5).long()
    return {
        "left_half": bright[..., :4].sum((1, 2)) > 16,
        "top": bright[:, :4].sum((1, 2)) > 16,
        "always": torch.ones(len(x), dtype=torch.long),
    }


def read_halves(x):
    return {name: value.long() for name, value in halves(x).items()}


@pytest.fixture(scope="module")
def found(tiny):
    return attributes(tiny, read_halves, pairs=16, steps=6, releases=4, cut=0.2, resamples=60)


def test_what_comes_out_fits_together(found):
    assert list(found.attribute.values) == ["left_half", "top", "always"]
    category = found.category
    agrees = (category.sel(twin="A") == category.sel(twin="B")).transpose("release", "pair", ...)
    known = np.isfinite(found.agrees.values)
    assert (found.agrees.values == agrees.values)[known].all()
    assert np.isnan(found.agrees.sel(attribute="always")).all()
    assert np.isnan(found.commitment.sel(attribute="always")).all()
    assert "Clones: Attribute always does not vary" in found.attrs["notes"]
    # A is one run; what the pictures show is what was read
    assert (found.end.sel(twin="A") == found.end.sel(twin="A").isel(release=0)).all()
    shown = torch.tensor(found.end.values).flatten(0, 2)
    again = read_halves(shown)["top"].reshape(found.end.shape[:3])
    assert (again == torch.tensor(category.sel(attribute="top").values[:, :, :6])).all()
    assert found.read_agreement.isel(step=-1).sel(attribute=["left_half", "top"]).values == (
        pytest.approx([1, 1])
    )
    lead = found.lead.values
    assert np.allclose(lead, -lead.T, equal_nan=True) and np.isnan(lead[2]).all()
    ends = found.lead_together
    assert np.allclose(ends.sel(bound="low"), -ends.sel(bound="high").values.T, equal_nan=True)


def test_the_same_seed_gives_the_same_figures(tiny, found):
    again = attributes(tiny, read_halves, pairs=16, steps=6, releases=4, cut=0.2, resamples=60)
    xr.testing.assert_identical(found, again)


def test_progress_ends_where_it_said(tiny):
    seen = []
    attributes(
        tiny,
        read_halves,
        pairs=16,
        steps=4,
        releases=3,
        resamples=20,
        cut=0.2,
        progress=lambda *a: seen.append(a),
    )
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)


@pytest.mark.parametrize(
    "made",
    [
        lambda v: v,
        lambda v: v.astype(">i4"),
        lambda v: v.astype(np.uint64),
        lambda v: np.repeat(v, 2)[::2],
        lambda v: v[::-1].copy()[::-1],
        lambda v: v.astype(bool),
    ],
)
def test_arrays_of_any_layout_are_read(tiny, made):
    def read(x):
        return {"left": made(np.asarray(read_halves(x)["left_half"]))}

    images = torch.rand(5, 1, 8, 8)
    wanted = read_halves(images)["left_half"]
    found = Categories("a", lambda x: x, None, read, ("left",)).categories(images)
    assert torch.equal(found[:, 0], wanted)


@pytest.mark.parametrize(
    "read, text",
    [
        (lambda x: x.mean(1), "gave a tensor [2, 8, 8] of float32; expected a dict of one or more"),
        (lambda x: {}, "gave {}; expected a dict of one or more attributes"),
        (lambda x: {1: x}, "gave the name 1; expected a string that is not empty"),
        (
            lambda x: {"a": x.mean((1, 2, 3))},
            "gave [0.5, 0.5] as 'a' of 2 images; expected a tensor [2] of whole numbers",
        ),
        (lambda x: {"a": torch.zeros(3).long()}, "gave [0, 0, 0] as 'a' of 2 images"),
        (lambda x: {"a": [0, 1]}, "gave [0, 1] as 'a' of 2 images"),
        (
            lambda x: {"a": np.array(["x"] * len(x))},
            "as 'a' of 2 images; expected a tensor [2] of whole numbers",
        ),
        (
            lambda x: {"a": np.array([None] * len(x))},
            "as 'a' of 2 images; expected a tensor [2] of whole numbers",
        ),
        (
            lambda x: {"a": torch.zeros(len(x)).long().to_sparse()},
            "gave a sparse tensor [2] of int64 as 'a' of 2 images",
        ),
        (
            lambda x: {"a": torch.full((len(x),), 2**32 + 1)},
            "gave 4294967297 as 'a'; expected whole numbers from -2147483648 to 2147483647",
        ),
        (
            lambda x: {"a": np.full(len(x), 2**63, dtype=np.uint64)},
            "gave 9223372036854775808 as 'a'; expected whole numbers from",
        ),
        (
            lambda x: {str(len(x)): torch.zeros(len(x)).long()},
            "gave ['16'], and ['2'] before; expected the same attributes each time",
        ),
    ],
)
def test_what_a_function_may_not_give(tiny, read, text):
    with pytest.raises(InvalidValue) as error:
        attributes(tiny, read, pairs=16, steps=4, releases=3, cut=0.2)
    assert text in str(error.value) and str(error.value).startswith("The attribute function gave")


@pytest.mark.parametrize(
    "given, text",
    [
        ({"read": int}, "read=<class 'int'> can't be used; expected a function"),
        ({"pairs": 15}, "pairs=15 can't be used; expected a whole number of 16 or more"),
        ({"releases": 6}, "releases=6 can't be used; expected a whole number from 3 to 5"),
        ({"cut": 7.0}, "inner edges [7.0] holds no mode"),
    ],
)
def test_bad_arguments(tiny, given, text):
    with pytest.raises(DitLensError) as error:
        attributes(tiny, **{"read": read_halves, "steps": 6, **given})
    assert text in str(error.value)


# Sentences.


@pytest.mark.parametrize("told", [True, False])
def test_the_headline_claims_no_more_than_the_intervals(told):
    names = ["first", "second", "never"]
    commitment = np.array([10.0, 20.0, np.nan])
    lead = np.full((3, 3, 2), np.nan)
    lead[0, 1] = (4, 16) if told else (-2, 22)
    results = xr.Dataset(
        {
            "commitment": (("attribute", "quantity"), commitment[:, None]),
            "commitment_interval": (
                ("attribute", "quantity", "bound"),
                np.stack([commitment - 1, commitment + 1], -1)[:, None],
            ),
            "lead_together": (("attribute", "other", "bound"), lead),
        },
        {"attribute": names, "other": names, "quantity": ["step"], "bound": ["low", "high"]},
        {"model": "mine", "steps": 50},
    )
    assert headline(results) == (
        "On mine attributes are decided at these steps of 50: first 10.0 [9.0, 11.0], second 20.0 "
        f"[19.0, 21.0] (95 % each); which of two comes first can be told for {int(told)} of 1 "
        "(95 % for all at once)."
    )
    one = results.sel(attribute=["first"], other=["first"])
    assert headline(one) == (
        "On mine one attribute is decided within the 50 steps: first 10.0 [9.0, 11.0] (95 %)."
    )
    none = results.sel(attribute=["never"], other=["never"])
    assert headline(none) == "On mine no attribute is seen to be decided within the run."


# Reports and the command.


def test_stored_and_shown_again(found, tmp_path, capsys):
    report.write(found, tmp_path)
    first = capsys.readouterr().out
    kind, again = read_stored(tmp_path / "attributes.nc")
    assert kind == "attributes.nc"
    xr.testing.assert_identical(again.drop_attrs(), found.drop_attrs())
    pictures = [(tmp_path / name).read_bytes() for name in ("attributes.png", "painters_order.png")]
    show(tmp_path)
    assert capsys.readouterr().out == first and found.attrs["headline"] in first
    for name, before in zip(("attributes.png", "painters_order.png"), pictures, strict=True):
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("size", [(3, 200, 300), (2, 8, 8), (4, 5, 16, 16)])
def test_pictures_of_any_images(size):
    """Large ones are shown smaller, odd numbers of channels as grey or the first three."""
    from dit_lens.experiments.shown import LARGEST, small

    shown = small(torch.rand(3, *size))
    assert shown.shape[1] in (1, 3) and max(shown.shape[2:]) <= LARGEST
    assert len(shown) == 3 and shown.ndim == 4


def test_portraits_are_read_as_they_were_drawn():
    factors = portraits.random_factors(300, seed=5)
    read = portraits.attributes(portraits.draw(factors))
    assert tuple(read) == portraits.FACTORS
    assert (torch.stack(list(read.values()), 1) == factors).all()
    with pytest.raises(InvalidValue, match="portraits are"):
        portraits.attributes(torch.zeros(1, 1, 16, 16))
    assert portraits.attributes(torch.zeros(0, 3, 16, 16))["hair"].shape == (0,)


@pytest.mark.parametrize(
    "where, text",
    [
        ("own", "No attributes are bundled for 'digits'; give a function of your own"),
        ("hair", "'hair' names no function; give a function of your own, --attributes"),
        ("/nowhere.py:mine", "There is no file '/nowhere.py'; expected path/to/file.py:function"),
        ("no_such_module:mine", "'no_such_module' can't be imported: ModuleNotFound"),
        (
            "dit_lens.groundtruth.portraits:attribute",
            "'dit_lens.groundtruth.portraits' has no function 'attribute'; expected "
            "path/to/file.py:function or package.module:function (nearest: 'attributes').",
        ),
        ("dit_lens.groundtruth.portraits:Reading", "has no function 'Reading'"),
    ],
)
def test_where_no_function_is(where, text):
    with pytest.raises(InvalidValue) as error:
        find(where, "digits")
    assert text in str(error.value)


def test_the_command_says_so_before_it_measures(capsys):
    assert main(["gap", "digits", "--attributes"]) == 2
    assert "No attributes are bundled for 'digits'" in capsys.readouterr().err
    assert main(["gap", "digits", "--attributes", "portraits"]) == 2
    assert "portraits are [n, 3, 16, 16]" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_with_a_function_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dit(channels=1, classes=4).save_pretrained("model")
    DDIMScheduler(1000, clip_sample=False).save_pretrained("model/scheduler")
    (tmp_path / "mine.py").write_text(
        "def bright(x):\n    return {'bright': (x.mean((1, 2, 3)) > 0.5).long()}\n"
    )
    argv = ["gap", "model", "--pairs", "16", "--steps", "5", "--attributes", "mine.py:bright"]
    assert main([*argv, "--labels", "3", "1", "--batch", "8", "--out", "out"]) == 0
    assert set(read_stored(tmp_path / "out" / "attributes.nc")[1].label.values) == {1, 3}
    shown = capsys.readouterr().out
    assert "bright" in shown and "readable" in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "gap.nc",
        "attributes.nc",
        "attributes.png",
        "painters_order.png",
    }
    assert main(["report", "out"]) == 0
    assert "bright" in capsys.readouterr().out
