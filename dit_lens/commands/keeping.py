"""What `--store`, `--engine`, `--workers` and `--address` do: finished pieces are kept as they
come, and run where there is room.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DitLensError
from .common import count, labels_of

if TYPE_CHECKING:
    from ..model.hooked import HookedDiT

ASIDE = set(
    "store engine workers address out device trajectories dry_run batch argv again parse json "
    "quiet kept".split()
)
"""Options that the result does not depend on, or that are known better once the model is open."""
READ = ("prompts", "images", "attributes", "check", "plan", "lora", "fault", "good")
"""Options that name files, which may be edited before a command goes on."""


def add_store(parser: argparse.ArgumentParser) -> None:
    """The options `--store`, `--engine`, `--workers` and `--address`.

    Args:
        parser: of a subcommand with `--out`.
    """
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="folder in which finished pieces are kept: an interrupted command goes on from there, "
        "and `dit-lens work DIR` helps with it (default: in --out, until the command is done)",
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where pieces are run: on this machine, or on a Ray cluster (default: local)",
    )
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes that run pieces (default: one for each accelerator; local without any: "
        "this one)",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster (default: RAY_ADDRESS, or auto)"
    )


def about_command(
    args: argparse.Namespace, model: HookedDiT, batch: int | None
) -> Mapping[str, Any]:
    """Which measurement a command is.

    Args:
        args: of the command.
        model: the opened model.
        batch: images at once.
    """
    from ..pieces import about_of

    plain = (type(None), bool, int, float, str, list, Path)
    settings = {
        name: value
        for name, value in sorted(vars(args).items())
        if name not in ASIDE and isinstance(value, plain) and not name.startswith("default_")
    }
    settings |= {
        f"{each} read": _content(str(settings[each]))
        for each in READ
        if isinstance(settings.get(each), (str, Path))
    }
    name = f"dit-lens {settings.pop('command')}"
    return about_of(name, settings | {"batch": batch}, model)


def _content(named: str) -> str:
    """A digest of what is in a file or folder, also where the name of a function follows it."""
    path = Path(named)
    if not path.exists():
        path = Path(named.rpartition(":")[0])
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files if path != Path() else []:
        read = file.read_bytes() if file.is_file() else b""
        digest.update(f"{file.relative_to(path)} {len(read)} ".encode() + read)
    return digest.hexdigest()[:16]


@contextmanager
def keeping(
    args: argparse.Namespace, model: HookedDiT, batch: int | None, out: Path
) -> Iterator[None]:
    """Within the block, pieces are kept and run as the options say.

    Args:
        args: of a subcommand with `add_store`.
        model: the opened model.
        batch: images at once.
        out: folder of the results.
    """
    from ..pieces import NEEDED, Engine, current, digest, has_zarr, working

    if current() is not None:  # this process helps
        yield
        return
    engine, about = (
        Engine(args.engine, args.workers, args.address),
        about_command(args, model, batch),
    )
    if getattr(args, "prompts", None) is not None and (words := labels_of(args)):
        model.conditions.numbers(words)  # known before anything is sent
    store = args.store
    if store is None:
        if not has_zarr() and not engine.elsewhere:
            try:
                yield
            except KeyboardInterrupt:
                print(f"dit-lens: nothing is kept. {NEEDED}", file=sys.stderr)
                raise
            return
        store = out / ".pieces" / digest(dict(about))
    args.kept = store
    job = {"argv": args.argv, "cwd": os.getcwd(), "batch": batch}
    given = {"argv": args.argv, "model": model, "batch": batch}
    done, made = False, [folder for folder in (store, *store.parents) if not folder.exists()]
    try:
        with working(store, about, engine, args.again, given, model, extra={"job": job}) as work:
            if work.found():
                print(f"{work.found()} finished pieces are in {store}")
            try:
                yield
                done = True
            except DitLensError:  # often of what is refused before any piece is run
                done = not work.store.names()
                raise
    finally:
        if args.store is None and done:  # it was there for the case of an interruption
            shutil.rmtree(store, ignore_errors=True)
            for folder in (store.parent, *made[2:]):
                with suppress(OSError):  # there is something else in it
                    folder.rmdir()
