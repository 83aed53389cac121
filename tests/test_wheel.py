"""The wheel, as somebody gets it who has no checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["dit_lens", "probes", "pyproject.toml", "README.md", "LICENSE"]
FOLDERS = [".ci", "dit_lens", "docs", "examples", "probes", "tests"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, built from a copy: a build leaves files behind, and finds
    those of the last one.
    """
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = site.glob("dit_lens-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_source_distribution_is_the_repository(tmp_path):
    """So that its tests, docs and examples run from it."""
    source = tmp_path / "source"
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for file in ROOT.iterdir():
        # in a worktree of git's .git is a file
        if file.is_file() and file.name not in (".git", ".gitignore"):
            shutil.copy(file, source)
    code = "from setuptools import build_meta; build_meta.build_sdist('../made')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (made,) = (tmp_path / "made").glob("dit_lens-*.tar.gz")
    with tarfile.open(made) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()}
    assert {name for name in wanted if "egg-info" not in name} <= packed


def test_one_version_everywhere():
    files = {
        "pyproject.toml": r'^version = "(.*)"',
        "dit_lens/__init__.py": r'^__version__ = "(.*)"',
        "CITATION.cff": r"^version: (.*)",
    }
    found = {f: re.search(find, (ROOT / f).read_text(), re.M)[1] for f, find in files.items()}
    assert len(set(found.values())) == 1, found


def run(site, folder, *arguments):
    """Python from an empty folder, with the wheel before everything else."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "MYPYPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_everything_is_in_it(site):
    def files(folder):
        return {
            str(f.relative_to(folder)) for f in folder.rglob("*") if "__pycache__" not in str(f)
        }

    wanted = {f"dit_lens/{f}" for f in files(ROOT / "dit_lens")}
    wanted |= {f"dit_lens/probes/{f}" for f in files(ROOT / "probes")} | {"dit_lens/probes"}
    assert {f"dit_lens/{f}" for f in files(site / "dit_lens")} == wanted
    assert {"dit_lens/py.typed", "dit_lens/__init__.pyi"} <= wanted
    assert "dit_lens/bundled/digits/diffusion_pytorch_model.safetensors" in wanted


CODE = """
import importlib, pkgutil, sys, dit_lens
assert dit_lens.__file__.startswith(sys.argv[1]), dit_lens.__file__
modules = [m.name for m in pkgutil.walk_packages(dit_lens.__path__, "dit_lens.")]
for name in modules:
    if name != "dit_lens.__main__":
        assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name
assert "dit_lens.probes.layer_lens" in modules and "dit_lens.families.parts" in modules
print(len(modules), dit_lens.load("digits").cfg.n_layers)
"""


def test_it_works_from_elsewhere(site, tmp_path):
    done = run(site, tmp_path, "-c", CODE, str(site))
    assert done.returncode == 0, done.stderr
    modules, layers = map(int, done.stdout.split())
    assert modules > 80 and layers == 28
    shown = run(site, tmp_path, "-m", "dit_lens", "hooks", "digits", "--filter", "resid_post")
    assert shown.returncode == 0 and "28 hook points" in shown.stdout


MYPY = """
[mypy]
python_version = 3.10
strict_equality = true
check_untyped_defs = true
disallow_untyped_defs = true
warn_unused_ignores = true
warn_redundant_casts = true
[mypy-diffusers.*,nnsight.*,transformer_lens.*]
follow_imports = skip
[mypy-dit_lens.*]
follow_imports = silent
"""
"""As in pyproject.toml, so that the cache fits; the package is read as a user's mypy reads it."""


def test_its_types_are_what_they_should_be(site, tmp_path):
    files = [str(file) for file in sorted((ROOT / "tests" / "typing").glob("*.py"))]
    (tmp_path / "mypy.ini").write_text(MYPY)
    if (ROOT / ".mypy_cache").exists():  # it knows torch, whose types take a minute to read
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / ".mypy_cache")
    done = run(site, tmp_path, "-m", "mypy", *files)
    assert done.stdout == f"Success: no issues found in {len(files)} source files\n", done.stdout
