"""Any size of run: micro-batches, memory, host synchronisations and forwards, counted."""

import gc
import inspect
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_dit, make_pipe
from counting import forwards, peak_bytes
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import Bands, HookedDiT
from dit_lens.commands.main import main
from dit_lens.commands.patch import find_causes
from dit_lens.experiments import features, images, latents, one_pass, release_sweep
from dit_lens.experiments.cost import fitting_batch, free_memory, gap_cost, patch_cost
from dit_lens.experiments.gap import measure_gap
from dit_lens.experiments.outcomes import once
from dit_lens.experiments.twin_patches import twin_patches
from dit_lens.families import family_named
from dit_lens.groundtruth import random_weights
from dit_lens.measures.agreement import agreement
from dit_lens.model.trajectories import room
from dit_lens.plans.costs import Costs
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence
from dit_lens.sampling.parts import OutOfMemory, Split

SPLIT = Bands.radial((8, 8), cut=0.25)


def make_model(layers=3, classes=4, channels=1, **kwargs):
    dit = make_dit(layers=layers, classes=classes, channels=channels, **kwargs)
    return HookedDiT(dit, scheduler=DDIMScheduler(1000, clip_sample=False))


@pytest.fixture
def model():
    return make_model()


# Micro-batches


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_run_in_parts_is_the_run(model, guidance):
    labels = [0, 1, 2, 3, 1]
    settings = {"steps": 4, "guidance": guidance, "eta": 1.0}
    whole = dit_lens.sample(model, labels, **settings)
    parts = dit_lens.sample(model, labels, batch=4, **settings)
    assert torch.allclose(parts.latents, whole.latents, rtol=1e-4, atol=1e-4)
    assert {len(p) for s in parts.splits for p in s.parts} <= ({1, 2} if guidance > 1 else {2, 3})
    # what is recomputed is split alike: bit for bit, proven by the witness without a warning
    assert torch.equal(parts.replay(2).latents, parts.latents)
    assert parts.replay(2).splits == parts.splits
    read = parts.activations("resid_post", 1)
    assert torch.allclose(read, whole.activations("resid_post", 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(read[2], parts.activations("resid_post", 1, step=2))
    assert torch.allclose(parts.forward(1), whole.forward(1), rtol=1e-4, atol=1e-4)
    other = whole.replay(1, batch=2)
    assert torch.allclose(other.latents, whole.latents, rtol=1e-4, atol=1e-4) and other.batch == 2
    some = parts.select([0, 3])
    assert torch.allclose(some.replay(1).latents, parts.latents[:, [0, 3]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tie", ["noise", "attention"])
def test_twins_in_parts_stay_together(model, tie):
    more = {"g": 0.6, "eps": 0.5} if tie == "attention" else {}
    settings = {"steps": 5, "release": 3, "tie": tie, "guidance": 2.0, **more}
    whole = dit_lens.twins(model, 5, **settings)
    parts = dit_lens.twins(model, 5, batch=8, **settings)
    assert torch.allclose(parts.run.latents, whole.run.latents, rtol=1e-4, atol=1e-4)
    assert all(len(p) in (2, 4) for p in parts.run.splits[-1].parts)
    assert torch.equal(parts.run.replay(3).latents, parts.run.latents)


def test_a_trace_and_probes_see_parts_as_the_whole(model):
    def watched(batch):
        probes = [SpectralSplit(), TwinDivergence(), LayerLens(SPLIT)]
        with dit_lens.trace(model, names="resid_post", probes=probes) as t:
            pair = dit_lens.twins(model, 6, [0, 1, 2] * 2, steps=3, guidance=2.0, batch=batch)
        return t, [p.result() for p in probes], pair

    (whole, expected, _), (parts, found, _) = watched(None), watched(8)
    assert parts.steps == whole.steps and len(parts.record.calls) == 9
    assert torch.allclose(parts["resid_post", 1], whole["resid_post", 1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts["attn_out", 1], whole["attn_out", 1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.stack("mlp_out"), whole.stack("mlp_out"), rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.latents, whole.latents, rtol=1e-4, atol=1e-4)
    one, other = parts.to_xarray(), whole.to_xarray()
    for name in ("branch", "twin", "label"):
        assert one[name].values.tolist() == other[name].values.tolist()
    for a, b in zip(found, expected, strict=True):
        for name in b:
            assert np.allclose(a[name], b[name], rtol=1e-3, atol=1e-5, equal_nan=True), name


def test_what_needs_the_whole_batch_is_refused_in_parts(model):
    class Last(dit_lens.Probe):
        names = "resid_post"

        def observe(self, activation, site):
            self.seen = activation.mean()

    edits = [("attn_out", lambda a, hook: a - a.mean(0, keepdim=True))]
    with (
        model.hooks(edits),
        pytest.raises(RuntimeError, match="An edit at 'blocks.0.hook_attn_out'"),
    ):
        dit_lens.sample(model, [0, 1], steps=2, batch=1)
    with (
        dit_lens.trace(model, probes=[Last()]),
        pytest.raises(RuntimeError, match="in_parts = True"),
    ):
        dit_lens.sample(model, [0, 1], steps=2, batch=1)
    with model.hooks(edits):  # all at once
        dit_lens.sample(model, [0, 1], steps=2, batch=2)
    with dit_lens.trace(model) as t:
        dit_lens.twins(model, 2, steps=2, batch=2)
    with pytest.raises(RuntimeError, match="in parts that are not in the batch's order"):
        t.save("/nowhere")


def too_large(model, most):
    """A device on which no more than so many images fit."""

    def refuse(_module, args):
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return model.transformer.transformer_blocks[1].register_forward_pre_hook(refuse)


def test_out_of_memory_halves_the_batch_and_goes_on(model):
    whole = dit_lens.twins(model, 6, steps=3)
    expected = TwinDivergence().run(model, pairs=6, steps=3)
    handle = too_large(model, 7)
    with pytest.warns(UserWarning, match="Out of memory with 12 images at once; going on with 6."):
        run = dit_lens.twins(model, 6, steps=3).run
    assert torch.allclose(run.latents, whole.run.latents, rtol=1e-4, atol=1e-4) and run.batch == 6
    assert torch.equal(run.replay(1).latents, run.latents)
    with pytest.warns(UserWarning, match="going on with 6"):
        found = TwinDivergence().run(model, pairs=6, steps=3)
    assert np.allclose(found.energy, expected.energy, rtol=1e-3, equal_nan=True)
    assert fitting_batch(model, 12) == 6
    handle.remove()
    handle = too_large(model, 0)
    with pytest.raises(OutOfMemory, match="Out of memory with one image at once; expected"):
        dit_lens.sample(model, [0], steps=2)
    with pytest.raises(ValueError, match="Not even one image fits the memory of cpu"):
        fitting_batch(model, 4)
    handle.remove()


def test_splits():
    assert Split.of(10, 4).parts == ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
    assert Split.of(6, 4, pairs=True).parts == ((0, 3), (1, 2, 4, 5))
    assert Split.of(6, 1, pairs=True).parts == ((0, 3), (1, 4), (2, 5))  # never less than a pair
    assert Split.of(6, None, copied=True).parts == ((0, 1, 2),)


# Forwards


def test_a_release_sweep_runs_nothing_twice(model):
    pair = dit_lens.twins(model, 8, [0, 1] * 4, steps=12)
    with forwards(model.transformer) as seen:
        found = release_sweep(pair, [latents(SPLIT)], releases=range(12))
    # a twin B for each release, from its own first step on: 78 steps of 8 pairs
    assert len(seen["forwards"]) <= 12
    assert sum(seen["blocks"]) <= 78 * 8 * 3
    split = release_sweep(pair, [latents(SPLIT)], releases=range(12), batch=16)
    assert np.allclose(split.agreement("latents"), found.agreement("latents"), atol=1e-4)
    with forwards(model.transformer) as seen:
        release_sweep(pair, [latents(SPLIT)], releases=range(12), batch=16)
    assert max(seen["forwards"]) <= 16 and sum(seen["blocks"]) <= 78 * 8 * 3
    # each is what a replay by itself gives
    from dit_lens.twinning.twins import twin_seeds

    for r in (0, 5, 11):
        own = pair.a.replay(r, seeds=twin_seeds(1_000_003 * (r + 1), 8)[1]).latents[-1]
        by_hand = latents(SPLIT).compare(pair.a.latents[-1], own, [0, 1] * 4)
        assert np.allclose(found.stats["latents"].xy[r], by_hand.xy, rtol=1e-3, atol=1e-5)


def test_edits_in_parts_say_that_they_may_be(model):
    run = dit_lens.sample(model, [0, 1, 2, 3], steps=3, batch=2)

    def mean(activation, hook):
        return activation.mean(0, keepdim=True).expand_as(activation)

    def half(activation, hook):
        return activation / 2

    with pytest.raises(RuntimeError, match="The edit at 'attn_out' sees a step's whole batch at"):
        run.replay(1, [("attn_out", mean)])
    run.replay(1, [("attn_out", mean)], batch=4)
    half.in_parts = True
    edited = run.replay(1, [("attn_out", half)])
    whole = run.replay(1, [("attn_out", half)], batch=4)
    assert torch.allclose(edited.latents, whole.latents, rtol=1e-4, atol=1e-4)
    read = edited.activations("attn_out", 0, step=2)
    assert torch.allclose(read, whole.activations("attn_out", 0, step=2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_knock_outs_in_parts(model):
    settings = {"pairs": 16, "steps": 4, "resamples": 20, "direct": True}
    digits = dit_lens.load("digits")
    whole = dit_lens.experiments.knock_outs(digits, [1], **settings)
    parts = dit_lens.experiments.knock_outs(digits, [1], batch=8, **settings)
    assert np.allclose(parts.effect, whole.effect, atol=1e-3, equal_nan=True)
    with pytest.raises(ValueError, match="how='mean' takes what it puts in from the whole batch"):
        dit_lens.experiments.knock_outs(model, [1], how="mean", batch=8, pairs=16, steps=4)


SMALL = {"pairs": 16, "steps": 5, "cut": 0.1, "resamples": 20}


def dark(images):
    return {"dark": images.mean((1, 2, 3)) < 0.5}


IN_PARTS = {
    "measure_gap": SMALL,
    "couplings": {**SMALL, "strengths": [0, 1]},
    "couple_alone": {**SMALL, "layers": [1]},
    "attributes": {"read": dark, "pairs": 16, "steps": 6, "resamples": 20},
    "knock_outs": {**SMALL, "layers": [1]},
    "cumulative": {**SMALL, "depths": [1]},
    "smallest_set": SMALL,
    "shapley": {**SMALL, "layers": [1, 2]},
    "cause_map": {"kind": "zero", "items": 12, "steps": 4, "check": 0, "resamples": 20},
    "interchange": {"pairs": 8, "steps": 4, "windows": 1},
    "reuse_plan": {"items": 12, "steps": 4, "resamples": 20, "budget": 0.7, "rounds": 0},
    "diagnose_all": {"samples": 8, "faults": {"dark": lambda x: 1 - x.mean((1, 2, 3))}, "steps": 4},
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_measurement_in_parts_is_the_measurement(name):
    from dit_lens.groundtruth import redundant

    truth = redundant()
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    function, settings = getattr(dit_lens.experiments, name), IN_PARTS[name]
    whole = function(model, **settings, **({"batch": 96} if name == "diagnose_all" else {}))
    with forwards(model.transformer) as seen:
        parts = function(model, **settings, batch=8)
    assert max(seen["forwards"]) <= 8
    if name == "reuse_plan":
        whole, parts = (
            xr.Dataset({k: p.about[k] for k in ("effect_low",)}) for p in (whole, parts)
        )
    for variable in whole.data_vars:
        one, other = whole[variable].values, parts[variable].values
        if one.dtype.kind == "f":
            assert np.allclose(one, other, atol=2e-3, rtol=2e-3, equal_nan=True), variable


def test_every_measurement_has_a_batch():
    """But those that time whole runs, or are given runs that have one."""
    without = set()
    for name in dit_lens.experiments.__all__:
        function = getattr(dit_lens.experiments, name)
        if callable(function) and not isinstance(function, type):
            taken = inspect.signature(function).parameters
            if "model" in taken and "batch" not in taken:
                without.add(name)
    assert without == {"side_by_side", "load_edits"}


def test_a_changed_model_is_noticed_before_a_sweep(model):
    pair = dit_lens.twins(model, 8, [0, 1] * 4, steps=4)
    with torch.no_grad():
        model.transformer.proj_out_2.weight.add_(0.1)
    with pytest.raises(dit_lens.NotReproduced):
        release_sweep(pair, [latents(SPLIT)], releases=[1, 2, 3])


def test_clones_are_one_trajectory_until_they_part(model):
    with forwards(model.transformer) as seen:
        pair = dit_lens.twins(model, 4, steps=6, release=4)
    assert seen["forwards"] == [4] * 4 + [8] * 2
    assert torch.equal(pair.a.latents[:5], pair.b.latents[:5])
    assert torch.equal(pair.run.replay(0).latents, pair.run.latents)
    read = pair.run.activations("resid_post", 1, step=2)
    assert torch.equal(read[:4], read[4:])
    probe = TwinDivergence()
    with (
        dit_lens.trace(model, probes=[probe]),
        model.instrumentation.under(twin=("A",) * 4 + ("B",) * 4),
    ):
        assert torch.allclose(pair.run.replay(2).latents, pair.run.latents, atol=1e-4)
    assert np.abs(probe.result().difference.isel(step=0)).max() < 1e-6
    with forwards(model.transformer) as seen:  # who watches sees both
        TwinDivergence().run(model, pairs=4, steps=3, release=1)
    assert seen["forwards"] == [8] * 3


def test_agreement_takes_each_transform_once(monkeypatch):
    calls = Counter()
    plain = Bands.coefficients
    monkeypatch.setattr(
        Bands, "coefficients", lambda self, x: calls.update(["transform"]) or plain(self, x)
    )
    agreement(torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), SPLIT)
    assert calls["transform"] == 2


def test_the_vae_decodes_each_image_once():
    pipe = make_pipe(classes=4)
    model = HookedDiT(pipe)
    decoded = []
    plain = pipe.vae.decode
    pipe.vae.decode = lambda z, *a, **k: (
        decoded.extend(x.sum().item() for x in z) or plain(z, *a, **k)
    )
    pair = dit_lens.twins(model, 8, [0, 1] * 4, steps=4)
    outcomes = [images(model), features(model, lambda x: x.mean((2, 3)))]
    decoded.clear()
    with once():
        one_pass(pair, outcomes)
        release_sweep(pair, outcomes, [0, 1, 2])
    # at step 0 the twins are one, and the last x0 is the finished image
    assert len(decoded) == len(set(decoded)) == 8 + 3 * 16 + 3 * 8


# Memory


@pytest.mark.slow
def test_a_run_holds_three_trajectories():
    model = make_model(layers=1, channels=4)
    n, steps = 32, 50
    unit = 4 * (steps + 1) * n * 4 * 8 * 8
    for work in (
        lambda: dit_lens.sample(model, [i % 4 for i in range(n)], steps=steps, batch=4),
        lambda: dit_lens.twins(model, n // 2, steps=steps, batch=4),
    ):
        work()
        with peak_bytes() as found:
            run = work()
        assert found["most"] <= 3.2 * unit, found["most"] / unit
        del run
        gc.collect()


def test_a_gap_keeps_no_more_for_more_layers():
    """Of what the picture shows it kept the whole batch, in every layer at some steps."""
    found = {}
    for layers in (2, 8):
        truth = random_weights(0, layers, sample_size=32, patch_size=16, in_channels=4)
        model = dit_lens.HookedDiT(truth.transformer, scheduler=truth.scheduler)
        measure_gap(model, 16, 4, resamples=5, labels=[0])
        with peak_bytes() as seen:
            measure_gap(model, 16, 4, resamples=5, labels=[0])
        found[layers] = seen["most"]
    step = 2 * 16 * 4 * 32 * 32 * 4
    assert found[8] - found[2] < 2 * step, found


def test_a_reducing_probe_keeps_what_it_reduced_to(model):
    probe = SpectralSplit()
    with dit_lens.trace(model, probes=[probe]):
        dit_lens.sample(model, [0] * 8, steps=20)
    kept = sum(room.nbytes for room in probe.energy._rooms.values())
    bands = probe.bands.n
    assert kept == 4 * 3 * 20 * 8 * bands  # layers, steps, items, bands


# Cost


@pytest.mark.parametrize("batch", [None, 12])
def test_a_cost_is_what_is_then_run(model, batch):
    cost = gap_cost(model, 16, 6, batch=batch, clones=False, calibrate=False)
    with forwards(model.transformer) as seen:
        measure_gap(model, 16, 6, batch=batch, clones=False, resamples=20)
    assert cost.exact and len(seen["forwards"]) == cost.forwards
    assert sum(seen["forwards"]) == cost.images and sum(seen["blocks"]) == cost.blocks
    assert cost.macs == cost.images * Costs.of(model).whole
    planned = gap_cost(model, 16, 12, batch=batch, calibrate=False)
    with forwards(model.transformer) as seen:
        measure_gap(model, 16, 12, batch=batch, resamples=20)
    assert not planned.exact and abs(planned.images / sum(seen["forwards"]) - 1) < 0.25


def test_patches_of_whole_blocks_are_one_a_layer():
    model = HookedDiT(family_named("FluxTransformer2DModel").small_pipeline())
    size = {"pairs": 4, "steps": 9}
    knocked = 2 * 4 * 9 * (1 + model.cfg.n_layers)
    planned = patch_cost(model, **size, ways=1).images - knocked
    with forwards(model.transformer) as seen:
        twin_patches(model, **size, windows=4, release=3, seed=0, cut=0.25, batch=16)
    assert abs(planned / sum(seen["forwards"]) - 1) < 0.25


def test_the_trajectories_of_patches_are_those_that_are_then_kept(monkeypatch, tmp_path):
    model = HookedDiT(
        make_dit(layers=2, classes=4, channels=1),
        scheduler=DDIMScheduler(1000, prediction_type="v_prediction"),
        trajectories=tmp_path,
    )
    live, most, made = weakref.WeakSet(), [], room

    def counted(*asked):
        live.add(x := made(*asked))
        most.append(sum(each.nbytes for each in live))
        return x

    monkeypatch.setattr("dit_lens.sampling.loop.room", counted)
    find_causes(model, 16, 12, 0, 0.25, tmp_path, how=["zero", "mean"])
    planned = patch_cost(model, 16, 12, ways=2)
    assert abs(planned.kept / max(most) - 1) < 0.25
    assert planned.stored == (16 * 2 + 10) * 3 * 2 * 13 * 4 * 8 * 8


def test_what_pytorch_keeps_for_itself_is_free(monkeypatch):
    """A gap after a gap is not refused for the memory that the first one used."""
    of_device = {"mem_get_info": (10, 80), "memory_reserved": 60, "memory_allocated": 5}
    for name, value in of_device.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 65


def test_what_does_not_fit_is_said_before(model, monkeypatch):
    monkeypatch.setattr("dit_lens.experiments.cost.free_memory", lambda device: 0)
    cost = gap_cost(model, 4096, 50, calibrate=False)
    with pytest.raises(ValueError, match=r"gap takes about 0.\d GB and 0.0 GB are free; expected"):
        cost.require_fit()


def test_the_command_line_says_what_can_t_be_done(capsys, tmp_path):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n")
    for options, text in (
        (["--device", "nosuch"], "device='nosuch' can't be used"),
        (["--dtype", "float8_e4m3fn"], "The device 'cpu' can't compute in torch.float8_e4m3fn"),
        (["--dtype", "int8"], "dtype='int8' is none that weights can have"),
        (["--prompts", str(tmp_path / "no.txt")], "There is no file"),
        (["--prompts", str(empty)], "is empty; expected prompts, one a line"),
        (["--labels", "3", "99"], "Label 99 is out of range"),
    ):
        assert main(["gap", "digits", "--quick", *options]) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1, said


def test_gap_takes_labels(model):
    found = measure_gap(model, 16, 4, labels=[2, 3], clones=False, resamples=20)
    assert found.attrs["pairs"] == 16
    with pytest.raises(ValueError, match="Label 3 would have 0 of 16 pairs|would have 1 of 16"):
        measure_gap(make_model(classes=20), 16, 4, labels=list(range(20)))


def test_a_step_of_which_a_part_is_missing_is_refused(model):
    class Broken(dit_lens.Probe):
        names, in_parts = "hook_sample", True

        def start(self, model):
            self.kept, self.seen = dit_lens.Series(), 0

        def observe(self, activation, site):
            self.seen += 1
            if self.seen == 4:  # the second part of the second step
                raise ZeroDivisionError
            self.kept.put(site, activation)

    probe = Broken()
    with pytest.raises(ZeroDivisionError), dit_lens.trace(model, probes=[probe]):
        dit_lens.sample(model, [0, 1, 2, 3], steps=3, batch=2)
    kept = probe.kept.at("hook_sample", 0).clone()
    probe.kept.at("hook_sample", 0).zero_()  # a copy
    assert len(kept) == 4 and torch.equal(probe.kept.at("hook_sample", 0), kept)
    with pytest.raises(RuntimeError, match="at step 1 only a part of the batch was kept"):
        probe.kept.at("hook_sample", 1)


@pytest.mark.parametrize("host", ["cpu", "none here"])
@pytest.mark.parametrize("batch", [None, 2, 3])
def test_what_is_kept_on_disk_is_what_is_kept_in_memory(model, monkeypatch, host, batch):
    """Also where a step waits until it is whole, as on a device, and is changed meanwhile."""
    monkeypatch.setattr("dit_lens.tracing.series.HOST", host)

    class Both(dit_lens.Probe):
        names, in_parts = ("hook_embed", "resid_post"), True

        def start(self, model):
            self.memory, self.disk = dit_lens.Series(), dit_lens.Series(on_disk=True)

        def observe(self, activation, site):
            for series in (self.memory, self.disk):
                series.put(site, (mine := activation.clone()))
                mine.zero_() if host != "cpu" else None

    probe = Both()
    with dit_lens.trace(model, probes=[probe]):
        dit_lens.twins(model, pairs=3, steps=4, release=2, batch=batch)
    assert probe.disk.keys == probe.memory.keys and probe.disk.steps == probe.memory.steps
    assert torch.equal(probe.disk.stacked(), probe.memory.stacked())
