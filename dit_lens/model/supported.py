"""What dit_lens does not open, each with one sentence that says why and what to do."""

from __future__ import annotations

from torch import nn

from ..errors import InvalidState, InvalidValue


def refuse_unfit(transformer: nn.Module) -> None:
    """Raise RuntimeError or ValueError for a model whose hooks would be ignored, or whose
    activations could not be trusted.
    """
    if any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in transformer.modules()
    ):
        raise InvalidState(
            "The model is compiled: torch.compile ignores hooks added afterwards. Open the "
            "original instead "
            "(compiled._orig_mod, or load it again), and compile nothing while you look inside."
        )
    packed = _packed(transformer)
    if packed or getattr(transformer, "hf_quantizer", None) is not None:
        raise InvalidValue(
            f"{type(transformer).__name__} has quantised or sharded weights{packed}, whose layers "
            "compute in ways dit_lens can't repeat bit for bit; load it unquantised, in float32, "
            "bfloat16 or float16, on one device."
        )
    offloaded = any(hasattr(m, "_hf_hook") for m in transformer.modules())
    meta = next((n for n, p in transformer.named_parameters() if p.device.type == "meta"), None)
    if meta is not None and not offloaded:
        raise InvalidValue(
            f"{type(transformer).__name__} has no weights: {meta} is on the meta device. Load them "
            "first "
            "(from_pretrained, or to_empty and load_state_dict)."
        )
    refuse_cache(transformer)


def _packed(transformer: nn.Module) -> str:
    """The first weight that is not a plain tensor of numbers, in brackets; "" where all are."""
    for name, weight in transformer.named_parameters():
        if not weight.is_floating_point():
            return f" ({name} is {weight.dtype})"
        if hasattr(weight, "__tensor_flatten__"):  # made of others: torchao's, quanto's, DTensor
            return f" ({name} is a {type(weight).__name__})"
    for name, module in transformer.named_modules():
        if callable(getattr(type(module), "weight", None)):  # PyTorch's own quantised layers
            return f" ({name} is a {type(module).__module__}.{type(module).__name__})"
    return ""


def refuse_cache(transformer: nn.Module) -> None:
    """Raise RuntimeError where diffusers answers from a cache: also asked before each watched pass,
    for it can be switched on later.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise InvalidState(
            "A diffusers cache is on, which answers from earlier steps, so that a step could not "
            "be recomputed on its own; "
            "call transformer.disable_cache() first."
        )
