"""One interactive figure, as plotly reads it: a plain dictionary whose every value shows its 95 %
interval and, where it belongs to a layer's site, the hook point's name.

Colours are names of the page's own (`var(--ink)`), so that one page serves light, dark and print.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..measures.estimate import Estimate, number

INK, LOW, HIGH = "var(--ink)", "var(--low)", "var(--high)"
WHOLE = 12
"""Axes of layers shorter than this would get ticks at halves."""


def escape(text: str) -> str:
    """Text as plotly reads it, which shows an escaped quotation mark as &quot;.

    >>> escape('"a" & <b>')
    '"a" &amp; &lt;b&gt;'
    """
    return html.escape(text, quote=False)


@dataclass
class Figure:
    """One figure of a page.

    Attributes:
        title: what it shows.
        traces: as plotly reads them.
        layout: likewise.
        rows: its values as a table: series, place, value with interval, hook name.
    """

    title: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def hooks(self) -> list[str]:
        """The hook points that it shows, each once."""
        return list(dict.fromkeys(row[3] for row in self.rows if row[3]))

    def axes(self, x: str, y: str) -> Figure:
        """The same, with its axes named.

        Args:
            x: title of the horizontal one.
            y: of the vertical one.
        """
        for axis, title in (("xaxis", x), ("yaxis", y)):
            self.layout.setdefault(axis, {})["title"] = {"text": escape(title)}
        places = [v for trace in self.traces for v in trace["x"] if v is not None]
        if x.startswith("layer") and max(places) - min(places) < WHOLE:
            self.layout["xaxis"]["dtick"] = 1  # there is no half of a layer
        return self

    def zero(self, at: float = 0.0) -> Figure:
        """The same, with a line across at nothing, or at another value.

        Args:
            at: the value.
        """
        return self.line(INK, "dot", y=at)

    def line(self, color: str, dash: str, *, y: float | None = None, x: float | None = None) -> Any:
        """The same, with a line through the whole of it.

        Args:
            color: its colour.
            dash: plotly's.
            y: where it is level, or
            x: where it stands.
        """
        ends: dict[str, Any] = (
            {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
            if x is None
            else {"yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x}
        )
        look = {"color": color, "width": 1, "dash": dash}
        self.layout.setdefault("shapes", []).append({"type": "line", "line": look} | ends)
        return self

    def onset(self, layer: int, interval: Any = None) -> Figure:
        """The same, with a profile's onset and its interval.

        Args:
            layer: of the onset.
            interval: its ends, if they are known.
        """
        said = f"onset {layer}"
        if interval is not None:
            low, high = (int(end) for end in interval)
            said += f" [{low}, {high}]"
            band = {"type": "rect", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
            look = {"fillcolor": "var(--shade-high)", "line": {"width": 0}}
            self.layout.setdefault("shapes", []).append(band | look)
        note = {"x": layer, "y": 1, "yref": "paper", "xanchor": "left", "showarrow": False}
        self.layout.setdefault("annotations", []).append(note | {"text": said})
        self.rows.append(("onset", str(layer), said, hook(layer, "resid_post")))
        self.line(HIGH, "dash", x=layer)
        return self

    def points(
        self,
        name: str,
        x: Any,
        value: Any,
        interval: Any = None,
        *,
        color: str = INK,
        form: str = "+.2f",
        at: str = "",
        said: Sequence[str] | None = None,
        hooks: Sequence[str] | None = None,
        lines: bool = False,
        ribbon: Any = None,
        across: bool = False,
        **look: Any,
    ) -> Figure:
        """The same, with a series more.

        Args:
            name: of the series.
            x: places [n], numbers.
            value: values [n].
            interval: their ends [n, bound], if they have any.
            color: of the series.
            form: the format of a value.
            at: what a place is, in a word, such as "layer".
            said: each place in words, where `x` is not what it is called.
            hooks: a name for each point, "" for none.
            lines: join them, and draw the interval as a ribbon.
            ribbon: a second, wider interval, drawn below.
            across: the values run from left to right, and the places from top to bottom.
            look: further settings of the trace.
        """
        places, values = np.asarray(x).tolist(), np.asarray(value, dtype=float)
        ends = None if interval is None else np.asarray(interval, dtype=float)
        names = list(hooks) if hooks is not None else [""] * len(places)
        texts = [
            number(v, form) if ends is None else format(Estimate.of(v, ends[i]), form)
            for i, v in enumerate(values)
        ]
        words = said or [f"{p:.4g}" for p in places]
        if lines:
            for low_high in (ribbon, ends):
                if low_high is not None:
                    self._ribbon(places, np.asarray(low_high, dtype=float), color)
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers" if lines else "markers",
            "name": escape(name),
            "x": plain(values) if across else places,
            "y": places if across else plain(values),
            "customdata": names,
            "text": [
                "<br>".join(escape(t) for t in (f"{at} {word}".strip(), text, hook) if t)
                for word, text, hook in zip(words, texts, names, strict=True)
            ],
            "hovertemplate": "%{text}<extra>" + escape(name) + "</extra>",
            "line": {"color": color, "width": 1.5},
            "marker": {"color": color, "size": 6},
            "showlegend": bool(name),
        }
        if ends is not None and not lines:
            trace["error_x" if across else "error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": plain(np.abs(ends[:, 1] - values)),
                "arrayminus": plain(np.abs(values - ends[:, 0])),
                "color": color,
                "thickness": 1.2,
                "width": 3,
            }
        self.traces.append(trace | look)
        self.rows += [(name, *row) for row in zip(words, texts, names, strict=True)]
        return self

    def _ribbon(self, x: list[Any], ends: np.ndarray, color: str) -> None:
        edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}}
        quiet = {"hoverinfo": "skip", "showlegend": False}
        shade = {"fill": "tonexty", "fillcolor": color.replace("var(--", "var(--shade-")}
        self.traces.append(edge | quiet | {"y": plain(ends[:, 0])})
        self.traces.append(edge | quiet | shade | {"y": plain(ends[:, 1])})

    def heat(
        self,
        x: Any,
        y: Sequence[Any],
        z: Any,
        texts: Sequence[Sequence[str]],
        hooks: Sequence[Sequence[str]],
        label: str,
        limits: tuple[float, float],
        colors: str = "Viridis",
    ) -> Figure:
        """The same, with a heat map.

        Args:
            x: columns' places.
            y: rows' names or places.
            z: values [row, column] that the colours show.
            texts: what a cell says, [row][column].
            hooks: names, [row][column], "" for none.
            label: of the colours.
            limits: where the colours end, the same in all figures that are compared.
            colors: plotly's scale, or "diverging" for signed values.
        """
        columns = np.asarray(x).tolist()
        known = np.asarray(z, dtype=float)
        said = [
            [
                "<br>".join(escape(t) for t in (f"layer {c}, {r}", text, hook) if t)
                for c, text, hook in zip(columns, line, named, strict=True)
            ]
            for r, line, named in zip(y, texts, hooks, strict=True)
        ]
        self.traces.append(
            {
                "type": "heatmap",
                "x": columns,
                "y": [escape(str(row)) for row in y],
                "z": [plain(row) for row in known],
                "text": said,
                "customdata": [list(row) for row in hooks],
                "hovertemplate": "%{text}<extra></extra>",
                "colorscale": colors,
                "zmin": limits[0],
                "zmax": limits[1],
                "colorbar": {"title": {"text": escape(label), "side": "right"}, "thickness": 12},
            }
        )
        self.rows += [
            (str(row), str(c), text, hook)
            for row, line, named in zip(y, texts, hooks, strict=True)
            for c, text, hook in zip(columns, line, named, strict=True)
        ]
        self.layout.setdefault("yaxis", {}).update(type="category", automargin=True)
        return self


def limits_of(values: Any) -> tuple[float, float]:
    """Where the colours of these values end.

    Args:
        values: of a map, NaN where there is none.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return low, max(high, low + 0.1)


def plain(values: Any) -> list[float | None]:
    """Numbers for JSON, which has no NaN.

    Args:
        values: numbers.
    """
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]


def hook(layer: int, site: str) -> str:
    """The name of a hook point, "" for the embedding, which is no layer.

    Args:
        layer: of the block.
        site: in it, as results write it.

    >>> hook(5, "resid_post"), hook(0, "attn.hook_z"), hook(-1, "resid_post")
    ('blocks.5.hook_resid_post', 'blocks.0.attn.hook_z', '')
    """
    own = site if "hook_" in site else f"hook_{site}"
    return f"blocks.{layer}.{own}" if layer >= 0 else ""
