"""What is taken is given back, whatever happens, at whatever line: an exception thrown at the n-th
line of dit_lens that an action runs, for all n; and interrupts at random moments.

Afterwards the bare transformer's answer is bit for bit what it was, no forward of ours is on any
module, no listener is left, and a fresh trace works.
"""

import contextlib
import gc
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_dit, raw
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.families import family_named, small_inputs
from dit_lens.families.registry import OURS as FAMILIES
from dit_lens.hooks.points import LOCK
from dit_lens.model.instrumentation import OPENING, Instrumentation
from dit_lens.plans.plan import Plan, identity

INTERRUPTS = int(os.environ.get("DIT_LENS_ATTACK_INTERRUPTS", "60"))
LINES = int(os.environ.get("DIT_LENS_ATTACK_LINES", "12"))  # of each action; 0 is all of them
OURS = str(Path(dit_lens.__file__).parent)

gen = torch.Generator().manual_seed(2)
INPUTS = torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([700, 31]), torch.tensor([3, 1000])
STREAM = torch.randn(2, 16, 16, generator=gen)


class Thrown(BaseException):
    """Nobody catches it by mistake."""


def zero(a, hook):
    return 0 * a


# What is done to a bare transformer, or to an opened one; each leaves nothing when it ends well.


def traces(dit):
    with dit_lens.trace(dit, names="resid_post") as t:
        t.edit("blocks.1.hook_attn_out", zero)
        raw(dit, *INPUTS)


def reads(dit):
    with dit_lens.trace(dit) as t:
        raw(dit, *INPUTS)
    assert t["resid_post", 1].shape == (1, 2, 16, 16)


def opens(dit):
    HookedDiT(dit).remove()


def opens_with(dit):
    with HookedDiT(dit) as model:
        model(*INPUTS)


def hooks(dit):
    model = HookedDiT(dit)
    with model.hooks([("resid_post", zero), ("hook_embed", zero)]):
        model(*INPUTS)


def adds(dit):
    model = HookedDiT(dit)
    model.add_hook("resid_post", zero)
    model.reset_hooks()


def caches(dit):
    HookedDiT(dit).run_with_cache(*INPUTS)


def stops(dit):
    HookedDiT(dit)(*INPUTS, stop_at_layer=1)


def starts(dit):
    model = HookedDiT(dit)
    model(STREAM, *INPUTS[1:], start_at_layer=0, stop_at_layer=2)
    model(STREAM, *INPUTS[1:], start_at_layer=2)


def unembeds(dit):
    HookedDiT(dit).unembed(STREAM, *INPUTS[1:])


def samples(dit):
    run = dit_lens.sample(HookedDiT(dit, scheduler=DDIMScheduler(1000)), [3], steps=1)
    assert run.activations("resid_post", 0, step=0).shape == (1, 16, 16)


def twins(dit):
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    dit_lens.twins(model, pairs=1, steps=2, release=1, tie="attention", g=0.5)


def holds(dit):
    with dit_lens.trace(dit) as t:
        t.hold(["blocks.0.attn", "blocks.1"], steps=1)
        for _ in range(2):
            raw(dit, *INPUTS)
    assert t["resid_post", 2].shape[0] == 2


def reuses(dit):
    model = HookedDiT(dit)
    times, cells = (900.0, 700.0), frozenset({(0, "attn", 1), (1, "attn", 1), (1, "mlp", 1)})
    of_layer = (("attn", "mlp"),) * 3
    with dit_lens.reuse(model, Plan(identity(model), times, of_layer, cells, 0.9)):
        for t in times:
            raw(dit, INPUTS[0], torch.tensor([t, t]), INPUTS[2])


def goes_in_parts(dit):
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    run = dit_lens.sample(model, [3, 5], steps=1, guidance=2.0, batch=2)
    assert run.activations("resid_post", 0, step=0).shape == (4, 16, 16)


def records(dit):
    with tempfile.TemporaryDirectory() as folder:
        model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
        dit_lens.record(model, ("resid_post", 0), [3], folder, steps=1)


@pytest.fixture(autouse=True)
def unraisable(monkeypatch):
    """What is thrown while something is given back because nobody holds it, Python only prints.
    pytest would keep its frames, and with them the model that is under test.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda args: None)


@pytest.fixture(autouse=True)
def unlocked():
    """An exception thrown by a trace function at the line that leaves `with lock` leaves it locked,
    which no signal can do; other threads of later tests would wait for it.
    """
    yield
    for lock in (LOCK, OPENING):
        while lock._is_owned():
            lock.release()


ACTIONS = [
    traces, reads, opens, opens_with, hooks, adds, caches, stops, starts, unembeds, samples, twins,
    holds, reuses, goes_in_parts, records,
]  # fmt: skip


def lines_of(act, dit, at=None):
    """Run it, throwing at the n-th line of dit_lens; which lines there were."""
    lines = []

    def local(frame, event, arg):
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                sys.settrace(None)
                raise Thrown(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return local

    def trace(frame, event, arg):
        return local if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        next(apart(act, dit))
    finally:
        sys.settrace(before)
    assert sys.exc_info()[1] is None
    return lines


def apart(act, dit):
    """As a generator, which has an exception state of its own. Python 3.11 leaves that of an
    `except` block behind where a trace function throws inside of it: the exception would count as
    being handled ever after, and keep its frames, with the model in them. No signal can do this.
    """
    yield act(dit)


def chosen(lines, seed):
    """When to throw: at the first and the last time that each line of the source runs, or at some
    of these.
    """
    first, last = {}, {}
    for at, line in enumerate(lines):
        first.setdefault(line, at)
        last[line] = at
    found = sorted({*first.values(), *last.values()})
    return sorted(random.Random(seed).sample(found, LINES)) if 0 < LINES < len(found) else found


def left(dit, want):
    """What is left on a transformer that should be bare, in words; nothing if all is well."""
    if "forward" in vars(dit):
        gc.collect()
    found = []
    names = [n for n, m in dit.named_modules() if "forward" in vars(m)]
    if names:
        inst = Instrumentation.found(dit)
        found.append(f"forwards on {names[:3]} and {len(names)} in all; {inst and vars(inst)}")
    if "cache_context" in vars(dit):
        found.append("cache_context")
    with torch.no_grad():
        if not torch.equal(raw(dit, *INPUTS), want):
            found.append("another output")
    return found


@pytest.mark.parametrize("act", ACTIONS, ids=lambda f: f.__name__)
def test_an_exception_at_any_line_leaves_nothing(act):
    dit = make_dit()
    with torch.no_grad():
        want = raw(dit, *INPUTS)
        ran = lines_of(act, dit)
        tries = chosen(ran, len(act.__name__))
        assert len(ran) > 500 and left(dit, want) == []
        for at in tries:
            where = "the end"
            with contextlib.suppress(Exception):
                try:
                    lines_of(act, dit, at)
                except Thrown as thrown:
                    where = str(thrown)
                    if act is adds:  # between the two calls the hooks are the user's, and stay
                        HookedDiT(dit).remove()
            remains = left(dit, want)
            assert remains == [], f"thrown at line {at}, {where}"
    print(f"{act.__name__}: thrown at {len(tries)} lines, 0 with anything left")
    with dit_lens.trace(dit) as t, torch.no_grad():
        raw(dit, *INPUTS)
    assert t["hook_sample"].shape[0] == 1 and left(dit, want) == []


@pytest.mark.parametrize("act", [traces, hooks, stops, samples, reuses], ids=lambda f: f.__name__)
def test_on_a_model_that_stays_open_the_hook_points_stay_and_nothing_else(act):
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    dit, inst = model.transformer, model.instrumentation
    with torch.no_grad():
        want = raw(dit, *INPUTS)
        for at in chosen(lines_of(act, dit), 1):
            where = "the end"
            try:
                lines_of(act, dit, at)
            except Thrown as thrown:
                where = str(thrown)
            assert model.instrumentation is inst and inst.installed, where
            assert not inst.busy and not inst.running and inst.now is None, where
            assert not any(point.attached for point in inst.points.values()), where
            forwards = {id(m.__dict__["forward"]) for m in dit.modules() if "forward" in vars(m)}
            assert forwards == {id(f) for f, _ in inst.replaced}, where
            assert torch.equal(raw(dit, *INPUTS), want), where
    model.remove()
    assert left(dit, want) == []


# Interrupts.


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_interrupts_at_random_moments_leave_nothing():
    dit, rng, hits = make_dit(), random.Random(0), 0
    with torch.no_grad():
        want = raw(dit, *INPUTS)
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(INTERRUPTS):
            act = ACTIONS[i % len(ACTIONS)]
            try:
                signal.setitimer(signal.ITIMER_REAL, 10 ** rng.uniform(-4, -1.7))
                act(dit)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
                if act is adds:  # between the two calls the hooks are the user's, and stay
                    HookedDiT(dit).remove()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert left(dit, want) == [], f"{act.__name__}, interrupt {hits}"
    finally:
        signal.signal(signal.SIGALRM, before)
    print(f"{INTERRUPTS} interrupts set, {hits} hit, 0 with anything left")
    assert hits > INTERRUPTS / 4
    assert threading.active_count() >= 1


# Wrong calls.


def wrong_calls(inputs):
    """Ways to call a transformer wrongly, by name."""
    first = next(iter(inputs))
    yield "no arguments", {}
    yield "without its latents", {k: v for k, v in inputs.items() if k != first}
    yield "without its time", {k: v for k, v in inputs.items() if "timestep" not in k}
    yield "with an unknown argument", inputs | {"nonsense": 1}
    yield "with words for latents", inputs | {first: "latents"}
    yield "with None for latents", inputs | {first: None}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_call_inside_a_trace_leaves_the_model_usable(name):
    family = family_named(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, condition = family.small(1)
    inputs = small_inputs(family, plain, condition)
    with torch.no_grad():
        want = flat(plain(**inputs, return_dict=False)[0])
        with dit_lens.trace(plain) as t:
            for what, wrong in wrong_calls(inputs):
                try:
                    plain(**wrong, return_dict=False)
                except Exception as error:
                    assert "from inside one of its own hooks" not in str(error), what
            assert torch.equal(flat(plain(**inputs, return_dict=False)[0]), want)
    assert len(t.steps) >= 1 and t.get("hook_sample", steps=t.steps[-1])
    assert not any("forward" in vars(m) for m in plain.modules())


def flat(answer):
    parts = answer if isinstance(answer, (list, tuple)) else [answer]
    return torch.cat([part.flatten() for part in parts])


# Failing before anything ran.


@pytest.mark.parametrize(
    "fails",
    [
        lambda dit: HookedDiT(dit, size=(0, 0)),
        lambda dit: dit_lens.sample(dit, [3], steps=2),  # no scheduler
        lambda dit: dit_lens.twins(dit, pairs=1, steps=2),
        lambda dit: dit_lens.trace(dit, names="nonsense"),
        lambda dit: dit_lens.trace(dit, probes=["none"]),
    ],
)
def test_what_fails_leaves_a_bare_model_bare(fails):
    dit = make_dit()
    with pytest.raises((ValueError, TypeError, KeyError)) as kept:
        fails(dit)
    assert kept.tb is not None  # bare while somebody still holds the traceback
    assert not any("forward" in vars(m) for m in dit.modules())


def test_a_hook_at_a_name_that_is_none_claims_nothing():
    inst = HookedDiT(dit := make_dit()).instrumentation
    with pytest.raises(KeyError):
        inst.attach("nonsense", dit_lens.model.hooked.Observer(print))
    assert inst.owner is None and not any("forward" in vars(m) for m in dit.modules())


def test_a_model_that_nobody_looks_at_any_longer_is_bare_again():
    dit = make_dit()
    model = HookedDiT(dit)
    assert any("forward" in vars(m) for m in dit.modules())
    del model
    gc.collect()
    assert not any("forward" in vars(m) for m in dit.modules())


def test_leaving_a_view_leaves_those_of_others():
    dit = make_dit()
    with torch.no_grad():
        want = raw(dit, *INPUTS)
        with dit_lens.trace(dit) as t:
            t.ablate("attn_out")
            with HookedDiT(dit) as second:
                second.add_hook("mlp_out", zero)
                with pytest.raises(RuntimeError, match="A trace of this model is open, a plan"):
                    second.remove()
            edited = raw(dit, *INPUTS)
        assert len(t.steps) == 1 and not torch.equal(edited, want) and left(dit, want) == []
        assert (t["attn_out", 1] == 0).all() and not (t["mlp_out", 1] == 0).all()
        first = HookedDiT(dit)
        with HookedDiT(dit) as second, second.hooks([("mlp_out", zero)]):
            raw(dit, *INPUTS)
            with pytest.raises(RuntimeError, match=r"or a block of hooks, which would end unseen"):
                first.remove()
            assert not torch.equal(raw(dit, *INPUTS), want)
        assert torch.equal(first(*INPUTS), want)
        first.remove()
    assert left(dit, want) == []


def test_hooks_go_with_the_view_that_set_them():
    dit = make_dit()
    with torch.no_grad():
        want = raw(dit, *INPUTS)
        other, model = HookedDiT(dit), HookedDiT(dit)
        handles = model.add_hook("attn_out", zero)
        del model
        gc.collect()
        assert not torch.equal(raw(dit, *INPUTS), want)  # somebody holds what takes them off
        with pytest.warns(UserWarning, match="The hook at 'blocks.0.hook_attn_out' was taken off"):
            del handles
            gc.collect()
        assert torch.equal(raw(dit, *INPUTS), want) and not other.instrumentation.busy
        with pytest.warns(UserWarning, match="which nobody holds any longer; hold that, or what a"):
            HookedDiT(dit).add_hook("attn_out", zero)
            gc.collect()
        with HookedDiT(dit) as model:
            model.add_hook("attn_out", zero)
        assert torch.equal(raw(dit, *INPUTS), want)
        other.close()
    assert left(dit, want) == []
