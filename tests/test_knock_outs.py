"""Knock-outs on models whose causing layers are known (E6 in docs/checks.md), decoys among them,
and in every family; `python tests/checks.py` does it at length.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import dit_lens
from dit_lens import HookedDiT, families
from dit_lens.errors import InvalidValue
from dit_lens.experiments import couple_alone, knock_outs, knocked_out
from dit_lens.experiments.effects import effects_sentence
from dit_lens.groundtruth import gaussian, planted

torch.set_num_threads(1)


def random_cause(
    seed: int, pairs: int = 24, steps: int = 16
) -> tuple[set[int], set[int], set[int]]:
    """The layers that cause the gap, the decoys, and the layers named, of a random model: depth,
    layers, shares, sign, decoys.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 9))
    order = rng.permutation(n).tolist()
    count = int(rng.integers(1, 3))
    causes, decoys = order[:count], order[count : count + int(rng.integers(1, 3))]
    first = float(rng.uniform(0.35, 0.65))
    lam = (4.0, 0.25) if rng.random() < 0.5 else (0.25, 4.0)
    truth = gaussian(
        *lam,
        causes,
        n,
        shares=[1.0] if count == 1 else [first, 1 - first],
        decoys=decoys,
        sample_size=4,
    )
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    found = knock_outs(model, pairs=pairs, steps=steps, cut=0.1, seed=seed, resamples=300)
    return set(causes), set(decoys), set(found.attrs["causes"])


def random_causes(models: int) -> Iterator[tuple[set[int], set[int], set[int]]]:
    for seed in range(models):
        yield random_cause(seed)


@pytest.mark.slow
def test_causes_are_named_and_decoys_are_not():
    for causes, _, named in random_causes(3):
        assert named == causes


def test_a_layer_that_shows_the_difference_and_causes_nothing():
    """The planted layer makes the twins differ in the stream, and the output never reads it."""
    truth = planted([1], 0.5, 3, "low", sample_size=4)
    found = knock_outs(
        HookedDiT(truth.transformer, scheduler=truth.scheduler),
        pairs=16,
        steps=12,
        cut=0.1,
        resamples=200,
    )
    assert found.attrs["causes"] == [] and np.abs(found.effect).max() < 0.01
    assert found.sentence.startswith("No layer of 3, knocked out by itself, moves the gap of ")


def test_without_the_layer_there_is_no_gap_left():
    truth = gaussian(4.0, 0.25, (1,), 3, sample_size=4)
    found = knock_outs(
        HookedDiT(truth.transformer, scheduler=truth.scheduler),
        pairs=32,
        steps=20,
        cut=0.1,
        resamples=200,
    )
    without = float(found.gap.sel(layer=1))
    low, high = found.attrs["gap_interval"]
    assert 0 < low < found.attrs["gap"] < high and "]: 1 (" in found.sentence
    low, high = found.effect_interval.sel(layer=1).values + found.attrs["gap"]
    assert low < 0 < high and abs(without) < 0.6 < abs(found.attrs["gap"])
    assert found.sentence.startswith(
        f"Knocked out one by one, 1 of 3 layers moves the gap of {found.attrs['gap']:+.2f} steps ["
    )


def test_knocking_out_is_skipping_the_layer_bit_for_bit():
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    run = dit_lens.sample(model, [3, 4], steps=3)
    out = knocked_out(run, [1])
    _, cache = model.run_with_cache(*_inputs(out), names_filter="resid_*")
    skipped = model.run_with_hooks(
        *_inputs(out),
        fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: cache["resid_pre", 1])],
    )
    assert torch.equal(out.outputs[0], skipped[:, : out.outputs.shape[2]])
    assert (
        torch.equal(knocked_out(run, [], "attn").latents, run.latents)
        and model.instrumentation.listening == 0
    )
    attn, mlp = (knocked_out(run, [1], part).latents[-1] for part in ("attn", "mlp"))
    assert not torch.equal(attn, mlp) and not torch.equal(attn, run.latents[-1])


def _small_run(name, variant=0, steps=1):
    """One step of a family's small model, with the condition it comes with."""
    transformer, condition = families.family_named(name).small(variant)
    model = HookedDiT(transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    if not model.cfg.n_classes:
        model.conditions.add(
            {
                "first": {
                    key: value if value is None else value[:1] for key, value in condition.items()
                }
            }
        )
    return dit_lens.sample(model, [model.conditions.n - 1], steps=steps)


@pytest.mark.parametrize("name", sorted(families.modules()))
def test_a_layer_knocked_out_returns_its_streams_bit_for_bit(name):
    """In every family, for the image's and the text's stream: cross-attention, second attentions
    and what attention and MLP add fused are knocked out too.
    """
    for variant in range(3):
        run = _small_run(name, variant)
        n = run.model.cfg.n_layers
        for layers in [[layer] for layer in range(n)] + [list(range(n))]:
            out = knocked_out(run, layers)
            for layer, stream in itertools.product(layers, ("", "text.")):
                pre, post = (f"blocks.{layer}.{stream}hook_resid_{at}" for at in ("pre", "post"))
                if post in run.model.names:
                    before, after = (out.activations(site, step=0) for site in (pre, post))
                    assert torch.equal(before, after), (variant, layer, stream)
                    whole = (run.activations(site, step=0) for site in (pre, post))
                    assert not torch.equal(*whole)


def test_parts_of_a_layer():
    run = _small_run("SD3Transformer2DModel", 2)
    names = [name for name, _ in knocked_out(run, [0], "attn").history[-1].edits]
    assert names == [
        f"blocks.0.{site}" for site in ("hook_attn_out", "hook_attn2_out", "text.hook_attn_out")
    ]
    run = _small_run("PixArtTransformer2DModel")
    names = [name for name, _ in knocked_out(run, [1], "attn").history[-1].edits]
    assert names == ["blocks.1.hook_attn_out", "blocks.1.hook_cross_attn_out"]
    names = [name for name, _ in knocked_out(run, [1], "mlp").history[-1].edits]
    assert names == ["blocks.1.hook_mlp_out"]
    flux = _small_run("FluxTransformer2DModel")
    for part in ("attn", "mlp"):
        with pytest.raises(InvalidValue) as error:
            knocked_out(flux, [0, 2], part)
        assert str(error.value) == (
            f"Layer 2 has no {part!r} part to knock out by itself; it adds "
            "'blocks.2.hook_attn_mlp_out', 'blocks.2.text.hook_attn_mlp_out'. Use part='layer'."
        )


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "FluxTransformer2DModel"])
def test_the_direct_effect_of_the_last_layer_is_its_whole_effect(name):
    """Cross-attention and fused additions count in direct effects as well."""
    run = _small_run(name)
    last = run.model.cfg.n_layers - 1
    whole, direct = (knocked_out(run, [last], direct=d) for d in (False, True))
    assert torch.allclose(whole.x0, direct.x0, atol=1e-4) and not torch.allclose(
        whole.x0, run.x0, atol=1e-2
    )


def test_direct_and_mediated_effects():
    """The last layer's whole effect is direct; of two causes in a row the earlier one also acts
    through the later one.
    """
    truth = gaussian(4.0, 0.25, (1, 3), 4, decoys=[0], sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    told = []
    found = knock_outs(
        model,
        direct=True,
        pairs=16,
        steps=12,
        cut=0.1,
        resamples=200,
        progress=lambda *done: told.append(done),
    )
    assert told == [(done, 4) for done in range(1, 5)]
    assert np.allclose(found.direct_effect + found.mediated_effect, found.effect)
    assert (
        np.abs(found.mediated_effect.sel(layer=[0, 2, 3])).max()
        < 0.01
        < abs(float(found.mediated_effect.sel(layer=1)))
    )
    assert found.attrs["causes"] == [1, 3]
    low, high = found.direct_effect_interval.sel(layer=3).values
    assert low < float(found.effect.sel(layer=3)) < high < 0


def test_coupling_one_layer_alone():
    """At g = 1 attention passes no difference on: coupling the one layer that makes the gap takes
    it away, any other does nothing.
    """
    truth = gaussian(4.0, 0.25, (2,), 4, decoys=[0], sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    told = []
    found = couple_alone(
        model,
        eps=0.3,
        pairs=16,
        steps=20,
        cut=0.1,
        resamples=200,
        progress=lambda *done: told.append(done),
    )
    assert told == [(done, 4) for done in range(1, 5)]
    assert (
        found.attrs["causes"] == [2]
        and abs(float(found.gap.sel(layer=2))) < 1e-3
        and found.attrs["gap"] > 2
    )
    assert np.abs(found.effect.sel(layer=[0, 1, 3])).max() < 1e-3
    assert found.sentence.startswith("Coupled one by one, 1 of 4 layers moves the gap of ")


def _inputs(run):
    return run.latents[0], run.timesteps[0].expand(2), run.labels


def test_a_layer_without_which_nothing_commits_is_said():
    found = knock_outs(_small(), [1], pairs=16, steps=12, cut=0.1, resamples=200)
    found.effect[0] = np.nan
    found.attrs["causes"] = []
    assert effects_sentence(found).endswith("Without layer 1 a band does not commit at all.")


def _small():
    truth = gaussian(4.0, 0.25, (1,), 2, sample_size=4)
    return HookedDiT(truth.transformer, scheduler=truth.scheduler)


def test_bad_input():
    model = _small()
    # of such a large variance that all is known from the first step on
    truth = gaussian(1e4, 1e4, (1,), 2, sample_size=4)
    early = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    for call, text in [
        (
            lambda: knock_outs(model, [2], pairs=16, steps=8, cut=0.1),
            "layers[0]=2 can't be used; expected a whole number from -2 to 1",
        ),
        (
            lambda: knock_outs(model, part="ff", pairs=16, steps=8, cut=0.1),
            "part='ff' can't be used; expected one of 'layer', 'attn', 'mlp'",
        ),
        (
            lambda: knock_outs(model, pairs=8),
            "pairs=8 can't be used; expected a whole number of 16 or more, for intervals",
        ),
        (
            lambda: knock_outs(early, pairs=16, steps=3, cut=0.1),
            "The model's low or high band does not commit within the run, so",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(text), error.value
    assert model.instrumentation.listening == 0
