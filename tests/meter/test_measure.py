"""`measure`: every figure in a pass of its own, unknown ones None."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import scrimp.meter
from scrimp.meter import Cost, Reading, measure
from scrimp.primitives.errors import InputError

LEFT, RIGHT = torch.ones(8, 16), torch.ones(16, 4)


def test_every_figure_of_a_product():
    cost = measure(lambda: LEFT @ RIGHT, repeats=3)
    assert isinstance(cost, Cost)
    assert cost.flops.value == 2 * 8 * 16 * 4
    assert cost.flops.missed == ()
    assert cost.peak_bytes.value == 8 * 4 * 4
    assert cost.saved_bytes.value == 0
    assert cost.seconds.value > 0
    assert cost.cpu_seconds.value > 0
    assert "median of 3" in cost.seconds.how
    assert cost.stored_bytes == Reading()
    assert cost.energy_modelled.value is None


def test_a_call_with_unknown_work_says_so():
    assert measure(lambda: torch.cdist(LEFT, LEFT), repeats=1).flops.missed == ("aten::_cdist_forward",)


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 1), (2, 4)])
def test_the_function_is_called_as_often_as_promised(warmup, repeats):
    calls = []
    measure(lambda: calls.append(1), warmup=warmup, repeats=repeats)
    assert len(calls) == warmup + repeats + 3


def test_the_clock_shares_no_pass_with_a_counter():
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    watched = []
    measure(lambda: watched.append(_get_current_dispatch_mode() is not None), warmup=1, repeats=2)
    assert watched == [False] * 3 + [True] * 3


def test_without_a_meter_joules_are_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("scrimp.meter.energy._find_counters", lambda root: ([], (), None))
    assert measure(lambda: None, repeats=1).joules == Reading(None, "not measured: no meter")


def test_joules_are_per_call(monkeypatch):
    from scrimp.meter.energy import _Counter

    readings = iter([100, 108])
    counter = _Counter("bench meter", "1 J steps", 1.0, lambda: next(readings), None)
    monkeypatch.setattr("scrimp.meter.energy._find_counters", lambda root: ([counter], (), None))
    joules = measure(lambda: None, repeats=4).joules
    assert joules.value == 2.0
    assert "bench meter" in joules.how
    assert "per call over 4" in joules.how


def test_stored_bytes_are_those_on_disk_each_file_once(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "weights").write_bytes(b"x" * 100)
    (tmp_path / "deep" / "codes").write_bytes(b"x" * 11)
    assert measure(lambda: None, repeats=1, stored=tmp_path / "weights").stored_bytes.value == 100
    both = measure(lambda: None, repeats=1, stored=[str(tmp_path), tmp_path / "weights"]).stored_bytes
    assert both.value == 111
    assert "2 files" in both.how


def test_what_the_call_writes_is_stored_bytes(tmp_path):
    file = tmp_path / "out"
    assert measure(lambda: file.write_bytes(b"12345"), repeats=1, stored=file).stored_bytes.value == 5


@pytest.mark.parametrize(
    ("fn", "options"),
    [(3, {}), (lambda: None, {"repeats": 0}), (lambda: None, {"warmup": -1}), (lambda: None, {"stored": "missing"})],
)
def test_wrong_input_is_refused(fn, options):
    with pytest.raises(InputError):
        measure(fn, **options)


def test_errors_of_the_call_pass_through():
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 // 0)


def test_every_promised_name_is_there():
    assert all(callable(getattr(scrimp.meter, name)) for name in scrimp.meter.__all__)
    assert set(scrimp.meter.__all__) <= set(dir(scrimp.meter))
    with pytest.raises(AttributeError, match="nothing"):
        scrimp.meter.nothing  # noqa: B018


def test_measure_stays_the_function_when_its_module_is_imported():
    code = "import scrimp.meter.measure, scrimp.meter; from scrimp.meter import measure; print(measure.__name__)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "measure\n"
    )


def test_naming_the_meter_loads_no_torch():
    code = (
        "import sys; from scrimp.meter import Cost, EnergyWindow, ResidentPeak, carbon, measure, paired, peak_resident;"
        "print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
