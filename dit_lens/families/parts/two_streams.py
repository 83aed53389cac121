"""What FLUX.1 and Qwen-Image share: two streams that attend together, the text's tokens first, and
latents packed into 2x2 patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InvalidState, InvalidValue
from ...hooks.points import HookPoint
from ..base import COND, RESID, Axes, Condition, Config, Family, Forward, Points, Size, shift_of
from .attention import Attend, HeadsOut, Joint, dispatched
from .layers import check_processor
from .sites import (
    FINAL_SITES,
    adaln_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
    texts,
)

Streams = dict[str, Axes]
Angles = tuple[Tensor, Tensor]


def double_sites() -> Streams:
    """The names of a block with two streams."""
    first = adaln_sites() | {"ln1.hook_normalized": RESID, "attn.hook_in": RESID}
    qkv = qkv_sites(rotary=False)
    meet = {site: axes for site, axes in qkv_sites().items() if site not in qkv} | scores_sites(
        "attn."
    )
    later: Streams = {"hook_attn_out": RESID, "hook_resid_mid": RESID, "ln2.hook_normalized": RESID}
    later |= mlp_sites() | {"hook_mlp_out": RESID, "hook_resid_post": RESID}
    sites = (
        both({"hook_resid_pre": RESID})
        | {"hook_cond": COND}
        | first
        | texts(first)
        | qkv
        | texts(qkv)
    )
    return sites | both(meet) | out_sites() | texts(out_sites()) | later | texts(later)


def clipped(x: Tensor) -> Tensor:
    """In half precision what is too large for it becomes the largest number there is, as in
    diffusers.
    """
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class BlockForward(Forward):
    """What all blocks with an image and a text stream share: how the streams enter, and the second
    half of a double block.
    """

    def __init__(
        self, module: Any, points: Points, embeds: tuple[HookPoint, HookPoint] | None
    ) -> None:
        super().__init__(module)
        self.points, self.embeds = points, embeds

    def entered(self, x: Tensor, text: Tensor, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hook = self.points
        if self.embeds is not None:
            x, text = self.embeds[0](x), self.embeds[1](text)
        return hook["hook_resid_pre"](x), hook["text.hook_resid_pre"](text), hook["hook_cond"](cond)

    def second_half(
        self, stream: str, x: Tensor, out: Tensor, modulation: Sequence[Tensor], norm: Any, mlp: Any
    ) -> Tensor:
        """A stream with its attention's output and its MLP's added; `modulation`: gate of the one;
        shift, scale, gate of the other.
        """
        hook, (gate_attn, shift, scale, gate) = self.points, modulation
        x = hook[f"{stream}hook_resid_mid"](
            x + hook[f"{stream}hook_attn_out"](gate_attn.unsqueeze(1) * out)
        )
        h = hook[f"{stream}ln2.hook_normalized"](norm(x)) * (1 + scale[:, None]) + shift[:, None]
        out = hook[f"{stream}mlp.hook_out"](mlp(hook[f"{stream}mlp.hook_in"](h)))
        return x + hook[f"{stream}hook_mlp_out"](gate.unsqueeze(1) * out)


class AttentionForward(Forward):
    """The attention of a block with two streams; a subclass says how queries and keys are rotated."""

    processor: type
    prefixes = ("attn.", "text.attn.")

    def __init__(self, module: Any, points: Points, instrumentation: Any, layer: int) -> None:
        super().__init__(module)
        self.points, self.attend = points, Attend(points, instrumentation, layer, self.prefixes)
        self.heads_out = [HeadsOut(points, p) for p in self.prefixes if f"{p}hook_out" in points]

    def check(self) -> None:
        check_processor(self.module, self.processor)
        refuse_fused([self.module])

    def streams(self, h: Tensor, text_h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Normalised queries and keys, and values, [batch, token, head, d_head]: the image's and
        the text's.
        """
        attn = self.module
        image = self.qkv("attn.", h, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        return image, self.qkv("text.attn.", text_h, added, (attn.norm_added_q, attn.norm_added_k))

    def qkv(
        self, prefix: str, h: Tensor, projections: Sequence[Any], norms: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        parts = zip("qkv", projections, strict=True)
        q, k, v = (
            self.points[f"{prefix}hook_{n}"](p(h).unflatten(-1, (self.module.heads, -1)))
            for n, p in parts
        )
        return norms[0](q), norms[1](k), v

    def hooked(self, joint: Joint, name: str, x: Tensor) -> Tensor:
        return joint.hook(self.points[f"attn.{name}"], self.points[f"text.attn.{name}"], x)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, joint: Joint) -> Tensor:
        """What the heads read, of queries and keys as they meet and of values; all [batch, token,
        head, d_head].
        """
        q, k = self.hooked(joint, "hook_rot_q", q), self.hooked(joint, "hook_rot_k", k)
        kernel = dispatched(self.module.processor)
        z = self.attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, kernel, joint=joint
        )
        return z.transpose(1, 2).to(q.dtype)

    def answers(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int
    ) -> tuple[Tensor, Tensor]:
        """The attention's output to the image and to the text, whose n tokens come first."""
        z = self.read(q, k, v, mask, Joint(slice(n, None), slice(0, n)))
        image, text = self.heads_out
        return image(z[:, n:].contiguous(), *self.module.to_out), text(
            z[:, :n].contiguous(), self.module.to_add_out
        )


def refuse_fused(attentions: Sequence[Any]) -> None:
    """Raise RuntimeError where queries, keys and values come from one fused projection."""
    if any(getattr(attn, "fused_projections", False) for attn in attentions):
        raise InvalidState(
            "The attention's projections are fused, and their parts have no modules of their own "
            "to hook; "
            "call transformer.unfuse_qkv_projections() first."
        )


def pack(x: Tensor) -> Tensor:
    """Latents [batch, channel, height, width] as tokens [batch, height/2 * width/2, 4 channel],
    each a 2x2 patch.
    """
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, grid: Size) -> Tensor:
    """The reverse, for tokens that lie in a (height, width) grid."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


class PackedFamily(Family):
    """Models that are given latents as packed patches, and time from 0 to 1.

    The family says what the grid is.
    """

    batch_order = None
    final = FINAL_SITES | {"hook_sample": FINAL_SITES["final.hook_out"]}

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c, channels = transformer.config, self.channels(transformer)
        d_model = c.num_attention_heads * c.attention_head_dim
        # the pipelines' own; our small models have another
        height, width = size or c.get("sample_size") or (128, 128)
        if height % 2 or width % 2:
            raise InvalidValue(
                f"Latents of {height}x{width} can't be packed into 2x2 patches; expected even "
                "height and width."
            )
        return Config(
            n_layers=len(self.blocks(transformer)),
            d_model=d_model,
            n_heads=c.num_attention_heads,
            d_head=c.attention_head_dim,
            d_mlp=4 * d_model,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            latent_shape=(channels, height, width),
            grid=(height // 2, width // 2),
            restartable=False,
            distilled_guidance=c.guidance_embeds,
        )

    def channels(self, transformer: Any) -> int:
        """How many channels x_t has."""
        return int(transformer.config.patch_size**2 * transformer.out_channels // 4)

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        wanted = transformer.config.in_channels // 4
        if x.shape[1] != wanted:
            raise InvalidValue(
                f"The latents have {x.shape[1]} channels; this transformer takes {wanted}. Where "
                "some of them are an image to fill or to "
                "follow, dit_lens traces the pipeline and does not sample by itself."
            )
        return {"hidden_states": pack(x), "timestep": t.to(x.dtype) / 1000, **condition}

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        return self.output(transformer, inputs["hidden_states"], inputs)

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        # where further images are given, x_t comes before them
        height, width = self.grid(transformer, inputs)
        return unpack(
            answer[:, : height * width, : 4 * self.channels(transformer)], (height, width)
        )

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        t: Tensor = inputs["timestep"]
        return t * 1000

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        options: dict[str, Any] = {
            "sigmas": np.linspace(1.0, 1 / steps, steps),
            "mu": shift_of(scheduler, tokens),
        }
        taken = inspect.signature(scheduler.set_timesteps).parameters
        if scheduler.config.get("use_flow_sigmas") or not options.keys() <= taken.keys():
            super().set_timesteps(scheduler, steps, tokens)
        else:
            scheduler.set_timesteps(**options)

    def small_call(self, guided: bool) -> dict[str, Any]:
        call = super().small_call(guided)
        # these pipelines guide by a second call only if they are told what not to show
        del call["guidance_scale"]
        null = {"negative_prompt": ["", ""], "true_cfg_scale": 4.0}
        return call | (null if guided else {"true_cfg_scale": 1.0})

    def passed(
        self, inputs: dict[str, Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        x, text = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
        return x, lambda stream: (text, stream)

    def leaving(self, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream: Tensor = returned[1]
        return stream
