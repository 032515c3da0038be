"""Resident memory, as the system counts it."""

from __future__ import annotations

import sys

import pytest

from scrimp.meter import ResidentPeak, peak_resident
from scrimp.primitives.errors import InputError

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a stretch can be had on Linux only")

WORK = """
import sys

def hold(mebibytes, *, times=1):
    assert "torch" not in sys.modules and "scrimp" not in sys.modules
    print("noise")
    return len(bytearray(mebibytes << 20)) * times

class Deep:
    @staticmethod
    def hold(record):
        return bytearray(record["mebibytes"] << 20)

def fail():
    raise LookupError("no such thing")

def leave():
    raise SystemExit(3)

def die():
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    import time
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "resident_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)


@linux
def test_peak_of_a_stretch_forgets_what_came_before_and_keeps_what_is_gone():
    bytearray(300 * MIB)
    with ResidentPeak() as small:
        pass
    with ResidentPeak() as large:
        bytearray(200 * MIB)
    if small.reading.value is None:
        pytest.skip(small.reading.how)
    assert 190 * MIB < large.reading.value - small.reading.value < 260 * MIB
    assert "VmHWM" in large.reading.how


def test_where_the_mark_cannot_be_reset_nothing_is_claimed(tmp_path):
    with ResidentPeak(tmp_path / "no-proc") as peak:
        pass
    assert peak.reading.value is None
    assert peak.reading.how.startswith("not measured:")


def test_a_fresh_process_knows_nothing_of_this_one(work):
    ballast = bytearray(300 * MIB)
    small, large = (peak_resident("resident_work:hold", size) for size in (1, 120))
    assert small.value < 100 * MIB < len(ballast)
    assert 110 * MIB < large.value - small.value < 130 * MIB


def test_names_may_be_nested_and_arguments_structured(work):
    assert peak_resident("resident_work:Deep.hold", {"mebibytes": 50}).value > 50 * MIB


@pytest.mark.parametrize(
    ("name", "words"),
    [("fail", "LookupError: no such thing"), ("leave", "exit code 3"), ("die", "signal 9"), ("missing", "missing")],
)
def test_failures_say_what_happened(work, name, words):
    with pytest.raises(RuntimeError, match=words) as caught:
        peak_resident(f"resident_work:{name}")
    assert f"resident_work:{name}" in str(caught.value)


def test_a_process_that_hangs_is_stopped(work):
    with pytest.raises(RuntimeError, match="did not end"):
        peak_resident("resident_work:hang", timeout=1.0)


@pytest.mark.parametrize("name", ["resident_work.hold", ":hold", "resident_work:"])
def test_a_name_without_its_colon_is_refused(name):
    with pytest.raises(InputError, match="colon"):
        peak_resident(name)


def test_arguments_must_be_json():
    with pytest.raises(InputError, match="JSON"):
        peak_resident("resident_work:hold", object())
