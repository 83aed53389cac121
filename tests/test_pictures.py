"""Pictures as objects: what is drawn is what was measured, in colours that stay apart."""

import base64
import io
import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from conftest import make_pipe
from matplotlib.colors import to_rgb

import dit_lens
from dit_lens.errors import InvalidType, InvalidValue
from dit_lens.pictures.attention import AttentionMap
from dit_lens.pictures.notebook import strip
from dit_lens.pictures.result import NEEDS, Result, onset
from dit_lens.pictures.style import HIGH, INK, LOW, families
from dit_lens.storage import save_dataset


def made(**more):
    """Results with known figures under all names that pictures need."""
    layers, n = np.arange(-1, 4), 5
    rng = np.random.default_rng(0)

    def ends(value):
        return np.stack([np.asarray(value) - 1, np.asarray(value) + 1], -1)

    gap, tau = rng.normal(size=(1, n)), rng.normal(size=(2, 3))
    base = {
        "layer_gap": (("view", "layer"), gap),
        "layer_gap_interval": (("view", "layer", "bound"), ends(gap)),
        "log_ratio": (("energy", "layer"), gap),
        "log_ratio_interval": (("energy", "layer", "bound"), ends(gap)),
        "band_commitment": (("estimator", "band"), tau),
        "band_commitment_interval": (("estimator", "band", "bound"), ends(tau)),
        "agreement_one_pass": (("step", "band"), rng.random((6, 3))),
        "spectrum_commitment": ("frequency", [1.0, 2.0]),
        "spectrum_commitment_interval": (("frequency", "bound"), ends([1.0, 2.0])),
        "cut_gap": ("cut", [1.0, 2.0]),
        "cut_gap_interval": (("cut", "bound"), ends([1.0, 2.0])),
    }
    coords = {
        "layer": layers, "view": ["lens"], "energy": ["ratio"], "band": ["a", "b", "c"],
        "estimator": ["one_pass", "clones"], "step": range(6), "frequency": [0.1, 0.2],
        "cut": [0.1, 0.2],
    }  # fmt: skip
    return Result(base, coords=coords, attrs=more)


def effects(*axes):
    shape = {"how": 2, "layer": 4, "window": 3, "band": 2, "end": 2, "depth": 3}
    value = np.random.default_rng(1).normal(size=[shape[a] for a in axes])
    ends = np.stack([value - 0.5, value + 0.5], -1)
    labels = {"how": ["zero", "mean"], "layer": range(4), "window": ["0-1", "2-3", "4-5"]}
    labels |= {"band": ["low", "high"], "end": ["first", "last"], "depth": [1, 2, 4]}
    return Result(
        {"effect": (axes, value), "effect_interval": ((*axes, "bound"), ends)},
        coords={a: list(labels[a]) for a in axes},
        attrs={"gap": 2.0},
    )


def coupled():
    gap = np.random.default_rng(2).normal(size=(3, 2))
    return Result(
        {
            "gap": (("g", "sense"), gap),
            "gap_interval": (("g", "sense", "bound"), np.stack([gap - 1, gap + 1], -1)),
            "parting": ("g", [1.0, 2.0, 3.0]),
        },
        coords={"g": [0.0, 0.5, 1.0], "sense": ["agreement", "size"]},
    )


def images():
    drawn = np.random.default_rng(3).random((3, 2, 5, 3, 4, 6))
    return Result(
        {
            "end": (("release", "twin", "shown", "channel", "row", "column"), drawn),
            "lens_image": (("shown_layer", "shown_step", "channel", "row", "column"), drawn[0]),
        },
        coords={"release": [2, 5, 9], "shown_layer": [-1, 3], "shown_step": [0, 1, 2, 3, 4]},
    )


def changed():
    value = np.random.default_rng(4).random((3, 2)) + 1.5
    tau = np.random.default_rng(5).random((2, 2))
    names = "effect", "power", "error"
    return Result(
        {name: ("band", value[i]) for i, name in enumerate(names)}
        | {
            f"{n}_interval": (("band", "b"), value[i, :, None] + [-1, 1])
            for i, n in enumerate(names)
        }
        | {"commitment": (("model", "band"), tau), "later": ("band", tau[1] - tau[0])}
        | {"commitment_interval": (("model", "band", "b"), tau[..., None] + [-1, 1])},
        coords={"band": ["low", "high"], "model": ["plain", "changed"]},
    )


def of_attributes():
    rng, names = np.random.default_rng(5), ["hair_colour", "hat"]
    of = {"commitment": "attribute", "readable": "attribute"}
    of |= {"split_commitment": "split", "band_commitment": "band"}
    found = {name: ((axis, "quantity"), rng.random((2, 2)) * 8) for name, axis in of.items()}
    ends = {
        f"{name}_interval": ((*axes, "bound"), value[..., None] + [-1, 1])
        for name, (axes, value) in found.items()
    }
    coords = {"attribute": names, "split": ["low", "high"], "band": ["0-0.1", "0.1-0.5"]}
    coords |= {"quantity": ["log_snr", "step"]}
    return Result(found | ends, coords=coords, attrs={"steps": 10})


RESULTS = {
    **dict.fromkeys(("profile", "commitment", "agreement", "spectrum", "cut"), made),
    "knob": coupled,
    "causes": lambda: effects("how", "layer"),
    "sweep": lambda: effects("end", "depth"),
    "map": lambda: effects("layer", "window", "band"),
    **dict.fromkeys(("change", "decided"), changed),
    "attributes": of_attributes,
    **dict.fromkeys(("twins", "lens"), images),
}


def test_every_picture_is_tried():
    assert RESULTS.keys() == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_pictures_give_axes_and_take_them(name, tmp_path):
    result = RESULTS[name]()
    assert name in result.plot.names and name in dir(result.plot)
    mine = plt.subplots()[1]
    assert getattr(result.plot, name)(ax=mine) is mine
    ax = getattr(result.plot, name)()
    assert ax is not mine and ax.get_xlabel() and ax.get_ylabel()
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        ax.figure.savefig(tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)
    plt.close("all")


@pytest.mark.parametrize("name", ["profile", "causes", "sweep", "map"])
def test_layers_have_whole_ticks(name):
    ax = getattr(RESULTS[name]().plot, name)()
    ax.figure.canvas.draw()
    ticks = ax.get_xticks()
    assert np.array_equal(ticks, ticks.round())
    plt.close("all")


def test_one_layer_has_one_tick():
    ax = effects("layer", "window").isel(layer=[2]).plot.map()
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [2]
    plt.close("all")


def test_causes_of_one_way_and_of_couplings():
    result = effects("layer").assign_attrs(how="zero", done="coupled")
    ax = result.plot.causes()
    assert result.plot.names == ["causes"] and ax.get_xlabel() == "layer coupled"
    assert effects("layer", "window").plot.names == ["map"]
    plt.close("all")


def test_a_map_has_each_layer_in_its_place_and_says_what_it_shows():
    result = effects("layer", "window", "band").isel(layer=[0, 3])
    ax = result.plot.map()
    drawn = ax.images[0].get_array()
    assert ax.get_title() == "low" and drawn.shape == (3, 4)
    assert drawn.mask[:, [1, 2]].all() and (drawn[:, 3] == result.effect[1, :, 0]).all()
    of_causes = effects("layer", "window", "band").isel(band=0)
    del of_causes.attrs["gap"]
    knocked_out = effects("layer", "window")
    for each, unit in ((of_causes, "effect, 1 a stranger's"), (knocked_out, "change of the gap")):
        assert each.plot.map().images[0].colorbar.ax.get_ylabel().startswith(unit)
    plt.close("all")


def test_many_windows_are_not_all_named():
    effect = np.zeros((2, 50))
    names = {"layer": [0, 1], "window": [str(step) for step in range(50)]}
    ax = Result({"effect": (("layer", "window"), effect)}, coords=names).plot.map()
    named = [
        (place, label.get_text())
        for place, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    ]
    assert 5 < len(named) <= 12 and all(str(place) == name for place, name in named)
    plt.close("all")


def test_long_words_do_not_lie_over_each_other():
    names = {"word": ["photorealistic", "Donaudampfschiff"]}
    maps = AttentionMap(np.ones((2, 4, 4)), dims=("word", "row", "column"), coords=names)
    ax = maps.plot.words()
    ax.figure.canvas.draw()
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {30.0}
    plt.close("all")


@pytest.mark.filterwarnings("error:Glyph")
def test_words_that_the_usual_font_lacks():
    """As of Chinese prompts. The letter here is in a font that comes with matplotlib."""
    for word, found in (("\N{CIRCLED LATIN CAPITAL LETTER A}", True), ("fox", False)):
        maps = AttentionMap(
            np.ones((1, 4, 4)), dims=("word", "row", "column"), coords={"word": [word]}
        )
        ax = maps.plot.words()
        ax.figure.canvas.draw()
        usual = plt.rcParams["font.family"]
        (label,) = ax.get_xticklabels()
        assert label.get_fontfamily()[: len(usual)] == usual
        assert (len(label.get_fontfamily()) > len(usual)) == found
    assert families([chr(0x10FFFD)]) == usual
    plt.close("all")


def test_attributes_stand_in_the_order_in_which_they_are_decided():
    result = of_attributes()
    result["commitment"][:, 1] = [6.0, 2.0]
    ax = result.plot.attributes()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["hat", "hair colour", "low", "high", "0-0.1", "0.1-0.5"]
    assert ax.lines[0].get_xdata().tolist() == [2.0, 6.0] and ax.get_xlim() == (0, 10)
    plt.close("all")


def test_no_change_is_drawn_in_words():
    """A logarithm of 0 has no place; a band that is not decided has no point."""
    result = changed()
    result["effect"][:] = result["effect_interval"][:] = 0
    result["commitment"][:, 0] = result["commitment_interval"][:, 0] = np.nan
    ax = result.plot.change()
    assert [each.get_text() for each in ax.texts] == ["low: 0", "high: 0"]
    ax = result.plot.decided()
    assert [each.get_text() for each in ax.get_xticklabels()] == ["low: none", "high"]
    plt.close("all")


@pytest.mark.parametrize(
    "name", ["commitment", "spectrum", "cut", "knob", "causes", "sweep", "decided"]
)
def test_points_have_their_intervals(name):
    result = RESULTS[name]()
    ax = getattr(result.plot, name)()
    bars = [bar for each in ax.containers for bar in each.lines[2][0].get_segments()]
    lengths = {round(float(bar[1, 1] - bar[0, 1]), 6) for bar in bars}
    assert bars and lengths == {1.0 if name in ("causes", "sweep") else 2.0}
    plt.close("all")


def test_signed_maps_are_centred_on_zero():
    image = effects("layer", "window", "band").plot.map(band="high").images[0]
    low, high = image.get_clim()
    assert low == -high and high >= np.abs(image.get_array()).max()
    plt.close("all")


def test_an_onset_is_drawn_with_its_interval():
    result = made(onset_layer_lens=2, onset_interval_lens=np.array([1, 3]))
    ax = result.plot.profile("lens")
    (span,) = [patch for patch in ax.patches if patch.get_alpha() == 0.2]
    ends = span.get_extents().transformed(ax.transData.inverted()).intervalx
    assert np.allclose(ends, [1, 3])
    assert [text.get_text() for text in ax.texts] == ["onset 2 [1, 3]"]
    bare = plt.subplots()[1]
    onset(bare, {"onset_layer_lens": -1}, "lens")
    assert not bare.patches and not bare.texts
    plt.close("all")


def test_a_picture_that_a_result_has_not_is_refused():
    with pytest.raises(InvalidValue, match="This result has no picture 'causes'; expected one"):
        made().plot.causes()
    with pytest.raises(InvalidValue, match="view='lense' can't be used; .*'lens'"):
        made().plot.profile("lense")
    with pytest.raises(InvalidValue, match="'size' is no axis of the map"):
        effects("layer", "window", "band").plot.map(size=1)


def test_a_slip_names_the_pictures_there_are():
    said = "expected one of: profile, commitment, agreement, spectrum, cut, or xarray's own"
    with pytest.raises(AttributeError, match=rf"no picture 'profil'; {said} \(nearest: profile\)"):
        made().plot.profil()
    assert not hasattr(made().plot, "nothing_like_it")
    with pytest.raises(InvalidValue, match=rf"draws nothing by itself; {said}"):
        made().plot()
    axes = plt.subplots(ncols=2)[1]
    with pytest.raises(InvalidType, match="expected matplotlib axes .*such as axes.0."):
        made().plot.agreement(ax=axes)
    plt.close("all")


def test_without_clones_nothing_is_said_of_them():
    result = made()
    result["band_commitment"][1] = np.nan
    result["agreement_clones"] = ("release", "band"), np.ones((0, 3))
    for name, labels in (("agreement", ["a", "b", "c", "one pass"]), ("commitment", ["one pass"])):
        ax = getattr(result.plot, name)()
        assert ax.get_legend_handles_labels()[1] == labels
    (bars,) = ax.containers
    assert np.array_equal(bars.lines[0].get_xdata(), [0, 1, 2])  # at their ticks
    result["layer_gap"][:] = np.nan
    ax = result.assign_coords(view=["stream"]).plot.profile("stream")
    assert [text.get_text() for text in ax.texts] == ["not measured: clones were not run"]
    plt.close("all")


def test_every_point_is_within_the_picture():
    result = made()
    result["agreement_clones"] = ("release", "band"), np.full((6, 3), -0.4)
    ax = result.assign_coords(release=range(6)).plot.agreement()
    low, high = ax.get_ylim()
    assert low < -0.4 and high > float(result.agreement_one_pass.max())
    plt.close("all")


def test_a_result_stays_a_dataset(tmp_path):
    result = made(note="kept")
    assert isinstance(result, xr.Dataset) and result.attrs["note"] == "kept"
    assert isinstance(result.isel(layer=[0, 1]).plot.profile(), plt.Axes)
    plain = xr.Dataset(result.data_vars, result.coords, result.attrs)
    assert Result.of(plain).equals(result) and result.plot.scatter
    with pytest.raises(InvalidValue):
        dit_lens.load_result(save_dataset(tmp_path / "a.nc", "gap.nc", result))
    plt.close("all")


# Colours, as they are seen (Machado, Oliveira and Fernandes 2009, table 1, severity 1).

VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(colour, seen):
    """CIE Lab of an sRGB colour, as somebody sees it."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(seen) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.asarray(to_xyz) @ linear / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("pair", [(LOW, HIGH), (LOW, INK), (HIGH, INK)])
def test_colours_stay_apart_for_every_eye_and_in_print(pair):
    for name, seen in VISION.items():
        one, other = (lab(colour, seen) for colour in pair)
        assert np.linalg.norm(one - other) > 20, name
    grey = [lab(colour, VISION["normal"])[0] for colour in pair]
    assert abs(grey[0] - grey[1]) > 15


def shown_images(html):
    return [
        plt.imread(io.BytesIO(base64.b64decode(found)))[..., :3]
        for found in re.findall(r"data:image/png;base64,([^\"]+)", html)
    ]


def test_notebooks_show_images():
    model = dit_lens.load("digits")
    run = dit_lens.sample(model, [3] * 10, steps=2)
    html = run._repr_html_()
    assert ">Run(10 images" in html and "and 2 more" in html
    images = shown_images(html)
    assert len(images) == 8
    assert np.allclose(images[1][..., 0], run.images[1, 0], atol=1 / 255)
    twins = dit_lens.twins(model, pairs=2, steps=3, release=1)
    pair = shown_images(twins._repr_html_())[1][..., 0]
    assert np.allclose(pair[:, :16], twins.a.images[1, 0], atol=1 / 255)
    assert np.allclose(pair[:, -16:], twins.b.images[1, 0], atol=1 / 255)
    html = model._repr_html_()
    assert "<td>blocks.{i}.hook_resid_post</td><td>[batch, token, d_model]</td>" in html


def test_notebooks_decode_nothing_by_themselves():
    run = dit_lens.sample(make_pipe(), [3], steps=2)
    assert "<img" not in run._repr_html_() and "images" not in vars(run)
    assert run.images.shape[1] == 3 and "<img" in run._repr_html_()


def test_notebooks_show_sentences_and_no_html_of_others():
    result = Result({"x": ("n", [1.0])}, attrs={"headline": "low <b>first</b>", "other": "no"})
    html = result._repr_html_()
    assert ">low &lt;b&gt;first&lt;/b&gt;</pre>" in html
    assert "xarray" in html
    assert not Result({"x": ("n", [1.0])})._repr_html_().startswith("<pre")  # nothing to say
    for prompt in ("word " * 99, "字" * 99):  # some languages have no spaces
        html = strip([np.ones((3, 4, 4))], [prompt])
        assert f"<figcaption>{prompt[:37]}...<" in html and f'alt="{prompt}"' in html
    video = np.zeros((3, 5, 4, 4))
    video[:, 2] = 1  # the middle frame
    [frame] = shown_images(strip([video], ["<i>"]))
    assert frame.min() == 1 and "&lt;i&gt;" in strip([video], ["<i>"])
