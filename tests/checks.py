"""The long checks against exact answers, in one run: `make checks`, or `python tests/checks.py
[--scale 0.1]` for a look.

Each is the function of a quick test at full length. The tables are printed and, at full length,
stored in docs/checks.md. What has been measured is kept in --store: killed and started again with
the same code, it goes on.
"""

import argparse
import inspect
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import test_cause_map
import test_circuits
import test_commitment
import test_faults
import test_intervals
import test_knock_outs
import test_layer_profile
import test_mixture
import test_onset
import torch
from rich.console import Console

from dit_lens import HookedDiT
from dit_lens.experiments import knock_outs, shapley, smallest_set
from dit_lens.experiments.knocked_gap import set_text
from dit_lens.pieces import Piece, kept_in, results

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "checks.md"
HEAD = ["| check | case | wanted | measured | |", "|---|---|---|---|---|"]
TITLE = """# Checks against exact answers

`make checks` prints these tables and stores them here; the same functions run, shorter, in the
tests. Behind a share stands its 95 % interval (Wilson). "Wanted" was set before measuring; the last
column says whether the measured value is inside. How a crossing of half is found and what departure
counts (`layer_profile.MATTERS`) was settled on random-weight models, most of them those counted
here, and the degrees of freedom of the intervals (`measures.bootstrap.freedom`) on profiles like
those of the part `intervals`. The late share, which null models are compared by, was settled before
any was measured.

## Exact answers

abar is the cumulative signal of a variance-preserving schedule (x_t = sqrt(abar) x0 + sqrt(1 -
abar) noise), and SNR = abar / (1 - abar). The models are in `dit_lens.groundtruth`.

- **E1, clones of Gaussian data.** Mode k of the data has variance lambda_k, the denoiser is exact,
  the sampler stochastic, and twins are released at abar. Then the finished twins' correlation in
  mode k is r_k = lambda_k abar / (1 - abar + lambda_k abar), a logistic in log SNR, and 1/2 at abar
  = 1/(1 + lambda_k). A band of several modes has sum lambda_k r_k / sum lambda_k. So a falling
  spectrum has a positive gap, a white one none, a rising one a negative gap.
- **E2, deterministic samplers.** On the same data twins that start apart and share no noise differ
  by |d_k(t)| / |d_k(0)| = sqrt(Gamma_k(t) / lambda_k), Gamma_k = 1 + (lambda_k - 1) abar the
  variance of x_t in mode k and d_k(0) the finished difference. Divided by that standard deviation
  the difference is constant: a gap found in it is an error of the tool.
- **E3, two-scale mixtures.** Each band of the data is +m or -m, with a spread sigma. The chance
  that clones released at abar end on the same side is 1/2 of the integral of (G+² + G-²) / (G+ +
  G-), where G+ and G- are normal densities around +m sqrt(abar) and -m sqrt(abar) with variance
  Gamma = 1 - abar + sigma² abar. It is 0.7752 where m sqrt(abar) = sqrt(Gamma).
- **E4, planted layers.** In chosen layers attention is uniform (queries and keys are 0) and there
  is no MLP, so that a layer of gain a multiplies the token mean of the twins' difference by 1 + rho
  a, rho = (1 - g)/(1 + g); all other layers leave it alone. With a = 0.3 in five layers the product
  is 3.71293 at g = 0, 1.61051 at g = 1/2 and 1 at g = 1. The layers are planted early, in the
  middle and late: a tool that always answers "the last layers" is wrong.
- **E5, null models.** Random weights, and a trained model with its layers shuffled.
- **E6, a known cause.** The exact denoiser of Gaussian data with two bands is eps = c_low P_low x +
  c_high P_high x, c_b = sqrt(1 - abar) / (lambda_b abar + 1 - abar). With P_low the token mean, one
  layer of uniform attention, gated by time, supplies all of c_low - c_high. The gap is then E1's
  and that layer its only cause: without it the gap is 0. Several layers can share the work, and
  decoys show the difference and cause nothing. Or either of two layers does it
  (`groundtruth.redundant`), or one does a part of it through another (`relayed`). With any layers
  taken out these models stay linear in each band, so what becomes of the gap is computed
  (`exact_agreement`): x_t is a Gaussian chain, whose correlations follow from c(t) step by step.
"""


class Row(NamedTuple):
    check: str
    case: str
    wanted: str
    measured: str
    ok: bool | None  # None: shown, nothing asked


def share(hits: float, n: int) -> str:
    """A share with its Wilson interval."""
    z, p = 1.96, hits / n
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2),
    )
    return f"{p:.1%} of {n} [{max(0, centre - half):.1%}, {centre + half:.1%}]"


def sampled(scale: float) -> Iterator[Row]:
    """E1, E2, E3: measured against exact, in standard errors."""
    few, several, seeds = max(1, round(750 * scale)), max(100, round(1000 * scale)), range(2)
    for check, rows in (
        (
            "E1: clones of Gaussian data, spectra falling, white, rising",
            test_mixture.clones_of_gaussians(several, seeds, (8, 14, 19)),
        ),
        (
            "E3: clones of two-scale mixtures end on the same side",
            test_mixture.clones_of_mixtures(max(100, few), seeds, 250, (-1.0, 0.0, 1.0)),
        ),
    ):
        z = np.array([row.z for row in rows])
        yield Row(
            check,
            f"{len(z)} bands x releases x seeds",
            "within 3 standard errors",
            f"worst {np.abs(z).max():.2f}, rms {np.sqrt((z**2).mean()):.2f}",
            bool(np.abs(z).max() < 3),
        )
    for steps in (50, 500):
        z = np.array([row.z for row in test_mixture.deterministic_runs(steps)])
        yield Row(
            "E2: ratio of differences, deterministic sampler",
            f"{steps} steps, {len(z)} rows",
            "within the sampler's own error",
            f"worst {np.abs(z).max():.2f} of it",
            bool(np.abs(z).max() < 1),
        )


def coverage(scale: float) -> Iterator[Row]:
    """95 % intervals of commitment and gap over repeats of exactly known Gaussian twins."""
    repeats = max(20, round(300 * scale))
    for name, lam in test_commitment.CASES.items():
        for pairs, groups in ((32, 1), (64, 8)):
            hit, _, _ = test_commitment.coverage(lam, pairs, repeats, groups > 1, groups, 0)
            for what, value in zip(
                ("low", "high", "gap in log SNR", "gap in steps"), hit, strict=True
            ):
                yield Row(
                    "coverage of 95 % intervals",
                    f"{name.replace(' | ', ' / ')}, {pairs} pairs, {groups} labels: {what}",
                    "92 % to 98 %",
                    share(value * repeats, repeats),
                    bool(0.92 <= value <= 0.98),
                )


def intervals(scale: float) -> Iterator[Row]:
    """95 % intervals of every kind at the sizes of `--quick` (16 pairs), `patch` (24) and the
    default (48), in the sampler's own steps; no model is run.
    """
    repeats = max(20, round(300 * scale))
    for case in test_intervals.cases():
        rates = {name: hit.mean() for name, hit in case.rates(repeats).items()}
        alarms = {name: rates.pop(name) for name in test_intervals.FALSE_ALARMS if name in rates}
        for wanted, found, ok in (
            ("92 % to 98 %", rates, all(0.92 <= r <= 0.98 for r in rates.values())),
            ("at most 5 %", alarms, all(r <= 0.05 for r in alarms.values())),
        ):
            if found:
                shown = ", ".join(f"{name} {rate:.1%}" for name, rate in found.items())
                yield Row(
                    f"{'false alarms' if found is alarms else 'coverage'}, {case.what}",
                    f"{case.sizes}; {repeats} repeats",
                    wanted,
                    shown,
                    bool(ok),
                )


def profiles(scale: float) -> Iterator[Row]:
    """The change point test on synthetic profiles with noise shared over depth."""
    repeats = max(20, round(300 * scale))
    for shape, size in (("flat", 0.0), ("step", 8.0), ("step", 6.0), ("ramp", 8.0)):
        right, named, held, *_ = test_onset.rates(shape, repeats, size=size)
        if shape == "flat":
            yield Row(
                "onset, synthetic profiles",
                "flat: any layer named",
                "at most 5 %",
                share(named * repeats, repeats),
                bool(named <= 0.05),
            )
        else:
            case = f"{shape} of {size:g} standard errors a layer"
            yield Row(
                "onset, synthetic profiles",
                f"{case}: right layer",
                "at least 95 %",
                share(right * repeats, repeats),
                bool(right >= 0.95),
            )
            yield Row(
                "onset, synthetic profiles",
                f"{case}: interval holds it",
                "at least 95 %",
                share(held * repeats, repeats),
                bool(held >= 0.95),
            )


def kept(name: str, number: int, find: Callable[[int], dict[str, Any]]) -> list[dict[str, float]]:
    """What is found for each of so many seeds, in a piece of its own; None is NaN."""
    pieces = [Piece(f"{name} {seed}", partial(_arrays, find, seed)) for seed in range(number)]
    return [{key: float(value) for key, value in found.items()} for found in results(pieces)]


def _arrays(find: Callable[[int], dict[str, Any]], seed: int) -> dict[str, np.ndarray]:
    return {k: np.array(np.nan if v is None else v, float) for k, v in find(seed).items()}


def onsets_of(make: Callable[..., test_layer_profile.Named], seed: int) -> dict[str, Any]:
    """The layer that was planted, and those that are named by view."""
    one = make(seed)
    return {"planted": one.planted, **one.onsets}


def models(scale: float) -> Iterator[Row]:
    """Onsets on real DiTs: planted layers, random weights, shuffled layers."""
    make = partial(onsets_of, test_layer_profile.planted_model)
    found = kept("planted", max(4, round(200 * scale)), make)
    right = [one["growth"] == one["planted"] for one in found]
    yield Row(
        "onset, planted DiTs (E4)",
        "growth names the first planted layer",
        "at least 95 %",
        share(sum(right), len(right)),
        sum(right) >= 0.95 * len(right),
    )
    for kind, number in (("random", 100), ("shuffled", 30)):
        null = partial(test_layer_profile.null_model, kind=kind)
        nulls = kept(kind, max(4, round(number * scale)), partial(onsets_of, null))
        for view in test_layer_profile.VIEWS:
            claims = sum(not np.isnan(one[view]) for one in nulls)
            yield Row(
                f"onset, null DiTs (E5), {kind}",
                f"{view} claims a layer",
                "at most 5 %",
                share(claims, len(nulls)),
                claims <= 0.05 * len(nulls),
            )
    again = kept("again", len(nulls), partial(onsets_of, partial(null, other_twins=1000)))
    for view in test_layer_profile.VIEWS:
        both = [
            (a[view], b[view]) for a, b in zip(nulls, again, strict=True) if not np.isnan(a[view])
        ]
        if both:
            alike = sum(abs(a - b) <= 1 for a, b in both)  # NaN is near nothing
            yield Row(
                "onset, null DiTs (E5), shuffled",
                f"{view}: the layer claimed is claimed again (within 1) with other twins",
                "",
                share(alike, len(both)),
                None,
            )


def nulls(scale: float) -> Iterator[Row]:
    """Profiles over depth held against 19 null models, where no order of layers is special, and
    clones in the stream where there is no gap.
    """
    found = kept("late", max(4, round(60 * scale)), test_layer_profile.late_claim)
    for view in test_layer_profile.VIEWS:
        claims = sum(p[view] <= 0.05 for p in found)
        yield Row(
            "late share, random weights",
            f"{view}: p of 0.05 or less",
            "at most 5 %",
            share(claims, len(found)),
            claims <= 0.05 * len(found),
        )
    alarm = test_layer_profile.white_stream
    found = kept("white", max(4, round(100 * scale)), lambda seed: {"alarm": alarm(seed)})
    white = [one["alarm"] for one in found]
    yield Row(
        "clones agree in the stream, white data (E1)",
        "a gap is seen in some layer",
        "at most 5 %",
        share(sum(white), len(white)),
        sum(white) <= 0.05 * len(white),
    )


def causes(scale: float) -> Iterator[Row]:
    """Knock-outs on models whose causes are known: exact denoisers with decoys that show the
    difference and cause nothing (E6), and circuits of which the exact effect of taking any layer
    out is computed (noisy neutral layers and so an inexact denoiser, causes that oppose each other,
    stand in for each other, or act through each other).
    """
    found = list(test_knock_outs.random_causes(max(4, round(200 * scale))))
    n, right = len(found), sum(named == truth for truth, _, named in found)
    blamed, decoys = (
        sum(len(named & decoys) for _, decoys, named in found),
        sum(len(decoys) for _, decoys, _ in found),
    )
    yield Row(
        "knock-outs, E6 DiTs",
        "exactly the causing layers named",
        "at least 95 %",
        share(right, n),
        right >= 0.95 * n,
    )
    yield Row(
        "knock-outs, E6 DiTs",
        "decoys blamed",
        "at most 5 %",
        share(blamed, decoys),
        blamed <= 0.05 * decoys,
    )
    yield from circuits(test_circuits.found_causes(max(4, round(120 * scale))))
    yield from acting_together(max(2, round(20 * scale)))


def circuits(rows: list[test_circuits.Found]) -> Iterator[Row]:
    """Hits, misses and false blame, layer by layer."""
    check = "knock-outs, circuits"
    inert = [row for row in rows if abs(row.exact) <= row.matters]
    blamed = sum(row.named for row in inert)
    yield Row(
        check,
        "layers without an effect (1 % of the run) blamed",
        "at most 5 %",
        share(blamed, len(inert)),
        blamed <= 0.05 * len(inert),
    )
    decoys = [row for row in rows if row.decoy]
    if decoys:
        wrong = sum(row.named for row in decoys)
        yield Row(
            check,
            "decoys blamed",
            "at most 5 %",
            share(wrong, len(decoys)),
            wrong <= 0.05 * len(decoys),
        )
    named = [row for row in rows if row.named]
    signed = sum(row.value * row.exact < 0 for row in named)
    yield Row(
        check,
        "layers named with the wrong sign",
        "at most 5 %",
        share(signed, len(named)),
        signed <= 0.05 * len(named),
    )
    for least, most, wanted in ((0.16, 0.5, 0.0), (0.5, 1.5, 0.5), (1.5, np.inf, 0.95)):
        some = [row for row in rows if least < abs(row.exact) <= most]
        if some:
            hits = sum(row.named for row in some)
            yield Row(
                check,
                f"layers whose effect is {least:g} steps of 16 or more"
                f"{f', up to {most:g}' if np.isfinite(most) else ''}: named (power)",
                f"at least {wanted:.0%}" if wanted else "",
                share(hits, len(some)),
                hits >= wanted * len(some) if wanted else None,
            )
    # where every layer that acts at all is known to: the interval holds the computed effect
    acting = [row for row in rows if abs(row.exact) > 0.01]
    held = sum(row.low <= row.exact <= row.high for row in acting)
    yield Row(
        check,
        "intervals for all layers at once hold the exact effect (layer by layer)",
        "at least 95 %",
        share(held, len(acting)),
        held >= 0.95 * len(acting),
    )


def acting_together(models: int) -> Iterator[Row]:
    """Causes that no single knock-out finds, and causes that take a share each."""
    options = {"pairs": 24, "steps": 16, "cut": 0.1, "resamples": 300}
    sets, alone, held, players = 0, 0, 0, 0
    for seed in range(models):
        _, truth = test_circuits.random_circuit(4 * seed + 2)  # redundant ones
        model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
        alone += bool(knock_outs(model, seed=seed, **options).attrs["causes"])
        few = smallest_set(model, seed=seed, **options)
        sets += few.found == set_text(truth.answer["layers"])
        split = shapley(model, orders=6, seed=seed, **options)
        half = -test_circuits.exact_gap(truth, 16) / 2
        exact = [half * (layer in truth.answer["layers"]) for layer in range(split.sizes["player"])]
        low, high = split.share_interval.values.T
        sure = (low - 1e-3 <= exact) & (exact <= high + 1e-3)
        held, players = held + int(sure.sum()), players + len(sure)
    for case, wanted, hits, n, ok in (
        ("a layer is named by itself", "at most 5 %", alone, models, alone <= 0.05 * models),
        ("the smallest set is the two", "at least 90 %", sets, models, sets >= 0.9 * models),
        (
            "intervals of Shapley shares hold the exact ones (layer by layer)",
            "at least 95 %",
            held,
            players,
            held >= 0.95 * players,
        ),
    ):
        yield Row("either of two layers suffices", case, wanted, share(hits, n), ok)


def holds(scale: float) -> Iterator[Row]:
    """The map of causes on E6 models with causes and decoys drawn at random: the effect of holding
    a causing layer at a step is computed exactly, that of every other cell is 0.
    """
    n = max(4, round(100 * scale))
    right = sum(test_cause_map.finds_causes(seed) for seed in range(n))
    yield Row(
        "map, E6 DiTs",
        "every causing cell's effect within its interval, all others 0",
        "at least 95 %",
        share(right, n),
        right >= 0.95 * n,
    )


def planted_fault(kind: str, seed: int) -> dict[str, Any]:
    """What is found of one planted fault; nothing where no strength of it shows."""
    one = test_faults.case(kind, seed)
    if one is None:
        return {}
    found = test_faults.outcome(one, seed)._asdict()
    if kind == "layer":
        for name, way in test_faults.BASELINES.items():
            layer, found[f"{name}: images"] = way(one)
            found[f"{name}: first"] = layer in one.layers
    return found


def faults(scale: float) -> Iterator[Row]:
    """Planted faults in `digits` (12 steps of DDIM, eta 1, for tilted starts eta 0; one bad image
    and the one of the model, or the start, without the fault), and what `diagnose` makes of them;
    simpler ways beside it. Places at which no strength makes an image that is misread are left out.
    """
    check = "faults planted in digits"
    few = {"layer": 20, "head": 10, "tokens": 6, "two": 6, "decoy": 10, "noise": 10, "nothing": 10}
    done: dict[str, list[dict[str, float]]] = {kind: [] for kind in few}
    for kind, full in few.items():
        seed, wanted = 0, max(2, round(full * scale))
        while len(done[kind]) < wanted and seed < 6 * wanted:
            piece = Piece(f"{kind} {seed}", partial(_arrays, partial(planted_fault, kind), seed))
            (found,) = results([piece])
            if found:
                done[kind].append({name: float(value) for name, value in found.items()})
            seed += 1

    def counted(case: str, wanted: str, hits: list[float], least: float | None) -> Row:
        ok = None if least is None else sum(hits) >= least * len(hits)
        return Row(check, case, wanted, share(sum(hits), len(hits)), ok)

    one = done["layer"] + done["tokens"] + done["decoy"]
    yield counted("one layer: right layer first", "at least 90 %", [o["first"] for o in one], 0.9)
    yield counted("one layer: among three", "", [o["three"] for o in one], None)
    yield counted("one layer: named, and no other", "", [o["all_named"] for o in one], None)
    heads = done["head"]
    yield counted(
        "one head: layer and head right", "at least 80 %", [o["head"] for o in heads], 0.8
    )
    two = done["two"]
    yield counted("two layers: one of them first", "", [o["first"] for o in two], None)
    yield counted("two layers: both named", "", [o["all_named"] for o in two], None)
    planted = one + heads + two
    iou = float(np.mean([o["iou"] for o in planted]))
    yield Row(check, "overlap (IoU) of the steps, mean", "at least 0.6", f"{iou:.2f}", iou >= 0.6)
    calm = done["noise"] + done["nothing"]
    alarms = [o["alarm"] for o in calm]
    ok = sum(alarms) <= 0.05 * len(alarms)
    yield Row(check, "false alarms", "at most 5 %", share(sum(alarms), len(alarms)), ok)
    blamed = [o["decoy"] for o in done["decoy"]]
    ok = sum(blamed) <= 0.05 * len(blamed)
    yield Row(check, "decoys blamed", "at most 5 %", share(sum(blamed), len(blamed)), ok)
    ratio = float(np.mean([o["where"] / o["grid"] for o in planted]))
    text = (
        f"{ratio:.2f}; {np.mean([o['images'] for o in planted]):.0f} images for a whole diagnosis"
    )
    yield Row(
        check, "images to find the place, of a full grid's", "at most 0.2", text, ratio <= 0.2
    )
    works = [o["works"] and o["collateral"] <= 0.1 for o in planted]
    yield counted("repaired, with a collateral of at most 0.1", "at least 90 %", works, 0.9)
    yield counted("repaired at all", "", [o["works"] for o in planted], None)
    moved = [o["collateral"] for o in planted if o["works"]]
    yield Row(check, "collateral of repairs, median", "", f"{np.median(moved):.3f}", None)
    cured = [o["cured"] for o in planted if o["had"]]
    text = f"{np.mean(cured):.0%} of the faulty ones, over {len(cured)} faults" if cured else "-"
    yield Row(check, "transfer: other seeds cured", "", text, None)
    for name in test_faults.BASELINES:
        cost = np.mean([o[f"{name}: images"] for o in done["layer"]])
        hits = [o[f"{name}: first"] for o in done["layer"]]
        yield counted(f"{name} ({cost:.0f} images): right layer first", "", hits, None)
    yield Row(check, "a layer at random: right layer first", "", f"{1 / 28:.1%}", None)


PARTS = (sampled, coverage, intervals, profiles, models, nulls, causes, holds, faults)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument(
        "--scale", type=float, default=1.0, help="share of the full number of repeats and models"
    )
    ap.add_argument("--only", choices=[part.__name__ for part in PARTS])
    ap.add_argument("--store", type=Path, help="a folder for what is finished")
    args = ap.parse_args()
    console = Console(highlight=False)
    code = {str(f): f.read_text() for d in ("dit_lens", "tests") for f in ROOT.glob(f"{d}/**/*.py")}
    for part in PARTS:
        if args.only in (None, part.__name__):
            name = part.__name__
            began, lines = time.process_time(), []
            folder = args.store and args.store / name
            with kept_in(folder, name, {"scale": args.scale, "code": code}, None):
                for row in part(args.scale):
                    ok = {True: "yes", False: "**no**", None: ""}[row.ok]
                    lines.append("| " + " | ".join((*row[:4], ok)) + " |")
                    console.print(lines[-1], soft_wrap=True, markup=False)
            seconds = f"{time.process_time() - began:.0f} s of process time."
            console.print(seconds, markup=False)
            if args.scale == 1:
                store(name, [inspect.getdoc(part) or "", "", *HEAD, *lines, "", seconds])


def store(name: str, lines: list[str]) -> None:
    """Put one part's section into the page, in the place of an earlier one."""
    page = DOCS.read_text() if DOCS.exists() else TITLE
    kept = {
        text.split("\n", 1)[0]: text.split("\n", 1)[1].strip() for text in page.split("\n## ")[1:]
    }
    kept[name] = "\n".join(lines)
    DOCS.write_text(
        TITLE
        + "".join(
            f"\n## {part.__name__}\n\n{kept[part.__name__]}\n"
            for part in PARTS
            if part.__name__ in kept
        )
    )


if __name__ == "__main__":
    main()
