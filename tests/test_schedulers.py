"""Every scheduler of diffusers is run to its end, or refused with a sentence."""

import logging
import warnings

import diffusers
import pytest
import torch
from conftest import make_dit

import dit_lens
from dit_lens.errors import InvalidValue
from dit_lens.model.noise_schedule import is_flow
from dit_lens.patching.first_order import check_gradients
from dit_lens.sampling.loop import advance, prepared, remembers
from dit_lens.sampling.noise import noise
from dit_lens.sampling.schedulers import make_scheduler
from dit_lens.sampling.settings import checked_settings

NAMES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and isinstance(getattr(diffusers, name), type)
    and issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)
)
PRESERVING = """CogVideoXDDIM DDIMParallel DDIM DDPMParallel DDPM DEISMultistep DPMSolverMultistep
    DPMSolverSinglestep LCM UniPCMultistep""".split()
FLOWS = "FlowMatchEulerDiscrete FlowMatchLCM LTXEulerAncestralRF".split()
# of schedulers as diffusers makes them, whatever model they are for
pytestmark = pytest.mark.filterwarnings("ignore:.*has other noise levels")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def model_with(scheduler):
    return dit_lens.HookedDiT(make_dit(channels=1, classes=10), scheduler=scheduler)


@pytest.mark.parametrize("kind", ["preserving", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_each_is_run_to_its_end_or_refused(name, kind):
    own = (
        diffusers.DDIMScheduler(1000, clip_sample=False)
        if kind == "preserving"
        else diffusers.FlowMatchEulerDiscreteScheduler(1000)
    )
    model, cls = model_with(own), getattr(diffusers, name)
    try:
        scheduler = cls.from_config(own.config)
    except TypeError:  # it wants what no image model's configuration has
        return
    before, calls = torch.get_rng_state(), []
    try:
        with model.observing("hook_embed", lambda a, hook: calls.append(1)):
            run = dit_lens.sample(model, [3, 7], steps=6, scheduler=scheduler)
    except dit_lens.DitLensError as error:
        short = name.removesuffix("Scheduler")
        assert short not in (PRESERVING if kind == "preserving" else FLOWS), error
        assert (name in str(error) and "expected" in str(error)) or "does not fit" in str(error)
        assert model.instrumentation.listening == 0
        return
    assert len(calls) == 6 == len(run.timesteps) and run.latents.isfinite().all()
    assert torch.equal(before, torch.get_rng_state()), "it draws noise that is not the run's"
    assert (run.log_snr.diff() >= 0).all() and run.log_snr[0] < run.log_snr[-1]
    assert torch.equal(run.replay(3).latents, run.latents)
    alone = dit_lens.sample(model, [7], seeds=[1], steps=6, scheduler=scheduler)
    assert torch.allclose(alone.latents[:, 0], run.latents[:, 1], atol=1e-4)


@pytest.mark.parametrize("name", ["DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM"])
def test_x0_is_what_a_scheduler_that_clips_makes_of_it(name):
    cls = getattr(diffusers, f"{name}Scheduler")
    own = diffusers.DDIMScheduler(1000, clip_sample=False)
    scheduler = cls(1000, clip_sample=True, clip_sample_range=0.5)
    run = dit_lens.sample(model_with(own), [3, 7], steps=6, scheduler=scheduler)
    fresh = run.fresh_scheduler()
    for step, t in enumerate(run.timesteps):
        made = fresh.step(run.outputs[step], t, run.latents[step])
        x0 = made.denoised if name == "LCM" else made.pred_original_sample
        assert torch.allclose(run.x0[step], x0, atol=1e-3), step
    assert run.x0.abs().max() == 0.5


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DPMSolverSinglestep"])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "flow"])
def test_noise_levels_are_those_a_scheduler_spaces_itself(name, spacing):
    """Its timesteps are rounded, some to the same one; x_t is not quite what they stand for."""
    flow = {"prediction_type": "flow_prediction"} if spacing == "flow" else {}
    cls, options = getattr(diffusers, f"{name}Scheduler"), {f"use_{spacing}_sigmas": True, **flow}
    own, steps = cls(1000, final_sigmas_type="zero", **options), 30
    run = dit_lens.sample(model_with(own), [3], steps=steps, scheduler=own)
    own.set_timesteps(steps)
    assert torch.equal(run.timesteps, own.timesteps)
    for step in range(steps):
        own._step_index = step
        x0 = own.convert_model_output(run.outputs[step], sample=run.latents[step])
        torch.testing.assert_close(run.x0[step], x0, rtol=1e-4, atol=1e-4)
    signal, noise = own._sigma_to_alpha_sigma_t(own.sigmas[:-1].double())
    expected = 2 * (signal.clamp_min(0.0005) / noise).log()
    torch.testing.assert_close(run.log_snr.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*PRESERVING, *FLOWS])
def test_which_remember_earlier_steps_is_seen_by_trying(name):
    flow = name in FLOWS
    own = (diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler)(1000)
    # its config holds a key that only others read
    config = {**own.config, "solver_order": 2}
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    plan = prepared(model_with(own), checked_settings(8, 1.0, "all", scheduler, 0.0))
    memory = ("Multistep" in name or "Singlestep" in name) and not flow
    assert remembers(plan) == memory
    if memory:
        with pytest.raises(ValueError, match=f"{name}Scheduler remembers earlier steps"):
            check_gradients(plan)
    else:
        check_gradients(plan)


def test_settings_of_the_scheduler_that_it_was_made_from_are_not_its_own():
    flow = diffusers.DPMSolverMultistepScheduler(1000, use_flow_sigmas=True)
    made = diffusers.DDIMScheduler.from_config(flow.config)
    assert made.config["use_flow_sigmas"] and not is_flow(made) and is_flow(flow)
    plain = diffusers.DDIMScheduler(1000, clip_sample=False)
    runs = [dit_lens.sample(model_with(own), [1], steps=5) for own in (made, plain)]
    assert torch.equal(runs[0].log_snr, runs[1].log_snr)
    clipped = diffusers.DDIMScheduler(1000, clip_sample=False, thresholding=True)
    reads = diffusers.DDPMParallelScheduler.from_config(clipped.config)
    with pytest.raises(ValueError, match="thresholding=True"):  # it has that one
        dit_lens.sample(model_with(plain), [1], steps=5, scheduler=reads)
    ignores = diffusers.CogVideoXDDIMScheduler.from_config(clipped.config)
    dit_lens.sample(model_with(plain), [1], steps=5, scheduler=ignores)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    "own, spacing",
    [
        # PixArt's, as it is loaded from its folder
        (dict(cls="DPMSolverMultistep", timestep_spacing="linspace"), "leading"),
        (dict(cls="DPMSolverMultistep"), "leading"),
        (dict(cls="UniPCMultistep", timestep_spacing="trailing"), "trailing"),
        (dict(cls="LCM", beta_schedule="linear"), "leading"),
        (dict(cls="CogVideoXDDIM", clip_sample=True), "leading"),
    ],
    ids=["dpm++ of a file", "dpm++", "unipc", "lcm", "cogvideox"],
)
def test_a_sampler_by_name_clips_only_where_the_models_own_scheduler_does(name, own, spacing):
    """DDIM and DDPM by themselves clip x0 to [-1, 1], for pixels: it cut the latents of PixArt."""
    options = {key: value for key, value in own.items() if key != "cls"}
    base = getattr(diffusers, f"{own['cls']}Scheduler")(1000, **options)
    made = make_scheduler(name, base)
    assert made.config.clip_sample is False and made.config.timestep_spacing == spacing
    clipping = make_scheduler(name, diffusers.DDPMScheduler(1000, clip_sample=True))
    assert clipping.config.clip_sample is True
    # they step by whole shares of the timesteps: to where the next step is, or one off by rounding
    made.set_timesteps(12)
    assert (made.timesteps[:-1] - 1000 // 12 - made.timesteps[1:]).abs().max() <= 1


def test_what_was_set_after_a_scheduler_was_made_is_kept():
    """As DDIM is given CogVideoX's noise levels, and `set_shift` changes a flow's."""
    own = diffusers.CogVideoXDDIMScheduler(1000)
    run = dit_lens.sample(model_with(own), [3], steps=4)
    assert torch.allclose(run.scheduler.alphas_cumprod, own.alphas_cumprod)
    again = dit_lens.sample(run.model, [3], steps=4, scheduler=run.scheduler)
    assert torch.equal(again.latents, run.latents) and torch.equal(again.log_snr, run.log_snr)
    flow, shifted = (diffusers.FlowMatchEulerDiscreteScheduler(1000) for _ in range(2))
    shifted.set_shift(3.0)
    shifted.set_timesteps(4)
    for model, given in ((model_with(flow), shifted), (model_with(shifted), None)):
        found = dit_lens.sample(model, [3], steps=4, scheduler=given)
        assert torch.equal(found.timesteps, shifted.timesteps)


def test_samplers_that_call_the_model_more_often_are_refused():
    model = model_with(diffusers.DDIMScheduler(1000))
    with pytest.raises(ValueError, match="PNDMScheduler calls the model 15 times in 6 steps"):
        dit_lens.sample(model, [1], steps=6, scheduler=diffusers.PNDMScheduler(1000))
    flow = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler calls the model 11 times"):
        heun = diffusers.FlowMatchHeunDiscreteScheduler(1000)
        dit_lens.sample(model_with(flow), [1], steps=6, scheduler=heun)


def test_noise_that_a_pipelines_own_scheduler_would_draw_is_the_runs():
    own = diffusers.FlowMatchEulerDiscreteScheduler(1000, stochastic_sampling=True)
    model, before = model_with(own), torch.get_rng_state()
    run = dit_lens.sample(model, [1, 2], steps=4, eta=1)
    assert torch.equal(run.latents, dit_lens.sample(model, [1, 2], steps=4, eta=1).latents)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="stochastic_sampling=True, whose noise can't be"):
        dit_lens.sample(model, [1], steps=4, scheduler=own)


@pytest.mark.parametrize(
    "scheduler, text",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(1000), "does not fit the model's own"),
        (diffusers.DDIMInverseScheduler(1000), "log SNR should rise"),
        (diffusers.CogVideoXDPMScheduler(1000), "step also wants 'timestep_back'"),
        (diffusers.IPNDMScheduler(1000), "noise levels of IPNDMScheduler are not known"),
        (diffusers.DDIMScheduler(1000, thresholding=True), "has thresholding=True, for pixels"),
        (
            diffusers.DDPMScheduler(1000, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "has a step without any signal",
        ),
    ],
)
def test_objects_are_refused_by_what_they_do(scheduler, text):
    with pytest.raises(ValueError, match=text):
        dit_lens.sample(
            model_with(diffusers.DDIMScheduler(1000)), [1], steps=4, scheduler=scheduler
        )


def test_all_noise_can_be_drawn_anew_in_a_step_without_signal():
    """diffusers' root of a difference that is 0, and by rounding less: NaN at every third number of
    steps.
    """
    base = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler, x = make_scheduler("ddim", base), torch.ones(1, 1, 2, 2)
    for steps in range(2, 60):
        scheduler.set_timesteps(steps)
        scheduler.times = scheduler.timesteps.tolist()
        following = advance(scheduler, x, x, [0], 0, 1.0)
        assert following.isfinite().all(), steps
        fresh = noise([0], 0, x.shape[1:], x.device, x.dtype)
        abar = scheduler.alphas_cumprod[scheduler.times[1]]
        assert torch.allclose(following, -(abar**0.5) * x + (1 - abar) ** 0.5 * fresh, atol=1e-3)


def test_a_scheduler_for_another_kind_of_answer_is_refused():
    """It would run, and every image be wrong."""
    model = dit_lens.load("digits")
    with pytest.raises(
        InvalidValue,
        match=r"scheduler=DDPMScheduler has prediction_type='epsilon', and the model's own, "
        r"DDIMScheduler, has 'v_prediction'; .*DDPMScheduler.from_config\(model.scheduler.config",
    ):
        dit_lens.sample(model, [3], steps=2, scheduler=diffusers.DDPMScheduler())
    fitting = diffusers.DDPMScheduler.from_config(model.scheduler.config)
    named = dit_lens.sample(model, [3], steps=2, scheduler="ddpm")
    assert torch.equal(
        dit_lens.sample(model, [3], steps=2, scheduler=fitting).latents, named.latents
    )


def test_other_noise_levels_are_warned_of():
    model = model_with(diffusers.DDIMScheduler(1000))
    with pytest.warns(UserWarning, match="has other noise levels than the model's own"):
        dit_lens.sample(model, [1], steps=2, scheduler=diffusers.DDIMScheduler(1000, beta_end=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spacing in ("leading", "trailing", "linspace"):
            fine = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
            dit_lens.sample(model, [1], steps=2, scheduler=fine)


def test_a_flow_of_another_scheduler_is_made_without_a_warning_of_its_settings(monkeypatch):
    """They are read (`flow_shift`), or are none of Euler's."""
    said = []
    logger = logging.getLogger("diffusers.configuration_utils")
    monkeypatch.setattr(logger, "warning", lambda text, *_: said.append(text))
    base = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    made, plain = (make_scheduler("euler-flow", each) for each in (base, None))
    assert (made.config.shift, plain.config.shift, said) == (3.0, 1.0, [])
