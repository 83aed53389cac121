"""Orthonormal bases of one axis of a grid, which `Bands` puts together: Fourier, DCT-II, Haar."""

from __future__ import annotations

import torch
from torch import Tensor


def fourier(n: int) -> tuple[Tensor, Tensor]:
    """Orthonormal cosines and sines [mode, n] and their frequencies [mode], cycles per token.

    Args:
        n: tokens along the axis.
    """
    # 0, 1, 1, 2, 2, ...: cosine at odd places, sine at even ones
    k = ((torch.arange(n) + 1) // 2).double()
    angle = 2 * torch.pi * k[:, None] * torch.arange(n, dtype=torch.float64) / n
    rows = torch.where((torch.arange(n) % 2 == 1)[:, None], angle.cos(), angle.sin())
    rows[0] = 1
    return rows / rows.norm(dim=1, keepdim=True), k / n


def cosine(n: int) -> tuple[Tensor, Tensor]:
    """The DCT-II: orthonormal rows [mode, n] and their frequencies [mode], cycles per token.

    Args:
        n: tokens along the axis.
    """
    k = torch.arange(n, dtype=torch.float64)
    rows = (torch.pi * k[:, None] * (k + 0.5) / n).cos()
    return rows / rows.norm(dim=1, keepdim=True), k / (2 * n)


def halvings(n: int) -> list[int]:
    """The sizes of the pyramid of n cells, 1 first: 12 -> [1, 3, 6, 12].

    Args:
        n: cells along the axis.
    """
    sizes = [n]
    while sizes[0] > 1:
        sizes.insert(0, sizes[0] // 2 if sizes[0] % 2 == 0 else 1)
    return sizes


def haar(sizes: list[int], levels: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows [mode, n], coarse to fine, and the level [mode] at which each enters (0: the
    mean).

    Args:
        sizes: of the pyramid, as `halvings` gives them.
        levels: of the whole grid's pyramid, which has the longer axis's.
    """
    n, rows, level = sizes[-1], [torch.ones(1, sizes[-1], dtype=torch.float64)], [0]
    for lev, (coarse, fine) in enumerate(
        zip(sizes, sizes[1:], strict=False), start=levels - len(sizes) + 1
    ):
        # each coarse cell is m fine ones: the m - 1 ways, orthogonal to their mean, to differ
        m = fine // coarse
        inside = torch.kron(torch.eye(coarse, dtype=torch.float64), cosine(m)[0][1:])
        rows.append(inside.repeat_interleave(n // fine, dim=1))
        level += [lev] * (fine - coarse)
    matrix = torch.cat(rows)
    return matrix / matrix.norm(dim=1, keepdim=True), torch.tensor(level)
