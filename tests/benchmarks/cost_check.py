"""Holds the estimate of `dit-lens cost` against a run: `python tests/benchmarks/cost_check.py`.

A DiT-XL/2 (28 layers, width 1152, 256 tokens) with random weights, on whatever device there is: the
twins of a one-pass gap under observation, and what is read of them. Prints both, with their ratio.
"""

import argparse
import time

import torch
from costs import make_model
from diffusers import DDIMScheduler

import dit_lens
from dit_lens.commands.cost import show
from dit_lens.experiments import latents, one_pass
from dit_lens.experiments.cost import gap_cost
from dit_lens.probes import LayerLens, TwinDivergence
from dit_lens.twinning.twins import paired_labels


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--layers", type=int, default=28)
    ap.add_argument("--pairs", type=int, default=2)
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--dtype", default="float32")
    args = ap.parse_args()
    torch.set_num_threads(1)
    made = make_model(layers=args.layers, heads=16, d_head=72, channels=4, size=32, classes=1000)
    made = torch.nn.Module.to(made, args.device, getattr(torch, args.dtype))
    model = dit_lens.HookedDiT(made, scheduler=DDIMScheduler(1000))
    cost = gap_cost(model, args.pairs, args.steps, clones=False)
    show([cost])
    bands = dit_lens.Bands.radial(model.cfg.pixels, cut=0.25)
    probes = [TwinDivergence(), LayerLens(bands)]
    began, used = time.perf_counter(), time.process_time()
    labels = paired_labels(model, args.pairs)
    pair = dit_lens.twins(model, args.pairs, labels, steps=args.steps, probes=probes)
    probes[1].result(pair.run.latents[-1])
    one_pass(pair, [latents(bands)])
    took, used = time.perf_counter() - began, time.process_time() - used
    print(
        f"estimate {cost.seconds:.1f} s, run {took:.1f} s ({used:.1f} s of process time): ratio "
        f"{cost.seconds / took:.2f}"
    )


if __name__ == "__main__":
    main()
