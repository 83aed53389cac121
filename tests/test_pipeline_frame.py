"""Which branch and which step a call is, where diffusers itself says so."""

import copy

import torch

import dit_lens
from dit_lens.families import family_named
from dit_lens.families.upstream import small_inputs


def wan():
    family = family_named("WanTransformer3DModel")
    transformer, condition = family.small(0)
    return transformer, small_inputs(family, transformer, condition)


def test_branch_and_step_are_taken_from_cache_context():
    transformer, inputs = wan()
    with torch.no_grad(), dit_lens.trace(transformer) as t:
        for step in range(2):
            for name in ("uncond", "cond"):  # not in the order that would be guessed
                with transformer.cache_context(name, step_index=step):
                    transformer(**inputs)
    assert [c.branch for c in t.record.calls] == [("uncond",) * 2, ("cond",) * 2] * 2
    assert t.record.calls_at == [[0, 1], [2, 3]]
    name = "blocks.0.hook_resid_post"
    both, cond = t.get(name, steps=1)[name], t.get(name, steps=1, branch="cond")[name]
    assert both.shape[1] == 4 and torch.equal(both[:, 2:], cond)


def test_cache_context_is_given_back_and_copies_have_their_own():
    transformer, inputs = wan()
    before = dict(vars(transformer))
    model = dit_lens.HookedDiT(transformer)
    twin = copy.deepcopy(model)
    assert vars(twin.transformer)["cache_context"].module is twin.transformer
    with torch.no_grad(), dit_lens.trace(twin) as t, twin.transformer.cache_context("uncond"):
        twin.transformer(**inputs)
    assert t.record.calls[0].branch == ("uncond", "uncond")
    model.remove()
    assert "cache_context" not in vars(transformer) and vars(transformer).keys() == before.keys()


def test_outside_of_cache_context_nothing_is_said():
    transformer, inputs = wan()
    with torch.no_grad(), dit_lens.trace(transformer) as t:
        with transformer.cache_context("uncond"):
            pass
        transformer(**inputs)
    assert t.record.calls[0].branch is None and t.record.calls[0].place is None
