"""Measurements in pieces: kept, gone on with, shared between processes, and the same to the bit."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from conftest import make_dit
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

import dit_lens
from dit_lens import HookedDiT
from dit_lens.commands import main
from dit_lens.commands.keeping import about_command
from dit_lens.errors import InvalidState, InvalidType, InvalidValue, UnwritableFile
from dit_lens.experiments import (
    Engine,
    Plan,
    attributes,
    cause_map,
    compare,
    couple_alone,
    couplings,
    diagnose,
    diagnose_all,
    interchange,
    knock_outs,
    measure_gap,
    reuse_plan,
    shapley,
    smallest_set,
)
from dit_lens.families import family_named, modules
from dit_lens.pieces import content, deaths, digest, engines, flat, leases, measured, whole, worker
from dit_lens.pieces.leases import Leases
from dit_lens.pieces.sending import Call
from dit_lens.pieces.store import Store
from dit_lens.pieces.work import Piece, Work, at, results
from dit_lens.sampling.kept import arrays_of, run_of

GAP = {"pairs": 16, "steps": 6, "resamples": 20, "batch": 8}
KILLS = int(os.environ.get("DIT_LENS_ATTACK_KILLS", "4"))
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


def fresh_model():
    return HookedDiT(make_dit(classes=4), scheduler=DDIMScheduler(1000, clip_sample=False))


@pytest.fixture(scope="module")
def model():
    return fresh_model()


@pytest.fixture(scope="module")
def plain(model):
    return measure_gap(model, **GAP)


def parity(images):
    return {"bright": (images.mean((1, 2, 3)) > 0.5).long()}


# One process.


def dark(images):
    """The darkest half."""
    return 1 - images.mean((1, 2, 3))


def compared(model, **kept):
    times = dit_lens.sample(model, [1], steps=4).timesteps
    plan = Plan.of(model, times, [(0, "attn", 2), (0, "mlp", 2), (1, "mlp", 3)])
    return compare(model, plan, items=12, steps=4, resamples=20, **kept)


def planned(model, **kept):
    plan = reuse_plan(model, 0.7, items=8, steps=4, resamples=20, **kept)
    return xr.Dataset(attrs=plan.about | {"cells": plan.cells, "lines": plan.lines})


def weaker(activation, hook):
    return 0.5 * activation


def diagnosed(model, edited=False, **kept):
    run = dit_lens.sample(model, [1], seeds=3, steps=5, eta=1.0)
    run = run.replay(1, [("blocks.1.hook_mlp_out", weaker)], until=4) if edited else run
    at = float(dark(run.images)) - 1e-4  # about as dark as others
    options = {"at": at, "others": 8, "clones": 2, "releases": 3, "pairs": 3}
    found = diagnose(model, run, dark, **options, **kept)
    assert found.result.images > 20 and "pairs" in str(found.result.attrs)
    return found.result


def diagnosed_all(model, **kept):
    faults = {"structure": dark}
    return diagnose_all(model, 12, faults, at=0.5, steps=5, most=2, **kept)


MEASUREMENTS = {
    "gap": (measure_gap, GAP),
    "couplings": (couplings, {"strengths": [0, 1], "pairs": 8, "steps": 5, "resamples": 20}),
    "couple_alone": (
        couple_alone,
        {"model": "digits", "layers": [0, 1], "pairs": 8, "steps": 6, "resamples": 20},
    ),
    "map": (cause_map, {"items": 8, "steps": 4, "check": 2, "resamples": 20}),
    "interchange": (interchange, {"pairs": 8, "steps": 4, "windows": 1}),
    "compare": (compared, {}),
    "plan": (planned, {}),
    "diagnosis": (diagnosed, {}),
    "diagnosis of an edited run": (diagnosed, {"edited": True}),
    "diagnoses": (diagnosed_all, {}),
    "attributes": (attributes, {"read": parity, "pairs": 16, "steps": 4, "resamples": 20}),
}


class Counted(Exception):
    """The process ends here, as if it was killed."""


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_what_was_finished_is_not_run_again(name, model, tmp_path, monkeypatch):
    """Broken off at every piece in turn, the measurement ends with the same bits and has run each
    piece once."""
    function, settings = MEASUREMENTS[name][0], dict(MEASUREMENTS[name][1])
    model = dit_lens.load(settings.pop("model")) if "model" in settings else model
    alone = function(model, **settings)
    runs, write = [], Store.write

    def break_off(self, name, arrays, seconds):
        write(self, name, arrays, seconds)
        runs.append(name)
        raise Counted

    monkeypatch.setattr(Store, "write", break_off)
    for _ in range(60):
        try:
            found = function(model, **settings, store=tmp_path / "store")
            break
        except Counted:
            pass
    assert found.identical(alone)
    assert len(runs) == len(set(runs)) > 1, runs


@pytest.mark.slow
def test_knock_outs_in_pieces(tmp_path):
    from dit_lens.groundtruth import redundant

    truth = redundant()
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    options = {"pairs": 16, "steps": 5, "cut": 0.1, "resamples": 50}
    for function, more in (
        (knock_outs, {"layers": [1, 3], "direct": True}),
        (smallest_set, {}),
        (shapley, {"layers": [1, 2]}),
    ):
        folder = tmp_path / function.__name__
        alone = function(model, **more, **options)
        kept = function(model, **more, **options, store=folder)
        before = sorted(folder.iterdir())
        assert kept.identical(alone) and kept.identical(
            function(model, **more, **options, store=folder)
        )
        assert sorted(folder.iterdir()) == before and len(before) > 3


def test_a_store_is_zarr_and_says_what_it_is(model, tmp_path):
    measure_gap(model, **GAP, store=tmp_path / "s")
    root = zarr.open_group(tmp_path / "s", mode="r")
    about = root.attrs["about"]
    assert about["measurement"] == "measure_gap" and about["settings"]["pairs"] == "16"
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0] or about["versions"]
    name = next(n for n in root.group_keys() if n.startswith("twins"))
    piece = xr.open_zarr(tmp_path / "s" / name, consolidated=False)
    assert piece.latents.shape == (7, 32, *model.cfg.latent_shape)
    assert piece.attrs["seconds"] > 0


def test_kernels_that_were_chosen_are_another_measurement(model, tmp_path):
    """And no other process would know of them."""
    measure_gap(model, **GAP, store=tmp_path / "s")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InvalidValue, match="its kernels is usual and here it is autocast bfl"):
            measure_gap(model, **GAP, store=tmp_path / "s")
        with pytest.raises(InvalidState, match=r"without what is chosen here \(autocast bfloat16"):
            measure_gap(model, **GAP, engine=Engine("local", 2))
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InvalidState, match=r"is chosen here \(default dtype float64\); expect"):
            measure_gap(model, **GAP, engine=Engine("local", 2))
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_experiment_model_or_version(model, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    measure_gap(model, **GAP, store=folder)
    names = sorted(p.name for p in folder.iterdir())

    def refused(match, of=model, **changed):
        with pytest.raises(InvalidValue, match=f"holds pieces of another measurement: {match}"):
            measure_gap(of, **GAP | changed, store=folder)

    refused("its setting pairs is 16 and here it is 18; give another store", pairs=18)
    refused("its setting labels is None and here it is", labels=[1, 2])
    with pytest.raises(InvalidValue, match="its measurement is measure_gap and here it is coupl"):
        couplings(model, [0, 1], pairs=8, steps=5, store=folder)
    other = fresh_model()
    with torch.no_grad():
        list(other.transformer.parameters())[-1][0] += 1e-6
    refused("its model is [0-9a-f]+ and here it is [0-9a-f]+", of=other)
    monkeypatch.setattr(dit_lens.pieces.kept, "versions", lambda: {"torch": "9"})
    refused("its version (dit_lens|torch) is .* and here it is")
    assert sorted(p.name for p in folder.iterdir()) == names


def test_hooks_can_not_be_told_apart(model, tmp_path):
    with model.hooks([("hook_embed", lambda x, hook: x)]):
        with pytest.raises(InvalidState, match="The model has hooks or a trace on, and a store"):
            measure_gap(model, **GAP, store=tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "root"])
def test_damaged_pieces(damage, model, plain, tmp_path):
    folder = tmp_path / "s"
    measure_gap(model, **GAP, store=folder)
    piece = next(folder.glob("twins-*"))
    file = {
        "flip": piece / "latents" / "c" / "0" / "0" / "0" / "0" / "0",
        "cut": next(piece.glob("about/c/0")),
        "gone": next(piece.glob("x0/zarr.json")),
        "root": folder / "zarr.json",
    }[damage]
    raw = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw if damage != "cut" else raw[: len(raw) // 2])
    if damage == "root":  # any bit of it is another measurement, or none
        with pytest.raises(InvalidValue, match="damaged or not ours|holds pieces of another|kind"):
            measure_gap(model, **GAP, store=folder)
        return
    with pytest.raises(InvalidValue, match="delete that folder and start again: only it is run"):
        measure_gap(model, **GAP, store=folder)
    shutil.rmtree(piece)
    assert measure_gap(model, **GAP, store=folder).identical(plain)


def test_folders_that_are_no_stores(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidValue, match="file' is a file; expected a store of pieces, or a fol"):
        measure_gap(model, **GAP, store=tmp_path / "file")
    with pytest.raises(InvalidValue, match="holds 'file' and no store; expected"):
        measure_gap(model, **GAP, store=tmp_path)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "zarr.json").write_text('{"attributes": {"kind": "other", "about": {}}}')
    with pytest.raises(InvalidValue, match="is a store of the kind 'other'"):
        measure_gap(model, **GAP, store=tmp_path / "z")


def test_a_folder_that_can_not_be_written(model, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    measure_gap(model, **GAP, store=folder)

    def read_only(path):
        raise UnwritableFile(f"{str(path)!r} can't be written (Read-only file system); choose a")

    monkeypatch.setattr(dit_lens.pieces.store, "try_folder", read_only)
    with pytest.raises(UnwritableFile, match="Read-only file system"):
        measure_gap(model, **GAP, store=folder)


def test_what_can_not_be_looked_at_is_one_sentence(model, tmp_path):
    with pytest.raises(UnwritableFile, match="can't be written .File name too long.; choose a pl"):
        Store(tmp_path / ("x" * 300), {})
    store = Store(tmp_path / "s", {}, device="cpu")
    store.close()
    (tmp_path / "s" / ".device").write_bytes(b"\xff")
    with pytest.raises(InvalidValue, match="which rounds otherwise"):
        Store(tmp_path / "s", {}, device="cpu")
    shutil.rmtree(tmp_path / "s" / ".claims")
    (tmp_path / "s" / ".claims").write_text("")
    with pytest.raises(UnwritableFile, match="File exists"):
        Store(tmp_path / "s", {})


def test_a_piece_that_was_copied_in_part_is_refused_before_it_is_run(tmp_path):
    store = Store(tmp_path / "s", {})
    store.write("one", {"x": np.arange(3)}, 1.0)
    (tmp_path / "s" / "one" / "zarr.json").unlink()
    with pytest.raises(InvalidValue, match="/one' is not whole, .* delete it and start again"):
        store.there(["one"])


def test_a_claim_on_a_full_disk_leaves_none_behind(tmp_path, monkeypatch):
    def full(value, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leases.json, "dump", full)
    with pytest.raises(UnwritableFile, match="can't be written .No space left on device"):
        Leases(tmp_path).claim("one")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(model, plain, tmp_path, monkeypatch):
    """The disk is full at the fourth piece; with room again the measurement goes on."""
    to_zarr, written = xr.Dataset.to_zarr, []

    def full(self, path, **options):
        if len(written) == 3:
            Path(path).mkdir()  # half of it is there
            raise OSError(28, "No space left on device")
        written.append(path)
        return to_zarr(self, path, **options)

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    with pytest.raises(
        UnwritableFile, match=r"No space left on device\); what was finished is kep"
    ):
        measure_gap(model, **GAP, store=tmp_path / "s")
    monkeypatch.setattr(xr.Dataset, "to_zarr", to_zarr)
    assert not list((tmp_path / "s").glob(".part-*"))
    assert measure_gap(model, **GAP, store=tmp_path / "s").identical(plain)


def test_a_kept_run_is_the_run(model):
    pair = dit_lens.twins(model, pairs=3, steps=4, release=2, batch=2)
    run = run_of(arrays_of(pair.run), model)
    assert torch.equal(run.latents, pair.run.latents) and run.splits == pair.run.splits
    assert run.settings == pair.run.settings and run.history == pair.run.history
    run.check(3)
    assert torch.equal(run.replay(from_step=2).latents, pair.run.latents)


def test_datasets_as_arrays():
    was = xr.Dataset(
        {"x": (("band", "n"), [[1.0, np.nan], [2.0, 3.0]]), "flag": ((), True)},
        {"band": ["low", "high"]},
        {"steps": 3, "name": "x"},
    )
    assert whole(flat(was, "some") | {"other": np.zeros(1)}, "some").identical(was)


# Content.


def test_a_scheduler_is_told_by_its_noise_levels():
    plain, changed, used = (DDIMScheduler(1000) for _ in range(3))
    changed.alphas_cumprod = changed.alphas_cumprod * 0.99
    used.set_timesteps(7)
    shifted = FlowMatchEulerDiscreteScheduler()
    before = content(shifted)
    shifted.set_shift(3.0)
    assert content(plain) == content(used) != content(changed)
    assert before != content(shifted)


def test_content_tells_apart():
    def shift(by):
        return lambda x: x + by

    values = [
        *(None, True, 1, 1.0, "1", b"1", [1], (1, 2), {1}, {"a": 1}, range(2), np.float32(1)),
        *(torch.ones(2), torch.ones(2).double(), torch.ones(2, 1), np.ones(2), shift(1), shift(2)),
        *(torch.nn.Linear(2, 2), functools.partial(max, 1), functools.partial(max, 2), max),
        *(Engine("local", 2), Engine("local", 3), dit_lens.Bands.radial((8, 8), cut=0.25)),
    ]
    assert len({content(v) for v in values}) == len(values)
    assert digest(shift(3)) == digest(shift(3))
    assert digest(dit_lens.load("digits")) == digest(dit_lens.load("digits"))
    with pytest.raises(InvalidType, match="A generator can't be told from another by what it hol"):
        content(x for x in ())


FACTOR = 2.0


def scaled(x):
    return x * FACTOR


def again(x):
    return again(x - 1) if x else "done"


class Score:
    """A user's own, as a class with a method, a setting and a constant."""

    weight = 1.0

    def __init__(self, cut):
        self.cut = cut

    @property
    def double(self):
        return 2 * self.cut

    def __call__(self, images):
        return images.mean() + self.double


class Own(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.scale * x * self.mask


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (scaled, lambda: m.setitem(globals(), "FACTOR", 3.0)),
        lambda m: (lambda x: [scaled(y) for y in x], lambda: m.setitem(globals(), "FACTOR", 3.0)),
        lambda m: (Score(1), lambda: m.setattr(Score, "weight", 2.0)),
        lambda m: (Score(1).__call__, lambda: m.setattr(Score, "double", property(len))),
        lambda m: (Score, lambda: m.setattr(Score, "__call__", again)),
        lambda m: ((own := Own()), lambda: setattr(own, "scale", 2.0)),
        lambda m: ((own := Own()), lambda: own.mask.zero_()),
        lambda m: ((own := Own()), lambda: own.train(False)),
        lambda m: ((own := Own()), lambda: own.register_forward_hook(lambda *_: None)),
        lambda m: ((own := Own()), lambda: setattr(own, "forward", scaled)),
        lambda m: (Own(), lambda: m.setattr(Own, "forward", scaled)),
        lambda m: ((norm := torch.nn.LayerNorm(2)), lambda: setattr(norm, "eps", 0.1)),
        lambda m: ((held := [1]), lambda: held.append(held)),
    ],
)
def test_content_is_all_that_acts(monkeypatch, change):
    value, act = change(monkeypatch)
    before = content(value)
    assert content(value) == before
    act()
    assert content(value) != before


def made(source, key="f", **read):
    """What a source defines, as a module of the user's."""
    space = {"__name__": "users", "nn": torch.nn, **read}
    exec("import functools, enum, typing, dataclasses\n" + source, space)
    return space[key]


OF_A_CLASS = "class F({}):\n k: int = 1\n def __call__(self, x): return x{}\nf = F({})"
SHARED = torch.nn.Linear(2, 2)


def conv(**settings):
    """The same weights with other settings."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 3, 3, **settings)


def module(**held):
    """A module of Python's, a file of the user's."""
    found = types.ModuleType("helpers")
    vars(found).update(held)
    return found


@pytest.mark.parametrize(
    "one, other",
    [
        (made("f = lambda *x: x[0]"), made("f = lambda x: x[0]")),
        (made("def f(a, b): return a - b"), made("def f(a, *, b): return a - b")),
        (made("f = lambda x: x[AT]", AT=[0, 1]), made("f = lambda x: x[AT]", AT=(0, 1))),
        (made("f = lambda x: m.k", m=module(k=1)), made("f = lambda x: m.k", m=module(k=2))),
        (
            made("f = lambda x: m.m.k", m=module(m=module(k=1))),
            made("f = lambda x: m.m.k", m=module(m=module(k=2))),
        ),
        (made("f = lambda x: f.k\nf.k = 1"), made("f = lambda x: f.k\nf.k = k", k=2)),
        (eval("lambda x: x * k", {"k": 2}), eval("lambda x: x * k", {"k": 3})),
        (made("class F(enum.Enum): A = 1\nf = F.A"), made("class F(enum.Enum): A = 2\nf = F.A")),
        *(
            (made(OF_A_CLASS.format(kind, "", given)), made(OF_A_CLASS.format(kind, "+1", given)))
            for kind, given in {
                "typing.NamedTuple": "",
                "dict": "",
                "float": "1",
                "functools.partial": "max",
                "list": "",
            }.items()
        ),
        (conv(), conv(stride=2)),
        (conv(), conv(padding=(1, 1))),
        (torch.nn.AvgPool2d((2, 2)), torch.nn.AvgPool2d((4, 4))),
        (torch.nn.Sequential(SHARED), torch.nn.Sequential(SHARED, SHARED)),
        (np.zeros(2, [("a", "f4")]), np.zeros(2, [("a", "i4")])),
        (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[0, 0])),
        (torch.ones(1, dtype=torch.cfloat).conj(), torch.ones(1, dtype=torch.cfloat) * 1j),
        ([].append, [1].append),
        (functools.lru_cache(scaled), functools.lru_cache(again)),
    ],
)
def test_content_of_near_twins(one, other):
    assert content(one) != content(other)


def test_a_module_of_the_users_that_a_function_imports(tmp_path, monkeypatch):
    (tmp_path / "of_the_user.py").write_text("def factor(): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    function = made("def f(x):\n from of_the_user import factor\n return x * factor()")
    before = content(function)
    monkeypatch.setattr("of_the_user.factor", lambda: 2)
    assert content(function) != before


def test_content_is_the_same_after_use():
    """What is computed of a value, and kept in it, is no other value."""

    class Table:
        @functools.cached_property
        def table(self):
            return [1, 2]

    class Frozen(torch.nn.Module):
        @functools.cached_property
        def table(self):
            return [1, 2]

    for value in (Table(), Frozen()):
        before = content(value)
        assert value.table and content(value) == before
    for name in ("WanTransformer3DModel", "QwenImageTransformer2DModel"):
        vae = family_named(name).small_pipeline().vae
        before = content(vae)
        vae.decode(torch.zeros(1, vae.config.z_dim, 1, 4, 4))
        assert content(vae) == before


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(2).to_sparse(),
        torch.zeros(1, device="meta"),
        torch.nn.Sequential(torch.jit.script(torch.nn.Linear(2, 2))),
    ],
)
def test_what_can_not_be_seen_is_refused(value):
    with pytest.raises(InvalidType, match="can't be told from another by what it holds"):
        content(value)


def test_a_run_is_told_by_what_it_holds_and_not_by_where_its_weights_lie():
    one, other = (dit_lens.sample(dit_lens.load("digits"), [3], steps=2) for _ in range(2))
    assert digest(one) == digest(other)
    assert digest(one) != digest(dit_lens.sample(one.model, [3], 1, steps=2))
    assert digest(one) != digest(one.replay(edits=[("hook_embed", lambda x, hook: x)]))


def test_a_model_of_prompts_is_told_with_its_texts():
    """The same call has the same store; another text encoder, or condition, is another model."""
    model = HookedDiT(family_named("PixArtTransformer2DModel").small_pipeline())

    @measured
    def drawn(model, labels, *, store=None, engine="local"):
        return model.conditions.numbers(labels).tolist()

    with tempfile.TemporaryDirectory() as folder:
        assert drawn(model, ["a fox"], store=folder) == drawn(model, ["a fox"], store=folder)
    told = [digest(model)]
    next(model.conditions.pipe.text_encoder.parameters()).data.add_(1)
    told.append(digest(model))
    model.conditions.add({"a fox": {"encoder_hidden_states": torch.ones(1)}})
    assert len({*told, digest(model)}) == 3


def test_content_of_what_holds_itself():
    held = [1]
    held.append(held)
    assert digest(held) == digest(held)
    assert digest(again) == digest(again)
    linear = torch.nn.Linear(2, 2)
    linear.forward = linear.forward  # as accelerate puts it
    assert digest(linear) == digest(linear)


def test_content_is_the_same_in_any_process(tmp_path):
    """Sets of text come in another order in every process."""
    (tmp_path / "score.py").write_text(
        "NAMES = {'low', 'high', 'mid', 'all'}\n"
        "def score(x):\n    return x in {'a', 'b', 'c', 'd'} and x in NAMES\n"
    )
    line = "import score; from dit_lens.pieces import digest; print(digest(score.score))"
    said = {
        subprocess.run(
            [sys.executable, "-c", line],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1


@pytest.mark.parametrize("family", modules())
def test_every_family_has_a_content(family):
    model = HookedDiT(family_named(family).small(0)[0], scheduler=DDIMScheduler(1000))
    before = digest(model)
    assert digest(model) == before
    next(p for p in model.transformer.parameters()).data.flatten()[0] += 1
    assert digest(model) != before


def test_caches_are_told(model):
    """diffusers' caching changes what a model computes, and no weight."""
    told = [digest(model)]
    for threshold in (0.1, 0.2):
        fresh = fresh_model()
        apply_first_block_cache(fresh.transformer, FirstBlockCacheConfig(threshold))
        told.append(digest(fresh))
    assert len(set(told)) == 3 and digest(fresh_model()) == told[0]


def test_the_model_is_told_once(model, tmp_path, monkeypatch):
    """A measurement within another says no more than its name of the same model."""
    digests = []
    monkeypatch.setattr("dit_lens.pieces.kept.digest", lambda v: digests.append(v) or digest(v))
    measure_gap(model, **GAP, store=tmp_path / "s")
    assert sum(v is model for v in digests) == 1
    assert not [v for v in digests if isinstance(v, dict) and v.get("model") is model]


# Claims.


def test_a_claim_outlives_no_process(tmp_path, monkeypatch):
    mine, other = Leases(tmp_path), Leases(tmp_path)
    assert mine.claim("a") and not other.claim("a") and other.claim("b")
    mine.release()
    assert other.claim("a")
    other.close()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead = {"host": leases.here(), "pid": int(gone.stdout), "started": "1"}
    (tmp_path / "c").write_text(json.dumps(dead))
    assert mine.claim("c")
    # of another host nothing is known but that it has been silent
    (tmp_path / "d").write_text(json.dumps(dead | {"host": "elsewhere"}))
    monkeypatch.setattr(leases, "PATIENCE", 0.2)
    assert not mine.claim("d")
    time.sleep(0.1)
    os.utime(tmp_path / "d")  # a sign of life
    assert not mine.claim("d")
    time.sleep(0.15)
    assert not mine.claim("d")
    time.sleep(0.15)
    assert mine.claim("d")
    mine.close()


def test_whoever_waits_gets_what_others_made(tmp_path):
    """A piece that another process is at is waited for, and not run."""
    about = {"measurement": "x", "settings": {}, "model": "", "versions": {}}
    one, two = (Store(tmp_path / "s", about) for _ in range(2))
    work = Work(one, "key")
    piece = Piece("a", lambda: pytest.fail("run twice"))
    name = Work(one, "key").name(piece)
    assert two.claim(name)

    def meanwhile():
        time.sleep(0.3)
        two.write(name, {"x": np.arange(3)}, 1.0)
        two.release()

    import threading

    thread = threading.Thread(target=meanwhile)
    thread.start()
    with at(work):
        (found,) = results([piece])
    thread.join()
    assert found["x"].tolist() == [0, 1, 2] and work.before == 0.0
    # what was found finished counts as time taken
    again = Work(one, "key", workers=2)
    with at(again):
        results([piece])
    assert again.before == 0.5 and again.found() == 1


# Several processes.


def killed_at_random(rng, find, until, store):
    """Kill one of the processes that `find` gives, every now and then; but no more between two
    pieces that come into the store than are borne.
    """
    hits = since = pieces = 0
    while not until():
        time.sleep(rng.uniform(0.5, 4))
        found, before, pieces = find(), pieces, len(list(store.glob("[!.]*/zarr.json")))
        since = since if pieces == before else 0
        if found and hits < KILLS and since < deaths.DEATHS:
            victim = rng.choice(found)
            try:
                os.kill(victim, signal.SIGKILL)
                hits, since = hits + 1, since + 1
            except ProcessLookupError:
                pass
    return hits


def children(word):
    """Processes with a word in their command line, by number."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


@linux
@pytest.mark.slow
def test_local_workers_that_are_killed(model, plain, tmp_path):
    import threading

    over, hits, store = threading.Event(), [], tmp_path / "s"
    mine = f"{os.getpid()}"

    def workers():
        return [p for p in children("dit_lens.pieces.worker") if parent_of(p) == mine]

    thread = threading.Thread(
        target=lambda: hits.append(killed_at_random(random.Random(0), workers, over.is_set, store))
    )
    thread.start()
    try:
        found = measure_gap(model, **GAP, store=store, engine=Engine("local", workers=2))
    finally:
        over.set()
        thread.join()
    assert found.identical(plain)
    assert not workers()
    print(f"{hits[0]} local workers killed")


def test_a_worker_whose_command_is_gone_leaves_no_weights_behind(tmp_path, monkeypatch):
    """After SIGTERM nobody else takes them away."""
    (tmp_path / "call").mkdir()
    (tmp_path / "call" / "tensors.pt").write_bytes(b"weights")
    ended = []
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    worker.watch(tmp_path / "call", parent=-1)
    assert ended == [1] and not list(tmp_path.iterdir())


def parent_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]
    except OSError:
        return None


def descends(pid, ancestor):
    while pid not in (None, "0", "1"):
        if str(pid) == str(ancestor):
            return True
        pid = parent_of(pid)
    return False


def fails(images):
    raise InvalidValue("images of nothing")


def test_what_was_changed_since_its_import_is_refused_elsewhere(tmp_path, monkeypatch):
    """Classes and functions are sent by name: another process has them as their modules do."""
    (tmp_path / "users_own.py").write_text(
        "import torch\nSCALE = 1.0\n"
        "class Scaled(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return SCALE * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    users_own = importlib.import_module("users_own")
    plain = Call(len, {"model": users_own.Scaled()})
    monkeypatch.setattr(users_own, "SCALE", 0.5)
    changed = Call(len, {"model": users_own.Scaled()})
    assert Call.made(changed.packed, changed.tensors, "cpu")[0] is len
    with pytest.raises(InvalidState, match="model is another one in other processes: something "):
        Call.made(plain.packed, plain.tensors, "cpu")  # there it is as it was imported


def test_text_encoders_stay_at_home(monkeypatch):
    """Those of transformers do not work in a process that did not make them. What they encode goes
    along."""
    model = HookedDiT(family_named("SD3Transformer2DModel").small_pipeline())
    words = ["a red fox", "a blue car"]
    model.conditions.numbers(words)
    before = digest(model)
    plain = dit_lens.sample(model, words, steps=2).latents
    assert digest(model) == before  # though the encoders have hooks of transformers' own by now
    sent = []
    monkeypatch.setattr(Engine, "started", lambda self, store, key, call, on: sent.append(call))
    with pytest.raises(AttributeError):  # there is nothing to close
        measure_gap(model, labels=words, pairs=16, steps=4, engine=Engine("local", 2))
    _, given = Call.made(sent[0].packed, sent[0].tensors, "cpu")
    pipe = given["model"].conditions.pipe
    assert not any(
        isinstance(part, torch.nn.Module) for part in (pipe.text_encoder, pipe.text_encoder_2)
    )
    assert digest(given["model"]) == digest(model)
    assert torch.equal(dit_lens.sample(given["model"], words, steps=2).latents, plain)


def test_the_prompts_of_a_command_are_encoded_before_it_is_sent(tmp_path, monkeypatch):
    family_named("PixArtTransformer2DModel").small_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts").write_text("a red fox\na blue car\n")
    sent = []
    monkeypatch.setattr(Engine, "started", lambda self, store, key, call, on: sent.append(call))
    with pytest.raises(AttributeError):  # there is nothing to close
        words = ["--prompts", tmp_path / "prompts", "--workers", 2, "--out", tmp_path / "out"]
        main(["gap", str(tmp_path / "pipe"), "--quick", *map(str, words)])
    _, given = Call.made(sent[0].packed, sent[0].tensors, "cpu")
    assert len(dit_lens.sample(given["model"], ["a red fox", "a blue car"], steps=1).latents) == 2


@linux
@pytest.mark.slow
def test_a_worker_s_mistake_is_one_sentence(model, tmp_path, monkeypatch):
    engine = Engine("local", workers=2)
    with pytest.raises(InvalidState, match="A worker stopped: images of nothing"):
        measure_gap(model, **GAP, feature=fails, engine=engine)
    with pytest.raises(InvalidValue, match="feature can't be sent to other processes .*lambdas"):
        measure_gap(model, **GAP, feature=lambda x: x, engine=engine)
    # processes that die at once stand in for those that run out of memory
    die = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(engines.LocalWorkers, "_start", lambda *_: subprocess.Popen(die))
    with pytest.raises(InvalidState, match="Workers died 7 times .signal 9. and no piece was fin"):
        measure_gap(model, **GAP, engine=engine, store=tmp_path / "s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A saved model."""
    path = tmp_path_factory.mktemp("model")
    model.transformer.save_pretrained(path)
    model.scheduler.save_pretrained(path / "scheduler")
    return path


def command(*words):
    code = "import sys, torch; torch.set_num_threads(1); from dit_lens.commands import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=-1, stderr=-1, text=True
    )


FORK = multiprocessing.get_context("fork")


def forked(said, *words):
    """A command in a process of its own, forked so that nothing is imported again; what it says
    goes to a file.
    """
    process = FORK.Process(target=saying, args=(said, list(map(str, words))))
    process.start()
    return process


def saying(said, words):
    with open(said, "w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(words))


@linux
@pytest.mark.slow
def test_commands_are_killed_helped_and_gone_on_with(folder, tmp_path):
    """A command killed at random moments and started again, with a helper that is killed too, gives
    the very files of one that was left alone."""
    torch.set_num_threads(1)
    options = ["--pairs", "16", "--steps", "5", "--device", "cpu"]
    alone, out, store = tmp_path / "alone", tmp_path / "out", tmp_path / "store"
    assert main(["gap", str(folder), *options, "--out", str(alone)]) == 0
    assert not (alone / ".pieces").exists()
    rng, words = random.Random(1), ["gap", folder, *options, "--out", out, "--store", store]
    codes = []
    for _ in range(8):
        said = tmp_path / "said"
        leader = forked(said, *words)
        helper = forked(tmp_path / "helped", "work", store) if store.exists() else None
        before, kill = len(list(store.glob("[!.]*/zarr.json"))), len(codes) < max(2, KILLS // 6)
        deadline = time.monotonic() + 200
        while leader.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if kill and len(list(store.glob("[!.]*/zarr.json"))) > before:
                time.sleep(rng.uniform(0, 0.3))
                leader.kill()
                break
        leader.join()
        codes.append(leader.exitcode)
        if helper is not None:
            helper.kill()
            helper.join()
        if codes[-1] != -signal.SIGKILL:
            break
    assert codes[-1] == 0, said.read_text()
    assert codes.count(-signal.SIGKILL) >= 2
    one, other = (xr.load_dataset(next(p.glob("*.nc"))) for p in (alone, out))
    assert one.drop_attrs().identical(other.drop_attrs())
    # whoever comes late finds nothing to do; the model is known by its content
    late = forked(said, "work", store)
    late.join()
    assert late.exitcode == 0 and said.read_text().startswith("0 more pieces are in")


@pytest.mark.parametrize("command", ["plan", "compare", "diagnose --label", "diagnose --all"])
def test_what_takes_long_goes_on_where_it_was_interrupted(
    command, folder, model, tmp_path, monkeypatch, capsys
):
    """Also to `dit-lens work`, which knows the model by its content and has nothing left to do."""
    monkeypatch.chdir(tmp_path)
    Path("read.py").write_text("def dark(images):\n    return 1 - images.mean((1, 2, 3))\n")
    times = dit_lens.sample(dit_lens.load(folder), [1], steps=4).timesteps
    Plan.of(dit_lens.load(folder), times, [(0, "attn", 2)]).save("plan.json")
    words = {
        "plan": "--items 8 --steps 4 --budget 0.7 --out",
        "compare": "--with plan.json --items 12 --out",
        "diagnose --label": "1 --fault read.py:dark --steps 5 --pairs 2 --out",
        "diagnose --all": "--fault read.py:dark --steps 5 --samples 9 --most 1 --out",
    }[command]
    name, *more = command.split()
    words = [name, str(folder), *more, *words.split()]
    write, written = Store.write, []

    def stopped(self, name, arrays, seconds):
        if len(written) == 1:
            raise KeyboardInterrupt
        write(self, name, arrays, seconds)
        written.append(name)

    monkeypatch.setattr(Store, "write", stopped)
    assert main([*words, "out"]) == 130
    monkeypatch.setattr(Store, "write", write)
    capsys.readouterr()
    assert main([*words, "out"]) == 0
    found = capsys.readouterr().out
    assert "1 finished pieces are in" in found and not Path("out", ".pieces").exists()
    assert not Path(".pieces").exists()
    assert main([*words, "elsewhere", "--store", "store"]) == 0
    alone = capsys.readouterr().out
    assert alone.replace("elsewhere", "out") in found
    assert main(["work", "store"]) == 0
    assert "0 more pieces are in" in capsys.readouterr().out


def test_work_says_what_is_wrong(folder, model, tmp_path, capsys):
    assert main(["work", str(tmp_path / "none")]) == 2
    assert "There is no store at" in capsys.readouterr().err
    measure_gap(model, **GAP, store=tmp_path / "python")
    assert main(["work", str(tmp_path / "python")]) == 2
    assert "was begun from Python, where its model and functions are" in capsys.readouterr().err
    # a machine without the model, and one with another
    moved, store = tmp_path / "moved", tmp_path / "store"
    shutil.copytree(folder, moved)
    words = ["map", str(moved), "--items", "8", "--steps", "3", "--check", "0", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "o"), "--store", str(store)]) == 0
    capsys.readouterr()
    assert main(["work", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stored": str(store), "pieces": 0}
    shutil.rmtree(moved)
    assert main(["work", str(store)]) == 2
    assert "This machine can't open the model" in capsys.readouterr().err
    other = make_dit(classes=4)
    with torch.no_grad():
        list(other.parameters())[-1] += 1
    other.save_pretrained(moved)
    model.scheduler.save_pretrained(moved / "scheduler")
    assert main(["work", str(store)]) == 2
    assert "holds pieces of another measurement: its model is" in capsys.readouterr().err
    (store / ".device").write_text("cuda")
    shutil.rmtree(moved)
    shutil.copytree(folder, moved)
    assert main(["work", str(store)]) == 2
    assert "are run on cuda, and this process has cpu" in capsys.readouterr().err


def test_wrong_names_of_arguments_are_refused_by_the_function(model):
    with pytest.raises(
        TypeError, match=r"^measure_gap\(\) got an unexpected keyword argument 'pear'"
    ):
        measure_gap(model, pear=16)


def test_engines_that_there_are_not(model):
    with pytest.raises(InvalidValue, match="engine='slurm' can't be used; expected"):
        measure_gap(model, **GAP, engine="slurm")
    with pytest.raises(InvalidValue, match="address='x' can't be used; expected one with the eng"):
        Engine("local", address="x")


# Ray.

RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster on this machine, of two processors; its address and process."""
    port = random.Random(os.getpid()).randrange(20_000, 30_000)
    start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    more = ["--include-dashboard=false", "--object-store-memory=200000000"]
    head = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), *start, *more, "--disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    import ray

    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert head.poll() is None
                time.sleep(0.2)
        time.sleep(3)
        yield f"127.0.0.1:{port}", head.pid
    finally:  # this cluster only, whatever else runs on the machine
        ray.shutdown()
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, how)
                time.sleep(3)
        head.wait()


@needs_ray
def test_no_cluster_answers(model):
    with pytest.raises(
        InvalidState, match="No Ray cluster answers at '127.0.0.1:9'.*Connection re"
    ):
        measure_gap(model, **GAP, engine=Engine("ray", address="127.0.0.1:9"))


@needs_ray
def test_the_cluster_of_this_machine_is_gone(model, monkeypatch, tmp_path):
    """Ray remembers one that was killed, and would wait for it for minutes."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:9")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(InvalidState, match="No Ray cluster answers at '.*:9'"):
        measure_gap(model, **GAP, engine="ray")


@needs_ray
@linux
@pytest.mark.slow
def test_ray_gives_the_same_bits(model, plain, cluster, tmp_path):
    """Workers killed at random moments; then the store is gone on with by this process."""
    import threading

    address, head = cluster

    over, hits, store = threading.Event(), [], tmp_path / "s"

    def workers():
        return [p for p in children("ray::Worker") if descends(p, head)]

    thread = threading.Thread(
        target=lambda: hits.append(killed_at_random(random.Random(2), workers, over.is_set, store))
    )
    thread.start()
    engine = Engine("ray", workers=2, address=address)
    try:
        found = measure_gap(model, **GAP, store=store, engine=engine)
    finally:
        over.set()
        thread.join()
    assert found.identical(plain)
    print(f"{hits[0]} workers of Ray killed")
    pieces = sorted(p.name for p in (tmp_path / "s").glob("*/zarr.json"))
    again = measure_gap(model, **GAP, store=tmp_path / "s")
    assert again.identical(plain)
    assert sorted(p.name for p in (tmp_path / "s").glob("*/zarr.json")) == pieces


@needs_ray
@linux
@pytest.mark.slow
@pytest.mark.skipif("DIT_LENS_ATTACK" not in os.environ, reason="takes a minute; make attack")
def test_a_driver_of_ray_is_killed(folder, cluster, tmp_path):
    torch.set_num_threads(1)
    options = ["--pairs", "16", "--steps", "5", "--device", "cpu"]
    alone, out, store = tmp_path / "alone", tmp_path / "out", tmp_path / "store"
    assert main(["gap", str(folder), *options, "--out", str(alone)]) == 0
    ray = ["--engine", "ray", "--address", cluster[0], "--workers", "2"]
    words = ["gap", folder, *options, "--out", out, "--store", store, *ray]
    first = command(*words)
    deadline = time.monotonic() + 200
    while first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if len(list(store.glob("[!.]*/zarr.json"))) >= 2:
            first.kill()
    assert first.wait() == -signal.SIGKILL
    kept = set(store.glob("[!.]*/zarr.json"))
    second = command(*words)
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    assert "finished pieces are in" in said and kept <= set(store.glob("[!.]*/zarr.json"))
    one, other = (xr.load_dataset(next(p.glob("*.nc"))) for p in (alone, out))
    assert one.drop_attrs().identical(other.drop_attrs())


@needs_ray
@linux
@pytest.mark.slow
def test_workers_of_other_versions(model, cluster, monkeypatch):
    from dit_lens.pieces import on_ray

    monkeypatch.setattr(on_ray, "about_here", lambda: {"torch": "9.9", "python": "3"})
    with pytest.raises(InvalidState, match="A worker of the cluster has torch .* process 9.9; exp"):
        measure_gap(model, **GAP, engine=Engine("ray", workers=1, address=cluster[0]))


@pytest.mark.parametrize("option", ["prompts", "images", "attributes", "plan", "check", "fault"])
def test_a_command_is_another_one_when_the_files_that_it_reads_are_edited(option, tmp_path):
    file = tmp_path / "read" / "file.py"
    file.parent.mkdir()
    named = {"images": file.parent, "attributes": f"{file}:function", "fault": f"{file}:function"}
    named = named.get(option, file)
    args, model = argparse.Namespace(command="gap", **{option: named}), dit_lens.load("digits")
    file.write_text("a red fox")
    first, again = about_command(args, model, None), about_command(args, model, None)
    file.write_text("a blue dog")
    assert first == again != about_command(args, model, None)
