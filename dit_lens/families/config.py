"""The sizes of a hooked model, and what a transformer is told besides x_t and the time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Size = tuple[int, ...]
"""(height, width), or (frame, height, width)."""


@dataclass(frozen=True)
class Config:
    """Sizes of a hooked model, under TransformerLens's names where it has one.

    Attributes:
        n_layers: how many blocks there are.
        d_model: the width of the residual stream.
        n_heads: how many heads the image's attention has.
        d_head: the width of a head.
        d_mlp: how many neurons an MLP has.
        patch_size: the side of a token in the latents.
        in_channels: how many channels x_t has.
        out_channels: how many channels the model returns.
        latent_shape: one item's x_t: (channel, height, width), for video with frames among them,
            the last two height and width.
        grid: the image tokens' grid: (height, width), or (frame, height, width).
        n_classes: how many classes the model knows; 0 where prompts or the like condition it.
        has_null: whether it also knows a label for no class, which guidance needs.
        restartable: whether the residual stream is all that a block is given, so that a pass can
            start at any layer.
        distilled_guidance: whether the model takes the strength of guidance as an input, instead of
            a second, null pass.
        joint: whether image and text attend as one sequence, so that the text's tokens are among
            the keys of the image's attention.
        own_axes: lengths of the axes that only this model has or has otherwise, by name. Of "key"
            it is the length without the text.

    >>> Config(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=64, patch_size=2, in_channels=4,
    ...     out_channels=4, latent_shape=(4, 8, 8), grid=(4, 4)).tokens
    16
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    patch_size: int
    in_channels: int
    out_channels: int
    latent_shape: Size
    grid: Size
    n_classes: int = 0
    has_null: bool = True
    restartable: bool = True
    distilled_guidance: bool = False
    joint: bool = False
    own_axes: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latent_shape[-2], self.latent_shape[-1]

    @property
    def tokens(self) -> int:
        """How many image tokens there are."""
        return math.prod(self.grid)

    def axis_sizes(self, batch: int | None = None, text: int | None = None) -> dict[str, int]:
        """How long each axis of a hook point is, by the axis names of `model.sites`.

        Args:
            batch: items; without it the axis "batch" is left out.
            text: text tokens as the blocks compute them, padding included: the length of
                "text_token". Without it the axes that it sets are left out, in a joint attention
                "key" among them.

        Returns:
            Lengths by axis name. Of a model that is opened read-only they are what its own
            configuration says, which may be nothing.

        >>> import dit_lens
        >>> dit_lens.load("digits").cfg.axis_sizes(batch=2)["patch"]
        4
        """
        sizes = {} if batch is None else {"batch": batch}
        if not self.grid:
            return sizes | ({"d_model": self.d_model} if self.d_model else {})
        elements = math.prod(self.latent_shape) // self.in_channels  # of one channel
        sizes |= {
            "token": self.tokens,
            "query": self.tokens,
            "key": self.tokens,
            "image_key": self.tokens,
            "head": self.n_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "patch": self.out_channels * elements // self.tokens,
            "channel": self.out_channels,
            "frame": elements // math.prod(self.pixels),
            "height": self.pixels[0],
            "width": self.pixels[1],
            **self.own_axes,
        }
        if text is not None:
            sizes |= {"text_token": text, "text_query": text, "text_key": text}
        if self.joint:
            keys = sizes.pop("key")
            sizes |= {} if text is None else {"key": keys + text}
        return sizes

    @property
    def null_class(self) -> int:
        """The label that stands for 'no condition' in classifier-free guidance: one after the last
        class; -1 for prompts.
        """
        return self.n_classes or -1

    @property
    def learned_sigma(self) -> bool:
        """Whether the model also predicts a variance, in the second half of its output channels."""
        return self.out_channels == 2 * self.in_channels


def image_config(transformer: Any, size: Size | None = None, **own: Any) -> Config:
    """The sizes of an image transformer whose configuration has diffusers' usual names.

    Args:
        transformer: a diffusers transformer.
        size: (height, width) of the latents, instead of the model's own `sample_size`.
        own: further fields of `Config`, and those that this model has otherwise.

        return image_config(transformer, size, restartable=False)
    """
    c = transformer.config
    height, width = size or (c.sample_size, c.sample_size)
    heads = c.num_attention_heads
    d_head = own["d_head"] if "d_head" in own else c.attention_head_dim
    sizes = {
        "n_layers": c.num_layers,
        "d_model": heads * d_head,
        "n_heads": heads,
        "d_head": d_head,
        "d_mlp": 4 * heads * d_head,
        "patch_size": c.patch_size,
        "in_channels": c.in_channels,
        "out_channels": vars(transformer).get("out_channels") or c.out_channels,
        "latent_shape": (c.in_channels, height, width),
        "grid": (height // c.patch_size, width // c.patch_size),
    }
    return Config(**(sizes | own))


class Condition(dict[str, Any]):
    """All that a transformer is given besides x_t and the time, by its own argument names.

    Attributes:
        labels: the numbers [batch] of the prompts that it was made from, if it was; see
            `dit_lens.model.conditions`.

    Args:
        values: a dict of arguments, if any.
        named: arguments by name.

    >>> Condition(class_labels=torch.tensor([3, 7]))["class_labels"]
    tensor([3, 7])
    """

    labels: Tensor | None = None

    def __init__(self, *values: Mapping[str, Any], **named: Any) -> None:
        super().__init__(*values, **named)

    @classmethod
    def numbered(cls, values: Mapping[str, Any], labels: Tensor | None) -> Condition:
        """A condition that knows the numbers of its prompts or classes.

        Args:
            values: the transformer's arguments by name.
            labels: the numbers [batch], if they are known.
        """
        made = cls(values)
        made.labels = labels
        return made
