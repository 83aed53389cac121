"""How near a built model comes to its answer, measured on the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from .. import arguments
from .closed_forms import gaussian_eps, token_mean
from .construction import TIMESTEPS, DiT


@torch.no_grad()
def stream_gains(transformer: DiT, timestep: int, band: str = "low", seed: int = 0) -> Tensor:
    """How many times each layer enlarges the difference of two random inputs, measured on the whole
    stream; nothing of the model's answer is used.

    Args:
        transformer: a `DiTTransformer2DModel`.
        timestep: of the forward.
        band: of the difference, token mean ("low") or the rest ("high").
        seed: of the inputs.

    Returns:
        The gains, [layer], float64.

    Raises:
        ValueError: for another band.

    >>> from dit_lens.groundtruth import planted
    >>> gains = stream_gains(planted(layers=(1,), n_layers=2).transformer, timestep=500)
    >>> [round(float(gain), 4) for gain in gains]
    [1.0, 1.3]
    """
    arguments.instance("transformer", transformer, DiTTransformer2DModel, "a DiTTransformer2DModel")
    arguments.choice("band", band, ("low", "high"))
    timestep = arguments.whole("timestep", timestep, 0, TIMESTEPS - 1)
    seed = arguments.seed("seed", seed)
    config, sizes, first = transformer.config, [], next(transformer.parameters())
    shape = (2, config["in_channels"], config["sample_size"], config["sample_size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        first
    )

    def measure(_module: torch.nn.Module, _args: tuple, stream: Tensor) -> None:
        difference = (stream[0] - stream[1]).double()
        mean = difference.mean(0, keepdim=True)
        sizes.append((mean if band == "low" else difference - mean).norm())

    hooks = [
        m.register_forward_hook(measure)
        for m in (transformer.pos_embed, *transformer.transformer_blocks)
    ]
    try:
        steps = torch.full((2,), timestep, device=first.device)
        transformer(x, timestep=steps, class_labels=torch.zeros_like(steps))
    finally:
        for hook in hooks:
            hook.remove()
    stream = torch.stack(sizes)
    return (stream[1:] / stream[:-1]).cpu()


@torch.no_grad()
def denoiser_error(transformer: DiT, abars: Tensor, lam_low: float, lam_high: float) -> float:
    """The largest relative error of either band of the output, over 41 timesteps.

    Each band by itself, for the low one is a small part of the whole.
    """
    steps = torch.cat(
        [torch.arange(0, 16), torch.arange(16, TIMESTEPS, 41), torch.tensor([TIMESTEPS - 1])]
    )
    config, abar = transformer.config, abars[steps]
    shape = (len(steps), config["in_channels"], config["sample_size"], config["sample_size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = config["patch_size"]
    sd = [(lam * abar + 1 - abar).sqrt().view(-1, 1, 1, 1) for lam in (lam_low, lam_high)]
    low = token_mean(x, size)
    x = (sd[0] * low + sd[1] * (x - low)).to(transformer.dtype)
    out = transformer(x, timestep=steps, class_labels=torch.zeros_like(steps)).sample.double()
    exact = gaussian_eps(x.double(), abar, lam_low, lam_high, size)
    worst = 0.0
    for get in (lambda v: token_mean(v, size), lambda v: v - token_mean(v, size)):
        worst = max(
            worst,
            float(
                (
                    (get(out - exact)).flatten(1).norm(dim=1) / get(exact).flatten(1).norm(dim=1)
                ).max()
            ),
        )
    return worst


def gain_error(transformer: DiT, gains: Mapping[str, Tensor], layers: Sequence[int]) -> float:
    """The largest relative error of a layer's gain, over layers, bands and five timesteps."""
    worst = 0.0
    for band in ("low", "high"):
        for timestep in (0, 250, 500, 750, 999):
            a = float(gains[band][timestep]) if band in gains else 0.0
            wanted = torch.ones(len(transformer.transformer_blocks), dtype=torch.float64)
            wanted[list(layers)] += a
            worst = max(
                worst, float((stream_gains(transformer, timestep, band) / wanted - 1).abs().max())
            )
    return worst
