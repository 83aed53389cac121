"""Stored results as one page of HTML that needs nothing else: `dit-lens report FOLDER... --html`.

Belongs here: what stands on the page. How it looks is `page.html`, its figures are `figures.py`.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..errors import MissingFile
from ..measures.estimate import number
from ..pictures.attributes import order
from ..pictures.style import HIGH, INK, LOW
from ..storage import made_with, replacing
from . import stored
from .figure import Figure
from .figures import FIGURES
from .knock_outs import sufficiency
from .style import WRITTEN

NEEDED = "A page of HTML needs plotly, which is not installed; pip install 'dit-lens[report]'."
KINDS = {
    "gap.nc": "The synchronization gap",
    "attributes.nc": "The order of decisions",
    "coupling_sweep.nc": "The gap of coupled twins",
    "knock_outs.nc": "The layers that cause the gap",
    "patches.nc": "Patches between twins",
    "cumulative.nc": "Layers knocked out together",
    "smallest_set.nc": "The smallest set of layers",
    "shapley.nc": "Shapley shares of the layers",
    "windows.nc": "Layers by windows of steps",
    "interchange.nc": "Bands exchanged between twins",
    "cause_map.nc": "Where and when the model can be changed",
    "side_by_side.nc": "Reuse plans side by side",
    "compare.nc": "Two models compared",
    "diagnosis.nc": "What was decided, and when",
    "diagnoses.nc": "Diagnoses of many samples",
}
SETTINGS = (
    *("model", "pairs", "items", "steps", "seed", "cut", "bands", "channels", "kind", "how"),
    *("guidance", "eta", "lag", "eps", "form", "step", "n_layers"),
)
"""Attributes that are settings, as far as a result has them."""


def write(folders: Sequence[Path], page: Path) -> Path:
    """Write a page of all results.

    Args:
        folders: that hold them, or single files.
        page: the file to write.

    Returns:
        The page.

    Raises:
        MissingFile: if there is nothing at a path, or plotly is not installed.
        InvalidValue: for a file that is no result, or is damaged.
        UnwritableFile: where the page can't be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingFile(NEEDED) from None
    import jinja2
    from markupsafe import Markup

    shown = [result for folder in folders for result in _results(folder)]
    groups = [(KINDS[kind], [r for r in shown if r.kind == kind]) for kind in KINDS]
    groups = [(name, results) for name, results in groups if results]
    figures = [figure for _, results in groups for r in results for figure in r.figures]
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    notes = [stored.of_several_models(stored.files_at(folder)) for folder in folders]
    html = environment.from_string(template).render(
        plotly=Markup(get_plotlyjs()),
        groups=groups,
        palette={"ink": INK, "low": LOW, "high": HIGH},
        figures=_json([{"title": f.title, "data": f.traces, "layout": f.layout} for f in figures]),
        several=len(folders) > 1,
        notes=[note for note in notes if note],
    )
    with replacing(page) as part:
        part.write_text(html, encoding="utf-8")
    return page


@dataclass
class Shown:
    """What stands on the page for one result.

    Attributes:
        kind: of `dit_lens.report.stored.FILES`.
        file: that holds it.
        result: what is in it.
        text: its tables and sentences, as `dit-lens report` prints them.
        pictures: as data URIs, for kinds without figures.
    """

    kind: str
    file: Path
    result: xr.Dataset
    text: str
    pictures: list[str]

    def __post_init__(self) -> None:
        self.made = made_with(self.file)
        self.figures: list[Figure] = FIGURES[self.kind](self.result) if self.interactive else []
        self.hooks = list(dict.fromkeys(hook for f in self.figures for hook in f.hooks))
        self.releases = releases(self.result) if "end" in self.result.data_vars else []

    @property
    def interactive(self) -> bool:
        """Whether it has figures."""
        return self.kind in FIGURES

    @property
    def agreeing(self) -> str:
        """What the shares beside finished twins are."""
        if self.kind == "attributes.nc":
            return "Agreement of all pairs beyond chance"
        return "Agreement of all pairs in each band, cycles per pixel"

    @property
    def sentences(self) -> list[str]:
        """The answer."""
        attrs = self.result.attrs
        found = [str(attrs[name]) for name in ("headline", "sentence") if name in attrs]
        said = {str(n): str(v) for n, v in attrs.items() if str(n).startswith("sentence_")}
        by = "By {}: " if self.kind == "knock_outs.nc" else ""
        found += [by.format(n.removeprefix("sentence_")) + v for n, v in said.items()]
        if self.kind == "patches.nc":
            found.append(sufficiency(self.result))
        return [line for text in found for line in text.splitlines() if line]

    @property
    def title(self) -> str:
        """What was measured, as far as it says so."""
        return str(self.result.attrs.get("title", ""))

    @property
    def settings(self) -> dict[str, str]:
        """Its settings, what made it and when, by name."""
        attrs = self.result.attrs
        found = {name.replace("_", " "): _word(attrs[name]) for name in SETTINGS if name in attrs}
        found |= {name: value for name, value in self.made.items() if name != "command"}
        return found | {"file": str(self.file)}

    @property
    def command(self) -> str:
        """What made it; "" where that was no command."""
        return self.made.get("command", "")


def releases(results: xr.Dataset) -> list[dict[str, Any]]:
    """For each release step: what twins ended as, and how far attributes, or bands, agree.

    Args:
        results: of attributes.nc or gap.nc.
    """
    if "attribute" in results.dims:
        names, shares = order(results), results.agreement.rename(attribute="what")
    else:
        shares = results.agreement_clones.rename(band="what")
        names = shares.what.values.tolist()
    found = []
    for release in results.release.values.tolist():
        one = results.sel(release=release)
        agreement = shares.sel(release=release, what=names).values
        found.append(
            {
                "step": release,
                "twins": [
                    [png(one.end.isel(shown=i).sel(twin=twin).values) for twin in ("A", "B")]
                    for i in range(results.sizes["shown"])
                ],
                "agreement": [
                    (name.replace("_", " "), number(round(float(value), 2) + 0.0, ".2f"))
                    for name, value in zip(names, agreement, strict=True)
                ],
            }
        )
    return found


def png(image: Any) -> str:
    """An image [channel, row, column] in [0, 1] as a data URI.

    Args:
        image: of one or three channels.

    >>> png(np.zeros((1, 2, 2)))[:22]
    'data:image/png;base64,'
    """
    from PIL import Image

    levels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    levels = np.repeat(levels, 3, 0) if len(levels) == 1 else levels[:3]
    held = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0))).save(held, "png")
    return _uri(held.getvalue())


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _results(folder: Path) -> list[Shown]:
    """The results at a path. What they print and draw is made from copies: nothing is written
    beside them.
    """
    found = []
    for file in stored.files_at(folder):
        kind, result = stored.read(file)
        with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()) as said:
            here = Path(place)
            if kind not in ("knock_outs.nc", "patches.nc"):
                stored.show(Path(shutil.copy(file, here / kind)))
            elif file.with_name("knock_outs.nc").exists() and file.with_name("patches.nc").exists():
                stored.causes_at(kind, file)  # an error names them where they are
                for name in ("gap.nc", "knock_outs.nc", "patches.nc"):  # they are shown together
                    if file.with_name(name).exists():
                        shutil.copy(file.with_name(name), here)
                stored.show(here / "knock_outs.nc")
            drawn = sorted(here.glob("lens.png" if kind in FIGURES else "*.png"))
            pictures = [_uri(path.read_bytes()) for path in drawn]
        lines = [line for line in said.getvalue().splitlines() if not line.startswith(WRITTEN)]
        found.append(Shown(kind, file, result, "\n".join(lines).strip(), pictures))
    return found


def _json(data: Any) -> Any:
    """JSON that may stand in a script element: it ends no element and opens none."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)
