"""What `make docs` adds to the pages of this folder: the reference, one page a namespace, from
`__all__`, and the pages that lie at the top of the repository.
"""

import inspect
from pathlib import Path

from mkdocs.structure.files import File

import dit_lens

ROOT = Path(__file__).parent.parent
SPACES = [name for name in dit_lens.__all__ if inspect.ismodule(getattr(dit_lens, name))]
EXAMPLES = ("custom_probe", "new_family", "own_sit", "sparse_autoencoder")
TOP = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    """Add the pages that nobody writes."""
    for name in ("dit_lens", *SPACES):
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    # the accessor of results, which nobody imports
    pictures = (
        "# result.plot\n\n::: dit_lens.pictures.result.Pictures\n\n"
        "::: dit_lens.pictures.attention.AttentionPictures\n"
    )
    files.append(File.generated(config, "reference/plot.md", content=pictures))
    for name in EXAMPLES:
        code = (ROOT / "examples" / f"{name}.py").read_text()
        text = f"# examples/{name}.py\n\n```python\n{code}```\n"
        files.append(File.generated(config, f"examples/{name}.md", content=text))
    for page, source in TOP.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def reference(name):
    """A page of everything that a namespace's `__all__` names, where it is defined."""
    space = dit_lens if name == "dit_lens" else getattr(dit_lens, name)
    lines = [f"# {name if name == 'dit_lens' else f'dit_lens.{name}'}", "", first(space), ""]
    # what a namespace has too is shown there
    spaces = [getattr(dit_lens, space) for space in SPACES] if name == "dit_lens" else []
    elsewhere = {public for space in spaces for public in space.__all__}
    for public in space.__all__:
        value = getattr(space, public)
        home = getattr(value, "__module__", None)
        shown = inspect.isclass(value) or inspect.isfunction(value)
        if shown and public not in elsewhere:
            # the package dit_lens.probes is the folder probes/, where it is looked for
            where = home.removeprefix("dit_lens.") if ".probes." in home else home
            lines += [f"::: {where}.{value.__qualname__}", ""]
        elif shown:
            also = [each for each in SPACES if public in getattr(dit_lens, each).__all__]
            lines += [f"`{public}`: see [{also[0]}]({also[0]}.md).", ""]
        elif name != "dit_lens" and inspect.ismodule(value):
            lines += [f"::: {value.__name__}", ""]
    return "\n".join(lines)


def first(module):
    """The first paragraph of a module's docstring."""
    return inspect.getdoc(module).split("\n\n")[0]
