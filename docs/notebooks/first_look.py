# %% [markdown]
# # A first look
#
# What a diffusion transformer has in mind while it draws: hook points by their TransformerLens
# names, a trace that recomputes what is read, and the *lens*, every layer's stream read by the
# last layer.

# %%
import matplotlib.pyplot as plt
import torch

import dit_lens
from dit_lens.probes import LayerLens

torch.set_num_threads(1)
model = dit_lens.load("digits")  # a 28-layer DiT on MNIST digits, in the package
print(len(model.names), "hook points, such as", *model.names[:4], "...", model.names[-1])

# %% [markdown]
# A trace keeps the inputs of every step, a few KB, and recomputes any activation when it is read,
# bit for bit what recording would have given.

# %%
with dit_lens.trace(model) as t:
    run = dit_lens.sample(model, labels=[3, 7], seeds=1, steps=20)
print("stream of layer 5:  [step, batch, token, d_model] =", list(t["resid_post", 5].shape))
print("pattern of layer 27: [step, batch, head, query, key] =", list(t["pattern", 27].shape))

# %% [markdown]
# The predicted clean image at every second step: what the model would draw if it had to stop
# there.


# %%
def strip(axes, images, titles=()):
    for ax, image in zip(axes, images, strict=True):
        ax.imshow(image, cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontsize=8)


shown = range(1, 20, 2)
figure, axes = plt.subplots(2, len(shown), figsize=(10, 2.4))
titles = [f"step {s}" for s in shown]
for item, row in enumerate(axes):
    strip(row, [run.x0[s][item, 0] for s in shown], () if item else titles)

# %% [markdown]
# The lens: the same, from the stream of each layer, read by the last layer with that step's
# conditioning. Rows are layers, columns are steps.

# %%
lens = LayerLens()
lens.run(model, labels=[3, 3, 7, 7], seeds=[1, 2, 3, 4], steps=20)
layers = [-1, 3, 7, 11, 15, 19, 23, 27]
figure, axes = plt.subplots(len(layers), len(shown), figsize=(10, 8.5))
for row, layer in zip(axes, layers, strict=True):
    strip(row, [lens.x0(layer, s)[0, 0] for s in shown], titles if layer < 0 else ())
    row[0].text(-4, 8, "embedding" if layer < 0 else f"layer {layer}", ha="right", va="center")

# %% [markdown]
# An intervention: what becomes of the image without any attention in steps 12 to 17? Tokens no
# longer see one another while detail is settled.

# %%
with dit_lens.trace(model) as edited:
    edited.ablate("blocks.*.hook_attn_out", steps=range(12, 18))
    changed = run.replay(from_step=0)
figure, axes = plt.subplots(1, 4, figsize=(5, 1.6))
images = [run.latents[-1][0, 0], changed.latents[-1][0, 0]]
images += [run.latents[-1][1, 0], changed.latents[-1][1, 0]]
strip(axes, images, ["as it was", "ablated"] * 2)
moved = (changed.latents[-1] - run.latents[-1]).square().mean().sqrt()
print(f"root mean square change of the finished images: {moved:.3f}")
