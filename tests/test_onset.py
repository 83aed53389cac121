"""Onset on planted profiles: the right layer, and seldom a layer where there is none. Noise is shared over depth.

    python tests/test_onset.py 1000        # the table of error rates
"""

import sys

import numpy as np
import pytest

from dit_lens.onset import Onset, onset

LAYERS = 28


def planted(rng, shape, pairs=64, corr=0.8, size=6.0, heavy=False, resamples=300):
    """(profile, bootstrap, layer): per-pair profiles with noise that layers share, the mean over pairs, and its resamples.

    The mean of the pairs has noise of standard deviation 1 in every layer; `size` is the height of a step, or a ramp's rise per layer.
    """
    layer = int(rng.integers(1, LAYERS)) if shape != "ramp" else int(rng.integers(1, LAYERS - 1))
    depth = np.arange(LAYERS)
    truth = {"flat": 0 * depth, "step": depth >= layer, "ramp": np.clip(depth - layer + 1, 0, 5)}[shape] * size
    truth = truth * rng.choice([-1, 1])
    draw = rng.standard_t(4, (pairs, LAYERS)) / np.sqrt(2) if heavy else rng.standard_normal((pairs, LAYERS))
    for j in range(1, LAYERS):  # neighbours in depth are correlated, as layers that see the same pairs are
        draw[:, j] = corr * draw[:, j - 1] + np.sqrt(1 - corr**2) * draw[:, j]
    sample = truth + draw * np.sqrt(pairs)
    counts = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
    return sample.mean(0), counts @ sample / pairs, layer if shape != "flat" else None


def rates(shape, repeats, seed=0, **kwargs):
    """Shares of repeats: the right layer named, any layer named, the interval holds the layer, "cannot tell"."""
    out = []
    for i in range(repeats):
        pairs = kwargs.get("pairs", 64)
        p, boot, layer = planted(np.random.default_rng([seed, i]), shape, **kwargs)
        found = onset(p, boot, pairs)
        held = found.interval is not None and layer is not None and found.interval[0] <= layer <= found.interval[1]
        out.append((found.layer == layer and layer is not None, found.layer is not None, held, found.verdict == "cannot tell"))
    return np.mean(out, 0)


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(f"{'profile':9s} pairs corr  size heavy | right  named  interval holds  cannot tell")
    for shape, size in (("flat", 0.0), ("step", 8.0), ("step", 6.0), ("ramp", 6.0)):
        for pairs, corr, heavy in ((64, 0.0, False), (64, 0.8, False), (64, 0.98, False), (16, 0.8, False), (32, 0.8, True)):
            right, named, held, cannot = rates(shape, repeats, pairs=pairs, corr=corr, heavy=heavy, size=size)
            print(f"{shape:9s} {pairs:5d} {corr:4.2f} {size:5.1f} {heavy!s:5s} | {right:.3f}  {named:.3f}  {held:.3f}           {cannot:.3f}",
                  flush=True)
