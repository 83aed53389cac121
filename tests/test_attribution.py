"""Attribution against the exact sweep, and paths against patches whose ways are known."""

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler

import dit_lens
from dit_lens import HookedDiT
from dit_lens.groundtruth import gaussian
from dit_lens.patching import Patch, attribute, path_patch, sweep

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return HookedDiT(
        make_dit(layers=4, classes=10), scheduler=DDIMScheduler(1000, clip_sample=False)
    )


@pytest.fixture(scope="module")
def pair(model):
    twins = dit_lens.twins(model, 4, [1, 2, 3, 4], steps=6, release=1)
    return twins.a, twins.b


@pytest.mark.slow
def test_estimates_agree_with_exact_patches():
    # 28 layers: each does little by itself, which is when a derivative says all
    digits = dit_lens.load("digits")
    twins = dit_lens.twins(digits, 2, steps=6, release=1)
    z, xi = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    near = [dit_lens.sample(digits, [1, 2], steps=6, latents=start) for start in (z, z + 0.05 * xi)]
    # Large patches between unrelated runs bend away from the derivative; half-way between such runs
    # no run ever is.
    for source, target, integrate, least in ((twins.a, twins.b, 1, 0.8), (*near, 2, 0.97)):
        found = attribute(source, target, check=12, window=1, integrate=integrate)
        assert found.estimate.shape == (28, 2, 6, 2) and (found.correlation > least).all(), (
            found.correlation
        )
        assert found.sentence.startswith("Against 12 exact patches of 1 steps: low r = ")


def test_an_estimate_is_the_derivative():
    """The move's derivative along a patch, by differences in float64: source and target alike but
    for a millionth of the way.
    """
    model = HookedDiT(
        make_dit(layers=3, classes=10).double(), scheduler=DDIMScheduler(1000, clip_sample=False)
    )
    z = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = dit_lens.sample(model, [1], steps=4, latents=z)
    source = dit_lens.sample(
        model,
        [1],
        steps=4,
        latents=z
        + torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    steps_seen = []
    found = attribute(source, target, progress=lambda *done: steps_seen.append(done))
    assert steps_seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    one = attribute(source, target, "mlp_out").estimate
    assert one.identical(found.estimate.sel(site=["mlp_out"]))
    name, step, h = "blocks.1.hook_mlp_out", 2, 1e-6
    theirs, ours = (run.activations(name, step=step) for run in (source, target))
    apart = (target.latents[-1] - source.latents[-1]).square().sum()
    moved = target.replay(
        0, [(name, lambda x, hook: torch.lerp(ours, theirs, h) if hook_step(x, ours) else x)]
    )
    change = (moved.latents[-1] - source.latents[-1]).square().sum() - apart
    bands = dit_lens.Bands.radial((8, 8), cut=0.25)
    whole = bands.energy(target.latents[-1] - source.latents[-1]).sum((0, 1))
    estimate = float(
        (found.estimate.sel(layer=1, site="mlp_out", step=step).values * whole.numpy()).sum()
    )
    assert float(-change / h) == pytest.approx(estimate, rel=1e-4)


def hook_step(x, ours):
    return torch.equal(x, ours)  # the target's own activation at that step, and only there


def test_a_path_through_nothing_else_is_the_whole_patch(model, pair):
    """From the last layer's MLP there is only the direct way; from its attention also the way
    through the MLP.
    """
    a, b = pair
    whole = dit_lens.trace(model)
    with whole:
        whole.patch("blocks.3.hook_mlp_out", _taken(a, "blocks.3.hook_mlp_out"), steps=range(2, 4))
        by_trace = b.replay(0)
    assert torch.allclose(
        path_patch(a, b, ("mlp_out", 3), None, range(2, 4)), by_trace.latents[-1], atol=1e-5
    )
    assert not torch.allclose(
        path_patch(a, b, ("attn_out", 3), None, range(2, 4)),
        path_patch(a, b, ("attn_out", 3), ("mlp_out", 3), range(2, 4)),
    )


def _taken(run, name):
    return run.activations(name)


def test_a_path_into_oneself_changes_nothing(model, pair):
    a, _ = pair
    for receiver in (None, ("mlp_out", 2)):
        assert torch.allclose(
            path_patch(a, a, ("attn_out", 0), receiver, range(0, 6)), a.latents[-1], atol=1e-5
        )
    assert (
        torch.equal(path_patch(a, a, ("attn_out", 0), None, range(0)), a.latents[-1])
        and model.instrumentation.listening == 0
    )


def test_paths_of_a_model_whose_layers_do_not_read_each_other():
    """An exact Gaussian denoiser with two causes: each reads the stream and adds to it linearly, so
    the later one mediates the earlier one's change.
    """
    truth = gaussian(4.0, 0.25, (1, 3), 4, sample_size=4)
    model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    twins = dit_lens.twins(model, 4, [0] * 4, steps=6, release=1)
    a, b, window = twins.a, twins.b, range(2, 4)
    whole = sweep(a, b, [Patch("attn_out", 1, window)], lambda x: x).outcome.values[0]
    direct = path_patch(a, b, ("attn_out", 1), None, window).numpy()
    through = path_patch(a, b, ("attn_out", 1), ("attn_out", 3), window).numpy()
    # layer 2 does nothing
    nowhere = path_patch(a, b, ("attn_out", 1), ("attn_out", 2), window).numpy()
    base = b.latents[-1].numpy()
    assert abs(nowhere - base).max() < 1e-4 < abs(through - base).max()
    one = range(2, 3)  # in a single step everything is linear: the ways add up
    whole, direct, through = (
        sweep(a, b, [Patch("attn_out", 1, one)], lambda x: x).outcome.values[0] - base,
        *(
            path_patch(a, b, ("attn_out", 1), r, one).numpy() - base
            for r in (None, ("attn_out", 3))
        ),
    )
    assert abs(whole - direct - through).max() < 2e-3 * abs(whole).max()


def test_bad_input(model, pair):
    a, b = pair
    other = dit_lens.sample(model, [1, 2, 3, 4], steps=5, eta=1.0)
    fast = dit_lens.sample(model, [1], steps=5, scheduler="dpm++")
    for call, text in [
        (
            lambda: path_patch(a, b, ("attn_out", 2), ("mlp_out", 1), range(2)),
            "The receiver ('mlp_out', 1) does not come after the sender",
        ),
        (
            lambda: path_patch(a, b, ("resid_post", 2), None, range(2)),
            "('resid_post', 2) is no end of a path; expected ('attn_out' or 'mlp_out'",
        ),
        (
            lambda: path_patch(a, b, ("attn_out", 4), None, range(2)),
            "('attn_out', 4) is no end of a path; expected",
        ),
        (
            lambda: path_patch(a, b, ("attn_out", 1), None, range(5, 7)),
            "step=6 can't be used; expected a whole number from 0 to 5, a step of the run",
        ),
        (
            lambda: path_patch(a, other, ("attn_out", 1), None, range(2)),
            "The source has steps=6 and the target steps=5",
        ),
        (lambda: attribute(a, other), "The source has steps=6 and the target steps=5"),
        (
            lambda: attribute(a, b, ["hook_embed"]),
            "site='hook_embed' is 0 hook points; attribution needs one in each of 4 layers",
        ),
        (
            lambda: attribute(a, b, integrate=0),
            "integrate=0 can't be used; expected a whole number of 1 or more",
        ),
        (
            lambda: attribute(fast, fast),
            "DPMSolverMultistepScheduler remembers earlier steps, which gradients here do not; use "
            "scheduler='ddim', or measure exactly (exact=True, patches).",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(text), error.value
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="Gradients are asked of a model in torch.inference_mode()"),
    ):
        attribute(a, b)
    assert model.instrumentation.listening == 0 and all(
        p.grad is None for p in model.transformer.parameters()
    )
