"""`dit-lens report FOLDER... --html`: one page that needs nothing else, and shows all there is."""

import builtins
import html
import json
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from dit_lens import HookedDiT
from dit_lens.commands import main
from dit_lens.experiments import (
    attributes,
    cause_map,
    couplings,
    knock_outs,
    measure_gap,
)
from dit_lens.groundtruth import gaussian
from dit_lens.probes import TwinPatching
from dit_lens.report import knock_outs as cause_report
from dit_lens.report import stored
from dit_lens.report.figures import FIGURES
from dit_lens.report.page import KINDS, Shown
from dit_lens.storage import made_by, made_with, save_dataset

torch.set_num_threads(1)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def read_light(images):
    """An attribute of any images: whether the upper half is lighter."""
    upper, lower = images.chunk(2, dim=-2)
    return {"lighter_above": (upper.mean((1, 2, 3)) > lower.mean((1, 2, 3))).long()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small results of every kind with figures, and of one without."""
    place = tmp_path_factory.mktemp("results")
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    short = {"pairs": 16, "steps": 8, "cut": 0.1, "resamples": 100}
    made = {
        "gap.nc": measure_gap(model, **short),
        "attributes.nc": attributes(model, read_light, **short),
        "coupling_sweep.nc": couplings(model, [0, 1], **short),
        "knock_outs.nc": cause_report.side_by_side(
            [knock_outs(model, how=how, **short) for how in ("zero", "mean")]
        ),
        "patches.nc": TwinPatching().run(model, pairs=8, windows=2, release=2, steps=8),
        "windows.nc": knock_outs(model, [0, 1], windows=2, **short),
        "cause_map.nc": cause_map(
            model, items=8, steps=3, cut=0.1, projections=1, check=0, resamples=100
        ),
    }
    for kind, result in made.items():
        with made_by("dit-lens gap 'a model'") if kind == "patches.nc" else nullcontext():
            save_dataset(place / kind, kind, result)
    return place


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "a" / "page.html"
    before = sorted(folder.iterdir())
    assert main(["report", str(folder), "--html", str(path)]) == 0
    assert sorted(folder.iterdir()) == before  # nothing is written beside the results
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What a page holds: elements with their attributes, texts outside of scripts, scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.scripts, self.styles, self.inside = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        {"script": self.scripts, "style": self.styles}.get(self.inside, self.texts).append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def outside(page):
    """Addresses that a page would fetch or lead to."""
    read = Reader(page)
    found = [
        value
        for _, attrs in read.elements
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "style")
        and re.search(r"https?:|^//|url\(", value or "")
    ]
    styles = "".join(read.styles)
    return found + re.findall(r"@import[^;]*|url\([^)]*\)", styles)


def test_a_page_needs_nothing_else(page):
    assert outside(page) == []
    assert outside('<img src="https://a.b/c.png"><style>@import "x"; a { b: url(c) }</style>') == [
        "https://a.b/c.png",
        '@import "x"',
        "url(c)",
    ]
    policy = next(a["content"] for _, a in Reader(page).elements if "http-equiv" in a)
    assert "default-src 'none'" in policy  # the browser sees to it, too
    assert page.count("plotly.js v") == 1


def test_every_sentence_and_setting_is_there(folder, page):
    text = Reader(page).text
    for kind, result in stored.results_at(folder).items():
        assert KINDS[kind] in text
        one = Shown(kind, folder / kind, result, "", [])
        assert one.sentences, kind
        for line in one.sentences:
            assert line in text, (kind, line)
        for value in one.settings.values():
            assert value in text
        assert html.escape(one.command) in page.replace("&#39;", "&#x27;")
    assert "Necessity: " in text and "commitment of the finished image" in text  # tables, too


def test_every_kind_has_a_title():
    assert set(KINDS) == set(stored.FILES) >= set(FIGURES)


def test_the_command_is_the_one_that_was_given(page, folder, tmp_path, capsys):
    words = ["probe", "LayerLens", *"--items 2 --steps 3 --out".split(), str(tmp_path / "a b.nc")]
    assert main(words) == 0
    made = made_with(tmp_path / "a b.nc")
    assert made["command"] == shlex.join(["dit-lens", *words])
    assert made["device"].startswith("cpu (") and made["date"][:2] == "20"
    assert "command" not in made_with(folder / "gap.nc")  # made in Python
    assert "dit-lens gap &#39;a model&#39;" in page and page.count("Copy command") == 1


def test_a_gap_in_one_pass_and_one_with_null_models(folder):
    gap = stored.read(folder / "gap.nc")[1]
    one_pass = Shown("gap.nc", folder / "gap.nc", gap.isel(release=slice(0)), "", [])
    assert len(one_pass.figures) == 9
    profiles = ["stream", "lens", "ratio", "growth"]
    null = (("profile", "null", "layer"), np.zeros((4, 19, gap.sizes["layer"])))
    with_null = gap.assign(null_profile=null).assign_coords(profile=profiles, null=range(19))
    shown = Shown("gap.nc", folder / "gap.nc", with_null, "", [])
    assert len(shown.figures[0].traces) == len(one_pass.figures[0].traces) + 19


def test_points_say_value_interval_and_hook(folder, page):
    gap = stored.read(folder / "gap.nc")[1]
    figures = FIGURES["gap.nc"](gap)
    one = gap.sel(view="stream", layer=1)
    low, high = one.layer_gap_interval.values
    wanted = f"{float(one.layer_gap):+.2f} [{low:+.2f}, {high:+.2f}]"
    assert ("", "1", wanted, "blocks.1.hook_resid_post") in figures[0].rows
    trace = figures[0].traces[-1]
    assert trace["text"][2] == f"layer 1<br>{wanted}<br>blocks.1.hook_resid_post"
    assert trace["customdata"] == ["", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    knocked = stored.read(folder / "knock_outs.nc")[1]
    trace = FIGURES["knock_outs.nc"](knocked)[0].traces[0]
    one = knocked.isel(how=0, layer=0)
    if np.isfinite(one.effect):
        bars = [trace["error_y"][end][0] for end in ("arrayminus", "array")]
        ends = np.abs(one.effect_interval.values - float(one.effect))
        assert np.allclose(bars, ends)

    names = set(
        HookedDiT(gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4).transformer).names
    )
    for kind, make in FIGURES.items():
        for figure in make(stored.read(folder / kind)[1]):
            assert figure.rows and {*figure.hooks} <= names, (kind, figure.hooks)
    assert page.count("<option>blocks.1.hook_resid_post</option>") >= 2


def test_an_onset_has_its_interval(folder):
    gap = stored.read(folder / "gap.nc")[1]
    gap.attrs |= {"onset_layer_lens": 1, "onset_interval_lens": np.array([0, 1])}
    plain, lens, *_ = FIGURES["gap.nc"](gap)
    assert "annotations" not in plain.layout
    assert lens.layout["annotations"][0]["text"] == "onset 1 [0, 1]"
    (band,) = (shape for shape in lens.layout["shapes"] if shape["type"] == "rect")
    assert (band["x0"], band["x1"]) == (0, 1)


def test_maps_of_one_result_share_their_colours(folder):
    """So that no effect at all never looks like a large one."""
    for kind in ("cause_map.nc", "patches.nc"):
        traces = [f.traces[0] for f in FIGURES[kind](stored.read(folder / kind)[1])]
        assert len({(trace["zmin"], trace["zmax"]) for trace in traces}) == 1
        assert len(traces) > 1 and traces[0]["zmin"] < traces[0]["zmax"]
    effects = stored.read(folder / "cause_map.nc")[1]
    nothing = FIGURES["cause_map.nc"](effects.assign(effect=effects.effect * 0))[0].traces[0]
    assert {value for row in nothing["z"] for value in row} == {nothing["zmin"]}


def test_data_of_figures_are_json(page):
    data = Reader(page).scripts[0]
    figures = json.loads(data)
    assert len(figures) == page.count('class="plot"') > 10
    assert "NaN" not in data and "<" not in data
    plots = [a for _, a in Reader(page).elements if a.get("class") == "plot"]
    for plot, figure in zip(plots, figures, strict=True):
        assert plot["aria-label"].startswith(f"{figure['title']};")
        assert figure is figures[int(plot["data-figure"])] and figure["data"]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def test_hostile_texts_are_texts(folder, tmp_path):
    """From results of anybody's, in every place that a page shows."""
    for kind, result in stored.results_at(folder).items():
        for name, value in result.attrs.items():
            if isinstance(value, str) and name not in ("bands", "how"):
                result.attrs[name] = HOSTILE
        for axis in ("attribute", "other", "site", "window"):
            if axis in result.coords:
                result = result.assign_coords({axis: [f"<img>{v}" for v in result[axis].values]})
        save_dataset(tmp_path / kind, kind, result)
    path = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--html", str(path)]) == 0
    read = Reader(path.read_text(encoding="utf-8"))
    assert HOSTILE in read.text
    assert not [a for _, a in read.elements if "onerror" in a or a.get("src") == "x"]
    assert len(read.scripts) == 3 and not any(s.startswith("alert") for s in read.scripts)
    for figure in json.loads(read.scripts[0]):
        del figure["title"]
        for trace in figure["data"]:  # hook names are shown as text
            trace.pop("customdata", None)
        assert "<img" not in json.dumps(figure) and "<script" not in json.dumps(figure)


def test_several_results_side_by_side(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    result = stored.read(folder / "gap.nc")[1].assign_attrs(headline="Another headline.")
    save_dataset(other / "gap.nc", "gap.nc", result)
    path = tmp_path / "page.html"
    asked = ["report", str(folder), str(other / "gap.nc"), "--html", str(path), "--json"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(path)}
    read = Reader(path.read_text(encoding="utf-8"))
    assert "Another headline." in read.text and str(other) in read.text
    assert sum(tag == "article" for tag, _ in read.elements) == len(list(folder.iterdir())) + 1
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    labels = {a["for"] for tag, a in read.elements if tag == "label"}
    assert labels == {a["id"] for tag, a in read.elements if tag in ("select", "input")}
    assert main(["report", str(folder / "gap.nc"), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["stored"] for one in found] == [str(folder / "gap.nc"), str(other)]


def test_without_plotly(folder, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def no_plotly(name, *more, **options):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", no_plotly)
    assert main(["report", str(folder), "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'dit-lens[report]'" in said
    assert not (tmp_path / "page.html").exists()


def test_what_cannot_be_written(folder, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none"), "--html", str(tmp_path / "page.html")]) == 2
    assert "There are no results at " in capsys.readouterr().err
    assert main(["report", str(folder / "gap.nc"), "--html", str(tmp_path)]) == 2
    assert "a folder is there" in capsys.readouterr().err


def opened(path, profile, after=""):
    """A page as Chromium has it after its scripts, and what its console said."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    options += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, f"{path.as_uri()}{after}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_a_browser_draws_it(folder, page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    releases = stored.read(folder / "attributes.nc")[1].release.values.tolist()
    shown, console = opened(path, tmp_path / "profile", f"#release={releases[-1]}")
    assert console == []
    plots = re.findall(r'<div class="plot[^>]*>(.*?)</figure>', shown, re.DOTALL)
    assert len(plots) == page.count('class="plot"')
    for plot in plots:
        assert re.search(r'<svg[^>]*class="main-svg"', plot) and re.search(
            r'<path class="(?:point|js-line)|<image', plot
        )
    visible = re.findall(r'<div class="release" data-step="(\d+)">', shown)
    assert len(visible) == page.count('class="released"') == 2  # of the gap, and of the attributes
    assert visible[-1] == str(releases[-1])
    assert re.search(rf"<output[^>]*>{releases[-1]}</output>", shown)

    acts = """
    const last = plots[0].data.length - 1, name = plots[0].data[last].customdata[2];
    Plotly.Fx.hover(plots[0], [{ curveNumber: last, pointNumber: 2 }]);
    document.body.dataset.hovered = plots[0].querySelector(".hoverlayer").textContent;
    plots[0].emit("plotly_click", { points: [{ customdata: name }] });
    document.body.dataset.chosen = document.querySelector("select.hook").value;
    dispatchEvent(new Event("beforeprint")); dispatchEvent(new Event("afterprint"));
    document.querySelector("[data-copy]").click();
    addEventListener("hashchange", addressed);"""
    path.write_text(
        page.replace('addEventListener("hashchange", addressed);', acts), encoding="utf-8"
    )
    shown, console = opened(path, tmp_path / "profile")
    assert console == []
    row = FIGURES["gap.nc"](stored.read(folder / "gap.nc")[1])[0].rows[2]
    hovered = re.search(r'data-hovered="([^"]*)"', shown)[1]
    assert row[2] in hovered and row[3] in hovered
    assert f'data-chosen="{row[3]}"' in shown
    assert re.search(rf'role="status"[^>]*>(not copied: |copied ){row[3]}<', shown)

    path.write_text(page.replace("draw();\nfor", "draw();\nnowhere();\nfor"), encoding="utf-8")
    assert "nowhere is not defined" in "".join(opened(path, tmp_path / "profile")[1])
