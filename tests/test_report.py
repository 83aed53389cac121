"""Pictures leave the caller's matplotlib alone, and stored results are shown again as they were."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from dit_lens import HookedDiT
from dit_lens.errors import InvalidValue, MissingFile
from dit_lens.experiments import (
    couplings,
    cumulative,
    interchange,
    knock_outs,
    measure_gap,
    shapley,
    smallest_set,
)
from dit_lens.groundtruth import gaussian
from dit_lens.pictures.result import Pictures
from dit_lens.probes import TwinPatching
from dit_lens.report import cause_details
from dit_lens.report import coupling_sweep as coupling_report
from dit_lens.report import gap as gap_report
from dit_lens.report import knock_outs as cause_report
from dit_lens.report.page import KINDS
from dit_lens.report.page import write as write_page
from dit_lens.report.stored import FILES, load_result, read, show
from dit_lens.report.style import picture
from dit_lens.storage import made_by, made_of, save_dataset

torch.set_num_threads(1)
PICTURES = (
    "layer_profile.png",
    "frequencies.png",
    "spectrum.png",
    "twins.png",
    "lens.png",
    "coupling_sweep.png",
    "causes.png",
)


@pytest.fixture(scope="module")
def results():
    """A gap, a coupling sweep, knock-outs and patches of one small model."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    short = {"pairs": 16, "steps": 8, "cut": 0.1, "resamples": 200}
    return (
        measure_gap(model, **short),
        couplings(model, [0, 1], **short),
        cause_report.side_by_side(
            [knock_outs(model, how=how, direct=True, **short) for how in ("zero", "mean")]
        ),
        TwinPatching().run(model, pairs=8, windows=2, release=2, steps=8),
    )


def write_all(results, folder):
    gap, coupled, knocked, patched = results
    gap_report.write(gap, folder)
    coupling_report.write(coupled, folder)
    cause_report.write(knocked, patched, folder, gap_report.onsets(gap))


def test_drawing_leaves_the_callers_matplotlib_alone(results, tmp_path):
    backend = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        with matplotlib.rc_context({"font.size": 17.0, "axes.spines.top": True}):
            mine = plt.figure()
            before = dict(matplotlib.rcParams)
            write_all(results, tmp_path)
            assert dict(matplotlib.rcParams) == before
            assert matplotlib.get_backend() == "svg"
            assert plt.get_fignums() == [mine.number] and plt.gcf() is mine
            plt.close(mine)
    finally:
        matplotlib.use(backend)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG", name


def test_no_picture_of_an_earlier_result_stays_beside_one_without_it(results, tmp_path):
    gap_report.write(results[0], tmp_path)
    gap_report.write(results[0].drop_vars("end"), tmp_path)
    assert not (tmp_path / "twins.png").exists() and (tmp_path / "lens.png").exists()
    (tmp_path / "twins.png").write_bytes(b"the user's")  # who only looks takes nothing away
    show(tmp_path / "gap.nc")
    assert (tmp_path / "twins.png").exists()


def test_a_folder_is_loaded_where_it_holds_one_result(results, tmp_path):
    gap_report.write(results[0], tmp_path)
    assert load_result(tmp_path).attrs["headline"] == results[0].attrs["headline"]
    coupling_report.write(results[1], tmp_path)
    with pytest.raises(InvalidValue, match=r"holds 2 results; expected one of .*gap.nc', '.*sweep"):
        load_result(tmp_path)


def test_the_report_draws_what_the_result_draws(results, tmp_path, monkeypatch):
    drawn = []
    for name in ("agreement", "commitment", "spectrum", "cut", "profile"):
        own = getattr(Pictures, name)

        def noted(self, *args, name=name, own=own, **kwargs):
            drawn.append(name)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(Pictures, name, noted)
    gap_report.write(results[0], tmp_path)
    assert drawn == ["profile"] * 4 + ["agreement", "commitment", "cut", "spectrum"]
    drawn.clear()
    gap_report.draw_profile(results[0].isel(release=slice(0)), tmp_path / "one_pass.png")
    assert drawn == ["profile"] * 3  # none of clones


def test_pictures_do_not_depend_on_the_callers_style(tmp_path):
    """And a failure while drawing restores it too, and writes nothing."""
    for name, size in (("a.png", 9.0), ("b.png", 30.0)):
        with (
            matplotlib.rc_context({"font.size": size}),
            picture(tmp_path / name, (2, 2)) as (_, ax),
        ):
            ax.set_title("title")
    a, b = (plt.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)
    before = matplotlib.rcParams["font.size"]
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "c.png", (2, 2)):
        _ = 1 / 0
    assert matplotlib.rcParams["font.size"] == before and not (tmp_path / "c.png").exists()


def test_stored_results_are_shown_again(results, tmp_path, capsys):
    write_all(results, tmp_path)
    shown = capsys.readouterr().out
    assert "The gap of twins coupled by g (mix form, eps 0.1)" in shown and "Necessity: " in shown
    for name in PICTURES:
        (tmp_path / name).unlink()
    show(tmp_path)
    assert capsys.readouterr().out == shown
    assert {p.name for p in tmp_path.glob("*.png")} == set(PICTURES)
    for file, text in (
        ("gap.nc", "commitment of the finished image"),
        ("coupling_sweep.nc", "The gap of twins coupled by g"),
        ("knock_outs.nc", "Knocked out one by one"),
        ("patches.nc", "Knocked out one by one"),
    ):
        show(tmp_path / file)
        assert text in capsys.readouterr().out
        assert read(tmp_path / file)[0] == file


@pytest.fixture(scope="module")
def details():
    """What more `dit-lens patch` can be asked for, of one small model, by file."""
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=3, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    short = {"pairs": 16, "steps": 8, "cut": 0.1}
    quick = short | {"resamples": 100}
    return {
        "cumulative.nc": cumulative(model, [1, 3], **quick),
        "smallest_set.nc": smallest_set(model, **quick),
        "shapley.nc": shapley(model, [0, 1], **quick),
        "windows.nc": knock_outs(model, [0, 1], windows=2, **quick),
        "interchange.nc": interchange(model, [1], windows=2, doses=(0.5, 1), **short),
    }


def test_every_detail_of_the_causes_is_shown_again(details, tmp_path, capsys):
    assert set(details) == set(cause_details.SHOWN)
    for kind, result in details.items():
        cause_details.write(kind, result, tmp_path)
    shown = capsys.readouterr().out
    pictures = set(tmp_path.glob("*.png"))
    assert {p.name for p in pictures} == {k.replace("nc", "png") for k in cause_details.PICTURES}
    for path in pictures:
        path.unlink()
    show(tmp_path)
    assert capsys.readouterr().out == shown and set(tmp_path.glob("*.png")) == pictures
    for result in details.values():
        assert result.attrs["sentence"] in shown
    page = write_page([tmp_path], tmp_path / "page.html")
    assert all(KINDS[kind] in page.read_text(encoding="utf-8") for kind in details)


def test_a_detail_without_its_figures_is_refused(details, tmp_path):
    for kind, result in details.items():
        name = next(iter(FILES[kind]))
        save_dataset(tmp_path / kind, kind, result.drop_vars(name))
        with pytest.raises(InvalidValue, match=f"{kind}' has no "):
            read(tmp_path / kind)


def test_brackets_are_printed_as_they_stand(results, tmp_path, capsys):
    """Some would be markup to rich, which drops it without a word."""
    gap = results[0].assign_attrs(onset_lens="boot has shape (9, 5); expected [resample, 5]")
    gap.attrs["title"] = "[bold] folder: 2 layers"
    gap_report.write(gap, tmp_path)
    shown = capsys.readouterr().out
    assert "expected [resample, 5]" in shown and "[bold] folder: 2 layers" in shown


def test_what_cannot_be_shown(results, tmp_path):
    with pytest.raises(MissingFile, match="There are no results at .*; expected the folder that"):
        show(tmp_path)
    with pytest.raises(MissingFile, match="There are no results at "):
        show(tmp_path / "gap.nc")
    (tmp_path / "gap.nc").write_text("no")
    with pytest.raises(
        InvalidValue, match=r"gap.nc' has no seal of this version of dit_lens.*; expected one of"
    ):
        show(tmp_path)
    other = tmp_path / "other.nc"
    xr.Dataset({"energy": ("step", [1.0])}).to_netcdf(other, engine="scipy")
    with pytest.raises(InvalidValue, match="other.nc' has no seal of this version of dit_lens"):
        show(other)
    save_dataset(other, "probe SpectralSplit", xr.Dataset({"energy": ("step", [1.0])}))
    with pytest.raises(InvalidValue, match="is of the kind 'probe SpectralSplit'; expected one"):
        show(other)
    cause_report.store_knock_outs(results[2], tmp_path)
    with pytest.raises(MissingFile, match="There is no file '.*patches.nc'"):
        show(tmp_path / "knock_outs.nc")


def test_causes_of_several_runs_are_not_shown_as_one(results, tmp_path, capsys):
    """A second `patch` into a folder that was interrupted has replaced one of two files; and what
    a profile says of another model is not held against causes.
    """
    gap, _, knocked, patched = results
    known = gap.assign(null_profile=("null", [0.0])).assign_attrs(
        {f"onset_layer_{view}": 1 for view in gap_report.VIEWS}
    )

    def write(model, seed, *stores):
        with made_by(f"dit-lens patch {model} --seed {seed}"):
            made_of(model, torch.device("cpu"))
            for store in stores:
                store()

    def both():
        cause_report.store_knock_outs(knocked, tmp_path)
        cause_report.store_patches(patched, tmp_path)

    write("first", 0, both)
    show(tmp_path / "knock_outs.nc")
    write("first", 1, lambda: cause_report.store_knock_outs(knocked, tmp_path))
    several = "patches.nc' are of different experiments: one is by 'dit-lens patch first --seed 1',"
    for shown in (show, lambda at: write_page([at], tmp_path / "page.html")):
        with pytest.raises(InvalidValue, match=f"^'{tmp_path}/knock_outs.nc' and .*{several}"):
            shown(tmp_path)
    write("first", 0, both)
    for model, compared in (("first", True), ("second", False)):
        write(model, 0, lambda: save_dataset(tmp_path / "gap.nc", "gap.nc", known))
        capsys.readouterr()
        show(tmp_path / "knock_outs.nc")
        assert ("Profile and cause " in capsys.readouterr().out) == compared
