"""Is a probe right? Anyone's probe against models whose answer is known: `dit-lens check PROBE`.

Two kinds of checks. The *contract* holds for every probe: it runs in a trace (of `dit_lens.sample`,
or of `dit_lens.twins` if it raises an error that speaks of twins), gives a Dataset of finite
numbers, leaves the model and its output alone, and depends on its run only. *Known answers* go by
the names of the variables that it returns (`known_answers.KNOWN`), with bands from low to high:

- `energy` [name or layer, step, batch, band]: band energies |P_b h|² of the hook points in `names`;
- `difference` [layer, step, pair, band], maybe with a `reading` of which one is "raw": |P_b(h_A -
  h_B)|² of the twins' residual streams;
- `agreement` [layer, step, band]: correlation of x0, read off a layer, with the finished latents;
- `commitment` [band] and `gap` [], each maybe with a `quantity` ("step", "log_snr"; without it
  steps), where the squared agreement is 1/2 and last band minus first, and `gap_interval` [...,
  bound];
- `onset_layer` []: the first layer that treats the low band's differences unlike the layers before
  it; -1 or NaN if there is none.

Any other NaN fails. All with a band axis but `energy`, and `gap`, need a constructor with the
argument `bands` (a `dit_lens.Bands`), so that the first band can be what is planted: the mean
alone. If `result` has an argument `target`, it gets the finished latents. A probe of another
quantity can say what it should be: `expected(truth)` gives a Dataset for a
`groundtruth.GroundTruth`, compared name by name (relative error; allowed is 1e-3, or the Dataset's
or variable's attribute "tolerance").
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import InvalidValue
from ..groundtruth import gaussian
from ..model.hooked import HookedDiT
from ..tracing.probe import Probe, load_probe
from .known_answers import KNOWN, SIDE, Bench, Check, arguments, dims, model_of

if TYPE_CHECKING:
    from rich.table import Table


def find_probe(where: str) -> type[Probe]:
    """A probe class: an installed name, `path/to/file.py:ClassName` or `package.module:ClassName`.

    Args:
        where: the name or the place.

    Returns:
        The class.

    Raises:
        ValueError: if there is none, or the file can't be imported.

    >>> find_probe("dit_lens.probes:LayerLens").__name__
    'LayerLens'
    """
    if ":" not in where and not where.endswith(".py"):
        return load_probe(where)
    source, _, name = where.rpartition(":") if ":" in where else (where, "", "")
    module = imported(source, "path/to/file.py:ClassName")
    probes = [k for k, v in vars(module).items() if _is_probe(v) and v is not Probe]
    near = difflib.get_close_matches(name, probes, n=1, cutoff=0.3)
    has = (
        f"its probes: {', '.join(map(repr, probes))}"
        f"{f' (nearest: {near[0]!r})' if near and name not in probes else ''}"
        if probes
        else "it has no subclass of dit_lens.Probe"
    )
    if not name:
        raise InvalidValue(f"{where!r} names no class; expected path/to/file.py:ClassName; {has}.")
    if not hasattr(module, name):
        raise InvalidValue(f"{source!r} has no class {name!r}; {has}.")
    found: Any = getattr(module, name)
    if not _is_probe(found):
        raise InvalidValue(
            f"{name!r} in {source!r} is {found!r}, which is not a subclass of dit_lens.Probe; "
            f"{has}."
        )
    probe: type[Probe] = found
    return probe


def imported(source: str, expected: str) -> ModuleType:
    """A module by file or name.

    As if it was run from there: it may import its neighbours, now or later.

    Args:
        source: path/to/file.py or package.module.
        expected: what the user should have given, for the error.

    Raises:
        InvalidValue: if there is none, or it can't be imported.
    """
    if source.endswith(".py") and not Path(source).is_file():
        raise InvalidValue(f"There is no file {source!r}; expected {expected}.")
    try:
        return _imported(source)
    except (Exception, SystemExit) as error:
        raise InvalidValue(
            f"{source!r} can't be imported: {type(error).__name__}: {error}."
        ) from error


def _imported(source: str) -> ModuleType:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(source)
    path = Path(source).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_checked_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    # dataclasses look their module up
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_probe(probe_class: type[Probe]) -> list[Check]:
    """Hold a probe against models whose answer is known; some seconds on one core.

    The contract comes first, then the known answers that fit the variables that the probe returns
    (see the module). Whatever the probe itself raises is a failed check.

    Args:
        probe_class: the class, which must build without arguments.

    Returns:
        One `Check` a row of the table: what was expected, what was measured, and whether it is ok.

    Raises:
        ValueError: for what is no probe class and for a constructor that needs arguments.

    >>> from dit_lens.probes import SpectralSplit
    >>> [row.name for row in check_probe(SpectralSplit) if not row.ok]
    []
    """
    if not _is_probe(probe_class):
        raise InvalidValue(
            f"{probe_class!r} is not a subclass of dit_lens.Probe; pass the class, as in "
            "check_probe(LayerLens)."
        )
    needed = [
        p.name
        for p in arguments(probe_class).values()
        if p.default is p.empty and p.kind in (0, 1, 3)
    ]
    if needed:
        raise InvalidValue(
            f"{probe_class.__name__} can't be built without arguments: its constructor needs "
            f"{', '.join(map(repr, needed))}; "
            f"give each a default, as in {needed[0]}=None."
        )
    bench = Bench(probe_class)
    rows = list(_guard("contract", lambda: contract(bench)))
    if bench.result is None:
        return rows
    names = [
        str(k)
        for k, v in bench.result.data_vars.items()
        if str(k) in KNOWN and not bench.obstacle(str(k))
    ]
    if "energy" in names:
        rows += _guard("energy", bench.energy)
    if "difference" in names:
        rows += _guard("difference", bench.difference)
    if {"agreement", "commitment", "gap"} & set(names):
        rows += _guard("gaussian", lambda: bench.gaussian(names))
    if "onset_layer" in names:
        rows += _guard("onset_layer", bench.onset)
    if hasattr(probe_class, "expected"):
        rows += _guard("expected", bench.expected)
    elif not names:
        found = ", ".join(f"{k} {dims(v.dims)}" for k, v in bench.result.data_vars.items())
        known = ", ".join(f"{k} {dims(v[0])}" for k, v in KNOWN.items())
        note = (
            f"nothing to compare: {probe_class.__name__} gives {found}; answers are known for "
            f"{known}, or from its expected(truth)"
        )
        rows.append(Check("known answers", "-", "-", note=note))
    skipped = [k for k in KNOWN if k in bench.result and k not in names]
    return rows + [Check(f"{k}: not compared", "-", "-", note=bench.obstacle(k)) for k in skipped]


def table(checks: list[Check], title: str = "") -> Table:
    """The checks as a rich table, one line each; what is not compared has no verdict."""
    from rich.markup import escape
    from rich.table import Column, Table
    from rich.text import Text

    shown = Table(
        Column("check", no_wrap=True),
        "expected",
        "measured",
        "error",
        "allowed",
        "",
        "note",
        title=escape(title),
    )
    for row in checks:
        cells = [
            ""
            if isinstance(v, float) and math.isnan(v) and i > 1
            else v
            if isinstance(v, str)
            else f"{v:.4g}"
            for i, v in enumerate((row.expected, row.measured, row.error, row.tolerance))
        ]
        verdict = (
            Text("FAIL", "bold red")
            if not row.ok
            else Text("" if row.expected == "-" else "ok", "green")
        )
        shown.add_row(Text(row.name), *map(Text, cells), verdict, Text(row.note))
    return shown


def contract(bench: Bench) -> Iterator[Check]:
    """What holds for every probe, on a small Gaussian model; finds out whether it needs twins, and
    leaves `bench.result`.
    """
    truth = gaussian(4.0, 0.25, layers=(1,), n_layers=3, sample_size=SIDE)
    plain_model, model = model_of(truth), model_of(truth)
    before, probe = _hooks(model), bench.probe_class()
    try:
        run, _ = bench.run(model, probe)
    except Exception as error:
        if "twins" not in str(error):
            raise
        bench.twin, probe = True, bench.probe_class()
        run, _ = bench.run(model, probe)
    seen = "a run of twins" if bench.twin else "a sampling run"
    yield Check("runs", "to the end", "runs of its own" if bench.by_itself else seen)
    left = _hooks(model) - before
    yield Check(
        "leaves no hooks",
        0.0,
        float(left),
        left,
        0,
        left == 0,
        "" if left == 0 else "of probe or trace",
    )
    result: Any = probe.result()
    plain, _ = bench.run(plain_model, None)
    off = max(
        float((a - b).abs().max())
        for a, b in ((run.outputs, plain.outputs), (run.latents, plain.latents))
    )
    note = (
        ""
        if off == 0
        else "the model answers otherwise under the probe: observe may not change the activation"
    )
    yield Check(
        "output unchanged",
        "same bits",
        "other bits" if off else "same bits",
        off,
        0,
        off == 0,
        note,
    )
    problem = _problem(result)
    kind = type(result).__name__
    yield Check(
        "gives numbers",
        "finite Dataset",
        kind if problem else "finite Dataset",
        ok=not problem,
        note=problem,
    )
    if not getattr(result, "data_vars", None):
        return
    # it may be a view of what the probe goes on changing
    result = bench.result = result.copy(deep=True)

    def again(what: str, probe: Probe, note: str, allowed: float = 1e-6, order: int = 1) -> Check:
        bench.run(model, probe, order=order)
        mine, other = result, probe.result()
        if order == -1:  # only what has a batch axis says which item is which
            items = [k for k, v in result.data_vars.items() if "batch" in v.dims]
            mine, other = result[items], other.isel(batch=slice(None, None, -1))[items]
        apart = _apart(mine, other)
        ok = apart <= allowed
        return Check(
            what,
            "same result",
            "same result" if ok else "another",
            apart,
            allowed,
            ok,
            "" if ok else note,
        )

    yield again(
        "same run, same result", bench.probe_class(), "two probes that saw the same run differ"
    )
    bench.run(model, probe, steps=13, seed=1)
    yield again(
        "starts afresh",
        probe,
        "used again, the probe gives another result: start must forget the last run",
    )
    # elsewhere in the batch, kernels may round in another way
    if "batch" in result.dims and not bench.twin and not bench.by_itself:
        note = "with the items in reverse order the result is not the reversed one"
        yield again("order of items", bench.probe_class(), note, allowed=1e-3, order=-1)


def _guard(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    # What a stranger's code raises is a finding, whatever its type.
    try:
        yield from checks()
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
        yield Check(name, "no error", type(error).__name__, ok=False, note=text)


def _is_probe(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Probe)


def _problem(result: Any) -> str:
    """Why this is no Dataset of finite numbers, or nothing.

    `onset_layer` may be NaN, which says that there is none.
    """
    if not isinstance(result, xr.Dataset):
        return f"result() gave a {type(result).__name__}; expected a non-empty xarray.Dataset"
    values = {str(k): v.values for k, v in result.data_vars.items()}
    if not sum(v.size for v in values.values()):
        return "result() gave an empty Dataset"
    for name, v in values.items():
        bad = (
            0 if v.dtype.kind not in "fc" or name == "onset_layer" else int((~np.isfinite(v)).sum())
        )
        if bad:
            return f"{bad} of {v.size} values of {name!r} are NaN or infinite"
    return ""


def _apart(a: Any, b: Any) -> float:
    """The largest difference of two Datasets' variables, relative to the variable's largest value;
    inf where nothing compares.
    """
    if set(a.data_vars) != set(b.data_vars) or any(a[k].shape != b[k].shape for k in a.data_vars):
        return math.inf
    worst = 0.0
    for name in a.data_vars:
        x, y = a[name].values, b[name].values
        if x.dtype.kind not in "fiu":
            worst = max(worst, 0.0 if (x == y).all() else math.inf)
        elif x.size:
            x, y = x.astype(float), y.astype(float)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            size = max(float(np.abs(x[np.isfinite(x)]).max(initial=0)), 1e-30)
            with np.errstate(invalid="ignore"):
                off = np.where(same, 0, np.abs(x - y) / size)
            worst = max(worst, float(np.where(np.isnan(off), math.inf, off).max()))
    return worst


def _hooks(model: HookedDiT) -> int:
    """What hangs on the model: dit_lens's listeners and torch's own hooks."""
    modules = model.transformer.modules()
    return model.instrumentation.listening + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules
    )
