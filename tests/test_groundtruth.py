"""The ground truths are themselves checked: formulas against integration and simulation, models
against formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from dit_lens import groundtruth as gt
from dit_lens.families import family_named

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gaussian() -> gt.GroundTruth:
    return gt.gaussian(4.0, 0.25, layers=(2, 4), shares=(0.7, 0.3), decoys=(0, 5), n_layers=6)


@torch.no_grad()
def predict(transformer: DiTTransformer2DModel, x: Tensor, timestep: int | Tensor) -> Tensor:
    steps = torch.as_tensor(timestep).expand(len(x))
    return transformer(x, timestep=steps, class_labels=torch.zeros_like(steps)).sample


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@contextmanager
def knocked_out(transformer: DiTTransformer2DModel, layers: list[int]) -> Iterator[None]:
    hooks = [
        transformer.transformer_blocks[i].attn1.register_forward_hook(
            lambda module, args, out: torch.zeros_like(out)
        )
        for i in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


# --- closed forms


def test_agreement_is_half_at_one_over_one_plus_lambda() -> None:
    lam = np.array([0.05, 1.0, 7.0])
    agreement = gt.gaussian_agreement(lam, 1 / (1 + lam))
    assert np.allclose(np.diag(agreement), 0.5) and agreement.shape == (3, 3)
    assert np.allclose(np.log(1 / lam), gt.commitment_log_snr(lam))
    assert gt.gaussian_agreement([1.0, 3.0], 0.5, pooled=True) == pytest.approx(
        (0.5 + 3 * 0.75) / 4
    )


def test_commitment_timestep_is_where_the_agreement_crosses_half() -> None:
    abars = DDIMScheduler(1000).alphas_cumprod.double().numpy()
    at = gt.commitment_timestep(4.0, abars)
    around = gt.gaussian_agreement(4.0, abars[[int(at), int(at) + 1]])[:, 0]
    assert around[0] > 0.5 > around[1]


def test_ddim_agreement_tends_to_the_exact_one_with_more_steps() -> None:
    lam, errors = [4.0, 0.25], []
    for count in (10, 40, 200):
        abars = (
            DDIMScheduler(1000)
            .alphas_cumprod.double()
            .numpy()[np.arange(0, 1000, 1000 // count)[::-1]]
        )
        got = np.stack([gt.ddim_agreement(lam, abars, release) for release in range(count)])
        errors.append(np.abs(got - gt.gaussian_agreement(lam, abars)).max())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.04


def test_deterministic_ratio_is_the_ratio_of_standard_deviations() -> None:
    assert gt.deterministic_ratio(4.0, 0.5) == pytest.approx(np.sqrt(2.5 / 4))
    assert np.allclose(gt.deterministic_ratio([0.1, 1.0, 9.0], 1.0), 1)


@pytest.mark.parametrize(
    ("m", "sigma", "abar"), [(1.0, 0.3, 0.4), (2.0, 0.1, 0.9), (0.5, 1.0, 0.05), (3.0, 0.2, 0.99)]
)
def test_mixture_agreement_matches_quadrature(m: float, sigma: float, abar: float) -> None:
    width, centre = np.sqrt(1 - abar + sigma**2 * abar), m * np.sqrt(abar)

    def integrand(x: float) -> float:
        plus, minus = norm.pdf(x, centre, width), norm.pdf(x, -centre, width)
        return 0.5 * (plus**2 + minus**2) / (plus + minus)

    exact = quad(
        integrand, -centre - 10 * width, centre + 10 * width, points=[-centre, centre], limit=200
    )[0]
    assert gt.mixture_agreement(m, sigma, abar) == pytest.approx(exact, abs=1e-7)


def test_mixture_agreement_at_known_points() -> None:
    m, sigma = 1.5, 0.4
    abar = 1 / (m**2 + 1 - sigma**2)  # m sqrt(abar) == sqrt(Gamma)
    assert gt.mixture_agreement(m, sigma, abar) == pytest.approx(0.7752, abs=5e-5)
    assert gt.mixture_agreement(m, sigma, 0.0) == pytest.approx(0.5)
    assert gt.mixture_agreement(m, 0.0, 1.0) == 1


# --- the Gaussian model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lam_low", "lam_high"), [(4.0, 0.25), (1.0, 0.05), (0.1, 10.0), (1.0, 1.0)]
)
def test_gaussian_is_the_exact_denoiser(
    dtype: torch.dtype, lam_low: float, lam_high: float
) -> None:
    truth = gt.gaussian(lam_low, lam_high, layers=(0, 2), n_layers=3, sample_size=4, dtype=dtype)
    abar = truth.scheduler.alphas_cumprod.double()
    x = noise(1000, 3, 4, 4, dtype=dtype)
    got = predict(truth.transformer, x, torch.arange(1000)).double()
    exact = gt.gaussian_eps(x.double(), abar, lam_low, lam_high)
    error = (got - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    # exact but for LayerNorm's curvature, 2.4e-5 in float64; the rest is float32's rounding at the
    # last steps, where eps is a small difference of large numbers
    assert error.max() < {torch.float64: 1e-4, torch.float32: 1e-3}[dtype]
    assert truth.answer["deviation"] < 1e-3


def test_gaussian_with_patches_and_many_tokens() -> None:
    truth = gt.gaussian(
        4.0, 0.25, layers=(0,), n_layers=1, sample_size=16, patch_size=2, in_channels=1
    )
    x, abar = noise(1, 1, 16, 16), truth.scheduler.alphas_cumprod[[300]].double()
    exact = gt.gaussian_eps(x.double(), abar, 4.0, 0.25, patch_size=2)
    assert relative(predict(truth.transformer, x, 300), exact) < 1e-4


def test_without_its_layers_the_bands_do_not_differ(gaussian: gt.GroundTruth) -> None:
    x, abar = noise(2, 3, 8, 8), gaussian.scheduler.alphas_cumprod[[200, 200]].double()
    white = gt.gaussian_eps(x.double(), abar, 0.25, 0.25)
    assert relative(predict(gaussian.transformer, x, 200), white) > 0.05
    with knocked_out(gaussian.transformer, gaussian.answer["layers"]):
        assert relative(predict(gaussian.transformer, x, 200), white) < 1e-3


def test_decoys_show_the_band_and_cause_nothing(gaussian: gt.GroundTruth) -> None:
    x = noise(2, 3, 8, 8)
    whole = predict(gaussian.transformer, x, 500)
    with knocked_out(gaussian.transformer, gaussian.answer["decoys"]):
        assert relative(predict(gaussian.transformer, x, 500), whole) < 1e-5
    gains = gt.stream_gains(gaussian.transformer, 500)
    assert gains[0] == pytest.approx(2**0.5, rel=1e-3)  # an equal second copy of the low band


def test_twins_of_the_gaussian_model_agree_as_they_should() -> None:
    truth = gt.gaussian(4.0, 0.25, layers=(1,), n_layers=2, sample_size=4)
    steps, pairs, release = 25, 150, 17
    truth.scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(pairs, 3, 4, 4, generator=draw).repeat(2, 1, 1, 1)
    for step, t in enumerate(truth.scheduler.timesteps):
        fresh = torch.randn(x.shape, generator=draw)
        if step < release:
            fresh[pairs:] = fresh[:pairs]
        eps = predict(truth.transformer, x, t)
        x = truth.scheduler.step(eps, t, x, eta=1.0, variance_noise=fresh).prev_sample
    abars = truth.scheduler.alphas_cumprod[truth.scheduler.timesteps].double().numpy()
    exact = gt.ddim_agreement([4.0, 0.25], abars, release)
    low = gt.token_mean(x)
    for band, r in ((low[..., :1, :1], exact[0]), (x - low, exact[1])):
        a, b = band[:pairs].flatten(), band[pairs:].flatten()
        independent = 3 * pairs if r == exact[0] else 45 * pairs
        assert abs(np.corrcoef(a, b)[0, 1] - r) < 3 * (1 - r**2) / independent**0.5
    assert exact[0] - exact[1] > 0.3


# --- planted models


class Tied:
    """Attention of twins, a batch of two, tied by g as in the paper: (own + g other) / (1 + g)."""

    def __init__(self, g: float) -> None:
        self.g = g

    def __call__(self, attn: torch.nn.Module, x: Tensor, **unused: object) -> Tensor:
        def heads(v: Tensor) -> Tensor:
            return v.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(x)), heads(attn.to_k(x)), heads(attn.to_v(x))
        attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        z = (attend(q, k, v) + self.g * attend(q, k.flip(0), v.flip(0))) / (1 + self.g)
        return attn.to_out[0](z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("band", ["low", "high"])
@pytest.mark.parametrize("first", [0, 12, 23])
def test_planted_products_are_exact(dtype: torch.dtype, band: str, first: int) -> None:
    layers = list(range(first, first + 5))
    truth = gt.planted(layers, 0.3, band=band, dtype=dtype, sample_size=4)
    other = "high" if band == "low" else "low"
    for g, product in ((0.0, 3.71293), (0.5, 1.61051), (1.0, 1.0)):
        for block in truth.transformer.transformer_blocks:
            block.attn1.set_processor(Tied(g))
        gains = gt.stream_gains(truth.transformer, 500, band)
        assert float(gains.prod()) == pytest.approx(product, rel=1e-5)
        assert float(gt.planted_gain(0.3, layers, g)) == pytest.approx(product, rel=1e-5)
        assert (gains - 1).abs().gt(0.01).nonzero().flatten().tolist() == (layers if g < 1 else [])
        assert gt.stream_gains(truth.transformer, 500, other).prod() == pytest.approx(1, abs=1e-5)
    assert truth.answer["deviation"] < 1e-5 and truth.answer["onset"] == first


def test_planted_layers_leave_the_output_alone() -> None:
    truth = gt.planted((1, 2), n_layers=4)
    x, abar = noise(1, 3, 8, 8), truth.scheduler.alphas_cumprod[[400]].double()
    whole = predict(truth.transformer, x, 400)
    assert relative(whole, gt.gaussian_eps(x.double(), abar, 1.0, 1.0)) < 1e-3
    with knocked_out(truth.transformer, [1, 2]):
        assert gt.stream_gains(truth.transformer, 400).prod() == pytest.approx(1, abs=1e-5)
        assert relative(predict(truth.transformer, x, 400), whole) < 1e-3


def test_each_band_switches_on_at_its_own_timestep() -> None:
    truth = gt.planted((1,), 0.5, n_layers=2, band="both", switch={"low": 700, "high": 300})
    assert truth.answer["gap_timesteps"] == 400 and truth.answer["deviation"] < 1e-3
    for band, switch in (("low", 700), ("high", 300)):
        gains = [
            float(gt.stream_gains(truth.transformer, t, band)[1])
            for t in (switch - 200, switch, switch + 200)
        ]
        assert gains == pytest.approx([1.5, 1.25, 1.0], abs=1e-3)


@pytest.mark.slow
def test_random_plants_differ_and_repeat() -> None:
    before = torch.get_rng_state()
    plants = [gt.random_planted(seed) for seed in range(8)]
    assert torch.equal(before, torch.get_rng_state())
    answers = [plant.answer for plant in plants]
    assert {answer["band"] for answer in answers} == {"low", "high"}
    assert len({answer["onset"] for answer in answers}) > 4
    assert {answer["a"] > 0 for answer in answers} == {True, False}
    again = gt.random_planted(0).transformer.state_dict()
    assert all(
        torch.equal(value, again[name])
        for name, value in plants[0].transformer.state_dict().items()
    )
    for plant in plants:
        gains = gt.stream_gains(plant.transformer, 500, plant.answer["band"])
        change = (gains - 1).abs()
        assert (
            change[plant.answer["layers"]].min() > 0.1
            and change[: plant.answer["onset"]].sum() < 0.5
        )
        assert gains.std() > 1e-4  # the noise is there


# --- null models, saving, errors


def test_shuffled_layers_take_their_gains_with_them() -> None:
    before = torch.get_rng_state()
    truth = gt.planted((4, 5), n_layers=6)
    shuffled = gt.shuffle_layers(truth.transformer, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    gains, moved = (gt.stream_gains(model, 500) for model in (truth.transformer, shuffled))
    assert not torch.allclose(moved, gains, atol=0.1) and torch.allclose(
        moved.sort()[0], gains.sort()[0], atol=1e-4
    )
    with torch.no_grad():
        shuffled.proj_out_2.weight.zero_()
    assert truth.transformer.proj_out_2.weight.abs().max() > 0


def test_shuffled_layers_take_their_adapters_with_them() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    family = family_named("SD3Transformer2DModel")
    assert family is not None
    model = family.small(0)[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    shuffled = gt.shuffle_layers(model, seed=0, blocks=family.blocks)
    weights = [
        [block.attn.to_q.lora_A.default.weight for block in family.blocks(each)]
        for each in (model, shuffled)
    ]
    places = [[torch.equal(a, b) for b in weights[1]] for a in weights[0]]
    assert [sum(row) for row in places] == [1] * len(places)
    assert not all(row[i] for i, row in enumerate(places))

    model.to("meta")
    with pytest.raises(ValueError, match="can't be shuffled: .* is on the meta device"):
        gt.shuffle_layers(model, seed=0, blocks=family.blocks)


def test_random_weights_repeat_and_use_every_layer() -> None:
    one, same, other = (gt.random_weights(seed, n_layers=3).transformer for seed in (1, 1, 2))
    x = noise(1, 3, 8, 8)
    out = predict(one, x, 10)
    assert torch.equal(out, predict(same, x, 10)) and relative(predict(other, x, 10), out) > 0.5
    assert (gt.stream_gains(one, 10) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_models_load_as_plain_diffusers(tmp_path: Path, dtype: torch.dtype) -> None:
    truth = gt.gaussian(layers=(1,), n_layers=2, dtype=dtype)
    folder = truth.save(tmp_path / "model")
    loaded = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    x = noise(2, 3, 8, 8, dtype=dtype)
    assert torch.equal(predict(loaded, x, 300), predict(truth.transformer, x, 300))
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert (
        torch.equal(scheduler.alphas_cumprod, truth.scheduler.alphas_cumprod)
        and not scheduler.config.clip_sample
    )
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler",
        "answer.json",
    }
    answer = json.loads((folder / "answer.json").read_text())
    assert answer.pop("description") == truth.description and answer == truth.answer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gt.gaussian_agreement([1.0, -2.0], 0.5), "lam is [1.0, -2.0]; expected variances"),
        (
            lambda: gt.gaussian_agreement(1.0, 1.5),
            "abar is 1.5; expected cumulative alphas in [0, 1]",
        ),
        (
            lambda: gt.commitment_timestep(1e9, [0.9, 0.1]),
            "it commits at log SNR -20.72, expected one in",
        ),
        (
            lambda: gt.ddim_agreement(1.0, [0.1, 0.9], 3),
            "release=3 can't be used; expected a whole number from 0 to 2",
        ),
        (
            lambda: gt.mixture_agreement(1.0, -1.0, 0.5),
            "sigma=-1.0 can't be used; expected a finite number from 0 to 1e+09",
        ),
        (
            lambda: gt.planted_gain(0.3, 5, -1.0),
            "g=-1.0 can't be used; expected a finite number of 0 or more",
        ),
        (
            lambda: gt.gaussian(layers=()),
            "layers=() can't be used; expected 1 or more whole numbers",
        ),
        (
            lambda: gt.gaussian(layers=(1,), decoys=(1,)),
            "decoys is [1]; expected layers that are not among [1].",
        ),
        (
            lambda: gt.gaussian(layers=(1, 2), shares=(0.5, 0.4)),
            "shares is [0.5, 0.4]; expected 2 numbers",
        ),
        (
            lambda: gt.gaussian(in_channels=20),
            "expected at most 16, the values a patch that fit next to the positions of a 64-t",
        ),
        (
            lambda: gt.gaussian(sample_size=9, patch_size=2),
            "sample_size is 9 and patch_size 2; expected 2 or more",
        ),
        (
            lambda: gt.gaussian(n_layers=15, dtype=torch.float16),
            "dtype=torch.float16 can't be used; expected torch.float32 or",
        ),
        (
            lambda: gt.planted((3, 28)),
            "layers[1]=28 can't be used; expected a whole number from -28 to 27",
        ),
        (
            lambda: gt.planted(band="mid"),
            "band='mid' can't be used; expected one of 'low', 'high', 'both'",
        ),
        (lambda: gt.planted(a=-1.0), "a=-1.0 can't be used; expected a finite number above -1"),
        (
            lambda: gt.planted(switch={"high": 1}),
            "switch is {'high': 1}; expected a timestep for",
        ),
        (
            lambda: gt.planted(noise=-1.0),
            "noise=-1.0 can't be used; expected a finite number from 0 to 1, of the signal",
        ),
        (
            lambda: gt.shuffle_layers(gt.random_weights(0, 1).transformer, 0),
            "transformer has 1 block",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
