"""The two-scale mixture against its exact denoiser, and the exact answers E1, E2, E3 of
docs/checks.md by sampling.

`python tests/test_mixture.py [scale]` prints the sampled checks with `scale` times the pairs (5 by
default).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import dit_lens
from dit_lens import groundtruth as gt
from dit_lens.groundtruth.mixture import coefficients

torch.set_num_threads(1)
SPECTRA = {"falling": (4.0, 0.25), "white": (1.0, 1.0), "rising": (0.25, 4.0)}


class Row(NamedTuple):
    check: str
    setting: str
    expected: float
    measured: float
    error: float  # the standard error; of E2, which is deterministic, the sampler's discretisation

    @property
    def z(self) -> float:
        return (self.measured - self.expected) / self.error


def bands_of(x: Tensor) -> dict[str, Tensor]:
    low = gt.token_mean(x)
    return {"low": low[..., :1, :1], "high": x - low}  # the mean once, not at every token


def hooked(truth: gt.GroundTruth) -> dit_lens.HookedDiT:
    return dit_lens.HookedDiT(truth.transformer, scheduler=truth.scheduler)


def clones_of_gaussians(
    pairs: int, seeds: range, releases: tuple[int, ...], steps: int = 25
) -> Iterator[Row]:
    """E1: the correlation of finished clones against `ddim_agreement`, the formula of the sampler
    as it is run.
    """
    for i, (name, lam) in enumerate(SPECTRA.items()):
        truth = gt.gaussian(*lam, layers=(1,), n_layers=2, sample_size=4)
        model = hooked(truth)
        for seed in seeds:
            twins = dit_lens.twins(
                model,
                pairs,
                [0] * pairs,
                release=releases[0],
                steps=steps,
                seed=len(SPECTRA) * seed + i,
            )
            abars = truth.scheduler.alphas_cumprod[twins.run.timesteps]
            for release in releases:
                others = 10**6 * (len(SPECTRA) * seed + i) + 10**5 * release
                clones = (
                    twins.b if release == releases[0] else twins.a.replay(release, seeds=others)
                )
                exact = gt.ddim_agreement(lam, abars, release)
                finished = [bands_of(run.latents[-1]) for run in (twins.a, clones)]
                # of 3 x 16
                for band, r, modes in zip(("low", "high"), exact.tolist(), (3, 45), strict=True):
                    a, b = (x[band] for x in finished)
                    measured = float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
                    error = (1 - r**2) / (modes * pairs) ** 0.5
                    yield Row(
                        "E1", f"{name}, {band}, release {release}, seed {seed}", r, measured, error
                    )


def deterministic_runs(steps: int) -> Iterator[Row]:
    """E2: |d(t)| / |d(0)| against `deterministic_ratio`, and the variance-normalised difference
    against a constant.
    """
    for name, lam in SPECTRA.items():
        truth = gt.gaussian(*lam, layers=(1,), n_layers=2, sample_size=4)
        run = dit_lens.sample(hooked(truth), [0, 0], seeds=[1, 2], steps=steps)
        abars = truth.scheduler.alphas_cumprod[run.timesteps].double().numpy()
        difference = bands_of((run.latents[:, 0] - run.latents[:, 1]).double())
        for band, variance in zip(("low", "high"), lam, strict=True):
            size = difference[band].flatten(1).norm(dim=1).numpy()
            exact, here = gt.deterministic_ratio(variance, abars), ddim_ratio(variance, abars)
            for step in (0, steps // 2, steps - 2):
                setting = f"{name}, {band}, step {step} of {steps}"
                # what is left to the model's own error and float32, over all steps, is 1e-3
                yield Row(
                    "E2",
                    setting,
                    exact[step],
                    size[step] / size[-1],
                    abs(here[step] - exact[step]) + 1e-3 * exact[step],
                )
                normalised = here / exact / (here[-1] / exact[-1])
                measured = size[step] / exact[step] / (size[-2] / exact[-1])
                yield Row("E2 normalised", setting, 1.0, measured, abs(normalised[step] - 1) + 1e-3)


def ddim_ratio(lam: float, abars: np.ndarray) -> np.ndarray:
    """E2 for the sampler as it is run: each step multiplies a mode by a number, [step]."""
    here, there = abars, np.append(abars[1:], 1.0)
    eps = np.sqrt(1 - here) / (lam * here + 1 - here)
    factor = np.sqrt(there / here) * (1 - np.sqrt(1 - here) * eps) + np.sqrt(1 - there) * eps
    return 1 / np.cumprod(factor[::-1])[::-1]


def clones_of_mixtures(
    pairs: int, seeds: range, steps: int, offsets: tuple[float, ...]
) -> Iterator[Row]:
    """E3: the share of clones that end on the same side, released around each band's decision."""
    truth = gt.two_scale(
        m_low=4.0, m_high=1.0, sigma=0.25, low_layer=0, high_layer=1, n_layers=2, sample_size=4
    )
    model = hooked(truth)
    for seed in seeds:
        run = dit_lens.sample(model, [0] * pairs, seeds=10**6 * seed, steps=steps, eta=1.0)
        for i, (band, offset) in enumerate(
            (band, offset) for band in ("low", "high") for offset in offsets
        ):
            at = truth.answer["decision_log_snr"][band] + offset
            release = int((run.log_snr - at).abs().argmin())
            other = run.replay(release, seeds=10**6 * seed + 10**5 * (i + 1))
            abar = float(truth.scheduler.alphas_cumprod[run.timesteps[release]])
            ends = [gt.sides(each.latents[-1], truth) for each in (run, other)]
            for which, m in enumerate(truth.answer["m"].values()):
                phi = gt.mixture_agreement(m, 0.25, abar)
                if not 0.55 < phi < 0.98:  # no news from where all is chance, or all is settled
                    continue
                share = (ends[0][which] == ends[1][which]).double().view(pairs, -1).mean(1)
                error = float(share.std()) / pairs**0.5
                setting = f"{('low', 'high')[which]}, release {release} of {steps}, seed {seed}"
                yield Row("E3", setting, phi, float(share.mean()), error)


def table(scale: float = 5.0) -> list[Row]:
    """All sampled checks with `scale` times 200 and 150 pairs; prints and returns them.

    Above 5 or so the standard error of E3 falls below what 250 steps of DDIM are off by, about
    0.003.
    """
    rows: list[Row] = []
    print(f"{'check':14s} {'setting':44s} expected measured  error      z")
    for source in (
        clones_of_gaussians(round(200 * scale), range(2), (8, 14, 19)),
        deterministic_runs(50),
        deterministic_runs(500),
        clones_of_mixtures(round(150 * scale), range(2), 250, (-1.5, 0.0, 1.5)),
    ):
        for row in source:
            rows.append(row)
            print(
                f"{row.check:14s} {row.setting:44s} {row.expected:8.4f} {row.measured:8.4f} "
                f"{row.error:6.4f} {row.z:6.2f}"
            )
    for check in ("E1", "E2", "E2 normalised", "E3"):
        z = np.array([row.z for row in rows if row.check == check])
        print(
            f"{check}: {len(z)} rows, mean z {z.mean():.2f}, rms z {(z**2).mean() ** 0.5:.2f}, "
            f"worst {abs(z).max():.2f}"
        )
    return rows


@pytest.fixture(scope="module")
def truth() -> gt.GroundTruth:
    return gt.two_scale(low_layer=2, high_layer=0, n_layers=3)


@torch.no_grad()
def predict(transformer: torch.nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return transformer(x, timestep=t, class_labels=torch.zeros_like(t)).sample


def noisy_data(
    truth: gt.GroundTruth, t: Tensor, m_low: float = 4.0, m_high: float = 1.0, sigma: float = 0.25
) -> Tensor:
    """Data built mode by mode, with patterns written by hand, then noised: [t, channel, h, w]."""
    config, draw = truth.transformer.config, torch.Generator().manual_seed(5)
    c, side = config["in_channels"], config["sample_size"]
    x = sigma * torch.randn(len(t), c, side, side, generator=draw)
    x += (
        m_low
        / (c * side * side) ** 0.5
        * (2.0 * torch.randint(0, 2, (len(t), 1, 1, 1), generator=draw) - 1)
    )
    signs = 2.0 * torch.randint(0, 2, (len(t), 1, side // 2, side // 2), generator=draw) - 1
    checkers = (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(side // 2, side // 2) / (4 * c) ** 0.5
    )
    x += m_high * checkers * signs.repeat_interleave(2, 2).repeat_interleave(2, 3)
    abar = truth.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * x + (1 - abar).sqrt() * torch.randn(x.shape, generator=draw)


@pytest.mark.parametrize(
    ("layers", "sizes", "shape"),
    [
        ((2, 0), (4.0, 1.0, 0.25), {}),
        ((0, 1), (1.5, 2.0, 0.5), {"sample_size": 4}),
        ((1, 1), (2.0, 1.0, 0.5), {"in_channels": 2}),
        ((1, 2), (4.0, 1.0, 0.25), {"dtype": torch.float64}),
    ],
)
def test_two_scale_is_the_exact_denoiser(
    layers: tuple[int, int], sizes: tuple[float, float, float], shape: dict
) -> None:
    truth = gt.two_scale(*sizes, *layers, n_layers=3, **shape)
    t = torch.arange(0, 1000, 3)
    x = noisy_data(truth, t, *sizes).to(truth.transformer.dtype)
    exact = gt.mixture_eps(x.double(), truth.scheduler.alphas_cumprod[t].double(), *sizes)
    error = predict(truth.transformer, x, t).double() - exact
    assert (error.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max() < 5e-4
    assert truth.answer["deviation"] < 5e-4


def test_the_exact_denoiser_is_the_score_of_the_mixture() -> None:
    """eps = -sqrt(1 - abar) grad log p, with p written down from the two modes by hand."""
    abar, (m_low, m_high, sigma) = torch.tensor([0.3, 0.9], dtype=torch.float64), (2.0, 1.0, 0.4)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, generator=draw, dtype=torch.float64).requires_grad_()
    low, high = (
        x.sum((1, 2, 3)) / 4,
        torch.stack(
            [
                (x[:, 0, i, j] - x[:, 0, i, j + 1] - x[:, 0, i + 1, j] + x[:, 0, i + 1, j + 1]) / 2
                for i in (0, 2)
                for j in (0, 2)
            ],
            1,
        ),
    )
    gamma, root = (1 - abar + sigma**2 * abar)[:, None], abar.sqrt()[:, None]

    def log_p(m: float, at: Tensor) -> Tensor:
        return torch.logaddexp(
            -((at - m * root) ** 2) / 2 / gamma, -((at + m * root) ** 2) / 2 / gamma
        )

    white = (x.square().sum((1, 2, 3)) - low**2 - high.square().sum(1)) / 2 / gamma[:, 0]
    (log_p(m_low, low[:, None]).sum() + log_p(m_high, high).sum() - white.sum()).backward()
    exact = -(1 - abar).sqrt().view(-1, 1, 1, 1) * x.grad
    assert torch.allclose(gt.mixture_eps(x.detach(), abar, m_low, m_high, sigma), exact)


def test_each_bit_is_made_by_its_layer_alone(truth: gt.GroundTruth) -> None:
    """Without the MLP of one layer, that bit is denoised as Gaussian of variance sigma² and the
    other as before.
    """
    t = torch.full((8,), 300)
    x, abar = noisy_data(truth, t), truth.scheduler.alphas_cumprod[t]
    for layer, sizes in ((2, (0.0, 1.0, 0.25)), (0, (4.0, 0.0, 0.25))):
        hook = truth.transformer.transformer_blocks[layer].ff.register_forward_hook(
            lambda module, args, out: 0 * out
        )
        got = predict(truth.transformer, x, t)
        hook.remove()
        exact = gt.mixture_eps(x, abar, *sizes)
        assert (got - exact).norm() < 1e-3 * exact.norm()
        assert (predict(truth.transformer, x, t) - got).norm() > 0.1 * exact.norm()


def test_the_answer(truth: gt.GroundTruth) -> None:
    answer, abars = truth.answer, truth.scheduler.alphas_cumprod.double().numpy()
    assert (answer["low_layer"], answer["high_layer"], answer["layers"]) == (2, 0, [0, 2])
    for band, m in answer["m"].items():
        abar = 1 / (1 + np.exp(-answer["decision_log_snr"][band]))
        assert gt.mixture_agreement(m, answer["sigma"], abar) == pytest.approx(0.7752, abs=5e-5)
        around = abars[[int(answer["decision_timestep"][band]) + i for i in (0, 1)]]
        assert around[0] > abar > around[1]
    assert answer["gap_log_snr"] == pytest.approx(np.log((16 - 1 / 16) / (1 - 1 / 16)))


def test_sides_reads_the_bits(truth: gt.GroundTruth) -> None:
    low, high = gt.sides(-torch.ones(2, 1, 8, 8), truth)
    assert low.tolist() == [-1, -1] and high.shape == (2, 16)
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, :2, 2:4] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # the second token
    assert gt.sides(x, truth)[1][0].tolist() == [1, -1] + [1] * 14
    low_mode, high_modes = coefficients(x)
    # the patch's norm: the basis is orthonormal
    assert float(low_mode) == 0 and high_modes[0, 1] == -2


def test_it_saves_loads_and_traces(truth: gt.GroundTruth, tmp_path: Path) -> None:
    folder = truth.save(tmp_path / "two-scale")
    model = dit_lens.load(folder)
    x, t = noisy_data(truth, torch.tensor([100, 400])), torch.tensor([100, 400])
    y = torch.zeros_like(t)
    assert torch.equal(model(x, t, y), predict(truth.transformer, x, t))
    assert isinstance(model.scheduler, DDIMScheduler) and not model.scheduler.config.clip_sample
    answer = json.loads((folder / "answer.json").read_text())
    assert answer.pop("description") == truth.description and answer == truth.answer
    with torch.no_grad():
        _, cache = model.run_with_cache(x, t, y)
    written = [float(cache["mlp_out", layer].norm()) for layer in range(3)]
    assert written[0] > 0.1 and written[1] == 0 and written[2] > 0.1
    with dit_lens.trace(model) as trace:
        dit_lens.sample(model, [0], steps=3)
    assert trace["resid_post", 2].shape == (3, 1, 16, 64)
    model.remove()


@pytest.mark.slow
def test_clones_of_gaussians_agree_as_e1_says() -> None:
    rows = list(clones_of_gaussians(100, range(2), (8, 14, 19)))
    assert len(rows) == 36 and max(abs(row.z) for row in rows) < 3, rows
    # the standard errors are the right size
    assert 0.7 < np.mean([row.z**2 for row in rows]) ** 0.5 < 1.3


def test_deterministic_runs_keep_the_ratio_of_e2() -> None:
    coarse, fine = list(deterministic_runs(50)), list(deterministic_runs(200))
    assert len(fine) == 36 and all(abs(row.z) < 1 for row in coarse + fine)
    for few, many in zip(coarse, fine, strict=True):
        if "step 0 " in few.setting:  # first order: four times the steps, a quarter of the error
            assert (
                abs(many.measured - many.expected)
                < 0.3 * abs(few.measured - few.expected) + 1e-3 * few.expected
            )
            assert abs(many.measured / many.expected - 1) < 0.02


@pytest.mark.slow
def test_clones_of_mixtures_end_on_the_same_side_as_e3_says() -> None:
    rows = list(clones_of_mixtures(300, range(1), 100, (-1.0, 1.0)))
    # 100 steps are off by up to 0.008 (simulated in one dimension), below the standard error
    assert [sum(row.setting.startswith(band) for row in rows) for band in ("low", "high")] == [2, 3]
    assert max(abs(row.z) for row in rows) < 3, rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: gt.two_scale(sigma=0.0),
            "sigma=0.0 can't be used; expected a finite number above 0, the width of a side",
        ),
        (
            lambda: gt.two_scale(m_low=0.2),
            "m_low=0.2 can't be used; expected a finite number above 0.25",
        ),
        (
            lambda: gt.two_scale(m_high=float("nan")),
            "m_high=nan can't be used; expected a finite number above 0.25",
        ),
        (
            lambda: gt.two_scale(low_layer=28),
            "low_layer=28 can't be used; expected a whole number from -28 to 27",
        ),
        (lambda: gt.two_scale(high_layer=-29), "high_layer=-29 can't be used; expected a whole"),
        (
            lambda: gt.two_scale(patch_size=1),
            "patch_size is 1; expected an even one, for a checkerboard",
        ),
        (
            lambda: gt.two_scale(sample_size=9),
            "sample_size is 9 and patch_size 2; expected 2 or more whole patches",
        ),
        (
            lambda: gt.two_scale(dtype=torch.float16),
            "dtype=torch.float16 can't be used; expected torch.float32 or",
        ),
        (lambda: gt.two_scale(m_low=1e4), "expected one in the schedule's"),
        (
            lambda: coefficients(torch.ones(1, 1, 5, 4)),
            "patch_size is 2; expected an even one whose patches fill latents of [5, 4]",
        ),
        (
            lambda: gt.sides(torch.ones(1, 1, 4, 4), gt.two_scale(n_layers=21)),
            "[1, 1, 4, 4]; expected [b, 1, 8, 8].",
        ),
        (
            lambda: gt.sides(torch.ones(1, 3, 8, 8), gt.gaussian(layers=(0,), n_layers=1)),
            "truth is of kind 'gaussian'",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


if __name__ == "__main__":
    table(*map(float, sys.argv[1:]))
