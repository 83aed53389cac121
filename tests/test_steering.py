"""Steering, and the words for parts of an activation, the same everywhere."""

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens.errors import InvalidType, InvalidValue


@pytest.fixture(scope="module")
def model():
    return dit_lens.HookedDiT(make_dit(classes=4), scheduler=DDIMScheduler(1000))


def run(model, edit=lambda t: t, **settings):
    with dit_lens.trace(model) as t:
        edit(t)
        dit_lens.sample(model, [0, 1], steps=3, **settings)
    return t


def test_steering_adds_the_direction_at_its_steps_and_tokens(model):
    direction = torch.randn(16)
    t = run(model, lambda t: t.steer(("resid_post", 1), direction, 2.5, steps=[1], tokens=[3, 4]))
    plain, steered = run(model)["resid_post", 1], t["resid_post", 1]
    assert torch.equal(plain[0], steered[0])
    moved = plain[1].clone()
    moved[:, [3, 4]] += 2.5 * direction
    assert torch.equal(steered[1], moved)
    assert not torch.equal(plain[2], steered[2])  # what comes later is another run


def test_steering_takes_what_broadcasts_and_keeps_a_copy(model):
    direction = torch.zeros(16, 16)
    with dit_lens.trace(model) as t:
        t.steer("attn_out", direction, scale=-1)
        direction += 1  # what happens to the caller's tensor later is not meant
        dit_lens.sample(model, [0, 1], steps=3)
    assert torch.equal(t["attn_out", 2], run(model)["attn_out", 2])


@pytest.mark.parametrize(
    "direction, said",
    [
        (torch.zeros(15), "direction has 15 entries; expected 16, the length of"),
        (torch.full((16,), float("nan")), "direction"),
        ("up", "direction"),
        (torch.zeros(16).long(), "direction"),
    ],
)
def test_what_is_no_direction_is_refused(model, direction, said):
    with pytest.raises((InvalidType, InvalidValue), match=said):
        dit_lens.trace(model).steer("resid_post", direction)


def test_a_direction_that_does_not_broadcast(model):
    with pytest.raises(InvalidValue, match=r"direction has shape \[3, 16\]; expected one that br"):
        run(model, lambda t: t.steer("resid_post", torch.zeros(3, 16)))


def test_one_head_may_be_said_so(model):
    one = run(model, lambda t: t.ablate("z", head=1))["hook_sample"]
    assert torch.equal(one, run(model, lambda t: t.ablate("z", heads=[1]))["hook_sample"])
    with pytest.raises(InvalidType, match="head= and heads= are both given"):
        dit_lens.trace(model).ablate("z", head=1, heads=[1])


def test_stacks_of_one_branch(model):
    t = run(model, guidance=2.0)
    both = t.stack("resid_post")
    for branch in ("cond", "uncond"):
        one = t.stack("resid_post", steps=[0, 2], branch=branch)
        assert one.shape == (3, 2, 2, 16, 16)
        for layer in range(3):
            at = t.get(("resid_post", layer), branch=branch)[f"blocks.{layer}.hook_resid_post"]
            assert torch.equal(one[layer], at[[0, 2]])
    assert both.shape[2] == 4
    with pytest.raises(InvalidValue, match="branch='null' can't be used"):
        t.stack("resid_post", branch="null")
