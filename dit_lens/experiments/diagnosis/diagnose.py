"""The whole diagnosis of one bad run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ... import arguments
from ...errors import InvalidValue
from ...hooks.hold import require_parts
from ...measures.estimate import Estimate
from ...measures.proportion import proportion
from ...model.hooked import HookedDiT
from ...patching.patch import steps_text
from ...pictures import notebook
from ...pieces import Engine, measured
from ...sampling.loop import is_stochastic
from ...sampling.run import Run
from .chances import Chances, Spent, chances, other_seeds, spread_over, spreads
from .fault import AT, Given, Images, check_fault, check_score, made
from .inside import Inside, look_inside
from .pairs import Pairs, check_good, given, twins
from .prober import Prober
from .repair import Repair, Workshop, good_of, repairs
from .verdict import headline, kind_of, lines
from .where import Found, locate


@dataclass(frozen=True)
class Diagnosis:
    """What was found; made by `diagnose`.

    Attributes:
        kind: "layer", "window" (of steps, but no single layer), "noise", or "no fault".
        layers: those to blame.
        steps: when; None where no window was found.
        heads: of each layer to blame, the head that is enough by itself, or None.
        tokens: of each layer to blame, the tokens that are enough, or None.
        sentence: the verdict and what else was measured, a line each.
        repair: the best repair that works, or None.
        tried: every repair that was tried, the best first.
        result: the figures, an `xr.Dataset`.
        images: by name, [n, c, h, w]: "bad", "good", "repaired".

        found = dit_lens.experiments.diagnose(model, run, "read as another digit")
        print(found.sentence, found.layers, found.steps)
    """

    kind: str
    layers: tuple[int, ...]
    steps: range | None
    heads: tuple[int | None, ...]
    tokens: tuple[tuple[int, ...] | None, ...]
    sentence: str
    repair: Repair | None
    tried: tuple[Repair, ...]
    result: xr.Dataset
    images: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Diagnosis({self.sentence.partition(chr(10))[0]})"

    def _repr_html_(self) -> str:
        """For notebooks: every line, and one image of each kind."""
        first = {
            name: images[0].cpu().numpy() for name, images in self.images.items() if len(images)
        }
        return notebook.shown(self.sentence, notebook.strip(first.values(), first))


@measured
def diagnose(
    model: HookedDiT,
    run: Run,
    fault: Given,
    good: Run | None = None,
    *,
    at: float = AT,
    others: int = 16,
    clones: int = 8,
    releases: int = 7,
    pairs: int = 8,
    seed: int = 0,
    batch: int = 32,
    progress: Callable[[float], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Diagnosis:
    """In which layer and at which step a fault of a run's images arises, and its repair.

        run = dit_lens.sample(model, [8], seeds=368, eta=1.0)
        found = dit_lens.experiments.diagnose(model, run, "read as another digit")
        print(found.sentence)

    The stages: how often other seeds have the fault; up to which step the past has to be shared for
    it; in which steps and layers patches between good and bad runs carry it, both ways; in which
    part, heads and tokens; and which edits take it away, verified by running them.

    Args:
        model: of the run.
        run: one bad image, or several with the same label and the same fault.
        fault: a function of images [n, c, h, w] in [0, 1] to scores [n], higher ones worse; a mask
            [h, w], true where the image is wrong; (Bands of the images, a band); or a name: for
            `digits` "read as another digit", for `portraits` "no legal avatar" or a factor.
        good: runs without the fault, of the same label and sampler, item i beside item i; also of
            another state of the weights. By default near twins, which are found.
        at: this score and more is a fault.
        others: other seeds, for the base rate and for the repair.
        clones: runs for each step up to which the past is shared.
        releases: such steps; all, of a run that has fewer.
        pairs: bad and good runs to patch between.
        seed: of all noise that is drawn.
        batch: images that go through the model at once.
        progress: called with the images spent so far.
        store: a folder in which the finished pieces are kept; given again, the diagnosis goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`; most wait for the one before.

    Returns:
        Diagnosis: the verdict, the figures, the repair.

    Raises:
        InvalidValue: for a run without the fault, a score that is constant or not finite, a mask of
            another size, a good run that is bad or does not fit.
        InvalidType: for arguments of other types.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> run = dit_lens.sample(model, [3], steps=6, eta=1.0)
    >>> def dark(images): return 1 - images.mean((1, 2, 3))
    >>> diagnose(model, run, dark, others=8, clones=2, releases=2).kind
    'no fault'
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    require_parts(model.names)
    arguments.instance("run", run, Run, "a run of dit_lens.sample")
    if run.model.transformer is not model.transformer:
        raise InvalidValue("The run is of another model; expected one that this model made.")
    at = check_fault(fault, model, at)
    others = arguments.whole("others", others, 4)
    clones, pairs = arguments.whole("clones", clones, 2), arguments.whole("pairs", pairs, 1)
    steps = run.settings.steps
    releases = arguments.whole("releases", releases, 2)
    seed, batch = arguments.seed("seed", seed), arguments.whole("batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(images)")
    if len(set(run.labels.tolist())) > 1:
        raise InvalidValue(
            f"The run has the labels {sorted(set(run.labels.tolist()))}; expected one, to compare "
            "with other seeds of it: run.select chooses items."
        )
    run.require_released(0)
    if good is not None:
        check_good(run, good)
    spent, images = Spent(told=progress), Images(model, batch)

    # Is it a fault at all.
    rest = other_seeds(run, others, seed, spent, batch)
    shown, bad = images(rest.finished), images(run.finished)
    score = made(fault, at, int(run.labels[0]), bad, shown)
    theirs, own = score.scores(shown), score.scores(bad)
    known = [theirs] if good is None else [theirs, score.scores(images(good.finished))]
    check_score(score, fault, own, np.concatenate(known), shown)
    hits = int(score.bad(theirs).sum())
    base = proportion(hits, others)

    # When.
    spent.stage = "when"
    when = spread_over(steps, releases)
    seen = chances(run, score, images, when, clones, seed, spent, batch)

    # Where.
    spent.stage = "pairs"
    compared: Pairs | None
    if good is not None:
        compared = given(run, good, score, images, pairs, spent)
    else:
        compared = twins(run, score, images, seen, pairs, seed, spent) if hits < others else None
    found: Found | None = None
    insides: list[Inside] = []
    if compared is not None:
        spent.stage = "where"
        prober = Prober(compared, score, images, spent, batch)
        found = locate(prober)
        spent.stage = "inside"
        if found.window is not None:
            for layer in sorted(found.blamed):  # as `layers` are given
                several = found.together is not None
                beside = tuple(x for x in found.blamed if x != layer) if several else ()
                insides.append(look_inside(prober, layer, found.window, beside))

    # Repair.
    spent.stage = "repair"
    spread = spreads(shown, score)
    alike = good if compared is not None and compared.matched else None
    shop = Workshop(run, score, images, compared, rest, alike, spread.tolist(), spent, batch)
    fine = good_of(rest, score, images)
    if fine is None and good is not None and good.model.transformer is not model.transformer:
        theirs_too = other_seeds(good, others, seed, spent, batch, "other seeds of the good run")
        fine = good_of(theirs_too, score, images)
    tried = repairs(shop, insides, None if found is None else found.window, fine)
    kind = kind_of(base, good is not None, compared, found)
    if kind in ("noise", "window") and is_stochastic(model, run.settings):
        tried += _redrawn(shop, seen.steps, seen.hits, seen.of)
    working = [r for r in tried if r.works]

    # What it comes to.
    said = [headline(kind, base, others, seen, found, compared)]
    said += lines(base, others, seen, compared, insides, tried, spent.images)
    pictures = {"bad": bad, "repaired": torch.stack([working[0].image]) if working else bad[:0]}
    pictures["good"] = bad[:0] if compared is None else images(compared.good.finished)
    result = _dataset(run, base, seen, found, insides, tried, pictures, spent)
    result.attrs |= {"kind": kind, "sentence": "\n".join(said), "fault": score.name, "at": at}
    return Diagnosis(
        kind,
        tuple(sorted(found.blamed)) if found is not None else (),
        None if found is None else found.window,
        tuple(each.head for each in insides),
        tuple(each.covered for each in insides),
        "\n".join(said),
        working[0] if working else None,
        tuple(tried),
        result,
        pictures,
    )


def _redrawn(shop: Workshop, steps: tuple[int, ...], hits: tuple[int, ...], n: int) -> list[Repair]:
    """Noise drawn anew from the latest step from which most clones are good."""
    fit = [s for s, h in zip(steps, hits, strict=True) if 2 * h < n]
    if not fit:
        return []
    found = []
    for seed in range(4):
        found.append(shop.redrawn(fit[-1], 1_000_003 + seed))
        if found[-1].works:
            return [found[-1]]
    return found[:1]


SHOWN = 4
"""So many good runs are kept as pictures."""


def _dataset(
    run: Run,
    base: Estimate,
    seen: Chances,
    found: Found | None,
    insides: Sequence[Inside],
    tried: Sequence[Repair],
    images: dict[str, Tensor],
    spent: Spent,
) -> xr.Dataset:
    """The figures."""
    chance = seen.estimates
    parts = [("bad", images["bad"][:1]), ("repaired", images["repaired"][:1])]
    parts[1:1] = [(f"good {i + 1}", x[None]) for i, x in enumerate(images["good"][:SHOWN])]
    parts = [(name, x) for name, x in parts if len(x)]
    pictures = torch.cat([x for _, x in parts]).float().cpu().numpy()
    if pictures.ndim == 5:  # of a video its middle frame is shown
        pictures = pictures[:, :, pictures.shape[2] // 2]
    result = xr.Dataset(
        {
            "chance": ("release", [e.value for e in chance]),
            "chance_interval": (("release", "bound"), [[e.low, e.high] for e in chance]),
            "base_rate": ((), base.value),
            "base_rate_interval": ("bound", [base.low, base.high]),
            "picture": (("shown", "channel", "row", "column"), pictures),
        },
        coords={
            "release": list(seen.steps),
            "bound": ["low", "high"],
            "shown": [name for name, _ in parts],
            **{
                axis: np.arange(n)
                for axis, n in zip(("channel", "row", "column"), pictures.shape[1:], strict=True)
            },
        },
    )
    if found is not None and found.cells:
        places = [place for place, _ in found.cells]
        result["place_effect"] = ("place", [value for _, value in found.cells])
        result.coords["place_layer"] = ("place", [p.layer for p in places])
        result.coords["place_depth"] = ("place", [p.depth for p in places])
        result.coords["place_first"] = ("place", [p.window.start for p in places])
        result.coords["place_last"] = ("place", [p.window.stop - 1 for p in places])
    if found is not None and found.layers:
        ends = [[e.low, e.high] for e in found.effects]
        result["effect"] = ("layer", [e.value for e in found.effects])
        result["effect_interval"] = (("layer", "bound"), ends)
        result.coords["layer"] = found.layers
    if found is not None and found.together is not None:
        result["together"] = found.together.value
        result["together_interval"] = ("bound", [found.together.low, found.together.high])
    for each in insides:
        if each.heads:
            result[f"head_effect_{each.layer}"] = ("head", [e.value for e in each.heads])
        if each.tokens:
            result[f"token_effect_{each.layer}"] = ("square", [e.value for e in each.tokens])
    if tried:
        result["repair_works"] = ("repair", [float(r.works) for r in tried])
        result["repair_score"] = ("repair", [r.score for r in tried])
        result["repair_collateral"] = ("repair", [r.collateral for r in tried])
        for name in ("cured", "harmed"):
            values = [getattr(r, name) for r in tried]
            result[f"repair_{name}"] = (
                "repair",
                [np.nan if v is None else v.value for v in values],
            )
        result.coords["repair"] = [r.name for r in tried]
    window = None if found is None else found.window
    result.attrs |= {
        "layers": ", ".join(map(str, sorted(found.blamed))) if found is not None else "",
        "window": "none" if window is None else steps_text(window),
        "first": -1 if window is None else window.start,
        "last": -1 if window is None else window.stop - 1,
        "steps": run.settings.steps,
        "n_layers": run.model.cfg.n_layers,
        "images": spent.images,
        **{f"images_{stage}": images for stage, images in spent.by_stage.items()},
        "label": int(run.labels[0]),
        "clones": seen.of,
        "how": seen.how,
    }
    return result
