"""Transformers that are laid out as published ones are: the original DiT, SiT, U-ViT.

They are known by the names of their modules, which are facts; every forward here is written from
the papers (DiT: Peebles & Xie 2023, arXiv 2212.09748; SiT: Ma et al. 2024, arXiv 2401.08740; U-ViT:
Bao et al. 2023, arXiv 2209.12152). That a module of such a layout also computes so is tried as it
is opened: each block, attention and last layer, its own forward against the one here, bit for bit.

- DiT and SiT: `x_embedder`, `t_embedder`, `y_embedder`, `blocks` (`norm1`, `attn`, `norm2`, `mlp`,
  `adaLN_modulation`), `final_layer`. The names are DiT's, all of them. A class named SiT is given
  SiT's time, 0 for noise and 1 for data, and its velocity is turned round, as diffusers' flow
  schedulers have it. A block with a `skip_linear` is given what left a block of the first half,
  `hook_skip_in`, and merges it before `hook_resid_pre`.
- U-ViT: `in_blocks`, `mid_block`, `out_blocks`, skips between them; time and label are tokens
  before the image's, and have no names. No modulations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .adapter import Adapter, Spoken, SpokenTransformer, arguments_of
from .base import Family, Skipped
from .config import Condition, Config, Size
from .forwards import Forward, Points, Tap, TransformerForward
from .layout_forwards import (
    KERNELS,
    AdaBlockForward,
    AttentionForward,
    LastLayerForward,
    PlainBlockForward,
    merged,
    skip_of,
)
from .offloading import computing_device
from .own_look import last_alone, skipping
from .parts.attention import Kernel, sdpa
from .parts.joint import AnyPoints, Joint, joint_points
from .parts.sites import BLOCK_SITES, FINAL_SITES, RESID, SAMPLE, Sites, attention_sites, mlp_sites

SKIP: Sites = {"hook_skip_in": RESID}
UVIT_SITES: Sites = {
    "hook_resid_pre": RESID,
    "ln1.hook_normalized": RESID,
    **attention_sites(rotary=False),
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
    "ln2.hook_normalized": RESID,
    **mlp_sites(),
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}


def missing(where: str, module: Any, *paths: str) -> str:
    """What a module has not of these paths, in words; empty if it has all."""
    for path in paths:
        owner, at = module, where
        for name in path.split("."):
            if getattr(owner, name, None) is None:
                return f"{at} has no `{name}`"
            owner, at = getattr(owner, name), f"`{name}`"
    return ""


BLOCK = (
    "norm1",
    "attn.qkv",
    "attn.proj",
    "attn.num_heads",
    "norm2",
    "mlp.fc1",
    "mlp.act",
    "mlp.fc2",
)


class Layout(Spoken):
    """A family that is known by the names of a module's children, and whose forwards are tried on
    each module before it is opened.

    Args:
        transformer: the module.
        adapter: how it is called, where that is not as the published one.
        named: whether its class's name says that it is called as the published one.

    Attributes:
        outside: what the module must have.
        inside: what each of its blocks must have.
        no_lens: why its streams can't be read by the last layer; empty if they can.
    """

    no_lens = ""

    computes = {"attn": ("attn",), "mlp": ("mlp",)}
    outside: tuple[str, ...]
    inside: tuple[str, ...]

    def __init__(
        self, transformer: Any, adapter: Adapter | None = None, named: bool = True
    ) -> None:
        names = () if adapter is None else adapter.names
        super().__init__(*arguments_of(transformer, names), adapter)
        self.named, self.beside = named, beside_image(transformer)

    @classmethod
    def fits(cls, transformer: Any) -> bool:
        """Whether a module is laid out so.

        Args:
            transformer: any module.
        """
        return not cls.lacks(transformer)

    @classmethod
    def lacks(cls, transformer: Any) -> str:
        """What a module has not that this layout has, in words; empty if it is laid out so.

        Args:
            transformer: any module.
        """
        if said := missing("it", transformer, *cls.outside):
            return said
        blocks = cls.blocks(transformer)  # type: ignore[call-arg]
        each = (missing(f"block {i}", block, *cls.inside) for i, block in enumerate(blocks))
        return next(filter(None, each), "") if blocks else "it has no block"

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        if self.named or self.adapter is not None:
            self.check_units(scheduler)
            return Family.set_timesteps(self, scheduler, steps, tokens)
        raise InvalidState(
            f"In which units this model counts time can't be told from its class's name, which "
            f"has no {self.model_class!r} in it; expected HookedDiT(module, "
            "adapter=dit_lens.Adapter(time=...)) (docs: Your own model)."
        )

    def check_model(self, transformer: Any) -> None:
        """Refuse a module that has the names and computes something else.

        Args:
            transformer: the transformer.

        Raises:
            InvalidValue: with what differs, and how to open it all the same.
        """
        if transformer.training:
            raise InvalidState(
                f"{type(transformer).__name__} is in train mode; call model.eval() before it is "
                "opened."
            )
        points = {name: HookPoint(name) for name in self.sites(transformer)}
        with torch.no_grad():
            for forward in self.forwards(transformer, points, Trial(transformer)):
                inputs = self.tried(forward)
                if inputs is None:
                    continue
                try:
                    same = torch.equal(forward.own(*inputs), forward(*inputs))
                    why = "computes something else"
                except Exception as error:  # of a stranger's forward
                    same, why = False, f"fails ({type(error).__name__}: {error})"
                if not same:
                    raise InvalidValue(
                        f"{type(transformer).__name__} has the modules of {self.model_class}, and "
                        f"its {type(forward.module).__name__} {why}; expected it opened by "
                        "its blocks' path, HookedDiT(module, blocks='blocks'), or by a family of "
                        "its own (docs: Your own model)."
                    )
            self.no_lens = self.why_no_lens(transformer)

    def why_no_lens(self, transformer: Any) -> str:
        """Why the last stream alone does not give the output, in words; empty if it does.

        Args:
            transformer: the transformer.
        """
        config = self.config(transformer)
        (x,) = noise_for(transformer, (1, *config.latent_shape))
        (last,) = noise_for(transformer, (1, config.tokens, config.d_model))
        label = torch.zeros(1, dtype=torch.long, device=x.device)
        condition = self.empty or Condition({self.labels_name: label})

        def answer(x: Tensor) -> Tensor:
            inputs = self.inputs(transformer, x, self.some_time(x), condition)
            return self.output(transformer, self.call(transformer, inputs), inputs)

        try:
            with torch.random.fork_rng():
                found = [last_alone(self, transformer, answer, x, last) for x in (x, 0 * x)]
        except Exception as error:  # of a stranger's forward
            return f"it can't be tried ({type(error).__name__}: {error})"
        return "" if torch.equal(*found) else "the output depends on more than that stream"

    def final(
        self, transformer: Any, stream: Tensor, inputs: dict[str, Any], memo: dict[str, Any]
    ) -> Tensor | None:
        if self.no_lens:
            raise InvalidState(
                f"{type(transformer).__name__}'s streams can't be read by its last layer: "
                f"{self.no_lens}; expected a family of its own (docs: Your own model)."
            )
        return None

    def tried(self, forward: Forward) -> tuple[Tensor, ...] | None:
        """Arguments to try a forward with; None where there is nothing to try.

        Args:
            forward: one of this family's.
        """
        raise NotImplementedError

    def inside_forwards(
        self, block: Any, points: AnyPoints, current_pass: Pass, layer: int
    ) -> list[Forward]:
        """The replacements within a block's attention and MLP.

        Args:
            block: the block.
            points: its hook points.
            current_pass: the pass.
            layer: its number.
        """
        return [
            AttentionForward(block.attn, points, current_pass, layer, kernel_of(block.attn)),
            Tap(block.mlp.fc1, after=points["mlp.hook_pre"]),
            Tap(block.mlp.act, after=points["mlp.hook_post"]),
        ]

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        return skipping(args[0] if args else kwargs["x"], slice(self.beside, None))

    def stream_in(self, block: Any, inputs: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        x, merge = args[0] if args else kwargs["x"], skip_of(block)
        if merge is not None:
            x = merged(merge, x, kwargs["skip"] if "skip" in kwargs else args[-1])
        stream: Tensor = x[:, self.beside :]
        return stream

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream: Tensor = returned[:, self.beside :]
        return stream

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return SpokenTransformer(transformer, points, current_pass, self.turned)

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        return self.config(transformer).grid

    def sizes(
        self,
        transformer: Any,
        tokens: int,
        channels: int,
        patch: int,
        labels: tuple[int, int | None],
        out: int,
        size: Size | None,
    ) -> Config:
        """The sizes of a square image model.

        Args:
            transformer: the transformer.
            tokens: how many image tokens there are.
            channels: of x_t.
            patch: the side of a token in the latents.
            labels: how many classes there are, and how many rows their table has, with one more for
                no class maybe; None for a model that takes no labels.
            out: channels of what it returns.
            size: as for `config`.
        """
        blocks, side = self.blocks(transformer), round(tokens**0.5)
        first: Any = blocks[0]
        d_model, heads = first.attn.proj.out_features, first.attn.num_heads
        latents = (channels, side * patch, side * patch)
        given = self.adapter
        said = latents if given is None or not given.latents else tuple(given.latents)
        wanted = latents[1:] if size is None else tuple(size)
        if side * side != tokens or said != latents or wanted != latents[1:]:
            raise InvalidValue(
                f"{type(transformer).__name__} has {tokens} image tokens of {patch}x{patch}, those "
                f"of latents {list(latents)}; it can't be opened for {list(said)} of size "
                f"{list(wanted)}."
            )
        classes, rows = labels
        if given is not None and given.labels:
            classes = self.n_classes
            if rows is not None and classes > rows:
                raise arguments.refusal(
                    "labels", given.labels, f"at most {rows}, the rows of the table of labels"
                )
        skips = any(skip_of(block) is not None for block in blocks)
        return Config(
            n_layers=len(blocks),
            d_model=d_model,
            n_heads=heads,
            d_head=d_model // heads,
            d_mlp=first.mlp.fc1.out_features,
            patch_size=patch,
            in_channels=channels,
            out_channels=out,
            latent_shape=latents,
            grid=(side, side),
            n_classes=classes,
            has_null=rows is None or rows > classes,
            restartable=not skips,
        )


class Trial:
    """The pass in which forwards are tried: nobody listens.

    Args:
        transformer: the transformer.
    """

    now = None
    couplings: Mapping[int, Any] = {}
    listening = 0
    watchers: Sequence[Any] = ()

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    def forward(self, inputs: dict[str, Any]) -> Any:
        raise NotImplementedError


def noise_for(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Seeded noise of the dtype and on the device of a module's weights."""
    gen, where = torch.Generator().manual_seed(0), computing_device(module)
    dtype = next(module.parameters()).dtype
    return tuple(torch.randn(shape, generator=gen).to(where, dtype) for shape in shapes)


def kernel_of(attn: Any) -> Kernel:
    """How an attention computes, found by trying; `sdpa` where none fits, which is then told.

    Args:
        attn: the attention.
    """
    (x,) = noise_for(attn, (1, 8, attn.proj.out_features))
    points = {name: HookPoint(name) for name in attention_sites(rotary=False)}
    with torch.no_grad():
        for kernel in KERNELS:
            try:
                tried = AttentionForward(attn, points, Trial(None), 0, kernel)
                if torch.equal(tried(x), tried.own(x)):
                    return kernel
            except Exception:  # of a stranger's forward: `check_model` tells it
                break
    return sdpa


class DiTLayout(Layout):
    """How dit_lens opens a module that is laid out as the original DiT."""

    model_class = "DiT"
    differs = "DiT's block under the original's own module names"
    outside = (
        "pos_embed",
        "x_embedder.proj",
        "t_embedder",
        "y_embedder.embedding_table",
        "blocks",
        "final_layer.norm_final",
        "final_layer.linear",
        "final_layer.adaLN_modulation",
    )
    inside = (*BLOCK, "adaLN_modulation")

    @staticmethod
    def blocks(transformer: Any) -> list[nn.Module]:
        return list(transformer.blocks)

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        project, table = transformer.x_embedder.proj, transformer.y_embedder.embedding_table
        patch, channels = project.kernel_size[0], project.in_channels
        known = getattr(transformer.y_embedder, "num_classes", None)
        rows = table.num_embeddings
        return self.sizes(
            transformer,
            transformer.pos_embed.shape[1],
            channels,
            patch,
            (known if isinstance(known, int) else rows - 1, rows),
            self.channels_out(transformer, patch, channels),
            size,
        )

    def channels_out(self, transformer: Any, patch: int, channels: int) -> int:
        """Channels of what the model returns; the last layer's."""
        width: int = transformer.final_layer.linear.out_features
        return width // patch**2

    def block_sites(self, block: Any) -> Sites:
        return BLOCK_SITES if skip_of(block) is None else SKIP | BLOCK_SITES

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        inside = self.inside_forwards(block, points, current_pass, layer)
        return [AdaBlockForward(block, points), *inside]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return [LastLayerForward(transformer.final_layer, points)]

    def tried(self, forward: Forward) -> tuple[Tensor, ...] | None:
        module: Any = forward.module
        if isinstance(forward, AdaBlockForward):
            d = module.attn.proj.out_features
            skip = () if skip_of(module) is None else ((2, 4, d),)
            return noise_for(module, (2, 4, d), (2, d), *skip)
        if isinstance(forward, AttentionForward):
            return noise_for(module, (2, 4, module.proj.out_features))
        if isinstance(forward, LastLayerForward):
            d = module.linear.in_features
            return noise_for(module, (2, 4, d), (2, d))
        return None


class SiTLayout(DiTLayout):
    """How dit_lens opens a module that is laid out as SiT."""

    model_class = "SiT"
    differs = "DiT's, with time from data, 1, to noise, 0, and a velocity towards the data"
    time = (1.0, 0.0)
    turned = staticmethod(torch.neg)

    def channels_out(self, transformer: Any, patch: int, channels: int) -> int:
        return channels  # the second half of a learned variance it keeps to itself

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        width: int = transformer.final_layer.linear.out_features
        return replace(super().config(transformer, size), own_axes={"patch": width})


class UViTLayout(Layout):
    """How dit_lens opens a module that is laid out as U-ViT."""

    model_class = "UViT"
    differs = "skips from the first to the second half; time and label are tokens; no modulations"
    outside = (
        "pos_embed",
        "patch_embed.proj",
        "in_blocks",
        "mid_block",
        "out_blocks",
        "norm",
        "decoder_pred",
    )
    inside = BLOCK
    pads = True
    last_sites = {
        "ln_final.hook_normalized": RESID,
        "final.hook_in": RESID,
        "final.hook_out": FINAL_SITES["final.hook_out"],
        "hook_sample": SAMPLE,
    }

    @staticmethod
    def blocks(transformer: Any) -> list[nn.Module]:
        t = transformer
        return [*t.in_blocks, t.mid_block, *t.out_blocks]

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        project, labels = transformer.patch_embed.proj, getattr(transformer, "label_emb", None)
        patch, beside = project.kernel_size[0], beside_image(transformer)
        found = self.sizes(
            transformer,
            transformer.pos_embed.shape[1] - beside,
            project.in_channels,
            patch,
            (1, None) if labels is None else (labels.num_embeddings, labels.num_embeddings),
            transformer.decoder_pred.out_features // patch**2,
            size,
        )
        return replace(found, restartable=False, own_axes={"key": found.tokens + beside})

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        found = super().inputs(transformer, x, t, condition)
        if getattr(transformer, "label_emb", None) is None:
            found.pop(self.labels_name, None)
        return found

    def block_sites(self, block: Any) -> Sites:
        return UVIT_SITES if skip_of(block) is None else SKIP | UVIT_SITES

    def layout(self, inputs: dict[str, Any], length: int, transformer: Any) -> Joint:
        """Where the image's tokens lie: behind those of time and label.

        Args:
            inputs: the transformer's arguments.
            length: how many tokens the sequence has.
            transformer: the transformer.
        """
        return Joint(slice(beside_image(transformer), None), slice(0, 0))

    def of_image(self, points: Points, current_pass: Pass) -> dict[str, Any]:
        """The hook points on the image's tokens of the sequence.

        Args:
            points: hook points by name.
            current_pass: the pass.
        """
        return joint_points(points, current_pass, self.layout, points)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        hook = self.of_image(points, current_pass)
        inside = self.inside_forwards(block, hook, current_pass, layer)
        return [PlainBlockForward(block, hook), *inside]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        hook = self.of_image(points, current_pass)
        return [
            Tap(transformer.norm, after=hook["ln_final.hook_normalized"]),
            Tap(transformer.decoder_pred, hook["final.hook_in"], hook["final.hook_out"]),
        ]

    def tried(self, forward: Forward) -> tuple[Tensor, ...] | None:
        module: Any = forward.module
        if isinstance(forward, PlainBlockForward):
            shape = (2, 4, module.attn.proj.out_features)
            return noise_for(module, *[shape] * (1 if skip_of(module) is None else 2))
        if isinstance(forward, AttentionForward):
            return noise_for(module, (2, 4, module.proj.out_features))
        return None


def beside_image(transformer: Any) -> int:
    """How many tokens of the stream are not the image's: in a U-ViT those of time and label."""
    if not hasattr(transformer, "mid_block"):
        return 0
    return 1 if getattr(transformer, "label_emb", None) is None else 2


LAYOUTS: tuple[type[Layout], ...] = (DiTLayout, SiTLayout, UViTLayout)


def layout_of(transformer: Any, adapter: Adapter | None = None) -> Layout | None:
    """The family for a module that is laid out as a published one; None where it is not.

    Args:
        transformer: any module.
        adapter: how it is called, where that is not as the published one.
    """
    for layout in layouts_for(transformer):
        if layout.fits(transformer):
            named = layout.model_class.lower() in type(transformer).__name__.lower()
            return layout(transformer, adapter, named=named)
    return None


def layouts_for(transformer: Any) -> list[type[Layout]]:
    """The layouts that a module may have; a class named SiT is none of DiT's.

    Args:
        transformer: any module.
    """
    is_sit = "sit" in type(transformer).__name__.lower()
    return [layout for layout in LAYOUTS if not (is_sit and layout is DiTLayout)]


def nearly(transformer: Any) -> str:
    """For a module that has most of a layout's children, which layout and what it lacks, in words.

    Args:
        transformer: any module.
    """
    for layout in layouts_for(transformer):
        children = {path.partition(".")[0] for path in layout.outside}
        if 2 * sum(hasattr(transformer, name) for name in children) > len(children):
            return f" It has the children of {layout.model_class}, but {layout.lacks(transformer)}."
    return ""
