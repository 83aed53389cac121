"""The commands and loading, as a user meets them."""

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint

import diffusers
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import dit_lens
from dit_lens.commands import main
from dit_lens.commands.common import labels_of, progress_bar
from dit_lens.commands.gap import read_images
from dit_lens.commands.main import COMMANDS
from dit_lens.commands.parser import EXAMPLES, parser
from dit_lens.errors import InvalidState, InvalidValue, MissingFile
from dit_lens.experiments import Plan, measure_gap
from dit_lens.families import family_named
from dit_lens.groundtruth import gaussian
from dit_lens.report.stored import read
from dit_lens.sampling import loop


@pytest.fixture
def folder(tmp_path):
    make_dit(channels=1, classes=4).save_pretrained(tmp_path / "model")
    DDIMScheduler(1000, clip_sample=False).save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


def test_hooks_reads_no_weights(folder, capsys):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["hooks", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "88 hook points" in out and "[b, 16, 2, 8]" in out and "blocks.{i}.attn.hook_pattern" in out
    )
    assert main(["hooks", str(folder), "--filter", "attn.*"]) == 0
    assert "27 hook points" in capsys.readouterr().out


@pytest.mark.slow
def test_hooks_of_a_hub_id(folder, tmp_path):
    """From the hub's cache, as it lies on disk after a download."""
    stored = tmp_path / "models--someone--something"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    transformer = stored / "snapshots" / ("0" * 40) / "transformer"
    transformer.mkdir(parents=True)
    shutil.copy(folder / "config.json", transformer)
    shown = subprocess.run(
        [sys.executable, "-m", "dit_lens", "hooks", "someone/something"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "someone/something: 88 hook points, 3 layers" in shown.stdout


@pytest.mark.parametrize(
    "argv, text",
    [
        (["hooks", "/nowhere"], "There is no model at '/nowhere'"),
        (["gap", "digit"], "'digit' is neither a bundled model nor a folder nor a hub id"),
        (
            ["gap", "--couple", "1", "0"],
            "strengths is [1.0, 0.0]; expected two or more in increasing order",
        ),
        (
            ["gap", "/nowhere", "--couple", "0", "1", "--steps", "4"],
            "steps=4 can't be used; expected a whole number of 5 or more, to release twins at",
        ),
        (
            ["gap", "--size", "7"],
            "size=(7,) can't be used; expected (height, width) of the latents",
        ),
        (["patch", "/nowhere"], "'/nowhere' is neither a bundled model nor a folder nor a hub id"),
        (["report", "/nowhere"], "There are no results at '/nowhere'"),
        (["plan", "--check", "/no.json"], "There is no file '/no.json'; expected a plan written"),
        (["plan", "--side-by-side", "/no.json"], "There is no file '/no.json'; expected a plan"),
        (["compare", "--with", "/no.json"], "There is no file '/no.json'; expected a plan written"),
        (["gap", "--images", "/nowhere"], "There is no file '/nowhere'; expected a folder of"),
        (["gap", "--prompts", "/nowhere"], "There is no file '/nowhere'; expected prompts, one a"),
        (["probe", "digits", "f.py:C"], "The probe comes first: dit-lens probe f.py:C digits; got"),
        (["probe", "/no.py:C"], "There is no file '/no.py'; expected path/to/file.py:ClassName"),
        (["diagnose"], "Neither of --label and --all is given"),
        (
            ["probe", "SpectralSplitt"],
            "No probe is called 'SpectralSplitt'; installed: 'SpectralSplit'",
        ),
        (["check", "LayerLenz"], "No probe is called 'LayerLenz'; installed: 'LayerLens'"),
        (["check", "/nowhere.py:Mine"], "There is no file '/nowhere.py'"),
        (["check", "no_such_module:Mine"], "'no_such_module' can't be imported: ModuleNotFound"),
        (["check-family", "DiT"], "There is no family for 'DiT'; did you mean"),
    ],
)
def test_mistakes_are_one_line(argv, text, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dit-lens: {text}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "files, argv, text",
    [
        ({}, ["hooks", "."], "There is no model at '.'; expected"),
        ({"config.json": "no"}, ["hooks", "."], "'config.json' is not JSON: Expecting value"),
        ({"config.json": "[]"}, ["hooks", "."], "'config.json' holds []; expected a configuration"),
        (
            {"config.json": '{"_class_name": "DiTTransformer2DModel", "num_layers": "three"}'},
            ["hooks", "."],
            "'config.json' is not a configuration of DiTTransformer2DModel: ",
        ),
        ({"config.json": "no"}, ["gap", "."], "'config.json' is not JSON: Expecting value"),
        ({"config.json": "[]"}, ["gap", "."], "'config.json' holds []; expected a configuration"),
        ({"gap.nc": "no"}, ["report", "gap.nc"], "'gap.nc' has no seal of this version"),
        ({"mine.py": "import nowhere"}, ["check", "mine.py:Mine"], "'mine.py' can't be imported"),
        ({"mine.py": "x = 1"}, ["check", "mine.py:Mine"], "'mine.py' has no class 'Mine'"),
        ({"mine.py": "Mine = 1"}, ["check", "mine.py:Mine"], "'Mine' in 'mine.py' is 1, which"),
    ],
)
def test_bad_files_are_one_line(files, argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dit-lens: {text}") and err.count("\n") == 1


WHOLE, POSITIVE = "expected a whole number of 1 or more", "expected a number above 0, such as 0.25"


@pytest.mark.parametrize(
    "argv, text",
    [
        (["gap", "--pairs", "8"], "argument --pairs: got '8'; expected a whole number of 16 or"),
        (["gap", "--steps", "2"], "argument --steps: got '2'; expected a whole number of 4 or"),
        (["gap", "--null", "5"], "argument --null: got '5'; expected 0, for no claim about depth,"),
        (["patch", "--pairs", "-3"], "argument --pairs: got '-3'; expected a whole number of 16"),
        (["plan", "--budget", "1.5"], "argument --budget: got '1.5'; expected a share above 0"),
        (["plan", "--items", "7"], "argument --items: got '7'; expected a whole number of 8"),
        (["probe", "--probe", "f.py:C"], "--probe; it has no dashes: dit-lens probe PROBE MODEL"),
        (["patch", "--steps", "many"], f"argument --steps: got 'many'; {WHOLE}"),
        (["probe", "LayerLens", "--items", "0"], f"argument --items: got '0'; {WHOLE}"),
        (["probe", "LayerLens", "--steps", "2.5"], f"argument --steps: got '2.5'; {WHOLE}"),
        (["gap", "--size", "16", "0"], f"argument --size: got '0'; {WHOLE}"),
        (
            ["gap", "--seed", "-1"],
            "argument --seed: got '-1'; expected a whole number of 0 or more",
        ),
        (["gap", "--cut", "0"], f"argument --cut: got '0'; {POSITIVE}"),
        (["patch", "--cut", "nan"], f"argument --cut: got 'nan'; {POSITIVE}"),
        (
            ["gap", "--couple", "0", "-0.5"],
            "argument --couple: got '-0.5'; expected a number of 0 or more, such as 0.5",
        ),
        (["gap", "--bands", "wavelet"], "argument --bands: invalid choice: 'wavelet'"),
    ],
)
def test_bad_options_are_refused_and_not_replaced(argv, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "argv, option, beside",
    [
        (["plan", "--check", "a.json", "--steps", "8"], "--steps", "--check"),
        (["plan", "--check", "a.json", "--budget", "0.5"], "--budget", "--check"),
        (["plan", "--check", "a.json", "--aim", "same"], "--aim", "--check"),
        (["plan", "--check", "a.json", "--labels", "3"], "--labels", "--check"),
        (["plan", "--check", "a.json", "--no-lines"], "--no-lines", "--check"),
        (["plan", "--check", "a.json", "--out", "b.json"], "--out", "--check"),
        (["plan", "--steps", "9", "--side-by-side", "a.json"], "--steps", "--side-by-side"),
        (["diagnose", "--all", "--good", "digits"], "--good", "--all"),
        (["diagnose", "--all", "--band", "low"], "--band", "--all"),
        (["diagnose", "--label", "3", "--most", "4"], "--most", "--label"),
        (["map", "--exact", "--check", "4"], "--check", "--exact"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(argv, option, beside, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dit-lens: {option} does nothing beside {beside}: ")
    assert said.endswith("; leave it out.\n")


def test_mistakes_are_refused_before_torch_is_loaded():
    for argv in (
        ["plan", "--check", "/no.json"],
        ["report", "/nowhere"],
        ["gap", "--pairs", "8"],
        ["diagnose", "--all", "--good", "digits"],
    ):
        said = f"import sys; from dit_lens.commands import main\ntry: main({argv})\nfinally: "
        said += "sys.exit(7 if 'torch' in sys.modules else 2)"
        assert subprocess.run([sys.executable, "-c", said], stderr=-3).returncode == 2, argv


def test_what_is_refused_leaves_no_folder(folder, tmp_path, capsys):
    """The labels are looked at when the measurement begins."""
    out = tmp_path / "made" / "out"
    short = ["--pairs", "16", "--steps", "4", "--out", str(out)]
    assert main(["gap", str(folder), "--labels", "0", "1", "99", *short]) == 2
    assert "99" in capsys.readouterr().err and not out.parent.exists()


def test_what_was_asked_for_is_what_is_run(monkeypatch, folder):
    asked = {}

    def knocked_gap(model, part, way, **options):
        asked.update(options)
        raise InvalidValue("enough")

    monkeypatch.setattr("dit_lens.experiments.knocked_gap.KnockedGap", knocked_gap)
    for argv, pairs, steps in [
        ([], 24, 25),
        (["--quick"], 16, 12),
        (["--pairs", "17", "--steps", "1"], 17, 1),
        (["--quick", "--pairs", "40"], 40, 12),
    ]:
        assert main(["patch", str(folder), "--out", str(folder / "out"), *argv]) == 2
        assert (asked["pairs"], asked["steps"]) == (pairs, steps)


@pytest.mark.parametrize(
    "error",
    [InvalidValue("a\n  b"), InvalidState("a b"), MissingFile("a b"), OSError("a b")],
)
def test_a_users_mistake_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr("dit_lens.commands.hooks.run", raising(error))
    assert main(["hooks"]) == 2
    assert capsys.readouterr().err == "dit-lens: a b\n"


@pytest.mark.parametrize(
    "bug", [ValueError, TypeError, KeyError, RuntimeError, torch.cuda.OutOfMemoryError]
)
def test_a_bug_shows_its_traceback(bug, monkeypatch, capsys):
    monkeypatch.setattr("dit_lens.commands.hooks.run", raising(bug("not the user's fault")))
    with pytest.raises(bug, match="not the user's fault"):
        main(["hooks"])
    assert capsys.readouterr().err == ""


def test_a_probe_that_ends_the_program_has_not_succeeded(monkeypatch, capsys):
    monkeypatch.setattr("dit_lens.commands.probe.run", raising(SystemExit(0)))
    assert main(["probe", "LayerLens"]) == 2
    assert capsys.readouterr().err == "dit-lens: the program was ended by SystemExit(0)\n"


@pytest.mark.slow
def test_a_probe_that_ends_the_program_fails_its_check(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import sys, dit_lens\n"
        "class Mine(dit_lens.Probe):\n"
        "    names = 'resid_post'\n"
        "    def observe(self, activation, site): sys.exit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["check", "mine.py:Mine"]) == 1
    assert "SystemExit: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "def __init__(self, radius): ...",
            "Mine() can't be made from the command line: missing a",
        ),
        ("def result(self): return None", "Mine.result()=None can't be used"),
        ("def result(self): return xr.Dataset({'a': 1j})", "The result of Mine can't be stored: N"),
        (
            "def result(self): return xr.Dataset(attrs={'a': None})",
            "The result of Mine can't be st",
        ),
        (
            "def observe(self, activation, site): return 1 / 0",
            "Mine failed in {folder}/mine.py, line 5 (observe): ZeroDivisionError: division by",
        ),
    ],
)
def test_a_probe_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys, method, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import dit_lens, xarray as xr\n"
        "class Mine(dit_lens.Probe):\n"
        "    names = 'resid_post'\n"
        "    def observe(self, activation, site): pass\n"
        f"    {method}\n"
    )
    assert main(["probe", "mine.py:Mine", "digits", "--steps", "2", "--items", "1"]) == 2
    said = said.replace("{folder}", str(tmp_path))
    assert capsys.readouterr().err.strip().startswith(f"dit-lens: {said}")


def test_a_broken_entry_point_is_one_line(monkeypatch, capsys):
    broken = EntryPoint("Mine", "no_such_module:Mine", "dit_lens.probes")
    monkeypatch.setattr("dit_lens.tracing.probe.registered_probes", lambda: {"Mine": broken})
    assert main(["probe", "Mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "dit-lens: The entry point 'Mine' (no_such_module:Mine) can't be loaded: "
    )
    assert err.count("\n") == 1


@pytest.mark.slow
def test_an_output_that_nobody_reads_is_no_success(folder):
    """As behind `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dit_lens", "hooks", str(folder)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == "dit-lens: the output was closed before all of it was written\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("argv", [["hooks"], ["--help"]])
def test_an_output_on_a_full_disk_is_no_success(argv, folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*argv, str(folder)]) == 2
        full.flush()  # nothing is left that Python would complain of at its exit
    assert capsys.readouterr().err == "dit-lens: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("argv", [["hooks"], ["gap"], ["report", "/nowhere"], ["--help"]])
def test_a_closed_output_is_said_before_minutes_are_spent(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert main(argv) == 2
    assert capsys.readouterr().err == (
        "dit-lens: the output is closed; expected a terminal, a pipe or a file\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SpectralSplit", "TwinDivergence", "LayerLens", "TwinPatching"])
def test_every_built_in_probe_runs_from_the_command_line(name, folder, tmp_path):
    out = tmp_path / "r.nc"
    command = ["probe", f"dit_lens.probes:{name}", str(folder), "--steps", "6", "--out", str(out)]
    assert main(command) == 0 and out.exists()


@pytest.mark.slow
def test_a_probe_that_makes_its_own_runs_passes_its_check(capsys):
    assert main(["check", "dit_lens.probes:TwinPatching"]) == 0
    shown = capsys.readouterr().out
    assert "runs of its own" in shown and "FAIL" not in shown


def test_help_says_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit codes: 0 done, 1 a check failed, 2 a mistake" in capsys.readouterr().out


def test_an_interruption_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("dit_lens.commands.hooks.run", raising(KeyboardInterrupt()))
    assert main(["hooks"]) == 130
    assert capsys.readouterr().err == "dit-lens: interrupted\n"


def test_an_interruption_says_what_is_kept(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["record", str(folder), "resid_post", "--items", "2", "--out", str(out)]
    with monkeypatch.context() as broken:
        broken.setattr("dit_lens.tracing.recording.sample", raising(KeyboardInterrupt()))
        assert main([*command, "--steps", "2"]) == 130
    err = f"dit-lens: interrupted; {out} is kept, and the same command goes on with it\n"
    assert capsys.readouterr().err == err
    assert main([*command, "--steps", "2"]) == 0


def raising(error):
    def run(*args, **kwargs):
        raise error

    return run


def test_every_subcommand_explains_itself_without_loading_torch():
    names = ["hooks", "gap", "patch", "map", "plan", "compare", "probe", "record", "cost"]
    names += ["check", "check-family", "report"]
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dit_lens", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"\n    {name} " in shown.stdout for name in names)
    assert "dit_lens.commands.gap" in shown.stderr and "torch" not in shown.stderr


@pytest.fixture
def four_alike(tmp_path):
    """A saved model with a gap, and with four classes of which each is as the others."""
    folder = gaussian(4.0, 0.25, (1,), 3, sample_size=4).save(tmp_path / "alike")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_embeds_ada_norm": 4}))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights |= {k: w[:1].repeat(5, 1) for k, w in weights.items() if "embedding_table" in k}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


TINY = ["--pairs", "16", "--steps", "5", "--cut", "0.1", "--batch", "32"]
FEW = ["--items", "10", "--steps", "4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["gap", *TINY, "--one-pass", "--couple", "0", "1"],
        ["gap", *TINY, "--one-pass", "--causes"],
        ["gap", *TINY, "--one-pass", "--bands", "eigen"],
        ["gap", *TINY, "--one-pass", "--null", "19"],
        ["patch", *TINY, "--how", "zero", "--interchange", "stream", "--windows", "2"],
        ["patch", *TINY, "--how", "zero", "--interchange", "heads", "--sets", "--shapley", "2"],
        ["map", *FEW, "--check", "1"],
        ["plan", *FEW, "--budget", "0.9"],
        ["compare", *FEW, "--dtype", "bfloat16"],
        ["probe", "TwinDivergence", "--items", "4", "--steps", "3"],
        ["probe", "TwinPatching", "--items", "16", "--steps", "8"],
        ["probe", "LayerLens", "--items", "2", "--steps", "3"],
        ["record", "hook_embed", "--items", "2", "--steps", "3"],
    ],
    ids=" ".join,
)
def test_labels_are_those_of_every_run_of_a_command(command, four_alike, tmp_path, monkeypatch):
    seen, own = set(), loop.model_output

    def watched(model, x, step, labels, *rest):
        seen.update(labels.tolist())
        return own(model, x, step, labels, *rest)

    monkeypatch.setattr(loop, "model_output", watched)
    place = 2 if command[0] == "probe" else 1
    out = str(tmp_path / "out") + {"plan": ".json", "probe": ".nc"}.get(command[0], "")
    asked = [*command[:place], str(four_alike), *command[place:]]
    assert main([*asked, "--labels", "3", "--out", out]) == 0
    assert seen == {3}


@pytest.mark.slow
def test_gap_end_to_end(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["gap", str(folder), "--pairs", "16", "--steps", "8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    # layers, bands
    assert "stream low" in shown and "│     2 │" in shown and shown.count("│") == 3 * 8 + 8 * 5
    _, first = read(out / "gap.nc")
    for name in ("layer_profile.png", "frequencies.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
    again = measure_gap(dit_lens.load(folder), pairs=16, steps=8, name=str(folder))
    other = measure_gap(dit_lens.load(folder), pairs=16, steps=8, seed=1, name=str(folder))
    for name in first.data_vars:
        assert np.array_equal(
            first[name].values, again[name].values, equal_nan=first[name].dtype.kind == "f"
        ), name
    assert not np.array_equal(first.difference_energy.values, other.difference_energy.values)
    with pytest.raises(
        ValueError,
        match="pairs=8 can't be used; expected a whole number of 16 or more",
    ):
        measure_gap(dit_lens.load(folder), pairs=8)
    (tmp_path / "gap.nc").write_text("no")
    with pytest.raises(ValueError, match="has no seal of this version of dit_lens"):
        read(tmp_path / "gap.nc")


def test_probe_command(folder, tmp_path, capsys):
    out = tmp_path / "r.nc"
    assert (
        main(
            [
                "probe",
                "SpectralSplit",
                str(folder),
                "--items",
                "2",
                "--steps",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert out.exists() and "energy" in capsys.readouterr().out


def test_a_probe_that_runs_by_itself(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["probe", "dit_lens.probes:TwinPatching", str(folder), "--items", "4"]
    assert main([*command, "--steps", "5"]) == 0
    assert capsys.readouterr().out.endswith("stored in TwinPatching.nc\n")
    with xr.open_dataset(tmp_path / "TwinPatching.nc", engine="scipy") as stored:
        assert stored.sizes["layer"] == 3 and stored.attrs["release"] == 0


def test_loading(folder, tmp_path):
    model = dit_lens.load(folder)
    assert (
        model.scheduler.config.clip_sample is False
        and model.vae is None
        and not model.transformer.training
    )
    make_pipe().save_pretrained(tmp_path / "pipe")
    pipe = dit_lens.load(tmp_path / "pipe")
    assert pipe.vae is not None and pipe.cfg.learned_sigma and pipe.cfg.null_class == 1000
    assert dit_lens.load(model.transformer).transformer is model.transformer


def test_loading_what_can_not_be_loaded(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="'digitz' is neither a bundled model nor a folder nor a hub id"
    ):
        dit_lens.load("digitz")
    with pytest.raises(FileNotFoundError, match="has neither model_index.json .*inside\\)\\.$"):
        dit_lens.load(tmp_path)
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be loaded: it is not a whole safetensors file"):
        dit_lens.load(folder)
    weights.write_bytes(whole)
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(
        ValueError, match="diffusion_pytorch_model.bin' is a pickle, which can run code when opened"
    ):
        dit_lens.load(folder)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(TypeError, match="UNet2DModel is not a Diffusion Transformer"):
        dit_lens.load(tmp_path / "unet")
    shutil.rmtree(folder / "scheduler")
    (folder / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(
        ValueError,
        match="does not name a diffusers class that fits: 'NoSuchModel'; expected a ModelMixin",
    ):
        dit_lens.load(folder)


def test_what_is_not_installed_is_named_with_what_installs_it(tmp_path, monkeypatch, capsys):
    """As diffusers is without transformers: in the place of its classes are others."""
    import diffusers
    from diffusers.utils import dummy_torch_and_transformers_objects as without

    family_named("PixArtTransformer2DModel").small_pipeline().save_pretrained(tmp_path / "p")
    monkeypatch.setattr(diffusers, "PixArtAlphaPipeline", without.PixArtAlphaPipeline)
    monkeypatch.setattr("dit_lens.model.saved.find_spec", {"torch": 1}.get)
    with pytest.raises(
        FileNotFoundError, match=r"needs transformers, not installed or too old; pip"
    ):
        dit_lens.load(tmp_path / "p")
    monkeypatch.setattr("dit_lens.commands.compare.find_spec", lambda _: None)
    family_named("SD3Transformer2DModel").small_pipeline().save_pretrained(tmp_path / "s")
    capsys.readouterr()
    words = [
        "compare",
        str(tmp_path / "s"),
        "--lora",
        "x.safetensors",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 2
    assert "An adapter needs peft, which is not installed; pip" in capsys.readouterr().err


def test_exchanged_bands_go_through_the_model_as_batch_says(tmp_path, monkeypatch):
    from dit_lens.commands.patch import find_causes

    seen: dict[str, object] = {}

    def stopped(*_, **given):
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["dit_lens.experiments.interchange"], "interchange", stopped)
    truth, size = gaussian(layers=(1,), n_layers=2, sample_size=4), (16, 8, 0, 0.1)
    model = dit_lens.HookedDiT(truth.transformer, scheduler=truth.scheduler)
    with pytest.raises(KeyboardInterrupt):
        find_causes(model, *size, tmp_path, how=["zero"], interchange="stream", batch=4)
    assert seen["batch"] == 4


@pytest.mark.parametrize("layers, players", [(1, 2), (3, 1)])
def test_shares_of_a_single_layer_are_refused_before_anything_runs(
    layers, players, folder, tmp_path, monkeypatch, capsys
):
    make_dit(layers=layers, channels=1, classes=4).save_pretrained(folder)
    monkeypatch.setattr(loop, "model_output", raising(AssertionError))
    asked = ["--shapley", str(players), "--batch", "32", "--out", str(tmp_path / "out")]
    assert main(["patch", str(folder), *asked]) == 2
    assert f"--shapley {players} of a model of {layers} layer" in capsys.readouterr().err


@pytest.mark.slow
def test_patch_with_all_that_can_be_asked_for(tmp_path, capsys):
    """Either of two layers suffices: no single one is named, the two are found together."""
    from dit_lens.groundtruth import redundant

    folder = redundant(layers=(0, 2), n_layers=3).save(tmp_path / "model")
    size = ["--pairs", "16", "--steps", "8", "--cut", "0.1", "--out", str(tmp_path / "out")]
    more = ["--how", "zero", "resample", "--direct", "--sets", "--shapley", "3", "--windows", "2"]
    assert main(["patch", str(folder), *size, *more, "--interchange", "stream"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "Necessity: No layer of 3, knocked out by itself, moves the gap of ",
        "No single layer takes away half of the gap.",
        "The smallest set found that takes 50% of the gap away has 2 layers, layers 0, 2",
        "Together they do more or less than by themselves: 0 and 2 (",
        "No cell (layer and window) of 6, knocked out by itself, moves the gap of ",
        "With the low band of one layer's stream from twin A, ",
    ):
        assert text in shown, text
    assert main(["report", str(tmp_path / "out")]) == 0
    assert " ".join(capsys.readouterr().out.split()) == shown


@pytest.mark.slow
def test_patch_end_to_end(tmp_path, capsys):
    """On a saved model with a known cause: its layer is named, and `gap --causes --couple` finds
    the same after the rest.
    """
    from dit_lens.groundtruth import gaussian

    folder = gaussian(4.0, 0.25, (1,), 3, sample_size=4).save(tmp_path / "model")
    out = tmp_path / "out"
    assert (
        main(
            [
                "patch",
                str(folder),
                "--pairs",
                "16",
                "--steps",
                "10",
                "--cut",
                "0.1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "Necessity: Knocked out one by one, 1 of 3 layers moves the gap" in shown
    assert (
        "Without layer 1 " in shown
        and "in the last of 3 layers lie 0 of the 1 that move it." in shown
        and "Named by zero and mean alike: 1." in shown
    )
    assert (out / "causes.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / ".pieces").exists()  # the command is done
    both = [
        "gap",
        str(folder),
        "--pairs",
        "16",
        "--steps",
        "10",
        "--cut",
        "0.1",
        "--out",
        str(out),
        "--causes",
        "--couple",
        "0",
        "1",
    ]
    assert main(both) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "Necessity: Knocked out one by one, 1 of 3" in shown
        and "The gap (steps between the bands' parting): it collapses" in shown
    )
    assert "no claim is made about depth" in shown
    files = {"gap.nc", "coupling_sweep.nc", "coupling_sweep.png", "knock_outs.nc", "patches.nc"}
    assert files <= {p.name for p in out.iterdir()}
    assert main(["report", str(out)]) == 0
    assert " ".join(capsys.readouterr().out.split()) == shown


@pytest.mark.slow
def test_map_and_plan_end_to_end(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--items", "8", "--steps", "4", "--labels", "1", "0"]
    assert main(["map", str(folder), *small, "--check", "2", "--batch", "8", "--out", "map"]) == 0
    shown = capsys.readouterr().out
    assert "cause_map.nc" in shown and (tmp_path / "map" / "cause_map.nc").exists()
    assert main(["report", "map"]) == 0
    assert main(["plan", str(folder), *small, "--budget", "0.7", "--out", "plan.json"]) == 0
    made = capsys.readouterr().out
    assert "of the multiply-accumulates" in made and "on samples that it was not made from" in made
    assert main(["plan", str(folder), "--check", "plan.json", "--items", "8", "--seed", "5"]) == 0
    assert "of the multiply-accumulates" in capsys.readouterr().out
    beside = ["--side-by-side", "plan.json", "--items", "8", "--out", "beside"]
    assert main(["plan", str(folder), *beside]) == 0
    shown = capsys.readouterr().out
    assert "even (FORA)" in shown and (tmp_path / "beside" / "side_by_side.png").exists()
    compared = ["--with", "plan.json", "--items", "12", "--out", "compared"]
    assert main(["compare", str(folder), *compared]) == 0
    assert "the unchanged model's error" in capsys.readouterr().out
    assert main(["report", "beside"]) == main(["report", "compared"]) == 0
    assert "even (FORA)" in capsys.readouterr().out
    assert main(["plan", "digits", "--check", "plan.json"]) == 2
    assert "The plan was made for another model" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{")
    assert main(["plan", str(folder), "--check", "plan.json"]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_says_what_it_leaves_out(folder, tmp_path, capsys):
    out = tmp_path / "out"
    small = ["gap", str(folder), "--pairs", "16", "--steps", "6", "--out", str(out), "--dry-run"]
    assert main(small) == 0
    shown = capsys.readouterr().out
    assert "what it costs on this device" in shown and "not counted" not in shown
    assert main([*small, "--null", "19", "--couple", "0", "1", "--bands", "eigen"]) == 0
    assert "not counted: --couple, --null, --bands\n" in capsys.readouterr().out
    assert not out.exists()


def test_the_cost_of_a_model_is_a_table(folder, capsys):
    assert main(["cost", str(folder), "--pairs", "16", "--steps", "6"]) == 0
    shown = capsys.readouterr().out
    assert "gap --one-pass" in shown and "192" in shown  # 2 x 16 images x 6 steps


# What people expect of a command line.


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dit-lens {dit_lens.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completions_know_the_subcommands(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert ended.value.code == 0
    assert "check-family" in script and ("--guidance" in script or "guidance" in script)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert EXAMPLES[name] and "Exit codes: 0 done" in shown
    for line in EXAMPLES[name]:
        assert f"  dit-lens {line}\n" in shown
        assert parser(COMMANDS)[0].parse_args(shlex.split(line)).command == name


@pytest.mark.parametrize(
    "argv, said",
    [
        (["gpa"], "did you mean 'gap'?"),
        (["probes", "LayerLens"], "did you mean 'probe'?"),
        (["gap", "--stpes", "4"], "unrecognized arguments: --stpes; did you mean '--steps'?"),
        (["map", "--kind", "holds"], "did you mean 'hold'?"),
    ],
)
def test_slips_are_told_what_was_meant(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_json_is_all_of_stdout(folder, capsys):
    assert main(["hooks", str(folder), "--filter", "resid_post", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [each["name"] for each in found["hook_points"]][0] == "blocks.0.hook_resid_post"
    assert "hook point" in shown.err
    assert main(["hooks", "nowhere", "--json"]) == 2 and capsys.readouterr().out == ""


def test_quiet_prints_nothing(folder, capsys):
    assert main(["hooks", str(folder), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["hooks", "nowhere", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("dit-lens: ")


def test_quiet_is_also_loading_a_pipeline(tmp_path, capsys):
    """diffusers and transformers show bars, and have them again afterwards."""
    make_pipe().save_pretrained(tmp_path / "pipe")
    short = ["--steps", "2", "--items", "1", "--out", str(tmp_path / "out.nc")]
    capsys.readouterr()
    assert main(["probe", "SpectralSplit", str(tmp_path / "pipe"), *short, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        assert main(["hooks", "digits", "--quiet"]) == 0
        assert not diffusers.utils.logging.is_progress_bar_enabled()
    finally:
        diffusers.utils.logging.enable_progress_bar()


def test_names_that_the_output_cannot_encode_are_printed_as_on_stderr(folder, monkeypatch):
    """As on Windows behind a pipe."""
    moved = folder.rename(folder.with_name("mod\u6a21"))
    monkeypatch.chdir(moved.parent)  # a long path would be wrapped
    said = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(said, "cp1252"))
        assert main(["hooks", moved.name, "--filter", "resid_post"]) == 0
        sys.stdout.detach()
    assert rb"mod\u6a21: 3 hook" in said.getvalue()


@pytest.mark.parametrize("name", ["SpectralSplit", "LayerLens", "TwinDivergence"])
def test_probes_run_with_default_settings(name, folder, tmp_path, monkeypatch, capsys):
    """But for the number of steps, which only takes time."""
    monkeypatch.chdir(tmp_path)
    command = ["probe", f"dit_lens.probes:{name}", str(folder), "--steps", "4", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"] == f"{name}.nc" and (tmp_path / f"{name}.nc").exists()
    assert found["result"]["data_vars"]


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_pictures_of_more_than_8_bits_are_refused(kind, tmp_path):
    """Pillow cuts them at 255, and nearly every value was white."""
    Image.fromarray(np.full((4, 4), 20000, kind)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(InvalidValue, match=r"a.png' has more than 8 bits a value \(mode '(I|F)"):
        read_images(tmp_path)


def test_grey_pictures_have_one_channel(tmp_path):
    """Also beside an alpha channel."""
    for mode in ("1", "L", "LA"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
    assert read_images(tmp_path)[0].shape == (3, 1, 4, 4)


def test_prompts_with_a_byte_order_mark(tmp_path):
    """As an editor of Windows writes them."""
    (tmp_path / "a.txt").write_bytes("a cat\na dog\n".encode("utf-8-sig"))
    args = argparse.Namespace(prompts=tmp_path / "a.txt", labels=None)
    assert labels_of(args) == ["a cat", "a dog"]


def test_a_prompt_is_a_line_and_no_part_of_one(tmp_path):
    """Texts from the web hold separators at which Python's `splitlines` cuts."""
    odd = "a cat\u2028on a\x0b mat\x85 \x1c"
    (tmp_path / "a.txt").write_bytes(f"{odd}\r\na dog\ra fox\n".encode())
    args = argparse.Namespace(prompts=tmp_path / "a.txt", labels=None)
    assert labels_of(args) == [odd.strip(), "a dog", "a fox"]


def test_a_plan_by_hand_may_say_only_its_sampler(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = dit_lens.load(folder)
    times = dit_lens.sample(model, [1], steps=4).timesteps.tolist()
    plan = Plan.of(model, times, [(0, "attn", 2)], about={"sampler": "ddim"})
    plan.save("plan.json")
    assert main(["compare", str(folder), "--with", "plan.json", "--items", "12"]) == 0
    assert "moved by" in capsys.readouterr().out


def test_a_log_has_lines_where_no_bar_can_move(capsys):
    with progress_bar(every=0) as bar:
        task = bar.add_task("twins", total=None)
        bar.update(task, completed=3)
        bar.update(task, completed=3, total=4)
    with progress_bar() as bar:
        bar.update(bar.add_task("map", total=2), completed=1)
    lines = capsys.readouterr().out.split("\n")
    assert lines[:2] == ["twins: 3, 0:00:00", "twins: 75 %, 0:00:00, 0:00:00 left"]
    assert not any("map" in line for line in lines)  # not yet a minute
