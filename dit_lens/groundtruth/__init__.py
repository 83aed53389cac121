"""Models and formulas whose answer is known, so that every tool here can be shown to be right, or
caught.

Belongs here: exact formulas, and models whose answer follows from how they are built. Does not:
anything that measures a model of unknown answer.

- `closed_forms`: the exact answers as functions of numbers; no model.
- `models`: real diffusers DiTs whose weights are set so that the answer is known (`gaussian`,
  `planted`, `random_planted`).
- `mixture`: one more of them, which decides a global bit in one layer and a bit a token in another
  (`two_scale`).
- `nulls`: models in which there is nothing to find (`random_weights`, `shuffle_layers`).
- `measured`: how near a model comes to its answer (`stream_gains`).
- `faults`: trained models with a fault planted where and when it is known (`plant`, `Fault`).
- `digits`, `portraits`: readers of the bundled models' images.
- `construction`: the few tricks that put a formula into a DiT's weights.

Belongs here: models and formulas whose answer is known. Does not: what is held against them
(`testing`). docs/checks.md derives the exact answers, which it and the docstrings number E1 to E6.
"""

from . import digits, faults, portraits
from .circuits import exact_agreement, redundant, relayed
from .closed_forms import (
    commitment_log_snr,
    commitment_timestep,
    ddim_agreement,
    deterministic_ratio,
    gaussian_agreement,
    gaussian_eps,
    mixture_agreement,
    planted_gain,
    sampler_agreement,
    token_mean,
)
from .measured import stream_gains
from .mixture import coefficients, mixture_eps, sides, two_scale
from .models import GroundTruth, gaussian, planted, random_planted
from .nulls import random_weights, shuffle_layers

__all__ = [
    "GroundTruth",
    "coefficients",
    "commitment_log_snr",
    "commitment_timestep",
    "ddim_agreement",
    "deterministic_ratio",
    "digits",
    "exact_agreement",
    "faults",
    "gaussian",
    "gaussian_agreement",
    "gaussian_eps",
    "mixture_agreement",
    "mixture_eps",
    "planted",
    "planted_gain",
    "portraits",
    "random_planted",
    "random_weights",
    "redundant",
    "relayed",
    "sampler_agreement",
    "shuffle_layers",
    "sides",
    "stream_gains",
    "token_mean",
    "two_scale",
]
