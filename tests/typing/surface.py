"""The types that a user's checker sees after `import dit_lens`; read by mypy, never run.

Functions that are only checked: no model is loaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor
from typing_extensions import assert_type

import dit_lens


def opening(transformer: object) -> None:
    model = dit_lens.load("digits")
    assert_type(model, dit_lens.HookedDiT)
    assert_type(dit_lens.HookedDiT(transformer), dit_lens.HookedDiT)
    assert_type(model.names, list[str])
    assert_type(model.cfg.n_layers, int)
    assert_type(model.cfg, dit_lens.families.Config)
    model.remove()


def one_pass(model: dit_lens.HookedDiT, x: Tensor, t: Tensor, y: Tensor) -> None:
    assert_type(model(x, t, y), Tensor)
    assert_type(model.run_with_hooks(x, t, y), Tensor)
    output, cache = model.run_with_cache(x, t, y)
    assert_type(output, Tensor)
    assert_type(cache, dit_lens.ActivationCache)
    assert_type(cache["resid_post", 5], Tensor)


def a_run(model: dit_lens.HookedDiT) -> None:
    with dit_lens.trace(model, names="resid_post") as t:
        run = dit_lens.sample(model, labels=[3, 7], steps=50)
    assert_type(t, dit_lens.Trace)
    assert_type(t["resid_post", 5], Tensor)
    assert_type(t.stack("resid_post"), Tensor)
    assert_type(t.to_xarray(), xr.Dataset)
    assert_type(t.save("trace.safetensors"), Path)
    assert_type(dit_lens.load_trace("trace.safetensors"), dit_lens.Trace)
    assert_type(run, dit_lens.Run)
    assert_type(run.images, Tensor)
    assert_type(run.replay(from_step=12), dit_lens.Run)
    assert_type(run.activations("resid_post", 5, step=12), Tensor)


def on_disk(model: dit_lens.HookedDiT) -> None:
    data = dit_lens.record(model, ("resid_post", 14), [0, 1], "acts", at=range(4), dtype="bfloat16")
    assert_type(data, dit_lens.Activations)
    assert_type(data[0], dict[str, Tensor])
    assert_type(data.of("resid_mid"), dit_lens.Activations)
    for batch in data.batches(64, seed=0):
        assert_type(batch, dict[str, Tensor])
    dit_lens.record(model, "resid_post", [0])  # type: ignore[call-arg]


def pairs(model: dit_lens.HookedDiT) -> None:
    twins = dit_lens.twins(model, pairs=4, tie="noise", release=25)
    assert_type(twins, dit_lens.Twins)
    assert_type(twins.a, dit_lens.Run)
    dit_lens.twins(model, tie="noize")  # type: ignore[arg-type]


def interventions(model: dit_lens.HookedDiT, source: dit_lens.Run, target: dit_lens.Run) -> None:
    windows = dit_lens.patching.tiles(0, 50, 5)
    assert_type(windows, list[range])
    patches = dit_lens.patching.grid(range(28), ["attn_out"], windows)
    assert_type(patches, list[dit_lens.patching.Patch])
    swept = dit_lens.patching.sweep(source, target, patches)
    assert_type(swept, xr.Dataset)
    assert_type(dit_lens.patching.as_grid(swept), xr.Dataset)
    assert_type(dit_lens.Bands.radial((8, 8), cut=0.25), dit_lens.Bands)


def single_pass_patching(
    model: dit_lens.HookedDiT, x: Tensor, t: Tensor, y: Tensor, cache: dit_lens.ActivationCache
) -> None:
    def metric(output: Tensor) -> Tensor:
        return output.mean()

    patched = dit_lens.patching.get_act_patch_resid_pre(model, (x, t, y), cache, metric)
    assert_type(patched, Tensor)


class Norms(dit_lens.Probe):
    names = "resid_post"

    def start(self, model: dit_lens.HookedDiT) -> None:
        self.norm: dict[tuple[int | None, int], float] = {}

    def observe(self, activation: Tensor, site: dit_lens.Site) -> None:
        assert_type(site.layer, int | None)
        assert_type(site.grid, tuple[int, ...])
        assert_type(site.twin, tuple[str, ...])
        self.norm[site.layer, site.step] = float(activation.norm())

    def result(self) -> xr.Dataset:
        return xr.Dataset()


def checks() -> None:
    assert_type(dit_lens.testing.check_family("DiTTransformer2DModel"), None)
    for row in dit_lens.testing.check_probe(Norms):
        assert_type(row.ok, bool)


def known_answers() -> None:
    truth = dit_lens.groundtruth.planted((3,), gain := 0.3, 8)
    assert_type(truth, dit_lens.groundtruth.GroundTruth)
    assert_type(gain, float)


def errors() -> None:
    try:
        dit_lens.load("digitz")
    except dit_lens.DitLensError as error:
        assert_type(error, dit_lens.DitLensError)
    assert_type(dit_lens.errors.InvalidValue("no"), dit_lens.errors.InvalidValue)
    assert_type(dit_lens.__version__, str)


def other_tools(model: dit_lens.HookedDiT) -> None:
    assert_type(dit_lens.to_nnsight(model), Any)
