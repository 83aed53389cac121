"""Commitment against Gaussian twins drawn directly (E1): unbiased curves, and intervals that cover.

    python tests/test_commitment.py 300        # the coverage table
"""

import sys

import numpy as np
import pytest
import torch

from dit_lens.bands import Bands
from dit_lens.commitment import Agreement, agreement, curve, describe, fit_commitment, half_crossing, resample

torch.set_num_threads(1)

STEPS = 50
ABAR = np.cos((1 - (np.arange(STEPS) + 0.5) / STEPS) * np.pi / 2) ** 2
LOG_SNR = np.log(ABAR / (1 - ABAR))
RELEASES = np.arange(2, 50, 3)


def gaussian_twins(rng, lam, pairs, releases=RELEASES, shared=False):
    """Agreement [release, pair, band] of finished twins; lam [band] lists the variances of each band's modes."""
    stats = np.empty((3, len(releases), pairs, len(lam)))
    for b, spectrum in enumerate(lam):
        v = np.asarray(spectrum, dtype=float)
        root = np.sqrt(v)
        common = rng.standard_normal((pairs, len(v)))
        for i, s in enumerate(releases):
            r = v * ABAR[s] / (1 - ABAR[s] + v * ABAR[s])
            z = common if shared else rng.standard_normal((pairs, len(v)))
            x, y = (root * (np.sqrt(r) * z + np.sqrt(1 - r) * rng.standard_normal((pairs, len(v)))) for _ in range(2))
            x, y = x - x.mean(0), y - y.mean(0)
            stats[:, i, :, b] = [(p * q).sum(-1) for p, q in ((x, y), (x, x), (y, y))]
    return Agreement(*stats * pairs / (pairs - 1))


def true_commitment(spectrum):
    """The log SNR at which the pooled agreement sum lam r / sum lam passes 1/2."""
    v, low, high = np.asarray(spectrum, dtype=float), -20.0, 20.0
    for _ in range(80):
        mid = (low + high) / 2
        snr = np.exp(mid)
        low, high = (mid, high) if (v * v * snr / (1 + v * snr)).sum() < v.sum() / 2 else (low, mid)
    return low


def coverage(lam, pairs, repeats, shared=False, seed=0, resamples=500):
    """Share of repeats whose 95 % intervals hold the truth: first band, last band, gap in log SNR, gap in steps; and the bias in s.e."""
    truth = np.array([true_commitment(s) for s in lam])
    step = np.interp(truth, LOG_SNR, np.arange(STEPS))
    hits, errors = [], []
    for i in range(repeats):
        stats = gaussian_twins(np.random.default_rng([seed, i]), lam, pairs, shared=shared)
        out = fit_commitment(stats, RELEASES, LOG_SNR, resamples=resamples, seed=i)
        ends = np.concatenate([out.commitment_interval.values[[0, -1], 2], out.gap_interval.values[[2, 0]]])
        want = np.array([truth[0], truth[-1], truth[-1] - truth[0], step[-1] - step[0]])
        hits.append((ends[:, 0] <= want) & (want <= ends[:, 1]))
        errors.append(out.commitment.values[[0, -1], 2] - truth[[0, -1]])
    errors = np.array(errors)  # a commitment that is NaN counts as a miss
    return np.mean(hits, 0), np.nanmean(errors, 0) / np.nanstd(errors, 0), int(np.isnan(errors).any(1).sum())


CASES = {
    "1 mode | 1 mode": [[9.0], [0.3]],
    "1 mode | 40 modes": [[30.0], [0.1] * 40],
    "8 modes | 20 modes": [[4.0] * 8, [0.5] * 20],
    "1/f2 bands": [[60, 15, 15, 15, 15, 7.5, 7.5, 7.5, 7.5], np.linspace(0.8, 0.3, 20)],
    "white": [[1.0] * 9, [1.0] * 55],
}

if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print(f"{'spectrum':22s} pairs shared | low    high   gap    gap(steps) | bias/sd  undefined")
    for name, lam in CASES.items():
        for pairs, shared in ((32, False), (64, False), (64, True)):
            hit, bias, undefined = coverage(lam, pairs, repeats, shared)
            print(f"{name:22s} {pairs:5d} {shared!s:6s} | " + "  ".join(f"{h:.3f}" for h in hit) + f"      | {bias.round(2)}  {undefined}", flush=True)
