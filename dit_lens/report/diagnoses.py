"""What `dit-lens diagnose --all` shows: when faults are decided and which layers carry them, by
kind of fault.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from ..pictures.style import HIGH, INK, LOW, legend, whole_numbers
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

KIND = "diagnoses.nc"


def store(result: xr.Dataset, folder: Path) -> Path:
    """Store diagnoses.nc.

    Args:
        result: of `dit_lens.experiments.diagnose_all`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / KIND, KIND, result)


def show(result: xr.Dataset, stored: Path) -> None:
    """Print what was found, and draw the picture beside the stored figures.

    Args:
        result: of `dit_lens.experiments.diagnose_all`.
        stored: the file that holds it.
    """
    console = plain_console(120)
    for line in str(result.attrs["sentence"]).split("\n"):
        console.print(line, soft_wrap=True)
    drawn = draw(result, beside(stored, KIND, "diagnoses.png"))
    files(console, [drawn, stored])


def draw(result: xr.Dataset, path: Path) -> Path:
    """For each kind: the mean effect of a quarter of the layers in a quarter of the steps that were
    left; and beside it, how many faults are decided by each step.

    Args:
        result: of `dit_lens.experiments.diagnose_all`.
        path: of the picture.
    """
    kinds = [str(kind) for kind in result.kind.values]
    steps, colours = int(result.attrs["steps"]), [LOW, HIGH, INK, "#999999"]
    with picture(path, (2.6 * (len(kinds) + 1) + 0.8, 2.8), ncols=len(kinds) + 1) as (figure, axes):
        for ax, kind in zip(axes, kinds, strict=False):
            own = result.effect.values[result.kind_of.values == kind]
            seen = own[np.isfinite(own).all((1, 2))]
            mean = seen.mean(0) if len(seen) else np.zeros(own.shape[1:])
            shown = ax.imshow(mean.T, origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
            ax.set(title=f"{kind}: {len(seen)} looked at", xlabel="quarter of the steps left")
            ax.set_ylabel("quarter of the layers")
            whole_numbers(ax.xaxis, ax.yaxis)
        figure.colorbar(shown, ax=list(axes[: len(kinds)]), label="mean effect of a patch")
        last = axes[-1]
        for kind, colour in zip(kinds, colours, strict=False):
            own = np.sort(result.decided.values[result.kind_of.values == kind])
            last.step(
                [0, *own, steps],
                [*np.arange(len(own) + 1) / len(own), 1],
                where="post",
                color=colour,
                label=kind,
            )
        last.set(title="decided by", xlabel="step, 0 the noisiest", ylabel="share of the faults")
        last.set(xlim=(0, steps), ylim=(0, 1.03))
        legend(last, loc="best")
    return path
