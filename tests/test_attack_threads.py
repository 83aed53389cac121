"""The state of one pass belongs to that pass: plain runs beside partial, coupled, recomputed and
witnessed ones of the same model, in other threads and other asyncio tasks.

Every plain result is bit for bit the quiet one, or a sentence says no; and so are the results of
the passes beside it.
"""

import asyncio
import os
import sys
import threading

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT, errors
from dit_lens.twinning.coupling import coupled

TRIES = int(os.environ.get("DIT_LENS_ATTACK_RACES", "60"))


@pytest.fixture
def model():
    return HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))


@pytest.fixture(autouse=True)
def often():
    """Let threads take turns much more often than Python does by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(before)


def arguments(seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=gen), torch.tensor([700, 31]), torch.tensor([3, 3])


A, B = arguments(1), arguments(2)


# What one does: each gives a tensor, the same whenever it runs.


def stopped(model):
    with torch.no_grad():
        return model(*A, stop_at_layer=1)


def started(model):
    stream = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.cat([model(stream, *A[1:], start_at_layer=i).flatten() for i in (0, 2)])


def twins_coupled(model):
    with torch.no_grad(), coupled(model, g=0.7):
        return model(*A)


def whole_twins(model):
    pair = dit_lens.twins(model, pairs=1, steps=2, release=1, tie="attention", g=0.5)
    return torch.cat([pair.a.latents, pair.b.latents])


def unembedded(model):
    stream = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.unembed(stream, A[1], A[2])


def witnessed(model):
    return dit_lens.sample(model, [3], steps=2).latents


def recomputed(model):
    return RUN[id(model)].activations("resid_post", 2, step=1)


def traced(model):
    with dit_lens.trace(model) as t, torch.no_grad():
        model(*A)
    return t["resid_post", 1]


def hooked(model):
    with model.hooks([("blocks.1.hook_attn_out", lambda a, hook: 0 * a)]), torch.no_grad():
        return model(*A)


# What the other does meanwhile.


def plain(model):
    with torch.no_grad():
        return model.transformer(B[0], timestep=B[1], class_labels=B[2]).sample


def plain_sample(model):
    return dit_lens.sample(model, [5], seeds=9, steps=2).latents


ACTS = [stopped, started, twins_coupled, whole_twins, unembedded, witnessed]
ALONE = [recomputed, traced, hooked]  # these have the model for themselves
RUN = {}


def tried(act, model):
    """What came out: a tensor, or the sentence that refused it."""
    try:
        return act(model)
    except errors.DitLensError as error:
        assert "another thread or task" in str(error), error
        return str(error)


def at_once(model, act, other, tries):
    """Both, over and over in two threads; their results, act's first."""
    found = ([], [])
    start = threading.Barrier(2)

    def body(place, what):
        for _ in range(tries):
            start.wait()
            try:
                found[place].append(tried(what, model))
            except BaseException as error:  # seen by whoever compares
                found[place].append(error)

    threads = [threading.Thread(target=body, args=each) for each in ((0, act), (1, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def wrong(results, quiet):
    """Results that are neither the quiet one nor a refusal."""
    return [r for r in results if not isinstance(r, str) and not same(r, quiet)]


def same(result, quiet):
    return isinstance(result, torch.Tensor) and torch.equal(result, quiet)


def clean(model):
    inst = model.instrumentation
    assert not inst.busy and not inst.running and inst.owner is None and not inst.couplings
    assert not any(point.attached for point in inst.points.values())
    forwards = [m.__dict__["forward"] for m in model.transformer.modules() if "forward" in vars(m)]
    assert {id(f) for f in forwards} == {id(f) for f, _ in inst.replaced}


@pytest.mark.parametrize("other", [plain, plain_sample], ids=lambda f: f.__name__)
@pytest.mark.parametrize("act", ACTS + ALONE, ids=lambda f: f.__name__)
def test_threads_do_not_see_each_others_passes(model, act, other):
    RUN[id(model)] = dit_lens.sample(model, [3], steps=2)
    quiet = act(model), other(model)
    tries = TRIES if act in ACTS[:3] else max(TRIES // 5, 5)
    found = at_once(model, act, other, tries)
    for results, want in zip(found, quiet, strict=True):
        assert wrong(results, want) == [], f"{act.__name__} beside {other.__name__}"
    refused = [sum(isinstance(r, str) for r in results) for results in found]
    if act in ACTS:
        assert refused == [0, 0], "what belongs to a pass hinders no one"
    print(f"{act.__name__} | {other.__name__}: {tries} tries, 0 silent wrong, {refused} refused")
    clean(model)
    assert torch.equal(act(model), quiet[0]) and torch.equal(other(model), quiet[1])
    del RUN[id(model)]


def test_a_sample_beside_another_is_witnessed_by_its_own_pass(model):
    runs = ([], [])

    def body(place):
        for _ in range(10):
            runs[place].append(dit_lens.sample(model, [place], seeds=place, steps=2))

    threads = [threading.Thread(target=body, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in runs:
        assert len(mine) == 10
        for run in mine:
            assert run.activations("resid_post", 2, step=1).shape == (1, 16, 16)  # and proven
    clean(model)


@pytest.mark.parametrize("act", ACTS + ALONE, ids=lambda f: f.__name__)
def test_tasks_do_not_see_each_others_passes(model, act):
    """Tasks take turns where they wait: inside of whatever the first one has open."""
    RUN[id(model)] = dit_lens.sample(model, [3], steps=2)
    quiet, found = (act(model), plain(model)), ([], [])

    async def first():
        for _ in range(max(TRIES // 10, 3)):
            found[0].append(tried(act, model))
            await asyncio.sleep(0)

    async def second():
        for _ in range(max(TRIES // 10, 3)):
            found[1].append(tried(plain, model))
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(first(), second())

    asyncio.run(both())
    for results, want in zip(found, quiet, strict=True):
        assert all(same(r, want) for r in results)
    clean(model)


@pytest.mark.parametrize("how", ["coupled", "under", "part", "witnessing", "trace", "hooks"])
def test_a_block_that_a_task_has_open_is_no_other_tasks(model, how):
    quiet = plain(model)
    opened = {
        "coupled": lambda: coupled(model, g=0.7),
        "under": lambda: model.instrumentation.under(step=3),
        "part": lambda: model.instrumentation.part((None, 1)),
        "witnessing": model.instrumentation.witnessing,
        "trace": lambda: dit_lens.trace(model),
        "hooks": lambda: model.hooks([("hook_embed", lambda a, hook: 0 * a)]),
    }[how]
    answers = []

    async def holds():
        with opened() as kept:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if how == "witnessing":
            assert kept == {}
        if how == "trace":
            assert kept.steps == []

    async def asks():
        answers.append(tried(plain, model))
        await asyncio.sleep(0)
        answers.append(tried(plain, model))

    async def both():
        await asyncio.gather(holds(), asks())

    asyncio.run(both())
    if how in ("trace", "hooks"):
        assert all("traced or hooked in another thread or task" in each for each in answers)
    else:
        assert all(same(each, quiet) for each in answers)
    assert torch.equal(plain(model), quiet)
    clean(model)


def test_hooks_of_a_task_that_is_over_act_on_all(model):
    """As in a notebook, where each cell may be a task of its own."""
    seen = []

    async def cell():
        return model.add_hook("hook_embed", lambda a, hook: seen.append(hook.name))

    asyncio.run(cell())

    async def another():
        plain(model)

    asyncio.run(another())
    assert seen == ["hook_embed"]
    model.reset_hooks()
    clean(model)


def test_a_model_is_not_taken_apart_under_a_running_pass(model):
    inside, go, problems = threading.Event(), threading.Event(), []
    block = model.transformer.transformer_blocks[1]
    wait = block.register_forward_pre_hook(lambda m, args: (inside.set(), go.wait(10)) and None)
    quiet = []
    thread = threading.Thread(target=lambda: quiet.append(plain(model)))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError, match="in use by another thread or task; wait for it"):
        model.remove()
    with pytest.raises(RuntimeError, match="in use by another thread or task; hooks belong"):
        model.add_hook("hook_embed", lambda a, hook: problems.append(1))
    go.set()
    thread.join()
    wait.remove()
    assert torch.equal(quiet[0], plain(model)) and not problems
    clean(model)
