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


def halves(x, fn, half):
    """What a hook by hand makes of one half of a guided batch."""
    x = x.clone()
    n = len(x) // 2
    part = slice(0, n) if half == "cond" else slice(n, None)
    x[part] = fn(x[part])
    return x


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("kind", ["steer", "ablate", "patch", "edit", "hold"])
def test_one_branch_of_guidance(model, kind, branch):
    """The very run that a hook by hand on that half of the batch gives."""
    name, step, ones = "blocks.1.hook_attn_out", 1, torch.linspace(-1, 1, 16)
    held = {}

    def by_hand(x, hook):
        held[hook.step] = x.clone()
        if hook.step != step:
            return None
        own = {
            "steer": lambda x: x + 2 * ones,
            "ablate": lambda x: x.mean(0, keepdim=True).expand_as(x),
            "patch": lambda x: torch.full_like(x, 0.5),
            "edit": lambda x: x.flip(0),
            "hold": lambda x: held[step - 1][slice(0, 2) if branch == "cond" else slice(2, 4)],
        }
        return halves(x, own[kind], branch)

    def edited(t):
        where = {"steps": [step], "branch": branch}
        return {
            "steer": lambda: t.steer(name, ones, 2, **where),
            "ablate": lambda: t.ablate(name, "mean", **where),
            "patch": lambda: t.patch(name, torch.full((2, 16, 16), 0.5), **where),
            "edit": lambda: t.edit(name, lambda x, hook: x.flip(0), **where),
            "hold": lambda: t.hold(name, **where),
        }[kind]()

    def guided(edit):
        return run(model, edit, guidance=4.0)

    mine, theirs = (guided(edit) for edit in (edited, lambda t: t.edit(name, by_hand)))
    for at in range(3):
        one, other = (t.get("hook_sample", steps=at)["hook_sample"] for t in (mine, theirs))
        assert torch.equal(one, other)
    plain = guided(lambda t: t)["hook_sample"]
    assert torch.equal(plain[0], mine["hook_sample"][0])
    assert not torch.equal(plain[1], mine["hook_sample"][1])


def test_a_branch_is_shown_alone_with_its_items(model):
    seen = []

    def look(x, hook):
        seen.append((len(x), hook.branch))

    run(model, lambda t: t.edit("hook_embed", look, branch="uncond", items=[0]), guidance=2.0)
    assert seen == [(2, "uncond")] * 3


def test_a_branch_that_is_not_known_is_refused(model):
    with dit_lens.trace(model) as t:
        t.ablate("attn_out", branch="cond")
        with pytest.raises(
            InvalidValue, match="it is not known of which branch of guidance the it"
        ):
            model(torch.randn(2, 4, 8, 8), torch.tensor([5]), torch.tensor([0, 1]))
    with pytest.raises(
        InvalidValue, match="branch='null' can't be used; expected one of 'cond', 'uncond', 'skip'"
    ):
        dit_lens.trace(model).ablate("attn_out", branch="null")


def test_a_branch_that_the_run_does_not_have_is_said(model):
    for edit in (
        lambda t: t.ablate("attn_out", branch="skip"),
        lambda t: t.hold("attn_out", 2, branch="skip"),
    ):
        with pytest.warns(UserWarning, match="branch='skip' never acted: the run had 'cond', 'unc"):
            run(model, edit, guidance=2.0)


def test_tokens_of_another_size_name_the_way_to_open_it(model):
    with pytest.raises(InvalidValue, match=r"expected 16, .* another one HookedDiT\(\.\.\., size="):
        dit_lens.trace(model).ablate("attn_out", tokens=torch.ones(8, 8, dtype=torch.bool))
