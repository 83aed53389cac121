"""Runs whose latents lie elsewhere than the model computes: the same to the bit, in less memory."""

import errno
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr
from conftest import make_dit
from diffusers import DDIMScheduler
from elsewhere import WAITS, device_memory, elsewhere
from torch import Tensor

import dit_lens
from dit_lens import experiments as ask
from dit_lens.commands.main import main
from dit_lens.errors import InvalidState, InvalidType, MissingFile
from dit_lens.experiments.cost import gap_cost
from dit_lens.patching import Patch

PARTS = ("latents", "x0", "outputs")
SIZE = {"pairs": 16, "steps": 4, "resamples": 10}
BANDS = dit_lens.Bands.radial((8, 8), cut=0.25)


def opened(place, device="cpu", **more):
    scheduler = DDIMScheduler(1000)
    return dit_lens.HookedDiT(make_dit(2, 4).to(device), scheduler, trajectories=place, **more)


@pytest.fixture(params=["cpu", "a folder"])
def place(request, tmp_path):
    return "cpu" if request.param == "cpu" else tmp_path


def halved(activation, hook):
    return 0.5 * activation


halved.in_parts = True


def runs(model):
    run = dit_lens.sample(model, [1, 2, 1], steps=5, guidance=2.0, scheduler="dpm++", batch=4)
    pair = dit_lens.twins(model, 3, steps=5, release=2)
    steered = run.replay(2, [("blocks.1.hook_mlp_out", halved)], seeds=[7, 8, 9])
    return run, run.replay(3), steered, run.select([0, 2]), pair.run, pair.b, pair.a.replay(3)


def test_runs_are_the_same(place):
    with elsewhere() as device:
        expected = runs(opened(None, device))
        found = runs(opened(place, device))
        for one, other in zip(expected, found, strict=True):
            for part in PARTS:
                kept = getattr(other, part)
                assert kept.device.type == "cpu" and getattr(one, part).device.type == "away"
                assert torch.equal(getattr(one, part).cpu(), kept), part
            assert other.finished.device.type == other.images.device.type == "away"
            assert torch.equal(one.images, other.images)
        read = [run.activations("resid_post", 1, step=3) for run in (expected[0], found[0])]
        assert torch.equal(*read)


MEASURED = {
    "gap": lambda m, a, b: ask.measure_gap(m, **SIZE),
    "there and back": lambda m, a, b: torch.from_numpy(
        ask.there_and_back(a, [ask.latents(BANDS)], [1, 2, 3]).agreement("latents")
    ),
    "patches": lambda m, a, b: dit_lens.patching.sweep(
        a, b, [Patch("attn_out", 1, range(1, 3)), Patch("mlp_out", 0, range(2, 3))]
    ),
    "attribution": lambda m, a, b: dit_lens.patching.attribute(a, b),
    "path": lambda m, a, b: dit_lens.patching.path_patch(
        a, b, ("attn_out", 0), ("mlp_out", 1), range(1, 3)
    ),
    "couplings": lambda m, a, b: ask.couplings(m, [0, 1], **SIZE | {"steps": 5}),
    "causes": lambda m, a, b: ask.cause_map(m, items=12, steps=4, resamples=10, projections=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MEASURED)
def test_measurements_are_the_same(what):
    found = []
    with elsewhere() as device:
        for place in (None, "cpu"):
            model = opened(place, device)
            two = (dit_lens.sample(model, [1, 2] * 6, seed, steps=4) for seed in (0, 50))
            found.append(MEASURED[what](model, *two))
    one, other = found
    assert one.identical(other) if isinstance(one, xr.Dataset) else torch.equal(*found)


def test_the_device_is_not_waited_for():
    with elsewhere() as device:
        model = opened("cpu", device)
        for place in (None, "cpu", "cpu"):
            model.trajectories = place
            WAITS.clear()
            dit_lens.sample(model, [1, 2], steps=4)
        assert not WAITS


@pytest.mark.slow
def test_what_the_device_holds_does_not_grow_with_steps():
    pairs, few, many = 16, 4, 8
    step = 3 * 4 * 2 * pairs * 4 * 8 * 8  # x_t, x0 and output
    with elsewhere() as device:
        for place, grows in ((None, True), ("cpu", False)):
            model = opened(place, device)
            for work in (
                lambda steps, m=model: dit_lens.twins(m, pairs, steps=steps),
                lambda steps, m=model: ask.measure_gap(m, pairs, steps, clones=False, resamples=5),
            ):
                most = []
                for steps in (few, many):
                    with device_memory() as found:
                        work(steps)
                    most.append(found["most"])
                more = (most[1] - most[0]) / (step * (many - few))
                assert 0.9 < more < 1.4 if grows else more < 0.1, (place, more)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_folder_s_files_go_with_their_runs(tmp_path):
    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(str(tmp_path) in line for line in lines)

    model = opened(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    run = dit_lens.sample(model, [1, 2], steps=3)
    other = run.select([1, 0])
    assert mapped() == 6 and len(os.listdir("/proc/self/fd")) == descriptors
    assert not list(tmp_path.iterdir())
    assert other.latents.sum() == run.latents.flip(1).sum()
    del run, other
    assert mapped() == 0


def test_views_and_copies_keep_the_place(tmp_path):
    model = opened(tmp_path)
    assert dit_lens.HookedDiT(model).trajectories == str(tmp_path)
    assert dit_lens.HookedDiT(model, trajectories="cpu").trajectories == "cpu"
    assert pickle.loads(pickle.dumps(model)).trajectories == str(tmp_path)
    assert dit_lens.load("digits", trajectories="cpu").trajectories == "cpu"


def test_a_run_from_a_store_lies_there(tmp_path):
    """What a diagnosis was given is kept with its pieces."""
    from dit_lens.sampling.kept import arrays_of, run_of

    with elsewhere() as device:
        model = opened("cpu", device)
        run = dit_lens.sample(model, [1, 2], steps=3)
        arrays = arrays_of(run)
        for each in arrays.values():
            each.flags.writeable = False  # as those of a file may be
        again = run_of(arrays, model)
        assert {getattr(again, part).device.type for part in PARTS} == {"cpu"}
        assert torch.equal(again.replay(1).latents, run.latents)


def test_bad_places(tmp_path, monkeypatch, capsys):
    for bad, error in ((3, InvalidType), ("nowhere", MissingFile), ("cuda:1", MissingFile)):
        with pytest.raises(error, match=rf"trajectories={bad!r}.*expected 'cpu', or a folder"):
            opened(bad)
        with pytest.raises(error, match="expected 'cpu', or a folder"):
            dit_lens.load("digits", trajectories=bad)
    assert main(["gap", "digits", "--trajectories", "nowhere"]) == 2
    assert "no folder that is here" in capsys.readouterr().err
    model = opened(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        said = r"can't take the .* GB of a trajectory \(No space left on device\); expected traj"
        with pytest.raises(InvalidState, match=said):
            dit_lens.sample(model, [1], steps=3)
    assert not list(tmp_path.iterdir()) and model.instrumentation.listening == 0
    assert dit_lens.sample(model, [1], steps=3).latents.isfinite().all()


@pytest.mark.parametrize("place", [None, "cpu"])
def test_a_trajectory_that_does_not_fit_the_memory(place, monkeypatch):
    """A sentence, that of trajectories= too."""
    model = opened(place)

    def full(make):
        def made(*given, **how):
            if torch.Size([51, 1, 4, 8, 8]) in given:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
            return make(*given, **how)

        return made

    monkeypatch.setattr(torch, "empty", full(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", full(Tensor.new_empty))
    said = r"^The memory of cpu can't take the 5.22e-05 GB of a trajectory \(CUDA out of mem.*; exp"
    with pytest.raises(InvalidState, match=said):
        dit_lens.sample(model, [1], steps=50)


def test_what_does_not_fit_there_is_said_before(tmp_path, monkeypatch):
    plain, cost = (gap_cost(opened(p), 16, 6, calibrate=False) for p in (None, tmp_path))
    trajectories = 3 * 2 * 16 * 7 * 4 * 4 * 8 * 8
    assert plain.kept == 0 and cost.kept == trajectories
    assert plain.memory - cost.memory == trajectories and cost.room > 0
    cost.require_fit()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    cost = gap_cost(opened(tmp_path), 16, 6, calibrate=False)
    said = r"The trajectories of gap take 0.0 GB and 0.0 GB are free where they are kept; expected"
    with pytest.raises(ValueError, match=said):
        cost.require_fit()
