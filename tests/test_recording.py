"""Activations on disk: they are what a trace reads, whatever the batches, shards and kills; the
dataset gives each of them once; what is wrong is said.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from safetensors import safe_open
from test_prompts import pipeline
from torch.utils.data import DataLoader

import dit_lens
from dit_lens import Activations, HookedDiT, record, sample, trace
from dit_lens.commands import main
from dit_lens.errors import DitLensError, InvalidState, InvalidValue, MissingFile, UnwritableFile
from dit_lens.hooks.names import UnknownName
from dit_lens.storage import locked
from dit_lens.tracing import recording
from dit_lens.tracing.activations import INDEX

torch.set_num_threads(1)
RESID, OTHER = "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"
LABELS = [0, 1, 2, 3, 1]


def opened(seed=0):
    scheduler = DDIMScheduler(1000, clip_sample=False)
    return HookedDiT(make_dit(classes=4, seed=seed), scheduler=scheduler)


@pytest.fixture(scope="module")
def model():
    return opened()


def traced(model, name, labels, seeds, **settings):
    """[step, batch, ...], as a trace reads it."""
    with trace(model) as t:
        sample(model, labels, seeds, **settings)
    return t[name]


# What is in it.


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_is_what_a_trace_reads(model, tmp_path, guidance):
    data = record(
        model, [RESID, OTHER], LABELS, tmp_path, steps=4, guidance=guidance, batch=2, seeds=7
    )
    passes = 2 if guidance != 1 else 1
    assert len(data) == 4 * len(LABELS) * passes * 16 and data.name == RESID
    for name in (RESID, OTHER):
        own, at = data.of(name), 0
        for first in range(0, len(LABELS), 2):
            labels = LABELS[first : first + 2]
            seeds = [7 + i for i in range(first, first + len(labels))]
            whole = traced(model, name, labels, seeds, steps=4, guidance=guidance)
            n = whole.shape[:3].numel()
            found = own.take(slice(at, at + n))
            assert torch.equal(found["activation"], whole.flatten(0, 2))
            shape = whole.shape[:3]
            rows = [*range(first, first + len(labels))] * passes
            for key, value in (
                ("item", torch.tensor(rows)[None, :, None]),
                ("label", torch.tensor([LABELS[i] for i in rows])[None, :, None]),
                ("seed", torch.tensor([7 + i for i in rows])[None, :, None]),
                ("branch", torch.arange(passes).repeat_interleave(len(labels))[None, :, None]),
                ("step", torch.arange(4)[:, None, None]),
                ("timestep", torch.tensor([750.0, 500.0, 250.0, 0.0])[:, None, None]),
                ("token", torch.arange(16)[None, None]),
            ):
                assert torch.equal(found[key], value.expand(shape).flatten()), key
            at += n
        assert at == len(own)


def test_only_what_was_asked_for(model, tmp_path):
    data = record(
        model,
        RESID,
        LABELS[:3],
        tmp_path,
        steps=5,
        at=[3, 1],
        tokens=[9, 2],
        dtype="float16",
        batch=3,
    )
    whole = traced(model, RESID, LABELS[:3], 0, steps=5)[[1, 3]][:, :, [2, 9]]
    found = data.take(slice(None))
    assert data.dtype == torch.float16 and data.shape == (16,)
    assert torch.equal(found["activation"], whole.half().flatten(0, 2))
    assert found["token"].unique().tolist() == [2, 9] and found["step"].unique().tolist() == [1, 3]


def test_what_has_no_tokens(model, tmp_path):
    names = ["blocks.0.hook_cond", "blocks.1.attn.hook_pattern", "hook_sample"]
    data = record(model, names, LABELS[:2], tmp_path, steps=3)
    for name in names:
        own, whole = data.of(name), traced(model, name, LABELS[:2], 0, steps=3)
        found = own.take(slice(None))
        assert torch.equal(found["activation"], whole.flatten(0, 1)) and len(own) == 6
        assert own.shape == whole.shape[2:] and (found["token"] == -1).all()


def test_batches_make_no_difference_but_rounding(model, tmp_path):
    one = record(model, RESID, LABELS, tmp_path / "one", steps=4, batch=1)
    all_ = record(model, RESID, LABELS, tmp_path / "all", steps=4, batch=5)

    def keyed(data):
        found = data.take(slice(None))
        order = torch.stack([found[k] for k in ("item", "step", "token")]).T.tolist()
        return dict(zip(map(tuple, order), found["activation"], strict=True))

    a, b = keyed(one), keyed(all_)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_that_goes_through_in_parts(model, tmp_path, monkeypatch, guidance):
    """As when memory gives out: what each part has comes to its place."""
    given = {"steps": 3, "batch": 5, "guidance": guidance}
    whole = record(model, RESID, LABELS, tmp_path / "whole", **given).take(slice(None))
    monkeypatch.setattr(recording, "sample", functools.partial(sample, batch=4))
    parts = record(model, RESID, LABELS, tmp_path / "parts", **given).take(slice(None))
    for key in parts.keys() - {"activation"}:
        assert torch.equal(parts[key], whole[key])
    assert torch.allclose(parts["activation"], whole["activation"], atol=1e-4)


def test_prompts_are_numbered_as_they_come(tmp_path):
    """In words, whatever the model was asked before; the recording says which they are."""
    pipe = pipeline("SD3Transformer2DModel")
    data = record(pipe, "resid_post", ["a fox", "", "an owl", "a fox"], tmp_path, steps=2)
    assert data.prompts == ["a fox", "an owl"]
    found = data.take(slice(None))
    labels = dict(zip(found["item"].tolist(), found["label"].tolist(), strict=True))
    assert labels == {0: 0, 1: -1, 2: 1, 3: 0}
    other = pipeline("SD3Transformer2DModel")
    HookedDiT(other).conditions.numbers(["another", "an owl"])
    before = contents(tmp_path)
    record(other, "resid_post", ["a fox", "", "an owl", "a fox"], tmp_path, steps=2)
    assert contents(tmp_path) == before


def test_a_pipeline_is_left_as_it_was(tmp_path):
    pipe = make_pipe(classes=4)
    forward = pipe.transformer.transformer_blocks[0].forward
    record(pipe, RESID, [0, 1], tmp_path, steps=2)
    assert pipe.transformer.transformer_blocks[0].forward == forward


# Shards, memory, resuming.


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


SMALL = {"steps": 6, "batch": 2, "dtype": "float32"}


@pytest.fixture
def small_shards(monkeypatch):
    """Room for two steps of a batch a shard."""
    monkeypatch.setattr(recording, "MB", 2 * 2 * 16 * 16 * 4)


def test_a_shard_has_no_more_than_its_room(model, tmp_path, small_shards):
    record(model, RESID, LABELS, tmp_path, shard=1, **SMALL)
    files = sorted(p.name for p in tmp_path.glob("shard-*"))
    assert len(files) == 9 and files[0] == "shard-00000-000.safetensors"
    for file in files:
        with safe_open(tmp_path / file, "pt") as shard:
            assert shard.get_tensor(RESID).shape[0] == 2
            assert shard.get_tensor(RESID).nbytes <= recording.MB
    data = Activations(tmp_path)
    whole = record(model, RESID, LABELS, tmp_path / "whole", **SMALL)
    for key, value in data.take(slice(None)).items():
        assert torch.equal(value, whole.take(slice(None))[key])


@pytest.mark.slow
def test_memory_does_not_grow_with_items_or_steps(model, tmp_path, monkeypatch, small_shards):
    """Counted in bytes of live tensors, whenever a shard is written."""
    peaks = []
    save = recording.save_tensors

    def counting(*args, **kwargs):
        gc.collect()
        live = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.layout is torch.strided
        }
        peaks.append(sum(live.values()))
        return save(*args, **kwargs)

    monkeypatch.setattr(recording, "save_tensors", counting)
    found = []
    gc.collect()
    gc.freeze()  # what was there before is not looked at again and again
    try:
        for labels, steps in ((2, 6), (12, 6), (2, 24)):
            peaks.clear()
            settings = SMALL | {"steps": steps}
            record(model, RESID, [0] * labels, tmp_path / f"{labels}-{steps}", **settings, shard=1)
            found.append(max(peaks))
    finally:
        gc.unfreeze()
    recorded = 12 * 6 * 16 * 16 * 4
    assert found[1] - found[0] < 0.05 * recorded
    trajectory = 2 * 24 * 3 * 4 * 8 * 8 * 4  # of the batch under way: latents, x0, outputs
    assert found[2] - found[0] < 1.5 * trajectory


def test_called_again_it_runs_nothing(model, tmp_path, monkeypatch):
    record(model, RESID, LABELS, tmp_path, **SMALL)
    before, seen = contents(tmp_path), []
    monkeypatch.setattr(recording, "sample", lambda *a, **k: pytest.fail("run again"))
    data = record(model, RESID, LABELS, tmp_path, **SMALL, progress=lambda *a: seen.append(a))
    assert contents(tmp_path) == before and len(data) == 6 * 5 * 16
    assert seen[-1] == (18, 18)


def test_what_is_missing_is_made_again_to_the_byte(model, tmp_path, small_shards):
    record(model, RESID, LABELS, tmp_path, shard=1, **SMALL)
    whole = contents(tmp_path)
    for gone in (["shard-00001-001"], ["shard-00000-000", "shard-00002-002"]):
        for name in gone:
            (tmp_path / f"{name}.safetensors").unlink()
        (tmp_path / ".shard-00001-001.safetensors.1-ab.part").write_bytes(b"half")
        with pytest.raises(InvalidState, match=rf"{len(gone)} of 9 shards are missing; call dit_l"):
            Activations(tmp_path)
        record(model, RESID, LABELS, tmp_path, shard=1, **SMALL)
        assert contents(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_recording_goes_on_where_it_was(model, tmp_path, small_shards):
    labels = LABELS * 4
    record(model, RESID, labels, tmp_path / "whole", shard=1, **SMALL)
    whole = contents(tmp_path / "whole")
    hits = 0
    for kill in range(4):
        folder = tmp_path / f"killed-{kill // 2}"
        before = len(list(folder.glob("shard-*")))

        def work(folder=folder):
            record(model, RESID, labels, folder, shard=1, **SMALL)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if len(list(folder.glob("shard-*"))) >= before + 5 + kill:
                break
            time.sleep(0.001)
        hits += process.is_alive()
        process.kill()
        process.join()
    assert hits >= 2
    for n in range(2):
        record(model, RESID, labels, tmp_path / f"killed-{n}", shard=1, **SMALL)
        assert contents(tmp_path / f"killed-{n}") == whole


# The dataset.


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return record(model, [RESID, OTHER], LABELS, folder, steps=3, batch=2)


def test_the_first_name_given_is_the_dataset(model, tmp_path):
    later, earlier = "blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"
    found = record(model, [later, earlier], LABELS, tmp_path, steps=2)
    assert record(model, (later, earlier), LABELS, tmp_path, steps=2).name == later
    with dit_lens.trace(model, names=later) as t:
        dit_lens.sample(model, LABELS, 0, 2)
    assert found.name == later
    assert torch.equal(found[0]["activation"], t[later][0, 0, 0])
    assert found.of(earlier).name == earlier
    with pytest.raises(dit_lens.UnknownName, match="has 2 hook points; say which"):
        Activations(tmp_path)


def key(batch):
    columns = (batch[k].tolist() for k in ("item", "step", "token"))
    return list(zip(*columns, strict=True))


def test_every_example_comes_once(data):
    everything = key(data.take(slice(None)))
    assert len(set(everything)) == len(everything) == len(data)
    for batches in (
        list(data.batches(7)),
        list(data.batches(7, seed=0)),
        list(data.batches(50, seed=1, window=1)),
        list(DataLoader(data, batch_size=7, shuffle=True)),
    ):
        assert sorted(k for b in batches for k in key(b)) == sorted(everything)
    assert [k for b in data.batches(7) for k in key(b)] == everything


def test_shuffling_is_by_its_seed(data):
    orders = [[k for b in data.batches(16, seed=s) for k in key(b)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    first = key(next(iter(data.batches(16, seed=0))))
    assert len({item for item, _, _ in first}) > 2  # of several shards


def test_one_example(data):
    one = data[17]
    assert one["activation"].shape == data.shape and one["token"] == 1
    assert torch.equal(data[-1]["activation"], data[len(data) - 1]["activation"])
    assert sum(1 for _ in data) == len(data)
    with pytest.raises(IndexError, match="There are 240 examples; got 240"):
        data[240]


def test_workers_of_a_loader_read_for_themselves(data):
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert not again._open and torch.equal(again[3]["activation"], data[3]["activation"])
    loaded = list(DataLoader(data, batch_size=40, num_workers=2, multiprocessing_context="fork"))
    assert torch.equal(
        torch.cat([b["activation"] for b in loaded]), data.take(slice(None))["activation"]
    )


def test_names_and_shapes(data):
    assert data.names == [RESID, OTHER] and data.of(("z", 2)).shape == (2, 8)
    assert repr(data).endswith(f"{RESID!r}): 240 of [16], float32")
    with pytest.raises(UnknownName):
        data.of("resid_pre")


# What is wrong is said.


@pytest.mark.parametrize(
    "change, text",
    [
        ({"steps": 7}, "with steps=6, where this one has 7"),
        ({"seeds": 1}, "with seeds=(0, 1, 2, 3, 4), where this one has (1, 2, 3, 4, 5)"),
        ({"batch": 3}, "with batch=2, where this one has 3"),
        ({"dtype": "float16"}, "with dtypes=('float32',), where this one has ('float16',)"),
        ({"tokens": [1]}, "holds a recording with"),
        ({"guidance": 2.0}, "with guidance=1.0, where this one has 2.0"),
        ({"names": OTHER}, "with names="),
        ({"labels": [1, 1, 2, 3, 1]}, "holds a recording"),
        ({"scheduler": "ddpm"}, "with scheduler="),
    ],
)
def test_another_recording_is_refused(model, tmp_path, change, text):
    given = {"names": RESID, "labels": LABELS, **SMALL}
    record(model, out=tmp_path, **given)
    before = contents(tmp_path)
    with pytest.raises(InvalidValue) as error:
        record(model, out=tmp_path, **(given | change))
    assert text in str(error.value) and str(error.value).endswith("give another folder.")
    assert contents(tmp_path) == before


def test_another_model_is_refused(model, tmp_path):
    record(model, RESID, LABELS, tmp_path, **SMALL)
    with pytest.raises(InvalidValue, match="of another model, or one whose weights have changed"):
        record(opened(seed=1), RESID, LABELS, tmp_path, **SMALL)


@pytest.mark.parametrize("label", [1, 4])
def test_a_model_with_another_embedding_of_one_label_is_refused(model, tmp_path, label):
    """Also of one that is not the first, or of the null class, which guidance asks for."""
    given = SMALL | {"guidance": 2.0}
    record(model, RESID, LABELS, tmp_path, **given)
    other = opened()
    for block in other.transformer.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight.data[label] += 1
    with pytest.raises(InvalidValue, match="of another model, or one whose weights have changed"):
        record(other, RESID, LABELS, tmp_path, **given)


@pytest.mark.parametrize("label", [None, 1])
def test_a_model_that_answers_nothing_yet_is_known_by_what_is_recorded(tmp_path, label):
    """A DiT is begun with a last layer of zeros: then it gives the same whatever its weights."""

    def begun(seed):
        found = opened(seed)
        for p in found.transformer.proj_out_2.parameters():
            p.data.zero_()
        return found

    record(begun(0), RESID, LABELS, tmp_path, **SMALL)
    other = begun(0 if label else 1)
    if label:
        for block in other.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.data[label] += 1
    with pytest.raises(InvalidValue, match="of another model, or one whose weights have changed"):
        record(other, RESID, LABELS, tmp_path, **SMALL)


@pytest.mark.parametrize("dtype", ["float16", "float8_e5m2"])
def test_values_that_a_dtype_cannot_hold(tmp_path, dtype):
    model = opened()
    with torch.no_grad():
        model.transformer.pos_embed.proj.weight *= 1e6
    with pytest.raises(InvalidValue, match=f"{dtype} can't hold; record it with dtype='bfloat16'"):
        record(model, RESID, LABELS, tmp_path, **(SMALL | {"dtype": dtype}))
    assert not list(tmp_path.glob("shard-*"))


def test_damage_is_found(model, tmp_path):
    record(model, RESID, LABELS, tmp_path, **SMALL)
    shard = tmp_path / "shard-00001-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    data = Activations(tmp_path)
    data[0]
    with pytest.raises(InvalidValue, match="shard-00001-000.*is damaged"):
        data.take(slice(None))
    with pytest.raises(InvalidValue, match="shard-00001-000.*is damaged"):
        record(model, RESID, LABELS, tmp_path, **SMALL)
    (tmp_path / INDEX).unlink()
    with pytest.raises(InvalidValue, match="has shard-0000.* and no recording.safetensors"):
        record(model, RESID, LABELS, tmp_path, **SMALL)


def test_shards_that_change_places_are_found(model, tmp_path):
    record(model, RESID, LABELS, tmp_path, **SMALL)
    one, other = (tmp_path / f"shard-0000{i}-000.safetensors" for i in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(InvalidValue, match="is a shard of another recording"):
        Activations(tmp_path)[0]


def test_two_at_once_are_refused(model, tmp_path):
    with locked(tmp_path / INDEX), pytest.raises(InvalidState, match="is in use by process"):
        record(model, RESID, LABELS, tmp_path, **SMALL)


@pytest.mark.parametrize(
    "given, kind, text",
    [
        ({"tokens": [16]}, InvalidValue, "token index 16 is out of range; expected 0 to 15"),
        ({"at": [6]}, InvalidValue, "step index 6 is out of range; expected 0 to 5"),
        ({"at": []}, DitLensError, "at=[]"),
        ({"dtype": "int8"}, InvalidValue, "dtype='int8' can't be used; expected one of floating"),
        ({"dtype": "float8_e4m3fn"}, InvalidValue, "float16, float8_e5m2."),
        ({"dtype": "floot"}, InvalidValue, "dtype='floot' can't be used"),
        ({"dtype": 3}, TypeError, "dtype=3 can't be used"),
        ({"batch": 0}, InvalidValue, "batch=0 can't be used; expected a whole number of 1 or more"),
        ({"shard": 0}, InvalidValue, "shard=0 can't be used"),
        ({"labels": []}, DitLensError, "There are no labels"),
        ({"labels": [9]}, InvalidValue, "Label 9 is out of range"),
        ({"seeds": [1]}, InvalidValue, "There are 1 seeds; expected 5, one for each label"),
        ({"names": "blocks.9.*"}, UnknownName, "blocks.9.*"),
        (
            {"names": "blocks.0.hook_cond", "tokens": [1]},
            InvalidValue,
            "'blocks.0.hook_cond' has no tokens; its axes are ['batch', 'd_model']",
        ),
        ({"out": 3}, TypeError, "out=3 can't be used; expected a folder"),
        ({"out": "/proc/nowhere/acts"}, UnwritableFile, "can't be written"),
    ],
)
def test_bad_arguments(model, tmp_path, given, kind, text):
    with pytest.raises(kind) as error:
        record(
            model, **({"names": RESID, "labels": LABELS, "out": tmp_path / "x", **SMALL} | given)
        )
    assert text in str(error.value)
    assert not (tmp_path / "x").exists()


def test_where_no_recording_is(tmp_path):
    for read in (Activations, dit_lens.load_result):
        with pytest.raises(InvalidValue, match="can't be read .File name too long"):
            read(tmp_path / ("x" * 300))
    with pytest.raises(MissingFile, match="There is no recording at"):
        Activations(tmp_path)
    with pytest.raises(TypeError, match="folder=3 can't be used"):
        Activations(3)


def test_the_command(tmp_path, capsys):
    argv = ["record", "digits", RESID, OTHER, "--items", "3", "--steps", "3", "--at", "1"]
    argv += ["--tokens", "0", "5", "--stored-as", "float16", "--out", str(tmp_path)]
    for _ in range(2):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert f"{RESID!r}): 6 of [64], float16" in out and f"{OTHER!r}): 6 of [4, 16]" in out
    assert main([*argv, "--seed", "4"]) == 2
    assert "holds a recording with seeds=" in capsys.readouterr().err
    other = [*argv[:-1], str(tmp_path / "other"), "--labels", "7", "2", "--batch", "2"]
    assert main(other) == 0
    found = Activations(tmp_path / "other", ("resid_post", 1)).take(slice(None))
    assert found["label"].tolist() == [7, 7, 2, 2, 7, 7]


def test_it_is_in_the_open():
    assert {"record", "Activations"} <= set(dit_lens.__all__)


@pytest.mark.slow
def test_the_example_trains_and_splices_in(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "examples" / "sparse_autoencoder.py").read_text()
    for long, short in (  # half of the images, and half of those that are sampled with it
        ("range(80)", "range(40)"),
        ("< 64", "< 30"),
        (">= 64", ">= 30"),
        ("list(range(10)) * 2", "list(range(5)) * 2"),
        ("plain[:10] - plain[10:]", "plain[:5] - plain[5:]"),
    ):
        assert long in text
        text = text.replace(long, short)
    script = tmp_path / "script.py"
    script.write_text(text)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    (explained,) = re.findall(r"unseen images: ([\d.]+)% of the variance", shown)
    own, mean = map(float, re.findall(r"moves the images by ([\d.]+)%", shown))
    assert float(explained) > 85 and own < 10 < mean


def test_nothing_is_recorded_under_edits_which_the_files_would_not_name(tmp_path):
    model, out = dit_lens.load("digits"), tmp_path / "out"
    run = dit_lens.sample(model, [3], steps=2)
    plan = dit_lens.experiments.Plan.of(model, run.timesteps, [(5, "attn", 1)])
    edit = ("blocks.5.hook_attn_out", lambda a, hook: 0 * a)
    with dit_lens.trace(model) as edited:
        edited.edit(*edit, steps=1)
        for block in (model.hooks([edit]), dit_lens.reuse(model, plan), contextlib.nullcontext()):
            with block, pytest.raises(InvalidState, match="is on at 'blocks.5.hook_attn_out', of"):
                dit_lens.record(model, ("resid_post", 5), [3], out, steps=2)
    assert not out.exists()
    handle = model.transformer.transformer_blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(InvalidState, match="A module hook of PyTorch's is on at 'transformer_blo"):
        dit_lens.record(model, ("resid_post", 5), [3], out, steps=2)
    handle.remove()
    with dit_lens.trace(model, names="hook_embed"):
        assert len(dit_lens.record(model, ("resid_post", 5), [3], out, steps=2)) == 128
