"""A fingerprint of a model's weights: to refuse a recomputation that would no longer give what was
traced.
"""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import nn


def fingerprint(transformer: nn.Module) -> str:
    """Hex digest over every parameter and buffer: name, shape, dtype and a checksum of all bytes.

    A change through `.data` counts too, which PyTorch's version counters miss. It costs one reading
    of the weights (from a GPU: one copy). Offloaded weights (on the meta device) count by name
    only.

    >>> fingerprint(nn.Linear(2, 2)) != fingerprint(nn.Linear(2, 2))
    True
    """
    digest = hashlib.sha256()
    for name, value in sorted(transformer.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        if value.device.type != "meta":
            data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(zlib.crc32(data).to_bytes(4, "little"))
    return digest.hexdigest()
