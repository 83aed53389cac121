"""The types of the built-in probes; read by mypy against the built wheel alone, for only there the
folder probes/ is `dit_lens.probes`.
"""

from __future__ import annotations

import xarray as xr
from typing_extensions import assert_type

import dit_lens


def built_in(model: dit_lens.HookedDiT) -> None:
    assert_type(dit_lens.probes.TwinPatching().run(model, pairs=2, release=2), xr.Dataset)
    probe = dit_lens.probes.SpectralSplit("resid_post")
    assert_type(probe, dit_lens.probes.SpectralSplit)
    with dit_lens.trace(model, probes=[probe]):
        dit_lens.sample(model, labels=[3])
    assert_type(probe.result(), xr.Dataset)
