"""What an exact sweep of patches costs: `python tests/benchmarks/bench_patching.py [--scale 4]
[--pairs 2]`. Prints, stores nothing.

Twins of the bundled `digits`, A patched into B over layers x (attn_out, mlp_out) x windows that
cover the steps after the release:

- `dit_lens.patching.sweep`;
- a plain loop: what A's attention and MLPs answer, recorded once with PyTorch module hooks, then
  for each patch a full run of diffusers' own DiT with a hook that puts A's output in;
- the same loop in nnsight, on a few patches; what it would take for all is extrapolated, and said
  to be.

`--scale k` takes every k-th layer. Windows are the rounds: in each, in an order drawn anew, every
way does that window's patches, so that drift of the machine falls on all alike. Times are process
time on one thread. The finished latents of all ways are compared.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable

import nnsight
import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import dit_lens
from dit_lens.patching import Patch, grid, sweep, tiles
from dit_lens.sampling.loop import advance, prepared
from dit_lens.sampling.run import Run

SITES = {
    "attn_out": "attn1",
    "mlp_out": "ff",
}  # their modules answer before the gate, which equal labels make equal too
Recorded = dict[tuple[str, int, int], Tensor]


def module_of(transformer: DiTTransformer2DModel, site: str, layer: int) -> torch.nn.Module:
    found: torch.nn.Module = getattr(transformer.transformer_blocks[layer], SITES[site])
    return found


def denoised(run: Run, forward: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """The run from its start to its end with forward(step, x, t) as the model, as anyone would
    write it.
    """
    scheduler = prepared(run.model, run.settings)
    x = run.latents[0]
    for step in range(run.settings.steps):
        t = scheduler.timesteps[step]
        output = forward(step, x, t.expand(len(x)))
        x = advance(scheduler, output, x, run.seeds_at(step), step, run.settings.eta)
    return x


def record(transformer: DiTTransformer2DModel, run: Run, layers: range) -> Recorded:
    """What attention and MLP of every layer answered at every step of the run."""
    kept: Recorded = {}
    now = 0
    handles = []
    for site in SITES:
        for layer in layers:

            def keep(
                module: object, args: object, output: Tensor, site: str = site, layer: int = layer
            ) -> None:
                kept[site, layer, now] = output

            handles.append(module_of(transformer, site, layer).register_forward_hook(keep))
    for now in range(run.settings.steps):
        x = run.latents[now]
        transformer(x, timestep=run.timesteps[now].expand(len(x)), class_labels=run.labels)
    for handle in handles:
        handle.remove()
    return kept


def with_hooks(
    transformer: DiTTransformer2DModel, target: Run, kept: Recorded, patch: Patch
) -> Tensor:
    now = 0

    def put(module: object, args: object, output: Tensor) -> Tensor | None:
        return (
            kept[patch.site, patch.layer, now]
            if patch.steps is None or now in patch.steps
            else None
        )

    def forward(step: int, x: Tensor, t: Tensor) -> Tensor:
        nonlocal now
        now = step
        answer: Tensor = transformer(x, timestep=t, class_labels=target.labels).sample
        return answer

    handle = module_of(transformer, patch.site, patch.layer).register_forward_hook(put)
    try:
        return denoised(target, forward)
    finally:
        handle.remove()


def with_nnsight(watched: nnsight.NNsight, target: Run, kept: Recorded, patch: Patch) -> Tensor:
    block = watched.transformer_blocks[patch.layer]
    module = getattr(block, SITES[patch.site])

    def forward(step: int, x: Tensor, t: Tensor) -> Tensor:
        inside = patch.steps is None or step in patch.steps
        value = kept[patch.site, patch.layer, step]
        with watched.trace(x, timestep=t, class_labels=target.labels):
            if inside:
                module.output = value
            answer = watched.output.sample.save()
        found: Tensor = answer
        return found

    return denoised(target, forward)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--scale", type=int, default=1, help="take every so many layers")
    ap.add_argument("--pairs", type=int, default=2)
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument(
        "--release", type=int, default=20, help="the windows cover the steps from here on"
    )
    ap.add_argument("--windows", type=int, default=10)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--nnsight", type=int, default=3, help="so many patches with nnsight")
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    console = Console(width=132)
    model = dit_lens.load("digits")
    plain, other = (
        DiTTransformer2DModel.from_config(model.transformer.config).eval() for _ in range(2)
    )
    for each in (plain, other):
        each.load_state_dict(model.transformer.state_dict())
    watched = nnsight.NNsight(other)
    twins = dit_lens.twins(model, pairs=args.pairs, release=args.release, steps=args.steps)
    source, target = twins.a, twins.b
    layers = range(0, model.cfg.n_layers, args.scale)
    windows = tiles(args.release, args.steps, args.windows)
    names = ("sweep", "plain hooks", "nnsight")
    spent, made, blocks, worst = (
        dict.fromkeys(names, 0.0),
        dict.fromkeys(names, 0),
        dict.fromkeys(names, 0),
        0.0,
    )
    began = time.process_time()
    kept = record(plain, source, layers)
    spent["plain hooks"] += time.process_time() - began
    blocks["plain hooks"] += args.pairs * model.cfg.n_layers * args.steps
    full_run = args.pairs * model.cfg.n_layers * args.steps
    rng = random.Random(0)
    sampled = {i * args.windows // args.nnsight for i in range(args.nnsight)}

    def sweeping(patches: list[Patch]) -> tuple[int, Tensor]:
        result = sweep(source, target, patches, outcome=lambda x: x, batch=args.batch)
        return int(result.attrs["block_evaluations"]), torch.as_tensor(result.outcome.values)

    def looping(patches: list[Patch]) -> tuple[int, Tensor]:
        return full_run * len(patches), torch.stack(
            [with_hooks(plain, target, kept, p) for p in patches]
        )

    def sampling(patches: list[Patch]) -> tuple[int, Tensor]:
        return full_run * len(patches), torch.stack(
            [with_nnsight(watched, target, kept, p) for p in patches]
        )

    for i, window in enumerate(track(windows, "windows")):
        patches = grid(layers, list(SITES), [window])
        one = rng.randrange(len(patches))
        todo = [("sweep", sweeping, patches), ("plain hooks", looping, patches)]
        todo += [("nnsight", sampling, patches[one : one + 1])] if i in sampled else []
        finished: dict[str, Tensor] = {}
        rng.shuffle(todo)
        for name, go, these in todo:
            began = time.process_time()
            evaluated, finished[name] = go(these)
            spent[name] += time.process_time() - began
            blocks[name] += evaluated
            made[name] += len(these)
        worst = max(worst, float((finished["sweep"] - finished["plain hooks"]).abs().max()))
        if "nnsight" in finished:
            worst = max(worst, float((finished["nnsight"][0] - finished["sweep"][one]).abs().max()))
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread; {len(layers)} "
        f"layers x {len(SITES)} sites x "
        f"{args.windows} windows over steps {args.release}-{args.steps - 1} of {args.steps}, "
        f"{args.pairs} pairs, batch {args.batch}"
    )
    table = Table(
        "",
        "patches",
        "process time, s",
        "ms a patch",
        "of plain hooks",
        "blocks evaluated",
        "of plain hooks",
    )
    per = {name: (spent[name] / n, blocks[name] / n) for name, n in made.items() if n}
    for name, costs in per.items():
        shares = [f"{a / b:.3f}" for a, b in zip(costs, per["plain hooks"], strict=True)]
        figures = [
            str(made[name]),
            f"{spent[name]:.1f}",
            f"{1e3 * costs[0]:.1f}",
            shares[0],
            f"{blocks[name]:,}",
            shares[1],
        ]
        table.add_row(name, *figures)
    console.print(table)
    if made["nnsight"]:
        console.print(
            f"nnsight ran {made['nnsight']} patches; all {made['sweep']} take "
            f"{per['nnsight'][0] * made['sweep']:.0f} s, extrapolated."
        )
    console.print(f"The finished latents of all ways differ by {worst:.1e} at most.")


if __name__ == "__main__":
    main()
