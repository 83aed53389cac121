"""The layer that is planted is the layer that is named, and random layers are not blamed; `python
tests/checks.py` does it at length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.experiments.layer_profile import profiles
from dit_lens.groundtruth import planted, random_planted, random_weights, shuffle_layers
from dit_lens.measures.bootstrap import draws
from dit_lens.probes import LayerLens, TwinDivergence

torch.set_num_threads(1)
VIEWS = ("divergence", "lens", "ratio", "growth")


class Named(NamedTuple):
    """What was planted (None in a null model), and the onset that each view names (None for
    none).
    """

    planted: int | None
    onsets: dict[str, int | None]


def named(model: HookedDiT, seed: int, cut: float, pairs: int, steps: int) -> dict[str, int | None]:
    """The onset by every view, as `dit-lens gap` finds it, at two thirds of the run."""
    fine, split = (
        Bands.radial(model.cfg.grid, edges=[cut, 0.6]),
        Bands.radial(model.cfg.grid, cut=cut),
    )
    divergence, lens = TwinDivergence(fine), LayerLens(Bands.radial(model.cfg.pixels, cut=cut))
    labels = [i % min(model.cfg.n_classes, pairs // 2) for i in range(pairs)]
    pair = dit_lens.twins(model, pairs, labels, steps=steps, seed=seed, probes=[divergence, lens])
    _, onsets = profiles(
        divergence.result(),
        lens.result(pair.run.latents[-1]),
        split,
        fine,
        draws(pairs, 300, seed),
        2 * steps // 3,
    )
    return {view: None if isinstance(found, str) else found.layer for view, found in onsets.items()}


def planted_models(models: int, pairs: int = 24, steps: int = 6) -> Iterator[Named]:
    """Layers planted anywhere, of either sign, in either band, with noise on top."""
    for seed in range(models):
        truth = random_planted(seed)
        model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
        yield Named(truth.answer["onset"], named(model, seed, 0.1, pairs, steps))


def null_models(
    models: int, kind: str = "random", pairs: int = 24, steps: int = 16, other_twins: int = 0
) -> Iterator[Named]:
    """Random weights, or `digits` with its layers in another order; `other_twins` is added to
    the seed of the twins.
    """
    digits = dit_lens.load("digits")
    for seed in range(models):
        truth = (
            random_weights(seed).transformer
            if kind == "random"
            else shuffle_layers(digits.transformer, seed)
        )
        yield Named(
            None,
            named(
                HookedDiT(truth, scheduler=digits.scheduler), seed + other_twins, 0.25, pairs, steps
            ),
        )


@pytest.mark.slow
def test_planted_layers_are_named_by_the_growth_of_the_difference():
    found = list(planted_models(6))
    assert [one.onsets["growth"] for one in found] == [one.planted for one in found]
    # a gain is no delay
    assert all(one.onsets["divergence"] is None and one.onsets["lens"] is None for one in found)


def test_a_single_planted_layer_is_named_even_if_it_is_the_first():
    for layer in (0, 7, 11):
        truth = planted([layer], -0.2, 12, "high", noise=0.02)
        model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
        assert named(model, 1, 0.1, 16, 4)["growth"] == layer


@pytest.mark.slow
def test_random_layers_are_not_blamed():
    found = list(null_models(3))
    assert all(one.onsets["growth"] is None and one.onsets["lens"] is None for one in found), found


@pytest.mark.parametrize("band", ["low", "high"])
def test_bands_are_merged_by_the_cut(band):
    """Energies in three bands give the same profile as in two: merging adds them up."""
    truth = planted([2], 0.4, 4, band)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    got = []
    for fine in (
        Bands.radial(model.cfg.grid, edges=[0.1, 0.3, 0.5]),
        Bands.radial(model.cfg.grid, cut=0.1),
    ):
        seen, lens = TwinDivergence(fine), LayerLens(Bands.radial((8, 8), cut=0.1))
        pair = dit_lens.twins(model, 8, [0] * 8, steps=4, probes=[seen, lens])
        counts = np.ones((201, 8))
        got.append(
            profiles(
                seen.result(),
                lens.result(pair.run.latents[-1]),
                Bands.radial(model.cfg.grid, cut=0.1),
                fine,
                counts,
                2,
            )[0]
        )
    for name in ("log_ratio", "layer_gap", "difference_energy"):
        np.testing.assert_allclose(got[0][name], got[1][name], rtol=1e-4)
    growth = got[0].log_ratio.sel(energy="growth")
    np.testing.assert_allclose(
        np.diff(growth), [0, 0, 2 * np.log(1.4) * (1 if band == "low" else -1), 0], atol=1e-3
    )
