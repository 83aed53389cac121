# %% [markdown]
# # The painter's order
#
# `portraits` draws faces whose every part can be read off exactly. Twins released later and later
# show in which order it paints: what both have in common was decided by then.

# %%
import matplotlib.pyplot as plt
import torch

import dit_lens
from dit_lens.groundtruth import portraits

torch.set_num_threads(1)
model = dit_lens.load("portraits")
steps, releases = 20, [4, 8, 10, 12, 14, 16, 18]

# %%
figure, axes = plt.subplots(2, len(releases), figsize=(9, 2.8))
twins = {}
for column, release in zip(axes.T, releases, strict=True):
    pair = dit_lens.twins(model, pairs=8, labels=[5] * 8, release=release, steps=steps, seed=2)
    twins[release] = [portraits.attributes(side.images) for side in (pair.a, pair.b)]
    for ax, twin in zip(column, (pair.a, pair.b), strict=True):
        ax.imshow(twin.images[0].permute(1, 2, 0).clamp(0, 1))
        ax.axis("off")
    column[0].set_title(f"released at {release}", fontsize=8)

# %% [markdown]
# Of eight pairs, how many have the same background, skin, hair, ... at the end?

# %%
names = list(twins[releases[0]][0])
equal = torch.tensor(
    [[float((a[n] == b[n]).float().mean()) for n in names] for a, b in twins.values()]
)
figure, ax = plt.subplots(figsize=(8, 2.8))
shown = ax.imshow(equal, aspect="auto", cmap="viridis", vmin=0, vmax=1)
ax.set_xticks(range(len(names)), names, rotation=35, ha="right")
ax.set_yticks(range(len(releases)), releases)
ax.set(ylabel="released at step", title="share of pairs with the same")
figure.colorbar(shown)

# %% [markdown]
# Eight pairs are a look, and some agree by chance. With chance taken off, and intervals:
# `dit-lens gap portraits --attributes`, or `dit_lens.experiments.attributes`
# ([attributes](../attributes.md)).
