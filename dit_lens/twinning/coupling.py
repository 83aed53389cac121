"""Coupling two twins through attention: the gate of arXiv 2603.20987, built from hooks.

In a batch [A | B] (with guidance [A | B | A null | B null]) every item attends to itself and, with
strength g, to its twin:

- `mix`, the paper's: Out_A = (softmax(Q_A K_A') V_A + g softmax(Q_A K_B') V_B) / (1 + g), and the
  same with A and B exchanged;
- `joint`: one softmax over both sets of keys, with log g added to the logits of the twin's.

To first order in D = X_A - X_B both damp what the two disagree on by rho = (1 - g)/(1 + g) and
leave what they share alone. The coupling acts inside the attention of every family
(`dit_lens.families.parts.attention.Attend`), on the whole sequence where text is attended to as
well; `hook_z` is what comes out of it. At g = 0 nothing is attached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..families.parts.attention import Kernel, sdpa
from ..model.hooked import HookedDiT
from ..model.pinned import sent

CouplingForm = Literal["mix", "joint"]


@contextmanager
def coupled(
    model: HookedDiT,
    g: float,
    form: CouplingForm = "mix",
    layers: Sequence[int] | None = None,
    passes: int = 1,
) -> Iterator[None]:
    """Couple the twins of every batch [A | B] inside the `with` block.

    Args:
        model: the hooked model.
        g: strength of the coupling, 0 or more.
        form: "mix" or "joint"; see the module.
        layers: the layers that are coupled, negative ones from the end; None is all.
        passes: 2 with guidance, where the batch is [A | B | A null | B null].

    Raises:
        ValueError: for g below 0 or not finite, an unknown form, or a layer that does not exist.

    >>> import dit_lens, torch; model = dit_lens.load("digits")
    >>> x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([500, 500]), torch.tensor([3, 3])
    >>> with coupled(model, g=0.5): out = model(x, t, y)
    """
    g, form = check_coupling(g, form)
    passes = arguments.whole("passes", passes, 1)
    n = model.cfg.n_layers
    chosen = range(n) if layers is None else arguments.layers(layers, n)

    def coupling_of(
        own: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel
    ) -> Tensor:
        return coupled_attention(own, q, k, v, g, form, passes, mask, kernel)

    mine = {layer: coupling_of for layer in chosen if g}
    with model.instrumentation.under(couplings={**model.instrumentation.couplings, **mine}):
        yield


def check_coupling(g: Any, form: Any) -> tuple[float, CouplingForm]:
    """The strength and the form; raises InvalidValue or InvalidType for what is none."""
    form = arguments.choice("form", form, get_args(CouplingForm))
    return arguments.number("g", g, 0), form


def partners(batch: int, passes: int = 1) -> Tensor:
    """The position of each item's twin, [batch], in `passes` stacked copies of [A | B]."""
    if batch % (2 * passes):
        raise InvalidValue(f"A batch of {batch} is not made of pairs [A | B] in {passes} passes.")
    return torch.arange(batch).view(passes, 2, -1).flip(1).reshape(-1)


def coupled_attention(
    own: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: float,
    form: CouplingForm,
    passes: int = 1,
    mask: Tensor | None = None,
    kernel: Kernel = sdpa,
) -> Tensor:
    """Gated attention of each item with its twin; all [batch, head, token, d_head], `own` the plain
    attention output.

    `mask` and `kernel` are the model's own. Raises ValueError for the joint form where attention
    has no softmax to share.
    """
    twin = sent(partners(len(q), passes), q.device)
    theirs = mask[twin] if mask is not None and len(mask) == len(q) else mask
    if form == "mix":
        return (own + g * kernel(q, k[twin], v[twin], theirs)) / (1 + g)
    if getattr(kernel, "linear", False):
        raise InvalidValue(
            "The joint form shares one softmax between twins, and this model's attention is "
            "linear; expected form='mix'."
        )
    bias = [_as_bias(m, q, k) for m in (mask, theirs)]
    logits = torch.cat([bias[0], bias[1] + math.log(g)], -1)
    both_k, both_v = torch.cat([k, k[twin]], -2), torch.cat([v, v[twin]], -2)
    return F.scaled_dot_product_attention(q, both_k, both_v, attn_mask=logits)


def _as_bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """A mask as what is added to the logits, [.., query, key]."""
    zeros = q.new_zeros(q.shape[-2], k.shape[-2])
    if mask is None:
        return zeros
    return zeros.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else zeros + mask


def linear_response(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, g: float
) -> Tensor:
    """The attention output's difference between twins to first order in their differences; [...,
    token, d_head].

    rho P dv + Cov_P[dq k', v] + rho Cov_P[q dk', v], with rho = (1 - g)/(1 + g), q, k, v of the
    mean replica, P its pattern, logits scaled by 1/sqrt(d_head), and Cov_P[L, v] = (P * (L -
    rowmean_P L)) v. Both forms share it; the error is of second order in the differences.
    """
    scale = q.shape[-1] ** -0.5
    pattern = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    rho = (1 - g) / (1 + g)

    def cov(logits: Tensor) -> Tensor:
        return (pattern * (logits - (pattern * logits).sum(-1, keepdim=True))) @ v

    return (
        rho * pattern @ dv
        + cov(dq @ k.transpose(-1, -2) * scale)
        + rho * cov(q @ dk.transpose(-1, -2) * scale)
    )
