"""Images in rows and columns, in one pair of axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def beside(*images: NDArray[Any]) -> NDArray[Any]:
    """Images side by side, as one, a white line between them.

    Args:
        images: [..., channel, row, column], of one shape.
    """
    line = np.ones((*images[0].shape[:-1], max(1, images[0].shape[-1] // 16)))
    parts = [part for image in images for part in (line, image)][1:]
    return np.concatenate(parts, -1)


def show_grid(ax: Any, images: NDArray[Any], rows: list[Any], columns: list[Any]) -> None:
    """Draw images, with a label for each row and column.

    Args:
        ax: where.
        images: [row of images, column of images, channel, row, column] in [0, 1]; one channel is
            grey, of others the first three are drawn.
        rows: labels, one a row.
        columns: labels, one a column.
    """
    n_rows, n_columns, channels, high, wide = images.shape
    gap = max(1, wide // 8)
    canvas = np.ones((n_rows * (high + gap) - gap, n_columns * (wide + gap) - gap, 3))
    for r in range(n_rows):
        for c in range(n_columns):
            image = np.clip(np.nan_to_num(images[r, c]), 0, 1).transpose(1, 2, 0)
            top, left = r * (high + gap), c * (wide + gap)
            own = np.repeat(image[..., :1], 3, -1) if channels < 3 else image[..., :3]
            canvas[top : top + high, left : left + wide] = own
    ax.imshow(canvas, interpolation="nearest")
    ax.set_xticks([c * (wide + gap) + (wide - 1) / 2 for c in range(n_columns)], columns)
    ax.set_yticks([r * (high + gap) + (high - 1) / 2 for r in range(n_rows)], rows)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
