"""The contract of a family, on its small pipeline, saved and loaded: the pipeline itself, guidance,
our own sampler, the gap.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..experiments.gap import measure_gap
from ..families import Family, flat
from ..hooks.hold import parts
from ..model.hooked import HookedDiT
from ..model.loading import load
from ..model.quiet import quiet
from ..sampling.sample import sample
from ..storage.configured import config_of
from ..tracing.trace import trace


class Saved:
    """The family's small pipeline, saved to a folder that lasts as long as this, and opened from
    there.
    """

    def __init__(self, family: Family, device: str = "cpu") -> None:
        self.kept = tempfile.TemporaryDirectory()
        with quiet():
            family.small_pipeline().save_pretrained(self.kept.name)
            self.model = load(self.kept.name, device=device)


class InPipeline:
    """The family's small pipeline, loaded from where it was saved, with what it makes unopened.

    Args:
        family: with a small pipeline.
        device: where it is.
        saved: of the family and there; several checks can share it.
    """

    def __init__(self, family: Family, device: str = "cpu", saved: Saved | None = None) -> None:
        from diffusers import DiffusionPipeline

        saved = saved or Saved(family, device)
        self.family, self.model = family, saved.model
        with quiet():
            self.pipe = DiffusionPipeline.from_pretrained(saved.kept.name).to(device)
        if type(self.pipe.scheduler).__name__ == "DDPMScheduler":  # which draws noise in every step
            self.pipe.scheduler = DDIMScheduler.from_config(config_of(self.pipe.scheduler))
        self.pipe.set_progress_bar_config(disable=True)

    def run(self, guided: bool) -> Tensor:
        gen = [torch.Generator().manual_seed(i) for i in range(2)]
        with quiet():
            images = self.pipe(
                **self.family.small_call(guided), generator=gen, output_type="pt", return_dict=False
            )[0]
        return flat(images)


def pipeline_is_left_alone(case: InPipeline) -> None:
    """its pipeline, saved and loaded, makes the same images traced and untraced, with guidance and
    without
    """
    for guided in (False, True):
        want = case.run(guided)
        with trace(case.pipe, names="resid_post") as eager:
            assert torch.equal(case.run(guided), want), "traced, the pipeline makes another image"
        with trace(case.pipe) as lazy:
            case.run(guided)
        assert len(eager.steps) == 2, f"2 denoising steps are counted as {len(eager.steps)}"
        assert torch.equal(lazy["resid_post", 0], eager["resid_post", 0]), (
            "in the pipeline, reading is not recording"
        )
        left = [
            name for name, m in case.pipe.transformer.named_modules() if "forward" in m.__dict__
        ]
        assert not left, f"after the trace a forward is left on {left[0]!r}"


def branches_are_right(case: InPipeline) -> None:
    """site.branch says of every item whether it was asked for with the prompt or without"""
    with trace(case.pipe) as plain:
        case.run(False)
    asked = [_asked(plain.record.calls[0], i) for i in range(2)]
    assert plain.record.calls[0].branch == ("cond", "cond"), (
        f"without guidance the branches are {plain.record.calls[0].branch}"
    )
    with trace(case.pipe) as t:
        case.run(True)
    for calls in t.record.calls_at.values():
        words = [
            (word, _asked(t.record.calls[c], i))
            for c in calls
            for i, word in enumerate(t.record.calls[c].branch or ())
        ]
        distilled = case.model.cfg.distilled_guidance and len(words) == 2
        assert [w for w, _ in words].count("cond") == 2 and (distilled or len(words) == 4), (
            f"the branches are {[w for w, _ in words]}"
        )
        found = [_same(value, asked[i % 2]) for i, (_, value) in enumerate(words)]
        told = [word == "cond" for word, _ in words]
        assert found == told, (
            f"the branches are said to be {[w for w, _ in words]}; conditions are the prompt's own "
            f"at {found}"
        )
    if not distilled:
        cond = t.get("resid_post", branch="cond")["blocks.0.hook_resid_post"]
        assert cond.shape[:2] == (2, 2) and t["resid_post", 0].shape[:2] == (2, 4), (
            "reading one branch gives other items"
        )


def holds_each_branch(case: InPipeline) -> None:
    """held at the second step, the first block's attention adds in each branch of guidance what it
    added in that branch at the first
    """
    names = [place.name for place in parts(case.model.names, 0)["attn"]]
    for guided in (False, True):
        with trace(case.pipe) as t:
            t.hold(names, [1])
            case.run(guided)
        told = {word for call in t.record.calls for word in call.branch or ()}
        assert "cond" in told, f"the branches are {told}"
        for branch in told & {"cond", "uncond"}:
            for name, added in t.get(names, branch=branch).items():
                assert torch.equal(added[0], added[1]), (
                    f"the {branch} half of {name} is not held from itself"
                )


def _asked(call: Any, i: int) -> Tensor:
    """What the i-th item of a call was asked for with."""
    name = next(
        n for n in ("class_labels", "encoder_hidden_states", "cap_feats") if n in call.inputs
    )
    value: Tensor = call.inputs[name][i]
    return value


def _same(a: Tensor, b: Tensor) -> bool:
    n = min(len(a), len(b)) if a.ndim else None
    return torch.allclose(a[:n], b[:n], atol=1e-5) if a.ndim else bool(a == b)


def sampler_agrees(case: InPipeline) -> None:
    """dit_lens.sample goes through the same latents as the pipeline, from the same start, prompts
    encoded alike
    """
    with trace(case.pipe) as t:
        case.run(False)
    call = case.family.small_call(False)
    asked = call["prompt"] if "prompt" in call else call["class_labels"]
    n = len(asked)
    model = HookedDiT(case.pipe, size=_size_of(case.model, t.latents[0]))
    guidance = (
        float(t.record.calls[0].inputs["guidance"][0]) if model.cfg.distilled_guidance else 1.0
    )
    try:
        run = sample(
            model,
            asked,
            steps=2,
            guidance=guidance,
            scheduler=case.pipe.scheduler,
            latents=t.latents[0][:n].float(),
        )
    finally:
        model.remove()
    for step in range(2):
        off = float((run.latents[step] - t.latents[step][:n]).abs().max())
        assert off < 1e-3, (
            f"after {step} steps the latents are off by {off:.2g} from the pipeline's"
        )


def _size_of(model: HookedDiT, x: Tensor) -> tuple[int, ...]:
    """The size that makes the model's latents as large as these."""
    frames = [
        n
        for n, own in zip(x.shape[1:-2], model.cfg.latent_shape[:-2], strict=True)
        if own != model.cfg.in_channels or n != own
    ]
    return (*frames[:1], *x.shape[-2:]) if len(model.cfg.grid) == 3 else tuple(x.shape[-2:])


def gap_is_measured(case: InPipeline) -> None:
    """dit-lens gap runs to its end on the small pipeline; a video's bands are in space"""
    with trace(case.pipe) as t:
        case.run(False)
    model = HookedDiT(case.pipe, size=_size_of(case.model, t.latents[0]))
    try:
        result = measure_gap(model, pairs=16, steps=4, resamples=50)
    finally:
        model.remove()
    assert result.attrs["headline"] and result.layer_gap.sizes["layer"] == model.cfg.n_layers + 1


PIPELINE_CHECKS: tuple[Callable[[InPipeline], None], ...] = (
    pipeline_is_left_alone,
    branches_are_right,
    holds_each_branch,
    sampler_agrees,
    gap_is_measured,
)
