"""SANA and SANA-Sprint (Xie et al. 2024, arXiv 2410.10629; Chen et al. 2025, arXiv 2503.09641) as
diffusers' `SanaTransformer2DModel`.

A block attends to itself, then to the text, which the blocks leave as it is, then comes the MLP.
One vector of the time, and in Sprint of guidance, serves the whole model (`hook_cond`, before the
first block); to its projection each block adds a table of its own, which gives the six
`adaln.hook_*`. The cross-attention has no modulation, and reads the stream as it is.

Self-attention is linear: each head reads sum_j v_j relu(k_j)·relu(q_i) / sum_j relu(k_j)·relu(q_i).
Without scores and softmax there are no `attn.hook_attn_scores` and `attn.hook_pattern`; twins
couple by the gate "mix". Where queries and keys are normalised, all heads at once, `hook_rot_q` and
`hook_rot_k` are what comes out, before the relu. Cross-attention is softmax attention, with heads
of another number and size, hence the axes `cross_head` and `d_cross_head`.

The MLP is a gated one with a convolution in it: every token's channels are widened, each channel is
smoothed over the 3x3 neighbouring tokens, and half of them gate the others. So `mlp.hook_pre` and
`hook_pre_linear` at a token already know its neighbours' `mlp.hook_in`; `post = pre_linear *
act(pre)` and `hook_out` are of one token again. The neurons are images; hooks are given them as
tokens.

Sprint is a flow-matching network with guidance distilled into an input; its pipeline rewrites a
trigonometric schedule into the flow's time. dit_lens speaks to the network: latents as they enter
it, timesteps 1000 times the flow's time, the flow's velocity as output.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from ..arguments import shown
from ..errors import InvalidValue
from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .base import Family
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points
from .parts.attention import Attend, HeadsOut, Kernel, sdpa
from .parts.layers import check_processor, refuse_processors
from .parts.sites import (
    COND,
    RESID,
    Sites,
    adaln_sites,
    cross_sites,
    mlp_sites,
    out_sites,
    qkv_sites,
)
from .parts.words import Text
from .registry import register
from .small import alive, small_text

CROSS = {"head": "cross_head", "d_head": "d_cross_head"}
GUIDANCE = 4.5  # the Sprint pipeline's default strength


class LinearKernel:
    """Attention with relu in place of the softmax, in float32; q, k, v [batch, head, token,
    d_head].
    """

    linear = True  # no softmax that twins could share

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = F.relu(q).transpose(2, 3).float(), F.relu(k).float(), v.transpose(2, 3).float()
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # one more channel, of ones, sums up the weights
        z = torch.matmul(torch.matmul(v, k), q)
        return (z[:, :, :-1] / (z[:, :, -1:] + 1e-15)).transpose(2, 3)


def modulations(points: Sequence[HookPoint], vectors: Tensor) -> list[Tensor]:
    """Modulations after their hook points, each [batch, 1, d_model] to be broadcast over the
    stream.

    Args:
        points: their hook points.
        vectors: all of them [batch, n, d_model].
    """
    return [
        p(v.squeeze(1)).unsqueeze(1)
        for p, v in zip(points, vectors.chunk(len(points), dim=1), strict=True)
    ]


class TimeForward(Forward):
    """The vector of the time, and of guidance where the model takes it, and the projection of which
    all modulations are made.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.cond = points["hook_cond"]

    def __call__(
        self,
        timestep: Tensor,
        guidance: Tensor | None = None,
        hidden_dtype: Any = None,
        **size: Any,
    ) -> Any:
        embed = self.module
        if guidance is None:
            cond = embed.emb(
                timestep, resolution=None, aspect_ratio=None, hidden_dtype=hidden_dtype, **size
            )
        else:
            cond = embed.timestep_embedder(embed.time_proj(timestep).to(hidden_dtype))
            cond = cond + embed.guidance_embedder(
                embed.guidance_condition_proj(guidance).to(hidden_dtype)
            )
        cond = self.cond(cond)
        return embed.linear(embed.silu(cond)), cond


class SanaBlockForward(BlockForward):
    """One block: self-attention, cross-attention and MLP, the first and the last modulated and
    gated.

    Args:
        module: the block.
        points: its hook points.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module, points)
        self.modulations = [points[name] for name in adaln_sites()]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        block, hook = self.module, self.points
        x = self.enter(hidden_states)
        sums = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations(self.modulations, sums)

        # self-attention
        h = hook["ln1.hook_normalized"](block.norm1(x)) * (1 + scale) + shift
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](gate * block.attn1(h.to(x.dtype))))

        # cross-attention
        out = block.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x = hook["hook_resid_mid_cross"](hook["hook_cross_attn_out"](out) + x)

        # MLP, on the tokens as an image
        h = hook["ln2.hook_normalized"](block.norm2(x)) * (1 + scale_mlp) + shift_mlp
        image = hook["mlp.hook_in"](h).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        out = hook["mlp.hook_out"](block.ff(image).flatten(2, 3).permute(0, 2, 1))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](gate_mlp * out))


class CrossAttentionForward(Forward):
    """Attention of the image to the text, with softmax and a mask.

    Args:
        module: the attention.
        points: the block's hook points.
        current_pass: the pass that it will run in.
        layer: the block's number; None, as twins are never coupled here.
    """

    prefix, processor, clips = "cross_attn.", SanaAttnProcessor2_0, False
    kernel: Kernel = staticmethod(sdpa)

    def __init__(self, module: Any, points: Points, current_pass: Pass, layer: int | None) -> None:
        super().__init__(module)
        self.points = points
        self.attend = Attend(points, current_pass, layer, self.prefix)
        self.heads_out = HeadsOut(points, self.prefix)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attn = self.module
        check_processor(attn, self.processor)
        x = self.points[f"{self.prefix}hook_in"](hidden_states)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x, source))
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, source.shape[1], len(source))
            attention_mask = mask.view(len(source), attn.heads, -1, mask.shape[-1])
        z = self.attend(q, k, v, attention_mask, self.kernel).transpose(1, 2).to(x.dtype)
        return self.heads_out(z, attn.to_out[0], partial(self.finish, dtype=x.dtype))

    def qkv(self, x: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [batch, token, head, d_head]; a norm is over all heads at once.

        Args:
            x: what asks [batch, token, d_model].
            source: what is asked.
        """
        attn, hook, heads = self.module, self.points, (self.module.heads, -1)
        parts = zip("qkv", (attn.to_q(x), attn.to_k(source), attn.to_v(source)), strict=True)
        q, k, v = (
            hook[f"{self.prefix}hook_{name}"](part.unflatten(2, heads)) for name, part in parts
        )
        if attn.norm_q is not None:
            normed = zip("qk", (attn.norm_q(q.flatten(2)), attn.norm_k(k.flatten(2))), strict=True)
            q, k = (
                hook[f"{self.prefix}hook_rot_{name}"](part.unflatten(2, heads))
                for name, part in normed
            )
        return q, k, v

    def finish(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """What follows the output projection.

        Args:
            out: what the projection put out.
            dtype: of what entered the attention.
        """
        out = self.module.to_out[1](out)
        return out.clip(-65504, 65504) if self.clips and dtype == torch.float16 else out


class LinearAttentionForward(CrossAttentionForward):
    """Attention of the image to itself, which is linear and has no scores."""

    prefix, processor, clips = "attn.", SanaLinearAttnProcessor2_0, True
    kernel = LinearKernel()


def as_tokens(point: HookPoint, image: Tensor) -> Tensor:
    """An image after a hook point that is given it as tokens.

    Args:
        point: the hook point, called with [batch, token, channel].
        image: [batch, channel, height, width].
    """
    if not point.listeners:
        return image
    tokens = image.flatten(2).transpose(1, 2)
    new = point(tokens)
    return image if new is tokens else new.transpose(1, 2).unflatten(2, image.shape[2:])


class MixForward(Forward):
    """The gated MLP with a convolution over the token grid, on images [batch, d_model, height,
    width].
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.pre, self.linear, self.post = (
            points[f"mlp.hook_{name}"] for name in ("pre", "pre_linear", "post")
        )

    def __call__(self, hidden_states: Tensor) -> Tensor:
        ff = self.module
        linear, gate = ff.conv_depth(ff.nonlinearity(ff.conv_inverted(hidden_states))).chunk(
            2, dim=1
        )
        gate, linear = as_tokens(self.pre, gate), as_tokens(self.linear, linear)
        return ff.conv_point(as_tokens(self.post, linear * ff.nonlinearity(gate)))


class LastNormForward(Forward):
    """The last normalisation, with a table of its own."""

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.modulations = points["final.hook_shift"], points["final.hook_scale"]
        self.normalized = points["ln_final.hook_normalized"]

    def __call__(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        table = scale_shift_table
        shift, scale = modulations(self.modulations, table[None] + temb[:, None].to(table.device))
        return self.normalized(self.module.norm(hidden_states)) * (1 + scale) + shift


class SanaFamily(Family):
    """How dit_lens opens a `SanaTransformer2DModel`."""

    model_class = "SanaTransformer2DModel"
    differs = (
        "linear self-attention, without scores or pattern; cross-attention to the text; "
        "convolutions in the MLP"
    )
    written_for = {
        "AdaLayerNormSingle.forward": "28f2c5e0",
        "Attention.forward": "f4dadb54",
        "GLUMBConv.forward": "a8c9574f",
        "SanaAttnProcessor2_0.__call__": "de909ac4",
        "SanaCombinedTimestepGuidanceEmbeddings.forward": "10f2c33c",
        "SanaLinearAttnProcessor2_0.__call__": "456fa1a5",
        "SanaModulatedNorm.forward": "7c679d0a",
        "SanaTransformerBlock.forward": "f6a3b8d9",
    }

    first_sites = {"hook_cond": COND, "hook_embed": RESID}
    known_options = frozenset(
        "in_channels out_channels num_attention_heads attention_head_dim num_layers "
        "num_cross_attention_heads cross_attention_head_dim cross_attention_dim "
        "caption_channels mlp_ratio dropout attention_bias sample_size patch_size "
        "norm_elementwise_affine norm_eps interpolation_scale guidance_embeds "
        "guidance_embeds_scale qk_norm timestep_scale".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c = transformer.config
        cross = transformer.transformer_blocks[0].attn2
        return image_config(
            transformer,
            size,
            d_mlp=int(c.mlp_ratio * c.num_attention_heads * c.attention_head_dim),
            distilled_guidance=c.guidance_embeds,
            out_channels=c.out_channels or c.in_channels,
            own_axes={
                "cross_head": cross.heads,
                "d_cross_head": cross.to_q.out_features // cross.heads,
            },
        )

    def block_sites(self, block: Any) -> Sites:
        normed = block.attn1.norm_q is not None
        sites = {"hook_resid_pre": RESID} | adaln_sites() | {"ln1.hook_normalized": RESID}
        sites |= qkv_sites(rotary=normed) | out_sites()
        sites |= {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        sites |= {
            name: tuple(CROSS.get(axis, axis) for axis in axes)
            for name, axes in cross_sites(rotary=normed).items()
        }
        sites |= {"hook_cross_attn_out": RESID, "hook_resid_mid_cross": RESID}
        sites |= {"ln2.hook_normalized": RESID} | mlp_sites(gated=True)
        return sites | {"hook_mlp_out": RESID, "hook_resid_post": RESID}

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            SanaBlockForward(block, points),
            LinearAttentionForward(block.attn1, points, current_pass, layer),
            CrossAttentionForward(block.attn2, points, current_pass, None),
            MixForward(block.ff, points),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return [
            TimeForward(transformer.time_embed, points),
            LastNormForward(transformer.norm_out, points),
            *super().outer_forwards(transformer, points, current_pass),
        ]

    def check_model(self, transformer: Any) -> None:
        refuse_processors(
            transformer.transformer_blocks,
            attn1=SanaLinearAttnProcessor2_0,
            attn2=SanaAttnProcessor2_0,
        )
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        c, x, p = transformer.config, inputs["hidden_states"], transformer.config.patch_size
        if x.shape[2] % p or x.shape[3] % p:  # diffusers would cut off the rest
            raise InvalidValue(
                f"The latents are {x.shape[2]}x{x.shape[3]}; expected multiples of the patch size "
                f"{p}."
            )
        guidance = inputs.get("guidance")
        if (guidance is not None) != c.guidance_embeds:
            wanted = "its strength as a tensor [batch]" if c.guidance_embeds else "None"
            raise InvalidValue(
                f"guidance is {shown(guidance)}, and guidance_embeds={c.guidance_embeds}; expected "
                f"{wanted}."
            )

    def timestep_scale(self, transformer: Any) -> float:
        """What the scheduler's timesteps are multiplied by; Sprint's time runs from 0 to 1,
        whatever its config says.

        Args:
            transformer: the transformer.
        """
        return 0.001 if transformer.config.guidance_embeds else transformer.config.timestep_scale

    def strength(self, transformer: Any, guidance: Any) -> Any:
        return guidance * transformer.config.guidance_embeds_scale

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        further = dict(condition)
        if transformer.config.guidance_embeds and further.get("guidance") is None:
            usual = further["encoder_hidden_states"].new_full((len(x),), GUIDANCE)
            further["guidance"] = self.strength(transformer, usual)
        return {"hidden_states": x, "timestep": t * self.timestep_scale(transformer), **further}

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        return inputs["timestep"] / self.timestep_scale(transformer)

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        chi = "\n".join(instruction(pipe, prompt) or [])
        # the instruction's tokens go, but for the first, and that of its end is the prompt's
        dropped = len(pipe.tokenizer.encode(chi)) - 2 if chi else 0
        return [Text(pipe.tokenizer, chi + prompt, dropped=dropped)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        """As the pipeline does: a prompt comes after the instruction to enhance it, the empty one,
        for guidance, does not.
        """
        options: Any = (
            {}
            if pipe.transformer.config.guidance_embeds
            else {"do_classifier_free_guidance": False}
        )
        embeds, mask, *_ = pipe.encode_prompt(
            prompt, complex_human_instruction=instruction(pipe, prompt), **options
        )
        return Condition(
            encoder_hidden_states=embeds.to(pipe.transformer.dtype), encoder_attention_mask=mask
        )

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import SanaTransformer2DModel

        model = SanaTransformer2DModel(
            in_channels=4,
            out_channels=(4, 4, 8)[variant],
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=(3, 2, 4)[variant],
            num_cross_attention_heads=2,
            cross_attention_head_dim=(16, 12, 16)[variant],
            cross_attention_dim=32,
            caption_channels=24,
            mlp_ratio=(2.5, 3.0, 2.5)[variant],
            sample_size=(16, 4, 8)[variant],
            patch_size=(4, 1, 2)[variant],
            qk_norm=(None, "rms_norm_across_heads", "layer_norm_across_heads")[variant],
            guidance_embeds=variant == 1,
            interpolation_scale=(None, 1, None)[variant],
            norm_elementwise_affine=variant == 1,
            attention_bias=variant == 2,
            timestep_scale=(1.0, 1.0, 0.001)[variant],
        )
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
        return alive(model), Condition(
            encoder_hidden_states=torch.randn(2, 7, 24), encoder_attention_mask=mask
        )

    def small_pipeline(self) -> Any:
        from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

        stages = {
            "block_out_channels": (4,) * 4,
            "layers_per_block": (1,) * 4,
            "qkv_multiscales": ((),) * 4,
        }
        both = {
            f"{half}_{name}": value
            for name, value in stages.items()
            for half in ("encoder", "decoder")
        }
        encoder, tokenizer = small_text("gemma2", 24)
        vae = alive(AutoencoderDC(latent_channels=4, **both))
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        )
        return SanaPipeline(tokenizer, encoder, vae, self.small(0)[0], scheduler)

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {
            "height": 128,
            "width": 128,
            "use_resolution_binning": False,
        }


def instruction(pipe: Any, prompt: str) -> Any:
    """What Sana's pipeline puts before a prompt, as lines; None before the empty one."""
    options = inspect.signature(type(pipe).__call__).parameters
    return options["complex_human_instruction"].default if prompt else None


register(SanaFamily())
