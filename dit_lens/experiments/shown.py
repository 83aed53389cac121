"""Images that results keep to be looked at: few, and small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dit_lens.probes import LayerLens

from ..measures import Array
from ..model.hooked import HookedDiT
from ..sampling.run import decode

SHOWN = 6
"""Pairs whose finished images are kept."""
LARGEST = 128
"""Pixels a side."""
STRIP = 6
"""Layers, and steps, of which a picture shows what they read as."""


def small(images: Tensor) -> Tensor:
    """Images as a picture shows them, on the host.

    Args:
        images: [n, channel, row, column] in [0, 1], of videos [n, channel, frame, row, column], of
            which the middle frame is taken.

    Returns:
        Tensor: [n, 1 or 3, row, column], at most 128 pixels a side.
    """
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    images = images[:, : 3 if images.shape[1] >= 3 else 1].float().cpu()
    height, width = images.shape[-2:]
    share = min(1.0, LARGEST / max(height, width))
    return adaptive_avg_pool2d(
        images, (max(1, round(height * share)), max(1, round(width * share)))
    )


def lens_images(lens: LayerLens, batch: int | None) -> dict[str, Array]:
    """What the first image reads as, in some layers at some steps.

    Args:
        lens: that has watched a run.
        batch: images that go through the VAE at once; None is all.

    Returns:
        `images` [layer, step, channel, row, column], and which `layers` and `steps` they are.
    """

    def some(values: list[int]) -> list[int]:
        places = np.linspace(0, len(values) - 1, STRIP).round().astype(int)
        return [values[i] for i in dict.fromkeys(places.tolist())]

    layers, steps, model = some(lens.layers), some(lens.seen.steps), lens.model
    # each copied out, or all the batch would stay with it
    x0 = torch.stack([lens.x0(layer, step)[0].clone() for layer in layers for step in steps])
    images = small(decode(model, x0.to(model.device, model.dtype), batch))
    return {
        "images": images.unflatten(0, (len(layers), len(steps))).numpy(),
        "layers": np.array(layers),
        "steps": np.array(steps),
    }


def pictures(
    model: HookedDiT,
    strip: Mapping[str, Array],
    ends: Mapping[int, list[Tensor]],
    batch: int | None,
) -> xr.Dataset:
    """The images of a gap, as it returns them.

    Args:
        model: whose latents they are.
        strip: from `lens_images`.
        ends: the first pairs' finished latents by release, of A and of B; there may be none.
        batch: images that go through the VAE at once; None is all.
    """
    image = ("channel", "row", "column")
    found: dict[str, Any] = {"lens_image": (("shown_layer", "shown_step", *image), strip["images"])}
    coords = {"shown_layer": strip["layers"], "shown_step": strip["steps"]}
    if ends:
        order = sorted(ends)
        each = [small(decode(model, torch.cat(ends[release]), batch)) for release in order]
        shown = torch.stack(each).unflatten(1, (2, -1))
        found["end"] = (("release", "twin", "shown", *image), shown.numpy())
        coords |= {"release": np.array(order), "twin": np.array(["A", "B"])}
    return xr.Dataset(found, coords)
