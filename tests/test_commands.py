"""The commands and loading, as a user meets them."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

import dit_lens
from dit_lens.commands.main import main
from dit_lens.experiments import measure_gap
from dit_lens.report.stored import read


@pytest.fixture
def folder(tmp_path):
    make_dit(channels=1, classes=4).save_pretrained(tmp_path / "model")
    DDIMScheduler(1000, clip_sample=False).save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


def test_importing_is_light():
    heavy = {"diffusers", "xarray", "scipy", "matplotlib", "rich", "nnsight", "transformer_lens"}
    code = f"import sys, dit_lens; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_core_module_imports_a_probe():
    import pathlib

    for name in dit_lens.__all__:
        assert getattr(dit_lens, name) is not None
    for file in pathlib.Path(dit_lens.__file__).parent.glob("*.py"):
        assert (
            "from .probes" not in file.read_text()
            and "from dit_lens.probes" not in file.read_text()
        ), file


def test_hooks_reads_no_weights(folder, capsys):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["hooks", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "88 hook points" in out and "[b, 16, 2, 8]" in out and "blocks.{i}.attn.hook_pattern" in out
    )
    assert main(["hooks", str(folder), "--filter", "attn.*"]) == 0
    assert "27 hook points" in capsys.readouterr().out


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
            ["gap", "--bands", "wavelet"],
            "bands='wavelet' is no partition of modes; expected 'radial'",
        ),
        (["report", "/nowhere"], "There are no results at '/nowhere'"),
        (
            ["probe", "SpectralSplitt"],
            "No probe is called 'SpectralSplitt'; installed: 'SpectralSplit'",
        ),
    ],
)
def test_mistakes_are_one_line(argv, text, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dit-lens: {text}") and err.count("\n") == 1


def test_gap_end_to_end(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["gap", str(folder), "--pairs", "16", "--steps", "8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    # layers, bands
    assert "stream low" in shown and "│     2 │" in shown and shown.count("│") == 3 * 8 + 8 * 4
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
        match="There are 8 pairs; intervals over pairs with class means removed need 16 or more",
    ):
        measure_gap(dit_lens.load(folder), pairs=8)
    (tmp_path / "gap.nc").write_text("no")
    with pytest.raises(ValueError, match="is not a result of `dit-lens gap`"):
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
    with pytest.raises(FileNotFoundError, match="has neither model_index.json"):
        dit_lens.load(tmp_path)
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be loaded as DiTTransformer2DModel"):
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
    with pytest.raises(ValueError, match="does not name a diffusers class"):
        dit_lens.load(folder)


def test_patch_end_to_end(tmp_path, capsys):
    """On a saved E6 model: the causing layer is named, and `gap --causes --couple` runs the same
    beside the rest.
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
    assert "Necessity: Knocked out one by one, 1 of 3 layers move the gap" in shown
    assert (
        "Without layer 1 at most half of the gap is left; of the layers that move it, 1 of 1 are "
        "among the last five." in shown
    )
    assert (out / "causes.png").read_bytes()[:4] == b"\x89PNG" and (
        out / "sweep.safetensors"
    ).exists()
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
    assert "Profile and cause agree (twins differ in the stream: layer 1, a cause" in shown
    files = {"gap.nc", "coupling_sweep.nc", "coupling_sweep.png", "knock_outs.nc", "patches.nc"}
    assert files <= {p.name for p in out.iterdir()}
    assert main(["report", str(out)]) == 0
    assert " ".join(capsys.readouterr().out.split()) == shown
