"""Patching a single forward, with the names, argument order and result shapes of
`transformer_lens.patching`.

    _, clean_cache = model.run_with_cache(x_clean, t, y)
    # [layer, pos], pos the token
    get_act_patch_resid_pre(model, (x_corrupted, t, y), clean_cache, metric)

In place of `corrupted_tokens` stand the model's inputs (x, t, y), and the metric is given the
model's output, [batch, *latent_shape], in place of logits. Every patch is exact. Patches of one
layer are stacked along the batch; where a pass can start at a layer (`model.cfg.restartable`), they
start from the corrupted stream that enters theirs. For patches over a denoising run see
`dit_lens.patching.sweep`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..families.config import Condition
from ..hooks.cache import ActivationCache
from ..hooks.points import HookPoint
from ..model.hooked import HookedDiT

Inputs = tuple[Tensor, Tensor, Any]
Metric = Callable[[Tensor], Tensor | float]
Axis = Literal["layer", "pos", "head"]
AXES = {
    "pos": ("token", "query", "text_token", "text_query"),
    "head": ("head", "cross_head", "kv_head"),
}
"""What TransformerLens's axes are called here: pos is a token, and a pattern's query."""


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
    """The metric after each patch of the clean activation into the corrupted forward.

    Args:
        model: a `HookedDiT`.
        corrupted_inputs: (x [batch, *latent_shape], t, y), as the model is called.
        clean_cache: from `run_with_cache` on the same batch, with the site in every layer.
        patching_metric: called with the output of each patch, [batch, *latent_shape].
        activation_name: a site with a batch axis first and those of `index_axis_names` among the
            others: "resid_pre", "attn.hook_z", "text.attn_out", ...
        index_axis_names: "layer", then "pos" (a token) and/or "head": what is patched one by one.
        batch: images that run at once, at least one patch's.

    Returns:
        The metric, one axis for each of `index_axis_names`, on the CPU.

    Raises:
        ValueError: for axes that the site does not have, a cache of another batch.
        KeyError: for a cache without the site.

    >>> import dit_lens, torch; from dit_lens.groundtruth import planted
    >>> model = dit_lens.HookedDiT(planted(layers=(1,), n_layers=2).transformer)
    >>> x, t, y = torch.zeros(1, 3, 8, 8), torch.tensor([500]), torch.tensor([0])
    >>> _, cache = model.run_with_cache(x + 1, t, y, names_filter="z")
    >>> generic_activation_patch(
    ...     model, (x, t, y), cache, torch.sum, "attn.hook_z", ("layer", "head")
    ... ).shape
    torch.Size([2, 2])
    """
    # Which axes of the activation are gone through.
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    arguments.instance(
        "clean_cache", clean_cache, ActivationCache, "an ActivationCache, from run_with_cache"
    )
    arguments.function("patching_metric", patching_metric, "of the output, [batch, ...]")
    arguments.text("activation_name", activation_name)
    batch = arguments.whole("batch", batch, 1)
    if not isinstance(corrupted_inputs, (tuple, list)) or len(corrupted_inputs) != 3:
        raise arguments.refusal("corrupted_inputs", corrupted_inputs, "(x, t, y)", wrong_type=True)
    arguments.tensor("x", corrupted_inputs[0], (None, *[None] * len(model.cfg.latent_shape)))
    index_axis_names = tuple(
        arguments.listed("index_axis_names", index_axis_names, "'layer', 'pos', 'head'")
    )
    if index_axis_names[:1] != ("layer",) or not set(index_axis_names[1:]) <= set(AXES):
        raise InvalidValue(
            f"index_axis_names is {index_axis_names}; expected 'layer' first, then 'pos' and/or "
            "'head'."
        )
    names = [model.resolve(activation_name, layer) for layer in range(model.cfg.n_layers)]
    axes = model.sites[names[0]]
    places = []
    for index_axis in index_axis_names[1:]:
        fitting = [i for i, axis in enumerate(axes) if axis in AXES[index_axis]]
        if not fitting:
            raise InvalidValue(
                f"{names[0]!r} has the axes {list(axes)}; index_axis_names={index_axis_names} asks "
                "for one that it does not have."
            )
        places.append(fitting[0])
    x, t, y = corrupted_inputs
    items = len(x)
    for name in names:
        if len(clean_cache[name]) != items:
            raise InvalidValue(
                f"The clean cache has a batch of {len(clean_cache[name])} and the corrupted inputs "
                f"one of {items}; expected the same."
            )
    sizes = [clean_cache[names[0]].shape[place] for place in places]

    # Where each layer's patches start from.
    chosen = list(itertools.product(*(range(size) for size in sizes)))
    restartable, per = model.cfg.restartable, max(1, batch // items)
    streams: ActivationCache | None = None
    if restartable:
        _, streams = model.run_with_cache(x, t, y, names_filter="resid_pre")

    # Layer by layer, as many patches at once as fit.
    result = torch.empty(model.cfg.n_layers, len(chosen))
    for layer, name in enumerate(names):
        begin = x if streams is None else streams["resid_pre", layer]
        for start in range(0, len(chosen), per):
            some = chosen[start : start + per]
            put = _editor(clean_cache[name], places, some)
            stacked = [_repeated(value, items, len(some)) for value in (begin, t, y)]
            with torch.no_grad(), model.hooks([(name, put)]):
                outputs = model(*stacked, start_at_layer=layer if restartable else None)
            for row, output in enumerate(outputs.split(items)):
                value = torch.as_tensor(patching_metric(output))
                result[layer, start + row] = float(value.detach())
    return result.view(model.cfg.n_layers, *sizes)


def _editor(
    clean: Tensor, places: list[int], some: list[tuple[int, ...]]
) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that makes each patch in the rows of its own."""
    items = len(clean)

    def put(activation: Tensor, hook: HookPoint) -> Tensor:
        for row, index in enumerate(some):
            where: list[slice | int] = [slice(None)] * activation.ndim
            for place, i in zip(places, index, strict=True):
                where[place] = i
            activation[row * items : (row + 1) * items][tuple(where)] = clean[tuple(where)]
        return activation

    return put


def _repeated(value: Any, items: int, n: int) -> Any:
    """One of the model's inputs for n times the batch."""
    if isinstance(value, dict):
        return Condition({name: _repeated(part, items, n) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        return list(value) * n
    if not isinstance(value, Tensor):
        return value
    if value.ndim < 2:
        return value.expand(items).repeat(n)
    return value.repeat(n, *[1] * (value.ndim - 1)) if len(value) == items else value


class ActivationPatch(Protocol):
    """A function that patches one site, as `get_act_patch_resid_pre` does."""

    def __call__(
        self,
        model: HookedDiT,
        corrupted_inputs: Inputs,
        clean_cache: ActivationCache,
        patching_metric: Metric,
        *,
        batch: int = 64,
    ) -> Tensor: ...


def _patching(function: str, what: str, activation_name: str, *axes: Axis) -> ActivationPatch:
    """The function of one site: `generic_activation_patch` with two arguments fixed."""

    def patch(
        model: HookedDiT,
        corrupted_inputs: Inputs,
        clean_cache: ActivationCache,
        patching_metric: Metric,
        *,
        batch: int = 64,
    ) -> Tensor:
        return generic_activation_patch(
            model,
            corrupted_inputs,
            clean_cache,
            patching_metric,
            activation_name,
            ("layer", *axes),
            batch=batch,
        )

    shape = ", ".join(str({"layer": 2, "pos": 64, "head": 2}[axis]) for axis in ("layer", *axes))
    patch.__name__ = patch.__qualname__ = function
    patch.__doc__ = f"""The metric after each patch of {what}, [{", ".join(("layer", *axes))}].

    Args:
        model: a `HookedDiT`.
        corrupted_inputs: (x [batch, *latent_shape], t, y), as the model is called.
        clean_cache: from `run_with_cache` on the same batch, with {activation_name!r} in every
            layer.
        patching_metric: called with the output of each patch, [batch, *latent_shape].
        batch: images that run at once, at least one patch's.

    Returns:
        The metric, [{", ".join(("layer", *axes))}], on the CPU.

    Raises:
        ValueError: for a cache of another batch.
        KeyError: for a cache without {activation_name!r}.

    >>> import dit_lens, torch; from dit_lens.groundtruth import planted
    >>> model = dit_lens.HookedDiT(planted(layers=(1,), n_layers=2).transformer)
    >>> x, t, y = torch.zeros(1, 3, 8, 8), torch.tensor([500]), torch.tensor([0])
    >>> _, cache = model.run_with_cache(x + 1, t, y)
    >>> patch = dit_lens.patching.{function}
    >>> patch(model, (x, t, y), cache, torch.sum).shape
    torch.Size([{shape}])
    """
    return patch


get_act_patch_resid_pre = _patching(
    "get_act_patch_resid_pre", "the stream that enters the layer", "resid_pre", "pos"
)
get_act_patch_resid_mid = _patching(
    "get_act_patch_resid_mid", "the stream between attention and MLP", "resid_mid", "pos"
)
get_act_patch_attn_out = _patching(
    "get_act_patch_attn_out", "what attention adds to the stream", "attn_out", "pos"
)
get_act_patch_mlp_out = _patching(
    "get_act_patch_mlp_out", "what the MLP adds to the stream", "mlp_out", "pos"
)
get_act_patch_attn_head_out_by_pos = _patching(
    "get_act_patch_attn_head_out_by_pos", "one head's output", "attn.hook_z", "pos", "head"
)
get_act_patch_attn_head_q_by_pos = _patching(
    "get_act_patch_attn_head_q_by_pos", "one head's query", "attn.hook_q", "pos", "head"
)
get_act_patch_attn_head_k_by_pos = _patching(
    "get_act_patch_attn_head_k_by_pos", "one head's key", "attn.hook_k", "pos", "head"
)
get_act_patch_attn_head_v_by_pos = _patching(
    "get_act_patch_attn_head_v_by_pos", "one head's value", "attn.hook_v", "pos", "head"
)
get_act_patch_attn_head_out_all_pos = _patching(
    "get_act_patch_attn_head_out_all_pos", "one head's output", "attn.hook_z", "head"
)
get_act_patch_attn_head_q_all_pos = _patching(
    "get_act_patch_attn_head_q_all_pos", "one head's queries", "attn.hook_q", "head"
)
get_act_patch_attn_head_k_all_pos = _patching(
    "get_act_patch_attn_head_k_all_pos", "one head's keys", "attn.hook_k", "head"
)
get_act_patch_attn_head_v_all_pos = _patching(
    "get_act_patch_attn_head_v_all_pos", "one head's values", "attn.hook_v", "head"
)
get_act_patch_attn_head_pattern_all_pos = _patching(
    "get_act_patch_attn_head_pattern_all_pos", "one head's pattern", "attn.hook_pattern", "head"
)


def get_act_patch_block_every(
    model: HookedDiT, corrupted_inputs: Inputs, clean_cache: ActivationCache, metric: Metric
) -> Tensor:
    """The metric after each patch of the stream that enters the layer, of its attention and of its
    MLP.

    Args:
        model: a `HookedDiT`.
        corrupted_inputs: (x [batch, *latent_shape], t, y), as the model is called.
        clean_cache: from `run_with_cache` on the same batch.
        metric: called with the output of each patch, [batch, *latent_shape].

    Returns:
        The metric, [3, layer, pos], on the CPU.

    Raises:
        ValueError: for a cache of another batch.
        KeyError: for a cache without one of the three sites.

    >>> import dit_lens, torch; from dit_lens.groundtruth import planted
    >>> model = dit_lens.HookedDiT(planted(layers=(1,), n_layers=2).transformer)
    >>> x, t, y = torch.zeros(1, 3, 8, 8), torch.tensor([500]), torch.tensor([0])
    >>> _, cache = model.run_with_cache(x + 1, t, y)
    >>> get_act_patch_block_every(model, (x, t, y), cache, torch.sum).shape
    torch.Size([3, 2, 64])
    """
    each = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([patch(model, corrupted_inputs, clean_cache, metric) for patch in each])


def get_act_patch_attn_head_all_pos_every(
    model: HookedDiT, corrupted_inputs: Inputs, clean_cache: ActivationCache, metric: Metric
) -> Tensor:
    """The metric after each patch of a head's output, queries, keys, values and pattern.

    Args:
        model: a `HookedDiT`.
        corrupted_inputs: (x [batch, *latent_shape], t, y), as the model is called.
        clean_cache: from `run_with_cache` on the same batch.
        metric: called with the output of each patch, [batch, *latent_shape].

    Returns:
        The metric, [5, layer, head], on the CPU.

    Raises:
        ValueError: for a cache of another batch.
        KeyError: for a cache without one of the five sites.

    >>> import dit_lens, torch; from dit_lens.groundtruth import planted
    >>> model = dit_lens.HookedDiT(planted(layers=(1,), n_layers=2).transformer)
    >>> x, t, y = torch.zeros(1, 3, 8, 8), torch.tensor([500]), torch.tensor([0])
    >>> _, cache = model.run_with_cache(x + 1, t, y)
    >>> get_act_patch_attn_head_all_pos_every(model, (x, t, y), cache, torch.sum).shape
    torch.Size([5, 2, 2])
    """
    each = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return torch.stack([patch(model, corrupted_inputs, clean_cache, metric) for patch in each])
