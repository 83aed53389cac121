"""What a measured gap says, in sentences that claim no more than its intervals."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ..measures.estimate import Estimate

ESTIMATORS = {"one_pass": "one pass", "clones": "clones"}
TITLES = {
    "stream": "Clones agree in the stream",
    "lens": "Stream read by the last layer",
    "ratio": "Normalised difference energies",
    "growth": "Bare difference energies",
}
NO_DEPTH = (
    "In which layers low and high come apart is drawn and stored, and no claim is made about "
    "depth: the same layers in another order may look alike, and `--null 19` compares them."
)


def gap_of(results: xr.Dataset, kind: str, estimator: str) -> Estimate:
    """A gap in steps.

    Args:
        results: of `measure_gap`.
        kind: "split", "band" or "image".
        estimator: "clones" or "one_pass".
    """
    one = results.sel(estimator=estimator, quantity="step")
    return Estimate.of(one[f"{kind}_gap"], one[f"{kind}_gap_interval"])


def headline(results: xr.Dataset) -> str:
    """The behavioural gap by clones in one sentence, with its uncertainty, and one pass beside it;
    by one pass where clones were not run.

    Args:
        results: of `measure_gap`.
    """
    name, steps, pairs = (results.attrs[key] for key in ("model", "steps", "pairs"))
    estimator = "clones" if results.sizes["release"] else "one_pass"
    found, other = (gap_of(results, "split", one) for one in (estimator, "one_pass"))
    by = ESTIMATORS[estimator]
    if not np.isfinite(found.value):
        beside = f"; one pass gives {other:+.1f steps}" if other.known else ""
        return (
            f"On {name} no gap can be given by {by}: a band does not commit within "
            f"{'their releases' if estimator == 'clones' else 'the run'} (see the frequency "
            f"picture){beside}."
        )
    if not found.known:
        verdict = f"With {pairs} pairs the gap has no interval"
    elif found.sign:
        verdict = f"{'Low' if found.sign > 0 else 'High'} frequencies commit first"
    else:
        needed = pairs_for(found, pairs)
        enough = (
            f"; if it is as large as measured, about {needed} would show it in four of five runs"
            if needed < 100 * pairs
            else ""
        )
        verdict = f"With {pairs} pairs no gap can be told from zero{enough}"
    low, high = results.split_commitment.sel(estimator=estimator).values
    beside = beside_clones(results, "split") if estimator == "clones" else ""
    return (
        f"{verdict}: on {name} low commits at step {low:.1f} and high at {high:.1f} of {steps}, "
        f"a gap of {found:+.1f steps} (95 %, {by}){beside}."
    )


def pairs_for(found: Estimate, pairs: int) -> int:
    """How many pairs would tell an estimate of this size from zero in four of five runs: an
    interval falls as 1 / sqrt(pairs), and 0.84 standard errors are kept beyond its end.
    """
    width = (found.high - found.low) / 2
    reach = width * (1.96 + 0.84) / 1.96 / max(abs(found.value), 1e-9)
    return max(pairs + 1, int(np.ceil(pairs * min(reach, 1e4) ** 2)))


def beside_clones(results: xr.Dataset, kind: str) -> str:
    """What one pass gives beside the clones' gap, and their paired difference; "" if it gives
    nothing.

    Args:
        results: of `measure_gap`.
        kind: "split" or "band".
    """
    other, of = gap_of(results, kind, "one_pass"), "gap" if kind == "split" else "band"
    if not np.isfinite(other.value):
        return ""
    apart = Estimate.of(
        results[f"estimator_{of}_difference"], results[f"estimator_{of}_difference_interval"]
    )
    less = f", one pass less clones {apart:+.1f}" if apart.known else ""
    return f"; by one pass of the same runs {other:+.1f}{less}"


def bands_sentence(results: xr.Dataset) -> str:
    """The gap from the lowest band to the highest, by both estimators; "" if there is none.

    Args:
        results: of `measure_gap`.
    """
    estimator = "clones" if results.sizes["release"] else "one_pass"
    found, n = gap_of(results, "band", estimator), results.sizes["band"]
    if not np.isfinite(found.value):
        return ""
    number = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}.get(n, str(n))
    return (
        f"From the lowest to the highest of {number} bands the gap is {found:+.1f steps} by "
        f"{ESTIMATORS[estimator]}{beside_clones(results, 'band') if estimator == 'clones' else ''}."
    )
