"""Imports run downwards: a folder imports only from folders below it, and files of one folder not
in circles.

Every import counts, also those inside functions, below TYPE_CHECKING and by `importlib`.
"""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dit_lens"

FLOORS = [  # high to low; folders of one line do not import each other
    ["commands"],
    ["report", "testing"],
    ["experiments"],
    ["probes"],
    ["twinning"],
    ["tracing"],
    ["patching", "plans"],
    ["bridges"],
    ["sampling"],
    ["model"],
    ["families"],
    ["hooks"],
    ["measures", "groundtruth", "pictures"],
    ["pieces"],
    ["storage"],
    ["arguments"],
    ["errors"],
]
FLOOR = {folder: -i for i, line in enumerate(FLOORS) for folder in line}
DOOR = {"dit_lens", "dit_lens.__main__"}  # the door names everything, lazily


def modules():
    """Every module of the package: name, file, syntax tree."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "probes").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = ("dit_lens", *parts) if parts[0] == "probes" else parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = (file, ast.parse(file.read_text()))
    assert len(found) > 80
    return found


MODULES = modules()


def imports(name, file, tree):
    """(module of ours that is imported, name taken from it or None) for each import."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*base * (node.level > 0), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield (inner, None) if inner in MODULES else (origin, alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            for word in ast.walk(node.args[0]):
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    text = word.value
                    yield (package + text if text.startswith(".") else text), None


@functools.cache
def ours():
    """Every import of one of our modules by another: (importer, imported, name or None)."""
    found = []
    for name, (file, tree) in MODULES.items():
        if name not in DOOR:
            for origin, taken in imports(name, file, tree):
                if origin == "dit_lens" and taken:  # through the door: from dit_lens import Bands
                    origin, taken = home(taken), None
                if origin.split(".")[0] == "dit_lens":
                    found.append((name, origin, taken))
    return found


def home(public):
    """The module that a name of the door comes from."""
    (table,) = (
        node.value
        for node in MODULES["dit_lens"][1].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
    )
    return "dit_lens." + ast.literal_eval(table).get(public, public)


def folder(module):
    return module.split(".")[1]


def test_every_folder_has_its_floor():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders | {"probes", "errors", "arguments"} == set(FLOOR)


@pytest.mark.parametrize(
    "line, seen",
    [
        ("from ..hooks.names import select", ("dit_lens.hooks.names", "select")),
        ("from ..hooks import names", ("dit_lens.hooks.names", None)),
        ("from .call import Call", ("dit_lens.model.call", "Call")),
        ("from dit_lens.hooks import names", ("dit_lens.hooks.names", None)),
        ("import dit_lens.hooks.names", ("dit_lens.hooks.names", None)),
        (
            "if TYPE_CHECKING:\n    from ..hooks.names import Point",
            ("dit_lens.hooks.names", "Point"),
        ),
        ("def f():\n    from ..hooks.names import Point", ("dit_lens.hooks.names", "Point")),
        ("importlib.import_module('dit_lens.probes')", ("dit_lens.probes", None)),
        ("import_module('.call', __package__)", ("dit_lens.model.call", None)),
        ("__import__('dit_lens.probes')", ("dit_lens.probes", None)),
    ],
)
def test_every_way_to_import_is_seen(line, seen):
    file = PACKAGE / "model" / "hooked.py"
    assert list(imports("dit_lens.model.hooked", file, ast.parse(line))) == [seen]


def test_imports_go_down():
    up = {
        f"{a} imports {b}"
        for a, b, _ in ours()
        if folder(a) != folder(b) and FLOOR[folder(b)] >= FLOOR[folder(a)]
    }
    assert not up


def test_no_private_name_crosses_folders():
    crossing = {
        f"{a} takes {b}.{taken or ''}"
        for a, b, taken in ours()
        if folder(a) != folder(b) and re.search(r"\b_", f"{b}.{taken or ''}")
    }
    assert not crossing


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_files_of_a_folder_do_not_import_in_circles(room):
    graph = {name: set() for name in MODULES if name not in DOOR and folder(name) == room}
    edges = {(a, b) for a, b, _ in ours() if a != b and folder(a) == folder(b) == room}
    for a, b in edges:
        graph[a].add(b)
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def packages():
    """Every folder with Python files in it, and the name of the package that it is."""
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "probes").rglob("*.py")]:
        parts = file.parent.relative_to(ROOT).parts
        yield file.parent, ".".join(("dit_lens", *parts) if parts[0] == "probes" else parts)


PACKAGES = {name: where for where, name in packages()}


@pytest.mark.parametrize("name", sorted(PACKAGES.keys() - {"dit_lens"}))
def test_every_folder_says_what_belongs_in_it(name):
    init = PACKAGES[name] / "__init__.py"
    assert init.exists(), f"{init} is missing"
    about = " ".join((ast.get_docstring(ast.parse(init.read_text())) or "").split())
    assert "Belongs here: " in about and "Does not: " in about


def test_every_folder_is_in_the_wheel():
    (block,) = re.findall(
        r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M
    )
    assert sorted(re.findall(r'"(.+)"', block)) == sorted(PACKAGES)
