"""Pixel-art portraits whose every part is known: drawn from their factors, and read back exactly.

A portrait is one of 248,832 avatars of DiceBear's style `pixel-art` (drawings CC0), 16x16 pixels in
colour. It is made of ten factors (`VARIANTS`): colours of background, skin, hair and clothing, the
shapes of hair, eyes, mouth and clothing, and what is on the head, with its colour if it is a hat.
Layers cover one another as in the style: background, skin, eyes, glasses, beard, mouth, clothing,
hair, hat. Glasses and beard let through what is beneath them, so faces are stored whole, with what
is on them; all other layers are opaque.

The reader learns nothing. An image is read as the nearest of all avatars, and each factor of that
avatar is then judged by the pixels it has a say in:

- *Tolerance*. A pixel whose colour is farther than `TOLERANCE` from the avatar's (root mean square
  over its channels, on a scale from 0 to 1) is wrong. It is put down to the factor of which another
  variant would explain it, or, where none does, to the part that is painted there.
- *Margin*. On the line from the avatar (0) to the one that differs from it in this factor alone
  (1), the image must lie below `MARGIN`, for every other variant of the factor. Wrong pixels are
  left out of this.

An image with no wrong factor is an avatar. Both limits were fixed before there was a model to read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidType, InvalidValue

TEMPLATES = Path(__file__).with_name("portraits.npz")
MARGIN = 0.35
TOLERANCE = 0.2

# What each factor can be, in the order of its numbers. Parts have the names of DiceBear's style
# `pixel-art`; colours are written as there.
VARIANTS: dict[str, tuple[str, ...]] = {
    "background": ("f5f5f5", "7cc0ee", "4a4a55", "f58a8a"),
    "skin": ("ffe0bd", "b5654a", "5a3424"),
    "hair": ("short01", "short14", "short15", "long13", "long17", "long21"),
    "hair_color": ("009bbd", "91cb15", "9b5de5", "ff8c1a"),
    "eyes": ("variant07", "variant08", "variant09"),
    "mouth": ("happy09", "happy12", "sad01"),
    "head": ("none", "light07", "light02", "variant05", "variant06", "variant07"),
    "hat_color": ("a62116", "2663a3"),
    "clothing": ("variant05", "variant12", "variant22"),
    "clothing_color": ("2746c8", "00b159", "d11141", "ffc425"),
}
FACTORS = tuple(VARIANTS)
HEADS = ("none", "glasses", "beard", "hat")
HEAD_KIND = (0, 1, 1, 2, 3, 3)  # which of HEADS each variant of `head` is
FIRST_HAT = HEAD_KIND.index(3)
CLASSES = tuple(
    f"{length} hair" + (f", {head}" if head != "none" else "")
    for length in ("short", "long")
    for head in HEADS
)

_AT = {name: i for i, name in enumerate(FACTORS)}
# Every single variant, as columns and what goes into them: a hat comes with its colour.
_CHANGES: list[tuple[str, dict[str, int]]] = [
    (name, {name: i})
    for name, variants in VARIANTS.items()
    for i in range(len(variants))
    if not (name == "head" and i >= FIRST_HAT)
] + [
    ("head", {"head": i, "hat_color": color})
    for i in range(FIRST_HAT, len(HEAD_KIND))
    for color in range(len(VARIANTS["hat_color"]))
]
_CHANGED = torch.tensor([_AT[name] for name, _ in _CHANGES])
# What the stored numbers of a face's painters mean.
_FACE_PAINTERS = ("skin", "eyes", "head", "mouth")


@dataclass(frozen=True)
class Reading:
    """What `read` found in images.

    Args:
        factors: the nearest avatar's factors, [n, 10], columns as in `FACTORS`; `hat_color` is -1
            where there is no hat.
        legal: whether each factor is what it is read as, [n, 10].
        distances: how far the image is from the nearest avatar with each single variant put in its
            place, root mean square over pixels and channels, [n, 40]: the reader's features.
    """

    factors: Tensor
    legal: Tensor
    distances: Tensor

    @property
    def is_avatar(self) -> Tensor:
        """Whether every factor is legal, [n]."""
        return self.legal.all(1)

    @property
    def labels(self) -> Tensor:
        """The class that each image is read as, [n], legal or not."""
        return labels(self.factors)

    def names(self, i: int) -> dict[str, str]:
        """The factors of image `i` by name; without `hat_color` where there is no hat.

        >>> read(draw(random_factors(1))).names(0)["hair"]
        'long13'
        """
        row = self.factors[i].tolist()
        return {name: VARIANTS[name][v] for name, v in zip(FACTORS, row, strict=True) if v >= 0}

    def wrong(self, i: int) -> list[str]:
        """The factors of image `i` that are not legal; empty if it is an avatar.

        >>> read(draw(random_factors(1))).wrong(0)
        []
        """
        return [name for name, ok in zip(FACTORS, self.legal[i].tolist(), strict=True) if not ok]


def random_factors(n: int, seed: int = 0) -> Tensor:
    """Factors of portraits drawn at random, [n, 10], columns as in `FACTORS`.

    Every factor is uniform and independent of the others, but for `head`: nothing, glasses, a beard
    or a hat with probability 1/4 each, then which glasses or hat. `hat_color` is -1 without a hat.

    >>> random_factors(2).shape
    torch.Size([2, 10])

    Args:
        n: how many.
        seed: of the draw.

    Returns:
        int64.
    """
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(len(VARIANTS[name]), size=n) for name in FACTORS], 1)
    kind, pick = rng.integers(len(HEADS), size=n), rng.random(n)
    which = [np.flatnonzero(np.array(HEAD_KIND) == k) for k in range(len(HEADS))]
    for k, of_kind in enumerate(which):
        here = kind == k
        factors[here, _AT["head"]] = of_kind[(pick[here] * len(of_kind)).astype(int)]
    factors[factors[:, _AT["head"]] < FIRST_HAT, _AT["hat_color"]] = -1
    return torch.from_numpy(factors)


def labels(factors: Tensor) -> Tensor:
    """The class of each portrait, [n], an index of `CLASSES`: length of hair x what is on the head.

    >>> CLASSES[int(labels(random_factors(1))[0])]
    'long hair, beard'

    Args:
        factors: [n, 10].

    Returns:
        int64.
    """
    long = torch.tensor([name.startswith("long") for name in VARIANTS["hair"]])
    kind = torch.tensor(HEAD_KIND)
    return len(HEADS) * long[factors[:, _AT["hair"]]] + kind[factors[:, _AT["head"]]]


def draw(factors: Tensor) -> Tensor:
    """The portraits with these factors, [n, 3, 16, 16] in [0, 1], bit for bit DiceBear's own.

    >>> draw(random_factors(2)).shape
    torch.Size([2, 3, 16, 16])

    Args:
        factors: [n, 10], columns as in `FACTORS`.

    Returns:
        float32, multiples of 1/255.

    Raises:
        InvalidValue: a factor has no such variant.
    """
    _check_factors(factors)
    x = _background()[factors[:, _AT["background"]]].expand(-1, 16, 16, -1)
    for layer in _layers(factors):
        x = torch.where(layer[..., 3:] > 0, layer[..., :3], x)
    return x.permute(0, 3, 1, 2).float() / 255


def read(images: Tensor, batch: int = 200) -> Reading:
    """Each image's factors, and which of them are wrong.

    >>> factors = random_factors(3)
    >>> bool((read(draw(factors)).factors == factors).all())
    True

    Args:
        images: [n, 3, 16, 16] in [0, 1].
        batch: how many are judged at once; only memory depends on it.

    Returns:
        A `Reading`.

    Raises:
        InvalidType: `images` is not a tensor.
        InvalidValue: another shape, or values outside [0, 1].
    """
    images = _checked(images)
    if not len(images):
        none = torch.zeros(0, len(FACTORS))
        return Reading(none.long(), none.bool(), torch.zeros(0, len(_CHANGES)))
    parts = [_judge(x, _settle(x, _nearest(x))) for x in images.split(batch)]
    return Reading(
        *(torch.cat([getattr(p, key) for p in parts]) for key in ("factors", "legal", "distances"))
    )


def attributes(images: Tensor) -> dict[str, Tensor]:
    """What each image is read as, factor by factor and whether legal or not: for
    `dit_lens.experiments.attributes`.

    Unlike `read` it judges nothing: every image has a nearest avatar, also a blurred one.

    >>> attributes(draw(random_factors(2)))["head"]
    tensor([1, 5])

    Args:
        images: [n, 3, 16, 16] in [0, 1].

    Returns:
        [n] for each of `FACTORS`, an index of its variants; `hat_color` is -1 without a hat.

    Raises:
        InvalidType: `images` is not a tensor.
        InvalidValue: another shape, or values outside [0, 1].
    """
    images = _checked(images)
    parts = [torch.zeros(0, len(FACTORS), dtype=torch.long)]
    parts += [_settle(x, _nearest(x)) for x in images.split(200) if len(x)]
    return dict(zip(FACTORS, torch.cat(parts).T, strict=True))


def _checked(images: Tensor) -> Tensor:
    """The images as the reader takes them."""
    if not isinstance(images, Tensor):
        raise InvalidType(f"images is a {type(images).__name__}; read needs a torch.Tensor.")
    if images.ndim != 4 or images.shape[1:] != (3, 16, 16):
        raise InvalidValue(f"images has shape {tuple(images.shape)}; portraits are [n, 3, 16, 16].")
    images = images.detach().float().cpu()
    if not bool(((images >= -1e-4) & (images <= 1 + 1e-4)).all()):
        raise InvalidValue(
            f"images goes from {float(images.min()):.3g} to {float(images.max()):.3g}; "
            "read needs values in [0, 1], as in `run.images`."
        )
    return images


def _nearest(x: Tensor) -> Tensor:
    """The factors of the nearest of all avatars. Clothing meets no hair and nothing of the head, so
    what is nearest at its pixels and what is nearest elsewhere are found apart, for each background
    and skin.
    """
    avatars = _all_avatars()
    flat = x.flatten(1)
    distance = {}
    for part in ("top", "clothing"):
        pixels, size = avatars[f"{part}_pixels"], avatars[f"{part}_norm"]
        # |x - a|² but for |x|², which is the same for every avatar
        distance[part] = size - 2 * flat[:, avatars[f"{part}_at"]] @ pixels.T
    grounds = len(VARIANTS["background"]) * len(VARIANTS["skin"])
    clothed, clothing = distance["clothing"].view(len(x), grounds, -1).min(-1)
    total = distance["top"].view(len(x), grounds, -1) + clothed[..., None]
    best = total.flatten(1).argmin(1)
    ground = best // total.shape[-1]
    found = avatars["top_factors"][best].clone()
    chosen = clothing.gather(1, ground[:, None])[:, 0]
    columns = [_AT["clothing"], _AT["clothing_color"]]
    found[:, columns] = avatars["clothing_factors"][chosen][:, columns]
    return found


def _settle(x: Tensor, factors: Tensor) -> Tensor:
    """From the nearest avatar, one factor changed at a time, to one that more of the pixels agree
    with: a pixel beyond the tolerance counts as much as one at it. So hair of two colours is read
    as one of the two, and not as a third between them.
    """
    left = torch.arange(len(x))
    while len(left):
        here = factors[left]
        error = (x[left, None] - _one_changed(here)).square().mean(2)
        cost, change = error.clamp(max=TOLERANCE**2).sum((2, 3)).min(1)
        now = (x[left] - draw(here)).square().mean(1).clamp(max=TOLERANCE**2).sum((1, 2))
        better = cost < now - 1e-4
        left = left[better]
        for k in change[better].unique().tolist():
            rows = left[change[better] == k]
            factors[rows] = _changed(factors[rows], _CHANGES[k][1])
    return factors


def _judge(x: Tensor, factors: Tensor) -> Reading:
    avatar, other = draw(factors), _one_changed(factors)
    step = other - avatar[:, None]
    error = x - avatar

    # The tolerance: wrong pixels, and whose they are
    off = error.square().mean(1).sqrt() > TOLERANCE
    apart = (x[:, None] - other).square().mean(2).sqrt()
    changes = step.abs().amax(2) > 0
    nearest, by = apart.masked_fill(~changes, torch.inf).min(1)
    owner = torch.where(nearest <= TOLERANCE, _CHANGED[by], _painters(factors))

    # The margin: how far along the way to each other variant, at the pixels that are not wrong
    clear = ~off[:, None, None]
    length = (step * clear).square().sum((2, 3, 4))
    along = (step * clear * error[:, None]).sum((2, 3, 4)) / length.clamp(min=1e-12)
    enough = length > 0.25 * step.square().sum((2, 3, 4))
    crossed = (along >= MARGIN) & enough

    legal = torch.ones(len(x), len(FACTORS), dtype=torch.bool)
    for f in range(len(FACTORS)):
        legal[:, f] = ~crossed[:, _CHANGED == f].any(1) & ~(off & (owner == f)).any((1, 2))
    return Reading(factors, legal, apart.square().mean((2, 3)).sqrt())


def _one_changed(factors: Tensor) -> Tensor:
    """The avatars with each single variant put in its place, [n, 40, 3, 16, 16]."""
    rows = torch.stack([_changed(factors, change) for _, change in _CHANGES], 1)
    return draw(rows.flatten(0, 1)).view(len(factors), len(_CHANGES), 3, 16, 16)


def _changed(factors: Tensor, change: dict[str, int]) -> Tensor:
    """The factors with one variant put in its place."""
    changed = factors.clone()
    for key, value in change.items():
        changed[:, _AT[key]] = value
    hat = changed[:, _AT["head"]] >= FIRST_HAT
    bare = torch.full_like(hat, -1, dtype=torch.long)
    changed[:, _AT["hat_color"]] = torch.where(hat, changed[:, _AT["hat_color"]], bare)
    return changed


def _painters(factors: Tensor) -> Tensor:
    """The factor whose part is seen at each pixel, [n, 16, 16]."""
    face, clothing, hair, hat = _layers(factors)
    owner = torch.full((len(factors), 16, 16), _AT["background"])
    of_face = torch.tensor([_AT[name] for name in _FACE_PAINTERS])
    f = factors.T
    bare = torch.where(f[_AT["head"]] >= FIRST_HAT, 0, f[_AT["head"]])
    painters = _templates()["painters"][f[_AT["eyes"]], f[_AT["mouth"]], bare].long()
    owner = torch.where(face[..., 3] > 0, of_face[painters], owner)
    for layer, name in ((clothing, "clothing"), (hair, "hair"), (hat, "head")):
        owner = torch.where(layer[..., 3] > 0, _AT[name], owner)
    return owner


def _layers(factors: Tensor) -> Iterator[Tensor]:
    """Face, clothing, hair and hat, each [n, 16, 16, 4] uint8, its last channel 1 where it
    paints.
    """
    f, parts = dict(zip(FACTORS, factors.T, strict=True)), _templates()
    hat = f["head"] >= FIRST_HAT
    bare = torch.where(hat, 0, f["head"])
    yield parts["face"][f["skin"], f["hair_color"], f["eyes"], f["mouth"], bare]
    yield parts["clothing"][f["clothing"], f["clothing_color"]]
    yield parts["hair"][f["hair"], f["hair_color"]]
    on = parts["hat"][(f["head"] - FIRST_HAT).clamp(min=0), f["hat_color"].clamp(min=0)]
    yield on * hat[:, None, None, None]


@functools.cache
def _templates() -> dict[str, Tensor]:
    with np.load(TEMPLATES) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


@functools.cache
def _background() -> Tensor:
    colors = [list(bytes.fromhex(color)) for color in VARIANTS["background"]]
    return torch.tensor(colors, dtype=torch.uint8)[:, None, None]


@functools.cache
def _all_avatars() -> dict[str, Tensor]:
    """All portraits, their clothing apart from the rest: for each part its factors, which of the
    768 values are its own, these values and their squared norm.
    """
    clothes = (_templates()["clothing"][..., 3] > 0).any(0).any(0)
    own = clothes.expand(3, -1, -1).flatten()
    heads = [(i, -1) for i in range(FIRST_HAT)] + [
        (i, color)
        for i in range(FIRST_HAT, len(HEAD_KIND))
        for color in range(len(VARIANTS["hat_color"]))
    ]
    found: dict[str, Tensor] = {}
    for part, names, at in (
        ("top", ("hair", "hair_color", "eyes", "mouth"), ~own),
        ("clothing", ("clothing", "clothing_color"), own),
    ):
        axes = [torch.arange(len(VARIANTS[name])) for name in ("background", "skin", *names)]
        axes += [torch.arange(len(heads) if part == "top" else 1)]
        grid = torch.cartesian_prod(*axes)
        factors = torch.zeros(len(grid), len(FACTORS), dtype=torch.long)
        for column, name in zip(grid.T, ("background", "skin", *names), strict=False):
            factors[:, _AT[name]] = column
        factors[:, [_AT["head"], _AT["hat_color"]]] = torch.tensor(heads)[grid[:, -1]]
        pixels = draw(factors).flatten(1)[:, at]
        found |= {
            f"{part}_factors": factors,
            f"{part}_at": at,
            f"{part}_pixels": pixels,
            f"{part}_norm": pixels.square().sum(1),
        }
    return found


def _check_factors(factors: Tensor) -> None:
    if factors.ndim != 2 or factors.shape[1] != len(FACTORS):
        raise InvalidValue(
            f"factors has shape {tuple(factors.shape)}; expected [n, {len(FACTORS)}], one column "
            "for each of `FACTORS`."
        )
    hat = factors[:, _AT["head"]] >= FIRST_HAT
    for name, column in zip(FACTORS, factors.T, strict=True):
        low = -1 if name == "hat_color" else 0
        bad = (column < low) | (column >= len(VARIANTS[name]))
        if name == "hat_color":
            bad |= hat != (column >= 0)
        if bool(bad.any()):
            raise InvalidValue(
                f"factors has {name} {int(column[bad][0])} in row {int(bad.nonzero()[0, 0])}; it "
                f"goes from 0 to {len(VARIANTS[name]) - 1}"
                + (", and is -1 without a hat." if name == "hat_color" else ".")
            )
