"""dit_lens opens up Diffusion Transformers: hook points, traces, twins, probes.

    # or any diffusers DiT pipeline, transformer, folder, hub id
    model = dit_lens.load("digits")
    with dit_lens.trace(model) as t:      # forgets nothing, keeps almost nothing
        run = dit_lens.sample(model, labels=[3, 7])
    t["resid_post", 5]                    # [step, batch, token, d_model], recomputed when read

Everything here is imported on first use, so that `import dit_lens` stays light. Besides these names
there are the namespaces `families`, `patching`, `experiments`, `probes`, `groundtruth` and
`testing`, each with an `__all__`; what is in none of them is internal.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ActivationCache": "hooks.cache",
    "Activations": "tracing.activations",
    "Adapter": "families.adapter",
    "Bands": "measures.bands",
    "DitLensError": "errors",
    "HookedDiT": "model.hooked",
    "NotReproduced": "model.witness",
    "Probe": "tracing.probe",
    "Run": "sampling.run",
    "Series": "tracing.series",
    "Site": "tracing.site",
    "Trace": "tracing.trace",
    "Twins": "twinning.twins",
    "UnknownName": "hooks.names",
    "load": "model.loading",
    "load_result": "report.stored",
    "load_trace": "tracing.trace",
    "record": "tracing.recording",
    "reuse": "plans.runner",
    "sample": "sampling.sample",
    "to_nnsight": "bridges.nnsight",
    "to_transformer_lens": "bridges.transformer_lens",
    "trace": "tracing.trace",
    "twins": "twinning.twins",
}
_NAMESPACES = (
    "errors",
    "experiments",
    "families",
    "groundtruth",
    "measures",
    "patching",
    "probes",
    "testing",
)
__all__ = [*_HOME, *_NAMESPACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'dit_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
