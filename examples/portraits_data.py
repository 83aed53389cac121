"""Make the templates that portraits are drawn from, and check them against DiceBear's own avatars.

    python examples/portraits_data.py

Installs the pinned npm packages into `--work` (Node 18 or later), renders each variant of each part
once, writes `dit_lens/groundtruth/portraits.npz`, and then renders `--check` whole avatars with
factors drawn at random: every pixel must be the one that `dit_lens.groundtruth.portraits.draw`
gives. The drawings are DiceBear's style `pixel-art` (CC0). Takes about half a minute.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_lens.groundtruth import portraits
from dit_lens.groundtruth.portraits import FACTORS, FIRST_HAT, HEAD_KIND, HEADS, VARIANTS

PACKAGES = ("@dicebear/core@9.4.3", "@dicebear/pixel-art@9.4.3", "@resvg/resvg-js@2.6.2")
Pixels = NDArray[np.uint8]
Options = dict[str, object]

# Nothing but a face; one colour each for eyes, mouth and glasses.
BARE: Options = {
    "seed": "",
    **{part: [] for part in ("hair", "eyes", "mouth", "clothing")},
    **{f"{part}Probability": 0 for part in ("glasses", "beard", "hat", "accessories")},
    "eyesColor": ["2b2b6b"],
    "glassesColor": ["191919"],
    "mouthColor": ["de0f0d"],
}


def render(options: Sequence[Options], work: Path) -> Pixels:
    """DiceBear's avatars with these options, [n, 16, 16, 4]."""
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(
        ["node", str(script), str(work.resolve())],
        input=json.dumps([{**BARE, **o} for o in options]).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 16, 16, 4)


def head(variant: int) -> Options:
    """The options that put this variant of `head` on."""
    kind = HEADS[HEAD_KIND[variant]]
    if kind == "none":
        return {}
    return {kind: [VARIANTS["head"][variant]], f"{kind}Probability": 100}


def painted(options: Sequence[Options], beneath: Sequence[str], work: Path) -> Pixels:
    """What a part paints, [n, 16, 16, 4]: its colour, and 1 where it is opaque. It is opaque where
    a pixel stays the same whatever the colour of the layers beneath (`beneath`, names of options).
    """
    first, second = (
        render([{**o, **{name: [color] for name in beneath}} for o in options], work)
        for color in ("00ff00", "ff00ff")
    )
    own = (first == second).all(-1, keepdims=True)
    return np.concatenate([first[..., :3] * own, own.astype(np.uint8)], -1)


def templates(work: Path) -> dict[str, Pixels]:
    """The arrays of portraits.npz."""
    size = {name: len(variants) for name, variants in VARIANTS.items()}

    def sheet(part: str, color: str) -> Pixels:
        options: list[Options] = [
            {part: [v], f"{part}Color": [c]}
            for v, c in product(VARIANTS[part], VARIANTS[f"{part}_color"])
        ]
        found = painted(options, ("backgroundColor", "skinColor"), work)
        return found.reshape(size[part], size[color], 16, 16, 4)

    # Faces whole, for glasses and beard are translucent
    faces: list[Options] = [
        {"skinColor": [s], "hairColor": [h], "eyes": [e], "mouth": [m], **head(i)}
        for s, h, e, m, i in product(
            VARIANTS["skin"],
            VARIANTS["hair_color"],
            VARIANTS["eyes"],
            VARIANTS["mouth"],
            range(FIRST_HAT),
        )
    ]
    shape = (size["skin"], size["hair_color"], size["eyes"], size["mouth"], FIRST_HAT)
    hats: list[Options] = [
        {**head(i), "hatColor": [c]}
        for i, c in product(range(FIRST_HAT, size["head"]), VARIANTS["hat_color"])
    ]
    return {
        "face": painted(faces, ("backgroundColor",), work).reshape(*shape, 16, 16, 4),
        "painters": painters(faces[: int(np.prod(shape[2:]))], work).reshape(*shape[2:], 16, 16),
        "clothing": sheet("clothing", "clothing_color"),
        "hair": sheet("hair", "hair_color"),
        "hat": painted(hats, ("backgroundColor", "skinColor"), work).reshape(
            -1, size["hat_color"], 16, 16, 4
        ),
    }


def painters(faces: Sequence[Options], work: Path) -> Pixels:
    """Which part is seen at each pixel of a face, [n, 16, 16]: 0 skin, 1 eyes, 2 glasses or beard,
    3 mouth. It is the last one without which the pixel would be another.
    """
    whole = render(faces, work)
    found = np.zeros(whole.shape[:3], np.uint8)
    for number, without in (
        (1, {"eyes": []}),
        (2, {f"{kind}Probability": 0 for kind in HEADS[1:]}),
        (3, {"mouth": []}),
    ):
        found[(render([{**o, **without} for o in faces], work) != whole).any(-1)] = number
    return found


def whole_avatar(row: Sequence[int]) -> Options:
    """The options of the avatar with these factors."""
    at = dict(zip(FACTORS, row, strict=True))
    variant = {name: [VARIANTS[name][i]] for name, i in at.items() if i >= 0}
    return {
        "backgroundColor": variant["background"],
        "skinColor": variant["skin"],
        "hair": variant["hair"],
        "hairColor": variant["hair_color"],
        "eyes": variant["eyes"],
        "mouth": variant["mouth"],
        "clothing": variant["clothing"],
        "clothingColor": variant["clothing_color"],
        **head(at["head"]),
        **({"hatColor": variant["hat_color"]} if at["hat_color"] >= 0 else {}),
    }


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--work", type=Path, default=Path("portraits-run"), help="gets node_modules/")
    ap.add_argument("--check", type=int, default=1_000, help="whole avatars rendered to compare")
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(args.work)]
        + list(PACKAGES),
        check=True,
    )

    made: dict[str, Any] = templates(args.work)
    np.savez_compressed(portraits.TEMPLATES, **made)
    print(f"{portraits.TEMPLATES}: {portraits.TEMPLATES.stat().st_size:,} bytes")

    factors = portraits.random_factors(args.check, args.seed)
    rendered = render([whole_avatar(row) for row in factors.tolist()], args.work)
    drawn = (portraits.draw(factors) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    same = int((rendered[..., :3] == drawn).all((1, 2, 3)).sum())
    print(f"{same} of {args.check} avatars are drawn as DiceBear renders them, bit for bit")
    if same < args.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
