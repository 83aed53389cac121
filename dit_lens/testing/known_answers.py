"""The known answers that a probe's variables are held against, and the table's line;
`dit_lens.testing.probe_checks` says what is what.

Expectations come from closed forms, from what was planted, or from activations recorded without the
probe: never from the probe's code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidValue
from ..groundtruth import GroundTruth, ddim_agreement, gaussian, planted, random_weights
from ..hooks.names import layer_of, select
from ..measures.bands import Bands
from ..model.hooked import HookedDiT
from ..sampling.run import Run
from ..sampling.sample import sample
from ..tracing.probe import Probe
from ..tracing.trace import trace
from ..twinning.twins import twins

KNOWN: dict[str, tuple[tuple[str, ...], ...]] = {
    "energy": (("name", "step", "batch", "band"), ("layer", "step", "batch", "band")),
    "difference": (
        ("layer", "step", "pair", "band"),
        ("channels", "layer", "step", "pair", "band"),
    ),
    "agreement": (("layer", "step", "band"),),
    "commitment": (("band",), ("band", "quantity")),
    "gap": ((), ("quantity",)),
    "onset_layer": ((),),
}
"""The variables whose answer is known, and the dimensions that they may have, in any order."""
SPECTRA = {"falling": (4.0, 0.25), "white": (1.0, 1.0), "rising": (0.25, 4.0)}
ITEMS, STEPS, SIDE, LAYERS = 256, 20, 4, 6


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what is checked.
        expected: the number that is right, or a word where nothing is measured.
        measured: the number that the probe gave, or a word.
        error: how far apart they are, in the unit of `tolerance`.
        tolerance: what is allowed.
        ok: whether the check passed.
        note: what the row's numbers are, or why it failed.

    >>> Check("gap", expected=2.0, measured=2.5, error=0.5, tolerance=0.1, ok=False).ok
    False
    """

    name: str
    expected: float | str
    measured: float | str
    error: float = math.nan
    tolerance: float = math.nan
    ok: bool = True
    note: str = ""


class Bench:
    """One probe class and how it is run: `twin` if it asked for twins.

    Each method below `run` is one known answer.
    """

    def __init__(self, probe_class: type[Probe]) -> None:
        self.probe_class, self.twin = probe_class, probe_class.of_twins
        self.result: Any = None  # of the contract's first run

    @property
    def by_itself(self) -> bool:
        """Whether the probe observes no run but makes its own."""
        names = self.probe_class.names
        return isinstance(names, (list, tuple)) and not names

    def obstacle(self, name: str) -> str:
        """Why a variable of a known name can't be compared, or nothing."""
        if self.by_itself:
            return "the probe makes its own runs; the answers are known for runs that it observes"
        have = self.result[name].dims
        if set(have) not in map(set, KNOWN[name]):
            expected = " or ".join(map(dims, KNOWN[name]))
            return f"it has the dimensions {dims(have)}; expected {expected}"
        if name not in ("energy", "onset_layer") and "bands" not in arguments(self.probe_class):
            return "its bands are not known; let the constructor take `bands`, a dit_lens.Bands"
        return ""

    def build(self, grid: tuple[int, ...], cut: float | None = 0.1) -> Any:
        """The probe with bands in which low is the mean alone (or, without a cut, the default
        ones).
        """
        return (
            self.probe_class(**{"bands": Bands.radial(grid, cut=cut)})
            if "bands" in arguments(self.probe_class)
            else self.probe_class()
        )

    def run(
        self,
        model: HookedDiT,
        probe: Probe | None,
        items: int = 16,
        steps: int = 12,
        *,
        twin: bool | None = None,
        apart: bool = True,
        order: int = 1,
        seed: int = 0,
        names: Any = None,
    ) -> tuple[Run, Any]:
        """A run under a trace, and that trace.

        `apart`: twins that start apart, else clones; `order` -1: items in reverse. A probe that
        runs by itself does so first, and the run is a plain one behind it.
        """
        how: dict[str, Any]
        if self.by_itself:
            if probe is not None:
                how = {"pairs": items // 2, "seed": seed} if self.twin else {"seeds": seed}
                probe.run(model, steps=steps, **how)
            return sample(model, [0] * items, seed, steps, eta=1.0), None
        with trace(model, names=names, probes=[] if probe is None else [probe]) as t:
            if self.twin if twin is None else twin:
                how = {"tie": "attention", "g": 0.0, "eps": 0.3} if apart else {"tie": "noise"}
                return twins(
                    model, items // 2, [0] * (items // 2), steps=steps, seed=seed, **how
                ).run, t
            return sample(
                model, [0] * items, [1000 * seed + i for i in range(items)][::order], steps, eta=1.0
            ), t

    def energy(self) -> Iterator[Check]:
        """Band energies against |h|² and against numpy's own FFT of activations recorded without
        the probe.
        """
        model = model_of(random_weights(0, n_layers=3))
        grid, probe = model.cfg.grid, self.build(model.cfg.grid, cut=None)
        self.run(model, probe, steps=4)
        chosen = select(probe.names, model.names)
        _, seen = self.run(model, None, steps=4, names=chosen)
        energy = probe.result()["energy"]
        place = "name" if "name" in energy.dims else "layer"
        sites = {n if place == "name" else layer_of(n): n for n in chosen}
        if len(sites) < len(chosen):
            raise InvalidValue(
                "energy has one value a layer and `names` several hook points a layer; give it the "
                "axis name"
            )
        bands = getattr(probe, "bands", None)
        fy, fx = np.fft.fftfreq(grid[0])[:, None], np.fft.fftfreq(grid[1])
        edges = (
            np.array(bands.edges[1:-1])
            if isinstance(bands, Bands) and bands.kind == "radial"
            else None
        )
        whole, rings = [], []
        for key in energy[place].values.tolist():
            h = seen[sites[key]].double().numpy()[energy["step"].values]
            field = h.reshape(*h.shape[:2], *grid, -1)
            # [step, batch, row, column]
            power = (np.abs(np.fft.fft2(field, axes=(2, 3), norm="ortho")) ** 2).sum(-1)
            whole.append((field**2).sum((2, 3, 4)))
            if edges is not None:  # a frequency equal to an edge is above it
                ring = np.searchsorted(edges, np.hypot(fy, fx) + 1e-9, side="right")
                rings.append(
                    np.stack([power[..., ring == b].sum(-1) for b in range(len(edges) + 1)], -1)
                )
        found = energy.transpose(place, "step", "batch", "band").values.astype(np.float64)
        note = (
            "no rings: the probe has no attribute `bands` that is radial" if edges is None else ""
        )
        yield _relative("energy: bands sum to |h|²", np.stack(whole), found.sum(-1), 1e-4, note)
        if edges is not None:
            yield _relative(
                f"energy: {len(edges) + 1} rings by numpy.fft", np.stack(rings), found, 1e-3
            )

    def difference(self) -> Iterator[Check]:
        """From one layer to the next the difference energy grows by (1 + a)² where a gain of 1 + a
        is planted, and by 1 elsewhere.
        """
        for at, a, band in (
            (1, 0.3, 0),
            (3, -0.3, 1),
            (5, 0.3, 1),
            (1, -0.3, 1),
            (3, 0.3, 0),
            (5, -0.3, 0),
        ):
            name = ("low", "high")[band]
            model = model_of(planted((at,), a, LAYERS, name, sample_size=SIDE))
            probe = self.build(model.cfg.grid)
            self.run(model, probe, steps=6, twin=True)
            energy = probe.result()["difference"]
            if "channels" in energy.dims:
                energy = energy.sel(channels="raw")
            found = energy.sum("pair").transpose("layer", "step", "band").values
            gain = np.ones(found.shape)
            gain[energy["layer"].values >= at, :, band] = (1 + a) ** 2
            with np.errstate(invalid="ignore", divide="ignore"):
                growth = found[1:] / found[:-1]
            yield _relative(
                f"difference: {name} x {1 + a:g} in layer {at}/{LAYERS}",
                gain[1:] / gain[:-1],
                growth,
                1e-3,
            )

    def gaussian(self, names: list[str]) -> Iterator[Check]:
        """On Gaussian data, for the sampler as it is run (`groundtruth.ddim_agreement`): the
        squared agreement at a step is the agreement of twins released there, and a band commits
        where that is 1/2.
        """
        covered: dict[str, list[bool]] = {}
        for kind, spectrum in SPECTRA.items():
            truth = gaussian(*spectrum, layers=(1,), n_layers=2, sample_size=SIDE)
            model = model_of(truth)
            probe = self.build(model.cfg.grid)
            run, _ = self.run(model, probe, ITEMS, STEPS, apart=False)
            result = _result(probe, run)
            abars = truth.scheduler.alphas_cumprod.double().numpy()[run.timesteps.numpy()]
            # [step, band]
            exact = np.stack([ddim_agreement(spectrum, abars, s) for s in range(STEPS)]).clip(
                0, 1 - 1e-9
            )
            n = (ITEMS - 1) * 3 * np.array([1, SIDE**2 - 1])  # independent modes in each band
            error = (1 - exact) / np.sqrt(n)  # of a correlation; its square is skewed near 0
            if "agreement" in names:
                last = (
                    result["agreement"]
                    .isel(layer=int(result["layer"].values.argmax()))
                    .transpose("step", "band")
                )
                at = result["step"].values
                allowed = 3 * error[at] + 1e-3
                yield _worst(
                    f"agreement: {kind} spectrum",
                    exact[at] ** 0.5,
                    last.values,
                    allowed,
                    "3 standard errors",
                )
            for quantity, axis in (
                ("step", np.arange(STEPS)),
                ("log_snr", run.log_snr.double().numpy()),
            ):
                where = np.array([np.interp(0, np.log(r / (1 - r)), axis) for r in exact.T])
                slope = np.array(
                    [
                        np.interp(x, axis, np.gradient(r, axis))
                        for x, r in zip(where, exact.T, strict=True)
                    ]
                )
                width = 3 * np.sqrt(0.5 / n) / slope + 0.25 * np.interp(
                    where, axis, np.gradient(axis)
                )  # read between steps
                for name, wanted, allowed in (
                    ("commitment", where, width),
                    ("gap", where[1] - where[0], np.hypot(*width)),
                ):
                    found = _quantity(result, name, quantity) if name in names else None
                    if found is not None:
                        note = "3 standard errors and 1/4 step"
                        yield _worst(
                            f"{name} in {quantity}: {kind} spectrum",
                            wanted,
                            found.values,
                            allowed,
                            note,
                        )
                interval = _quantity(result, "gap_interval", quantity) if "gap" in names else None
                if interval is not None:
                    low, high = interval.values
                    covered.setdefault(quantity, []).append(
                        bool(low <= where[1] - where[0] <= high)
                    )
        # one miss in three may happen to a right 95 % interval, two hardly
        for quantity, hits in covered.items():
            yield Check(
                f"gap_interval in {quantity}",
                "covers",
                f"{sum(hits)} of {len(hits)}",
                ok=sum(hits) >= len(hits) - 1,
            )

    def onset(self) -> Iterator[Check]:
        """The planted layer at three depths, and none where there is none."""
        models = {
            f"planted in layer {at} of 8": (planted((at,), 0.3, 8, sample_size=SIDE), at)
            for at in (2, 4, 6)
        }
        models["nothing planted"] = planted((4,), 0.0, 8, sample_size=SIDE), -1
        models["random weights"] = random_weights(0, n_layers=8, sample_size=SIDE), -1
        for name, (truth, at) in models.items():
            model = model_of(truth)
            probe = self.build(model.cfg.grid)
            run, _ = self.run(model, probe, 32, 6)
            raw = _result(probe, run)["onset_layer"].item()
            found = -1.0 if raw is None or raw != raw else float(raw)
            yield Check(
                f"onset_layer: {name}",
                float(at),
                found,
                abs(found - at),
                0,
                found == at,
                "-1 is none",
            )

    def expected(self) -> Iterator[Check]:
        """What the probe's author says it should be."""
        truths = {
            "gaussian": gaussian(layers=(1,), n_layers=2, sample_size=SIDE),
            "planted": planted((3,), n_layers=LAYERS, sample_size=SIDE),
        }
        for kind, truth in truths.items():
            model = model_of(truth)
            probe = self.build(model.cfg.grid)
            run, _ = self.run(model, probe, ITEMS, STEPS, apart=kind == "planted")
            result, wanted = _result(probe, run), probe.expected(truth)
            for name, value in wanted.data_vars.items():
                if name not in result:
                    raise InvalidValue(
                        f"expected(truth) speaks of {name!r}, which result() does not give: "
                        f"{list(result)}"
                    )
                exact, found = (v.values for v in _aligned(value, result[name]))
                tolerance = float(value.attrs.get("tolerance", wanted.attrs.get("tolerance", 1e-3)))
                yield _relative(
                    f"{name}: {kind}", exact, found, tolerance, "as expected(truth) says"
                )


def arguments(probe_class: type[Probe]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(probe_class).parameters)


def model_of(truth: GroundTruth) -> HookedDiT:
    return HookedDiT(truth.transformer, scheduler=truth.scheduler)


def _result(probe: Any, run: Run) -> Any:
    takes = "target" in inspect.signature(probe.result).parameters
    return probe.result(target=run.finished) if takes else probe.result()


def _relative(
    name: str, expected: ArrayLike, found: ArrayLike, tolerance: float, note: str = ""
) -> Check:
    """The worst place by relative error. Shapes that differ are an error."""
    e, f = np.asarray(expected, float), np.asarray(found, float)
    size = np.maximum(np.abs(e), 1e-12)
    row = _worst(name, e, f, tolerance * size, note)
    error = abs(float(row.expected) - float(row.measured)) / max(abs(float(row.expected)), 1e-12)
    return Check(
        name, row.expected, row.measured, error, tolerance, row.ok, f"relative; {row.note}"
    )


def _worst(
    name: str, expected: ArrayLike, found: ArrayLike, tolerance: ArrayLike, note: str = ""
) -> Check:
    """The place whose error is the largest beside what is allowed there."""
    e, f = np.asarray(expected, float), np.asarray(found, float)
    if e.shape != f.shape:
        raise InvalidValue(f"{name} has shape {list(f.shape)}; expected {list(e.shape)}")
    error, allowed = np.abs(f - e), np.broadcast_to(np.asarray(tolerance, float), e.shape)
    share = np.where(np.isfinite(error), error / allowed, math.inf)
    at = np.unravel_index(share.argmax(), e.shape)
    many = f"worst of {e.size}" if e.size > 1 else ""
    text = "; ".join(part for part in (many, note) if part)
    return Check(
        name,
        float(e[at]),
        float(f[at]),
        float(error[at]),
        float(allowed[at]),
        bool(share[at] <= 1),
        text,
    )


def _quantity(result: Any, name: str, quantity: str) -> Any:
    """A variable in steps or in log SNR; None if it does not have that.

    Without the axis it is in steps.
    """
    if name not in result:
        return None
    if "quantity" not in result[name].dims:
        return result[name] if quantity == "step" else None
    return result[name].sel(quantity=quantity) if quantity in result["quantity"].values else None


def _aligned(a: Any, b: Any) -> tuple[Any, Any]:
    return a, b.transpose(*a.dims) if set(a.dims) == set(b.dims) else b


def dims(names: Any) -> str:
    return f"[{', '.join(map(str, names))}]"
