# %% [markdown]
# # From a profile to a cause
#
# Where does twin A's decision live? Put what a layer of A adds to the stream into B, in a window
# of steps, and see how far B's finished image goes over to A's, band by band.

# %%
import matplotlib.pyplot as plt
import torch

import dit_lens
from dit_lens.patching import as_grid, grid, sweep, tiles

torch.set_num_threads(1)
model = dit_lens.load("digits")
twins = dit_lens.twins(model, pairs=2, labels=[3, 7], release=4, steps=12)

# %% [markdown]
# Every fourth layer, attention and MLP, three windows of steps: 42 patches, run exactly. They
# share what they have in common, so this costs far less than 42 runs.

# %%
layers, sites = range(0, 28, 4), ["attn_out", "mlp_out"]
patches = grid(layers, sites, tiles(4, 12, 3))
result = as_grid(sweep(twins.a, twins.b, patches))
print(dict(result.move.sizes))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
last = {"window": -1}
for ax, site in zip(axes, sites, strict=True):
    moved = result.move.sel(site=site).isel(last)
    size = float(abs(result.move).max())
    shown = ax.imshow(moved, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-size, vmax=size)
    ax.set_yticks(range(len(layers)), layers)
    ax.set_xticks(range(result.sizes["band"]), result.band.values)
    ax.set(title=f"{site}, last window", xlabel="band", ylabel="layer")
figure.colorbar(shown, ax=axes, label="share of the way to A")

# %% [markdown]
# One patch is small: what a layer writes in a few steps carries little of a decision. Which
# layers the gap *needs* is asked by knocking them out: [causes](../causes.md).

# %%
largest = result.move.isel(last).max()
print(f"largest move of the last window: {float(largest):.3f} of the way")
