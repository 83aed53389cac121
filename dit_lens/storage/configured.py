"""The configuration of a model or scheduler of diffusers, as another like it is made from it."""

from __future__ import annotations

import inspect
from typing import Any

DEFAULTS = "_use_default_values"
"""Where diffusers keeps the names of what was not given; `from_config` leaves these out."""


def config_of(made: Any) -> dict[str, Any]:
    """What `from_config` makes the same again from. Diffusers takes what was given by its place,
    as in `DDIMScheduler(1000, 1e-4)`, for not given.

    Args:
        made: a model or a scheduler of diffusers.

    >>> from diffusers import DDIMScheduler
    >>> DDIMScheduler.from_config(config_of(DDIMScheduler(100))).config.num_train_timesteps
    100
    """
    config = dict(made.config)
    usual = {name: p.default for name, p in inspect.signature(type(made)).parameters.items()}

    def is_usual(name: str) -> bool:
        value, default = config.get(name), usual.get(name)
        return type(value) is type(default) and bool(value == default)

    return config | {DEFAULTS: [name for name in config.get(DEFAULTS, ()) if is_usual(name)]}
