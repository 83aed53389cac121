"""Z-Image (Z-Image Team 2025, arXiv 2511.22699) as diffusers' `ZImageTransformer2DModel`.

Image and caption are one sequence, `[image | padding | caption | padding]`, that goes through the
same weights; the block is Lumina-Image 2.0's (`parts/one_sequence.py`: a norm before and after each
sublayer, gates through tanh, no shift). Both are filled to a multiple of 32 tokens with learned
tokens that take part in everything, and a batch's shorter captions with zeros that nothing attends
to. The plain names hold exactly the grid's tokens. The prefix `text.` is all that comes after the
image's own filling: the caption, its filling (which has been through the caption's refiner with
it), zeros. The image's filling (none at 1024x1024) has no name, but is among the keys, which are in
the model's own order. The refiners before the blocks stay diffusers' own.

The transformer takes lists, one tensor [channel, frame, height, width] an item; latents here are
[batch, channel, height, width], and `hook_sample` is the list that it returns, stacked: it has the
axis `frame`, of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .base import shift_of
from .config import Condition, Config, Size
from .forwards import Forward, Points, TransformerForward
from .parts.attention import Kernel, dispatched
from .parts.joint import Joint
from .parts.layers import refuse_processors
from .parts.one_sequence import (
    LastForward,
    OneSequenceFamily,
    SandwichAttentionForward,
    SandwichForward,
    SandwichMLPForward,
    backwards,
    sandwich_sites,
)
from .parts.sites import Sites
from .parts.words import Text
from .registry import register
from .small import alive, small_text, small_vae

PATCH = 2
"""The patch size that the transformer takes where its caller does not say."""
DEFAULT_SIZE = 128
"""The pipeline's: 1024 pixels."""


def filled(tokens: int) -> int:
    """How many tokens a part of the sequence has after it was filled up.

    Args:
        tokens: how many it had.
    """
    return tokens + -tokens % SEQ_MULTI_OF


class ListForward(TransformerForward):
    """The whole model; `hook_sample` sees its list of samples as one tensor."""

    def answer(self, output: list[Tensor]) -> list[Tensor]:
        return list(self.sample(torch.stack(output)).unbind()) if self.sample.listeners else output


class ZBlockForward(SandwichForward):
    """One block, which makes its own modulations.

    The arguments after `adaln_input` are those of omni mode, which is refused.
    """

    def __call__(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor,
        noise_mask: None = None,
        adaln_noisy: None = None,
        adaln_clean: None = None,
    ) -> Tensor:
        block, hook = self.module, self.points
        x = self.enter(x)
        chunks = block.adaLN_modulation(hook["hook_cond"](adaln_input)).chunk(4, dim=1)

        # attention
        scale_attn, scale_mlp = self.modulations("scale", chunks[0], chunks[2])
        h = hook["ln1.hook_normalized"](block.attention_norm1(x)) * (1.0 + scale_attn)
        h = hook["attn.hook_in"](h)
        gate_attn, gate_mlp = self.modulations("gate", chunks[1].tanh(), chunks[3].tanh())
        out = block.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = self.after_attention(x, out, gate_attn, block.attention_norm2)

        # MLP
        h = hook["ln2.hook_normalized"](block.ffn_norm1(x)) * (1.0 + scale_mlp)
        return self.after_mlp(x, block.feed_forward(h), gate_mlp, block.ffn_norm2)

    def modulations(self, part: str, attn: Tensor, mlp: Tensor) -> Iterator[Tensor]:
        """Those of both sublayers, hooked, [batch, 1, d_model].

        Args:
            part: scale or gate.
            attn: the attention's [batch, d_model].
            mlp: the MLP's [batch, d_model].
        """
        for sub, m in (("attn", attn), ("mlp", mlp)):
            yield self.points[f"adaln.hook_{part}_{sub}"](m).unsqueeze(1)


class ZAttentionForward(SandwichAttentionForward):
    """Attention of all tokens with all."""

    processor = ZSingleStreamAttnProcessor

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        return super().__call__(hidden_states, None, attention_mask, freqs_cis)

    def kernel(self, attn: Any) -> Kernel:
        return dispatched(attn.processor)


class ZMLPForward(SandwichMLPForward):
    """The gated MLP, by Z-Image's names of its parts."""

    def parts(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        mlp = self.module
        return mlp.w1, F.silu, mlp.w3, mlp.w2


class ZFinalForward(LastForward):
    """The last layer. The arguments after `c` are those of omni mode, which is refused."""

    def __call__(
        self,
        x: Tensor,
        c: Tensor,
        noise_mask: None = None,
        c_noisy: None = None,
        c_clean: None = None,
    ) -> Tensor:
        layer = self.module
        return self.projected(x, layer.adaLN_modulation(c), layer.norm_final, layer.linear)


class ZImageFamily(OneSequenceFamily):
    """How dit_lens opens a `ZImageTransformer2DModel`."""

    model_class = "ZImageTransformer2DModel"
    differs = (
        "image and caption in one sequence, through the same weights; a norm before and after "
        "each sublayer; gates through tanh"
    )
    x_name, t_name = "x", "t"
    batch_order = ("cond", "uncond")
    pads = True
    computes = {"attn": ("attention",), "mlp": ("feed_forward",)}
    written_for = {
        "Attention.forward": "f4dadb54",
        "FeedForward.forward": "8da1c726",
        "FinalLayer.forward": "1042daa0",
        "ZImageTransformerBlock.forward": "333bb99e",
        "ZSingleStreamAttnProcessor.__call__": "66a67907",
    }

    last_sites = {
        **OneSequenceFamily.last_sites,
        "hook_sample": ("batch", "channel", "frame", "height", "width"),
    }
    known_options = frozenset(
        "all_patch_size all_f_patch_size in_channels dim n_layers n_refiner_layers n_heads "
        "n_kv_heads norm_eps qk_norm cap_feat_dim siglip_feat_dim rope_theta t_scale "
        "axes_dims axes_lens".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c, block = transformer.config, transformer.layers[0]
        height, width = size or (min(DEFAULT_SIZE, PATCH * room) for room in c.axes_lens[1:])
        grid = (height // PATCH, width // PATCH)
        return Config(
            n_layers=c.n_layers,
            d_model=c.dim,
            n_heads=c.n_heads,
            d_head=c.dim // c.n_heads,
            d_mlp=block.feed_forward.w1.out_features,
            patch_size=PATCH,
            in_channels=c.in_channels,
            out_channels=transformer.out_channels,
            latent_shape=(c.in_channels, height, width),
            grid=grid,
            restartable=False,
            joint=True,
            own_axes={
                "d_cond": block.adaLN_modulation[0].in_features,
                "key": filled(grid[0] * grid[1]),
            },
        )

    def block_sites(self, block: Any) -> Sites:
        return sandwich_sites()

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        joint = self.joined(points, current_pass)
        return [
            ZBlockForward(block, joint),
            ZAttentionForward(block.attention, joint, current_pass, layer),
            ZMLPForward(block.feed_forward, joint),
        ]

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return ListForward(transformer, points, current_pass)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        joint = self.joined(points, current_pass)
        return [ZFinalForward(layer, joint) for layer in transformer.all_final_layer.values()]

    def check_model(self, transformer: Any) -> None:
        refuse_processors(transformer.layers, attention=ZSingleStreamAttnProcessor)
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        x, captions, p = inputs.get("x"), inputs.get("cap_feats"), inputs.get("patch_size", PATCH)
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], (list, tuple)):
            raise InvalidValue(
                "x is a list of lists, Z-Image's omni mode, where some images are conditions and "
                "each has modulations of its own; dit_lens opens its plain mode: expected a list "
                "of tensors, one image an item."
            )
        if (
            not isinstance(x, (list, tuple))
            or not x
            or not all(isinstance(item, Tensor) for item in x)
        ):
            raise InvalidValue(
                f"x is a {type(x).__name__}; expected a list of tensors [channel, 1, height, "
                "width], one an item."
            )
        shapes = sorted({tuple(item.shape) for item in x})
        c, *frames, height, width = shapes[0] if len(shapes[0]) == 4 else (0, 0, 0)
        if (
            len(shapes) > 1
            or c != transformer.in_channels
            or frames != [1]
            or height % p
            or width % p
        ):
            raise InvalidValue(
                f"The latents in x have the shapes {', '.join(str(list(s)) for s in shapes)}; "
                f"expected one shape, [{transformer.in_channels}, 1, height, width], height and "
                f"width multiples of {p}."
            )
        if not isinstance(captions, (list, tuple)) or len(captions) != len(x):
            got = (
                f"{len(captions)} items"
                if isinstance(captions, (list, tuple))
                else f"a {type(captions).__name__}"
            )
            raise InvalidValue(
                f"cap_feats has {got}; expected a list of {len(x)} captions [token, d], one an "
                "item of x."
            )

    def joint(self, inputs: dict[str, Any], length: int, transformer: Any = None) -> Joint:
        height, width = self.grid(transformer, inputs)
        image = height * width
        return Joint(slice(image), slice(filled(image), None))

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        return {"x": list(x.unsqueeze(2).unbind()), "t": ((1000 - t) / 1000).float(), **condition}

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        return -torch.stack(list(answer)).squeeze(2)

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        return torch.stack(list(inputs["x"])).squeeze(2)

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        return backwards(inputs["t"])

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        p = inputs.get("patch_size", PATCH)
        height, width = inputs["x"][0].shape[-2:]
        return height // p, width // p

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        options = (
            {"mu": shift_of(scheduler, tokens)}
            if scheduler.config.get("use_dynamic_shifting")
            else {}
        )
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), **options)

    def said(self, prompt: str) -> str:
        # its pipeline writes the prompt into its template in place
        head, _, rest = prompt.partition("<|im_start|>user\n")
        return rest.partition("<|im_end|>")[0] if rest and not head else prompt

    def text_length(self, inputs: dict[str, Any], item: int) -> int | None:
        return len(inputs["cap_feats"][item])

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return self.joint(inputs, keys, transformer).text

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        def in_template(words: str) -> str:
            whole: str = pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": words}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            return whole

        behind = in_template("{}").rpartition("{}")[2]
        return [Text(pipe.tokenizer, in_template(prompt), behind=behind)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        return Condition(cap_feats=pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0])

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        return Condition(
            conditions[0]
            | {"cap_feats": [caption for c in conditions for caption in c["cap_feats"]]}
        )

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import ZImageTransformer2DModel

        model = ZImageTransformer2DModel(
            all_patch_size=((2,), (2, 4), (2,))[variant],
            all_f_patch_size=((1,), (1, 1), (1,))[variant],
            in_channels=(4, 3, 4)[variant],
            dim=(32, 16, 24)[variant],
            n_layers=(3, 2, 4)[variant],
            n_refiner_layers=(1, 2, 0)[variant],
            n_heads=(4, 2, 3)[variant],
            n_kv_heads=(4, 2, 3)[variant],
            qk_norm=variant != 1,
            cap_feat_dim=24,
            axes_dims=[4, 2, 2],
            axes_lens=[600, *((4, 4), (4, 8), (3, 5))[variant]],
        )
        lengths = ((7, 40), (5, 5), (32, 33))[variant]
        return alive(model), Condition(cap_feats=[torch.randn(n, 24) for n in lengths])

    def small_pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        text_encoder, tokenizer = small_text("qwen3", 24)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return ZImagePipeline(
            scheduler, small_vae(shift_factor=0.1), text_encoder, tokenizer, self.small(0)[0]
        )

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {
            "guidance_scale": 3.0 if guided else 0.0
        }  # here 0 is none, and 3 is others' 4


register(ZImageFamily())
