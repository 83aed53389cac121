"""Patching a single forward, with the names, argument order and result shapes of
`transformer_lens.patching`.

    _, clean_cache = model.run_with_cache(x_clean, t, y)
    # [layer, pos], pos the token
    get_act_patch_resid_pre(model, (x_corrupted, t, y), clean_cache, metric)

In place of `corrupted_tokens` stand the model's inputs (x, t, y), and the metric is given the
model's output, [batch, channel, height, width], in place of logits. Every patch is exact, and none
runs a layer before its own: patches of one layer are stacked along the batch and start from the
corrupted stream that enters it. For patches over a denoising run see `dit_lens.patching.sweep`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.cache import ActivationCache
from ..model.hooked import HookedDiT

Inputs = tuple[Tensor, Tensor, Tensor]
Metric = Callable[[Tensor], Tensor | float]
Axis = Literal["layer", "pos", "head"]
SIZES = {"pos": lambda cfg: cfg.grid[0] * cfg.grid[1], "head": lambda cfg: cfg.n_heads}


def generic_activation_patch(
    model: HookedDiT,
    corrupted_inputs: Inputs,
    clean_cache: ActivationCache,
    patching_metric: Metric,
    activation_name: str,
    index_axis_names: tuple[Axis, ...] = ("layer", "pos"),
    *,
    batch: int = 64,
) -> Tensor:
    """The metric after each patch of the clean activation into the corrupted forward, one axis for
    each of `index_axis_names`.

    Args:
        corrupted_inputs: (x [b, c, h, w], t, y).
        clean_cache: from `run_with_cache` on the same batch, with the site in every layer.
        activation_name: a site with a batch axis first and those of `index_axis_names` among the
            others: "resid_pre", "attn.hook_z", ...
        batch: images that run at once, at least one patch's.

    Raises:
        ValueError: for axes that the site does not have, a cache of another batch.
        KeyError: for a cache without the site.
    """
    x, t, y = corrupted_inputs
    if index_axis_names[:1] != ("layer",) or not set(index_axis_names[1:]) <= set(SIZES):
        raise InvalidValue(
            f"index_axis_names is {index_axis_names}; expected 'layer' first, then 'pos' and/or "
            "'head'."
        )
    names = [model.resolve(activation_name, layer) for layer in range(model.cfg.n_layers)]
    axes = model.sites[names[0]]
    places = []
    for index_axis in index_axis_names[1:]:
        wanted = {"pos": ("token", "query"), "head": ("head",)}[
            index_axis
        ]  # TransformerLens says pos for a token, and for a pattern's query
        if not set(wanted) & set(axes):
            raise InvalidValue(
                f"{names[0]!r} has the axes {list(axes)}; index_axis_names={index_axis_names} asks "
                "for one that it does not have."
            )
        places.append(next(i for i, axis in enumerate(axes) if axis in wanted))
    items, sizes = len(x), [SIZES[name](model.cfg) for name in index_axis_names[1:]]
    chosen = list(itertools.product(*(range(size) for size in sizes)))
    _, streams = model.run_with_cache(x, t, y, names_filter="resid_pre")
    result = torch.empty(model.cfg.n_layers, len(chosen))
    for layer, name in enumerate(names):
        clean = clean_cache[name]
        if len(clean) != items:
            raise InvalidValue(
                f"The clean cache has a batch of {len(clean)} and the corrupted inputs one of "
                f"{items}; expected the same."
            )
        for start in range(0, len(chosen), max(1, batch // items)):
            some = chosen[start : start + max(1, batch // items)]

            def put(
                activation: Tensor,
                hook: object,
                some: list[tuple[int, ...]] = some,
                clean: Tensor = clean,
            ) -> Tensor:
                for row, index in enumerate(some):
                    where: list[slice | int] = [slice(None)] * activation.ndim
                    for place, i in zip(places, index, strict=True):
                        where[place] = i
                    activation[row * items : (row + 1) * items][tuple(where)] = clean[tuple(where)]
                return activation

            stacked = [
                v.repeat(len(some), *[1] * (v.ndim - 1))
                for v in (streams["resid_pre", layer], t.expand(items), y.expand(items))
            ]
            with torch.no_grad(), model.hooks([(name, put)]):
                outputs = model(*stacked, start_at_layer=layer)
            for row, output in enumerate(outputs.split(items)):
                result[layer, start + row] = float(
                    torch.as_tensor(patching_metric(output)).detach()
                )
    return result.view(model.cfg.n_layers, *sizes)


def _fixed(
    activation_name: str, *axes: Axis
) -> Callable[[HookedDiT, Inputs, ActivationCache, Metric], Tensor]:
    return functools.partial(
        generic_activation_patch, activation_name=activation_name, index_axis_names=("layer", *axes)
    )


get_act_patch_resid_pre = _fixed("resid_pre", "pos")
get_act_patch_resid_mid = _fixed("resid_mid", "pos")
get_act_patch_attn_out = _fixed("attn_out", "pos")
get_act_patch_mlp_out = _fixed("mlp_out", "pos")
get_act_patch_attn_head_out_by_pos = _fixed("attn.hook_z", "pos", "head")
get_act_patch_attn_head_q_by_pos = _fixed("attn.hook_q", "pos", "head")
get_act_patch_attn_head_k_by_pos = _fixed("attn.hook_k", "pos", "head")
get_act_patch_attn_head_v_by_pos = _fixed("attn.hook_v", "pos", "head")
get_act_patch_attn_head_out_all_pos = _fixed("attn.hook_z", "head")
get_act_patch_attn_head_q_all_pos = _fixed("attn.hook_q", "head")
get_act_patch_attn_head_k_all_pos = _fixed("attn.hook_k", "head")
get_act_patch_attn_head_v_all_pos = _fixed("attn.hook_v", "head")
get_act_patch_attn_head_pattern_all_pos = _fixed("attn.hook_pattern", "head")


def get_act_patch_block_every(
    model: HookedDiT, corrupted_inputs: Inputs, clean_cache: ActivationCache, metric: Metric
) -> Tensor:
    """The stream that enters the layer, its attention and its MLP: [3, layer, pos]."""
    each = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([patch(model, corrupted_inputs, clean_cache, metric) for patch in each])


def get_act_patch_attn_head_all_pos_every(
    model: HookedDiT, corrupted_inputs: Inputs, clean_cache: ActivationCache, metric: Metric
) -> Tensor:
    """Output, query, key, value and pattern of each head: [5, layer, head]."""
    each = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return torch.stack([patch(model, corrupted_inputs, clean_cache, metric) for patch in each])
