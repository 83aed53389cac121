"""Hold: in place of what a site adds at a step, what it added before."""

from contextlib import nullcontext

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.errors import InvalidState
from dit_lens.families import family_named
from dit_lens.hooks.hold import held_places
from dit_lens.patching import Patch, sweep

STEPS = 6
SCHEDULER = DDIMScheduler(1000, clip_sample=False, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def model():
    return HookedDiT(make_dit(channels=1, classes=10), scheduler=SCHEDULER)


def sampled(model, guidance=1.0, **options):
    return dit_lens.sample(model, [1, 2], steps=STEPS, guidance=guidance, **options)


def by_hand(model, adds, first, last, lag=1, order=0, guidance=1.0):
    """The finished latents of a run in which the named additions are held, by plain hooks."""
    now, past = {"step": -1}, {}

    def count(a, hook):
        now["step"] += 1

    def act(a, hook):
        step, mine = now["step"], past.setdefault(hook.name, {})
        if first <= step <= last:
            a = mine[step - lag]
            a = a if order == 0 else 2 * a - mine[step - 2 * lag]
        mine[step] = a.clone()
        return a

    with model.hooks([("hook_embed", count), (adds, act)]):
        return sampled(model, guidance).latents[-1]


@pytest.mark.parametrize("lag, order", [(1, 0), (2, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("names", ["attn_out", "blocks.1.hook_mlp_out"])
def test_hold_is_what_was_added_before(model, names, lag, order, guidance):
    first = lag * (order + 1)
    with dit_lens.trace(model) as t:
        t.hold(names, range(first, STEPS - 1), lag, order)
        run = sampled(model, guidance)
    expected = by_hand(model, names, first, STEPS - 2, lag, order, guidance)
    assert torch.equal(run.latents[-1], expected)
    assert not torch.equal(expected, sampled(model, guidance).latents[-1])
    assert not model.instrumentation.busy


@pytest.mark.parametrize("span", ["blocks.1", "blocks.:", "blocks.1:3"])
def test_blocks_add_what_leaves_less_what_entered(model, span):
    first, last = {"blocks.1": (1, 1), "blocks.:": (0, 2), "blocks.1:3": (1, 2)}[span]
    now, entered, added = {"step": -1}, {}, {}

    def count(a, hook):
        now["step"] += 1

    def enter(a, hook):
        entered["x"] = a.clone()

    def leave(a, hook):
        if now["step"] in (2, 3):
            a = entered["x"] + added["x"]
        added["x"] = a - entered["x"] if now["step"] == 1 else added.get("x")
        return a

    pre, post = f"blocks.{first}.hook_resid_pre", f"blocks.{last}.hook_resid_post"
    with model.hooks([("hook_embed", count), (pre, enter), (post, leave)]):
        expected = sampled(model).latents[-1]
    with dit_lens.trace(model) as t:
        t.hold(span, [2, 3])
        run = sampled(model)
    assert torch.equal(run.latents[-1], expected)


def test_edits_of_what_enters_a_held_block_act_whenever_they_come(model):
    def hold(t):
        t.hold("blocks.1", [2, 3])

    def edit(t):
        t.edit("blocks.1.hook_resid_pre", lambda a, hook: a + 1, steps=3)

    found = []
    for first, second in ((hold, edit), (edit, hold)):
        with dit_lens.trace(model) as t:
            first(t)
            second(t)
            found.append(sampled(model).latents[-1])
        added = t["resid_post", 1] - t["resid_pre", 1]
        assert torch.allclose(added[3], added[1], atol=1e-5)
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["hold", "plan"])
def test_an_edit_of_what_is_held_acts_once(model, how):
    """Given before the hold or after it, also where what was held is held again."""
    name = "blocks.1.hook_attn_out"
    times = sampled(model).timesteps
    plan = dit_lens.experiments.Plan.of(model, times, [(1, "attn", s) for s in (2, 3, 4)])

    def hold(t):
        if how == "hold":
            t.hold(name, range(2, 5))

    def halve(t):
        t.edit(name, lambda a, hook: a / 2)

    found = []
    for first, second in ((hold, halve), (halve, hold)):
        under = dit_lens.reuse(model, plan) if how == "plan" else nullcontext()
        with under, dit_lens.trace(model, names=name) as t:
            first(t)
            second(t)
            found.append(sampled(model).latents[-1])
        for step in (2, 3, 4):
            assert torch.equal(t[name][step], t[name][1])
    assert torch.equal(*found)


def test_a_held_run_is_read_again_bit_for_bit(model):
    with dit_lens.trace(model, names=["resid_post", "attn_out"]) as recorded:
        recorded.hold("blocks.1", range(1, 4)).hold("attn_out", [4, 5], lag=2)
        sampled(model, 2.0)
    with dit_lens.trace(model) as t:
        t.hold("blocks.1", range(1, 4)).hold("attn_out", [4, 5], lag=2)
        sampled(model, 2.0)
    for name in ("resid_post", "attn_out"):
        for layer in range(3):
            assert torch.equal(t[name, layer], recorded[name, layer])
    assert t.exact
    assert torch.equal(t["attn_out", 0][4], t["attn_out", 0][2])
    added = t["resid_post", 1] - t["resid_pre", 1]
    assert torch.allclose(added[1], added[0], atol=1e-5)
    assert not torch.allclose(added[4], added[3], atol=1e-5)


def test_a_region_of_a_hold(model):
    with dit_lens.trace(model) as t:
        t.hold(("attn_out", 1), [3], tokens=[0, 5])
        sampled(model)
    with dit_lens.trace(model) as plain:
        sampled(model)
    was, now = plain["attn_out", 1], t["attn_out", 1]
    assert torch.equal(now[3][:, [0, 5]], was[2][:, [0, 5]])
    assert torch.equal(now[3][:, 1:5], was[3][:, 1:5])


def test_hold_acts_in_each_run_of_a_trace(model):
    with dit_lens.trace(model) as t:
        t.hold("attn_out", range(1, 3))
        first, second = sampled(model), sampled(model, latents=torch.ones(2, 1, 8, 8))
    assert not torch.equal(t["attn_out", 0][1], t["attn_out", 0][STEPS + 1])
    for run, offset in ((first, 0), (second, STEPS)):
        assert torch.equal(t["attn_out", 0][offset + 2], t["attn_out", 0][offset])
        assert run.latents.isfinite().all()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("attn_out", {}, "Step 0 can't be held with lag=1 and order=0, which takes what was added"),
        (
            "attn_out",
            {"steps": [3], "lag": 2, "order": 1},
            "at step -1; expected steps of 4 or more",
        ),
        ("attn_out", {"steps": [3], "order": 2}, "order=2 can't be used"),
        ("attn_out", {"steps": [3], "lag": 0}, "lag=0 can't be used"),
        ("resid_post", {"steps": [3]}, "is a stream, to which is added, and can't be held"),
        ("hook_embed", {"steps": [3]}, "is a stream"),
        ("blocks.7", {"steps": [3]}, "There is no layer 7: layers are 0 to 2"),
        ("blocks.5:", {"steps": [3]}, "'blocks.5:' is no block: layers are 0 to 2"),
        ("blocks.1.attm", {"steps": [3]}, "parts are added, 'attn', 'mlp' (nearest: 'attn')"),
        ([], {"steps": [3]}, "The list of sites to hold is empty"),
        ("atn_out", {"steps": [3]}, "No hook point matches 'atn_out'"),
    ],
)
def test_bad_input(model, name, options, message):
    with pytest.raises((ValueError, KeyError)) as error:
        dit_lens.trace(model).hold(name, **options)
    assert message in str(error.value)


def test_a_run_that_starts_too_late_has_nothing_to_hold(model):
    run = sampled(model)
    with pytest.raises(RuntimeError, match="step 2 was not run before it, or with other items"):
        with dit_lens.trace(model) as t:
            t.hold("attn_out", [3])
            run.replay(3)
    assert not model.instrumentation.busy


def test_a_hold_does_not_reach_into_another_run(model):
    other = dit_lens.sample(model, [1, 2], steps=4)
    with dit_lens.trace(model) as t:
        t.hold("blocks.1.hook_attn_out", steps=[2])
        dit_lens.sample(model, [1, 2], steps=2)
        with pytest.raises(RuntimeError, match="step 1"):
            other.replay(2)


def test_a_batch_that_changes_is_refused(model):
    x, t0 = torch.randn(2, 1, 8, 8), torch.tensor([500])
    with pytest.raises(ValueError, match="needs one batch and one size throughout"):
        with dit_lens.trace(model) as t:
            t.hold("attn_out", [1])
            model(x, t0, torch.tensor([1, 2]))
            model(x[:1], t0, torch.tensor([1]))


def test_words_for_places(model):
    def named(words):
        return [place.name for place in held_places(words, model.names)]

    assert named("blocks.*") == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert named("blocks.:") == ["blocks.2.hook_resid_post"]
    assert named("blocks.-1.mlp") == ["blocks.2.hook_mlp_out"]
    assert named("blocks.*.attn") == named("attn_out") == named(["attn_out", "blocks.0.attn"])
    assert named(("q", 1)) == ["blocks.1.attn.hook_q"]


HOLDS = [
    Patch("attn_out", 1, range(3, 4), kind="hold"),
    Patch("mlp_out", 0, range(1, 5), kind="hold"),
    Patch("mlp_out", 0, range(1, 4), kind="hold"),
    Patch("attn", 2, range(2, 6), kind="hold", order=1),
    Patch("attn", 2, range(2, 6, 3), kind="hold", lag=2),
    Patch("mlp", 2, range(2, 5), kind="hold", lag=2),
    Patch("block", 1, range(2, 4), kind="hold"),
    Patch("block", 0, range(1, 6, 2), kind="hold", depth=3),
    Patch("attn.hook_z", 1, range(2, 4), heads=[1], kind="hold"),
    Patch("attn_out", 1, range(1, 4), tokens=[0, 3], kind="hold"),
]


def held_in_a_trace(run, patch):
    words = {
        "block": f"blocks.{patch.layer}:{patch.layer + patch.depth}",
        "attn": f"blocks.{patch.layer}.attn",
        "mlp": f"blocks.{patch.layer}.mlp",
    }
    name = words.get(patch.site, (patch.site, patch.layer))
    region = {} if patch.heads is None else {"heads": patch.heads}
    region |= {} if patch.tokens is None else {"tokens": patch.tokens}
    with dit_lens.trace(run.model) as t:
        t.hold(name, patch.steps, patch.lag, patch.order, **region)
        return run.replay().latents[-1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_sweep_of_holds_is_each_hold_by_itself(model, guidance, batch):
    run = sampled(model, guidance)
    found = torch.as_tensor(sweep(run, run, HOLDS, lambda x: x, batch=batch).outcome.values)
    for patch, latents in zip(HOLDS, found, strict=True):
        expected = held_in_a_trace(run, patch)
        assert not torch.allclose(expected, run.latents[-1], atol=1e-4), patch
        assert torch.allclose(latents, expected, atol=1e-5), patch
        if batch == 1:
            assert torch.equal(latents, expected), patch


def test_a_sweep_of_holds_with_a_memory(model):
    run = sampled(model, scheduler="dpm++")
    found = torch.as_tensor(sweep(run, run, HOLDS[:4], lambda x: x, batch=1).outcome.values)
    for patch, latents in zip(HOLDS, found, strict=False):
        assert torch.equal(latents, held_in_a_trace(run, patch)), patch


def test_patches_of_a_part_patch_every_stream():
    family = family_named("SD3Transformer2DModel")
    model = HookedDiT(family.small_pipeline())
    run = dit_lens.sample(model, ["a red fox", "a boat"], steps=3)
    patches = [
        Patch("attn", 0, range(1, 3), kind="hold"),
        Patch("block", 1, range(1, 2), kind="hold"),
        Patch("attn", 0, range(1, 2), kind="zero"),
    ]
    found = torch.as_tensor(sweep(run, run, patches, lambda x: x, batch=1).outcome.values)
    with dit_lens.trace(model) as t:
        t.hold("blocks.0.attn", range(1, 3))
        assert torch.equal(found[0], run.replay().latents[-1])
    with dit_lens.trace(model) as t:
        t.hold("blocks.1", [1])
        assert torch.equal(found[1], run.replay().latents[-1])
    names = ["blocks.0.hook_attn_out", "blocks.0.text.hook_attn_out"]
    with dit_lens.trace(model) as t:
        t.ablate(names, steps=[1])
        assert torch.equal(found[2], run.replay().latents[-1])


@pytest.mark.parametrize(
    "patch, message",
    [
        (Patch("attn_out", 1, range(3), kind="hold"), "Step 0 can't be held with lag=1"),
        (Patch("resid_mid", 1, range(1, 3), kind="hold"), "is a stream, to which is added"),
        (Patch("block", 2, range(1, 3), kind="hold", depth=2), "expected depth=1 or less"),
        (Patch("block", 2, range(1, 3), kind="zero"), "a whole block can.t be patched so"),
    ],
)
def test_holds_that_do_not_fit(model, patch, message):
    run = sampled(model)
    with pytest.raises(ValueError, match=message) as error:
        sweep(run, run, [patch])
    assert str(patch) in str(error.value)
    with pytest.raises(ValueError, match="depth=2 at 'attn' with kind='hold'; expected 1"):
        Patch("attn", 0, kind="hold", depth=2)


def test_each_part_of_a_split_batch_is_held_from_itself(model):
    def held(**options):
        with dit_lens.trace(model) as t:
            t.hold(["attn_out", "blocks.2"], range(2, 5))
            run = dit_lens.sample(model, [1, 2, 3], steps=STEPS, **options)
        return run.latents[-1], t["attn_out", 0]

    whole, split = held(), held(batch=2)
    for a, b in zip(whole, split, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(split[1][3], split[1][1])


def test_a_hold_of_some_items_is_not_shown_the_batch_in_parts(model):
    """They would be counted in each part."""
    with dit_lens.trace(model) as t:
        t.hold("attn_out", range(2, 5), items=[0])
        with pytest.raises(InvalidState, match="'blocks.0.hook_attn_out' sees a step's whole"):
            dit_lens.sample(model, [1, 2, 3], steps=STEPS, batch=2)
