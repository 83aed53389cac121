"""Coverage of every kind of interval at the sizes of the command line: do 95 % hold 95 %?

No model is run: on Gaussian data an exact denoiser under DDIM is linear in every mode, so its twins
are drawn directly (E1 in docs/checks.md, in the sampler's own finite steps), and the truth is the
same estimator applied to the exact curves. `python tests/checks.py --only intervals` does it at
length.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dit_lens.experiments.data_gap import spectrum_commitment
from dit_lens.experiments.effects import MATTERS
from dit_lens.experiments.release import SLACK
from dit_lens.groundtruth import ddim_agreement
from dit_lens.measures.agreement import Agreement, contrasts
from dit_lens.measures.bootstrap import draws, interval, simultaneous
from dit_lens.measures.commitment import commitment_draws, fit_commitment
from dit_lens.measures.crossing import half_crossing
from dit_lens.measures.onset import onset

torch.set_num_threads(1)

ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SIDE = np.fft.fftfreq(8)
RADIUS = np.hypot(SIDE[:, None], SIDE[None]).ravel()


def falling(power: float, scale: float) -> list[np.ndarray]:
    """Variances of the modes of an 8 x 8 image below and above 0.25 cycles per pixel."""
    lam = scale * (np.maximum(RADIUS, 1 / 16) / 0.25) ** -power
    return [lam[RADIUS < 0.25], lam[RADIUS >= 0.25]]


SPECTRA = {
    "flat": [np.full(9, 1.0), np.full(55, 1.0)],
    "two levels, 3 channels": [np.full(3, 4.0), np.full(60, 0.25)],
    "1/f": falling(1, 1.0),
    "steep, 1/f3": falling(3, 0.7),
}


class Data:
    """An exact denoiser of Gaussian data with the modes `lam` [band][mode], in `steps` of DDIM."""

    def __init__(self, lam: list[np.ndarray], steps: int) -> None:
        self.steps, self.lam = steps, np.concatenate(lam)
        self.cuts = np.cumsum([len(band) for band in lam])[:-1]
        self.abar = ALPHAS[(np.arange(steps) * (1000 // steps))[::-1]]
        self.log_snr = np.log(self.abar / (1 - self.abar))
        # x' = decay x + fresh noise, and x0 = gain x
        here, there = self.abar[:, None], np.append(self.abar[1:], 1.0)[:, None]
        noise = (1 - there) / (1 - here) * (1 - here / there)
        self.gain = self.lam * np.sqrt(here) / (self.lam * here + 1 - here)
        eps = (1 - np.sqrt(here) * self.gain) / np.sqrt(1 - here)
        self.decay = np.sqrt(there) * self.gain + np.sqrt(np.maximum(1 - there - noise, 0)) * eps
        self.fresh = np.sqrt(np.maximum(noise, 0))[:, 0]
        variance = [np.ones_like(self.lam)]
        for decay, fresh in zip(self.decay, self.fresh, strict=True):
            variance.append(decay**2 * variance[-1] + fresh**2)
        self.variance = np.array(variance)
        # of x at a step, what the finished image keeps
        self.kept = np.append(np.cumprod(self.decay[::-1], 0)[::-1], np.ones((1, len(self.lam))), 0)

    def pooled(self, per_mode: np.ndarray) -> np.ndarray:
        """[..., mode] summed to [..., band]."""
        return np.stack([part.sum(-1) for part in np.split(per_mode, self.cuts, -1)], -1)

    def curve(self, estimator: str) -> np.ndarray:
        """The exact agreement [step, band]."""
        finished, here = self.pooled(self.variance[-1]), self.variance[:-1]
        if estimator == "clones":
            return self.pooled(self.kept[:-1] ** 2 * here) / finished
        cross = self.pooled(self.gain * self.kept[:-1] * here)
        return cross**2 / (self.pooled(self.gain**2 * here) * finished)

    def commitment(self, estimator: str, releases: np.ndarray) -> np.ndarray:
        """What the fit gives for the exact curve, [band], in steps."""
        r = self.curve(estimator)[releases][:, None].repeat(8, 1)
        one = np.ones_like(r)
        squared = estimator != "clones"
        stats = Agreement(np.sqrt(r) if squared else r, one, one)
        fit = fit_commitment(stats, releases, self.log_snr, squared=squared, resamples=2)
        return fit.commitment.sel(quantity="step").values

    def crossing(self, estimator: str = "clones") -> np.ndarray:
        """Where the exact curve passes 1/2, log odds interpolated in log SNR, [band], in steps."""
        r = np.clip(self.curve(estimator), 1e-9, 1 - 1e-9)
        odds = np.log(r / (1 - r))
        snr = [np.interp(0, odds[:, b], self.log_snr) for b in range(r.shape[1])]
        return np.interp(snr, self.log_snr, np.arange(self.steps))

    def run(self, rng: np.random.Generator, n: int, start: np.ndarray | None = None, at: int = 0):
        """Latents [step, n, mode] from a step on."""
        x = [rng.standard_normal((n, len(self.lam))) if start is None else start]
        for decay, fresh in zip(self.decay[at:], self.fresh[at:], strict=True):
            x.append(decay * x[-1] + fresh * rng.standard_normal(x[-1].shape))
        return np.array(x)

    def one_pass(self, x: np.ndarray, labels: np.ndarray) -> Agreement:
        """Of the runs [step, A | B, mode]: statistics [step, pair, band]."""
        both = np.concatenate([labels, labels])
        x0 = np.concatenate([self.gain[:, None] * x[:-1], x[-1:]])
        z = contrasts(torch.as_tensor(x0.swapaxes(0, 1)), both).numpy().swapaxes(0, 1)
        products = z[:-1] * z[-1:], z[:-1] ** 2, np.broadcast_to(z[-1:] ** 2, z[:-1].shape)
        sums = (self.pooled(p).reshape(self.steps, 2, len(labels), -1).sum(1) for p in products)
        return Agreement(*sums)

    def clones(self, rng, a: np.ndarray, labels: np.ndarray, releases: np.ndarray) -> Agreement:
        """Of twin A's runs: statistics [release, pair, band]."""
        ends = [self.run(rng, a.shape[1], a[r], r)[-1] for r in releases]
        y = contrasts(torch.as_tensor(np.stack(ends, 1)), labels).numpy().swapaxes(0, 1)
        x = np.broadcast_to(contrasts(torch.as_tensor(a[-1]), labels).numpy(), y.shape)
        return Agreement(*(self.pooled(p) for p in (x * y, x * x, y * y)))

    def releases(self, n: int = 8) -> np.ndarray:
        """Eight steps where the curves rise."""
        r = self.curve("clones")
        rising = np.flatnonzero(((r > 0.05) & (r < 0.95)).any(1))
        return np.unique(np.linspace(rising[0], rising[-1], n).round().astype(int))


def labels_of(pairs: int, labels: int) -> np.ndarray:
    return np.arange(pairs) % labels


def holds(ends: np.ndarray, truth: np.ndarray | float) -> np.ndarray:
    return (ends[..., 0] <= truth) & (truth <= ends[..., 1])


def commitments(
    spectrum: str, pairs: int, labels: int, steps: int, repeats: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Hits [repeat] of low, high and gap by both estimators and of their paired difference (in
    truth, that of the exact curves).
    """
    data, group = Data(SPECTRA[spectrum], steps), labels_of(pairs, labels)
    at = {"one pass": np.arange(steps), "clones": data.releases()}
    truth = {name: data.commitment(name, releases) for name, releases in at.items()}
    hits: dict[str, list[bool]] = {}
    for i in range(repeats):
        rng = np.random.default_rng([seed, i])
        x = data.run(rng, 2 * pairs)
        stats = {
            "one pass": data.one_pass(x, group),
            "clones": data.clones(rng, x[:, :pairs], group, at["clones"]),
        }
        drawn = []
        for name, squared in (("one pass", True), ("clones", False)):
            options = {"squared": squared, "resamples": 300, "seed": i}
            fit = fit_commitment(stats[name], at[name], data.log_snr, **options)
            fit = fit.sel(quantity="step")
            low, high = holds(fit.commitment_interval.values, truth[name])
            gap = holds(fit.gap_interval.values, truth[name][1] - truth[name][0])
            for what, hit in (("low", low), ("high", high), ("gap", gap)):
                hits.setdefault(f"{name}: {what}", []).append(bool(hit))
            drawn.append(commitment_draws(stats[name], at[name], data.log_snr, **options))
        ends = interval(drawn[0] - drawn[1], pairs)
        hit_by_band = holds(ends, truth["one pass"] - truth["clones"])
        for what, hit in zip(("low", "high"), hit_by_band, strict=True):
            hits.setdefault(f"one pass less clones: {what}", []).append(bool(hit))
    return {name: np.array(hit) for name, hit in hits.items()}


def effects(
    spectrum: str,
    pairs: int,
    labels: int,
    steps: int,
    repeats: int,
    layers: int = 6,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Hits [repeat] of the simultaneous intervals of knock-outs that change nothing but the draws,
    and whether any layer was named a cause.
    """
    data, group = Data(SPECTRA[spectrum], steps), labels_of(pairs, labels)
    found: dict[str, list[bool]] = {"all layers at once": [], "a layer is named a cause": []}
    for i in range(repeats):
        rng = np.random.default_rng([seed, i])
        whole = data.run(rng, 2 * pairs)

        def gap(x: np.ndarray, i: int = i) -> np.ndarray:
            stats, releases = data.one_pass(x, group), np.arange(steps)
            options = {"squared": True, "resamples": 300, "seed": i}
            taus = commitment_draws(stats, releases, data.log_snr, **options)
            return taus[:, 1] - taus[:, 0]

        before = gap(whole)
        after = [gap(0.9 * whole + np.sqrt(0.19) * data.run(rng, 2 * pairs)) for _ in range(layers)]
        effect = np.stack(after, 1) - before[:, None]
        ends = simultaneous(effect, pairs)
        hit = holds(ends, 0.0)
        found["all layers at once"].append(bool(hit.all()))
        named = ~hit & (np.abs(effect[0]) > MATTERS * steps)
        found["a layer is named a cause"].append(bool(named.any()))
    return {name: np.array(hit) for name, hit in found.items()}


def beyond_data(
    spectrum: str, pairs: int, labels: int, steps: int, repeats: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Hits [repeat] of the gap that an exact denoiser of the samples' spectrum has, and of the
    clones' gap less that, which is 0 here; and how often something is said to be left.
    """
    data, group = Data(SPECTRA[spectrum], steps), labels_of(pairs, labels)
    releases, bands = data.releases(), len(data.cuts) + 1
    truth = np.diff(data.commitment("clones", releases))[0]
    abar = np.append(data.abar, 1.0)
    levels = np.sqrt(abar), np.sqrt(1 - abar), 1.0
    index = np.repeat(np.arange(bands), np.diff([0, *data.cuts, len(data.lam)]))
    found: dict[str, list[bool]] = {"data": [], "clones less data": [], "something is left": []}
    for i in range(repeats):
        rng = np.random.default_rng([seed, i])
        x = data.run(rng, 2 * pairs)
        stats = data.clones(rng, x[:, :pairs], group, releases)
        ends = [contrasts(torch.as_tensor(part), group).numpy() for part in np.split(x[-1], 2)]
        energy = sum(part**2 for part in ends)[:, None] / 2
        counts = draws(pairs, 300, i)
        exact = spectrum_commitment(
            energy, counts, index, levels, releases.tolist(), data.log_snr, sampled=True
        )
        measured = commitment_draws(stats, releases, data.log_snr, resamples=300, seed=i)
        gap = exact[:, 1] - exact[:, 0]
        left = interval(measured[:, 1] - measured[:, 0] - gap, pairs)
        found["data"].append(bool(holds(interval(gap, pairs), truth)))
        found["clones less data"].append(bool(holds(left, 0.0)))
        found["something is left"].append(not holds(left, 0.0))
    return {name: np.array(hit) for name, hit in found.items()}


PROFILES = {"flat": (9, 55, 0.0), "one low mode": (1, 40, 0.0), "heavy tails": (3, 60, 0.6)}


def profiles(
    shape: str, pairs: int, repeats: int, layers: int = 28, shared: float = 0.9, seed: int = 0
) -> dict[str, np.ndarray]:
    """Hits of the intervals of a flat profile of log E low - log E high, single layers [repeat,
    layer] and all at once [repeat], and whether an onset was named.
    """
    *modes, heavy = PROFILES[shape]
    found: dict[str, list[np.ndarray]] = {"single layers": [], "all layers": [], "onset named": []}
    for i in range(repeats):
        rng = np.random.default_rng([seed, i])
        sums = []
        counts = draws(pairs, 300, i)
        scale = np.exp(heavy * rng.standard_normal(pairs))
        for m in modes:
            z = rng.standard_normal((layers, pairs, m))
            for layer in range(1, layers):
                z[layer] = shared * z[layer - 1] + np.sqrt(1 - shared**2) * z[layer]
            sums.append(counts @ ((z**2).sum(-1) * scale).T)
        values = np.log(sums[0] / sums[1])
        truth = np.log(modes[0] / modes[1])
        found["single layers"].append(holds(interval(values, pairs), truth))
        found["all layers"].append(holds(simultaneous(values, pairs), truth).all())
        found["onset named"].append(onset(values[0], values[1:], pairs).layer is not None)
    return {name: np.array(hit) for name, hit in found.items()}


def partings(
    spectrum: str, pairs: int, labels: int, steps: int, repeats: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Hits [repeat] of the coupling sweep's two gaps: independent runs, whose predicted x0 part as
    their energies grow.
    """
    data, group = Data(SPECTRA[spectrum], steps), labels_of(pairs, labels)
    energy = data.pooled(data.gain**2 * data.variance[:-1]) / data.pooled(data.variance[-1])
    tau = half_crossing(energy.T)
    truth = tau[1] - tau[0], np.log(energy[-1, 0] / energy[-1, 1])
    found: dict[str, list[bool]] = {"when they part": [], "log size": []}
    for i in range(repeats):
        rng = np.random.default_rng([seed, i])
        a, b = (data.gain[:, None] * data.run(rng, pairs)[:-1] for _ in range(2))
        u, v = (contrasts(torch.as_tensor(z.swapaxes(0, 1)), group).numpy() for z in (a, b))
        parts = [data.pooled(p).swapaxes(0, 1) for p in ((u - v) ** 2, u**2 + v**2)]
        counts = draws(pairs, 300, i)
        difference, common = (np.einsum("rp,spb->rbs", counts, p) for p in parts)
        curves = difference / common[..., -1:]
        taus, last = half_crossing(curves), np.log(curves[..., -1])
        rows = pairs - labels
        for name, values, want in zip(
            found, (taus[:, 1] - taus[:, 0], last[:, 0] - last[:, 1]), truth, strict=True
        ):
            if name == "log size":
                want = 0.0  # of independent runs: both bands differ by all that they have
            found[name].append(bool(holds(interval(values, rows), want)))
    return {name: np.array(hit) for name, hit in found.items()}


class Case(NamedTuple):
    """One row of the table: what, at which sizes, and a function of the number of repeats."""

    what: str
    sizes: str
    rates: Callable[[int], dict[str, np.ndarray]]


def cases() -> Iterator[Case]:
    """The sizes of `--quick` (16 pairs), `patch` (24) and the default (48), one label and many."""
    for pairs, steps in ((16, 20), (24, 25), (48, 50)):
        for labels in (1, min(10, pairs // 2)):
            size = f"{pairs} pairs, {labels} label{'s' * (labels > 1)}, {steps} steps"
            for name in SPECTRA:
                a = (name, pairs, labels, steps)
                yield Case("commitment", f"{name}; {size}", lambda n, a=a: commitments(*a, n))
                if name != "steep, 1/f3":
                    yield Case("data's gap", f"{name}; {size}", lambda n, a=a: beyond_data(*a, n))
                if name != "1/f":
                    yield Case("coupling", f"{name}; {size}", lambda n, a=a: partings(*a, n))
                if pairs == 24 and name != "flat":
                    yield Case("knock-outs", f"{name}; {size}", lambda n, a=a: effects(*a, n))
        for shape in PROFILES:
            yield Case(
                "layer profile",
                f"{shape}; {pairs} pairs",
                lambda n, a=(shape, pairs): profiles(*a, n),
            )


FALSE_ALARMS = ("a layer is named a cause", "onset named", "something is left")


@pytest.mark.parametrize(
    ("rates", "args"),
    [
        (commitments, ("steep, 1/f3", 16, 8, 20)),
        (partings, ("two levels, 3 channels", 16, 8, 20)),
        (beyond_data, ("two levels, 3 channels", 16, 8, 20)),
        (effects, ("two levels, 3 channels", 24, 10, 12)),
        (profiles, ("one low mode", 16)),
    ],
)
def test_intervals_hold_what_they_say(rates, args):
    """With few repeats: 95 % of 40 is below 33 once in 300, and 5 % of 40 above 7 once in 500."""
    for name, hit in rates(*args, 40, seed=1).items():
        if name in FALSE_ALARMS:
            assert hit.mean() <= 7 / 40, name
        else:
            assert hit.mean() >= 33 / 40, (name, hit.mean())


def test_the_simulated_sampler_is_ddim():
    """Its curves are `ddim_agreement`'s, mode by mode, and one pass sees what clones see."""
    data = Data([np.array([4.0]), np.array([0.25])], 50)
    exact = np.array([ddim_agreement([4.0, 0.25], data.abar, r) for r in range(50)])
    np.testing.assert_allclose(data.curve("clones"), exact, atol=1e-10)
    np.testing.assert_allclose(data.curve("one pass"), exact, atol=1e-10)


@pytest.mark.parametrize("steps", [25, 50, 100])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_fit_is_within_slack_of_the_crossing(spectrum, steps):
    """What a fitted logistic makes of curves that are none, and of the whole steps between."""
    data = Data(SPECTRA[spectrum], steps)
    for name, at in (("clones", data.releases()), ("one pass", np.arange(steps))):
        apart = data.commitment(name, at) - data.crossing(name)
        assert np.abs(apart).max() < SLACK * steps, (name, apart)
