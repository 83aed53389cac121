# %% [markdown]
# # A linear probe for each layer and step
#
# How soon, and from which layer on, can one read off what the finished image will be like? Here:
# how much ink a 3 will have. The probe is ridge regression on the token mean of the residual
# stream.

# %%
import matplotlib.pyplot as plt
import torch

import dit_lens

torch.set_num_threads(1)
model = dit_lens.load("digits")
items, steps = 96, 10

# %% [markdown]
# All images are 3s, so the label says nothing. `t.stack` reads all layers of a step in one pass;
# `steps=` keeps memory small. The last quarter of the images is held out.

# %%
with dit_lens.trace(model) as t:
    run = dit_lens.sample(model, labels=[3] * items, seeds=range(items), steps=steps, eta=1.0)
ink = run.latents[-1].mean((1, 2, 3))
train, test = slice(0, 72), slice(72, None)


def r2(features, target, penalty=1.0):
    """Share of the held-out variance that ridge regression explains."""
    centre, spread = features[train].mean(0), features[train].std(0) + 1e-6
    x = ((features - centre) / spread).double()
    y = (target - target[train].mean()).double()
    gram = x[train].T @ x[train] + penalty * len(x[train]) * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(gram, x[train].T @ y[train])
    return float(1 - (y[test] - x[test] @ weights).square().sum() / y[test].square().sum())


scores = torch.zeros(model.cfg.n_layers, steps)
for step in range(steps):
    stream = t.stack("resid_post", steps=[step])[:, 0].mean(2)  # [layer, batch, d_model]
    scores[:, step] = torch.tensor([r2(layer, ink) for layer in stream])

# %%
figure, ax = plt.subplots(figsize=(6, 4.2))
shown = ax.imshow(scores, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
ax.set(xlabel="step", ylabel="layer", title="ink of the finished 3, held-out R²")
figure.colorbar(shown)
best = scores.max(0).values
print("best layer's R² by step:", *(f"{value:.2f}" for value in best))

# %% [markdown]
# For more than a look, write the activations to disk once with
# [`dit_lens.record`](../recording.md) and train on them.
