"""What only a CUDA device can show; skipped where there is none.

With `DIT_LENS_TEST_DEVICE=cuda` tests/test_families.py holds every family to its contract there,
and tests/test_every_family.py makes every measurement of it.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_lens
from dit_lens.experiments.cost import gap_cost
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence
from dit_lens.sampling.noise import noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
GPU = "cuda"


@pytest.fixture
def model():
    return dit_lens.HookedDiT(make_dit(layers=4).to(GPU), scheduler=DDIMScheduler(1000))


def asked(dtype=torch.float32):
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=gen).to(GPU, dtype)
    return x, torch.tensor([700, 31], device=GPU), torch.tensor([3, 1000], device=GPU)


def waits(work):
    """How often the host waited for the device, and from where."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]


# The same on every device


def test_noise_is_the_same_on_every_device():
    assert torch.equal(noise([3, 4], 2, (4, 8, 8), GPU).cpu(), noise([3, 4], 2, (4, 8, 8)))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_run_is_the_cpus_to_rounding(guidance):
    plain = make_dit(layers=4)
    runs = [
        dit_lens.sample(
            dit_lens.HookedDiT(copy.deepcopy(plain).to(device), scheduler=DDIMScheduler(1000)),
            [3, 7],
            steps=6,
            guidance=guidance,
            eta=1.0,
        )
        for device in ("cpu", GPU)
    ]
    assert runs[1].latents.device.type == GPU
    assert torch.allclose(runs[0].latents, runs[1].latents.cpu(), atol=1e-3, rtol=1e-3)


def test_the_bundled_models_gap_is_the_cpus():
    gaps = [
        dit_lens.experiments.measure_gap(
            dit_lens.load("digits", device=device), 16, 10, resamples=50, clones=False
        )
        for device in ("cpu", GPU)
    ]
    a, b = (gap.layer_gap.to_numpy() for gap in gaps)
    assert np.allclose(a, b, atol=0.02, equal_nan=True) and np.isfinite(a).any()


def test_a_default_device_is_refused(model):
    torch.set_default_device(GPU)
    try:
        with pytest.raises(RuntimeError, match="default device is 'cuda:0'"):
            dit_lens.sample(model, [1, 2], steps=3)
    finally:
        torch.set_default_device(None)


# The witness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_is_recording(dtype):
    model = dit_lens.HookedDiT(make_dit(layers=4).to(GPU, dtype))
    inputs = asked(dtype)
    with torch.no_grad():
        with dit_lens.trace(model, names=lambda _: True) as eager:
            model(*inputs)
        with dit_lens.trace(model) as lazy:
            model(*inputs)
    for name in model.names:
        assert torch.equal(lazy[name], eager[name]), name


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_a_kernel_is_kept_with_the_call(backend):
    model = dit_lens.HookedDiT(make_dit(layers=4).to(GPU, torch.bfloat16))
    inputs = asked(torch.bfloat16)
    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, backend)):
        with dit_lens.trace(model, names="resid_post") as eager:
            model(*inputs)
        with dit_lens.trace(model) as lazy:
            model(*inputs)
    assert torch.equal(lazy["resid_post", 3], eager["resid_post", 3])


def test_tf32_and_autocast_are_kept_with_the_call(model):
    inputs = asked()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad(), dit_lens.trace(model) as lazy:
            model(*inputs)
        with torch.no_grad(), dit_lens.trace(model, names="resid_post") as eager:
            model(*inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(lazy["resid_post", 3], eager["resid_post", 3])
    with torch.no_grad(), torch.autocast(GPU, torch.bfloat16):
        with dit_lens.trace(model) as lazy:
            model(*inputs)
        with dit_lens.trace(model, names="resid_post") as eager:
            model(*inputs)
    assert torch.equal(lazy["resid_post", 3], eager["resid_post", 3])


def reduced_precision(on):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = on


def convolutions_in_tf32(on):
    torch.backends.cudnn.allow_tf32 = on


def no_cudnn(on):
    torch.backends.cudnn.enabled = on


@pytest.mark.parametrize("setting", [reduced_precision, convolutions_in_tf32, no_cudnn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_settings_are_kept_or_noticed(setting, dtype):
    model = dit_lens.HookedDiT(make_dit(layers=4).to(GPU, dtype))
    inputs = asked(dtype)
    setting(False)
    try:
        with torch.no_grad(), dit_lens.trace(model, names="resid_post") as eager:
            model(*inputs)
        with torch.no_grad(), dit_lens.trace(model) as lazy:
            model(*inputs)
    finally:
        setting(True)
    try:
        read = lazy["resid_post", 3]
    except dit_lens.NotReproduced:
        return
    assert torch.allclose(read, eager["resid_post", 3], rtol=1e-4, atol=1e-4)


def test_changed_weights_are_noticed(model):
    inputs = asked()
    with torch.no_grad(), dit_lens.trace(model) as t:
        model(*inputs)
    with torch.no_grad():
        model.transformer.transformer_blocks[1].ff.net[2].weight.mul_(1.01)
    with pytest.raises(dit_lens.NotReproduced):
        t["resid_post", 3]


def test_a_side_stream(model):
    inputs, stream = asked(), torch.cuda.Stream()
    with torch.no_grad(), dit_lens.trace(model, names="resid_post") as eager:
        model(*inputs)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream), dit_lens.trace(model) as lazy:
        for _ in range(3):
            model(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    for step in range(3):
        assert torch.equal(lazy["resid_post", 3][step], eager["resid_post", 3][0])


def test_a_compiled_model():
    plain = make_dit(layers=3).to(GPU)
    model = dit_lens.HookedDiT(plain)
    inputs = asked()
    model.transformer.transformer_blocks[1].compile()
    with torch.no_grad(), dit_lens.trace(model) as lazy:
        model(*inputs)
    with torch.no_grad(), dit_lens.trace(model, names="resid_post") as eager:
        model(*inputs)
    assert torch.allclose(lazy["resid_post", 2], eager["resid_post", 2], atol=1e-4)


def test_a_saved_trace_is_read_elsewhere(model, tmp_path):
    inputs = asked()
    with torch.no_grad(), dit_lens.trace(model, names="resid_post") as t:
        model(*inputs)
    path = t.save(tmp_path / "trace.safetensors")
    again = dit_lens.load_trace(path, model)
    assert torch.equal(again["resid_mid", 2].to(GPU), t["resid_mid", 2])
    alone = dit_lens.load_trace(path)
    assert torch.equal(alone["resid_post", 2].cpu(), t["resid_post", 2].cpu())


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_weights(how):
    pipe, away = make_pipe().to(GPU), make_pipe()
    getattr(away, how)(device=GPU)

    def made(pipe):
        gen = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe([3, 5], generator=gen, num_inference_steps=3, output_type="np").images

    want = made(pipe)
    with dit_lens.trace(pipe, names="resid_post") as here:
        made(pipe)
    with dit_lens.trace(away, names="resid_post") as t:
        images = made(away)
    assert abs(images - want).max() < 1e-4
    assert torch.allclose(t["resid_post", 1].cpu(), here["resid_post", 1].cpu(), atol=1e-4)
    try:
        t["resid_mid", 1]
    except RuntimeError as error:
        assert "offload" in str(error)


# Waiting


def test_a_run_does_not_wait_for_the_device(model):
    def run(steps, **more):
        return lambda: dit_lens.sample(model, [3, 7], steps=steps, **more)

    for more in ({}, {"eta": 1.0}, {"guidance": 4.0}, {"batch": 1}):
        run(4, **more)()
        few, many = waits(run(4, **more)), waits(run(12, **more))
        assert len(many) <= len(few), (more, sorted(set(many)))


@pytest.mark.parametrize("probe", [SpectralSplit, LayerLens, TwinDivergence])
def test_probes_do_not_wait_for_the_device(model, probe):
    def run(steps):
        return lambda: dit_lens.twins(model, 4, steps=steps, release=2, probes=[probe()])

    run(4)()
    few, many = waits(run(4)), waits(run(12))
    assert len(many) <= len(few), sorted(set(many))


def test_a_trace_does_not_wait_for_the_device(model):
    inputs = asked()
    with torch.no_grad(), dit_lens.trace(model) as t:
        t.edit("blocks.1.hook_attn_out", lambda a, hook: a * 0.5)
        model(*inputs)
        assert not waits(lambda: [model(*inputs) for _ in range(3)])
    with torch.no_grad(), dit_lens.trace(model, names="resid_post"):
        model(*inputs)
        assert not waits(lambda: [model(*inputs) for _ in range(3)])


def test_a_gap_seldom_waits(model):
    def measured(steps):
        return lambda: dit_lens.experiments.measure_gap(model, 16, steps, resamples=20)

    measured(6)()
    few, many = waits(measured(6)), waits(measured(16))
    assert (len(many) - len(few)) / 10 <= 5, (len(few), len(many), sorted(set(many)))


# Memory


@pytest.mark.parametrize("place", ["cpu", "a folder"])
def test_trajectories_elsewhere(model, place, tmp_path):
    def twins(steps):
        return dit_lens.twins(model, 64, steps=steps)

    def peak(steps):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        twins(steps)
        return torch.cuda.max_memory_allocated() - before

    expected, here = twins(6), peak(24) - peak(6)
    model.trajectories = "cpu" if place == "cpu" else str(tmp_path)
    found, there = twins(6), peak(24) - peak(6)
    for part in ("latents", "x0", "outputs"):
        kept = getattr(found.run, part)
        assert kept.device.type == "cpu" and torch.equal(kept, getattr(expected.run, part).cpu())
    assert found.run.finished.is_cuda and there < 0.1 * here, (here, there)
    few, many = waits(lambda: twins(6)), waits(lambda: twins(24))
    assert len(many) <= len(few), sorted(set(many))


def test_out_of_memory_halves_the_batch():
    model, n = dit_lens.load("digits", device=GPU), 2048
    want = dit_lens.sample(model, [0] * n, steps=2, batch=n // 8).latents
    torch.cuda.reset_peak_memory_stats()
    dit_lens.sample(model, [0] * n, steps=2, batch=n)
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.7 * (peak - held)) / total)
    try:
        with pytest.warns(UserWarning, match=f"Out of memory with {n} images at once"):
            found = dit_lens.sample(model, [0] * n, steps=2, batch=n).latents
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.allclose(found, want, atol=1e-3)


def test_what_does_not_fit_is_said_before(model):
    cost = gap_cost(model, 2_000_000, 50, calibrate=False)
    with pytest.raises(ValueError, match=r"takes about .* GB and .* GB are free"):
        cost.require_fit()


def test_a_recording_is_what_a_trace_reads(model, tmp_path):
    data = dit_lens.record(model, ("resid_post", 2), [3, 7, 5], tmp_path / "acts", steps=4, batch=2)
    with dit_lens.trace(model, names="blocks.2.hook_resid_post") as t:
        dit_lens.sample(model, [3, 7, 5], steps=4, batch=2)
    want = t["resid_post", 2].cpu()  # [step, item, token, d_model]
    seen = 0
    for batch in data.batches(64, seed=0):
        for value, item, step, token in zip(
            batch["activation"], batch["item"], batch["step"], batch["token"], strict=True
        ):
            assert torch.allclose(value, want[step, item, token], atol=1e-5)
            seen += 1
    assert seen == want[..., 0].numel()


def test_two_processes_share_a_device(tmp_path):
    def measured(**more):
        model = dit_lens.load("digits", device=GPU)
        return dit_lens.experiments.knock_outs(model, pairs=16, steps=4, resamples=20, **more)

    alone = measured()
    shared = measured(
        store=tmp_path / "store", engine=dit_lens.experiments.Engine("local", workers=2)
    )
    assert alone.equals(shared)


def test_gradients_and_patterns(model):
    x, t, y = asked()
    with dit_lens.trace(model, names="hook_pattern") as seen, torch.no_grad():
        model(x, t, y)
    rows = seen["blocks.1.attn.hook_pattern"].sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    with model.hooks(bwd_hooks=[("resid_post", lambda g, hook: None)]):
        F.mse_loss(model(x, t, y), torch.zeros_like(x)).backward()
    assert model.transformer.transformer_blocks[0].ff.net[2].weight.grad.isfinite().all()


def test_nnsight(model):
    nnsight = pytest.importorskip("nnsight")
    inputs = asked()
    with torch.no_grad(), dit_lens.trace(model, names="resid_post") as t:
        model(*inputs)
    bridged = dit_lens.to_nnsight(model.transformer)
    with torch.no_grad(), bridged.trace(*inputs):
        got = nnsight.save(bridged.blocks[2].hook_resid_post.output)
    assert torch.equal(got, t["resid_post", 2][0])
