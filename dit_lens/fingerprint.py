"""A fingerprint of a model's weights: to refuse a recomputation that would no longer give what was traced."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(transformer: nn.Module) -> str:
    """Hex digest over every parameter and buffer: name, shape, dtype and all bits (with a position-dependent checksum).

    It reads each weight twice, so it costs about as much as copying the model. Offloaded (meta) weights count by name only.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, value in sorted(transformer.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if value.device.type == "meta" or not value.numel():
                continue
            bits = value.detach().contiguous().view(-1).view(_INTEGER[value.element_size()]).long()
            place = torch.arange(1, 1 + min(bits.numel(), 65_521), device=bits.device)
            rows = nn.functional.pad(bits, (0, -bits.numel() % len(place))).view(-1, len(place))
            digest.update(f"{int((rows.sum(0) * place).sum())} {int(rows.sum(1).cumsum(0).sum())}".encode())
    return digest.hexdigest()


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
