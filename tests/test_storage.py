"""Files that outlive the process: whole, sealed, held against a schema; and saved models.

DIT_LENS_ATTACK=1 draws five times as many flips and mutations.
"""

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated

import diffusers
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from pydantic import Field
from safetensors.torch import load_file, save_file

import dit_lens
from dit_lens import HookedDiT
from dit_lens.commands import main
from dit_lens.commands.common import stored as stored_now
from dit_lens.errors import DitLensError, InvalidState, InvalidValue, MissingFile, UnwritableFile
from dit_lens.model import loading
from dit_lens.patching import Patch, sweep
from dit_lens.report import gap as gap_report
from dit_lens.report import stored
from dit_lens.storage import (
    check_seal,
    device_name,
    file_name,
    load_dataset,
    load_tensors,
    locked,
    made_by,
    made_of,
    made_with,
    replacing,
    save_dataset,
    save_tensors,
    try_file,
    try_folder,
    versions,
    written,
)
from dit_lens.storage.schema import Listed, Schema, Size, conform
from dit_lens.tracing import files as trace_files

torch.set_num_threads(1)
TRIES = 1000 if os.environ.get("DIT_LENS_ATTACK") else 200
STEPS = 4


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(classes=4), scheduler=DDIMScheduler(1000, clip_sample=False))


@pytest.fixture(scope="module")
def pair(model):
    return dit_lens.twins(model, pairs=2, release=1, steps=STEPS)


@pytest.fixture(scope="module")
def trace(model):
    with dit_lens.trace(model, names="blocks.0.hook_resid_post") as t:
        dit_lens.sample(model, [1, 2], steps=2, guidance=2.0)
    return t


@pytest.fixture(scope="module")
def gap_results():
    """A stored gap's shape, with any figures."""
    sizes = {"layer": 3, "step": 4, "release": 3, "band": 2, "bound": 2, "cut": 2, "frequency": 3}
    labels = {axis: sorted(words) for axis, words in stored.LABELS["gap.nc"].items()}
    rng = np.random.default_rng(0)
    variables = {
        name: (axes, rng.random([len(labels.get(a, range(sizes.get(a, 2)))) for a in axes]))
        for name, axes in stored.FILES["gap.nc"].items()
    }
    found = xr.Dataset(variables)
    for axis in found.sizes:
        kind = float if stored.COORDINATES.get(axis) == "f" else int
        found.coords[axis] = labels.get(axis, np.arange(found.sizes[axis]).astype(kind))
    found.attrs = {
        name: 1 if what == stored.NUMBERS else "radial"
        for name, what in stored.ATTRS["gap.nc"].items()
    }
    return found


def refused(action):
    """Whether it is refused: by one of our errors, in one line."""
    try:
        action()
    except DitLensError as error:
        assert str(error) and "\n" not in str(error)
        return True
    return False


# Writing.


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as part:
        part.write_text("one")
        assert not path.exists() and part.parent == path.parent
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    mode = path.stat().st_mode & 0o777
    (tmp_path / "plain").write_text("")
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777


def test_each_writer_has_a_temporary_file_of_its_own(tmp_path):
    with replacing(tmp_path / "x") as a, replacing(tmp_path / "x") as b:
        assert a != b
        a.write_text("a")
        b.write_text("b")
    assert (tmp_path / "x").read_text() == "a" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["file/inside", "folder", "/proc/nothing/here"])
def test_where_nothing_can_be_written(name, tmp_path, trace):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnwritableFile, match="can't be written"):
        trace.save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    try_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"'.*file' can't be written \(.*\); choose a place that can"):
        try_folder(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_what_is_no_file_is_left_alone(tmp_path):
    """A device, which a file would replace, such as /dev/null."""
    os.mkfifo(tmp_path / "device")
    for path, why in [("device", "it is no file"), (".", "a folder is there"), ("a\0b", "null")]:
        for act in (try_file, lambda path: replacing(path).__enter__()):
            with pytest.raises(UnwritableFile, match=rf"can't be written \(.*{why}"):
                act(tmp_path / path)
    assert not (tmp_path / "device").is_file()
    with pytest.raises(UnwritableFile, match="too long"):
        try_file(tmp_path / ("x" * 300))


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "file")
    with replacing(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other" / "file").read_text() == "new"
    assert len(list((tmp_path / "other").iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_lock_on_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "x.lock").symlink_to("/dev/full")
    with pytest.raises(UnwritableFile, match="x.lock' can't be written"), locked(tmp_path / "x"):
        pass


@pytest.mark.parametrize("place", ["file/out", "a\0b"])
@pytest.mark.parametrize("command", ["gap", "patch", "map", "record", "probe", "plan"])
def test_the_output_folder_is_tried_first(command, place, tmp_path, monkeypatch, capsys):
    for late in ("load", "load_skeleton"):
        monkeypatch.setattr(loading, late, lambda *a, **k: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    more = {"probe": ["SpectralSplit"], "record": ["digits", "resid_post"]}.get(command, [])
    assert main([command, *more, "--out", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.count("can't be written") == 1


@pytest.mark.parametrize(
    "name, safe",
    [("../../x", "x"), ("..", "unnamed"), ("/", "unnamed"), ("a\\..\\b", "b"), ("a\0b", "a_b")],
)
def test_names_do_not_leave_the_folder(name, safe):
    assert file_name(name) == safe


def test_a_gap_is_stored_before_it_is_printed(gap_results, tmp_path, monkeypatch):
    monkeypatch.setattr(gap_report, "plain_console", lambda width: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gap_report.write(gap_results, tmp_path)
    assert stored.read(tmp_path / "gap.nc")[0] == "gap.nc"


def test_a_report_overwrites_no_other_result(gap_results, tmp_path, capsys):
    """Of a file with a name of its own the pictures are too, and nothing is stored again."""
    gap_report.write(gap_results, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = gap_results.assign_attrs(headline="another")
    save_dataset(tmp_path / "mine.nc", "gap.nc", other)
    stored.show(tmp_path / "mine.nc")
    assert "another" in capsys.readouterr().out
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert (tmp_path / "mine_layer_profile.png").exists()


def test_files_say_what_made_them(gap_results, trace, tmp_path):
    made = versions() | {"device": device_name("cpu")}
    assert made["torch"] == torch.__version__ and made["device"].startswith("cpu (")
    with made_by("dit-lens gap"):
        made_of("digits", torch.device("cpu"))
        file = save_dataset(tmp_path / "a.nc", "x", gap_results)
        assert written() == [file]
    assert written() == []
    found = made_with(file)
    date = datetime.fromisoformat(found.pop("date"))
    assert abs(datetime.now(timezone.utc) - date) < timedelta(minutes=5)
    assert found == made | {"command": "dit-lens gap", "model": "digits"}
    from safetensors import safe_open

    with safe_open(trace.save(tmp_path / "t"), "pt") as file:
        assert json.loads(file.metadata()["versions"]) == made


def test_results_of_several_models_in_a_folder_are_told_apart(gap_results, tmp_path, capsys):
    """In words; and what a command answers holds its own results alone."""

    def save(model, name):
        with made_by(f"dit-lens gap {model}"):
            made_of(model, torch.device("cpu"))
            save_dataset(tmp_path / name, "gap.nc", gap_results)
            return stored_now(tmp_path)

    answer = save("first", "gap.nc")
    assert capsys.readouterr().out == "" and list(answer.data()["results"]) == ["gap.nc"]
    answer = save("second", "attributes.nc")
    note = f"The results in {str(tmp_path)!r} are of 2 models: "
    note += "gap.nc of 'first', attributes.nc of 'second'."
    assert capsys.readouterr().out == f"{note}\n"
    assert list(answer.data()["results"]) == ["attributes.nc"]
    assert stored.of_several_models(stored.files_at(tmp_path)) == note
    stored.show(tmp_path / "gap.nc")
    assert note not in capsys.readouterr().out


# Flips.


def stored_files(folder, trace, pair, gap_results):
    """One file of each kind, and how each is read."""
    save_dataset(folder / "probe.nc", "probe X", gap_results)
    return {
        trace.save(folder / "trace"): dit_lens.load_trace,
        save_dataset(folder / "gap.nc", "gap.nc", gap_results): stored.read,
        folder / "probe.nc": lambda path: load_dataset(path, "a result"),
    }


def test_every_flipped_bit_is_noticed(trace, pair, gap_results, tmp_path):
    files = stored_files(tmp_path, trace, pair, gap_results)
    rng = random.Random(0)
    silent, tries = [], 0
    for path, read in files.items():
        whole = path.read_bytes()
        read(path)
        for _ in range(-(-TRIES // len(files))):
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            tries += 1
            if not refused(lambda path=path, read=read: read(path)):
                silent.append((path.name, bit))
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            assert refused(lambda path=path, read=read: read(path))
        path.write_bytes(whole + b"\0")
        assert refused(lambda path=path, read=read: read(path))
        path.write_bytes(whole)
        read(path)
    print(f"{tries} files with a flipped bit, {len(silent)} read in silence")
    assert tries >= 200 and not silent


def test_other_peoples_files_are_refused(trace, pair, gap_results, tmp_path):
    files = list(stored_files(tmp_path, trace, pair, gap_results).items())
    for path, _ in files:
        for other, read in files:
            if path != other and not (path.suffix == ".nc" and other.name == "probe.nc"):
                assert refused(lambda path=path, read=read: read(path)), (path, other)
    with pytest.raises(MissingFile, match="There is no file '.*gone'; expected a trace"):
        dit_lens.load_trace(tmp_path / "gone")
    with pytest.raises(InvalidValue, match="can't be read"):
        check_seal(tmp_path, "a file")


# A sealed file with other content.


def test_a_report_of_other_figures(gap_results, tmp_path):
    path = tmp_path / "gap.nc"
    for other, text in (
        (gap_results.drop_vars("layer_gap"), "has no layer_gap"),
        (gap_results.astype("i2"), "has no layer_commitment"),
        (gap_results.assign_coords(layer=[0.0, np.nan, 1.0]), "no such labels on its axis 'layer'"),
        (gap_results.assign_coords(layer=[0, 0, 1]), "no such labels on its axis 'layer'"),
        (gap_results.assign_coords(view=["a", "b"]), "no such labels on its axis 'view'"),
        (gap_results.assign_attrs(headline=3), "has headline="),
        (gap_results.assign_attrs(commitment_step=np.nan), "has commitment_step=.*nan"),
    ):
        save_dataset(path, "gap.nc", other)
        with pytest.raises(InvalidValue, match=text):
            stored.show(path)


# Traces.


def test_a_saved_trace_of_coupled_twins_says_so(model, tmp_path):
    with dit_lens.trace(model, names="blocks.0.hook_resid_post") as t:
        dit_lens.twins(
            model, pairs=2, steps=STEPS, tie="attention", g=0.5, release=2, eps=0.1, form="mix"
        )
    again = dit_lens.load_trace(t.save(tmp_path / "t"), model)
    assert torch.equal(again["resid_post", 0], t["resid_post", 0])
    with pytest.raises(
        RuntimeError,
        match="'blocks.1.hook_resid_post' was not recorded, and this trace was of twins coupled "
        "inside the attention of layers 0 to 2 by a function that the file can't hold; trace again",
    ):
        again["resid_post", 1]
    free = again.get("blocks.1.hook_resid_post", steps=[2, 3])
    whole = t.get("blocks.1.hook_resid_post", steps=[2, 3])
    assert all(torch.equal(free[n], whole[n]) for n in whole)
    twice = dit_lens.load_trace(again.save(tmp_path / "twice"), model)
    with pytest.raises(RuntimeError, match="of twins coupled inside the attention of layers"):
        twice["resid_post", 1]


class Mine(DDIMScheduler):
    """A scheduler that diffusers does not have."""


class Unknown(Mine):
    """And one whose noise levels are not known."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.alphas_cumprod


@pytest.mark.parametrize("kind", [DDIMScheduler, Mine])
def test_noise_levels_are_in_the_file(kind, tmp_path):
    """And not the scheduler: neither its class nor its configuration has to be known."""
    scheduler = kind(1000, clip_sample=False, trained_betas=np.linspace(1e-4, 0.02, 1000))
    with dit_lens.trace(HookedDiT(make_dit(), scheduler=scheduler), names="hook_embed") as t:
        t.model(torch.randn(2, 4, 8, 8), torch.tensor([7, 7]), torch.tensor([1, 2]))
    alone = dit_lens.load_trace(t.save(tmp_path / "t"))
    assert alone.to_xarray().identical(t.to_xarray()) and "log_snr" in alone.to_xarray().coords


def test_noise_levels_that_are_not_known_are_left_out(tmp_path):
    with dit_lens.trace(HookedDiT(make_dit()), names="hook_embed") as t:
        t.model(torch.randn(2, 4, 8, 8), torch.tensor([7, 7]), torch.tensor([1, 2]))
    t.record.scheduler = Unknown(1000)
    alone = dit_lens.load_trace(t.save(tmp_path / "t"))
    assert "log_snr" not in t.to_xarray().coords and "log_snr" not in alone.to_xarray().coords
    assert torch.equal(alone["hook_embed"], t["hook_embed"])


def test_what_json_does_not_have(trace, tmp_path):
    """Numpy is kept; of what can't be kept the file says so, and refuses only those reads."""
    record = copy.copy(trace.record)
    inputs = {"a": np.float32(1.5), "b": np.arange(3), "c": torch.float16, "d": torch.Size([1, 2])}
    record.calls = [copy.copy(call) for call in record.calls]
    record.calls[0].inputs = record.calls[0].inputs | {"odd": inputs}
    record.calls[-1].inputs = record.calls[-1].inputs | {"odd": {"x": [object()], "y": {1: 2}}}
    again = trace_files.load(trace_files.save(record, tmp_path / "t"))
    found = again.calls[0].inputs["odd"]
    assert found["a"] == 1.5 and found["c"] is torch.float16 and found["d"] == (1, 2)
    assert found["b"].tolist() == [0, 1, 2]
    assert again.lost == {1: "called with odd.x.0, a object"}
    with pytest.raises(InvalidState, match="was called with odd.x.0, a object that the file"):
        dit_lens.tracing.recompute.read(again, None, ["hook_embed"])


WORDS = [None, True, -1, 0, 1, 2.5, 10**9, 10**30, "", "x", "../x", "float16", "tensor", [], [1]]
WORDS += [{}, {"value": 1}, {"tensor": "call/0/x"}, {"tensor": "gone"}, {"dict": {}}, [[0]], "\0"]


def mutated(value, rng):
    """A copy with one place changed, put in or taken out."""
    value = copy.deepcopy(value)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[rng.choice(["new", "tensor", "0", key + "x"])] = node.pop(key)
    elif how == 2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(WORDS))
    return value


def test_hostile_traces(trace, model, tmp_path):
    path = trace.save(tmp_path / "t")
    about, tensors = load_tensors(path, trace_files.FORMAT, "")
    rng, kept = random.Random(1), 0

    def use():
        alone = dit_lens.load_trace(path)
        assert len(alone["resid_post", 0]) == len(alone.to_xarray().step) == len(alone.timesteps)
        dit_lens.load_trace(path, model).get("blocks.1.hook_resid_post")
        alone.save(tmp_path / "again")

    for _ in range(TRIES):
        save_tensors(path, trace_files.FORMAT, mutated(about, rng), tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept += not refused(use)
    assert kept < TRIES // 2
    for odd in ([], None, "x", 3, {"cfg": 1}):
        save_tensors(path, trace_files.FORMAT, odd, tensors)
        assert refused(use)
    print(f"{TRIES} traces with other metadata, {kept} still a trace, the rest refused")


class Said(Schema):
    a: Listed[Size] | str = ""
    inner: dict[str, "Said"] = {}
    pair: Annotated[tuple[int, int], Field(strict=False)] = (0, 0)


@pytest.mark.parametrize(
    "given, text",
    [
        ({"a": [1, -1]}, "a[1] = -1; expected it to be greater than or equal to 0."),
        ({"a": [10**5000]}, "a[0] = a int; expected it to be less than or equal to 10995"),
        ({"a": [True]}, "a[0] = True; expected it to be a valid integer."),
        ({"a": True}, "a = True; expected it to be a valid tuple or be a valid string."),
        ({"inner": {"x": {"b": 1}}}, "inner.x.b, which is not known here."),
        ({"pair": [1]}, "no 1 in pair."),
        ({"pair": [1, 2, 3]}, "pair = [1, 2, 3]; expected it to have at most 2 items after"),
        ([], "metadata = []; expected it to be a valid dictionary or instance of Said."),
    ],
)
def test_where_a_schema_is_not_kept(given, text):
    with pytest.raises(InvalidValue) as error:
        conform(given, Said, "f")
    assert str(error.value).startswith(f"f has {text}")


def test_a_file_as_deep_as_it_likes():
    given = {}
    for _ in range(3000):
        given = {"inner": {"x": given}}
    with pytest.raises(InvalidValue, match="^f has inner.x.inner.x"):
        conform(given, Said, "f")


# Locks.


def hold(path, ready):
    with locked(path):
        ready.set()
        time.sleep(60)


def test_a_store_is_one_process_s_alone(pair, tmp_path):
    path, context = tmp_path / "sweep", multiprocessing.get_context("fork")
    sweep(pair.a, pair.b, [Patch("attn_out", 1)], store=path)
    ready = context.Event()
    other = context.Process(target=hold, args=(path / ".driver", ready))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(
            RuntimeError,
            match=f"sweep' is in use by process {other.pid} on .*; wait for it, help it with",
        ):
            sweep(pair.a, pair.b, [Patch("attn_out", 1)], store=path)
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert (path / ".driver.lock").exists()  # stale: nobody holds it
    sweep(pair.a, pair.b, [Patch("attn_out", 1)], store=path)
    assert not (path / ".driver.lock").exists()


def test_a_thread_is_told_too(tmp_path):
    with locked(tmp_path / "x"):
        with pytest.raises(InvalidState, match="is in use by process"), locked(tmp_path / "x"):
            pass
    with locked(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


# Saved models.


@pytest.fixture
def folder(tmp_path):
    make_dit(classes=4).save_pretrained(tmp_path / "model")
    DDIMScheduler(1000).save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


def rewrite(folder, change, file="diffusion_pytorch_model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def reconfigure(folder, file="config.json", **entries):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | entries))


@pytest.fixture(params=["with accelerate", "without"])
def accelerate(request, monkeypatch):
    from diffusers.models import modeling_utils

    if request.param == "without":
        monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: False)


BIAS = "transformer_blocks.1.attn1.to_q.bias"


def test_weights_are_those_of_the_configuration(folder, accelerate):
    assert dit_lens.load(folder).cfg.n_layers == 3
    whole = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights = folder / "diffusion_pytorch_model.safetensors"
    for change, text in (
        (lambda w: w.pop(BIAS), rf"\(missing: {BIAS}\)"),
        (lambda w: w.update(extra=torch.ones(1)), r"\(unexpected: extra\)"),
        (
            lambda w: w.update({BIAS: torch.ones(3)}),
            rf"\(misshapen: {BIAS} \[3\], expected \[16\]\)",
        ),
        (lambda w: [w.pop(k) for k in list(w)[:9]], r"missing: (\S+, ){2}\S+ and 6 more\)"),
    ):
        rewrite(folder, change)
        with pytest.raises(InvalidValue, match="are not those of the DiTTransformer2DModel") as e:
            dit_lens.load(folder)
        assert e.match(text)
        save_file(whole, weights)
    odd = {2: "unexpected: transformer_blocks.2", 4: "missing: transformer_blocks.3"}
    for layers, text in odd.items():
        reconfigure(folder, num_layers=layers)
        with pytest.raises(InvalidValue, match=text):
            dit_lens.load(folder)


def test_weights_of_a_pipeline_and_in_several_files(tmp_path, accelerate):
    make_pipe().save_pretrained(tmp_path / "pipe", max_shard_size="20KB")
    part = tmp_path / "pipe" / "transformer"
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() and dit_lens.load(tmp_path / "pipe").vae is not None
    shards = json.loads(index.read_text())
    for name, text in (
        ("../../weights.safetensors", "expected a safetensors file beside it"),
        ("-absent.safetensors", "names '-absent.safetensors', which is not there"),
    ):
        odd = {k: name if k == BIAS else v for k, v in shards["weight_map"].items()}
        index.write_text(json.dumps(shards | {"weight_map": odd}))
        with pytest.raises(DitLensError, match=text):
            dit_lens.load(tmp_path / "pipe")
    index.write_text(json.dumps(shards))
    rewrite(part, lambda w: w.pop(BIAS), shards["weight_map"][BIAS])
    with pytest.raises(InvalidValue, match=f"do not agree on where '{BIAS}' is"):
        dit_lens.load(tmp_path / "pipe")
    shutil.copytree(part, tmp_path / "kept")
    shards["weight_map"].pop(BIAS)
    index.write_text(json.dumps(shards))
    with pytest.raises(InvalidValue, match=rf"\(missing: {BIAS}\)"):
        dit_lens.load(tmp_path / "pipe")


def test_parts_of_other_libraries(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    reconfigure(tmp_path, "model_index.json", vae=["antigravity", "fly"])
    with pytest.raises(InvalidValue, match="names 'fly' of 'antigravity' for 'vae'; expected"):
        dit_lens.load(tmp_path)
    reconfigure(tmp_path, "model_index.json", _class_name="DiTTransformer2DModel")
    with pytest.raises(InvalidValue, match="expected a DiffusionPipeline"):
        dit_lens.load(tmp_path)


@pytest.mark.parametrize(
    "file, entries, text",
    [
        ("config.json", {"num_layers": 10**9}, "num_layers=1e.09; expected numbers from 0 to 100"),
        ("config.json", {"num_layers": -1}, "num_layers=-1; expected numbers from 0"),
        (
            "config.json",
            {"sample_size": 10**6},
            "sample_size=1e.06; expected numbers from 1 to",
        ),
        ("config.json", {"attention_head_dim": 10**9}, "attention_head_dim=1e.09"),
        (
            "config.json",
            {"sample_size": 2048, "attention_head_dim": 10**6},
            "asks for positions of",
        ),
        ("config.json", {"sample_size": 8.5}, "sample_size=8.5; expected whole numbers"),
        ("config.json", {"num_layers": 2.0}, "num_layers=2.0; expected whole numbers"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads=0; expected numbers from"),
        ("config.json", {"patch_size": -2}, "patch_size=-2; expected numbers from 1"),
        ("config.json", {"in_channels": 10**400}, "in_channels=a list or number too long"),
        ("config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler'; expected a ModelMixin"),
        ("config.json", {"_class_name": ["a"]}, r"\['a'\]; expected a ModelMixin"),
        ("config.json", {"_class_name": "__name__"}, "'__name__'; expected a ModelMixin"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "timesteps=1e.09; exp"),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DModel"}, "a SchedulerMixin"),
    ],
)
def test_hostile_configurations(file, entries, text, folder, monkeypatch):
    """Refused before anything is built, whatever it would have cost. The transformer's own
    configuration is not even built without memory (on torch's meta device).
    """
    reconfigure(folder, file, **entries)

    def built(*args, **kwargs):
        raise AssertionError("something was built")

    monkeypatch.setattr(diffusers.ModelMixin, "from_pretrained", built)
    if file == "config.json":
        monkeypatch.setattr(diffusers.ModelMixin, "__init__", built)
    with pytest.raises(InvalidValue, match=text):
        dit_lens.load(folder)
    if file == "config.json":
        assert main(["hooks", str(folder)]) == 2


def test_damaged_weights_are_no_success_of_any_command(folder, capsys):
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:100], whole[:-1], b"", b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damaged)
        for command in (["hooks", str(folder)], ["gap", str(folder), "--out", str(folder / "o")]):
            assert main(command) == 2
            assert "it is not a whole safetensors file" in capsys.readouterr().err
    weights.unlink()
    assert main(["hooks", str(folder)]) == 0  # a configuration is enough to list names


def test_weights_that_are_not_finite(folder):
    rewrite(folder, lambda w: w[BIAS].fill_(torch.nan))
    with pytest.raises(InvalidValue, match=rf"are damaged: {BIAS} has values that are not finite"):
        dit_lens.load(folder)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"prediction_type": "x"}, "can't take a step"),
        ({"trained_betas": []}, "has noise levels for 0 timesteps; expected as many as the 1000"),
        ({"trained_betas": [0.1] * 9}, "has noise levels for 9 timesteps; expected as many as the"),
        ({"timestep_spacing": "x"}, "can't be given 3 timesteps"),
        ({"beta_start": 5.0, "beta_end": 9.0}, "noise levels of DDIMScheduler are not understood"),
    ],
)
def test_a_saved_scheduler_that_does_not_work(settings, text, folder):
    reconfigure(folder, "scheduler/scheduler_config.json", **settings)
    with pytest.raises(InvalidValue, match=text):
        dit_lens.sample(dit_lens.load(folder), [1], steps=3)


def test_mutated_configurations(folder):
    """Refused, or loaded; never a raw error."""
    rng, kept = random.Random(2), 0
    make_dit(layers=1, classes=4).save_pretrained(folder)
    names = ("config.json", "scheduler/scheduler_config.json")
    whole = {name: json.loads((folder / name).read_text()) for name in names}
    for i in range(TRIES // 2):
        for file, config in whole.items():
            (folder / file).write_text(json.dumps(config))
        file = rng.choice(list(whole))
        (folder / file).write_text(json.dumps(mutated(whole[file], rng)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept += not refused(lambda: dit_lens.load(folder))
            if i % 4 == 0:
                refused(lambda: loading.load_skeleton(folder))
    print(f"{TRIES // 2} models with other configurations, {kept} loaded, the rest refused")
    assert kept < TRIES // 2


def test_names_and_types(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dit_lens.load("digits/").cfg.n_layers == 28
    assert dit_lens.load("digits", dtype="float16").transformer.dtype == torch.float16
    for dtype in ("float15", "int8", torch.int8, 3, None, "__name__"):
        with pytest.raises(TypeError, match="is none that weights can have; expected one of"):
            dit_lens.load("digits", dtype=dtype)
    for device in ("nowhere", "cuda:99", -5, None.__class__):
        with pytest.raises(ValueError, match="can't be used"):
            dit_lens.load("digits", device=device)
    for name in ("", "x" * 5000, "\0", "digitz/", "digits//x"):
        with pytest.raises(FileNotFoundError, match="is neither a bundled model nor a folder nor"):
            dit_lens.load(name)
    make_dit(classes=4).save_pretrained(tmp_path / "digits")
    assert dit_lens.load("digits/").cfg.n_layers == 3
    assert Path("digits").is_dir() and dit_lens.load("digits").cfg.n_layers == 28


def test_text_encoders_have_their_weights(tmp_path):
    """transformers would fill in random ones."""
    from transformers import T5Config, T5EncoderModel

    make_pipe().save_pretrained(tmp_path)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path / "text_encoder")
    reconfigure(tmp_path, "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    assert set(loading._text_parts(tmp_path, torch.float32)) == {"text_encoder"}
    name = "encoder.final_layer_norm.weight"
    rewrite(tmp_path / "text_encoder", lambda w: w.pop(name), "model.safetensors")
    with pytest.raises(InvalidValue, match=rf"T5EncoderModel .*\(missing or misshapen: {name}\)"):
        dit_lens.load(tmp_path)
