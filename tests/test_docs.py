"""What the documentation shows runs, and what it links to is there."""

import copy
import doctest
import importlib
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import dit_lens
import dit_lens.model.loading
import dit_lens.probes

ROOT = Path(__file__).parent.parent
PACKAGES = (dit_lens, dit_lens.probes)
MODULES = sorted(
    {m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")}
)


@cache
def loaded(name):
    return dit_lens.model.loading.load(name)


def copy_of(name):
    """A bundled model as it is loaded, in a quarter of the time: nobody else holds the copy."""
    return copy.deepcopy(loaded(name))


SLOW = ("dit_lens.testing.family_contract", "dit_lens.testing.probe_checks")


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MODULES]
)
def test_docstring_examples_run(name, monkeypatch):
    module = importlib.import_module(name)
    if name != "dit_lens.model.loading":
        monkeypatch.setattr(dit_lens, "load", copy_of)
    assert module.__doc__, f"{name} has no docstring"
    result = doctest.testmod(
        module,
        extraglobs={
            "np": importlib.import_module("numpy"),
            "torch": importlib.import_module("torch"),
        },
    )
    assert result.failed == 0


@pytest.mark.slow
def test_the_readme_runs(capsys):
    exec(code_in(ROOT / "README.md"), {})
    assert (
        capsys.readouterr().out == "torch.Size([50, 2, 64, 64])\ntorch.Size([50, 2, 4, 64, 64])\n"
    )


# Pages whose code other tests run, with the packages that it needs.
BRIDGES = {"nnsight.md", "transformer-lens-bridge.md"}
SHOWN = {
    "causes.md": "Against 4 exact patches of 2 steps: low r = ",
    "map.md": "torch.Size([6, 2, 64, 64])\n",
    "families.md": "torch.Size([4, 16, 16])\n",
    "own-models.md": "torch.Size([1, 2, 64, 32])\ntorch.Size([7, 2, 1, 16, 16])\n",
    "attention.md": "('batch', 'row', 'column') (1, 4, 4)\n",
}
"""What the code of a page prints, first or last."""

SMALLER = {
    "attributes.md": [("pairs=16, steps=6", "pairs=16, steps=4")],
    "causes": [
        ("release=4, steps=12", "release=1, steps=4"),
        ("layers, sites = range(0, 28, 4)", "layers, sites = range(0, 28, 9)"),
        ("tiles(4, 12, 3)", "tiles(1, 4, 2)"),
    ],
    "causes.md": [
        ("release=4, steps=8", "release=2, steps=4"),
        ("tiles(4, 8, 2)", "tiles(2, 4, 1)"),
    ],
    "diagnosis.md": [('"steps": 8', '"steps": 4'), ("others=8", "others=4")],
    "faster.md": [("steps=4, projections", "steps=2, projections"), ("7], steps=4", "7], steps=2")],
    "first_look": [
        ("steps=20", "steps=6"),
        ("range(1, 20, 2)", "range(1, 6, 2)"),
        ("range(12, 18)", "range(3, 5)"),
    ],
    "gap": [("releases = 16, [2, 5, 7, 9, 11, 13, 14]", "releases = 4, [1, 2]")],
    "how-to.md": [
        ("[1] * 8 + [8] * 8", "[1, 8]"),
        ("range(16)", "range(2)"),
        ("(2, 8)", "(2, 1)"),
        ("steps=10", "steps=7"),
        ('"steps": 10', '"steps": 7'),
        ("range(5, 10)", "range(5, 7)"),
        ("[1] * 16", "[1] * 2"),
        ("range(100, 116)", "range(100, 102)"),
    ],
    "linear_probe": [("items, steps = 96, 10", "items, steps = 96, 2")],
    "painters_order": [
        ("releases = 20, [4, 8, 10, 12, 14, 16, 18]", "releases = 4, [1, 2]"),
        ("pairs=8, labels=[5] * 8", "pairs=2, labels=[5] * 2"),
    ],
    "recording.md": [('"acts", at=range(20, 40)', '"acts", steps=8, at=range(3, 6)')],
    "start.md": [
        ("steps=20, seeds", "steps=12, seeds"),
        ("release=10, steps=20", "release=2, steps=4"),
    ],
}
"""Sizes that a page or notebook shows, and smaller ones with which its code runs as well."""


def in_small(name, text):
    for long, short in SMALLER.get(name, []):
        assert long in text, f"{name} no longer says {long}"
        text = text.replace(long, short)
    return text


def code_in(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p.name for p in sorted(ROOT.glob("docs/*.md")) if p.name not in BRIDGES and code_in(p)],
)
def test_the_code_on_a_page_runs(page, capsys, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(in_small(page, code_in(ROOT / "docs" / page)))
    runpy.run_path(str(tmp_path / "page.py"))  # from a file: what opens a model reads its source
    out = capsys.readouterr().out
    assert out.startswith(SHOWN.get(page, "")) or out.endswith(SHOWN[page])


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


def test_notebooks_are_their_scripts():
    """Cell by cell, executed to the end."""
    for script in NOTEBOOKS:
        cells = re.split(r"^# %%(?: \[markdown\])?\n", script.read_text(), flags=re.M)[1:]
        notebook = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
        assert len(cells) == len(notebook), script.name
        for text, cell in zip(cells, notebook, strict=True):
            if cell["cell_type"] == "markdown":
                text = re.sub(r"^# ?", "", text, flags=re.M)
            assert "".join(cell["source"]).strip() == text.strip(), script.name
        code = [cell for cell in notebook if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], script.name
        assert any("image/png" in out.get("data", {}) for c in code for out in c["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("script", [s.stem for s in NOTEBOOKS])
def test_the_notebook_runs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "notebooks" / f"{script}.py").read_text()
    (tmp_path / "notebook.py").write_text(in_small(script, text))
    runpy.run_path(str(tmp_path / "notebook.py"), run_name="__main__")
    plt.close("all")


@pytest.mark.slow
def test_the_example_family_keeps_the_contract():
    script, env = ROOT / "examples" / "new_family.py", os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, check=True
    )
    assert "ScaleTransformer2DModel, 4 layers" in run.stdout


def test_the_example_patches_between_twins(capsys, recwarn):
    text = (ROOT / "examples" / "patch_between_twins.py").read_text()
    for long, short in (
        ("RELEASE, WINDOW = 25, 10", "RELEASE, WINDOW = 4, 2"),
        ("pairs=6, release=RELEASE", "pairs=1, release=RELEASE, steps=8"),
        ("n_layers, 4)", "n_layers, 28)"),
    ):
        assert long in text
        text = text.replace(long, short)
    exec(text, {})
    assert not [w for w in recwarn if "never acted" in str(w.message)]
    assert capsys.readouterr().out.split()[-1].strip("-") != "0.000"


@pytest.mark.parametrize(
    "page", [p.relative_to(ROOT) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))], ids=str
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page.parent / target.partition("#")[0]).exists(), target


def test_digits_is_what_it_should_be():
    model = dit_lens.load("digits")
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.null_class, model.cfg.grid) == (
        28,
        64,
        10,
        (8, 8),
    )
    folder = Path(dit_lens.__file__).parent / "bundled" / "digits"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 12e6
    images = dit_lens.sample(model, [0, 1], steps=20, eta=1.0).images
    # a 0 is open in the middle, a 1 is not
    assert images[0, 0, 6:10, 7:9].mean() < 0.5 < images[1, 0, 6:10, 7:9].max()
