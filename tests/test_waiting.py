"""On an accelerator the host runs ahead of the device: no step of a run waits for it.

The device is the emulated one of elsewhere.py; tests/test_accelerator.py says the same of a GPU.
"""

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from elsewhere import WAITS, elsewhere

import dit_lens
from dit_lens.families import family_named
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence


@pytest.fixture
def model():
    with elsewhere() as device:
        yield dit_lens.HookedDiT(make_dit(layers=2).to(device), scheduler=DDIMScheduler(1000))


def grown(work, few=3, many=5, warm=True):
    """The waits that come with more steps, by line."""
    if warm:  # what is made once is made
        work(few)
    seen = []
    for steps in (few, many):
        WAITS.clear()
        work(steps)
        seen.append(WAITS.copy())
    return seen[1] - seen[0]


@pytest.mark.parametrize(
    "more", [{}, {"eta": 1.0}, {"guidance": 4.0}, {"batch": 1}, {"guidance": 4.0, "batch": 1}]
)
def test_a_run(model, more):
    assert not grown(lambda steps: dit_lens.sample(model, [3, 7], steps=steps, **more))


def test_a_run_of_prompts():
    with elsewhere() as device:
        transformer, condition = family_named("SD3Transformer2DModel").small(0)
        scheduler = FlowMatchEulerDiscreteScheduler()
        model = dit_lens.HookedDiT(transformer.to(device), scheduler=scheduler)
        for i, prompt in enumerate(["", "a fox"]):
            one = {name: value[i : i + 1].to(device) for name, value in condition.items()}
            model.conditions.add({prompt: one})

        def run(steps):
            dit_lens.sample(model, ["a fox"] * 3, steps=steps, guidance=4.0, eta=1.0, batch=4)

        assert not grown(run)


@pytest.mark.parametrize(
    "probe, guidance", [(SpectralSplit, 1.0), (LayerLens, 4.0), (TwinDivergence, 4.0)]
)
def test_twins_under_a_probe(model, probe, guidance):
    def run(steps):
        watched = {"probes": [probe()], "guidance": guidance, "batch": 2}
        dit_lens.twins(model, 2, steps=steps, release=1, **watched)

    assert not grown(run)


@pytest.mark.parametrize("more", [{}, {"names": "resid_post"}])
def test_a_trace_around_forwards(model, more):
    x = torch.randn(2, 4, 8, 8).to("away")
    t, y = torch.tensor([700, 31]).to("away"), torch.tensor([3, 999]).to("away")

    def run(steps):
        with torch.no_grad(), dit_lens.trace(model, **more) as trace:
            trace.edit("blocks.1.hook_attn_out", lambda a, hook: a * 0.5)
            for _ in range(steps):
                model(x, t, y)

    assert not grown(run)


def test_a_trace_of_a_run(model):
    def run(steps):
        with dit_lens.trace(model, names="resid_post") as trace:
            trace.ablate("blocks.1.hook_mlp_out")
            dit_lens.sample(model, [3, 7], steps=steps, guidance=4.0)
        trace["resid_post", 1]

    assert not grown(run)


def test_a_replay_and_some_items(model):
    def run(steps):
        made = dit_lens.sample(model, [3, 7, 5], steps=steps, eta=1.0)
        made.replay(from_step=1)
        made.select([0, 2]).replay()

    assert not grown(run)


@pytest.mark.parametrize("tokens", [None, [0, 3]])
def test_a_recording(model, tmp_path, tokens):
    folders = iter(range(3))

    def run(steps):
        out = tmp_path / str(next(folders))
        dit_lens.record(model, ("resid_post", 1), [3, 7], out, steps=steps, tokens=tokens)

    assert not grown(run)


def test_a_gap(model):
    def run(steps):
        dit_lens.experiments.measure_gap(model, 16, steps, resamples=20)

    assert grown(run, 4, 8, warm=False).total() <= 4 * 5
