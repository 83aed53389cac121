"""Measurements on models of videos, whose latents are [item, channel, frame, row, column]."""

import copy

import pytest
import torch

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.experiments import cause_map, compare, reuse_plan
from dit_lens.families import family_named
from dit_lens.model.quiet import quiet
from dit_lens.patching import Patch, sweep
from dit_lens.patching.measure import energy


@pytest.fixture(scope="module")
def pipe():
    with quiet():
        return family_named("WanTransformer3DModel").small_pipeline()


@pytest.fixture(scope="module")
def model(pipe):
    with HookedDiT(pipe) as opened:
        yield opened


def test_energies_are_sums_over_frames(model):
    x = torch.randn(2, *model.cfg.latent_shape)
    bands = Bands.radial(model.cfg.pixels, cut=0.25)
    frames = sum(energy(x[:, :, i], bands) for i in range(x.shape[2]))
    assert energy(x, bands).shape == (2, 2) and abs(energy(x, bands) - frames).max() < 1e-9


def test_distances_of_a_sweep_are_those_of_all_frames(model):
    a, b = (dit_lens.sample(model, ["a cat"] * 2, seeds=[s, s + 1], steps=3) for s in (0, 5))
    found = sweep(a, b, [Patch("resid_post", 1, range(3))])
    apart = (b.latents[-1] - a.latents[-1]).double().square().flatten(1).sum(1).numpy()
    assert abs(found.distance_target.sum("band").values / apart - 1).max() < 1e-6
    assert found.move.shape == (1, 2) and bool(found.move.notnull().all())


def test_a_map_and_a_plan(model):
    options = {"items": 8, "projections": 1, "resamples": 50}
    found = cause_map(model, steps=3, check=2, **options)
    assert found.effect.sizes["band"] == 2 and bool(found.effect.notnull().any())
    plan = reuse_plan(model, 0.95, steps=3, **options)
    assert plan.macs < 1


def test_weights_of_half_the_precision(pipe, model):
    """diffusers keeps some weights of this model in float32."""
    half = HookedDiT(copy.deepcopy(pipe).to(torch.bfloat16))
    half.transformer.scale_shift_table.data = half.transformer.scale_shift_table.float()
    assert half.dtype == torch.bfloat16
    found = compare(model, half, items=12, steps=3, resamples=50)
    assert float(found.effect.max()) < 0.1
