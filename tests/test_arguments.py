"""Every argument of every public function against values of every type: a call works, or it is
refused with an error of dit_lens's in one sentence, before the model has run, which is left as it
was.

`make attack` (DIT_LENS_ATTACK=1) makes 2,000 calls and more; without it there are some 350.
"""

import contextlib
import inspect
import os
import tempfile
import warnings
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_dit
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_layouts import DiT

import dit_lens
from dit_lens import arguments, experiments, families, measures, patching
from dit_lens import groundtruth as gt
from dit_lens.errors import DitLensError, InvalidType, InvalidValue
from dit_lens.experiments import (
    Outcome,
    attributes,
    cause_map,
    commitment_difference,
    couple_alone,
    couplings,
    cumulative,
    features,
    images,
    interchange,
    knock_outs,
    knocked_out,
    latents,
    measure_gap,
    one_pass,
    release_sweep,
    shapley,
    smallest_set,
    step_doubling,
)
from dit_lens.hooks.stored_edits import StoredEdit, made_for, save_edits
from dit_lens.measures import Agreement, agreement, curve, fit_commitment, half_crossing, onset
from dit_lens.patching import (
    Patch,
    as_grid,
    attribute,
    default_sites,
    generic_activation_patch,
    grid,
    path_patch,
    sweep,
    tiles,
)
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence, TwinPatching
from dit_lens.twinning.coupling import coupled

ATTACK = os.environ.get("DIT_LENS_ATTACK") == "1"
EXAMPLES = 2400 if ATTACK else 320

SCALARS = [
    *(kind(1) for kind in (np.int8, np.int32, np.int64, np.uint8, np.uint64)),
    *(kind(1.5) for kind in (np.float16, np.float32, np.float64, np.complex64)),
    *(torch.tensor(1, dtype=kind) for kind in (torch.uint8, torch.int32, torch.int64)),
    *(torch.tensor(1.5, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.float64)),
    torch.tensor(1j),
]
POOL = [
    *(True, False, np.bool_(True), torch.tensor(True), None, "", "12", "mixed", b"x", object()),
    *(0.0, 0.5, 1.7, -0.5, float("nan"), float("inf"), -float("inf"), 1e300, 1j),
    *(0, 1, -1, -7, 10**30, 2**63, 2**40),
    *([], (), {}, set(), [0.5], [1.7], ["a"], [None], [True], [10**30], {1: 2}, int, iter([1])),
    *(range(0), range(3, 1, -1), slice(None), slice(0, 0), slice(-1, None), slice(0.5, None)),
    *(np.array([]), np.array([1.5]), np.array(["a"]), np.array(3), np.array([1]), np.zeros((2, 2))),
    *(torch.zeros(0), torch.zeros(2, 2, 2, 2, 2), torch.zeros(3, dtype=torch.bool)),
    *(torch.zeros(2, 4, 8, 8).long(), torch.full((2, 4, 8, 8), float("nan")), torch.zeros(2, 1)),
    *SCALARS,
]


def opened():
    return dit_lens.HookedDiT(make_dit(classes=4), scheduler=DDIMScheduler(1000))


MODEL = opened()


def same(activation, hook):
    return activation


def ink(images):
    return images.flatten(1).mean(1) + 1


@cache
def world():
    """Runs, twins and results of them, made once."""
    model = MODEL
    x, t, y = torch.zeros(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([0, 1])
    bands = dit_lens.Bands.radial((8, 8), cut=0.25)
    pair = dit_lens.twins(model, 8, [0] * 8, steps=4, seed=1)
    small = dit_lens.twins(model, 2, steps=3, release=1)
    with dit_lens.trace(model) as seen:
        run = dit_lens.sample(model, [0, 1], steps=3)
    curves = one_pass(pair, [latents(bands)])
    swept = sweep(small.a, small.b, grid([1], "attn_out", [range(1, 2)]))
    _, kept = model.run_with_cache(x, t, y)
    folder = tempfile.mkdtemp()
    recorded = dit_lens.record(model, ("resid_post", 1), [0, 1], f"{folder}/first", steps=3)
    file = seen.save(Path(tempfile.mkdtemp()) / "trace")
    zero = [StoredEdit("blocks.1.hook_attn_out", (1,), "zero")]
    about = made_for(model.transformer) | {"timesteps": run.timesteps.tolist()}
    edits = save_edits(f"{folder}/edits.json", zero, about)
    return dict(
        folder=folder,
        edits=edits,
        recorded=recorded,
        model=model,
        x=x,
        t=t,
        y=y,
        bands=bands,
        pair=pair,
        small=small,
        run=run,
        trace=seen,
        curves=curves,
        swept=swept,
        cache=kept,
        file=file,
        outcomes=[latents(bands)],
        stats=curves.stats["latents"],
        tokens=dit_lens.Bands.radial((4, 4), cut=0.25),
    )


def edited(**region):
    with dit_lens.trace(MODEL) as t:
        t.edit(region.pop("name", "resid_post"), region.pop("fn", lambda a, hook: a), **region)


ORIGINAL = DiT(d=16, heads=2).state_dict()


def own_model(**given):
    dit_lens.HookedDiT(make_dit(classes=4), **given)


def hooked_with(**given):
    with MODEL.hooks([(given["names"], given["fn"])]):
        pass


def held(**given):
    with coupled(MODEL, **given):
        pass


def reused(**given):
    with dit_lens.reuse(**given):
        pass


HALF = [0.5, np.float32(0.5), torch.tensor(0.5)]


def whole(value):
    """A whole number in every type that is one."""
    return [value, np.int64(value), np.int32(value), torch.tensor(value)]


COUNT = {"seed": whole(3), "resamples": whole(20)}
KEPT = {"store": [None], "engine": ["local", experiments.Engine()]}
RUN = {
    "steps": whole(3),
    "guidance": [1, 2.5, np.float32(1.5), torch.tensor(2)],
    "scheduler": ["ddim", None],
    "progress": [None, lambda done, total: None],
}
INDEX = [None, 0, np.int64(1), torch.tensor(1), [0, 1], range(1), slice(0, 1), np.array([0])]
STEPS = [None, *whole(1), range(2), slice(1, 3), [0, 2], {1}, np.array([1]), torch.tensor([1, 2])]


def table():
    """(name, function, what it is called with, good values of its arguments): the first good value
    of each stands in where another argument is tried.
    """
    w = world()
    model, bands, pair, small, run = (w[k] for k in ("model", "bands", "pair", "small", "run"))
    labels = [[0, 1], np.array([0, 1]), torch.tensor([0, 1]), range(2), [np.int64(1), 0]]
    layers = [[1], range(2), np.array([0, 1]), torch.tensor([1]), [-1], [np.int64(1)], None]
    rows = [
        (
            "sample",
            dit_lens.sample,
            {"model": model},
            {
                "labels": labels,
                "seeds": [0, *whole(5), [1, 2], np.array([1, 2]), torch.tensor([3, 4])],
                "eta": [0, 1, *HALF],
                "guided_channels": ["all", "first3"],
                "latents": [None, w["x"]],
                "batch": [None, *whole(1)],
                **RUN,
            },
        ),
        (
            "twins",
            dit_lens.twins,
            {"model": model},
            {
                "pairs": whole(2),
                "labels": [None, *labels],
                "tie": ["attention"],
                "g": [0.5, 0, *HALF],
                "form": ["mix", "joint"],
                "layers": [None, *layers],
                "eps": [0.1, *HALF],
                "release": whole(1),
                "seed": whole(3),
                "eta": [None, 1, *HALF],
                "probes": [(), []],
                "batch": [None, *whole(2)],
                **RUN,
            },
        ),
        (
            "Run.activations",
            run.activations,
            {"name": "resid_post"},
            {"layer": [*whole(1), -1], "step": [*whole(1), None]},
        ),
        (
            "record",
            lambda **k: dit_lens.record(out=tempfile.mkdtemp(dir=w["folder"]), **k),
            {"model": model, "names": "resid_post"},
            {
                "labels": labels,
                "dtype": [None, torch.bfloat16, "float16"],
                "tokens": INDEX,
                "at": [None, *INDEX],
                "batch": whole(2),
                "shard": whole(1),
                "seeds": [0, *whole(5), [1, 2]],
                "eta": [0, 1, *HALF],
                **RUN,
            },
        ),
        (
            "Activations.take",
            w["recorded"].take,
            {},
            {"places": INDEX[1:]},
        ),
        (
            "Activations.batches",
            lambda **k: list(w["recorded"].batches(**k)),
            {},
            {"size": whole(5), "seed": [None, *whole(3)], "window": whole(2)},
        ),
        ("Run.forward", run.forward, {}, {"step": whole(1)}),
        ("Run.select", run.select, {}, {"items": INDEX[1:]}),
        (
            "Run.replay",
            run.replay,
            {},
            {
                "from_step": whole(1),
                "edits": [
                    (),
                    [("attn_out", lambda a, hook: a)],
                    {2: [("attn_out", same)]},
                ],
                "until": [None],
                "seeds": [None, *whole(5), [1, 2]],
                "latents": [None, w["x"]],
                "released": [False, True],
            },
        ),
        ("Run.seeds_at", run.seeds_at, {}, {"step": whole(1)}),
        ("Run.scheduler_at", run.scheduler_at, {}, {"step": whole(1)}),
        ("Run.require_released", run.require_released, {}, {"step": whole(1)}),
        (
            "trace",
            dit_lens.trace,
            {"model_or_pipe": model},
            {
                "names": ["resid_post", None, ("q", np.int64(1)), ["q", "k"]],
                "steps": STEPS,
                "device": [None, "cpu", torch.device("cpu")],
                "dtype": [None, torch.float16],
                "probes": [(), []],
            },
        ),
        (
            "Trace.edit",
            edited,
            {},
            {
                "name": ["resid_post", ("attn_out", 1)],
                "fn": [lambda a, hook: a],
                "steps": STEPS,
                "items": INDEX,
                "tokens": INDEX,
                "band": [None, (w["tokens"], np.int64(1))],
            },
        ),
        (
            "Trace.edit heads",
            edited,
            {"name": "z"},
            {"heads": [*INDEX, torch.tensor([True, False])]},
        ),
        (
            "Trace.patch",
            lambda **k: dit_lens.trace(model).patch("attn_out", **k),
            {},
            {"source": [torch.zeros(2, 16, 16), w["trace"]], "steps": STEPS},
        ),
        (
            "Trace.ablate",
            lambda **k: dit_lens.trace(model).ablate("attn_out", **k),
            {},
            {"mode": ["zero", "mean", "resample"], "steps": STEPS},
        ),
        (
            "Trace.hold",
            lambda **k: dit_lens.trace(model).hold(**k),
            {},
            {
                "name": ["attn_out", "blocks.1", ("mlp_out", 1)],
                "steps": [range(2, 4), slice(2, None), [2, 3], {2}, np.array([2])],
                "lag": whole(1),
                "order": whole(0),
                "tokens": INDEX,
            },
        ),
        (
            "Trace.get",
            w["trace"].get,
            {},
            {"names": ["resid_post", [("q", 1)]], "steps": STEPS, "branch": [None, "cond"]},
        ),
        ("Trace.stack", w["trace"].stack, {}, {"site": ["resid_post"], "steps": STEPS}),
        ("Trace.to_xarray", w["trace"].to_xarray, {}, {"names": ["attn_out"], "steps": STEPS}),
        (
            "HookedDiT",
            lambda **k: model(w["x"], w["t"], w["y"], **k),
            {},
            {"start_at_layer": [None], "stop_at_layer": [*whole(1), -1, None]},
        ),
        (
            "HookedDiT inputs",
            model,
            {},
            {
                "x": [w["x"]],
                "t": [w["t"]],
                "y": [w["y"], [0, 1], np.array([0, 1])],
            },
        ),
        (
            "HookedDiT.run_with_cache",
            lambda f: model.run_with_cache(w["x"], w["t"], w["y"], names_filter=f),
            {},
            {"f": ["resid_post", None, ("q", 1)]},
        ),
        ("HookedDiT.hooks", hooked_with, {}, {"names": ["attn_out"], "fn": [lambda a, hook: a]}),
        ("HookedDiT.resolve", model.resolve, {}, {}),
        (
            "Adapter",
            dit_lens.Adapter,
            {},
            {
                "latents": [(4, 8, 8), [4, 8, 8], np.array([4, 8, 8]), torch.tensor([1, 2, 2])],
                "labels": [*whole(3), {"y": torch.zeros(1)}],
                "time": [None, (1.0, 0.0), [0, 1], np.array([0.0, 1.0])],
                "output": [None, torch.neg],
                "names": [(), ("x",), ["x"]],
                "tokens": [slice(2, None)],
                "grid": [None, (4, 4)],
            },
        ),
        (
            "HookedDiT own",
            own_model,
            {},
            {
                "blocks": ["transformer_blocks", ["transformer_blocks"]],
                "parts": [None, {"attn": "attn1"}],
                "adapter": [None],
            },
        ),
        (
            "dit_from_original",
            families.dit_from_original,
            {},
            {"weights": [ORIGINAL], "heads": whole(2)},
        ),
        (
            "HookedDiT size",
            lambda size: dit_lens.HookedDiT(model, size=size),
            {},
            {"size": [None, (8, 8), (np.int64(8), 8)]},
        ),
        (
            "coupled",
            held,
            {},
            {"g": [0.5, *HALF], "form": ["mix", "joint"], "layers": layers, "passes": whole(1)},
        ),
        (
            "Patch",
            Patch,
            {},
            {
                "site": ["attn_out"],
                "layer": whole(1),
                "steps": [None, range(1, 2)],
                "heads": [None],
                "tokens": INDEX,
                "bands": [None],
                "band": [None],
                "direction": [None, torch.ones(16)],
                "kind": ["swap", "zero", "hold"],
                "seed": whole(1),
                "lag": whole(1),
                "order": whole(0),
                "depth": whole(1),
            },
        ),
        (
            "grid",
            grid,
            {},
            {
                "layers": [[1], range(2)],
                "sites": ["attn_out", ["attn_out"]],
                "windows": [[None, range(1, 2)]],
            },
        ),
        ("default_sites", default_sites, {}, {"model": [model]}),
        ("tiles", tiles, {}, {"first": whole(1), "stop": whole(9), "n": whole(2)}),
        (
            "sweep",
            lambda **k: sweep(
                small.a,
                small.b,
                [Patch(**{a: k.pop(a) for a in ("site", "layer", "tokens", "steps", "dose")})],
                **k,
            ),
            {},
            {
                "site": ["attn_out"],
                "layer": whole(1),
                "tokens": INDEX,
                "steps": [range(1, 2)],
                "dose": HALF,
                "outcome": [None, bands, lambda x: x.mean((1, 2, 3))],
                "batch": whole(2),
                "progress": [None],
            },
        ),
        (
            "sweep runs",
            sweep,
            {},
            {
                "source": [small.a],
                "target": [small.b],
                "patches": [grid([1], "attn_out", [range(1, 2)])],
                "store": [None],
            },
        ),
        ("as_grid", as_grid, {}, {"result": [w["swept"]]}),
        (
            "path_patch",
            path_patch,
            {"source": small.a, "target": small.b},
            {
                "sender": [("attn_out", 0), ("attn_out", np.int64(0))],
                "receiver": [None, ("mlp_out", 2)],
                "steps": [range(1, 2), range(2, 0, -1)],
            },
        ),
        (
            "attribute",
            attribute,
            {"source": small.a, "target": small.b},
            {
                "sites": ["attn_out", ["attn_out"]],
                "bands": [None, bands],
                "integrate": whole(1),
                "check": whole(0),
                "window": whole(1),
                "seed": whole(0),
            },
        ),
        (
            "generic_activation_patch",
            generic_activation_patch,
            {"model": model, "patching_metric": torch.sum},
            {
                "corrupted_inputs": [(w["x"], w["t"], w["y"])],
                "clean_cache": [w["cache"]],
                "activation_name": ["attn_out"],
                "index_axis_names": [("layer",)],
                "batch": whole(4),
            },
        ),
        ("latents", latents, {}, {"bands": [bands], "name": ["x"]}),
        (
            "images",
            images,
            {"model": model},
            {"bands": [None, bands], "name": ["x"], "cut": [0.25, np.float32(0.25)]},
        ),
        ("features", features, {"model": model}, {"function": [lambda x: x], "name": ["x"]}),
        ("Outcome", Outcome, {}, {"name": ["x"], "of": [lambda x: x], "bands": [None, bands]}),
        (
            "one_pass",
            one_pass,
            {},
            {
                "twins": [pair],
                "outcomes": [w["outcomes"]],
                "quantity": ["x0", "x_t"],
                "progress": [None],
            },
        ),
        (
            "release_sweep",
            release_sweep,
            {"twins": pair},
            {
                "outcomes": [w["outcomes"]],
                "releases": [*whole(3), [0, 1, 2], range(3), np.arange(3)],
                "seed": whole(0),
                "each": [None, lambda release, a, b: None],
            },
        ),
        (
            "there_and_back",
            experiments.there_and_back,
            {"runs": pair},
            {
                "outcomes": [w["outcomes"]],
                "releases": [*whole(3), [0, 1, 2]],
                "seed": whole(0),
                "progress": [None, lambda done, total: None],
                "batch": [None, *whole(8)],
            },
        ),
        ("load_edits", experiments.load_edits, {"model": model}, {"path": [w["edits"]]}),
        (
            "Curves.commitment",
            w["curves"].commitment,
            {},
            {"outcome": ["latents"], "level": [0.9, *HALF], **COUNT},
        ),
        ("Curves.agreement", w["curves"].agreement, {}, {"outcome": ["latents"]}),
        (
            "commitment_difference",
            commitment_difference,
            {"one": w["curves"]},
            {"other": [w["curves"]], "outcome": ["latents"], **COUNT},
        ),
        (
            "knocked_out",
            knocked_out,
            {},
            {
                "run": [run],
                "layers": [[], *layers[:-1]],
                "part": ["layer", "attn"],
                "direct": [False, True],
                "how": ["zero", "mean"],
                "window": [None, range(1)],
                "seed": whole(0),
            },
        ),
        (
            "couplings",
            couplings,
            {"model": model},
            {
                "strengths": [[0, 1], np.array([0, 0.5])],
                "form": ["mix"],
                "layers": layers,
                "eps": HALF,
                "pairs": whole(8),
                "steps": whole(5),
                "reader": [None],
                "cut": HALF[:1],
                **COUNT,
                **KEPT,
            },
        ),
        ("Bands.radial", dit_lens.Bands.radial, {"grid": (8, 8)}, {"n": [*whole(2), None]}),
        (
            "Bands.radial grid",
            dit_lens.Bands.radial,
            {},
            {"grid": [(8, 8), np.array([4, 4]), torch.tensor([4, 4])], "cut": [0.25, None]},
        ),
        ("Bands.radial edges", dit_lens.Bands.radial, {"grid": (8, 8)}, {"edges": [[0.2], (0.3,)]}),
        ("Bands.pooling", dit_lens.Bands.pooling, {}, {"grid": [(8, 8)]}),
        (
            "Bands.eigen",
            dit_lens.Bands.eigen,
            {"grid": (2, 2)},
            {"x": [torch.eye(4)], "n": whole(2), "sizes": [None, [1, 3]]},
        ),
        ("Bands.split", dit_lens.Bands.radial((8, 8)).split, {}, {"at": whole(2)}),
        ("Bands.energy", bands.energy, {}, {"x": [w["x"]]}),
        ("Bands.project", bands.project, {"x": w["x"]}, {"band": [*whole(1), "low"]}),
        (
            "agreement",
            agreement,
            {},
            {"a": [w["x"]], "b": [w["x"]], "bands": [None, bands], "groups": [None, [0, 0]]},
        ),
        ("curve", curve, {}, {"stats": [w["stats"]], "squared": [False, True]}),
        ("half_crossing", half_crossing, {}, {"curves": [[0, 0, 1, 2], np.arange(4)]}),
        (
            "fit_commitment",
            fit_commitment,
            {"stats": w["stats"], "log_snr": np.arange(4.0)},
            {
                "releases": [range(4), np.arange(4)],
                "names": [None, ["a", "b"]],
                "squared": [False, True],
                "level": HALF,
                **COUNT,
            },
        ),
        (
            "fit_commitment log_snr",
            fit_commitment,
            {"stats": w["stats"], "releases": range(4)},
            {"log_snr": [np.arange(4.0), [0, 1, 2, 3]]},
        ),
        (
            "onset",
            onset,
            {},
            {
                "profile": [np.arange(6.0)],
                "boot": [np.random.default_rng(0).normal(size=(200, 6))],
                "pairs": whole(9),
                "first": [*whole(0), -1],
                "matters": HALF,
                "material": HALF,
                "last": whole(2),
                "level": HALF,
            },
        ),
        ("SpectralSplit", SpectralSplit().run, {"model": model}, {"labels": labels, **RUN}),
        (
            "LayerLens",
            LayerLens(bands).run,
            {"model": model},
            {"labels": [[0, 0], torch.tensor([1, 1])], **RUN},
        ),
        (
            "TwinDivergence",
            TwinDivergence(w["tokens"]).run,
            {"model": model},
            {"labels": labels, "release": whole(1), **RUN},
        ),
        (
            "TwinPatching",
            TwinPatching().run,
            {"model": model},
            {
                "labels": labels,
                "layers": [[1]],
                "sites": ["attn_out"],
                "windows": [*whole(1), [None]],
                "kind": ["zero"],
                "batch": whole(4),
                "steps": whole(3),
            },
        ),
    ]
    if ATTACK:
        made = experiments.reuse_plan(model, 0.7, items=8, steps=4, rounds=0, resamples=20)
        small_gap = {"pairs": whole(16), "steps": whole(4), "cut": [0.25], **COUNT, **KEPT}
        rows += [
            (
                "measure_gap",
                measure_gap,
                {"model": model},
                {
                    "bands": ["radial", "dct"],
                    "feature": [None],
                    "name": ["m"],
                    "null": [0],
                    "image_labels": [None],
                    **small_gap,
                    "resamples": whole(200),
                },
            ),
            (
                "compare",
                experiments.compare,
                {"model": model},
                {
                    "changed": [model],
                    "items": whole(12),
                    "labels": [None],
                    "steps": whole(3),
                    "guidance": [1, 2.5],
                    "scheduler": ["ddim", None],
                    "eta": [0, 1],
                    "cut": [0.25, np.float32(0.25)],
                    "progress": [None, lambda done, total: None],
                    **COUNT,
                },
            ),
            (
                "side_by_side",
                experiments.side_by_side,
                {"model": model},
                {
                    "plans": [[made], (made,)],
                    "items": whole(8),
                    "judge": [None, lambda images, labels: {"mean": float(images.mean())}],
                    "progress": [None, lambda done, total: None],
                    **COUNT,
                    "seed": whole(500),
                },
            ),
            (
                "reuse_plan",
                experiments.reuse_plan,
                {"model": model},
                {
                    "budget": [0.7, np.float32(0.7)],
                    "aim": ["same", "good"],
                    "items": whole(8),
                    "steps": whole(3),
                    "guidance": [1, 2.5],
                    "scheduler": ["ddim", None],
                    "eta": [0],
                    "cut": [0.25, np.float32(0.25)],
                    "longest": whole(2),
                    "lines": [True, False],
                    "rounds": whole(0),
                    "projections": whole(1),
                    "progress": [None, lambda done, total: None],
                    **COUNT,
                },
            ),
            (
                "diagnose",
                experiments.diagnose,
                {"model": model, "run": run.select([0]), "fault": ink},
                {
                    "good": [None],
                    "at": [0.5, np.float32(0.5)],
                    "others": whole(4),
                    "clones": whole(2),
                    "releases": whole(2),
                    "pairs": whole(2),
                    "batch": whole(8),
                    "progress": [None, lambda images: None],
                    "seed": whole(0),
                },
            ),
            (
                "diagnose_all",
                experiments.diagnose_all,
                {"model": model, "faults": {"ink": ink}},
                {
                    "samples": whole(2),
                    "steps": whole(4),
                    "guidance": [1],
                    "scheduler": ["ddim", None],
                    "eta": [1, *HALF],
                    "most": whole(1),
                    "at": [0.5, np.float32(0.5)],
                    "batch": whole(8),
                    "progress": [None, lambda done, total: None],
                    "seed": whole(0),
                },
            ),
            (
                "cause_map",
                cause_map,
                {"model": model},
                {
                    "kind": ["hold", "zero", "mean"],
                    "sites": [["attn"], ["block", "mlp"], None],
                    "windows": [[range(1, 2)], None],
                    "lag": whole(1),
                    "order": whole(0),
                    "items": whole(8),
                    "labels": [None, [0, 1] * 4],
                    "steps": whole(3),
                    "guidance": [1, 2.5],
                    "scheduler": ["ddim", None],
                    "eta": [0, *HALF],
                    "cut": [0.25, np.float32(0.25)],
                    "projections": whole(1),
                    "check": whole(0),
                    "exact": [False, True],
                    "batch": whole(64),
                    "progress": [None, lambda done, total: None],
                    **COUNT,
                    **KEPT,
                },
            ),
            (
                "attributes",
                attributes,
                {"model": model, "read": lambda x: {"a": (x.mean((1, 2, 3)) > 0.5).long()}},
                {"releases": [None, *whole(3)], "name": ["m"], **small_gap},
            ),
            (
                "knock_outs",
                knock_outs,
                {"model": model},
                {
                    "layers": [*layers, [[0, 1], [2]]],
                    "part": ["layer"],
                    "how": ["zero", "resample"],
                    "windows": [None, 1, [range(2)]],
                    "direct": [False],
                    **small_gap,
                },
            ),
            ("cumulative", cumulative, {"model": model}, {"depths": [[1]], **small_gap}),
            (
                "shapley",
                shapley,
                {"model": model},
                {"layers": [[0, 1], [[0], [1, 2]]], "orders": whole(2), **small_gap},
            ),
            ("smallest_set", smallest_set, {"model": model}, {"share": HALF[:1], **small_gap}),
            (
                "interchange",
                interchange,
                {"model": model},
                {
                    "layers": [[0]],
                    "windows": [1, [range(2, 4)]],
                    "heads": [False],
                    "doses": [[1.0], [0.5, 1]],
                    "release": [2, None],
                    "pairs": whole(8),
                    "steps": whole(4),
                    "seed": whole(0),
                    "cut": [0.25],
                    "batch": whole(1),
                    **KEPT,
                },
            ),
        ]
    return [*rows, *rest(), *known_answers()]


def rest():
    """The same of what opens, reads, patches a single forward, and makes probes."""
    w = world()
    model, small = w["model"], w["small"]
    inputs = {"corrupted_inputs": [(w["x"], w["t"], w["y"])], "clean_cache": [w["cache"]]}
    some = [Patch("attn_out", 1, range(1, 2))]
    for name in patching.__all__:
        if name.startswith("get_act_patch"):
            every = name.endswith("_every")
            yield (
                name,
                getattr(patching, name),
                {"model": model},
                {**inputs}
                | (
                    {"metric": [torch.sum]}
                    if every
                    else {"patching_metric": [torch.sum], "batch": whole(64)}
                ),
            )
    yield "check_runs", patching.check_runs, {}, {"source": [small.a], "target": [small.b]}
    yield (
        "check_patches",
        patching.check_patches,
        {"model": model},
        {"patches": [some]}
        | {
            "steps": whole(3),
            "items": whole(2),
            "outcome": [None, w["bands"]],
            "batch": whole(4),
            "progress": [None],
        },
    )
    yield "load", dit_lens.load, {}, {"model": [model]}
    times = [[900, 500, 100], np.array([900, 500, 100]), torch.tensor([900, 500, 100])]
    cells = [[(0, "attn", 1)], [(np.int64(0), "mlp", np.int64(2))], []]
    plan = experiments.Plan.of(model, times[0], cells[0])
    yield (
        "Plan.of",
        experiments.Plan.of,
        {"model": model},
        {"timesteps": times, "cells": cells, "about": [None, {"aim": "same"}], "lines": [[], ()]},
    )
    yield "Plan.load", experiments.Plan.load, {}, {"path": [plan.save(f"{w['folder']}/p.json")]}
    yield (
        "reuse",
        reused,
        {"model_or_pipe": model},
        {"plan": [plan, f"{w['folder']}/p.json"], "remap": [False, True]},
    )
    yield "load_trace", dit_lens.load_trace, {}, {"path": [w["file"]], "model": [None, model]}
    yield "family_of", families.family_of, {}, {"transformer": [model.transformer]}
    yield "family_named", families.family_named, {}, {"model_class": ["DiTTransformer2DModel"]}
    yield "TwinDivergence", TwinDivergence, {}, {"bands": [w["tokens"]]}
    yield "SpectralSplit", SpectralSplit, {}, {"bands": [None, w["tokens"]]}
    yield "LayerLens", LayerLens, {}, {"bands": [w["bands"]]}
    if ATTACK:
        yield "to_nnsight", dit_lens.to_nnsight, {}, {"model": [model]}
        yield "to_transformer_lens", dit_lens.to_transformer_lens, {}, {"model": [model]}
        few = {"steps": whole(4), "cut": [0.25], "seed": whole(3), "resamples": whole(20)}
        yield "step_doubling", step_doubling, {"model": model}, {"pairs": whole(16), **few}
        yield (
            "couple_alone",
            couple_alone,
            {"model": model},
            {"pairs": whole(8), **few}
            | {
                "layers": [[1], range(1)],
                "g": [1.0],
                "form": ["mix"],
                "eps": HALF[:1],
                **KEPT,
            },
        )


BUILT = {"sample_size": whole(4), "patch_size": whole(1), "in_channels": whole(1)}
BUILT |= {"dtype": [torch.float32, torch.float64]}


def known_answers():
    """The same of `dit_lens.groundtruth`, where no model runs but those that are built."""
    x, abar = torch.zeros(2, 1, 8, 8), torch.tensor([0.5, 0.25])
    mixed = gt.two_scale(n_layers=2, low_layer=0, high_layer=1)
    null = gt.random_weights(0, n_layers=2, sample_size=4)
    lam = [4.0, [4.0, 0.25], np.array([1, 2]), torch.tensor([1.0])]
    some = [[0.1, 0.5], 0.5, np.array([[0.1]]), torch.tensor(0.5)]
    schedule = [[0.1, 0.5, 0.9], torch.tensor([0.1, 0.5, 0.9])]
    sizes = {"lam_low": [4, 4.0], "lam_high": [0.25, np.float32(0.25)], "patch_size": whole(2)}
    layer = {"layers": [[1], range(1), np.array([0, 1]), [-1]], "n_layers": whole(2)}
    yield (
        "gaussian_agreement",
        gt.gaussian_agreement,
        {},
        {"lam": lam, "abar": some} | {"pooled": [False, True]},
    )
    yield "commitment_log_snr", gt.commitment_log_snr, {}, {"lam": lam}
    yield "commitment_timestep", gt.commitment_timestep, {}, {"lam": [1, *HALF], "abars": schedule}
    yield (
        "ddim_agreement",
        gt.ddim_agreement,
        {},
        {"lam": lam, "abars": schedule}
        | {
            "release": whole(1),
            "eta": [1, *HALF],
        },
    )
    yield (
        "sampler_agreement",
        gt.sampler_agreement,
        {},
        {"lam": lam, "signal": [[0.1, 0.8, 1.0]], "noise": [[0.9, 0.6, 0.0]], "eta": [1, *HALF]},
    )
    yield "deterministic_ratio", gt.deterministic_ratio, {}, {"lam": [4.0], "abar": some}
    yield (
        "mixture_agreement",
        gt.mixture_agreement,
        {},
        {"m": [1, *HALF], "sigma": HALF} | {"abar": [0, 1, *HALF]},
    )
    yield (
        "planted_gain",
        gt.planted_gain,
        {},
        {"a": some, "layers": [*whole(5), [1, 2], []]} | {"g": [0, *HALF]},
    )
    yield "token_mean", gt.token_mean, {}, {"x": [x], "patch_size": whole(2)}
    yield "gaussian_eps", gt.gaussian_eps, {}, {"x": [x], "abar": [abar, abar[:1]], **sizes}
    yield (
        "mixture_eps",
        gt.mixture_eps,
        {},
        {"x": [x], "abar": [abar], "patch_size": whole(2)}
        | {name: [0.5, *HALF] for name in ("m_low", "m_high", "sigma")},
    )
    yield "coefficients", gt.coefficients, {}, {"x": [x], "patch_size": whole(2)}
    yield "sides", gt.sides, {}, {"latents": [x], "truth": [mixed]}
    yield (
        "stream_gains",
        gt.stream_gains,
        {},
        {"transformer": [null.transformer]}
        | {
            "timestep": whole(500),
            "band": ["low", "high"],
            "seed": whole(0),
        },
    )
    yield "random_weights", gt.random_weights, {"n_layers": 2}, {"seed": whole(0), **BUILT}
    yield (
        "shuffle_layers",
        gt.shuffle_layers,
        {},
        {"transformer": [null.transformer]}
        | {"seed": whole(1), "blocks": [None, lambda model: model.transformer_blocks]},
    )
    yield (
        "gaussian",
        gt.gaussian,
        {},
        {**layer, **sizes, "patch_size": whole(1)}
        | {
            "shares": [None, [1.0]],
            "decoys": [[], [0]],
            "noise": [0, *HALF],
            "seed": whole(0),
            "sample_size": whole(4),
        },
    )
    yield (
        "planted",
        gt.planted,
        {},
        {**layer, **BUILT}
        | {
            "a": [0.3, *HALF],
            "band": ["low", "high"],
            "switch": [None, {"low": 500}],
            "switch_width": [20, *HALF],
            "noise": [0, *HALF],
            "seed": whole(0),
        },
    )
    yield (
        "two_scale",
        gt.two_scale,
        {"n_layers": 2},
        {"m_low": [4], "m_high": [1, 2.0]}
        | {
            "sigma": [0.25, np.float32(0.25)],
            "low_layer": [*whole(0), -2],
            "high_layer": [*whole(1), -1],
            **BUILT,
            "patch_size": whole(2),
        },
    )
    two = {"layers": [[0, 1], (0, -1)], "n_layers": whole(2), **sizes, **BUILT}
    for name in ("redundant", "relayed"):
        more = {"direct": [0.5, 0, *HALF]} if name == "relayed" else {}
        yield name, getattr(gt, name), {}, two | {"patch_size": whole(1)} | more
    linear = gt.redundant(layers=(0, 1), n_layers=2)
    yield (
        "exact_agreement",
        gt.exact_agreement,
        {},
        {"truth": [linear], "steps": whole(4)}
        | {
            "removed": [[], [1], range(2)],
            "window": [None, range(1, 2)],
        },
    )
    if ATTACK:
        yield (
            "random_planted",
            gt.random_planted,
            {},
            {"seed": whole(3)}
            | {
                "gated": [False, True],
                "noise": [0.02],
                "dtype": [torch.float32],
            },
        )


@cache
def places():
    """(row of the table, argument) for each argument."""
    return [(row, argument) for row in table() for argument in row[3]]


def call(row, argument=None, value=None):
    _, function, fixed, good = row
    taken = {name: values[0] for name, values in good.items()}
    if argument is not None:
        taken[argument] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(**fixed, **taken)


def state():
    """What a refused call leaves alone."""
    module = MODEL.transformer
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return MODEL.instrumentation.listening, hooks, "forward" in vars(module), module.training


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Some of the values are paths, and some calls write: not in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def forwards():
    """How often the model has run to its end."""
    world()
    return []


@contextlib.contextmanager
def counted(row, forwards):
    """Calls of the model are counted by a module hook, under which nothing is recorded to disk."""
    if row[0] == "record":
        yield
        return
    handle = MODEL.transformer.register_forward_hook(lambda *_: forwards.append(1))
    try:
        yield
    finally:
        handle.remove()


ONLY_SEEN_BY_RUNNING = (
    "does not commit within the run",
    "do not part within the run",
    "that are not finite",
    "does not have the fault by its own score",
    "samples has such a fault",
)
"""Sentences about what came out; no look at the arguments could have told."""


def attempt(row, argument, value, forwards):
    """Nothing where the call worked; the error where it was refused. All else fails the test."""
    with counted(row, forwards):
        return attempted(row, argument, value, forwards)


def attempted(row, argument, value, forwards):
    before, done = state(), len(forwards)
    what = f"{row[0]}({argument}={arguments.shown(value)})"
    try:
        call(row, argument, value)
    except DitLensError as error:
        text = str(error)
        assert isinstance(error, (ValueError, TypeError, KeyError, RuntimeError, OSError)), what
        assert text.endswith(".") and "\n" not in text, f"{what}: {text}"
        late = len(forwards) > done and not any(words in text for words in ONLY_SEEN_BY_RUNNING)
        assert not late, f"{what}: refused after the model had run: {text}"
        return error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        assert state() == before, what
    return None


TRIED = set()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(place=st.integers(0, 10**6), value=st.sampled_from(range(len(POOL))))
def attack(forwards, place, value):
    row, argument = places()[place % len(places())]
    attempt(row, argument, POOL[value], forwards)
    TRIED.add((row[0], argument, value))


@pytest.mark.slow
def test_every_call_works_or_is_refused(forwards):
    attack(forwards)
    if ATTACK:  # all pairs of a place and a value, and not only those that were drawn
        failed = []
        for (row, argument), value in product(places(), range(len(POOL))):
            if (row[0], argument, value) not in TRIED:
                try:
                    attempt(row, argument, POOL[value], forwards)
                except AssertionError as error:
                    failed.append(str(error).partition("\n")[0])
                TRIED.add((row[0], argument, value))
        assert not failed, "\n".join([f"{len(failed)} of {len(TRIED)}:", *failed])
    print(f"{len(TRIED)} calls, {len(places())} arguments of {len(table())} functions")
    assert len(TRIED) >= (2000 if ATTACK else 300)


ONLY_IN_THE_ATTACK = """attributes cause_map compare couple_alone cumulative diagnose diagnose_all
interchange knock_outs measure_gap random_planted reuse_plan shapley side_by_side smallest_set
step_doubling to_nnsight to_transformer_lens""".split()


def test_every_public_function_is_tried():
    """But for the kit of `families`, and `check_probe`, which tests/test_checking.py has."""
    tried = {name for row in table() for name in (row[0], getattr(row[1], "__name__", ""))}
    tried |= set(() if ATTACK else ONLY_IN_THE_ATTACK)
    tried |= {"load_result"}  # of wrong values below; good ones are files of tests/test_report.py
    for space in (dit_lens, experiments, gt, measures, patching):
        public = {n for n in space.__all__ if inspect.isfunction(getattr(space, n))}
        assert public <= tried, public - tried


@pytest.mark.slow
def test_good_values_of_every_type_work(forwards):
    for row, argument in places():
        for value in row[3][argument]:
            error = attempt(row, argument, value, forwards)
            late = any(words in str(error) for words in ONLY_SEEN_BY_RUNNING)
            assert error is None or late, f"{row[0]}({argument}={arguments.shown(value)}): {error}"


def bad(kind, text, function):
    return pytest.param(kind, text, function, id=text)


PAIR = [
    bad(
        InvalidValue,
        "until=1 can't be used; expected a whole number from 2 to 3, after from_step (nearest: 2).",
        lambda w: w["run"].replay(1, until=1),
    ),
    bad(
        InvalidValue,
        "how='average' can't be used; expected one of 'zero', 'mean', 'resample'",
        lambda w: knocked_out(w["run"], [0], how="average"),
    ),
    bad(
        InvalidValue,
        "window=range(1, 4) can't be used; expected a range of steps within 0 to 2, without gaps.",
        lambda w: knocked_out(w["run"], [0], window=range(1, 4)),
    ),
    bad(
        InvalidType,
        "window=2 can't be used; expected a range of steps within 0 to 2, without gaps.",
        lambda w: knocked_out(w["run"], [0], window=2),
    ),
    bad(
        InvalidValue,
        "layers has (0, 1) 2 times; expected each once.",
        lambda w: knock_outs(MODEL, [[0, 1], [1, 0]], pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "layers[1]=[] can't be used; expected 1 or more whole numbers",
        lambda w: knock_outs(MODEL, [[0, 1], []], pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "The players [0, 1] and [1, 2] both have layer 1; expected sets that have none in common.",
        lambda w: shapley(MODEL, [[0, 1], [1, 2]], pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "layers=[1] can't be used; expected 2 or more whole numbers",
        lambda w: shapley(MODEL, [1], pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "depths=[2, 1] can't be used; expected different numbers of layers in increasing order.",
        lambda w: cumulative(MODEL, [2, 1], pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "share=0 can't be used; expected a finite number above 0 and at most 1.",
        lambda w: smallest_set(MODEL, 0, pairs=16, steps=4),
    ),
    bad(
        InvalidValue,
        "doses=[1.0, 0.5] can't be used; expected different numbers in increasing order, the last "
        "above 0, such as 0, 0.5, 1.",
        lambda w: interchange(MODEL, doses=[1, 0.5], pairs=8, steps=4),
    ),
    bad(
        InvalidValue,
        "windows=4 can't be used; expected a whole number from 1 to 3 (nearest: 3).",
        lambda w: interchange(MODEL, windows=4, pairs=8, steps=4),
    ),
    bad(
        InvalidValue,
        "how='resample' takes what another item of the same label adds, and label",
        lambda w: knocked_out(w["run"].select([0]), [0], how="resample"),
    ),
    bad(
        InvalidValue,
        "quantity='xt' can't be used; expected one of 'x0', 'x_t' (nearest: 'x_t').",
        lambda w: one_pass(w["pair"], w["outcomes"], "xt"),
    ),
    bad(
        InvalidValue,
        "outcomes has 'latents' 2 times; expected each once.",
        lambda w: one_pass(w["pair"], w["outcomes"] * 2),
    ),
    bad(
        InvalidValue,
        "layers[0]=0.5 can't be used; expected a whole number from -3 to 2 (nearest: 0).",
        lambda w: dit_lens.twins(w["model"], 2, tie="attention", g=1, layers=[0.5], steps=3),
    ),
    bad(
        InvalidType,
        "items=True can't be used; expected a whole number, a slice,",
        lambda w: edited(items=True),
    ),
    bad(
        InvalidValue,
        "tokens=slice(3, 3, None) chooses nothing of 16; expected at least one",
        lambda w: edited(tokens=slice(3, 3)),
    ),
    bad(
        InvalidValue,
        "tokens=a tensor [16] of bool chooses nothing",
        lambda w: edited(tokens=torch.zeros(16, dtype=torch.bool)),
    ),
    bad(
        InvalidType,
        "steps='12' can't be used; expected None, a whole number",
        lambda w: edited(steps="12"),
    ),
    bad(
        InvalidValue,
        "steps[0]=1.7 can't be used; expected a whole number of 0 or more (nearest: 2).",
        lambda w: edited(steps=[1.7]),
    ),
    bad(
        InvalidValue,
        "steps=slice(2, 2, None) can't be used; expected a slice with a step in it.",
        lambda w: edited(steps=slice(2, 2)),
    ),
    bad(
        InvalidType,
        "step=slice(0, 2, None) can't be used; expected a whole number from 0 to 2",
        lambda w: w["run"].activations("resid_post", 1, step=slice(0, 2)),
    ),
    bad(
        InvalidType,
        "latents=a tensor [2, 4, 8, 8] of int64 can't be used",
        lambda w: dit_lens.sample(w["model"], [0, 1], steps=3, latents=w["x"].long()),
    ),
    bad(
        InvalidValue,
        "seeds[0]=0.5 can't be used; expected a whole number of 0 or more (nearest: 0).",
        lambda w: dit_lens.sample(w["model"], [0, 1], [0.5, 1], steps=3),
    ),
    bad(InvalidType, "'token' is no part of an activation; expected", lambda w: edited(token=1)),
    bad(
        InvalidType,
        "steps=True can't be used; expected a whole number of 1 or more.",
        lambda w: dit_lens.sample(w["model"], [0], steps=True),
    ),
]


@pytest.mark.parametrize("kind, text, function", PAIR)
def test_what_was_accepted_in_silence_is_refused(kind, text, function):
    with pytest.raises(kind) as caught:
        function(world())
    assert str(caught.value).startswith(text), caught.value


@pytest.mark.parametrize("function", [couplings, knock_outs, couple_alone])
def test_no_layers_are_none_to_measure(function):
    strengths = {"strengths": [0, 1]} if function is couplings else {}
    with pytest.raises(InvalidValue, match=r"layers=\[\] can't be used; expected 1 or more whole"):
        function(MODEL, layers=[], pairs=16, steps=6, **strengths)


def test_a_window_has_no_order():
    """A range that counts down is the same window as one that counts up."""
    assert str(Patch("attn_out", 1, range(3, 1, -1))) == "swap attn_out, layer 1, steps 2-3"


def test_negative_layers_count_from_the_end_everywhere():
    w = world()
    a, b = (knocked_out(w["run"], [layer]).latents for layer in (-1, 2))
    assert torch.equal(a, b) and not torch.equal(a, w["run"].latents)
    ends = [
        dit_lens.twins(MODEL, 2, tie="attention", g=1.0, layers=layers, steps=3, release=3)
        for layers in ([-1], [2])
    ]
    assert torch.equal(ends[0].run.latents, ends[1].run.latents)


def test_steps_given_once_act_as_often_as_they_are_asked_for():
    """An iterator is empty after its first use, so it is refused rather than half used."""
    with pytest.raises(InvalidType, match="steps=<.*iterator .* can't be used"):
        edited(steps=iter([1]))


@pytest.mark.parametrize(
    "value, kind",
    [(True, InvalidType), ("3", InvalidType), (2.5, InvalidValue), (0, InvalidValue)],
)
def test_whole_numbers(value, kind):
    with pytest.raises(kind, match="n=.* can't be used; expected a whole number of 1 or more"):
        arguments.whole("n", value, 1)
    assert [arguments.whole("n", v, 1) for v in whole(3)] == [3] * 4


def test_a_result_that_is_no_sweep():
    with pytest.raises(InvalidValue, match="result=.* expected a sweep's"):
        as_grid(xr.Dataset())


def test_the_agreement_of_a_tuple_is_refused():
    with pytest.raises(InvalidType, match="stats=.* expected an Agreement"):
        curve((1, 2, 3))
    assert np.isnan(curve(Agreement(*np.zeros((3, 9, 1)))))


def test_no_wrong_value_is_a_stored_result():
    for value in POOL:
        with pytest.raises(DitLensError):
            dit_lens.load_result(value)
