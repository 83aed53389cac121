"""Sweeps of patches against each patch run by itself, through `Run.replay` and hooks written out
here.
"""

import copy
import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

import dit_lens
from dit_lens import Bands, HookedDiT, UnknownName
from dit_lens.errors import InvalidState
from dit_lens.families import family_named
from dit_lens.patching import Patch, as_grid, grid, sweep, tiles
from dit_lens.patching.patch import moved, plan
from dit_lens.patching.sweeps import sweep_key
from dit_lens.probes import TwinPatching
from dit_lens.sampling.guidance import model_inputs
from dit_lens.sampling.settings import edits_at

STEPS = 6
SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")
BANDS = Bands.radial((4, 4), n=2)


def whole(x):
    return x


def latents(source, target, patches, **options):
    """The finished latents [patch, item, c, h, w] of a sweep."""
    return torch.as_tensor(sweep(source, target, patches, whole, **options).outcome.values)


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=10), scheduler=SCHEDULER)


@pytest.fixture(scope="module")
def pair(model):
    """Twins, each computed in a batch of its own, so that patches of it can be held to the last
    bit.
    """
    both = dit_lens.twins(model, pairs=3, labels=[1, 2, 1], release=1, steps=STEPS)
    return SimpleNamespace(a=both.a.replay(), b=both.b.replay())


def by_itself(source, target, patch):
    """The patch as one would write it: the source's activations at every step of the window, then a
    replay with an edit.
    """
    model, steps = target.model, target.settings.steps
    window = range(steps) if patch.steps is None else patch.steps
    if not len(window):
        return target.latents[-1]
    first, at = min(window), {"now": min(window) - 1}
    site = "resid_post" if patch.kind == "skip" else patch.site
    name, entry = model.resolve(site, patch.layer), f"blocks.{patch.layer}.hook_resid_pre"
    halves = 1 if target.settings.guidance == 1 else 2

    def count(a, hook):
        at["now"] += 1  # the patch's own clock: the embedding is seen once a step

    def keep(a, hook):
        at["entered"] = a.clone()

    def put(old, hook):
        if at["now"] not in window:
            return None
        if patch.kind == "zero":
            new = torch.zeros_like(old)
        elif patch.kind == "skip":
            new = at["entered"]
        else:
            new = taken[at["now"]]
            n = len(new) // halves
            if patch.kind == "mean":
                new = torch.cat([h.mean(0, keepdim=True).expand_as(h) for h in new.split(n)])
            if patch.kind == "resample":
                new = torch.cat([h[moved(n, patch.seed)] for h in new.split(n)])
        if patch.direction is not None:
            u = patch.direction / patch.direction.norm()
            new = old + ((new - old) @ u)[..., None] * u
        if patch.band is not None:
            new = old + patch.bands.project_tokens(new - old, patch.band)
        out = old.clone()
        if patch.heads is not None:
            out[:, :, patch.heads] = new[:, :, patch.heads]
        elif patch.tokens is not None:
            out[:, patch.tokens] = new[:, patch.tokens]
        else:
            out = new
        return out

    taken = {}
    for s in window:
        inputs = model_inputs(
            model, source.latents[s], source.timesteps[s], source.labels, source.settings.guidance
        )
        with torch.no_grad(), model.hooks(edits_at(source.history, s)):
            taken[s] = model.run_with_cache(*inputs, names_filter=[name])[1][name].clone()
    return target.replay(first, [("hook_embed", count), (entry, keep), (name, put)]).latents[-1]


EVERYTHING = [
    Patch("resid_post", 1),
    Patch("resid_pre", 2, range(2, 3)),
    Patch("resid_mid", 0, range(4, 6)),
    Patch("attn_out", 0, range(1, 3)),
    Patch("attn_out", 0, range(1, 5)),
    Patch("attn_out", 2, range(2, 6, 2)),
    Patch("mlp_out", 1, range(2, 4), kind="zero"),
    Patch("mlp_out", 1, range(2, 4), kind="mean"),
    Patch("attn.hook_out", 1, range(2, 4), kind="resample", seed=3),
    Patch("resid_post", 2, range(3, 5), kind="skip"),
    Patch("resid_post", 0, None, kind="skip", tokens=[0, 5]),
    Patch("attn.hook_z", 1, range(2, 5), heads=[1]),
    Patch("attn.hook_q", 1, range(2, 5), kind="zero", heads=0),
    Patch("attn.hook_pattern", 2, range(2, 4)),
    Patch("adaln.hook_gate_mlp", 1, range(1, 4), kind="zero"),
    Patch("resid_post", 1, range(2, 4), tokens=[3, 4, 9]),
    Patch("attn_out", 1, range(2, 4), bands=BANDS, band=1),
    Patch("resid_post", 0, range(2, 4), bands=BANDS, band=0, kind="mean"),
    Patch("resid_post", 1, range(2, 6), direction=torch.linspace(-1, 2, 16)),
    Patch("mlp.hook_post", 0, range(5, 6)),
    Patch("attn_out", 0, range(4, 4)),
]


@pytest.mark.parametrize("labels", ["equal", "other"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_each_equals_the_patch_by_itself(model, pair, guidance, labels):
    source, target = pair.a, pair.b
    if guidance != 1:
        source, target = (
            dit_lens.sample(model, [1, 2, 1], seeds=seed, steps=STEPS, guidance=guidance, eta=1.0)
            for seed in (0, 50)
        )
    if labels == "other":
        source = dit_lens.sample(model, [4, 5, 6], seeds=9, steps=STEPS, guidance=guidance, eta=1.0)
    alone = torch.stack([by_itself(source, target, p) for p in EVERYTHING])
    # one lane at a time: the same batch shape
    assert torch.equal(latents(source, target, EVERYTHING, batch=1), alone)
    stacked = latents(source, target, EVERYTHING, batch=24)
    assert torch.allclose(stacked, alone, atol=1e-5)
    assert (alone - target.latents[-1]).abs().amax((1, 2, 3, 4))[
        :-1
    ].min() > 1e-3  # each patch but the empty one did something
    assert model.instrumentation.listening == 0


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++", "sde-dpm++"])
def test_schedulers_with_a_memory(model, scheduler):
    source, target = (
        dit_lens.sample(model, [1, 2], seeds=s, steps=STEPS, scheduler=scheduler) for s in (0, 7)
    )
    patches = [
        Patch("attn_out", 1, range(2, 4)),
        Patch("attn_out", 1, range(2, 5)),
        Patch("resid_post", 0, range(3, 4), kind="skip"),
    ]
    alone = torch.stack([by_itself(source, target, p) for p in patches])
    assert torch.equal(latents(source, target, patches, batch=2), alone)
    assert torch.allclose(latents(source, target, patches), alone, atol=1e-5)


def test_patching_a_run_into_itself_changes_nothing(model, pair):
    b = pair.b
    # edits in the history: no short cut is taken
    awake = b.replay(0, [("resid_pre", lambda a, hook: None)])
    some = [
        p for p in EVERYTHING if p.kind == "swap" and "pattern" not in p.site
    ]  # a patched pattern is the explicit softmax's
    for run in (b, awake):
        assert all(torch.equal(x, b.latents[-1]) for x in latents(run, run, some, batch=3))
    assert sweep(b, b, some, whole).attrs["block_evaluations"] == 0
    tied = latents(
        pair.a, b, [Patch("attn_out", 1, range(0, 2)), Patch("attn_out", 1, range(0))]
    )  # one run up to step 1's noise
    assert torch.equal(tied[0], b.latents[-1]) and torch.equal(tied[1], b.latents[-1])


def test_the_whole_stream_of_the_source_makes_the_target_the_source(model):
    target = dit_lens.sample(model, [1, 2], steps=STEPS, eta=1.0)
    # the same noise, another embedding
    source = target.replay(0, [("hook_embed", lambda a, hook: a + 0.5)])
    found = latents(
        source, target, grid(range(3), ["resid_pre", "resid_mid", "resid_post"], [None]), batch=2
    )
    assert all(torch.equal(x, source.latents[-1]) for x in found) and not torch.equal(
        source.latents[-1], target.latents[-1]
    )
    result = sweep(source, target, [Patch("resid_post", 1)])
    assert (result.move == 1).all() and torch.allclose(
        torch.as_tensor(result.agreement.sel(reference="source").values), torch.ones(2).double()
    )


def test_the_targets_own_edits_are_honoured(model, pair):
    shapes = []

    def mine(a, hook):
        shapes.append(len(a))
        return a * 0.5

    target = pair.b.replay(2, [(("attn_out", 1), mine)])
    source = pair.a.replay(3, [("mlp_out", lambda a, hook: a * 1.5)])
    some = [
        Patch("mlp_out", 1, range(1, 4)),
        Patch("attn_out", 1, range(3, 5)),
        Patch("resid_post", 2, range(2, 5)),
    ]
    alone = torch.stack([by_itself(source, target, p) for p in some])
    # always on the target's own batch
    assert torch.equal(latents(source, target, some), alone) and set(shapes) == {3}


def test_what_is_shared(model, pair):
    """Nothing before the window, the first step from the patched layer on, one forward of each run
    a step, lanes alike run once.
    """
    a, b, n = pair.a, pair.b, 3

    def blocks(*patches):
        return sweep(a, b, patches, whole).attrs["block_evaluations"]

    look = n * 3  # one forward of one run
    assert blocks(Patch("attn_out", 2, range(3, 5))) == 2 * look + look + n * (1 + 3 + 3)
    # no need of the source
    assert blocks(Patch("attn_out", 2, range(3, 5), kind="zero")) == look + n * (1 + 3 + 3)
    both = Patch("attn_out", 2, range(3, 5)), Patch("attn_out", 2, range(3, 6))
    assert blocks(*both) == 3 * look + look + n * (1 + 3 + 3 + 3)  # they part at step 5
    assert blocks(*grid(range(3), "resid_post", [range(3, 4)])) == look + look + n * (
        3 + 3
    )  # one answer, whatever the layer
    # one stack, from layer 0 on
    assert blocks(*grid(range(3), ["attn_out"], [range(5, 6)])) == look + look + n * 3 * 3


def test_the_result(model, pair):
    seen = []
    patches = grid([0, 2], ["mlp_out", "attn_out"], tiles(1, 6, 3))
    result = sweep(pair.a, pair.b, patches, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (12 * STEPS, 12 * STEPS)
    assert (
        list(result.patch.values) == [str(p) for p in patches]
        and str(patches[0]) == "swap mlp_out, layer 0, step 1"
    )
    laid = as_grid(result)
    assert laid.move.dims == ("layer", "site", "window", "band") and list(laid.window.values) == [
        "1",
        "2-3",
        "4-5",
    ]
    one = laid.sel(layer=2, site="attn_out", window="2-3")
    alone = by_itself(pair.a, pair.b, Patch("attn_out", 2, range(2, 4)))
    bands = Bands.radial((8, 8), cut=0.25)
    energy = [
        bands.energy((x - pair.a.latents[-1]).double()).sum((0, 1))
        for x in (alone, pair.b.latents[-1])
    ]
    assert torch.allclose(torch.as_tensor(one.move.values), 1 - energy[0] / energy[1], atol=1e-5)
    assert one.move_interval.isnull().all()  # 3 pairs give no interval
    many = dit_lens.twins(model, pairs=8, release=1, steps=4)
    wide = sweep(
        many.a,
        many.b,
        [Patch("attn_out", 1), Patch("resid_post", 1)],
        BANDS8 := Bands.radial((8, 8), n=3),
    )
    assert wide.band.size == BANDS8.n and wide.agreement_stats.shape == (2, 2, 3, 8, 3)
    assert (wide.move_interval.sel(bound="low") <= wide.move).all() and (
        wide.move <= wide.move_interval.sel(bound="high")
    ).all()
    with pytest.raises(ValueError, match="do not tell the patches apart: 2 of them are at"):
        as_grid(sweep(pair.a, pair.b, [patches[0], patches[0]]))


def test_an_interrupted_sweep_goes_on(model, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["dit_lens.patching.sweeps"], "IN_FLIGHT", 2)
    patches, file = (
        grid(range(3), ["attn_out", "mlp_out"], [range(2, 4)]),
        tmp_path / "deep" / "sweep",
    )
    straight = sweep(pair.a, pair.b, patches, whole)

    def break_off(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(pair.a, pair.b, patches, whole, progress=break_off, store=file)
    assert model.instrumentation.listening == 0
    seen = []
    resumed = sweep(
        pair.a, pair.b, patches, whole, progress=lambda done, total: seen.append(done), store=file
    )
    # what is there counts at once, and is not run again
    assert resumed.identical(straight) and seen == list(range(2 * STEPS, 6 * STEPS + 1, 2))
    seen.clear()
    again = sweep(pair.a, pair.b, patches, whole, progress=lambda *a: seen.append(a), store=file)
    assert again.identical(straight) and len(seen) == 3  # one for each piece that is there
    for other in (
        (pair.b, pair.a, patches),
        (pair.a, pair.b, patches[:-1]),
        (pair.a, pair.b, [*patches[:-1], Patch("mlp_out", 2, kind="zero")]),
    ):
        with pytest.raises(
            ValueError, match="holds pieces of another measurement: its setting (sweep|patches) is"
        ):
            sweep(*other, store=file)
    (tmp_path / "junk").write_bytes(b"no store")
    with pytest.raises(
        ValueError, match="junk' is a file; expected a store of pieces, or a folder"
    ):
        sweep(pair.a, pair.b, patches, store=tmp_path / "junk")


def test_a_store_is_refused_under_module_hooks_before_anything_runs(model, pair, tmp_path):
    seen = []
    handle = model.transformer.register_forward_hook(lambda *_: seen.append(1))
    try:
        with pytest.raises(InvalidState, match="module hooks on, and a store of pieces can't tell"):
            sweep(pair.a, pair.b, grid([1], "attn_out", [range(1, 2)]), store=tmp_path / "s")
    finally:
        handle.remove()
    assert not seen and not (tmp_path / "s").exists()


def test_bands_that_print_alike_are_two_patches(tmp_path):
    """Cut at 0.25 and a hair above it the low band holds 9 and 13 modes: two answers, two files."""
    twins = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=1, steps=4)

    def patch(cut):
        bands = Bands.radial((8, 8), cut=cut)
        return Patch("resid_post", 20, range(2, 3), bands=bands, band="low")

    a, b = patch(0.25), patch(0.25001)
    assert (a.bands.sizes, b.bands.sizes) == ((9, 55), (13, 51))
    alone = [sweep(twins.a, twins.b, [p]).move.values[0] for p in (a, b)]
    assert (abs(alone[0] - alone[1]) > 1e-5).all()
    together = sweep(twins.a, twins.b, [a, b], store=tmp_path / "sweep").move.values
    np.testing.assert_allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="pieces of another measurement: its setting sweep is"):
        sweep(twins.a, twins.b, [b, a], store=tmp_path / "sweep")


EIGEN = [
    Bands.eigen(torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(s)), (4, 4))
    for s in (0, 1)
]
MASK = torch.arange(16).reshape(4, 4) % 4 == 1
NUDGED = torch.ones(16).index_fill(0, torch.tensor([3]), 1 + 1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(layer=2), dict(layer=-1)),
        (dict(layer=1), dict(layer=np.int64(1))),
        (dict(site="attn_out"), dict(site="hook_attn_out")),
        (dict(steps=None), dict(steps=range(6))),
        (dict(steps=range(2, 5)), dict(steps=range(4, 1, -1))),
        (dict(tokens=MASK), dict(tokens=[1, 5, 9, 13])),
        (dict(tokens=MASK), dict(tokens=slice(1, None, 4))),
        (dict(tokens=MASK), dict(tokens=torch.tensor([13, 9, 5, 1, 1]))),
        (dict(tokens=15), dict(tokens=[-1])),
        (dict(tokens=3), dict(tokens=np.int64(3))),
        (dict(site="z", heads=1), dict(site="attn.hook_z", heads=torch.tensor([False, True]))),
        (dict(bands=BANDS, band=0), dict(bands=BANDS, band=BANDS.names[0])),
        (dict(bands=BANDS, band=1), dict(bands=BANDS, band=torch.tensor(1))),
        (dict(bands=BANDS, band=1), dict(bands=Bands.radial((4, 4), n=2), band=1)),
        (dict(seed=1), dict(seed=2)),
        (dict(kind="resample", seed=1), dict(kind="resample", seed=np.int32(1))),
        (dict(kind="skip"), dict(kind="skip", site="mlp_out")),
        (dict(direction=NUDGED), dict(direction=NUDGED.double())),
    ],
)
def test_descriptions_of_one_intervention_are_one_patch(model, one, other):
    a, b = (plan(Patch(**{"site": "attn_out", "layer": 1} | o), model, 6, 3) for o in (one, other))
    assert a.digest == b.digest and a.key == b.key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(layer=1), dict(layer=2)),
        (dict(steps=range(2, 5)), dict(steps=range(2, 5, 2))),
        (dict(tokens=MASK), dict(tokens=~MASK)),
        (dict(tokens=MASK), dict(tokens=MASK.T)),
        (dict(site="z", heads=[0]), dict(site="z", heads=[1])),
        (dict(site="z", heads=[0, 1]), dict(site="z", tokens=[0, 1])),
        (dict(bands=BANDS, band=0), dict(bands=BANDS, band=1)),
        (dict(bands=BANDS, band=0), dict(bands=Bands.dct((4, 4), n=2), band=0)),
        (dict(bands=EIGEN[0], band=0), dict(bands=EIGEN[1], band=0)),
        (dict(direction=torch.ones(16)), dict(direction=NUDGED)),
        (dict(direction=torch.ones(16)), dict()),
        (dict(kind="swap"), dict(kind="mean")),
        (dict(kind="resample", seed=1), dict(kind="resample", seed=2)),
    ],
)
def test_interventions_that_differ_are_two_patches(model, one, other):
    a, b = (plan(Patch(**{"site": "attn_out", "layer": 1} | o), model, 6, 3) for o in (one, other))
    assert a.digest != b.digest


def test_a_file_of_other_guided_channels_is_refused(tmp_path):
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000, clip_sample=False))
    runs = [
        dit_lens.sample(model, [1, 2], steps=2, guidance=2.0, guided_channels=channels)
        for channels in ("all", "first3")
    ]
    same = [dataclasses.replace(run, latents=runs[0].latents) for run in runs]
    keys = [sweep_key(run, run, []) for run in same]
    assert keys[0] != keys[1]


def small(name):
    """A small model of a family and two runs of it."""
    family = family_named(name)
    transformer, condition = family.small(0)
    scheduler = DDIMScheduler(1000, clip_sample=False)
    if "Flow" in str(family.small_pipeline().scheduler.__class__):
        scheduler = FlowMatchEulerDiscreteScheduler()
    model = HookedDiT(transformer, scheduler=scheduler)
    one, other = ({k: v[i : i + 1] for k, v in condition.items() if v is not None} for i in (0, 1))
    model.conditions.add({"": other, "a fox": one, "a boat": other})
    runs = [
        dit_lens.sample(model, prompts, seeds=seed, steps=3, guidance=2.0)
        for seed, prompts in ((0, ["a boat", "a fox"]), (9, ["a fox", "a boat"]))
    ]
    return model, *runs


def by_replay(source, target, name, step, where):
    """The target's end if part of one activation is the source's at one step."""
    taken = source.activations(name, step=step)
    now = {"step": -1}

    def count(a, hook):
        now["step"] += 1

    def put(a, hook):
        if now["step"] == step:
            a[where] = taken[where]
        return a

    return target.replay(0, [("hook_embed", count), (name, put)]).latents[-1]


ALL = slice(None)


@pytest.mark.parametrize(
    ("family", "site", "options", "where"),
    [
        ("WanTransformer3DModel", "resid_post", dict(tokens=[47]), (ALL, [47])),
        ("CogVideoXTransformer3DModel", "resid_mid", dict(tokens=[31, 3]), (ALL, [31, 3])),
        ("WanTransformer3DModel", "attn.hook_z", dict(heads=[1]), (ALL, ALL, [1])),
        ("WanTransformer3DModel", "attn.hook_pattern", dict(tokens=[47]), (ALL, ALL, [47])),
        ("SD3Transformer2DModel", "text.attn_out", dict(), (ALL,)),
        ("SD3Transformer2DModel", "text.attn.hook_z", dict(heads=0), (ALL, ALL, 0)),
        ("SD3Transformer2DModel", "text.resid_post", dict(), (ALL,)),
        ("SanaTransformer2DModel", "cross_attn.hook_z", dict(), (ALL,)),
        ("PixArtTransformer2DModel", "cross_attn.hook_k", dict(heads=[0]), (ALL, ALL, [0])),
    ],
)
def test_patches_in_video_and_text(family, site, options, where):
    model, source, target = small(family)
    patch = Patch(site, 0, range(1, 2), **options)
    alone = by_replay(source, target, model.resolve(site, 0), 1, where)
    assert (alone - target.latents[-1]).abs().max() > 1e-6
    found = latents(source, target, [patch])[0]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_what_text_and_video_do_not_have_is_refused():
    model, source, target = small("WanTransformer3DModel")
    for patch, text in [
        (
            Patch("attn_out", 0, tokens=[48]),
            "token index 48 is out of range; expected 0 to 47, the tokens of latents of the "
            "model's own size; for another one HookedDiT(..., size=...)",
        ),
        (
            Patch("cross_attn.hook_k", 0, tokens=[0]),
            "'blocks.0.cross_attn.hook_k' has no token axis; its axes are batch, text_token, head, "
            "d_head",
        ),
        # how long the text is shows in the first forward
        (
            Patch("cross_attn.hook_pattern", 0, range(1, 2), direction=torch.ones(3)),
            "the direction has 3 entries; 'blocks.0.cross_attn.hook_pattern' has 7 (text_key)",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            sweep(source, target, [patch])
        assert str(error.value) == f"{str(patch)!r}: {text}."
    assert model.instrumentation.listening == 0

    model, source, target = small("SanaTransformer2DModel")
    with pytest.raises(
        ValueError, match="has no head axis; its axes are batch, token, cross_head, d_cross_head"
    ):
        sweep(source, target, [Patch("cross_attn.hook_z", 0, heads=[0])])
    model.conditions.add(
        {
            "a long boat": {
                k: torch.cat([v, v], 1) for k, v in model.conditions.of(torch.tensor([10])).items()
            }
        }
    )
    longer = dit_lens.sample(model, ["a long boat"] * 2, steps=3, guidance=1.0)
    short = dit_lens.sample(model, ["a fox"] * 2, steps=3, guidance=1.0)
    with pytest.raises(
        ValueError,
        match=r"'blocks.0.cross_attn.hook_k' is \[2, 14, \d+, \d+\] in the source and \[2, 7, .*"
        "expected the same, prompts of one length",
    ):
        sweep(longer, short, [Patch("cross_attn.hook_k", 0)])


def test_bad_input(model, pair):
    a, b = pair.a, pair.b
    before = {k: v.clone() for k, v in model.transformer.state_dict().items()}
    other = HookedDiT(make_dit(channels=1, classes=10, seed=5), scheduler=SCHEDULER)

    def run(which=model, labels=(1, 2, 1), **options):
        return dit_lens.sample(which, list(labels), **{"steps": STEPS} | options)

    changed = copy.deepcopy(SCHEDULER)  # in what its configuration does not say
    changed.alphas_cumprod = changed.alphas_cumprod * 0.99
    with pytest.warns(UserWarning, match="DDIMScheduler has other noise levels than the model's"):
        elsewhere = run(scheduler=changed)
    for source, text in [
        (
            run(other),
            "The runs are of different models; expected two of one model",
        ),
        (run(steps=5), "The source has steps=5 and the target steps=6; expected the same"),
        (run(guidance=2.0), "guidance=2.0 and the target guidance=1.0"),
        (run(scheduler="ddpm"), "different schedulers, DDPMScheduler .* and DDIMScheduler"),
        (elsewhere, "different schedulers, DDIMScheduler .* and DDIMScheduler"),
        (run(labels=[1, 2]), r"latents are \[2, 1, 8, 8\] and the target's \[3, 1, 8, 8\]"),
    ]:
        with pytest.raises(ValueError, match=text):
            sweep(source, b, [Patch("attn_out", 0)])
    empty = Bands.radial((4, 4), n=2)
    empty.sizes = (16, 0)
    for options, text in [
        (dict(site="atn_out"), "No hook point matches 'atn_out'; nearest: 'attn_out'"),
        (
            dict(site="hook_embed"),
            "'hook_embed' is in no layer; expected one that is, such as 'resid_post'",
        ),
        (dict(layer=3), "there is no layer 3; the model has 3, 0 to 2"),
        (dict(steps=range(4, 9)), "step 6 is outside the run; it has 6 steps"),
        (dict(steps=range(-1, 2)), "step -1 is outside the run"),
        (
            dict(heads=[0]),
            "'blocks.0.hook_attn_out' has no head axis; its axes are batch, token, d_model",
        ),
        (dict(site="attn.hook_z", heads=[2]), "head index 2 is out of range; expected 0 to 1"),
        (dict(tokens=[16]), "token index 16 is out of range; expected 0 to 15"),
        (dict(tokens=[]), r"tokens=\[\] chooses nothing"),
        (dict(bands=BANDS, band="lo"), "There is no band 'lo'; expected 0 to 1 or a name"),
        (dict(bands=empty, band=1), "holds no mode; the bands with modes are"),
        (
            dict(bands=Bands.radial((8, 8)), band=0),
            "the bands are of a 8x8 grid; expected the tokens' 4x4",
        ),
        (
            dict(direction=torch.ones(5)),
            r"the direction has 5 entries; 'blocks.0.hook_attn_out' has 16 \(d_model\)",
        ),
        (dict(bands=BANDS), "expected both or neither"),
        (dict(direction=torch.zeros(16)), "length 0; expected a vector"),
        (dict(kind="swop"), r"kind='swop' can't be used; expected one of .*\(nearest: 'swap'\)"),
    ]:
        with pytest.raises((ValueError, UnknownName), match=text):
            sweep(a, b, [Patch(**{"site": "attn_out", "layer": 0} | options)])
    with pytest.raises(TypeError, match="steps=3 is not a window; expected a range"):
        Patch("attn_out", 0, 3)
    with pytest.raises(ValueError, match="expected 2 or more"):
        sweep(a.select([0]), b.select([0]), [Patch("attn_out", 0, kind="resample")])
    for options, text in [
        (dict(patches=[]), "expected one or more patches"),
        (dict(batch=0), "batch=0 can.t be used; expected a whole number"),
        (dict(outcome=Bands.radial((4, 4))), "bands are of a 4x4 grid; expected the latents' 8x8"),
        (
            dict(outcome=lambda x: x[:1]),
            r"The outcome gave shape \[1, 1, 8, 8\]; expected \[3, ...\]",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            sweep(a, b, **{"patches": [Patch("attn_out", 0, range(5, 6))]} | options)
    tied = dit_lens.twins(model, pairs=2, tie="attention", g=1.0, eps=0.5, release=3, steps=STEPS)
    with pytest.raises(
        ValueError, match="begins while the runs are coupled to their twins, until step "
    ):
        sweep(tied.a, tied.b, [Patch("attn_out", 0, range(1, 2))])
    # free from the release on
    assert sweep(tied.a, tied.b, [Patch("attn_out", 0, range(3, 5))]).move.notnull().all()
    with pytest.raises(ValueError, match="n=9 windows over 5 steps"):
        tiles(1, 6, 9)
    assert [len(tiles(1, stop)) for stop in (4, 9)] == [3, 5]
    with pytest.raises(ValueError, match="There are no steps from 5 on before 5"):
        tiles(5, 5)

    def fail(done, total):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sweep(a, b, [Patch("attn_out", 0)], progress=fail)
    assert model.instrumentation.listening == 0 and all(
        torch.equal(v, before[k]) for k, v in model.transformer.state_dict().items()
    )


def test_the_probe(model):
    probe = TwinPatching()
    with pytest.raises(RuntimeError, match="TwinPatching has seen nothing"):
        probe.result()
    result = probe.run(
        model, pairs=2, layers=[0, 2], sites="attn_out", windows=2, release=2, steps=STEPS
    )
    assert result.move.dims == ("layer", "site", "window", "band") and list(
        result.window.values
    ) == ["2-3", "4-5"]
    assert result.move.notnull().all() and result.attrs["release"] == 2 and probe.result() is result


def test_a_run_that_is_not_finite_is_said_to_be(pair):
    model = pair.a.model
    bias = model.transformer.proj_out_2.bias
    before = bias.data.clone()
    try:
        bias.data.fill_(float("nan"))
        run = dit_lens.sample(model, [3], steps=3)
        with pytest.raises(ValueError, match="answer at step 1 of the source run is not finite"):
            sweep(run, run, [Patch("attn_out", 1, range(1, 2))])
    finally:
        bias.data.copy_(before)


def test_an_outcome_that_works_in_place_changes_no_run(pair):
    a, b = pair.a, pair.b
    kept = a.latents.clone(), b.latents.clone()
    sweep(a, b, [Patch("resid_post", 1, range(2))], lambda x: x.zero_().flatten(1).sum(1))
    assert torch.equal(a.latents, kept[0]) and torch.equal(b.latents, kept[1])
