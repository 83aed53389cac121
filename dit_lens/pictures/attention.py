"""Attention to words: an `xarray.DataArray` whose `plot` also draws the maps side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from xarray.plot.accessor import DataArrayPlotAccessor

from .. import arguments
from ..errors import InvalidValue
from .images import show_grid
from .style import SEQUENTIAL, axes_for, families

PLACES = "word", "row", "column"


class AttentionPictures(DataArrayPlotAccessor):
    """What `attention.plot` draws: `words`, and xarray's own pictures."""

    __slots__ = ()

    def words(self, images: Any = None, ax: Any = None) -> Any:
        """The maps in one scale of colours, words from left to right; from top to bottom the items
        of the batch, or the frames, layers, steps or heads of one.

        Args:
            images: [batch, channel, row, column] in [0, 1], such as `run.images`, drawn to the
                left of their maps.
            ax: where.

        Raises:
            ValueError: for maps along two axes besides the words.
        """
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        maps, down = _in_rows(self._da)
        scale = Normalize(0.0, float(np.nanmax(maps.values)) or 1.0)
        drawn = colormaps[SEQUENTIAL](scale(maps.values))[..., :3]
        grid = np.moveaxis(drawn, -1, -3)  # [row, word, channel, row, column]
        words = [str(word) for word in maps.word.values]
        if images is not None:
            given = _images(images, maps, down)
            grid = np.concatenate([given[:, None], _as_large(grid, given.shape[-2:])], 1)
            words = ["", *words]
        rows, columns, _, high, wide = grid.shape
        size = 1.7 + 0.85 * columns * wide / high, max(2.1, 0.5 + 0.85 * rows)
        ax = axes_for(ax, size)
        show_grid(ax, grid, maps[down].values.tolist(), words)
        ax.xaxis.tick_top()
        ax.tick_params(axis="x", labelfontfamily=families(words))
        if max(map(len, words)) > 10 * wide / high:  # or they would lie over each other
            for label in ax.get_xticklabels():
                label.set(rotation=30, ha="left", rotation_mode="anchor")
        ax.set_ylabel("item" if down == "batch" else down)
        ax.figure.colorbar(ScalarMappable(scale, SEQUENTIAL), ax=ax, label="share of the attention")
        return ax


class AttentionMap(xr.DataArray):
    """Attention to words, made by `Trace.attention_map`.

    t.attention_map(["red", "fox"]).plot.words()   # matplotlib axes
    """

    __slots__ = ()

    @property
    def plot(self) -> AttentionPictures:  # type: ignore[override]
        """Draws; see `AttentionPictures`."""
        return AttentionPictures(self)


def _in_rows(maps: xr.DataArray) -> tuple[xr.DataArray, str]:
    """Maps as [what goes down, word, row, column], and what goes down."""
    long = [str(d) for d in maps.dims if d not in PLACES and maps.sizes[d] > 1]
    if not {"row", "column"} <= set(maps.dims) or len(long) > 1:
        raise InvalidValue(
            f"Maps along {', '.join(map(str, maps.dims))} can't be drawn; expected row, column, "
            "word, and one more at most (choose with .isel(), or average with .mean())."
        )
    down = long[0] if long else "batch"
    maps = maps.squeeze([d for d in maps.dims if d not in (*PLACES, down)], drop=True)
    for name in (down, "word"):
        if name not in maps.dims:
            maps = maps.expand_dims(name)
    return maps.transpose(down, "word", "row", "column"), down


def _images(images: Any, maps: xr.DataArray, down: str) -> np.ndarray:
    """The images beside each row of maps, in three channels."""
    found = torch.as_tensor(images).detach().cpu().double().numpy()  # also from a GPU
    if found.ndim != 4 or down != "batch" or len(found) <= maps[down].max():
        expected = f"[batch, channel, row, column], {int(maps[down].max()) + 1} or more of them"
        expected = expected if down == "batch" else f"None beside maps along {down}"
        raise arguments.refusal("images", list(found.shape), expected)
    found = found[maps[down].values]
    return np.repeat(found[:, :1], 3, 1) if found.shape[1] < 3 else found[:, :3]


def _as_large(grid: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Maps [..., row, column] as large as images, every token a block of pixels."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, grid.shape[-2:], strict=True))
    return grid[..., rows[:, None], columns]
