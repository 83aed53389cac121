"""The map of causes against runs made by hand, and against models whose causes are known."""

import numpy as np
import pytest
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.experiments import cause_map
from dit_lens.groundtruth import gaussian
from dit_lens.report import cause_map as report
from dit_lens.report.stored import show

STEPS = 6
SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=2), scheduler=SCHEDULER)


def by_hand(model, name, window, items, kind="hold", **options):
    """E_b of one hold, by a trace around the whole run."""
    labels = [i % 2 for i in range(items)]
    run = dit_lens.sample(model, labels, steps=STEPS, **options)
    bands = Bands.radial((8, 8), cut=0.25)
    with dit_lens.trace(model) as t:
        if kind == "hold":
            t.hold(name, window)
        else:
            t.ablate(name, kind, window)
        edited = run.replay().latents[-1]
    x = run.latents[-1]
    pairs = [(i, j) for i in range(items) for j in range(i) if labels[i] == labels[j]]
    apart = np.mean([bands.energy((x[i] - x[j])[None].double()).sum(1)[0] for i, j in pairs], 0)
    return bands.energy((edited - x).double()).sum(1).mean(0).numpy() / apart


def test_exact_cells_are_runs_by_hand(model):
    found = cause_map(model, items=8, steps=STEPS, exact=True, resamples=50, seed=0)
    assert dict(found.effect.sizes) == {"site": 2, "layer": 3, "window": 5, "band": 2}
    assert found.is_exact.all()
    for site, layer, step in (("attn", 0, 3), ("mlp", 2, 1), ("mlp", 1, 5)):
        expected = by_hand(model, f"blocks.{layer}.{site}", [step], 8)
        cell = found.effect.sel(site=site, layer=layer, window=str(step))
        assert np.allclose(cell.values, expected, rtol=1e-3)
    low, high = found.effect_interval.values[..., 0], found.effect_interval.values[..., 1]
    assert (low <= found.effect).all() and (found.effect <= high).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 2.0},
        {"lag": 2},
        {"order": 1},
        {"sites": ["block"]},
        {"windows": [range(2, 5)]},
        {"scheduler": "ddpm"},
    ],
)
def test_first_order_is_the_exact_effect_of_small_changes(model, options):
    options = {"items": 16, "steps": 7, "resamples": 20} | options
    exact = cause_map(model, exact=True, **options)
    guess = cause_map(model, projections=24, check=0, **options)
    a, b = exact.effect.values, guess.effect.values
    assert np.corrcoef(np.log(a.ravel()), np.log(b.ravel()))[0, 1] > 0.98
    assert 0.8 < np.median(b / a) < 1.25


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_other_kinds(model, kind):
    found = cause_map(model, kind, items=8, steps=STEPS, exact=True, resamples=20)
    assert "quadrant_held" not in found and found.sizes["window"] == STEPS
    if kind == "zero":
        expected = by_hand(model, "blocks.1.hook_attn_out", [2], 8, "zero")
        assert np.allclose(found.effect.sel(site="attn", layer=1, window="2"), expected, rtol=1e-3)


def test_checked_cells_take_the_place_of_estimates(model):
    found = cause_map(model, items=8, steps=STEPS, check=6, projections=2, resamples=50)
    assert int(found.is_exact.sum()) == found.sizes["checked"] == 6
    for i in range(6):
        at = {"site": found.checked_site[i].item(), "layer": found.checked_layer[i].item()}
        cell = found.effect.sel(window=str(found.checked_first[i].item()), **at)
        assert np.allclose(cell, found.checked_exact[i])
    again = cause_map(model, items=8, steps=STEPS, check=6, projections=2, resamples=50)
    assert found.identical(again)


@pytest.mark.parametrize("exact", [True, False])
def test_a_map_goes_on_where_it_was(model, exact, tmp_path):
    calls, folder = [], tmp_path / "map"

    def stop(done, total):
        calls.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    options = {"items": 8, "steps": STEPS, "exact": exact, "check": 2, "resamples": 20}
    plain = cause_map(model, **options)
    with pytest.raises(KeyboardInterrupt):
        cause_map(model, **options, store=folder, progress=stop)
    assert plain.identical(cause_map(model, **options, store=folder))


def test_the_cause_is_the_layer_that_makes_the_gap():
    """Without the others' share nothing else moves the image, decoys included."""
    truth = gaussian(layers=(2,), n_layers=5, decoys=(3,), in_channels=1)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = cause_map(
        model, labels=[0] * 8, items=8, steps=10, projections=4, check=4, resamples=50
    )
    attn = found.effect.sel(site="attn", band="low")
    # what the last step adds is little, and no longer changes
    assert (attn.sel(layer=2)[:-1] > 1e-8).all()
    others = found.effect.sel(band="low").sum("site").drop_sel(layer=2)
    assert float(others.max()) < 1e-3 * float(attn.sel(layer=2).max())
    high = found.effect.sel(band="high")
    assert float(high.max()) < 1e-3 * float(attn.max())
    # a band that nothing moves has no place of its largest effect, and no ratio
    assert float(high.max()) == 0 and "; high none in any cell; 95 %" in found.sentence
    assert "nan" not in found.sentence and "at attn, layer 2, step " in found.sentence
    assert "middle 90 %: low " in found.sentence


def exact_effects(run, layers, shares, energy):
    """E_low of holding the attention of each causing layer at each step of a run of E6's models,
    [layer, step]: the token mean goes its way by a number a step.
    """
    abar = run.scheduler.alphas_cumprod.double()[run.timesteps.long()].numpy()
    after = np.append(abar[1:], float(run.scheduler.final_alpha_cumprod))
    low, high = (np.sqrt(1 - abar) / (lam * abar + 1 - abar) for lam in (4.0, 0.25))
    ratios = np.array([(low / high) ** share for share in shares])  # [layer, step]
    before = np.cumprod(np.vstack([np.ones_like(abar), ratios]), 0)
    x = run.latents.double().mean((-1, -2)).flatten(1).numpy()  # [step, item]
    of_eps = np.sqrt(1 - after) - np.sqrt(after * (1 - abar) / abar)
    found = np.zeros((len(layers), len(abar)))
    for k in range(len(layers)):
        added = (ratios[k] - 1) * before[k]  # of the mean of x
        for s in range(1, len(abar)):
            behind = high[s] * before[-1, s] / before[k + 1, s]
            moved = of_eps[s] * behind * (added[s - 1] * x[s - 1] - added[s] * x[s])
            moved = moved * x[-1] / x[s + 1]
            found[k, s] = run.latents[0, 0, 0].numel() * np.mean(moved**2) / energy
    return found


def finds_causes(seed, layers=4, steps=6, items=10):
    """Whether the map of an E6 model with causes and decoys drawn at random has the exact effect of
    every causing cell within its interval, and none elsewhere.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(layers).tolist()
    causes, decoys = sorted(order[: 1 + seed % 2]), order[2:3]
    shares = rng.dirichlet(np.full(len(causes), 3.0)).tolist()
    truth = gaussian(layers=causes, n_layers=layers, shares=shares, decoys=decoys, in_channels=1)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = cause_map(
        model, labels=[0] * items, items=items, steps=steps, check=0, resamples=300, seed=seed
    )
    run = dit_lens.sample(model, [0] * items, seed, steps)
    exact = exact_effects(run, causes, shares, float(found.spread.sel(band="low")))[:, 1:]
    attn = found.effect_interval.sel(site="attn", band="low", layer=causes).values
    inside = (attn[..., 0] <= exact) & (exact <= attn[..., 1])
    rest = found.effect.drop_sel(layer=causes).max()
    others = [rest, found.effect.sel(site="mlp").max(), found.effect.sel(band="high").max()]
    return bool(inside.all()) and max(map(float, others)) < 1e-6 * exact.max()


def test_the_map_has_the_exact_effect_of_every_causing_cell_and_none_elsewhere():
    assert sum(finds_causes(seed) for seed in range(3)) >= 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "holds"}, "kind='holds' can't be used; expected one of 'hold', 'zero', 'mean'"),
        ({"sites": ["atn"]}, "sites='atn' can't be used; expected one of 'attn', 'mlp', 'block'"),
        ({"windows": [range(0, 2)]}, "Step 0 can't be held with lag=1"),
        ({"windows": [range(5, 9)]}, "is outside the run; it has 6 steps"),
        ({"items": 4}, "items=4 can't be used; expected a whole number of 8 or more"),
        ({"labels": list(range(2)) * 5, "items": 9}, "There are 9 items and 10 labels"),
        ({"scheduler": "dpm++"}, "remembers earlier steps"),
        ({"lag": 6}, "windows"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError) as error:
        cause_map(model, **({"items": 8, "steps": STEPS} | options))
    assert message in str(error.value)


def test_a_stored_map_is_shown_again(model, tmp_path, capsys):
    found = cause_map(model, items=8, steps=STEPS, projections=1, check=2, resamples=50)
    report.show(found, report.store(found, tmp_path))
    shown = capsys.readouterr().out
    (tmp_path / "cause_map.png").unlink()
    show(tmp_path)
    assert capsys.readouterr().out == shown and (tmp_path / "cause_map.png").exists()
    assert all(line in shown for line in found.attrs["sentence"].split("\n"))
