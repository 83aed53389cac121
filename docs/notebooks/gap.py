# %% [markdown]
# # The synchronization gap
#
# When does a model decide what? Twins share one trajectory up to a *release* step and then draw
# noise of their own. What their finished images agree on was decided by then. Low frequencies are
# decided before high ones: the lag is the *synchronization gap*.

# %%
import matplotlib.pyplot as plt
import torch

import dit_lens
from dit_lens.experiments import measure_gap

torch.set_num_threads(1)
model = dit_lens.load("digits")
steps, releases = 16, [2, 5, 7, 9, 11, 13, 14]

# %% [markdown]
# Twins of one digit, released at later and later steps: strangers at first, then of one shape, in
# the end almost the same to the pixel.

# %%
figure, axes = plt.subplots(2, len(releases), figsize=(9, 2.8))
for column, release in zip(axes.T, releases, strict=True):
    pair = dit_lens.twins(model, pairs=1, labels=[3], release=release, steps=steps, seed=1)
    for ax, twin in zip(column, (pair.a, pair.b), strict=True):
        ax.imshow(twin.latents[-1][0, 0], cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
    column[0].set_title(f"released at {release}", fontsize=8)

# %% [markdown]
# Measured over 16 pairs, band by band. This is a look: `dit-lens gap digits` takes 48 pairs and
# 50 steps.

# %%
found = measure_gap(model, pairs=16, steps=steps, seed=0, name="digits")
print(found.attrs["headline"])

# %%
figure, ax = plt.subplots(figsize=(6, 3.6))
for name, curve in found.agreement_one_pass.groupby("band", squeeze=False):
    ax.plot(found.step, curve.squeeze(), label=name)
ax.axhline(0.5, color="gray", linewidth=0.8)
ax.set(xlabel="step", ylabel="agreement (one pass)")
ax.legend(title="cycles per pixel", fontsize=8)

# %% [markdown]
# The commitment of low and high frequencies, with 95 % intervals, by both estimators. What they
# mean and when they differ: [the gap](../gap.md).

# %%
for estimator in found.estimator.values:
    one = found.sel(estimator=estimator)
    for split in found.split.values:
        step = one.split_commitment.sel(split=split)
        low, high = one.split_commitment_interval.sel(split=split)
        print(f"{estimator:9} {split:5} commits at step {step:.1f} [{low:.1f}, {high:.1f}]")
