"""Help with a command that keeps its pieces in a folder: run those that nobody is at."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .common import GIVEN, Answer, add_trajectories, open_model
from .keeping import about_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE."""
    parser.add_argument("folder", type=Path, metavar="STORE", help="the --store of the command")
    parser.add_argument("--device", help="such as cuda:1 (default: that of the command)")
    add_trajectories(parser, "as the command's")


def run(args: argparse.Namespace) -> Answer:
    """Take pieces until the command needs no more."""
    from ..errors import DitLensError, InvalidValue, MissingFile
    from ..model.trajectories import checked_place
    from ..pieces import Store, digest, quiet, read_root

    folder = args.folder.absolute()
    root = read_root(folder) if folder.exists() else None
    if root is None:
        raise MissingFile(
            f"There is no store at {str(args.folder)!r}; expected the --store of a command that "
            "was started."
        )
    job = root.get("job")
    if job is None:
        raise InvalidValue(
            f"{str(args.folder)!r} was begun from Python, where its model and functions are; "
            "expected the --store of a command, or engine= in that program."
        )
    if not Path(job["cwd"]).is_dir():
        raise MissingFile(
            f"The command was started in {job['cwd']!r}, which is not on this machine; expected "
            "the same folders everywhere, as on a shared disk."
        )
    place = checked_place(args.trajectories)  # of a folder as seen from here
    os.chdir(job["cwd"])
    command = args.parse(job["argv"])
    command.device = args.device or command.device
    command.trajectories = place or command.trajectories
    try:
        model = open_model(command)
    except (DitLensError, OSError) as error:
        raise MissingFile(
            f"This machine can't open the model {str(command.model)!r} of the command: {error}"
        ) from error
    about = about_command(command, model, job["batch"])
    store = Store(folder, about, device=model.device.type)
    before = len(store.names())
    token = GIVEN.set((model, job["batch"]))
    try:
        quiet(lambda: command.run(command), store, digest(dict(about)), model)
    finally:
        GIVEN.reset(token)
        store.close()
    run_here = len(store.names()) - before
    print(f"{run_here} more pieces are in {folder}, and no more are needed")
    return Answer({"stored": str(folder), "pieces": run_here})
