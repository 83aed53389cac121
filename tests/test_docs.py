"""What the documentation shows runs, and what it links to is there."""

import doctest
import importlib
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dit_lens
import dit_lens.probes

ROOT = Path(__file__).parent.parent
PACKAGES = (dit_lens, dit_lens.probes)
MODULES = sorted(
    {m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")}
)


SLOW = ("dit_lens.testing.family_contract", "dit_lens.testing.probe_checks")


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MODULES]
)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
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
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(code, {})
    assert (
        capsys.readouterr().out == "torch.Size([50, 2, 64, 64])\ntorch.Size([50, 2, 4, 64, 64])\n"
    )


@pytest.mark.slow
def test_the_code_in_causes_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "causes.md").read_text(), re.S)
    exec(compile(code, "docs/causes.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Against 4 exact patches of 2 steps: low r = ")


@pytest.mark.slow
def test_the_code_in_map_runs(capsys):
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "map.md").read_text(), re.S))
    exec(compile(code, "docs/map.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([6, 2, 64, 64])\n"


def test_the_code_in_families_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.S)
    exec(compile(code, "docs/families.md", "exec"), {})
    assert capsys.readouterr().out.endswith("torch.Size([4, 16, 16])\n")


def test_the_code_in_own_models_runs(capsys, tmp_path):
    page = (ROOT / "docs" / "own-models.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.S))
    (tmp_path / "own_models.py").write_text(code)  # its source is read
    runpy.run_path(str(tmp_path / "own_models.py"))
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([1, 2, 64, 32])",
        "torch.Size([7, 2, 1, 16, 16])",
    ]


def test_the_code_in_attention_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(), re.S)
    exec(compile(code, "docs/attention.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "('batch', 'row', 'column') (1, 4, 4)",
        "('word', 'layer', 'step', 'batch', 'row', 'column')",
        "['a' 'red' 'fox' 'in' 'snow']",
    ]


@pytest.mark.slow
def test_the_example_family_keeps_the_contract():
    script, env = ROOT / "examples" / "new_family.py", os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, check=True
    )
    assert "ScaleTransformer2DModel, 4 layers" in run.stdout


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
