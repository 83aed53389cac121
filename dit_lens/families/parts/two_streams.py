"""What FLUX.1 and Qwen-Image share: two streams that attend together, the text's tokens first, and
latents packed into 2x2 patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InvalidState, InvalidValue
from ...hooks.passes import Pass
from ..base import Family, Skipped, shift_of
from ..config import Condition, Config, Size, image_config
from ..forwards import BlockForward, Forward, Points
from .attention import Attend, HeadsOut, dispatched
from .joint import joint_points, text_first
from .layers import check_processor
from .sites import (
    COND,
    FINAL_SITES,
    RESID,
    Sites,
    adaln_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
    texts,
)

Angles = tuple[Tensor, Tensor]


def double_sites() -> Sites:
    """The names of a block with two streams."""
    first = adaln_sites() | {"ln1.hook_normalized": RESID, "attn.hook_in": RESID}
    qkv = qkv_sites(rotary=False)
    meet = {site: axes for site, axes in qkv_sites().items() if site not in qkv}
    meet |= scores_sites("attn.")
    later: Sites = {"hook_attn_out": RESID, "hook_resid_mid": RESID, "ln2.hook_normalized": RESID}
    later |= mlp_sites() | {"hook_mlp_out": RESID, "hook_resid_post": RESID}
    sites = both({"hook_resid_pre": RESID}) | {"hook_cond": COND} | first | texts(first)
    sites |= qkv | texts(qkv) | both(meet) | out_sites() | texts(out_sites())
    return sites | later | texts(later)


def clipped(x: Tensor) -> Tensor:
    """A stream within half precision: what is too large becomes the largest number there is, as in
    diffusers.

    Args:
        x: the stream.
    """
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class TwoStreamsForward(BlockForward):
    """What all blocks with an image and a text stream share: how the streams enter, and the second
    half of a double block.
    """

    def entered(self, x: Tensor, text: Tensor, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, text and conditioning vector, each after its hook points.

        Args:
            x: the image's stream.
            text: the text's stream.
            cond: the conditioning vector.
        """
        return *self.enter_both(x, text), self.points["hook_cond"](cond)

    def second_half(
        self, stream: str, x: Tensor, out: Tensor, modulation: Sequence[Tensor], norm: Any, mlp: Any
    ) -> Tensor:
        """A stream with its attention's output and its MLP's added.

        Args:
            stream: the stream's prefix.
            x: the stream.
            out: the attention's output to it.
            modulation: the attention's gate; shift, scale and gate of the MLP.
            norm: the norm before the MLP.
            mlp: the MLP.
        """
        hook, (gate_attn, shift, scale, gate) = self.points, modulation
        added = hook[f"{stream}hook_attn_out"](gate_attn.unsqueeze(1) * out)
        x = hook[f"{stream}hook_resid_mid"](x + added)
        h = hook[f"{stream}ln2.hook_normalized"](norm(x)) * (1 + scale[:, None]) + shift[:, None]
        out = hook[f"{stream}mlp.hook_out"](mlp(hook[f"{stream}mlp.hook_in"](h)))
        return x + hook[f"{stream}hook_mlp_out"](gate.unsqueeze(1) * out)


class AttentionForward(Forward):
    """The attention of a block with two streams; a subclass says how queries and keys are rotated.

    Args:
        module: the attention.
        points: the block's hook points.
        current_pass: the pass that it will run in.
        layer: the block's number.
    """

    processor: type

    def __init__(self, module: Any, points: Points, current_pass: Pass, layer: int) -> None:
        super().__init__(module)
        self.points, self.joint = points, joint_points(points, current_pass, text_first)
        self.attend = Attend(self.joint, current_pass, layer)

    def check(self) -> None:
        """Refuse what was switched on after the model was opened."""
        check_processor(self.module, self.processor)
        refuse_fused([self.module])

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the heads read; all [batch, token, head, d_head].

        Args:
            q: queries of both streams as they meet the keys.
            k: keys of both streams.
            v: values of both streams.
            mask: as for `Attend`.
        """
        q, k = self.joint["attn.hook_rot_q"](q), self.joint["attn.hook_rot_k"](k)
        kernel = dispatched(self.module.processor)
        z = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, kernel)
        return z.transpose(1, 2).to(q.dtype)


class DoubleAttentionForward(AttentionForward):
    """The attention of a block in which each stream has projections of its own.

    Args:
        module: the attention.
        points: the block's hook points.
        current_pass: the pass that it will run in.
        layer: the block's number.
    """

    def __init__(self, module: Any, points: Points, current_pass: Pass, layer: int) -> None:
        super().__init__(module, points, current_pass, layer)
        self.image_out, self.text_out = HeadsOut(points), HeadsOut(points, "text.attn.")

    def streams(self, h: Tensor, text_h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Normalised queries and keys, and values, [batch, token, head, d_head]: the image's and
        the text's.

        Args:
            h: what the attention is given of the image.
            text_h: what it is given of the text.
        """
        attn = self.module
        image = self._qkv("attn.", h, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k)
        return image, self._qkv("text.attn.", text_h, added, norms)

    def _qkv(
        self, prefix: str, h: Tensor, projections: Sequence[Any], norms: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        parts = zip("qkv", projections, strict=True)
        q, k, v = (
            self.points[f"{prefix}hook_{n}"](p(h).unflatten(-1, (self.module.heads, -1)))
            for n, p in parts
        )
        return norms[0](q), norms[1](k), v

    def answers(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int
    ) -> tuple[Tensor, Tensor]:
        """The attention's output to the image and to the text.

        Args:
            q: queries of both streams [batch, token, head, d_head].
            k: keys of both streams.
            v: values of both streams.
            mask: as for `Attend`.
            n: how many of the tokens, the first ones, are text.
        """
        z, attn = self.read(q, k, v, mask), self.module
        image = self.image_out(z[:, n:].contiguous(), *attn.to_out)
        return image, self.text_out(z[:, :n].contiguous(), attn.to_add_out)


def refuse_fused(attentions: Sequence[Any]) -> None:
    """Refuse queries, keys and values that come from one fused projection.

    Args:
        attentions: the attentions.

    Raises:
        InvalidState: if one of them is fused.
    """
    if any(getattr(attn, "fused_projections", False) for attn in attentions):
        raise InvalidState(
            "The attention's projections are fused, and their parts have no modules of their own "
            "to hook; call transformer.unfuse_qkv_projections() first."
        )


def pack(x: Tensor) -> Tensor:
    """Latents as tokens [batch, height/2 * width/2, 4 channel], each a 2x2 patch.

    Args:
        x: latents [batch, channel, height, width].
    """
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, grid: Size) -> Tensor:
    """The reverse of `pack`.

    Args:
        tokens: [batch, token, 4 channel].
        grid: (height, width) in tokens.
    """
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


class PackedFamily(Family):
    """Models that are given latents as packed patches, and time from 0 to 1.

    The family says what the grid is.
    """

    batch_order = None
    first_sites = both({"hook_embed": RESID})
    last_sites = {**FINAL_SITES, "hook_sample": FINAL_SITES["final.hook_out"]}

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c, channels = transformer.config, self.channels(transformer)
        # the pipelines' own; our small models have another
        height, width = size or c.get("sample_size") or (128, 128)
        if height % 2 or width % 2:
            raise InvalidValue(
                f"Latents of {height}x{width} can't be packed into 2x2 patches; expected even "
                "height and width."
            )
        return image_config(
            transformer,
            (height, width),
            n_layers=len(self.blocks(transformer)),
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            latent_shape=(channels, height, width),
            grid=(height // 2, width // 2),
            restartable=False,
            distilled_guidance=c.guidance_embeds,
            joint=True,
        )

    def channels(self, transformer: Any) -> int:
        """How many channels x_t has.

        Args:
            transformer: the transformer.
        """
        return int(transformer.config.patch_size**2 * transformer.out_channels // 4)

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        wanted = transformer.config.in_channels // 4
        if x.shape[1] != wanted:
            raise InvalidValue(
                f"The latents have {x.shape[1]} channels; this transformer takes {wanted}. Where "
                "some of them are an image to fill or to follow, dit_lens traces the pipeline and "
                "does not sample by itself."
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

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        x, text = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
        return {"": x, "text.": text}, lambda found: (found["text."], found[""])

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream: Tensor = returned[1]
        return stream
