"""Families of Diffusion Transformers: the only place that knows how a block computes.

Belongs here: one module a family, which teaches dit_lens one model class, the kit that they share
(`parts`), and the registry. Does not: anything that runs, records or compares models.

Everything that a family's author needs is imported from here; docs/families.md is the guide,
examples/new_family.py a whole family.
"""

from ..hooks.passes import Pass
from .adapter import Adapter
from .base import Family, shift_of
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points, Tap, TransformerForward
from .original_dit import dit_from_original
from .parts.attention import Attend, HeadsOut, Kernel, dispatched, sdpa
from .parts.joint import (
    AnyPoints,
    Joint,
    JointPoint,
    Layout,
    Point,
    image_first,
    joint_points,
    text_first,
)
from .parts.layers import (
    AdaNormForward,
    ContinuousNormForward,
    LastTableForward,
    check_processor,
    final_norm,
    gated,
    neurons,
    refuse_chunks,
    refuse_processors,
)
from .parts.sites import (
    COND,
    FINAL_SITES,
    RESID,
    SAMPLE,
    TEXT,
    Axes,
    Sites,
    adaln_sites,
    attention_sites,
    both,
    cross_sites,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
    texts,
)
from .registry import family_named, family_of, modules, register
from .small import alive, flat, small_inputs, small_text, small_vae

__all__ = [
    "COND",
    "FINAL_SITES",
    "RESID",
    "SAMPLE",
    "TEXT",
    "AdaNormForward",
    "Adapter",
    "AnyPoints",
    "Attend",
    "Axes",
    "BlockForward",
    "Condition",
    "Config",
    "ContinuousNormForward",
    "Family",
    "Forward",
    "HeadsOut",
    "Joint",
    "JointPoint",
    "Kernel",
    "LastTableForward",
    "Layout",
    "Pass",
    "Point",
    "Points",
    "Sites",
    "Size",
    "Tap",
    "TransformerForward",
    "adaln_sites",
    "alive",
    "attention_sites",
    "both",
    "check_processor",
    "cross_sites",
    "dispatched",
    "dit_from_original",
    "family_named",
    "family_of",
    "final_norm",
    "flat",
    "gated",
    "image_config",
    "image_first",
    "joint_points",
    "mlp_sites",
    "modules",
    "neurons",
    "out_sites",
    "qkv_sites",
    "refuse_chunks",
    "refuse_processors",
    "register",
    "scores_sites",
    "sdpa",
    "shift_of",
    "small_inputs",
    "small_text",
    "small_vae",
    "text_first",
    "texts",
]
