"""Models on another device than the CPU, one that is emulated (tests/elsewhere.py), and what
else of a machine with a GPU can be seen without one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from elsewhere import elsewhere
from test_every_family import MEASUREMENTS, SENTENCES

import dit_lens
from dit_lens.commands.common import open_model
from dit_lens.errors import InvalidState
from dit_lens.families import family_named
from dit_lens.families.registry import OURS
from dit_lens.model.quiet import quiet
from dit_lens.patching import Patch, sweep
from dit_lens.testing import family_contract as contract

ATTACK = bool(os.environ.get("DIT_LENS_ATTACK"))
"""`make attack` asks all that the device emulates; HunyuanDiT's pipeline is more than it knows."""
FAMILIES = [name for name in OURS if not name.startswith("Hunyuan")]
FEW = ("gap", "attributes", "knock_outs", "patches", "cause_map", "diagnose")


@pytest.mark.slow
@pytest.mark.parametrize("where", [None] if ATTACK else ["small(1)", "pipeline"])
@pytest.mark.parametrize("name", FAMILIES if ATTACK else ["DiTTransformer2DModel"])
def test_a_family_keeps_its_contract_elsewhere(name, where):
    with elsewhere() as device:
        rows = contract.examine(name, where, device)
    failed = [f"{row.where}: {row.check}: {row.message}" for row in rows if not row.ok]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES if ATTACK else ["SD3Transformer2DModel"])
@pytest.mark.parametrize("place", [None, "cpu"] if ATTACK else [None])
def test_measurements_elsewhere(name, place):
    wrong = []
    with elsewhere() as device, quiet():
        pipe = family_named(name).small_pipeline().to(device)
        model = dit_lens.HookedDiT(pipe, trajectories=place)
        for what, measure in MEASUREMENTS.items():
            try:
                if ATTACK or what in FEW:
                    measure(model)
            except Exception as error:
                if not any(told in str(error) for told in SENTENCES):
                    wrong.append((what, repr(error)))
    assert not wrong


def test_images_of_latents_that_are_on_the_cpu():
    with elsewhere() as device:
        pipe = make_pipe().to(device)
        model = dit_lens.HookedDiT(pipe)
        x = torch.randn(2, 4, 8, 8)
        images = dit_lens.sampling.run.decode(model, x)
        assert images.device == x.device
        assert torch.equal(images, dit_lens.sampling.run.decode(model, x.to(device)).cpu())
        pipe.vae.to("cpu")
        here = dit_lens.sampling.run.decode(model, x.to(device)).cpu()
        assert torch.allclose(images, here, atol=1e-5)


def test_a_saved_trace_comes_back_to_the_models_device(tmp_path):
    with elsewhere() as device:
        model = dit_lens.HookedDiT(make_dit().to(device), scheduler=DDIMScheduler(1000))
        with dit_lens.trace(model, names="resid_post") as t:
            dit_lens.sample(model, [3, 7], steps=3, guidance=2.0)
        path = t.save(tmp_path / "trace.safetensors")
        again = dit_lens.load_trace(path, model)
        for name in ("resid_post", "resid_mid"):
            assert again[name, 1].device == model.device
            assert torch.equal(again[name, 1], t[name, 1])
        alone = dit_lens.load_trace(path)
        assert torch.equal(alone["resid_post", 1], t["resid_post", 1].cpu())
        assert alone["resid_post", 1].device.type == "cpu"


def test_inputs_that_were_on_the_host_stay_there(tmp_path):
    """As a pipeline's timestep may be, of which the GPU would make other last bits."""
    with elsewhere() as device:
        model = dit_lens.HookedDiT(make_dit().to(device))
        x, y = torch.randn(2, 4, 8, 8).to(device), torch.tensor([3, 7]).to(device)
        with torch.no_grad(), dit_lens.trace(model) as t:
            model.transformer(x, timestep=torch.tensor([700.0, 31.0]).to(device), class_labels=y)
        again = dit_lens.load_trace(t.save(tmp_path / "trace.safetensors"), model)
        kept = [
            call.inputs["timestep"].device for call in (t.record.calls[0], again.record.calls[0])
        ]
        assert kept[0] == kept[1]
        assert torch.equal(again["resid_post", 1], t["resid_post", 1])


def test_a_device_without_float64_samples_and_does_not_measure(monkeypatch):
    """Apple's, which the commands do not take by themselves."""
    with elsewhere(lacks=(torch.float64,)) as device:
        model = dit_lens.HookedDiT(make_dit().to(device), scheduler=DDIMScheduler(1000))
        with dit_lens.trace(model, probes=[dit_lens.probes.SpectralSplit()]) as t:
            dit_lens.sample(model, [3, 7], steps=3, eta=1.0)
        assert t["resid_post", 1].isfinite().all()
        assert t.to_xarray("resid_post").timestep.dtype == "float64"
        with pytest.raises(ValueError, match="'away:0' has no float64.*the model on 'cpu'"):
            dit_lens.experiments.measure_gap(model, 16, 4)

    def current(check_available):
        return torch.device("away")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    args = argparse.Namespace(
        device=None, model="digits", dtype="float32", size=None, trajectories=None
    )
    for lacks, expected in (((torch.float64,), "cpu"), ((), "away")):
        with elsewhere(lacks):
            assert open_model(args).device.type == expected


def test_a_run_of_a_model_that_was_moved_since():
    model = dit_lens.HookedDiT(make_dit(layers=2), DDIMScheduler(1000))
    run = dit_lens.sample(model, [1, 2], steps=3)
    last = run.images
    with elsewhere() as device:
        model.to(device)
        other = dit_lens.sample(model, [1, 2], seeds=5, steps=3)
        asked = [
            lambda: run.activations("resid_post", 1, step=1),
            lambda: run.forward(1),
            lambda: run.replay(1),
            lambda: run.select([1]),
            lambda: sweep(run, other, [Patch("attn_out", 1, range(1, 2))]),
            lambda: sweep(other, run, [Patch("attn_out", 1, range(1, 2))]),
        ]
        said = r"was made on 'cpu' and its model is on 'away:0' now; expected .* model.to\('cpu'\)"
        for ask in asked:
            with pytest.raises(InvalidState, match=said):
                ask()
        assert torch.equal(run.images, last)
        model.to("cpu")
    for ask in (lambda: run.replay(1), lambda: run.select([1, 0])):
        with pytest.raises(InvalidState, match="default device is 'meta'"), torch.device("meta"):
            ask()
    assert torch.equal(run.replay(1).latents, run.latents)


def test_a_default_device_is_refused():
    model = dit_lens.HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    torch.set_default_device("meta")
    try:
        for use in (
            lambda: dit_lens.sample(model, [1], steps=2),
            lambda: dit_lens.trace(model.transformer),
        ):
            with pytest.raises(InvalidState, match=r"default device is 'meta'.*set_default_device"):
                use()
    finally:
        torch.set_default_device(None)


STORED = """
import diffusers, dit_lens
model = dit_lens.load("digits")
print(diffusers.__file__)
dit_lens.record(model, ("resid_post", 2), [3], "acts", steps=2)
dit_lens.experiments.knock_outs(model, [0], pairs=16, steps=3, resamples=20, store="store")
"""


@pytest.mark.slow
def test_diffusers_from_a_checkout(tmp_path):
    """Its classes are no work of the user's, and what they do is known by their source."""
    (tmp_path / "source").mkdir()
    package = Path(diffusers.__file__).parent
    (tmp_path / "source" / "diffusers").symlink_to(package)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "source")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STORED],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
