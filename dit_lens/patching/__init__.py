"""Interventions on a denoising run: patches, exact sweeps of them, paths, attribution.

Belongs here: what a patch is, and ways to run many of them. Does not: what is concluded about the
gap (`experiments`).

    from dit_lens.patching import as_grid, grid, sweep, tiles

    patches = grid(range(28), ["attn_out", "mlp_out"], tiles(0, 50, 5))
    moves = as_grid(sweep(source, target, patches)).move    # [layer, site, window, item, band]

- `Patch`, `grid`, `tiles`: what is put where, and many of them.
- `sweep`, `as_grid`: run every patch exactly, sharing what they have in common.
- `attribute`: the same effects by gradients, to first order.
- `path_patch`: the effect of a sender that goes through chosen receivers alone.
- `generic_activation_patch`, `get_act_patch_*`: `transformer_lens.patching`, on a single forward.
"""

from .act_patch import (
    generic_activation_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from .attribution import attribute
from .patch import Patch, grid, tiles
from .paths import path_patch
from .sweep import as_grid, sweep

__all__ = [
    "Patch",
    "as_grid",
    "attribute",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "grid",
    "path_patch",
    "sweep",
    "tiles",
]
