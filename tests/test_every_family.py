"""Every measurement on every family's small pipeline: it gives a result, or says why not."""

import os

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens import experiments as ask
from dit_lens.errors import DitLensError
from dit_lens.families import family_named
from dit_lens.families.registry import OURS
from dit_lens.model.quiet import quiet

SIZE = {"pairs": 16, "steps": 5, "resamples": 20}
ITEMS = {"items": 12, "steps": 5, "resamples": 20}
SENTENCES = (
    "do not part within the run in both bands",  # random weights
    "does not commit within the run",
    "The twins do not part",
    "can't be made from images here",
    "can't be met: with every cell held",
)


def light(images):
    return {"light": (images.flatten(1).mean(1) > 0.5).long()}


def unlike_most(images):
    value = images.flatten(1).mean(1)
    return value - value.median() + 0.5


def diagnosed(model):
    run = dit_lens.sample(model, [0], steps=5)
    mask = torch.zeros(run.images.shape[-2:], dtype=torch.bool)
    mask[:4, :4] = True
    return ask.diagnose(model, run, mask, others=4, clones=2, releases=2, pairs=2)


def of_its_own_images(model):
    images = dit_lens.sample(model, [0, 1] * 8, steps=3).images
    return ask.measure_gap(model, images=images, **SIZE)


def planned(model):
    plan = ask.reuse_plan(model, 0.8, **ITEMS)
    ask.compare(model, plan, seed=1000, **ITEMS)
    return ask.side_by_side(model, [plan], items=12, resamples=20)


MEASUREMENTS = {
    "gap": lambda m: ask.measure_gap(m, **SIZE),
    "gap of images": of_its_own_images,
    "attributes": lambda m: ask.attributes(m, light, **SIZE),
    "couplings": lambda m: ask.couplings(m, [0, 1], **SIZE),
    "couple_alone": lambda m: ask.couple_alone(m, **SIZE),
    "knock_outs": lambda m: ask.knock_outs(m, how="resample", direct=True, **SIZE),
    "windows": lambda m: ask.knock_outs(m, windows=2, **SIZE),
    "cumulative": lambda m: ask.cumulative(m, **SIZE),
    "smallest_set": lambda m: ask.smallest_set(m, **SIZE),
    "shapley": lambda m: ask.shapley(m, orders=2, **SIZE),
    "interchange": lambda m: ask.interchange(m, heads=True, pairs=8, steps=5, windows=2),
    "patches": lambda m: dit_lens.probes.TwinPatching().run(
        m, pairs=8, windows=2, release=1, steps=5
    ),
    "cause_map": lambda m: ask.cause_map(m, projections=1, check=2, **ITEMS),
    "plan, compare, side_by_side": planned,
    "step_doubling": lambda m: ask.step_doubling(m, **SIZE),
    "diagnose": diagnosed,
    "diagnose_all": lambda m: ask.diagnose_all(m, 4, {"unlike": unlike_most}, steps=5, most=1),
}


FEW = ("DiT", "QwenImage", "Sana")
"""The quick ones; `make attack` asks all eleven."""
DEVICE = os.environ.get("DIT_LENS_TEST_DEVICE", "cpu")
NAMES = [name for name in OURS if os.environ.get("DIT_LENS_ATTACK") or name.startswith(FEW)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_measurement(name):
    with quiet():
        model = HookedDiT(family_named(name).small_pipeline().to(DEVICE))
    wrong = []
    for what, measure in MEASUREMENTS.items():
        try:
            with quiet():
                measure(model)
        except Exception as error:
            told = isinstance(error, DitLensError)
            if not told or not any(sentence in str(error) for sentence in SENTENCES):
                wrong.append((what, repr(error)))
        assert model.instrumentation.listening == 0, what
    assert not wrong


def test_a_model_opened_by_the_boundaries_of_its_modules():
    from test_own_models import SIT, SiT, alive

    torch.manual_seed(0)
    sit = alive(SiT(layers=3))
    flow = FlowMatchEulerDiscreteScheduler()
    model = HookedDiT(sit, flow, blocks="layers", adapter=SIT)
    told = {}
    for what, measure in MEASUREMENTS.items():
        try:
            measure(model)
        except DitLensError as error:
            told[what] = str(error)
    boundaries = {name for name, text in told.items() if "boundaries" in text}
    assert told.keys() - boundaries <= {"interchange"}, told
    assert "the heads of this model are not known" in told["interchange"]
    assert not {"gap", "gap of images", "attributes", "step_doubling"} & told.keys()
