"""A process that is killed (SIGKILL, at a random moment) loses nothing that was stored: a sweep
goes on from its store and ends with the same figures to the bit, and a file that was being replaced
is the old one or the new one.
"""

import multiprocessing
import os
import random
import time

import pytest
import torch
import xarray as xr
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.patching import Patch, sweep, sweeps
from dit_lens.storage import load_dataset, save_dataset

KILLS = int(os.environ.get("DIT_LENS_ATTACK_KILLS", "4"))

PATCHES = [
    Patch(site, layer, range(first, 5))
    for first in (1, 2, 3, 4)
    for layer in range(3)
    for site in ("attn_out", "mlp_out")
]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def pair():
    model = HookedDiT(make_dit(classes=4), scheduler=DDIMScheduler(1000, clip_sample=False))
    return dit_lens.twins(model, pairs=2, release=1, steps=5)


def killed(work, when):
    """Do this in a process of its own and kill it as soon as `when()` is true; whether it was
    still at it.
    """
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        deadline = time.monotonic() + 120
        while process.is_alive() and not when() and time.monotonic() < deadline:
            time.sleep(0.0005)
        hit = process.is_alive()
    finally:
        process.kill()
        process.join()
    return hit


def stored(path):
    """How many pieces are in a store."""
    return len(list(path.glob("patches-*/zarr.json")))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "IN_FLIGHT", 1)  # each patch is stored as it finishes
    whole = sweep(pair.a, pair.b, PATCHES)
    rng, hits, half, resumed = random.Random(0), 0, 0, 0
    for i in range(KILLS):
        path = tmp_path / f"sweep{i // 2}"  # every second one is killed twice

        def work(path=path):
            sweep(pair.a, pair.b, PATCHES, store=path)

        if i % 2 == 0:
            wanted, before = rng.randrange(2, len(PATCHES) // 2), 0
        else:
            before = stored(path)
            wanted = rng.randrange(before + 1, len(PATCHES))

        def written(path=path, count=wanted):
            return stored(path) >= count and (time.sleep(rng.uniform(0, 0.01)) or True)

        hits += killed(work, written)
        found = stored(path)
        assert found >= before
        half += 0 < found < len(PATCHES)
        if i % 2:
            again = sweep(pair.a, pair.b, PATCHES, store=path)
            resumed += 1
            for name in whole.data_vars:
                assert whole[name].identical(again[name]), name
            assert not (path / ".driver.lock").exists() and not list(path.glob(".part-*"))
    print(
        f"{KILLS} kills of sweeps, {hits} hit, {half} a half-filled store; {resumed} resumed, "
        "all to the same bits"
    )
    assert half >= KILLS // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trace", "dataset"])
def test_a_file_being_replaced_is_the_old_or_the_new_one(kind, pair, tmp_path):
    path, rng, hits = tmp_path / "file", random.Random(1), 0
    if kind == "trace":
        versions = []
        for label in (1, 2):
            with dit_lens.trace(pair.a.model, names="hook_embed") as t:
                dit_lens.sample(pair.a.model, [label], steps=2)
            versions.append(t)
        saves = [lambda t=t: t.save(path) for t in versions]
        known = [t["hook_embed"] for t in versions]

        def read():
            return dit_lens.load_trace(path)["hook_embed"]
    else:
        known = [torch.rand(20_000) for _ in range(2)]
        saves = [
            lambda x=x: save_dataset(path, "x", xr.Dataset({"x": ("i", x.numpy())})) for x in known
        ]

        def read():
            return torch.from_numpy(load_dataset(path, "x")[1].x.values)

    saves[0]()
    for _ in range(KILLS):

        def work():
            while True:
                for save in saves:
                    save()

        end = time.monotonic() + rng.uniform(0.005, 0.1)
        hits += killed(work, lambda end=end: time.monotonic() > end)
        now = read()
        assert any(torch.equal(now, each) for each in known)
    print(f"{KILLS} kills while a {kind} is written over and over, {hits} hit, 0 files damaged")
    assert hits == KILLS
