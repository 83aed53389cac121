"""What the subcommands share: arguments that refuse bad values, the model, a progress bar."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidValue, MissingFile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..model.hooked import HookedDiT

GIVEN: ContextVar[tuple[HookedDiT, int | None] | None] = ContextVar("given", default=None)
"""The model and the batch of who helps: those of the command that it helps with."""


class Answer(NamedTuple):
    """What a subcommand found, for those who read it by machine (`--json`).

    Attributes:
        data: datasets, lists, dicts, numbers and words; or a function that gives them.
        code: the exit code.
    """

    data: Any
    code: int = 0


def stored(out: Path) -> Answer:
    """The results that a subcommand has written, by file, and no older ones beside them. A line
    says so where these are of another model.

    Args:
        out: the folder that they are in.
    """
    from ..report.stored import files_at, of_several_models, read
    from ..storage import written

    files = written()
    if files and (note := of_several_models(files_at(out))):
        print(note)

    def found() -> Any:
        return {"stored": str(out), "results": {file.name: read(file)[1] for file in files}}

    return Answer(found)  # read again only where somebody wants it


def as_json(data: Any) -> str:
    """An answer as JSON: datasets by their variables, numbers that are none as null.

    >>> as_json({"layers": (1, float("nan"))})
    '{"layers": [1, null]}'
    """
    return json.dumps(_plain(data))


def _plain(data: Any) -> Any:
    if hasattr(data, "to_dict"):
        data = data.to_dict()
    if hasattr(data, "tolist"):
        data = data.tolist()
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if isinstance(data, (int, float, str, type(None))) else str(data)


def count(text: str) -> int:
    """An argparse type: a whole number of 1 or more.

    >>> count("16")
    16

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _whole(text, least=1)


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of so much or more.

    >>> at_least(16)("48")
    48
    """
    return lambda text: _whole(text, least)


def share(text: str) -> float:
    """An argparse type: a number above 0 and up to 1.

    >>> share("0.5")
    0.5

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _number(text, lambda value: 0 < value <= 1, "a share above 0 and up to 1, such as 0.5")


def seed(text: str) -> int:
    """An argparse type: a whole number of 0 or more.

    >>> seed("0")
    0

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _whole(text, least=0)


def frequency(text: str) -> float:
    """An argparse type: a finite number above 0.

    >>> frequency("0.25")
    0.25

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _number(text, lambda value: value > 0, "a number above 0, such as 0.25")


def strength(text: str) -> float:
    """An argparse type: a finite number of 0 or more.

    >>> strength("0.5")
    0.5

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _number(text, lambda value: value >= 0, "a number of 0 or more, such as 0.5")


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a whole number of {least} or more"
        )
    return value


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument `model`."""
    parser.add_argument(
        "model",
        nargs="?",
        default="digits",
        help="bundled name, folder or hub id (default: digits)",
    )


def add_probe(parser: argparse.ArgumentParser, name: str) -> None:
    """The argument that says which probe.

    Args:
        parser: of the subcommand.
        name: of the argument.
    """
    parser.add_argument(
        name, help="an installed probe, path/to/file.py:ClassName or package.module:ClassName"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """The option `--size`."""
    parser.add_argument(
        "--size",
        type=count,
        nargs="+",
        metavar="N",
        help="height and width of the latents (video: frames first), if not the model's own",
    )


def existing(path: Path, expected: str) -> Path:
    """A file that has to be there.

    Args:
        path: the file.
        expected: what it should be, for the error.

    Raises:
        MissingFile: if it is not.
    """
    if not path.exists():
        raise MissingFile(f"There is no file {str(path)!r}; expected {expected}.")
    return path


def refuse(args: argparse.Namespace, beside: str, why: str, *names: str) -> None:
    """Raise InvalidValue for options that would be passed over.

    Args:
        args: of a subcommand; options that were not given are None or False in it.
        beside: the option beside which they are.
        why: they do nothing there.
        names: of the options.
    """
    for name in names:
        if getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise InvalidValue(f"{option} does nothing beside {beside}: {why}; leave it out.")


def add_quick(
    parser: argparse.ArgumentParser,
    pairs: tuple[int, int],
    steps: tuple[int, int],
    fewest: tuple[int, int] = (1, 1),
) -> None:
    """The options `--pairs`, `--steps` and `--quick`; `sizes` later chooses between the defaults.

    Args:
        parser: of the subcommand.
        pairs: the default number of pairs, and that of a quick run.
        steps: the default number of steps, and that of a quick run.
        fewest: pairs and steps that can be measured.
    """
    parser.set_defaults(default_pairs=pairs, default_steps=steps)
    least = [f", {few} or more" if few > 1 else "" for few in fewest]
    parser.add_argument(
        "--pairs",
        type=at_least(fewest[0]),
        help=f"pairs of twins{least[0]} (default: {pairs[0]}; with --quick {pairs[1]})",
    )
    parser.add_argument(
        "--steps",
        type=at_least(fewest[1]),
        help=f"denoising steps{least[1]} (default: {steps[0]}; with --quick {steps[1]})",
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs and steps: a first look")


def sizes(args: argparse.Namespace) -> tuple[int, int]:
    """The numbers of pairs and of steps: those asked for, else the command's defaults."""
    pairs = args.default_pairs[args.quick] if args.pairs is None else args.pairs
    steps = args.default_steps[args.quick] if args.steps is None else args.steps
    return pairs, steps


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The option `--seed`."""
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="the same seed gives the same figures to the last digit (default: 0)",
    )


def add_device(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """The options `--device`, `--dtype`, `--batch` and `--trajectories`.

    Args:
        parser: of a subcommand.
        dtype: whether it has `--dtype`.
    """
    parser.add_argument(
        "--device", help="such as cuda or cpu (default: an accelerator that has float64, if any)"
    )
    if dtype:
        parser.add_argument(
            "--dtype",
            default="float32",
            help="of the weights: float32, bfloat16 or float16 (default: float32)",
        )
    parser.add_argument(
        "--batch",
        type=count,
        help="images that go through the model at once (default: what fits, found by trying)",
    )
    add_trajectories(parser, "on the device")


def add_trajectories(parser: argparse.ArgumentParser, default: str) -> None:
    """The option `--trajectories`.

    Args:
        parser: of a subcommand.
        default: where they lie otherwise.
    """
    parser.add_argument(
        "--trajectories",
        metavar="PLACE",
        help="where runs keep their latents, if they do not fit the device: cpu, or a folder for "
        f"temporary files (default: {default})",
    )


def add_labels(parser: argparse.ArgumentParser) -> None:
    """The options `--labels` and `--prompts`, of which one can be given."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--labels",
        type=seed,
        nargs="+",
        metavar="N",
        help="classes, or prompts by number, taken in turn (default: the model's own)",
    )
    one.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one a line, taken in turn, for a model that is given text",
    )


def labels_of(args: argparse.Namespace) -> list[int] | list[str] | None:
    """The labels or prompts that were asked for; None is the model's own.

    Args:
        args: of a subcommand with `add_labels`.

    Raises:
        InvalidValue: for a file without prompts, or that is no text.
    """
    if args.prompts is None:
        found: list[int] | None = args.labels
        return found
    if not args.prompts.is_file():
        raise InvalidValue(f"There is no file {str(args.prompts)!r}; expected prompts, one a line.")
    try:
        # `splitlines` would also cut within a prompt, at U+2028 and others
        lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InvalidValue(
            f"{str(args.prompts)!r} is no text in UTF-8; expected prompts, one a line."
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidValue(f"{str(args.prompts)!r} is empty; expected prompts, one a line.")
    return prompts


def open_model(args: argparse.Namespace) -> HookedDiT:
    """The model that `add_model`, `add_size` and `add_device` asked for."""
    import torch

    from .. import arguments
    from ..model.loading import load
    from ..storage import made_of

    if (given := GIVEN.get()) is not None:
        return given[0]
    device = args.device
    if device is None:
        here = torch.accelerator.current_accelerator(check_available=True)
        # nearly every command measures
        device = "cpu" if here is None or not arguments.has_float64(here) else str(here)
    size = None if args.size is None else tuple(args.size)
    model = load(args.model, args.dtype, device, size, args.trajectories)
    made_of(str(args.model), model.device)
    return model


def batch_of(args: argparse.Namespace, model: HookedDiT, images: int) -> int | None:
    """Images at once: as asked for, or else as many of `images` as fit; None if all do.

    Args:
        args: of a subcommand with `add_device`.
        model: the opened model.
        images: how many there are.
    """
    from ..experiments.cost import fitting_batch

    if (given := GIVEN.get()) is not None:
        return given[1]
    if args.batch is not None or model.device.type == "cpu":
        asked: int | None = args.batch
        return asked
    found = fitting_batch(model, images)
    if found == images:
        return None
    print(f"batch {found}: {images} images at once do not fit the memory of {model.device}")
    return found


def console(width: int) -> Console:
    """A rich console: as wide as the terminal, or `width` where the output is a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def progress_bar(every: float = 60.0) -> Progress:
    """A live bar with the time taken and left, also by what was done before an interruption; gone
    when it is done. In the log of a job, where no bar can move, now and then a line.

    Args:
        every: seconds from line to line.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
    from rich.text import Text

    from ..pieces import current

    class Times(ProgressColumn):
        def render(self, task: Task) -> Text:
            work = current()
            taken = (task.elapsed or 0.0) + (0.0 if work is None else max(0.0, work.before))
            if not task.total or task.percentage < 1:  # too early to tell what is left
                return Text(clock(taken))
            left = taken * (task.total / task.completed - 1)
            return Text(f"{clock(taken)}, {clock(left)} left")

    class Bar(Progress):
        said = time.monotonic()

        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            if not self.console.is_terminal and time.monotonic() - self.said >= every:
                self.said = time.monotonic()
                task = next(each for each in self.tasks if each.id == task_id)
                done = f"{task.percentage:.0f} %" if task.total else f"{task.completed:g}"
                line = f"{task.description}: {done}, {times.render(task)}"
                self.console.file.write(f"{line}\n")
                self.console.file.flush()

    times = Times()
    text = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    return Bar(*text, times, transient=True)


@contextmanager
def calibrating() -> Iterator[Callable[[int, int], None]]:
    """A live bar for a calibration: what it gives is called with the parts done and in all."""
    with progress_bar() as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def clock(seconds: float) -> str:
    """A time as a clock shows it.

    >>> clock(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
