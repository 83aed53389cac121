"""What the file of a trace may say, besides its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from ..model.kernels import SDPA
from ..storage.schema import Listed, Schema, Size, fits

DTYPES = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
"""By the names that files have them under."""
BACKENDS = {backend.value for backend in AttentionBackendName}
KINDS = ("tensor", "array", "dtype", "value", "dict", "list", "tuple")


def _apart(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


def _is_hook_name(name: str) -> bool:
    return name != "blocks" and bool(
        re.fullmatch(r"(blocks\.\d{1,9}\.)?[a-z_]\w*(\.\w+)*", name, re.ASCII)
    )


Dtype = Annotated[str, fits(DTYPES.__contains__, "be a dtype of torch")]
HookName = Annotated[str, fits(_is_hook_name, "be a hook point")]
HookNames = Annotated[Listed[HookName], fits(_apart, "name each hook point once")]
Axes = Annotated[
    Listed[str],
    fits(lambda a: _apart((*a, "step", "layer")), "name each axis once, no step and no layer"),
]


class Packed(Schema):
    """A value as JSON: a dict with one name, which says what kind of value it is. Tensors and
    arrays are in the file, under the name given here.

    >>> Packed(tuple=[Packed(value=1), Packed(dtype="float16")]).unpacked({})
    (1, torch.float16)
    """

    tensor: str = ""
    array: str = ""
    dtype: Dtype = ""
    value: bool | int | float | str | None = None
    inside: dict[str, Packed] = Field({}, alias="dict")
    listed: Listed[Packed] = Field((), alias="list")
    tupled: Listed[Packed] = Field((), alias="tuple")

    @model_validator(mode="after")
    def _of_one_kind(self) -> Packed:
        if len(self.model_fields_set) != 1:
            kinds = ", ".join(KINDS)
            raise PydanticCustomError(
                "kind", "Input should have just one of the names {kinds}", {"kinds": kinds}
            )
        return self

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Any:
        """The value.

        Args:
            tensors: those of the file, by name.

        Raises:
            KeyError: if one is not among them.
        """
        (kind,) = self.model_fields_set
        if kind == "tensor":
            return tensors[self.tensor]
        if kind == "array":
            return tensors[self.array].numpy()
        if kind == "dtype":
            return DTYPES[self.dtype]
        if kind == "inside":
            return {name: each.unpacked(tensors) for name, each in self.inside.items()}
        if kind == "listed":
            return [each.unpacked(tensors) for each in self.listed]
        if kind == "tupled":
            return tuple(each.unpacked(tensors) for each in self.tupled)
        return self.value


def _holding(kind: Any, words: str) -> AfterValidator:
    """What a packed value without tensors has to be once it is unpacked."""
    adapter = TypeAdapter(kind, config=ConfigDict(strict=True))

    def holds(packed: Packed) -> bool:
        try:
            adapter.validate_python(packed.unpacked({}))
        except (KeyError, ValidationError):
            return False
        return True

    return fits(holds, f"be {words}")


PackedDict = Annotated[Packed, fits(lambda p: "inside" in p.model_fields_set, "be a dict")]
PackedWords = Annotated[Packed, _holding(tuple[str, ...] | None, "a word for each item, or none")]


class CallParts(Schema):
    """What is packed of a `Call`."""

    inputs: PackedDict
    x: Packed
    t: Packed
    labels: Packed
    branch: PackedWords
    place: Annotated[Packed, _holding(tuple[Size, Size] | None, "two whole numbers, or none")]
    grid: Annotated[Packed, _holding(tuple[Size, ...], "whole numbers")]
    condition: PackedDict


class ContextParts(Schema):
    """What is packed of a `PassContext`."""

    span: Annotated[Packed, _holding(tuple[Size | None, Size | None], "two layers")]
    stream: Packed
    labels: Packed
    twin: PackedWords
    step: Annotated[Packed, _holding(Size | None, "a step, or none")]


class KernelSettings(Schema):
    """`Kernels`."""

    grad: bool
    autocast: Dtype | None
    sdpa: Annotated[Listed[bool], fits(lambda s: len(s) == len(SDPA), f"be {len(SDPA)} settings")]
    attention: Annotated[str, fits(BACKENDS.__contains__, "be an attention backend of diffusers")]
    matmul: Literal["highest", "high", "medium", "tf32", "ieee", "none"]
    mkldnn: bool


class KeptCall(Schema):
    """One call: its parts, and `lost`, what acted in it and could not be written, in words that
    follow "this trace was".
    """

    call: CallParts
    context: ContextParts
    kernels: KernelSettings
    witness: HookNames
    lost: str


class Sizes(Schema):
    """`Config`."""

    n_layers: Size
    d_model: Size
    n_heads: Size
    d_head: Size
    d_mlp: Size
    patch_size: Size
    in_channels: Size
    out_channels: Size
    latent_shape: Listed[Size]
    grid: Listed[Size]
    n_classes: Size
    restartable: bool
    has_null: bool
    distilled_guidance: bool
    joint: bool
    own_axes: dict[str, Size]


class TraceFile(Schema):
    """All of it. `calls_at` are the steps in order, each with the numbers of its calls, and
    `on_host` the tensors that were on the CPU where the model was not; `dtype` is that of what is
    read, if not the model's.
    """

    cfg: Sizes
    sites: dict[HookName, Axes]
    names: HookNames
    calls: Listed[KeptCall]
    calls_at: Listed[Annotated[tuple[Size, Listed[Size]], Field(strict=False)]]
    log_snr: Listed[float] | None
    on_host: Listed[str] = ()
    dtype: Dtype | None = None


class Recorded(Schema):
    """What a folder of activations says of itself: all that decides what is in its shards."""

    names: HookNames
    axes: Listed[Listed[str]]
    shapes: Listed[Listed[Size]]
    dtypes: Listed[Dtype]
    labels: Listed[int]
    prompts: Listed[str]
    seeds: Listed[Annotated[int, Field(ge=0, lt=1 << 63)]]
    steps: Size
    at: Listed[Size]
    timesteps: Listed[float]
    tokens: Listed[Size] | None
    guidance: float
    scheduler: str
    eta: float
    passes: Annotated[int, Field(ge=1, le=2)]
    batch: Annotated[int, Field(ge=1)]
    shard_steps: Annotated[int, Field(ge=1)]
    model: str  # last: its first answer depends on the other settings

    @model_validator(mode="after")
    def _of_one_length(self) -> Recorded:
        per_name = {len(self.names), len(self.axes), len(self.shapes), len(self.dtypes)}
        if len(per_name) > 1 or len(self.labels) != len(self.seeds) or not self.labels:
            raise PydanticCustomError("length", "Input should have lists of one length", {})
        if len(self.at) != len(self.timesteps) or not self.at or not self.names:
            raise PydanticCustomError("length", "Input should have lists of one length", {})
        return self

    @property
    def shards(self) -> list[tuple[str, range, range]]:
        """Of each shard its file name, its items, and its steps as places in `at`; in order."""
        found = []
        for number, first in enumerate(range(0, len(self.labels), self.batch)):
            items = range(first, min(first + self.batch, len(self.labels)))
            for part, start in enumerate(range(0, len(self.at), self.shard_steps)):
                steps = range(start, min(start + self.shard_steps, len(self.at)))
                found.append((f"shard-{number:05d}-{part:03d}.safetensors", items, steps))
        return found
