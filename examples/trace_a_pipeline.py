"""Trace a diffusers pipeline: read any activation of any step after the run, without having chosen
it before.

python examples/trace_a_pipeline.py [FOLDER]      # a saved DiTPipeline; by default one is made
around `digits`
"""

import sys

import torch
from diffusers import DiTPipeline

import dit_lens

torch.set_num_threads(1)
if len(sys.argv) > 1:
    pipe = DiTPipeline.from_pretrained(sys.argv[1])

    def draw():
        pipe(class_labels=[0, 1], num_inference_steps=20, guidance_scale=1.0)
else:
    pipe = dit_lens.load("digits")

    def draw():
        dit_lens.sample(pipe, labels=[3, 7], steps=20, seeds=0)


with dit_lens.trace(pipe) as t:  # no names: only the inputs of each step are kept
    draw()
print(t)

resid = t.stack("resid_post")  # [layer, step, batch, token, d_model], recomputed in one pass
print("residual norm by layer, first and last step:")
norms = resid.norm(dim=-1).mean(dim=(-1, -2))  # [layer, step]
for layer, row in enumerate(norms):
    print(f"  {layer:2d}  {row[0]:8.2f}  {row[-1]:8.2f}")

pattern = t["pattern", -1]  # [step, batch, head, query, key]: computed only now
entropy = -(pattern * pattern.clamp_min(1e-9).log()).sum(-1).mean(dim=(1, 2, 3))
print(
    "entropy of the last layer's attention, first and last step:",
    [round(float(entropy[i]), 3) for i in (0, -1)],
)

with dit_lens.trace(pipe) as edited:  # the same run without the last layer's MLP after step 10
    edited.ablate(("mlp_out", -1), steps=range(10, 20))
    draw()
change = (edited.latents[-1] - t.latents[-1]).norm() / t.latents[-1].norm()
print(f"relative change of the last latents without layer {len(resid) - 1}'s MLP: {change:.3f}")
