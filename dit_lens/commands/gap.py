"""Measure the synchronization gap, by band and layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue, MissingFile
from . import attributes, cost, patch
from .common import (
    Answer,
    add_device,
    add_labels,
    add_model,
    add_quick,
    add_seed,
    add_size,
    batch_of,
    calibrating,
    existing,
    frequency,
    labels_of,
    open_model,
    progress_bar,
    sizes,
    stored,
    strength,
)
from .keeping import add_store, keeping
from .users_code import of_the_users

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.hooked import HookedDiT

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEEP = ("I", "F")
"""How the modes of pictures with more than 8 bits begin, which Pillow would cut at 255."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.gap` takes; --couple, --causes and --attributes do
    more.
    """
    add_model(parser)
    add_quick(parser, pairs=(48, 16), steps=(50, 25), fewest=(16, 4))
    add_seed(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel and per token (default: 0.25)",
    )
    parser.add_argument(
        "--bands",
        choices=["radial", "dct", "pooling", "eigen"],
        default="radial",
        help="what the bands are made of (default: radial; --couple and --causes stay radial)",
    )
    parser.add_argument(
        "--couple",
        type=strength,
        nargs="+",
        metavar="G",
        help="also couple twins with these strengths, such as 0 0.5 1",
    )
    parser.add_argument(
        "--causes",
        action="store_true",
        help="also what `dit-lens patch` does: the layers that cause the gap",
    )
    parser.add_argument(
        "--null",
        type=nulls,
        default=0,
        metavar="N",
        help="hold the profiles over depth against N models with the same layers in another order, "
        "19 or more (default: none, and no claim about depth)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="of the data, in place of the model's own samples, for the gap that their spectrum "
        "makes: a folder of pictures, one subfolder a class, or an array [n, channel, height, "
        "width] in [0, 1] as .npy",
    )
    parser.add_argument(
        "--attributes",
        nargs="?",
        const=attributes.OWN,
        metavar="FUNCTION",
        help="also when each attribute is decided that a function reads off the images: that of "
        f"the bundled model ({', '.join(attributes.BUNDLED)}), or {attributes.EXPECTED}",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="without clones, in a third of the time: the behaviour as an exact denoiser has it",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it would cost, and run nothing else"
    )
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for pictures and results (default: gap-MODEL)"
    )


def nulls(text: str) -> int:
    """An argparse type: how many null models, 0 or as many as a p-value needs.

    >>> nulls("19")
    19

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdigit() or 0 < int(text) < 19:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected 0, for no claim about depth, or 19 or more"
        )
    return int(text)


def check(args: argparse.Namespace) -> None:
    """Files that are not there."""
    labels_of(args)
    if args.images is not None:
        existing(args.images, "a folder of pictures, or an array as .npy")


def run(args: argparse.Namespace) -> Answer:
    """Measure, print, draw and store; then the coupling sweep and the causes, if asked for."""
    from ..experiments.attributes import attribute_names
    from ..experiments.cost import gap_cost
    from ..experiments.coupling_sweep import checked_steps, checked_strengths
    from ..experiments.null_profiles import checked_nulls
    from ..storage import file_name, try_folder

    pairs, steps = sizes(args)
    if args.couple is not None:
        checked_strengths(args.couple)  # before minutes are spent
        checked_steps(steps)
    checked_nulls(args.null)
    images, of_images = read_images(args.images) if args.images else (None, None)
    read = args.attributes and attributes.find(args.attributes, str(args.model))
    out = args.out or Path(f"gap-{file_name(str(args.model))}")
    labels = labels_of(args)
    if not args.dry_run:
        try_folder(out)  # as well
    model = open_model(args)
    if read:
        with of_the_users(read):
            attribute_names(model, read)  # as well
    batch = batch_of(args, model, 2 * pairs)
    with calibrating() if args.dry_run else nullcontext() as progress:
        planned = gap_cost(
            model,
            pairs,
            steps,
            batch=batch,
            clones=not args.one_pass,
            calibrate=args.dry_run,
            progress=progress,
        )
    planned.require_fit()
    if args.dry_run:
        cost.show([planned])
        more = [name for name in ("couple", "null", "attributes", "causes") if getattr(args, name)]
        more += ["bands"] * (args.bands == "eigen")
        if more:
            print(f"not counted: {', '.join(f'--{name}' for name in more)}")
        return Answer(vars(planned))

    with keeping(args, model, batch, out):
        _measure(args, model, batch, out, images, of_images, read, labels)
    return stored(out)


def _measure(
    args: argparse.Namespace,
    model: HookedDiT,
    batch: int | None,
    out: Path,
    images: Tensor | None,
    of_images: list[int] | None,
    read: Any,
    labels: Any,
) -> None:
    """What was asked for, each shown as soon as it is known."""
    from ..experiments import couplings, measure_gap
    from ..pieces import helping
    from ..report import coupling_sweep as coupling_report
    from ..report import gap as gap_report

    pairs, steps = sizes(args)
    with progress_bar() as bar:
        first = bar.add_task("twins", total=None)
        results = measure_gap(
            model,
            pairs=pairs,
            steps=steps,
            seed=args.seed,
            cut=args.cut,
            bands=args.bands,
            null=args.null,
            images=images,
            image_labels=of_images,
            name=str(args.model),
            clones=not args.one_pass,
            batch=batch,
            labels=labels,
            progress=lambda done, total: bar.update(first, completed=done, total=total),
        )
    if not helping():
        gap_report.write(results, out)

    if args.couple is not None:
        with progress_bar() as bar:
            second = bar.add_task("couplings", total=None)
            swept = couplings(
                model,
                args.couple,
                pairs=pairs,
                steps=steps,
                seed=args.seed,
                cut=args.cut,
                labels=labels,
                reader=reader_of(args.model),
                batch=batch,
                progress=lambda done, total: bar.update(second, completed=done, total=total),
            )
        if not helping():
            coupling_report.write(swept, out)

    if read:
        many = pairs if args.quick else args.pairs  # categories need more pairs than fields
        attributes.measure(
            model,
            read,
            out,
            pairs=many,
            steps=steps,
            seed=args.seed,
            cut=args.cut,
            name=str(args.model),
            batch=batch,
            labels=labels,
        )

    if args.causes:
        onsets = None if helping() else gap_report.onsets(results)
        fewer = min(pairs, 24), min(steps, 25)
        own = {"batch": batch, "labels": labels}
        patch.find_causes(model, *fewer, args.seed, args.cut, out, onsets, **own)


def reader_of(name: str) -> Callable[[Tensor], Tensor] | None:
    """The exact reader of a bundled model's labels, if it has one."""
    from ..groundtruth import portraits

    return (lambda images: portraits.read(images).labels) if name == "portraits" else None


def read_images(path: Path) -> tuple[Tensor, list[int] | None]:
    """Images [n, channel, height, width] in [0, 1], and their labels where they have any.

    Args:
        path: an array as .npy; or a folder of pictures, one subfolder a class.

    Raises:
        MissingFile: if there is nothing at the path, or no picture in the folder.
        InvalidValue: for an array of another shape, or pictures of several sizes, of more than 8
            bits, or that are transparent.
    """
    import numpy as np
    import torch

    if path.suffix == ".npy" and path.is_file():
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidValue(f"{str(path)!r} is no array of numpy's: {error}.") from error
        if array.ndim != 4 or array.dtype.kind not in "fui":
            raise InvalidValue(
                f"{str(path)!r} holds {array.dtype} {list(array.shape)}; expected numbers [n, "
                "channel, height, width]."
            )
        scale = 255 if array.dtype == np.uint8 else 1
        return torch.as_tensor(array.astype(np.float32) / scale), None
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise MissingFile(
            f"There are no pictures at {str(path)!r}; expected a folder with some "
            f"({', '.join(PICTURES)}), or an array as .npy."
        )
    from PIL import Image

    found = []
    for file in files:
        with Image.open(file) as opened:
            if opened.mode.startswith(DEEP):
                raise InvalidValue(
                    f"The picture {str(file)!r} has more than 8 bits a value (mode "
                    f"{opened.mode!r}); expected 8, or an array as .npy."
                )
            if opened.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise InvalidValue(
                    f"The picture {str(file)!r} is transparent in places, and what lies behind is "
                    "not known; expected opaque ones."
                )
            # grey pictures have one channel, as the bundled digits
            grey = opened.mode in ("1", "L", "LA")
            found.append(np.asarray(opened.convert("L" if grey else "RGB")) / 255)
    shapes = {one.shape for one in found}
    if len(shapes) > 1:
        raise InvalidValue(
            f"The pictures in {str(path)!r} have shapes {sorted(shapes)}; expected all of one size."
        )
    stacked = torch.as_tensor(np.stack(found), dtype=torch.float32)
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)
    folders = sorted({one.parent for one in files})
    return stacked, [folders.index(one.parent) for one in files]
