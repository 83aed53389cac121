"""The public surface: what may be imported is there, typed, explained, and light to import."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dit_lens
import dit_lens.probes

ROOT = Path(__file__).parent.parent
NAMESPACES = """errors experiments families groundtruth measures patching probes testing""".split()


def python(code, *words):
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_is_light():
    heavy = {"torch", "numpy", "diffusers", "xarray", "scipy", "matplotlib", "rich"}
    loaded = python("import sys, dit_lens; print(*sys.modules)").split()
    assert "dit_lens" in loaded and not heavy & set(loaded)


def test_bridges_import_the_other_tool_late():
    code = "import sys, dit_lens.bridges.nnsight, dit_lens.bridges.transformer_lens"
    loaded = python(f"{code}; print(*sys.modules)").split()
    assert "dit_lens.bridges.nnsight" in loaded
    assert not {"nnsight", "transformer_lens"} & set(loaded)


def test_every_public_name_is_there_after_a_plain_import():
    """Of each namespace by itself: the modules of the one before are dropped."""
    spaces = ["", *(f".{name}" for name in NAMESPACES)]
    code = """
import sys
for space in sys.argv[1:]:
    for name in [n for n in sys.modules if n.partition(".")[0] == "dit_lens"]:
        del sys.modules[name]
    import dit_lens
    n = eval(f"dit_lens{space}")
    print(len([getattr(n, a) for a in n.__all__]))
"""
    assert all(int(number) > 1 for number in python(code, *spaces).split())


def test_every_built_in_probe_is_a_command():
    entries = re.findall(r'^(\w+) = "dit_lens.probes', (ROOT / "pyproject.toml").read_text(), re.M)
    assert sorted(entries) == sorted(dit_lens.probes.__all__)


def test_submodules_do_not_take_the_place_of_public_names():
    """`import dit_lens.x` binds the module to `dit_lens.x`, whatever that was before."""
    folders = {module.name for module in pkgutil.iter_modules(dit_lens.__path__)}
    assert "hooks" in folders and folders & set(dit_lens.__all__) <= set(NAMESPACES)


def test_type_checkers_see_the_same_names():
    stub = ast.parse((ROOT / "dit_lens" / "__init__.pyi").read_text())
    names = [a for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert all(a.name == a.asname for a in names), "a stub hands on only `X as X`"
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert sorted({a.name for a in names} | constants) == sorted(dit_lens.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dit_lens' has no attribute 'twin'"):
        dit_lens.twin  # noqa: B018 (the access is the test)


# Docstrings.


def things():
    """Every public function and class by name; no errors, type aliases or protocols."""
    for space in [dit_lens, *(getattr(dit_lens, name) for name in NAMESPACES)]:
        for name in getattr(space, "__all__", []):
            value = getattr(space, name)
            is_error = isinstance(value, type) and issubclass(value, Exception)
            is_thing = inspect.isfunction(value) or inspect.isclass(value)
            if is_thing and not (is_error or getattr(value, "_is_protocol", False)):
                yield f"{space.__name__}.{name}", value


THINGS = dict(things())


def methods():
    """Every public method and property of them, with those that it overrides."""
    for name, value in THINGS.items():
        for method, found in vars(value).items() if isinstance(value, type) else ():
            function = getattr(found, "__func__", getattr(found, "fget", found))
            if inspect.isfunction(function) and not method.startswith("_"):
                bases = [getattr(base, method, None) for base in value.__mro__[1:]]
                yield f"{name}.{method}", (function, *filter(None, bases))


METHODS = dict(methods())


def described(doc):
    """The parameters that have a line of their own under "Args:" or "Attributes:"."""
    found, section = set(), ""
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            section = line
        entry = re.match(r"    \*{0,2}(\w+): \S", line)
        if entry and section in ("Args:", "Attributes:"):
            found.add(entry[1])
    return found


@pytest.mark.parametrize("name", [*THINGS, *METHODS])
def test_every_parameter_has_its_line(name):
    versions = METHODS[name] if name in METHODS else (THINGS[name],)
    docs = [inspect.getdoc(version) or "" for version in versions]
    takes = inspect.signature(versions[0]).parameters.keys() - {"self", "cls"}
    missing = takes.difference(*map(described, docs))
    assert any(docs), f"{name} has no docstring"
    assert not missing, f"{name}: no line for {sorted(missing)}"


@pytest.mark.parametrize("name", THINGS)
def test_every_public_thing_is_shown_in_use(name):
    """By an example that runs or by an indented block of code."""
    doc = inspect.getdoc(THINGS[name]) or ""
    assert ">>> " in doc or re.search(r"(?m)^    .*\w\(.*\)", doc), doc


# Dotted names.


def is_public(dotted):
    """Whether a name can be had after a plain `import dit_lens`: by way of `__all__` alone."""
    value, listed = dit_lens, True
    for part in dotted.split(".")[1:]:
        if listed and part not in getattr(value, "__all__", [part]):
            return False
        if not hasattr(value, part):
            return False
        value, listed = getattr(value, part), listed and part in NAMESPACES
    return True


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOTTED = re.compile(r"(?<![\w./-])dit_lens(?:\.[A-Za-z_]\w*)+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_the_pages_can_be_used_after_a_plain_import(page):
    names = set(DOTTED.findall(page.read_text()))
    assert not {name for name in names if not is_public(name)}


SOURCES = [
    *(ROOT / "dit_lens").rglob("*.py"),
    *(ROOT / "probes").rglob("*.py"),
    *(ROOT / "examples").glob("*.py"),
]


def test_names_in_docstrings_comments_and_messages_lead_somewhere():
    for package in (dit_lens, dit_lens.probes):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    seen, lost = 0, set()
    for file in SOURCES:
        for name in DOTTED.findall(file.read_text()):
            seen, value = seen + 1, dit_lens
            for part in name.split(".")[1:]:
                value = getattr(value, part, None)
            if value is None:
                lost.add(f"{file.relative_to(ROOT)}: {name}")
    assert seen > 100 and not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != "."]
    files = {str(f.relative_to(ROOT)) for folder in folders for f in folder.rglob("*.py")}
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text()))
    gone = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert not gone
