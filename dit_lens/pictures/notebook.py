"""What a notebook shows of an object: its line of text, and below it images or a table.

Classes give it back from `_repr_html_`, which IPython asks for.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..arguments import cut

SHOWN = 8
"""So many images are shown at most."""


def shown(text: str, *below: str) -> str:
    """A line of text, or several, and what stands below it.

    Args:
        text: such as a repr.
        below: HTML.
    """
    return "".join([f'<pre style="white-space:pre-wrap">{html.escape(text)}</pre>', *below])


def strip(images: Iterable[NDArray[np.floating]], titles: Iterable[object]) -> str:
    """The first images in a row, each with its title, as HTML that needs no other file.

    Args:
        images: [channel, row, column] each, in [0, 1]; one channel is grey, of others the first
            three are drawn. Of a video, [channel, frame, row, column], the middle frame is.
        titles: one an image.
    """
    all_of_them = list(zip(images, titles, strict=True))
    parts = []
    for image, title in all_of_them[:SHOWN]:
        name, brief = (html.escape(text) for text in (str(title), cut(str(title), 40)))
        parts.append(
            '<figure style="display:inline-block;margin:0 6px 6px 0;text-align:center">'
            f'<img alt="{name}" src="{_png(image)}" '
            'style="height:96px;image-rendering:pixelated">'
            f"<figcaption>{brief}</figcaption></figure>"
        )
    more = len(all_of_them) - SHOWN
    return f"<div>{''.join(parts)}{f'and {more} more' * (more > 0)}</div>"


def table(summary: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that opens when its summary is clicked.

    Args:
        summary: one line.
        head: names of the columns.
        rows: their cells.
    """
    cells = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return (
        f"<details><summary>{html.escape(summary)}</summary>"
        f"<table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></details>"
    )


def _png(image: NDArray[np.floating]) -> str:
    """An image as a data URI."""
    from matplotlib.image import imsave

    pixels = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    pixels = np.clip(np.nan_to_num(pixels), 0, 1)
    pixels = np.repeat(pixels[:1], 3, 0) if len(pixels) < 3 else pixels[:3]
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(pixels.transpose(1, 2, 0)), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
