"""The built-in probes against what they are defined as, alone and together."""

import numpy as np
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import dit_lens
from dit_lens import Bands, HookedDiT, Probe
from dit_lens.errors import InvalidState
from dit_lens.experiments import measure_gap
from dit_lens.families import family_named
from dit_lens.model.quiet import quiet
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence, TwinPatching
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
        match="'blocks.0.hook_cond' has no token axis to take a spectrum over; its axes are batch, "
        "d_model",
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
        assert torch.equal(lens.x0(2, step), run.x0[step])
        assert not torch.allclose(lens.x0(0, step), run.x0[step])
    with pytest.raises(
        ValueError, match=r"layer=99 was not seen; expected -1, the embedding, to 2"
    ):
        lens.x0(99, 0)
    with pytest.raises(ValueError, match=r"step=99 was not seen; expected one of 0 to"):
        lens.x0(0, 99)
    result = lens.result()  # against the last layer's own x0
    assert np.allclose(result.agreement.sel(layer=2), 1) and result.agreement.dims == (
        "layer",
        "step",
        "band",
    )
    again = LayerLens().of_run(run)
    assert np.allclose(again.xy, lens.result(run.latents[-1]).xy, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"target has shape \[1, 1, 8, 8\]; the run's latents have \[4, 1, 8, 8\]"
    ):
        lens.result(run.latents[-1][:1])
    with pytest.raises(ValueError, match="LayerLens needs the model's scheduler"):
        dit_lens.trace(HookedDiT(make_dit()), probes=[LayerLens()]).__enter__()


@pytest.mark.filterwarnings("ignore:.*has other noise levels")
@pytest.mark.parametrize(
    "other",
    [
        DDIMScheduler(1000, clip_sample=True, clip_sample_range=0.5),
        DDIMScheduler(1000, clip_sample=False, beta_schedule="squaredcos_cap_v2"),
        DPMSolverMultistepScheduler(1000, use_karras_sigmas=True),
    ],
    ids=["clipping", "other noise", "own levels"],
)
def test_the_lens_reads_by_the_scheduler_of_the_run(model, other):
    """Another than the model's own stands for another clean image."""
    lens = LayerLens()
    with dit_lens.trace(model, probes=[lens]):
        run = dit_lens.sample(model, [1, 1], steps=4, scheduler=other)
    seen = LayerLens()
    again = seen.of_run(run)
    for step in range(4):
        assert torch.equal(lens.x0(2, step), run.x0[step])
        assert torch.allclose(seen.x0(2, step), run.x0[step], atol=1e-5)
    assert np.allclose(again.xy, lens.result(run.latents[-1]).xy, rtol=1e-4, atol=1e-6)
    with dit_lens.trace(model, names="hook_sample") as t:
        run.forward(1)
    assert np.allclose(t.to_xarray().log_snr, run.log_snr[1])
    by_hand = model.predict_x0(run.outputs[0], run.latents[0], run.timesteps[0], run.scheduler)
    assert torch.equal(by_hand, run.x0[0])
    with pytest.raises(ValueError, match="scheduler='ddim' can't be used; expected a scheduler of"):
        model.predict_x0(run.outputs[0], run.latents[0], run.timesteps[0], "ddim")


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


def test_twins_of_no_class_are_pairs_like_others():
    """Without guidance no null half is run; with it the null half alone is left out."""
    model = HookedDiT(make_pipe())
    null = model.cfg.null_class
    for labels in ([null] * 3, [3, null, 3]):
        for guidance in (1.0, 2.0):
            probe = TwinDivergence()
            found = probe.run(model, labels, steps=2, guidance=guidance)
            with dit_lens.trace(model) as t:
                dit_lens.twins(model, 3, labels, steps=2, guidance=guidance)
            a, b = t["resid_post", 1][:, :3], t["resid_post", 1][:, 3:6]
            seen = found.difference.sel(layer=1, channels="raw").sum("band")
            wanted = (a - b).square().sum((-1, -2))
            assert np.allclose(seen, wanted, rtol=1e-3, atol=1e-6), (labels, guidance)


def test_a_gap_of_no_class():
    """The unconditional gap, by the null label or the empty prompt."""
    one = HookedDiT(make_pipe())
    null = one.cfg.null_class
    for labels in ([null], [0, null]):
        found = measure_gap(one, 16, 4, labels=labels, clones=False, resamples=20)
        assert np.isfinite(found.difference_energy).all()
    with quiet():
        pipe = family_named("SD3Transformer2DModel").small_pipeline()
    with HookedDiT(pipe) as model:
        found = measure_gap(model, 16, 4, labels=["", "c d"], clones=False, resamples=20)
        assert np.isfinite(found.difference_energy).all()


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


@pytest.mark.parametrize("what", [lambda seen, site: seen, lambda seen, site: site.x])
def test_a_probe_that_changes_what_it_sees_is_refused(model, what):
    class Edits(Probe):
        names = "resid_mid"

        def observe(self, activation, site):
            what(activation, site).mul_(1.01)

    text = "Edits changed its activation or site.x in place at 'blocks.0.hook_resid_mid'"
    with pytest.raises(InvalidState, match=text):
        Edits().run(model, [1], steps=2)
    assert not model.instrumentation.busy


def test_a_probe_that_returns_an_activation_is_refused(model):
    """As if it were an edit."""

    class Edits(Probe):
        names = "resid_mid"

        def observe(self, activation, site):
            return 1.01 * activation

    with pytest.raises(InvalidState, match="Edits returned another activation for 'blocks.0.hook"):
        Edits().run(model, [1], steps=2)
    assert not model.instrumentation.busy


def test_run_is_a_run_under_observation(model):
    """Each probe's `run(model, labels, ...)` is what one would write with a trace or twins."""
    split = SpectralSplit()
    with dit_lens.trace(model, probes=[split]):
        dit_lens.sample(model, [1, 2], steps=2, seeds=5)
    assert SpectralSplit().run(model, [1, 2], steps=2, seeds=5).identical(split.result())

    lens = LayerLens()
    with dit_lens.trace(model, probes=[lens]):
        run = dit_lens.sample(model, [1, 1, 2, 2], steps=2, guidance=2.0)
    both = torch.cat([run.latents[-1]] * 2)
    found = LayerLens().run(model, [1, 1, 2, 2], steps=2, guidance=2.0)
    assert found.identical(lens.result(both)) and LayerLens().run(model, steps=1).batch.size == 16

    divergence = TwinDivergence()
    dit_lens.twins(model, 2, [3, 4], release=0, steps=2, probes=[divergence])
    again = TwinDivergence().run(model, [3, 4], release=0, steps=2)
    assert again.identical(divergence.result())
    assert list(again.channels.values) == ["raw", "standardised", "trimmed"]

    patched = TwinPatching().run(model, [3, 4], layers=[0], windows=1, release=1, steps=3)
    pair = dit_lens.twins(model, 2, [3, 4], release=1, steps=3)
    patches = dit_lens.patching.grid([0], ["attn_out", "mlp_out"], [range(1, 3)])
    by_hand = dit_lens.patching.as_grid(dit_lens.patching.sweep(pair.a, pair.b, patches))
    assert patched.move.identical(by_hand.move)


def test_a_probe_that_only_runs_watches_no_other_run(model):
    class Own(Probe):
        names = ()

        def run(self, model, labels=None, **settings):
            return "mine"

    assert Own().run(model) == "mine"
    for probe in (Own(), TwinPatching()):
        text = f"{type(probe).__name__} observes no hook point, its names are empty; use its run"
        with pytest.raises(ValueError, match=text), dit_lens.trace(model, probes=[probe]):
            pass
    assert model.instrumentation.listening == 0 and not model.instrumentation.watchers


def test_built_in_probes_use_what_a_stranger_can():
    """They import listed names of dit_lens and its namespaces only, and touch
    nothing private.
    """
    import ast
    import importlib
    from pathlib import Path

    import dit_lens.probes

    open_to_all = {
        "dit_lens",
        "dit_lens.measures",
        *(f"dit_lens.{n}" for n in dit_lens._NAMESPACES),
    }
    files = sorted(Path(dit_lens.probes.__file__).parent.glob("[a-z]*.py"))
    assert len(files) == 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dit_lens"):
                assert node.level == 0 and node.module in open_to_all, (file.name, node.module)
                listed = importlib.import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(listed), (file.name, node.module)
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_") or node.attr.endswith("__"), (
                    file.name,
                    node.attr,
                )
                assert node.attr not in ("instrumentation", "family", "call"), (
                    file.name,
                    node.attr,
                )


def test_the_registry():
    built_in = {"SpectralSplit", "TwinDivergence", "LayerLens", "TwinPatching"}
    assert built_in == {
        name
        for name, entry in registered_probes().items()
        if entry.value.startswith("dit_lens.probes.")
    }
    assert load_probe("LayerLens") is LayerLens
    with pytest.raises(ValueError, match="No probe is called 'LayerLense'; installed: 'LayerLens'"):
        load_probe("LayerLense")


def test_the_lens_never_fires_a_user_s_module_hooks():
    dit = make_dit(channels=1, classes=10)
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    fired = []
    for module in dit.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([500, 500]), torch.tensor([3, 7])
    with torch.no_grad():
        out, cache = model.run_with_cache(x, t, y, names_filter="resid_post")
        fired.clear()
        assert torch.equal(model.unembed(cache["resid_post", -1], t, y), out) and not fired
        model(x, t, y)
        alone = len(fired)
        fired.clear()
        with dit_lens.trace(model, probes=[LayerLens()]):
            model(x, t, y)
    assert len(fired) == alone  # as without the lens
    assert all(len(module._forward_hooks) == 1 for module in dit.modules())


@pytest.mark.parametrize(
    "read",
    [
        lambda: SpectralSplit().result(),
        lambda: TwinDivergence().result(),
        lambda: LayerLens().result(),
        lambda: LayerLens().x0(3, 1),
        lambda: LayerLens().times(),
    ],
)
def test_a_probe_that_never_ran_says_so(read):
    with pytest.raises(InvalidState, match="has seen nothing: use its run"):
        read()
