"""The built-in probes against what they are defined as, alone and together."""

import numpy as np
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT, Probe
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence
from dit_lens.tracing.probe import load_probe, registered_probes


@pytest.fixture
def model():
    return HookedDiT(
        make_dit(channels=1, classes=10), scheduler=DDIMScheduler(1000, clip_sample=False)
    )


def test_spectral_split_is_parseval_and_by_hand(model):
    probe = SpectralSplit(["resid_post", "attn.hook_z"])
    with dit_lens.trace(model, names=["resid_post", "z"], probes=[probe]) as t:
        dit_lens.sample(model, [1, 2], steps=3)
    energy = probe.result().energy
    assert energy.dims == ("name", "step", "batch", "band") and energy.shape == (6, 3, 2, 5)
    for name in energy["name"].values:
        whole = t[name].flatten(3).square().sum((-1, -2))
        assert np.allclose(energy.sel(name=name).sum("band"), whole, rtol=1e-5)
    bands = Bands.radial((4, 4))
    assert np.allclose(
        energy.sel(name="blocks.1.hook_resid_post", step=2),
        bands.energy_tokens(t["resid_post", 1][2]),
        rtol=1e-5,
    )
    with pytest.raises(
        ValueError,
        match="'blocks.0.hook_cond' has no token axis to take a spectrum over; its axes are batch, d_model",
    ):
        with dit_lens.trace(model, probes=[SpectralSplit("hook_cond")]):
            dit_lens.sample(model, [1], steps=1)
    assert model.instrumentation.listening == 0
    with pytest.raises(RuntimeError, match="SpectralSplit has seen nothing"):
        with dit_lens.trace(model, probes=[probe]):
            pass
        probe.result()


def test_the_lens_at_the_last_layer_is_the_model(model):
    lens = LayerLens()
    with dit_lens.trace(model, probes=[lens]):
        run = dit_lens.sample(model, [1, 1, 2, 2], steps=3)
    for step in range(3):
        assert torch.equal(lens.x0[2, step], run.x0[step])
        assert not torch.allclose(lens.x0[0, step], run.x0[step])
    result = lens.result()  # against the last layer's own x0
    assert np.allclose(result.agreement.sel(layer=2), 1) and result.agreement.dims == (
        "layer",
        "step",
        "band",
    )
    again = LayerLens().run(model, run)
    assert np.allclose(again.xy, lens.result(run.latents[-1]).xy, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"target has shape \[1, 1, 8, 8\]; the run's latents have \[4, 1, 8, 8\]"
    ):
        lens.result(run.latents[-1][:1])
    with pytest.raises(ValueError, match="LayerLens needs the model's scheduler"):
        dit_lens.trace(HookedDiT(make_dit()), probes=[LayerLens()]).__enter__()


def test_the_lens_fires_no_hooks(model):
    seen = []
    with model.hooks(
        [
            ("final.*", lambda a, hook: seen.append(hook.name)),
            ("ln_final.hook_normalized", lambda a, hook: seen.append(1)),
        ]
    ):
        with dit_lens.trace(model, probes=[LayerLens()]):
            dit_lens.sample(model, [1], steps=1)
    assert len(seen) == 5  # the model's own last layer, once


def test_probes_combine_and_see_branches_and_twins():
    model = HookedDiT(make_pipe())
    sites = []

    class Watch(Probe):
        names = "hook_embed"

        def observe(self, activation, site):
            assert not activation.requires_grad
            sites.append(
                (
                    site.step,
                    site.layer,
                    site.timestep,
                    site.grid,
                    site.branch,
                    site.twin,
                    site.where(branch="uncond").tolist(),
                )
            )

        def result(self):
            return None

    probes = [Watch(), SpectralSplit(), TwinDivergence(), LayerLens()]
    dit_lens.twins(model, pairs=2, labels=[3, 3], steps=2, guidance=2.0, probes=probes)
    assert sites[1] == (
        1,
        None,
        0.0,
        (4, 4),
        ("cond",) * 4 + ("uncond",) * 4,
        ("A", "A", "B", "B") * 2,
        [4, 5, 6, 7],
    )
    assert (
        probes[1].result().energy.shape == (3, 2, 8, 5)
        and dict(probes[2].result().sizes)["pair"] == 2
    )
    # the embedding, then three layers
    assert probes[3].result(by_label=False).agreement.shape == (4, 2, 6)


def test_a_probe_that_fails_leaves_nothing(model):
    class Broken(Probe):
        names = "resid_mid"

        def observe(self, activation, site):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), dit_lens.trace(model, probes=[Broken()]):
        dit_lens.sample(model, [1], steps=2)
    assert (
        model.instrumentation.listening == 0
        and not model.instrumentation.watchers
        and model.instrumentation.running == []
    )
    with (
        pytest.raises(NotImplementedError, match="Half must define observe"),
        dit_lens.trace(model, probes=[type("Half", (Probe,), {})()]),
    ):
        dit_lens.sample(model, [1], steps=1)


def test_the_registry():
    assert {"SpectralSplit", "TwinDivergence", "LayerLens"} <= set(registered_probes())
    assert load_probe("LayerLens") is LayerLens
    with pytest.raises(ValueError, match="No probe is called 'LayerLense'; installed: 'LayerLens'"):
        load_probe("LayerLense")
