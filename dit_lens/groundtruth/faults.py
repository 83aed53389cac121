"""Faults whose place is known: trained models with weights spoiled in one layer and at some times.

A fault is planted into a copy of a `DiTTransformer2DModel`. In a window of timesteps, and only
there, the weights that write a layer's answer into the stream are others: those of the MLP, of the
attention, or of one head of it; for every token or for some. Outside the window the copy is the
model, bit for bit. So a run of the model and a run of the copy from the same seeds are one until
the window begins, and where and when they part is known.

A *decoy* writes a large number into every channel of a layer's stream. The stream changes more than
by any fault, and the image does not: every LayerNorm, the last one too, takes the mean off.
`tilted` spoils the start instead, with no layer to blame.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidValue
from ..storage.configured import config_of

Part = Literal["mlp", "attn", "decoy"]


@dataclass(frozen=True)
class Fault:
    """Where and when weights are spoiled.

    Attributes:
        layer: the block.
        timesteps: the first timestep at which they are, and the first at which they are not, as the
            model counts them: 0 is clean.
        part: "mlp" or "attn", whose output weights are spoiled; or "decoy".
        head: of "attn", only this head's.
        tokens: only for these tokens, by number; None is all.
        strength: how large the change is, in sizes (Frobenius norms) of the weights; of a decoy the
            number that is written.
        seed: of the change.

    >>> Fault(9, (200, 600), head=2, part="attn").layer
    9
    """

    layer: int
    timesteps: tuple[float, float]
    part: Part = "mlp"
    head: int | None = None
    tokens: Sequence[int] | None = field(default=None)
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ends = arguments.listed("timesteps", self.timesteps, "two, the lower one first", 2)
        low, high = (arguments.number("timesteps", t) for t in (ends[0], ends[-1]))
        if len(ends) != 2 or not low < high:
            raise InvalidValue(
                f"timesteps={arguments.shown(self.timesteps)} is no window; expected two, the "
                "lower one first, such as (200, 600)."
            )
        checked: dict[str, Any] = {
            "layer": arguments.whole("layer", self.layer, 0),
            "timesteps": (low, high),
            "part": arguments.choice("part", self.part, get_args(Part)),
            "head": arguments.optional(arguments.whole, "head", self.head, 0),
            "tokens": arguments.optional(arguments.wholes, "tokens", self.tokens, 0, 10**6),
            "strength": arguments.number("strength", self.strength, above=0),
            "seed": arguments.seed("seed", self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.head is not None and self.part != "attn":
            raise InvalidValue(f"part={self.part!r} has no heads; expected part='attn'.")


def plant(transformer: Any, faults: Sequence[Fault]) -> Any:
    """A copy of a model with faults planted; none gives the model as it is.

    Args:
        transformer: a `DiTTransformer2DModel`, such as `dit_lens.load("digits").transformer`.
        faults: what is spoiled, one or several.

    Returns:
        The copy, which carries none of the original's hooks.

    Raises:
        InvalidType: for another kind of model.
        InvalidValue: for a layer, head or token that the model does not have.

    >>> import dit_lens; digits = dit_lens.load("digits")
    >>> spoiled = plant(digits.transformer, [Fault(9, (200, 600))])
    >>> dit_lens.HookedDiT(spoiled, scheduler=digits.scheduler).cfg.n_layers
    28
    """
    arguments.instance("transformer", transformer, DiTTransformer2DModel, "diffusers' DiT")
    faults = arguments.listed("faults", faults, "a list of Fault", fewest=0)
    for fault in faults:
        arguments.instance("faults", fault, Fault, "a list of Fault")
    made = _bare_copy(transformer)
    for fault in faults:
        _check(fault, made)
        block = made.transformer_blocks[fault.layer]
        if not isinstance(block.norm1.emb, _Watched):
            block.norm1.emb = _Watched(block.norm1.emb)
        where = block.attn1.to_out if fault.part == "attn" else block.ff.net
        place = 0 if fault.part == "attn" else 2
        where[place] = _Spoiled(where[place], fault, made.config, block.norm1)
    return made.eval().requires_grad_(False)


def tilted(noise: Tensor, strength: float = 1.0, cut: float = 0.13, seed: int = 0) -> Tensor:
    """Start noise that leans one way in its lowest frequencies: a fault of the noise, with no layer
    to blame.

    Args:
        noise: the starts of a run, `run.latents[0]`, [item, channel, height, width].
        strength: how many standard deviations the low band is moved by.
        cut: where the low band ends, in cycles per pixel.
        seed: of the way it leans.

    Returns:
        The starts, for `dit_lens.sample(latents=)`.

    Raises:
        InvalidValue: for latents that have no height and width.

    >>> tilted(torch.zeros(1, 1, 16, 16)).shape
    torch.Size([1, 1, 16, 16])
    """
    arguments.tensor("noise", noise, (None, None, None, None), finite=True)
    strength = arguments.number("strength", strength, above=0)
    seed = arguments.seed("seed", seed)
    cut = arguments.number("cut", cut, above=0)
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in noise.shape[-2:])
    low = (rows[:, None].square() + columns.square()).sqrt() <= cut
    draw = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed))
    way = torch.fft.ifft2(torch.fft.fft2(draw.double()) * low).real
    modes = int(low.sum()) * noise.shape[1]
    return noise + strength * (way * math.sqrt(modes / float(way.square().sum()))).to(noise)


def _bare_copy(transformer: Any) -> Any:
    """The same weights in a new model, without hooks and opened forwards; what was planted before
    is not copied.
    """
    odd = [name for name, m in transformer.named_modules() if isinstance(m, (_Spoiled, _Watched))]
    if odd:
        raise InvalidValue(
            f"The model has a fault planted already, at {odd[0]!r}; expected the model without, "
            "and all faults at once."
        )
    with torch.random.fork_rng(devices=[]):  # the layers draw initial weights
        made = type(transformer).from_config(config_of(transformer))
    torch.nn.Module.to(made, transformer.device, transformer.dtype)
    made.load_state_dict(copy.deepcopy(transformer.state_dict()))
    return made


def _check(fault: Fault, transformer: Any) -> None:
    """Raise InvalidValue for what the model does not have."""
    c = transformer.config
    tokens = (c.sample_size // c.patch_size) ** 2
    for name, value, n in (
        ("layer", fault.layer, c.num_layers),
        ("head", fault.head, c.num_attention_heads),
        ("tokens", None if fault.tokens is None else max(fault.tokens), tokens),
    ):
        if value is not None and value >= n:
            raise InvalidValue(
                f"{name}={value} is not in the model; expected 0 to {n - 1} (nearest: {n - 1})."
            )


class _Watched(nn.Module):
    """A block's embedder of time and class, which keeps the timesteps that it was last asked for:
    what a condition on t in this block can look at.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.now: Tensor | None = None
        self.cond: Tensor | None = None

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: Any = None) -> Tensor:
        self.now = timestep
        self.cond = self.own(timestep, class_labels, hidden_dtype=hidden_dtype)
        return self.cond


class _Spoiled(nn.Module):
    """A linear map whose weights are others at some timesteps, for some tokens."""

    delta: Tensor
    tokens: Tensor

    def __init__(self, own: Any, fault: Fault, config: Any, norm: Any) -> None:
        super().__init__()
        self.own, self.fault = own, fault
        self.norm = [norm]  # in a list: no submodule of this one
        while isinstance(own, _Spoiled):
            own = own.own
        weight = own.weight.detach()
        draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(fault.seed))
        delta = draw.to(weight)
        if fault.head is not None:
            size = config.attention_head_dim
            keep = torch.zeros_like(delta)
            keep[:, fault.head * size : (fault.head + 1) * size] = 1
            delta, weight = delta * keep, weight * keep
        self.register_buffer("delta", delta * (fault.strength * weight.norm() / delta.norm()))
        tokens = torch.ones((config.sample_size // config.patch_size) ** 2, dtype=torch.bool)
        if fault.tokens is not None:
            tokens = torch.zeros_like(tokens)
            tokens[list(fault.tokens)] = True
        self.register_buffer("tokens", tokens.to(weight))

    @property
    def weight(self) -> Any:
        """The weights outside the window."""
        return self.own.weight

    @property
    def bias(self) -> Any:
        """The bias, which is not touched."""
        return self.own.bias

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.own(x)
        now, (low, high) = self.norm[0].emb.now, self.fault.timesteps
        active = (now >= low) & (now < high)
        if not bool(active.any()):
            return found
        change = F.linear(x, self.delta) if self.fault.part != "decoy" else self._decoy(found)
        rest = [1] * (found.ndim - 2)  # an axis of heads may lie between tokens and channels
        where = self.tokens.view(1, -1, *rest) * active.to(found).view(-1, 1, *rest)
        return found + change * where

    def _decoy(self, found: Tensor) -> Tensor:
        """What the block's gate makes the same number in every channel of."""
        norm = self.norm[0]
        gate = norm.linear(norm.silu(norm.emb.cond)).chunk(6, dim=1)[-1][:, None]
        safe = torch.where(gate.abs() < 1e-6, torch.full_like(gate, 1e-6), gate)
        return (self.fault.strength / safe).expand_as(found)
