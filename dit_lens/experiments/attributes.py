"""When each attribute of an image is decided: background, hair, glasses, whatever a function can
read off an image.

Attributes are categories, so twins agree on one or they don't, and some agree by chance. Two
quantities, and they are not the same:

- *Commitment*. Clones are released at a step and run to their end. Their agreement is Cohen's kappa
  with each label's own marginals: 0 if they agree as often as two unrelated samples of their label,
  1 if always. An attribute is decided where it passes 1/2, as a band is.
- *Readable*. The step from which the predicted clean image reads as the finished one will: where
  the same kappa, of the predicted x0 and the finished image over ordinary runs, passes 1/2.

There is no one-pass estimate of commitment here. For fields it rests on the predicted x0 being the
mean of what the finished image can still become; what a *mean image* reads as is no mean of
readings. Where x_t leaves both sides of a bit open, with chances p and 1 - p, clones agree (2p -
1)² beyond chance, and the prediction, which reads as the likelier side, agrees |2p - 1| with the
finished image: it is readable before it is decided (`tests/test_attributes.py` holds both against
the exact answer E3). With more categories a blurred image may read as one that it can't become.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import one_hot

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import Agreement, Contrasts, sums
from ..measures.bands import CUT
from ..measures.bootstrap import FEWEST_PAIRS, simultaneous
from ..measures.commitment import commitment_draws, fit_commitment
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pictures.result import Result
from ..pieces import Engine, Piece, enough, measured, results
from ..sampling.run import decode
from ..twinning.twins import Twins, chosen_labels
from .gap import CLASS_MEANS, SAMPLERS
from .kept_twins import kept_twins
from .modes import partition
from .outcomes import Decoder, Outcome, latents
from .release import release_sweep
from .shown import SHOWN, small

Reader = Callable[[Tensor], Mapping[str, Tensor]]
PAIRS, RELEASES = 96, 8
STORED = np.iinfo(np.int32)
"""The whole numbers that a netCDF 3 file holds."""


@dataclass(frozen=True, eq=False)
class Categories(Outcome):
    """Attributes as an `Outcome`: one "band" for each, compared by kappa.

    Attributes:
        read: of images [n, channel, height, width] in [0, 1]; gives [n] whole numbers by name.
        names: of the attributes.

    >>> def parity(x): return {"even": (x[:, 0] % 2).long()}
    >>> x = torch.arange(8.0)[:, None]
    >>> stats = Categories("parity", lambda x: x, None, parity, ("even",)).compare(x, x, [0] * 8)
    >>> float((stats.xy.sum() / stats.xx.sum()).round(6))
    1.0
    """

    read: Reader
    names: tuple[str, ...]

    @property
    def band_names(self) -> tuple[str, ...]:
        """The attributes' names."""
        return self.names

    def compare(self, a: Tensor, b: Tensor, groups: Sequence[int]) -> Agreement:
        """Agreement statistics of finished latents, attribute by attribute, beyond what the label
        and chance give.

        Args:
            a: of the twins A, [pair, channel, height, width].
            b: of the twins B.
            groups: [pair], the labels.

        Returns:
            Agreement: [pair, attribute].
        """
        contrasts = Contrasts(groups, len(a))
        return Agreement.of(
            self.sums(self.modes(a, contrasts), self.modes(b, contrasts), contrasts)
        )

    def modes(self, x: Tensor, contrasts: Contrasts) -> Tensor:  # noqa: ARG002
        """One side of a comparison: the categories, [pair, attribute].

        Args:
            x: finished latents, [pair, channel, height, width].
            contrasts: of the labels.
        """
        return self.categories(x)

    def sums(self, x: Tensor, y: Tensor, contrasts: Contrasts) -> Tensor:
        """The statistics of both sides, [3, pair, attribute].

        A category is a unit vector, so that ⟨x, y⟩ less its label's mean counts agreement beyond
        chance; it is divided by the mean of both variances, since one of them may have none.

        Args:
            x: categories of twin A.
            y: of twin B.
            contrasts: of the labels.
        """
        parts = []
        for one, other in zip(x.T, y.T, strict=True):
            kinds, numbers = torch.unique(torch.cat([one, other]), return_inverse=True)
            units = one_hot(numbers, len(kinds)).double()
            a, b = (contrasts.modes(side, None) for side in units.split([len(one), len(other)]))
            found = sums(a, b)
            # of what never varies rounding is left over
            parts.append(torch.where(found.abs() < 1e-9, 0, found))
        xy, xx, yy = torch.cat(parts, -1)
        return torch.stack([xy, (xx + yy) / 2, (xx + yy) / 2])

    def categories(self, latents: Tensor) -> Tensor:
        """What finished latents [n, ...] are read as, [n, attribute]."""
        return torch.stack(
            list(_read(self.read, self._fields(latents).clone(), self.names).values()), 1
        )


@measured
def attributes(
    model: HookedDiT,
    read: Reader,
    pairs: int = PAIRS,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    releases: int | None = None,
    name: str = "model",
    resamples: int = 400,
    progress: Callable[[int, int], object] | None = None,
    batch: int | None = None,
    labels: Labels | None = None,
    *,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
    """The step at which each attribute of the finished image is decided, beside the bands;
    `dit_lens.report.attributes` shows it.

    Args:
        model: the opened model, with a scheduler.
        read: of images [n, channel, height, width] in [0, 1], such as a classifier; gives a dict:
            for each attribute's name what each image is read as, [n] whole numbers. What does not
            apply, such as the colour of a hat that is not there, is a number of its own.
        pairs: of twins, 16 or more.
        steps: of denoising, 4 or more.
        seed: of the twins and of the bootstrap.
        cut: between the low and the high band, in cycles per pixel of the latents.
        releases: how many steps the clones are released at, chosen where the curves rise; by
            default 8, or all of a shorter run but the first.
        name: of the model, for the sentences.
        resamples: of the pairs.
        progress: called with (done, total) images that have gone through the model once, those of
            clones estimated.
        batch: images that go through the model, or its VAE, at once; None is all.
        labels: one a pair, each two times or more; by default classes or prompts in turn.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: intervals are 95 %.

            `commitment` [attribute, quantity], where the clones' `agreement` [release, attribute]
            passes 1/2, with `commitment_interval` [attribute, quantity, bound]; NaN where it does
            not, as for an attribute that the label decides. `readable` [attribute, quantity],
            where the `read_agreement` [step, attribute] of predicted x0 and finished image does,
            with `_interval`. `lead` [attribute, other], how many steps the other is decided later,
            with `lead_together` [attribute, other, bound], which holds for all at once.
            `band_commitment` [band, quantity] and `split_commitment` [split, quantity], of the
            same clones, with `_interval`.

            `category` [release, twin, pair, attribute], what the finished twins are read as, and
            `agrees` [release, pair, attribute], 1 where they are read alike, 0 where not, NaN where
            all samples of the label are; `end` [release, twin,
            shown, channel, row, column], finished images of the first pairs, at most 128 pixels a
            side.

            Coordinates: `attribute` and `other`, as `read` names them; `release`, the clones'
            steps; `step`, 0 the noisiest; `quantity`, step, time (step / steps) and log_snr;
            `band`, low to high; `split`, low and high; `twin`, A and B; `label` [pair].

            Attributes: `model`, `pairs`, `steps`, `seed`, `cut`, as given; the sentences `title`
            and `headline`, and `notes`, a line for each attribute whose commitment is missing or
            whose interval is cut off.

    Raises:
        InvalidValue: for too few pairs or steps, or if `read` gives anything but whole numbers by
            name, the same names each time.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> def ink(x): return {"heavy": (x.mean((1, 2, 3)) > 0.13).long()}
    >>> found = attributes(model, ink, pairs=16, steps=4, releases=3, resamples=50)
    >>> found.commitment.sizes["attribute"], found.agreement.shape  # [release, attribute]
    (1, (3, 1))
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    arguments.function("read", read, "of images [n, channel, height, width]")
    pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
    steps = arguments.whole("steps", steps, 4, why="to see anything settle in")
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    releases = min(RELEASES, steps - 1) if releases is None else releases
    releases = arguments.whole("releases", releases, 3, steps - 1, "as many as a curve needs")
    arguments.text("name", name)
    resamples = arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    chosen = chosen_labels(model, pairs, labels)
    _, fine, split = partition("radial", model.cfg.pixels, cut)
    names = attribute_names(model, read)
    compared = Categories("attribute", Decoder(model, batch), None, read, names)

    # one run of twins, and clones of it
    run, sweep = 2 * pairs, pairs * steps // 2  # a clone's run is half as long on average
    total = run * steps + releases * sweep

    def count(done: int) -> None:
        if progress is not None:
            progress(done, total)

    pair = kept_twins(
        "twins",
        model,
        pairs,
        chosen,
        steps=steps,
        seed=seed,
        progress=lambda done, _: count(done * run),
        batch=batch,
    )
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    curves = release_sweep(
        pair,
        [compared, latents(fine, "band"), latents(split, "split")],
        releases,
        seed=seed,
        progress=lambda done, _: count(steps * run + done * sweep),
        batch=batch,
        each=lambda release, a, b: ends.update({release: (a, b)}),
    )

    (found,) = results(
        [Piece("what is read at each step", lambda: _read_stats(pair, compared)._asdict())]
    )
    can_be_read = Agreement(**found)
    enough()

    # when they are decided, in which order, and when they can be read
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    decided, readable = (
        fit_commitment(stats, at, curves.log_snr, names=compared.names, what="attribute", **options)
        for stats, at in (
            (curves.statistics("attribute"), curves.releases),
            (can_be_read, range(steps)),
        )
    )
    variables: dict[str, Any] = {
        "agreement": (("release", "attribute"), decided.curve.values),
        "read_agreement": (("step", "attribute"), readable.curve.values),
    }
    for variable, axis, fit in (
        ("commitment", "attribute", decided),
        ("readable", "attribute", readable),
        ("band_commitment", "band", curves.commitment("band", **options)),
        ("split_commitment", "split", curves.commitment("split", **options)),
    ):
        variables[variable] = ((axis, "quantity"), fit.commitment.values)
        variables[f"{variable}_interval"] = (
            (axis, "quantity", "bound"),
            fit.commitment_interval.values,
        )
    variables |= _leads(
        curves.statistics("attribute"), decided, curves.releases, curves.log_snr, options
    )
    variables |= _finished(compared, [ends[r] for r in curves.releases], pair.a.labels.cpu())
    coords = {
        "attribute": list(compared.names),
        "other": list(compared.names),
        "release": list(curves.releases),
        "step": np.arange(steps),
        "log_snr": ("step", curves.log_snr),
        "quantity": ["step", "time", "log_snr"],
        "bound": ["low", "high"],
        "band": list(fine.names),
        "split": list(split.names),
        "twin": ["A", "B"],
        "label": ("pair", pair.a.labels.tolist()),
    }
    result = xr.Dataset(variables, coords)
    for axis in ("pair", "shown", "channel", "row", "column"):
        result = result.assign_coords({axis: np.arange(result.sizes[axis])})
    result.attrs |= {
        "model": name,
        "pairs": pairs,
        "steps": steps,
        "seed": seed,
        "cut": cut,
        "title": f"{name}: attributes of the finished image, {pairs} pairs of twins, {steps} steps "
        f"of {SAMPLERS[pair.run.settings.scheduler]} (eta 1); in steps",
        "notes": "\n".join(
            f"{what}: {line}"
            for what, fit in (("Clones", decided), ("Predicted x0", readable))
            for line in map(str, fit.reason.values)
            if line
        ),
    }
    result.attrs["headline"] = headline(result)
    return Result.of(result)


def attribute_names(model: HookedDiT, read: Reader) -> tuple[str, ...]:
    """What a function reads off a model's images, found out on two grey ones.

    Args:
        model: the opened model.
        read: as for `attributes`.

    Raises:
        InvalidValue: if it gives anything but whole numbers by name.
    """
    return tuple(
        _read(
            read, decode(model, torch.zeros(2, *model.cfg.latent_shape, device=model.device)), None
        )
    )


def headline(results: xr.Dataset) -> str:
    """The order in which attributes are decided, and how much of it is known, in one sentence.

    Args:
        results: of `attributes`.
    """
    name, steps = (results.attrs[key] for key in ("model", "steps"))
    step = results.sel(quantity="step")
    decided = {
        str(a): Estimate.of(
            step.commitment.sel(attribute=a), step.commitment_interval.sel(attribute=a)
        )
        for a in results.attribute.values
    }
    order = sorted(
        (a for a, e in decided.items() if np.isfinite(e.value)), key=lambda a: decided[a].value
    )
    if not order:
        return f"On {name} no attribute is seen to be decided within the run."
    said = ", ".join(f"{a.replace('_', ' ')} {decided[a]:.1f}" for a in order)
    if len(order) == 1:
        return f"On {name} one attribute is decided within the {steps} steps: {said} (95 %)."
    couples = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    told = sum(
        float(results.lead_together.sel(attribute=a, other=b, bound="low")) > 0 for a, b in couples
    )
    return (
        f"On {name} attributes are decided at these steps of {steps}: {said} (95 % each); which of "
        f"two comes first can be told for {told} of {len(couples)} (95 % for all at once)."
    )


# Reading.


def _read(read: Reader, images: Tensor, names: tuple[str, ...] | None) -> dict[str, Tensor]:
    """What images are read as by name, [n] each, checked; the names must be those given."""
    with torch.no_grad():
        found = read(images)
    if not isinstance(found, Mapping) or not found:
        raise InvalidValue(
            f"The attribute function gave {arguments.shown(found)}; expected a dict of one or more "
            "attributes, each [n] whole numbers."
        )
    numbers: dict[str, Tensor] = {}
    for key, values in found.items():
        if not isinstance(key, str) or not key:
            raise InvalidValue(
                f"The attribute function gave the name {key!r}; expected a string that is not "
                "empty."
            )
        given = _integers(values)
        if given is None or given.shape != (len(images),):
            raise InvalidValue(
                f"The attribute function gave {arguments.shown(values)} as {key!r} of "
                f"{len(images)} images; expected a tensor [{len(images)}] of whole numbers."
            )
        unfit = given[(given < STORED.min) | (given > STORED.max)]
        if len(unfit):
            raise InvalidValue(
                f"The attribute function gave {unfit[0]} as {key!r}; expected whole numbers from "
                f"{STORED.min} to {STORED.max}, which results are stored as: number the kinds 0, "
                "1, 2, ..."
            )
        numbers[key] = torch.from_numpy(given.astype(np.int64))
    if names is not None and tuple(found) != names:
        raise InvalidValue(
            f"The attribute function gave {list(found)}, and {list(names)} before; expected the "
            "same attributes each time."
        )
    return numbers


def _integers(values: Any) -> np.ndarray[Any, np.dtype[Any]] | None:
    """What was given as an array of integers or booleans; None for anything else."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_quantized:
            return None
        if values.is_floating_point() or values.is_complex():
            return None
        return values.cpu().numpy()
    return values if isinstance(values, np.ndarray) and values.dtype.kind in "iub" else None


def _read_stats(pair: Twins, compared: Categories) -> Agreement:
    """Predicted x0 against finished image at every step, both twins of a pair added up, [step,
    pair, attribute].
    """
    run = pair.run
    contrasts = Contrasts(run.labels.tolist(), len(run.labels))
    finished = compared.modes(run.latents[-1], contrasts)
    found = [compared.sums(compared.modes(x, contrasts), finished, contrasts) for x in run.x0]
    return Agreement.of(torch.stack(found, 1).unflatten(2, (2, -1)).sum(2))


# What comes out.


def _leads(
    stats: Agreement,
    decided: xr.Dataset,
    releases: tuple[int, ...],
    log_snr: Array,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """How much later each attribute is decided than each other, with intervals for all at once."""
    steps = commitment_draws(stats, releases, log_snr, **options)
    n, rows = steps.shape[1], max(2, stats.independent().xy.shape[1])
    first, second = np.triu_indices(n, 1)
    lead, together = np.zeros((n, n)), np.zeros((n, n, 2))
    apart = steps[:, second] - steps[:, first]
    lead[first, second], lead[second, first] = apart[0], -apart[0]
    if len(first):
        before, after = np.nan_to_num(decided.unresolved.values).T
        ends = simultaneous(apart, rows)
        ends[:, 0] -= before[second] + after[first]
        ends[:, 1] += after[second] + before[first]
        together[first, second], together[second, first] = ends, -ends[:, ::-1]
    unknown = np.isnan(decided.commitment.sel(quantity="step").values)
    lead[unknown, unknown], together[unknown, unknown] = np.nan, np.nan
    return {
        "lead": (("attribute", "other"), lead),
        "lead_together": (("attribute", "other", "bound"), together),
    }


def _finished(
    compared: Categories, ends: list[tuple[Tensor, Tensor]], labels: Tensor
) -> dict[str, Any]:
    """What finished twins are read as, where they agree, and images of the first pairs."""

    def stacked(of: Callable[[Tensor], Tensor]) -> Tensor:  # [release, twin, ...]
        return torch.stack([torch.stack([of(x) for x in both]) for both in ends])

    found = stacked(compared.categories)
    agrees = (found[:, 0] == found[:, 1]).double()
    for label in labels.unique():
        same = found[:, :, labels == label].flatten(0, 2)
        decided = (same == same[0]).all(0)
        agrees[:, (labels == label)[:, None] & decided] = torch.nan
    shown = stacked(lambda x: small(compared.of(x[:SHOWN])))
    return {
        "category": (("release", "twin", "pair", "attribute"), found.int().numpy()),
        "agrees": (("release", "pair", "attribute"), agrees.numpy()),
        "end": (("release", "twin", "shown", "channel", "row", "column"), shown.numpy()),
    }
