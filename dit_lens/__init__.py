"""dit_lens opens up Diffusion Transformers: hook points, traces, twins, probes.

    model = dit_lens.load("digits")                    # or any diffusers DiT pipeline, transformer, folder, hub id
    with dit_lens.trace(model) as t:                   # forgets nothing, keeps almost nothing
        run = dit_lens.sample(model, labels=[3, 7])
    t["resid_post", 5]                                 # [step, batch, token, d_model], recomputed when read

Everything here is imported on first use, so that `import dit_lens` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ActivationCache": "cache",
    "Bands": "bands",
    "HookedDiT": "model",
    "Probe": "probe",
    "Run": "sampling",
    "Site": "probe",
    "Trace": "tracing",
    "UnknownName": "names",
    "load": "loading",
    "load_trace": "tracing",
    "sample": "sampling",
    "to_nnsight": "bridges.nnsight",
    "to_transformer_lens": "bridges.transformer_lens",
    "trace": "tracing",
    "twins": "twinning",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # over the submodule of the same name, which importing has just put here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
