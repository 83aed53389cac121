"""What counts as a fault: a score of images, of which `at` and more is one.

A score can be given as a function of images, as a place on the image, as a band of frequencies, or
by name for the bundled models. Of a place or band it is how like the bad image another one is
there: 1 if it is the same, 0 if it is as far as images of that label usually are from one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import arguments
from ...errors import InvalidValue
from ...groundtruth import digits, portraits
from ...measures import Array
from ...measures.bands import Bands
from ...model.hooked import HookedDiT
from ...sampling.run import decode

AT = 0.5
EXPECTED = (
    "a function of images [n, c, h, w], a mask [h, w] of them, (Bands of them, a band), or a name"
)
DIGITS = ("read as another digit",)
PORTRAITS = ("no legal avatar", *portraits.FACTORS)
Given = Callable[[Tensor], Any] | Tensor | tuple[Bands, int | str] | str


@dataclass(frozen=True, eq=False)
class Fault:
    """A score of images.

    Attributes:
        name: in words.
        of: images [n, c, h, w] in [0, 1] to scores [n].
        at: this score or more is a fault.
        mask: where on the image the fault is, [h, w]; None is anywhere.
        band: (bands, number) of the image that the fault is in; None is any.
        own: whether it is told by its likeness to one image, so that it says nothing of others.
    """

    name: str
    of: Callable[[Tensor], Any] = field(repr=False)
    at: float = AT
    mask: Tensor | None = field(default=None, repr=False)
    band: tuple[Bands, int] | None = field(default=None, repr=False)
    own: bool = False

    def scores(self, images: Tensor) -> Array:
        """The score of each image, [n].

        Args:
            images: [n, c, h, w] in [0, 1].

        Raises:
            InvalidValue: for a function that gives anything but n finite numbers.
        """
        with torch.no_grad():
            found = self.of(images.clone())  # it may work in place
        try:
            values = np.asarray(torch.as_tensor(found).detach().cpu()).astype(np.float64)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidValue(
                f"The fault's score gave {arguments.shown(found)} for {len(images)} images; "
                f"expected {len(images)} numbers."
            ) from None
        if values.shape != (len(images),):
            raise InvalidValue(
                f"The fault's score gave shape {list(values.shape)} for {len(images)} images; "
                f"expected [{len(images)}], one number an image."
            )
        if not np.isfinite(values).all():
            raise InvalidValue(
                f"The fault's score is {values[~np.isfinite(values)][0]} for one of {len(images)} "
                "images; expected finite numbers."
            )
        return values

    def bad(self, scores: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which scores are those of a fault.

        Args:
            scores: of images.
        """
        found: np.ndarray[Any, np.dtype[np.bool_]] = np.asarray(scores) >= self.at
        return found

    def part(self, x: Tensor) -> Tensor:
        """Images, or their differences, where the fault is: within its mask and band.

        Args:
            x: [n, c, h, w].
        """
        if self.band is not None:
            x = self.band[0].project(x, self.band[1])
        return x if self.mask is None else x * self.mask.to(x)

    def rest(self, x: Tensor) -> Tensor:
        """The same where the fault is not; without mask and band all of it.

        Args:
            x: [n, c, h, w].
        """
        return x if self.mask is None and self.band is None else x - self.part(x)


class Images:
    """Latents as images, and how many of them.

    Args:
        model: whose latents they are.
        batch: so many go through a VAE at once.
    """

    def __init__(self, model: HookedDiT, batch: int | None) -> None:
        self.model, self.batch = model, batch

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [n, c, h, w] in [0, 1]."""
        return decode(self.model, latents, self.batch)


def check_fault(fault: Any, model: HookedDiT, at: Any) -> float:
    """Refuse what is no fault, before anything is run; gives the threshold.

    Args:
        fault: as `diagnose` takes it.
        model: of the run.
        at: the threshold.

    Raises:
        InvalidValue: for a name that this model's images have no reader for, and more.
        InvalidType: for what is none of the kinds.
    """
    at = arguments.number("at", at)
    if isinstance(fault, str):
        known = names_of(model)
        if not known:
            raise InvalidValue(
                f"fault={fault!r} is a name, and only the bundled models have those; expected "
                f"{EXPECTED.removesuffix(', or a name')}."
            )
        arguments.choice("fault", fault, known)
    elif isinstance(fault, Tensor):
        if fault.ndim != 2 or fault.dtype != torch.bool or not bool(fault.any()):
            raise arguments.refusal("fault", fault, "a mask [h, w] of bool, true somewhere")
    elif isinstance(fault, tuple):
        if len(fault) != 2 or not isinstance(fault[0], Bands):
            raise arguments.refusal("fault", fault, EXPECTED, wrong_type=True)
        fault[0].number(fault[1])
    else:
        arguments.function("fault", fault, "of images [n, c, h, w], a mask, a band, or a name")
    return at


def names_of(model: HookedDiT) -> tuple[str, ...]:
    """The faults that are known by name for images of this kind."""
    if model.vae is not None or tuple(model.cfg.pixels) != (16, 16):
        return ()
    shape, classes = tuple(model.cfg.latent_shape), model.cfg.n_classes
    if shape == (1, 16, 16) and classes == 10:
        return DIGITS
    if shape == (3, 16, 16) and classes == len(portraits.CLASSES):
        return PORTRAITS
    return ()


def made(fault: Given, at: float, label: int, bad: Tensor, others: Tensor) -> Fault:
    """The fault as a score.

    Args:
        fault: as it was given, checked.
        at: the threshold.
        label: of the run.
        bad: the bad images, [n, c, h, w].
        others: of other seeds, [m, c, h, w].

    Raises:
        InvalidValue: for a mask or bands of another size than the images.
    """
    side = (bad.shape[-2], bad.shape[-1])
    if isinstance(fault, str):
        return _named(fault, at, label)
    if isinstance(fault, Tensor):
        if tuple(fault.shape) != side:
            raise InvalidValue(
                f"The mask is {fault.shape[0]}x{fault.shape[1]}; expected the images' "
                f"{side[0]}x{side[1]}."
            )
        own = Fault("what the mask covers", len, at, mask=fault.clone(), own=True)
        return _likeness(own, bad, others)
    if isinstance(fault, tuple):
        bands, b = fault[0], fault[0].number(fault[1])
        if bands.grid != side:
            raise InvalidValue(
                f"The fault's bands are of a {bands.grid[0]}x{bands.grid[1]} grid; expected the "
                f"images' {side[0]}x{side[1]}."
            )
        own = Fault(f"the band {bands.names[b]!r}", len, at, band=(bands, b), own=True)
        return _likeness(own, bad, others)
    return Fault(getattr(fault, "__name__", "the score"), fault, at)


def _likeness(fault: Fault, bad: Tensor, others: Tensor) -> Fault:
    """A fault that is told by its likeness to the bad image."""
    away = fault.part(others - bad[:1]).square().flatten(1).sum(1).mean()
    if not float(away) > 0:
        raise InvalidValue(
            f"In {fault.name} the images of all seeds are the same; expected a place or band in "
            "which they differ."
        )

    def score(images: Tensor) -> Tensor:
        apart = [fault.part(images - b.to(images)).flatten(1).square().sum(1) for b in bad]
        return 1 - torch.stack(apart).amin(0) / away

    return Fault(fault.name, score, fault.at, fault.mask, fault.band, own=True)


def _named(name: str, at: float, label: int) -> Fault:
    if name in DIGITS:

        def misread(images: Tensor) -> Tensor:
            chances = digits.read(images)
            own = chances[:, label].clone()
            chances[:, label] = 0
            return (1 + chances.amax(1) - own) / 2

        return Fault(name, misread, at)

    def illegal(images: Tensor) -> Tensor:
        legal = portraits.read(images.clamp(0, 1)).legal
        if name in portraits.FACTORS:
            return (~legal[:, portraits.FACTORS.index(name)]).float()
        return (~legal.all(1)).float()

    return Fault(name if name == PORTRAITS[0] else f"an illegal {name}", illegal, at)


def check_score(fault: Fault, given: Given, bad: Array, others: Array, images: Tensor) -> None:
    """Refuse a run without the fault, and a score that tells nothing apart.

    Args:
        fault: the score.
        given: as the user gave it. One by name does tell images apart, though not odd ones.
        bad: of the run.
        others: of other seeds, and of a good run.
        images: of other seeds.

    Raises:
        InvalidValue: in one sentence.
    """
    if not fault.bad(bad).all():
        raise InvalidValue(
            f"The run does not have the fault by its own score: {fault.name} is {bad.min():.3g}, "
            f"and {fault.at:g} or more is a fault; expected a run that has it, or another at=."
        )
    if not isinstance(given, str) and np.ptp(np.concatenate([bad, others])) == 0:
        draw = torch.Generator().manual_seed(0)
        odd = torch.stack([torch.zeros_like(images[0]), torch.ones_like(images[0])])
        drawn = torch.rand(images.shape, generator=draw).to(images)
        seen = fault.scores(torch.cat([odd, drawn]))
        if np.ptp(np.concatenate([seen, bad])) == 0:
            raise InvalidValue(
                f"The fault's score is constant, {bad[0]:.3g} for every image that was tried; "
                "expected one that tells images apart."
            )
