"""Checksums of tensors: of all their bits and their places, on their device, so that nothing waits
for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Checksum(NamedTuple):
    """What an activation [batch, ...] leaves behind. Each token and each channel has a weight of
    its own, so that the sums change when two of them change places.

    Attributes:
        bits: the wrapping weighted sum of its bit patterns, [batch], int64.
        total: its weighted sum, [batch], float32.
    """

    bits: Tensor
    total: Tensor


def checksum(x: Tensor) -> Checksum:
    """The checksum of an activation [batch, ...], on its device; nothing waits for it.

    >>> a = torch.randn(2, 64, 64); b = a.clone(); b[1, 3, 5] += 1e-6
    >>> (checksum(a).bits == checksum(b).bits).tolist()
    [True, False]
    """
    table = _table(x)
    return Checksum(_weighted(_integers(table), torch.int64), _weighted(table, torch.float32))


def checksum_bits(x: Tensor) -> Tensor:
    """The `bits` of the checksum of an activation [batch, ...], alone: in half the time.

    >>> a = torch.randn(2, 3, 4)
    >>> torch.equal(checksum_bits(a), checksum(a).bits)
    True
    """
    return _weighted(_integers(_table(x)), torch.int64)


def _table(x: Tensor) -> Tensor:
    """An activation as [batch, row, column]."""
    flat = x.detach() if x.requires_grad else x
    return flat.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1)


def _integers(table: Tensor) -> Tensor:
    """The bit patterns of [batch, row, column], as wide integers as the rows allow."""
    rows, size = table.contiguous(), table.element_size()
    width = 8 if table.shape[2] * size % 8 == 0 else size
    if rows.storage_offset() * size % width:
        rows = rows.clone()
    return rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])


def _weighted(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over [batch, row, column], [batch], with a weight for each row, and for each column.

    Two sums along an axis, and no product with a table of weights: that would take three times as
    long, and as much memory as the table.
    """
    rows, columns = table.sum(2, dtype=dtype), table.sum(1, dtype=dtype)
    weights = _weights(rows.shape[1], columns.shape[1], dtype, table.device)
    return (torch.cat([rows, columns], 1) * weights).sum(1)


@lru_cache(maxsize=256)
def _weights(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of rows and columns, [rows + columns]: random integers, or random numbers of mean
    square 1, the same everywhere (NumPy promises the raw stream of its bit generators).
    """
    drawn = np.random.PCG64(0).random_raw(rows + columns)
    if dtype == torch.int64:
        drawn[:rows] |= np.uint64(1)  # an entry is counted with its row's weight and its column's:
        drawn[rows:] &= ~np.uint64(1)  # an odd number, with which no change can come to nothing
        return torch.from_numpy(drawn.view(np.int64)).to(device)
    return torch.from_numpy((drawn / 2.0**63 - 1) * 3**0.5).to(device, dtype)
