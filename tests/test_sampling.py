"""Sampling: diffusers' own arithmetic, per-item noise, exact replays."""

import math
import warnings

import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import dit_lens
from dit_lens import HookedDiT
from dit_lens.model.noise_schedule import log_snr, predict_x0
from dit_lens.patching import Patch, path_patch, sweep
from dit_lens.sampling.branches import Branch, ends
from dit_lens.sampling.kept import arrays_of, run_of
from dit_lens.sampling.noise import START, generators, noise
from dit_lens.sampling.schedulers import make_scheduler

ALL = ["ddim", "ddpm", "dpm++", "sde-dpm++"]


def whole(x):
    return x


@pytest.fixture
def model():
    scheduler = DDIMScheduler(1000, prediction_type="v_prediction", clip_sample=False)
    return HookedDiT(make_dit(channels=1, classes=10), scheduler=scheduler)


def test_noise_is_a_pure_function_of_seed_step_and_item():
    a = noise([5, 6, 7], 3, (1, 4, 4))
    assert torch.equal(noise([7, 5], 3, (1, 4, 4)), a[[2, 0]])
    assert not torch.equal(noise([5], 4, (1, 4, 4))[0], a[0])
    many = noise(range(4000), START, (4,))
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05
    assert (
        abs(torch.corrcoef(torch.stack([noise(range(4000), s, ()) for s in (0, 1)]))[0, 1]) < 0.06
    )


def test_a_plain_loop_by_hand_agrees(model):
    run = dit_lens.sample(model, [3, 7], seeds=[4, 9], steps=6)
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(6)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators([4, 9], START)])
    with torch.no_grad():
        for s, t in enumerate(scheduler.timesteps):
            assert torch.equal(run.latents[s], x)
            out = model.transformer(
                x, timestep=t.expand(2), class_labels=torch.tensor([3, 7])
            ).sample
            step = scheduler.step(out, t, x)
            assert torch.allclose(run.x0[s], step.pred_original_sample, atol=1e-5)
            x = step.prev_sample
    assert (
        torch.equal(run.latents[-1], x)
        and run.images.shape == (2, 1, 8, 8)
        and 0 <= run.images.min() <= run.images.max() <= 1
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pipeline_agrees(guidance):
    """Guidance on all channels, learned sigma and the null class, against diffusers' own pipeline
    from the same start.
    """
    pipe = make_pipe()
    start = noise([0, 1], START, (4, 8, 8))
    import diffusers.pipelines.dit.pipeline_dit as module

    original, module.randn_tensor = module.randn_tensor, lambda *a, **k: start.clone()
    try:
        want = pipe(
            class_labels=[3, 5], num_inference_steps=5, guidance_scale=guidance, output_type="pt"
        ).images
    finally:
        module.randn_tensor = original
    run = dit_lens.sample(pipe, [3, 5], seeds=0, steps=5, guidance=guidance)
    assert torch.allclose(torch.as_tensor(want), run.images, atol=1e-5)
    first3 = dit_lens.sample(pipe, [3, 5], seeds=0, steps=5, guidance=4.0, guided_channels="first3")
    assert not torch.allclose(first3.latents[-1], run.latents[-1])


def test_a_run_is_in_float32_whatever_it_starts_from(model):
    run = dit_lens.sample(model, [1, 2], steps=3)
    start = run.latents[0].bfloat16()
    want = dit_lens.sample(model, [1, 2], steps=3, latents=start.float())
    for given in (start, start.double(), start.float().requires_grad_()):
        for found in (
            dit_lens.sample(model, [1, 2], steps=3, latents=given),
            run.replay(0, latents=given),
        ):
            for part in (found.latents, found.x0, found.outputs):
                assert part.dtype == torch.float32 and not part.requires_grad
            assert torch.equal(found.latents, want.latents)
    with pytest.raises(ValueError, match="latents holds values that are not finite"):
        run.replay(0, latents=torch.full_like(start, 1e300, dtype=torch.float64))


def test_a_run_of_a_float64_model_is_in_float64():
    """Nothing of it passes through float32, in twins too."""
    model = HookedDiT(make_dit().double(), scheduler=DDIMScheduler(1000))
    run = dit_lens.sample(model, [1, 2], steps=3)
    start = run.latents[0] + 1e-12
    moved = (
        dit_lens.sample(model, [1, 2], steps=3, latents=start),
        run.replay(0, latents=start),
    )
    pair = dit_lens.twins(model, 2, steps=3, release=1)
    for found in (run, *moved, pair.run):
        for part in (found.latents, found.x0, found.outputs):
            assert part.dtype == torch.float64
    for found in moved:
        assert 0 < (found.latents[-1] - run.latents[-1]).abs().max() < 1e-9


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(1000, 1e-4, 0.02, "linear", None, False),
        DDIMScheduler(100),
        DDPMScheduler(500, 1e-3),
        DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear", None, 3),
    ],
    ids=["clip_sample", "steps", "beta_start", "solver_order"],
)
def test_what_a_scheduler_was_given_by_place_counts(scheduler):
    """Diffusers takes it for not given: one that is made from its configuration lacks it."""
    model = HookedDiT(make_dit(), scheduler=scheduler)
    own, given = (dit_lens.sample(model, [3], steps=3, scheduler=s) for s in (None, scheduler))
    for run in (own, given):
        assert torch.allclose(run.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    for name in ("clip_sample", "beta_start", "solver_order", "num_train_timesteps"):
        assert given.scheduler.config.get(name) == scheduler.config.get(name)


@pytest.mark.parametrize("then", [True, False], ids=["under autocast", "plain"])
def test_what_goes_on_from_a_run_is_computed_on_its_kernels(model, then):
    """Whatever is in force when it goes on."""

    def autocast(on):
        return torch.autocast("cpu", torch.bfloat16, enabled=on)

    with autocast(then):
        pair = dit_lens.twins(model, pairs=1, steps=4, release=1, labels=[3])
        unipc = UniPCMultistepScheduler.from_config(model.scheduler.config)
        many = dit_lens.sample(model, [3], steps=4, scheduler=unipc)
        patch = Patch("attn_out", 1, range(1, 3))
        swept = sweep(pair.a, pair.b, [patch], whole).outcome.values
        path = path_patch(pair.a, pair.b, ("attn_out", 0), ("mlp_out", 1), range(1, 2))
    run = pair.run
    with autocast(not then), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run.replay(1).latents, run.latents)
        assert torch.equal(many.replay(2).latents, many.latents)
        (end,) = ends([Branch(run, 2, run.seeds_at(2))])
        assert torch.equal(end, run.latents[-1])
        kept = run_of(arrays_of(run), model)
        assert torch.equal(kept.replay(0).latents, run.latents)
        assert (sweep(pair.a, pair.b, [patch], whole).outcome.values == swept).all()
        again = path_patch(pair.a, pair.b, ("attn_out", 0), ("mlp_out", 1), range(1, 2))
        assert torch.equal(again, path)


@pytest.mark.parametrize("scheduler", ALL)
def test_replay_is_bit_for_bit_and_items_stand_alone(model, scheduler):
    run = dit_lens.sample(
        model,
        [3, 7, 1],
        seeds=[4, 9, 2],
        steps=8,
        scheduler=scheduler,
        eta=1.0 if scheduler == "ddim" else 0.0,
    )
    for step in (0, 3, 7):
        again = run.replay(step)
        assert torch.equal(again.latents, run.latents) and torch.equal(again.x0, run.x0)
    shuffled = dit_lens.sample(
        model, [1, 3, 7], seeds=[2, 4, 9], steps=8, scheduler=scheduler, eta=run.settings.eta
    )
    assert torch.allclose(shuffled.latents, run.latents[:, [2, 0, 1]], atol=1e-5)
    alone = dit_lens.sample(model, 7, seeds=[9], steps=8, scheduler=scheduler, eta=run.settings.eta)
    assert torch.allclose(alone.latents[:, 0], run.latents[:, 1], atol=1e-5)
    assert torch.isfinite(run.latents).all()
    if scheduler in ("ddim", "ddpm", "sde-dpm++"):
        clone = run.replay(5, seeds=[1, 1, 1])
        assert torch.equal(clone.replay(2).latents, clone.latents)
        assert torch.equal(
            clone.replay(2, edits=[("hook_embed", lambda a, hook: None)]).latents, clone.latents
        )
        assert torch.equal(clone.latents[:6], run.latents[:6]) and not torch.equal(
            clone.latents[6], run.latents[6]
        )
    edited = run.replay(4, edits=[("blocks.1.hook_attn_out", lambda a, hook: a * 0)])
    assert torch.equal(edited.latents[:5], run.latents[:5]) and not torch.equal(
        edited.latents[-1], run.latents[-1]
    )
    assert torch.equal(edited.replay(2).latents[:5], run.latents[:5]) and torch.equal(
        edited.replay(2).latents, edited.latents
    )
    assert (edited.activations("attn_out", 1, step=5) == 0).all() and (
        edited.activations("attn_out", 1, step=3) != 0
    ).any()
    part = run.select([2, 0])
    assert torch.allclose(
        part.replay(2).latents, run.latents[:, [2, 0]], atol=1e-5
    ) and part.seeds_at(0) == (2, 4)


def test_flow_matching():
    model = HookedDiT(
        make_dit(channels=1, classes=10), scheduler=FlowMatchEulerDiscreteScheduler(1000)
    )
    run = dit_lens.sample(model, [1, 2], steps=5, scheduler="euler-flow")
    assert torch.equal(run.replay(2).latents, run.latents)
    assert (run.log_snr[1:] > run.log_snr[:-1]).all()
    x0, eps, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([300.0, 800.0])
    sigma = (t / 1000)[:, None, None, None]
    assert torch.allclose(
        predict_x0(model.scheduler, (1 - sigma) * x0 + sigma * eps, eps - x0, t), x0, atol=1e-5
    )
    with pytest.raises(
        ValueError,
        match="'ddim' does not fit the model's own, FlowMatchEulerDiscreteScheduler, which is flow",
    ):
        dit_lens.sample(model, [1], steps=5, scheduler="ddim")
    # what a flow is sampled with unasked
    assert torch.equal(dit_lens.sample(model, [1, 2], steps=5).latents, run.latents)
    pair = dit_lens.twins(model, pairs=2, steps=6, release=3)
    assert torch.equal(pair.a.latents[3], pair.b.latents[3]) and not torch.equal(
        pair.a.latents[-1], pair.b.latents[-1]
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_stochastic_flow_sampler_draws_from_the_posterior(shift):
    """E1 on a flow: with the exact denoiser of Gaussian modes, clones released at sigma correlate
    by lambda snr / (1 + lambda snr).
    """
    lam, steps, n, release = torch.tensor([4.0, 1.0, 0.25]), 400, 20_000, 0.6
    scheduler = make_scheduler("euler-flow", FlowMatchEulerDiscreteScheduler(1000, shift=shift))
    gen = torch.Generator().manual_seed(0)
    ends = []
    shared = None
    for clone in range(2):
        scheduler.set_timesteps(steps)
        first = 0 if clone == 0 else int((scheduler.sigmas[:-1] > release).sum())
        x = torch.randn(n, 3, generator=gen) if clone == 0 else shared
        if first:
            scheduler._step_index = first
        for t in scheduler.timesteps[first:]:
            sigma = t / 1000
            if clone == 0 and shared is None and sigma <= release:
                shared, at = x, sigma
            x0 = lam * (1 - sigma) * x / ((1 - sigma) ** 2 * lam + sigma**2)
            x = scheduler.step((x - x0) / sigma, t, x, eta=1.0, generator=gen).prev_sample
        ends.append(x)
    snr = ((1 - at) / at) ** 2
    got = (ends[0] * ends[1]).mean(0) / (ends[0].square().mean(0) * ends[1].square().mean(0)).sqrt()
    assert torch.allclose(got, lam * snr / (1 + lam * snr), atol=0.02)
    assert torch.allclose(ends[0].var(0), lam, rtol=0.05)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_is_exact_for_every_prediction_type(kind):
    scheduler = DDPMScheduler(1000, prediction_type=kind, clip_sample=False)
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 1, 4, 4, generator=gen), torch.randn(3, 1, 4, 4, generator=gen)
    t = torch.tensor([10, 500, 900])
    x = scheduler.add_noise(x0, eps, t)
    output = {"epsilon": eps, "v_prediction": scheduler.get_velocity(x0, eps, t), "sample": x0}[
        kind
    ]
    assert torch.allclose(predict_x0(scheduler, x, output, t), x0, atol=2e-4)
    clipping = DDPMScheduler(1000, prediction_type=kind, clip_sample=True)
    assert predict_x0(clipping, x, output, t).abs().max() <= 1


def test_log_snr():
    scheduler = make_scheduler("ddim")
    abar = scheduler.alphas_cumprod[500].double()
    assert math.isclose(
        float(log_snr(scheduler, torch.tensor(500))),
        float(torch.log(abar / (1 - abar))),
        rel_tol=1e-9,
    )


def test_activations_are_those_of_the_run(model):
    seen = []
    with model.hooks([("blocks.1.hook_resid_post", lambda a, hook: seen.append(a.clone()))]):
        run = dit_lens.sample(model, [3, 7], steps=4, guidance=3.0)
    assert torch.equal(run.activations("resid_post", 1, step=2), seen[2]) and len(seen[2]) == 4


@pytest.mark.filterwarnings("ignore:.*has other noise levels")
def test_the_runs_own_schedule_counts_and_changed_weights_raise(model):
    cosine = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    run = dit_lens.sample(model, [1], steps=4, scheduler=cosine)
    assert torch.equal(run.log_snr, log_snr(cosine, run.timesteps)) and not torch.equal(
        run.log_snr, log_snr(model.scheduler, run.timesteps)
    )
    assert run.activations("resid_post", 1).shape == (4, 1, 16, 16)
    model.transformer.proj_out_1.bias.data += 1
    assert run.activations("resid_post", 1, step=0).shape == (1, 16, 16)  # not touched by it
    for act in (lambda: run.activations("hook_sample", step=0), lambda: run.replay(1)):
        with pytest.raises(dit_lens.NotReproduced, match="from the output on"):
            act()


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("sigma", [True, False])
def test_learned_variance_and_clipping_configs(scheduler, sigma):
    """facebook/DiT-XL-2's scheduler has neither; a model's config may have both, and not every
    scheduler can use them.
    """
    base = DDPMScheduler(1000, variance_type="learned_range", clip_sample=True)
    model = HookedDiT(make_dit(out_channels=8 if sigma else 4), scheduler=base)
    run = dit_lens.sample(model, [1, 2], steps=5, scheduler=scheduler)
    assert torch.isfinite(run.latents).all() and run.x0.shape[2] == 4
    assert run.outputs.shape[2] == (8 if sigma and scheduler == "ddpm" else 4)


def test_latents_stay_float32_whatever_the_model_computes_in(model):
    model.to(torch.bfloat16)
    run = dit_lens.sample(model, [1, 2], steps=4, eta=1.0)
    assert run.latents.dtype == run.x0.dtype == torch.float32 and torch.equal(
        run.replay(1).latents, run.latents
    )


def test_bad_input(model):
    for kwargs, text in [
        (dict(labels=[11]), "Label 11 is out of range; expected 0 to 9, or 10 for no class"),
        (dict(labels=[]), "There are no labels"),
        (dict(labels=[1], seeds=[1, 2]), "There are 2 seeds; expected 1"),
        (dict(labels=[1], steps=0), "steps=0 can't be used; expected a whole number of 1 or more"),
        (dict(labels=[1], steps=2000), "steps=2000 is more than the 1000 timesteps"),
        (dict(labels=[1.7]), r"labels\[0\]=1.7 can't be used; expected a whole number"),
        (
            dict(labels=[1], scheduler="dpm++", eta=1.0),
            "eta=1.0 is DDIM's and Euler's on a flow; DPMSolverMultistepScheduler has none",
        ),
        (
            dict(labels=[1], scheduler=EulerDiscreteScheduler()),
            "EulerDiscreteScheduler scales its latents by sigma, which is not supported",
        ),
        (dict(labels=[1], eta=2), "eta=2 can't be used; expected a finite number from 0 to 1"),
        (
            dict(labels=[1], guidance=float("nan")),
            "guidance=nan can't be used; expected a finite number",
        ),
        (dict(labels=[1], scheduler="dimm"), "There is no scheduler 'dimm'; did you mean 'ddim'"),
        (
            dict(labels=[1], guided_channels="three"),
            "guided_channels='three' can't be used; expected one of 'all', 'first3'",
        ),
        (
            dict(labels=[1], latents=torch.zeros(1, 1, 4, 4)),
            r"latents have shape \[1, 1, 4, 4\]; expected \[1, 1, 8, 8\] for 1 labels",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            dit_lens.sample(model, **kwargs)
    run = dit_lens.sample(model, [1], steps=3)
    with pytest.raises(
        ValueError,
        match="from_step=3 can't be used; expected a whole number from 0 to 2, a step of the run",
    ):
        run.replay(3)
    with pytest.raises(
        ValueError, match=r"latents have shape \[2, 1, 8, 8\]; expected \[1, 1, 8, 8\]"
    ):
        run.replay(1, latents=torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="has no scheduler, so its noise schedule is unknown"):
        dit_lens.sample(HookedDiT(make_dit()), [1])
    model.transformer.train()
    with pytest.raises(RuntimeError, match="train mode"):
        dit_lens.sample(model, [1])
