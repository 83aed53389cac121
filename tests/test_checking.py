"""The checker: right probes pass, and every way of being wrong is caught in its own row."""

import numpy as np
import pytest
import torch
import xarray as xr

from dit_lens import Bands, Probe
from dit_lens.commands import main
from dit_lens.measures.agreement import Agreement, agreement
from dit_lens.measures.commitment import fit_commitment
from dit_lens.model.noise_schedule import log_snr, predict_x0
from dit_lens.probes import LayerLens, SpectralSplit, TwinDivergence
from dit_lens.testing import check_probe as check
from dit_lens.testing import known_answers
from dit_lens.testing.probe_checks import find_probe, table


@pytest.fixture
def quick(monkeypatch):
    """Fewer runs, for what is far off."""
    monkeypatch.setattr(known_answers, "SPECTRA", {"falling": (4.0, 0.25)})
    monkeypatch.setattr(known_answers, "ITEMS", 64)


def failed(probe_class):
    """The failing rows by name."""
    return {row.name: row for row in check(probe_class) if not row.ok}


@pytest.mark.parametrize(
    "name, compared", [("SpectralSplit", 2), ("TwinDivergence", 6), ("LayerLens", 3)]
)
def test_the_built_in_probes_pass(name, compared, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", name]) == 0
    shown = capsys.readouterr().out
    assert f"{name}: " in shown and "0 failed" in shown and "FAIL" not in shown
    assert sum(word in shown for word in ("energy: bands sum", "energy: 6 rings")) in (0, 2)
    answers = (
        "energy: bands",
        "energy: 6",
        "difference: low x",
        "difference: high x",
        "agreement: ",
    )
    assert sum(shown.count(answer) for answer in answers) == compared
    assert not list(tmp_path.iterdir())


class Factor(SpectralSplit):
    def result(self):
        return super().result() * 1.5


class Flipped(SpectralSplit):
    def result(self):
        r = super().result()
        return r.assign(energy=(r.energy.dims, r.energy.values[..., ::-1]))


class Edits(SpectralSplit):
    def observe(self, activation, site):
        super().observe(activation, site)
        activation.data.mul_(1.001)  # which PyTorch does not count


class Accumulates(SpectralSplit):
    """Adds to what it returned before, in the same array."""

    total = None

    def result(self):
        r = super().result()
        if self.total is None:
            self.total = r.copy(deep=True)
        else:
            self.total.energy.values[:] += r.energy.values[:, : self.total.sizes["step"]]
        return self.total


class ClassWide(SpectralSplit):
    count = 0

    def result(self):
        ClassWide.count += 1
        return super().result() * ClassWide.count


class Nan(SpectralSplit):
    def result(self):
        r = super().result()
        r.energy[0, 0, 0, 0] = np.nan
        return r


class Dict(SpectralSplit):
    def result(self):
        return {"energy": super().result().energy.values}


class Empty(SpectralSplit):
    def result(self):
        return xr.Dataset()


class Placed(SpectralSplit):
    """Weighs the items by their place in the batch."""

    def result(self):
        r = super().result()
        return r * xr.DataArray(np.arange(1.0, 1 + r.sizes["batch"]), dims="batch")


class Hooks(SpectralSplit):
    def start(self, model):
        super().start(model)
        model.add_hook("resid_post", lambda a, hook: None)


class Raises(SpectralSplit):
    def observe(self, activation, site):
        raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    "probe, row, text",
    [
        (Factor, "energy: bands sum to |h|²", "relative; worst of 192"),
        (Flipped, "energy: 6 rings by numpy.fft", "relative; worst of 1152"),
        (
            Edits,
            "output unchanged",
            "the model answers otherwise under the probe: observe may not change the activation",
        ),
        (
            Accumulates,
            "starts afresh",
            "used again, the probe gives another result: start must forget the last run",
        ),
        (ClassWide, "same run, same result", "two probes that saw the same run differ"),
        (Nan, "gives numbers", "1 of 2880 values of 'energy' are NaN or infinite"),
        (Dict, "gives numbers", "result() gave a dict; expected a non-empty xarray.Dataset"),
        (Empty, "gives numbers", "result() gave an empty Dataset"),
        (
            Placed,
            "order of items",
            "with the items in reverse order the result is not the reversed one",
        ),
        (Hooks, "leaves no hooks", "of probe or trace"),
        (Raises, "contract", "ZeroDivisionError: no luck"),
    ],
)
def test_each_way_of_being_wrong_has_its_row(probe, row, text):
    rows = failed(probe)
    assert rows[row].note == text, rows
    assert len(rows) == 1 or probe in (Factor, ClassWide, Placed, Nan, Edits), rows


def test_a_factor_shows_as_that_factor():
    row = failed(Factor)["energy: bands sum to |h|²"]
    assert row.error == pytest.approx(0.5, rel=1e-3) and row.measured == pytest.approx(
        1.5 * row.expected, rel=1e-3
    )


class SwappedTwins(TwinDivergence):
    def result(self):
        r = super().result()
        return r.assign(difference=(r.difference.dims, r.difference.values[..., ::-1]))


class LateTwins(TwinDivergence):
    """Reports each layer's difference one layer late."""

    def result(self):
        return super().result().roll(layer=1)


class Squared(LayerLens):
    def result(self, target=None, by_label=True):
        r = super().result(target, by_label)
        return r.assign(agreement=r.agreement**2)


class Backwards(LayerLens):
    def result(self, target=None, by_label=True):
        r = super().result(target, by_label)
        return r.assign(agreement=(r.agreement.dims, r.agreement.values[..., ::-1]))


@pytest.mark.slow
def test_wrong_differences_and_agreements_are_caught(quick):
    for probe in (LateTwins, SwappedTwins):
        rows = failed(probe)
        assert len(rows) == 6 and all(name.startswith("difference: ") for name in rows)
    row = rows["difference: low x 1.3 in layer 1/6"]
    assert sorted([row.expected, row.measured]) == pytest.approx([1, 1.69], rel=1e-4)
    assert set(failed(Squared)) == set(failed(Backwards)) == {"agreement: falling spectrum"}


class OnePass(Probe):
    """Commitment from x0 at each step against the finished latents: the one-pass estimator as a
    stranger would write it.
    """

    names, shift, width = "hook_sample", 0.0, 1.0

    def __init__(self, bands=None):
        self.wanted = bands

    def start(self, model):
        self.scheduler, self.x0, self.t = model.scheduler, [], []
        self.bands = self.wanted or Bands.radial(model.cfg.pixels, cut=0.1)

    def observe(self, activation, site):
        self.x0.append(
            predict_x0(
                self.scheduler, site.call.x, activation[:, : site.call.x.shape[1]], site.call.t
            )
        )
        self.t.append(site.call.t[0])

    def result(self, target=None):
        end = self.x0[-1] if target is None else target
        stats = Agreement.stack([agreement(x0, end, self.bands) for x0 in self.x0])
        snr = log_snr(self.scheduler, torch.stack(self.t).cpu())
        r = fit_commitment(
            stats, range(len(self.t)), snr, names=self.bands.names, squared=True, resamples=200
        )
        middle = r.gap_interval.mean("bound")
        return xr.Dataset(
            {
                "commitment": r.commitment + self.shift,
                "gap": r.gap,
                "gap_interval": middle + (r.gap_interval - middle) * self.width,
            }
        )


class Shifted(OnePass):
    shift = 1.0


class TooSure(OnePass):
    width = 0.01


@pytest.mark.slow
def test_commitment_and_gap():
    rows = {row.name: row for row in check(OnePass)}
    assert all(row.ok for row in rows.values()), rows
    assert rows["gap in log_snr: white spectrum"].expected == pytest.approx(0, abs=1e-6)
    falling = rows["gap in log_snr: falling spectrum"].expected
    assert falling == pytest.approx(2.77, abs=0.5)  # log 4 - log 0.25, less what 20 steps take off
    assert rows["gap_interval in step"].measured in ("2 of 3", "3 of 3")


@pytest.mark.slow
def test_a_shifted_commitment_and_an_interval_too_narrow_are_caught(monkeypatch):
    monkeypatch.setattr(known_answers, "ITEMS", 64)
    assert {"gap_interval in step", "gap_interval in log_snr"} <= set(failed(TooSure))
    monkeypatch.setattr(known_answers, "SPECTRA", {"white": (1.0, 1.0)})
    assert set(failed(Shifted)) == {
        "commitment in step: white spectrum",
        "commitment in log_snr: white spectrum",
    }


class Onset(Probe):
    """The first layer whose attention changes the token mean of the differences between items."""

    names, late = ["resid_pre", "resid_post"], 0

    def start(self, model):
        self.size, self.layers = {}, model.cfg.n_layers

    def observe(self, activation, site):
        spread = activation.mean(1) - activation.mean((0, 1))
        key = site.layer, "pre" if "pre" in site.name else "post"
        self.size[key] = self.size.get(key, 0.0) + spread.square().sum().item()

    def result(self):
        growth = np.log([self.size[i, "post"] / self.size[i, "pre"] for i in range(self.layers)])
        off = np.abs(growth) > 0.1
        found = np.flatnonzero(off)
        return xr.Dataset(
            {"onset_layer": -1 if off.all() or not off.any() else int(found[0]) + self.late}
        )


class OnsetLate(Onset):
    late = 1


@pytest.mark.slow
def test_onset():
    rows = check(Onset)
    assert all(row.ok for row in rows), rows
    assert [row.expected for row in rows if row.name.startswith("onset_layer")] == [2, 4, 6, -1, -1]
    assert {row.measured - row.expected for row in failed(OnsetLate).values()} == {1}


class Other(Probe):
    names = "resid_mid"

    def start(self, model):
        self.norms = []

    def observe(self, activation, site):
        self.norms.append(activation.norm().item())

    def result(self):
        return xr.Dataset({"norm": ("seen", self.norms)})


class Hooked(Other):
    """`expected` of a quantity without a known name: how many layers were seen."""

    wrong = 0

    def result(self):
        return xr.Dataset({"count": float(len(self.norms))})

    def expected(self, truth):
        return xr.Dataset(
            {"count": known_answers.STEPS * len(truth.transformer.transformer_blocks) + self.wrong}
        )


class HookedWrong(Hooked):
    wrong = 1


@pytest.mark.slow
def test_a_probe_can_say_what_it_should_be_and_is_told_when_nothing_compares(quick):
    rows = check(Hooked)
    assert all(row.ok for row in rows) and [row.name for row in rows][-2:] == [
        "count: gaussian",
        "count: planted",
    ]
    assert set(failed(HookedWrong)) == {"count: gaussian", "count: planted"}
    (row,) = [row for row in check(Other) if row.name == "known answers"]
    assert row.ok and row.note.startswith(
        "nothing to compare: Other gives norm [seen]; answers are known for energy [name, step,"
    )


class NoBands(LayerLens):
    def __init__(self):
        super().__init__()


@pytest.mark.slow
def test_what_is_not_compared_says_why(quick):
    notes = {row.name: row.note for row in check(NoBands) + check(TwinDivergence)}
    assert notes["agreement: not compared"].startswith(
        "its bands are not known; let the constructor take `bands`"
    )
    assert notes["energy: not compared"].startswith(
        "it has the dimensions [channels, layer, step, band]; expected [name,"
    )


FILE = """
import dit_lens
from dit_lens.probes import LayerLens
class Mine(dit_lens.Probe):
    def __init__(self, radius): ...
class Plain: ...
"""


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("raise SystemExit('bye')")
    for where, text in (
        ("SpectralSplitt", "No probe is called 'SpectralSplitt'; installed: 'SpectralSplit'"),
        ("nofile.py:A", "There is no file 'nofile.py'; expected path/to/file.py:ClassName."),
        (
            "mine.py",
            "'mine.py' names no class; expected path/to/file.py:ClassName; its probes: "
            "'LayerLens', 'Mine'.",
        ),
        ("mine.py:Mime", "'mine.py' has no class 'Mime'; its probes: 'LayerLens', 'Mine'"),
        ("mine:Mime", "'mine' has no class 'Mime'; its probes: 'LayerLens', 'Mine'"),
        ("mine.py:Plain", "which is not a subclass of dit_lens.Probe; its probes: "),
        (
            "mine.py:Mine",
            "Mine can't be built without arguments: its constructor needs 'radius'; give each a "
            "default, as in",
        ),
        ("broken.py:A", "'broken.py' can't be imported: SystemExit: bye."),
        ("no.such:A", "'no.such' can't be imported: ModuleNotFoundError: No module named 'no'."),
    ):
        assert main(["check", where]) == 2, where
        err = capsys.readouterr().err
        assert err.startswith("dit-lens: ") and text in err and err.count("\n") == 1, err
    with pytest.raises(
        ValueError, match="is not a subclass of dit_lens.Probe; pass the class, as in check"
    ):
        check(LayerLens())
    assert find_probe("mine.py:LayerLens") is LayerLens


def test_a_failure_is_exit_code_1_and_shown(tmp_path, capsys):
    text = (
        "from dit_lens.probes import LayerLens\n"
        "class Bad(LayerLens):\n"
        "    def result(self): return [1, 2]\n"
    )
    (tmp_path / "bad.py").write_text(text)
    assert main(["check", f"{tmp_path}/bad.py:Bad"]) == 1
    shown = capsys.readouterr().out
    assert "1 failed" in shown and "FAIL" in shown and "result() gave a list; expected a" in shown
    assert table([]).row_count == 0
