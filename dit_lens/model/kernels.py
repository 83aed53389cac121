"""Which kernels a pass runs on: the settings of PyTorch and diffusers that choose them.

The same arithmetic on another kernel gives other last bits, in bfloat16 other second digits. So a
call keeps these settings, and a recomputation runs under them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # noqa: PLC2701 (diffusers has no public way to ask)
    attention_backend,
)

from ..pieces.kept import USUAL

SDPA = ("flash", "mem_efficient", "math", "cudnn")
LEGACY = ("highest", "high", "medium")
"""What `torch.set_float32_matmul_precision` takes."""


def matmul_precision() -> str:
    """The precision of float32 matrix products: one of `LEGACY`, or what was set by PyTorch's newer
    name, `torch.backends.cuda.matmul.fp32_precision`, after which the older one can't be asked.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return str(torch.backends.cuda.matmul.fp32_precision)


def set_matmul_precision(precision: str) -> None:
    """Put in force what `matmul_precision` gave, by the name that it was set by."""
    if precision in LEGACY:
        torch.set_float32_matmul_precision(precision)
    else:
        torch.backends.cuda.matmul.fp32_precision = precision


def may_use_tf32() -> bool:
    """Whether float32 products or convolutions on a GPU may be in TF32, as convolutions are unless
    PyTorch is told otherwise.
    """
    convolution = getattr(torch.backends.cudnn, "conv", None)  # since PyTorch 2.9
    if convolution is None:
        in_convolutions = bool(torch.backends.cudnn.allow_tf32)
    else:
        in_convolutions = convolution.fp32_precision == "tf32"
    return in_convolutions or matmul_precision() in ("high", "medium", "tf32")


@dataclass(frozen=True)
class Kernels:
    """The settings under which a pass was run.

    Attributes:
        grad: whether gradients were on.
        autocast: the dtype of autocast, such as "bfloat16", where it was on.
        sdpa: which of the kernels `SDPA` scaled-dot-product attention could choose from.
        attention: diffusers' own attention backend.
        matmul: precision of float32 matrix products (TF32 is "high", or "tf32" by the newer name).
        mkldnn: whether oneDNN was on.
    """

    grad: bool = False
    autocast: str | None = None
    sdpa: tuple[bool, ...] = (True, True, True, True)
    attention: str = "native"
    matmul: str = "highest"
    mkldnn: bool = True

    @classmethod
    def now(cls, device: str) -> Kernels:
        """The settings in force.

        Args:
            device: the kind of device that computes, "cpu" or "cuda".
        """
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            grad=torch.is_grad_enabled(),
            autocast=None if autocast is None else str(autocast).removeprefix("torch."),
            sdpa=tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SDPA),
            attention=AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value,
            matmul=matmul_precision(),
            mkldnn=bool(torch.backends.mkldnn.enabled),
        )

    @property
    def text(self) -> str:
        """What is chosen otherwise than usual, in words."""
        odd = {k: v for k, v in vars(self).items() if v != getattr(Kernels, k)}
        return ", ".join(f"{name} {value}" for name, value in odd.items()) or USUAL

    @classmethod
    def of_sampling(cls, device: torch.device) -> Kernels:
        """The settings in force for a sampling loop of ours, which needs no gradients."""
        with torch.no_grad():
            return cls.now(device.type)

    @contextmanager
    def restored(self, device: str) -> Iterator[None]:
        """Run under these settings; those in force come back.

        Args:
            device: the kind of device that computes.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            dtype = None if self.autocast is None else getattr(torch, self.autocast)
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            before = Kernels.now(device)
            if before.attention != self.attention:
                stack.enter_context(attention_backend(self.attention))
            if before != self:
                stack.callback(before.switch)
                self.switch()
            yield

    def switch(self) -> None:
        """Put the settings in force that PyTorch has no `with` for."""
        for name, enabled in zip(SDPA, self.sdpa, strict=True):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)
        set_matmul_precision(self.matmul)
        torch.backends.mkldnn.enabled = self.mkldnn  # type: ignore[assignment]  # a module property
