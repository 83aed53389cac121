"""Patch between twins: attention or MLP of which layer carries what twin A decides into twin B?

    python examples/patch_between_twins.py

Two samples of one digit share everything up to step 25 of 50 and then draw noise of their own. For
ten steps from the release, what one of them adds to B's stream is replaced by what it added to A's;
then B runs on by itself.
"""

import torch

import dit_lens

torch.set_num_threads(1)
RELEASE, WINDOW = 25, 10

model = dit_lens.load("digits")
pair = dit_lens.twins(model, pairs=6, release=RELEASE)
a, b = pair.a, pair.b
before = (a.latents[-1] - b.latents[-1]).square().sum()

# keeps A's inputs; its activations are recomputed when a patch asks for them
with dit_lens.trace(model) as of_a:
    a.replay(from_step=RELEASE)


def moved(name):
    """How far B's finished images move towards A's: the share of their squared distance that is
    gone.
    """
    with dit_lens.trace(model) as t:
        t.patch(name, of_a, steps=range(RELEASE, RELEASE + WINDOW))
        after = b.replay(from_step=RELEASE).latents[-1]
    return float(1 - (a.latents[-1] - after).square().sum() / before)


print(f"share of the distance between the twins' images that {WINDOW} patched steps remove")
print("layer   attention      MLP")
for layer in range(0, model.cfg.n_layers, 4):
    print(f"{layer:5d}   {moved(('attn_out', layer)):9.3f}   {moved(('mlp_out', layer)):6.3f}")
