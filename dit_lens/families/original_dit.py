"""The original DiT's checkpoints as diffusers' `DiTTransformer2DModel`, by the names of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of the published widths: S, B, L, XL (Peebles & Xie 2023, table 1)."""
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
"""Once in the original, in diffusers in every block."""
INSIDE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def dit_from_original(weights: Mapping[str, Tensor], heads: int | None = None) -> Any:
    """A diffusers DiT with the weights of an original DiT.

    diffusers spaces the frequencies of its time embedding a little otherwise, over 127 steps and
    not 128, so that the answer is close to the original's and not the same; to read the original
    itself, open its own module, `HookedDiT(module)`.

    Args:
        weights: the original's state dict, such as `torch.load("DiT-XL-2-256x256.pt")`.
        heads: of attention; None where the width is a published one.

    Returns:
        A `DiTTransformer2DModel` in eval mode.

    Raises:
        InvalidValue: for weights that are missing, left over or of another shape.

        model = dit_lens.HookedDiT(dit_from_original(torch.load("DiT-XL-2-256x256.pt")))
    """
    arguments.instance("weights", weights, Mapping, "a state dict")
    needed = "x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"
    for name in (*needed, "final_layer.linear.weight", "blocks.0.attn.qkv.weight"):
        if not isinstance(weights.get(name), Tensor):
            raise InvalidValue(
                f"The weights have no {name!r}; expected the state dict of an original DiT, with "
                f"{', '.join(map(repr, needed))}, ..."
            )
    width, channels, patch = weights[needed[0]].shape[:3]
    if heads is None and width not in HEADS:
        raise arguments.refusal("heads", heads, f"a number, as a width of {width} is no published")
    heads = HEADS[width] if heads is None else arguments.whole("heads", heads, 1, width)
    if width % heads:
        raise arguments.refusal("heads", heads, f"a divisor of the width, {width}")
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=weights["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=layers,
        sample_size=round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        patch_size=patch,
        num_embeds_ada_norm=weights[needed[2]].shape[0] - 1,
        norm_eps=1e-6,
    )
    found = renamed(weights, layers)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        here, there = found.get(name), wanted.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if each is None else list(each.shape) for each in (here, there)]
            raise InvalidValue(
                f"The weights give {name!r} the shape {shapes[0]}; expected {shapes[1]}, those of "
                "an original DiT."
            )
    model.load_state_dict(found)
    with torch.no_grad():
        model.pos_embed.pos_embed.copy_(weights["pos_embed"])
    return model.eval()


def renamed(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """An original DiT's weights under diffusers' names; the fixed positions have none.

    Args:
        weights: the original's state dict.
        layers: how many blocks it has.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        block, _, inside = module.removeprefix("blocks.").partition(".")
        within = f"transformer_blocks.{block}"
        if name == "pos_embed":
            continue
        if module in EMBEDDERS:
            every = (f"transformer_blocks.{i}.{EMBEDDERS[module]}.{kind}" for i in range(layers))
            found |= dict.fromkeys(every, value)
        elif module in OUTSIDE:
            found[f"{OUTSIDE[module]}.{kind}"] = value
        elif not module.startswith("blocks."):
            found[name] = value  # told as left over
        elif inside == "attn.qkv":
            for which, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{within}.attn1.to_{which}.{kind}"] = part
        else:
            found[f"{within}.{INSIDE.get(inside, inside)}.{kind}"] = value
    return found
