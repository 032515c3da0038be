"""Energy: a meter or nothing. The meters here are a made-up powercap tree and a made-up NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from scrimp.meter import EnergyWindow, Reading, carbon, energy
from scrimp.meter.energy import idle_power, modelled
from scrimp.primitives.errors import InputError, MissingExtraError

WRAP = 262_143_328_850


class Powercap:
    """A tree as the kernel shows it: two packages, a part of one, the whole platform, and another driver's copy."""

    def __init__(self, root):
        self.root = root
        self.add("intel-rapl:0", "package-0", 1_000_000)
        self.add("intel-rapl:0:0", "core", 5)
        self.add("intel-rapl:1", "package-1", 2_000_000)
        self.add("intel-rapl:2", "psys", 7)
        self.add("intel-rapl-mmio:0", "package-0", 1_000_000)

    def add(self, folder, name, microjoules):
        (self.root / folder).mkdir()
        (self.root / folder / "name").write_text(f"{name}\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
        self.set(folder, microjoules)

    def set(self, folder, microjoules):
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path):
    return Powercap(tmp_path)


def test_packages_add_up_and_nothing_counts_twice(powercap):
    with EnergyWindow(root=powercap.root) as window:
        powercap.set("intel-rapl:0", 1_500_000)
        powercap.set("intel-rapl:1", 2_250_000)
        for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
            powercap.set(other, 10**9)
    assert window.reading.value == pytest.approx(0.75)
    assert window.reading.missed == ()
    for words in (
        "RAPL package-0",
        "RAPL package-1",
        "1 uJ",
        "window under 10 s: indicative only",
        "idle power included",
    ):
        assert words in window.reading.how


def test_a_counter_that_wraps_goes_on(powercap):
    powercap.set("intel-rapl:0", WRAP - 400_000)
    with EnergyWindow(root=powercap.root) as window:
        powercap.set("intel-rapl:0", 100_000)
    assert window.reading.value == pytest.approx(0.5)


def test_a_long_window_wraps_more_than_once(powercap, monkeypatch):
    """Read in between, a counter may pass any number of times; each reading here is made a wrap short of the last."""
    monkeypatch.setattr(energy, "_POLL_SECONDS", 1e-4)
    seen = iter([0, WRAP - 1, WRAP - 2, WRAP - 3])
    waiting = []

    def read():
        value = next(seen, WRAP - 4)
        if value == WRAP - 4:
            waiting.append(True)
        return value

    package = energy._package(powercap.root / "intel-rapl:0", "package-0")
    counter = energy.replace(package, read=read)
    monkeypatch.setattr(energy, "_find_counters", lambda root: ([counter], (), None))
    with EnergyWindow() as window:
        for _ in range(10_000):
            if waiting:
                break
            energy.time.sleep(1e-3)
    assert window.reading.value == pytest.approx(1e-6 * (4 * WRAP - 4))


def test_a_window_can_be_used_again(powercap):
    window = EnergyWindow(root=powercap.root)
    for start, joules in ((1_000_000, 1.0), (5_000_000, 2.0)):
        powercap.set("intel-rapl:0", start)
        with window:
            powercap.set("intel-rapl:0", start + int(joules * 1e6))
        assert window.reading.value == pytest.approx(joules)


def test_idle_power_is_subtracted_when_given(powercap, monkeypatch):
    monkeypatch.setattr(energy.time, "perf_counter", iter([0.0, 20.0]).__next__)
    with EnergyWindow(root=powercap.root, idle_watts=3.0) as window:
        powercap.set("intel-rapl:0", 101_000_000)
    assert window.reading.value == pytest.approx(100 - 3 * 20)
    assert "idle power 3 W subtracted" in window.reading.how
    assert "short" not in window.reading.how


def test_idle_power_is_watts(powercap, monkeypatch):
    monkeypatch.setattr(energy.time, "sleep", lambda seconds: powercap.set("intel-rapl:0", 1_000_000 + 8_000_000))
    assert idle_power(4.0, root=powercap.root).value == pytest.approx(2.0)
    with pytest.raises(InputError):
        idle_power(0.0)


def no_powercap(root):
    pass


def empty_powercap(root):
    root.mkdir()


def forbidden(root):
    root.mkdir()
    tree = Powercap(root)
    (tree.root / "intel-rapl:1" / "energy_uj").unlink()
    (tree.root / "intel-rapl:1" / "energy_uj").mkdir()  # fails for root too, as a file without permission would not


def garbage(root):
    root.mkdir()
    Powercap(root).set("intel-rapl:0", "no number")


@pytest.mark.parametrize("lay", [no_powercap, empty_powercap, forbidden, garbage])
def test_without_a_readable_meter_there_is_no_joule(tmp_path, lay):
    lay(tmp_path / "powercap")
    with EnergyWindow(root=tmp_path / "powercap") as window:
        pass
    assert window.reading.value is None
    assert window.reading.how.startswith("not measured: no meter")
    if lay in (forbidden, garbage):
        assert "intel-rapl:" in window.reading.how
    assert idle_power(1e-3, root=tmp_path / "powercap").value is None


def test_a_meter_lost_on_the_way_gives_none(powercap):
    with EnergyWindow(root=powercap.root) as window:
        (powercap.root / "intel-rapl:1" / "energy_uj").unlink()
    assert window.reading.value is None
    assert "failed" in window.reading.how


class NVMLError(Exception):
    pass


class Nvml:
    """NVML as nvidia-ml-py gives it, one GPU of known uuid."""

    NVMLError = NVMLError

    def __init__(self, *readings):
        self.readings = iter(readings)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-abc"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        reading = next(self.readings)
        if isinstance(reading, Exception):
            raise reading
        return reading


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA in use, and ``gpu(nvml)`` to say which NVML is installed."""
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(uuid="abc"),
        synchronize=lambda: None,
    )
    monkeypatch.setattr(energy, "cuda_in_use", lambda: cuda)
    return lambda nvml: monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_gpu_and_processor_add_up(gpu, powercap):
    gpu(Nvml(0, 5_000, 6_500))
    with EnergyWindow(root=powercap.root) as window:
        powercap.set("intel-rapl:0", 3_000_000)
    assert window.reading.value == pytest.approx(2.0 + 1.5)
    assert "NVML GPU-abc (1 mJ" in window.reading.how
    assert window.reading.missed == ()


def test_a_gpu_alone_names_the_processor_as_missed(gpu, tmp_path):
    gpu(Nvml(0, 5_000, 6_500))
    with EnergyWindow(root=tmp_path) as window:
        pass
    assert window.reading.value == pytest.approx(1.5)
    assert window.reading.missed == ("cpu",)


@pytest.mark.parametrize("nvml", [Nvml(NVMLError("not supported")), None], ids=["old GPU", "not installed"])
def test_a_gpu_without_counter_is_named_as_missed(gpu, powercap, nvml):
    gpu(nvml)
    with EnergyWindow(root=powercap.root) as window:
        pass
    assert window.reading.value == 0.0
    assert window.reading.missed == ("gpu",)


@pytest.mark.parametrize("end", [NVMLError("lost"), 4_000], ids=["lost", "reset"])
def test_a_gpu_counter_that_fails_gives_none(gpu, tmp_path, end):
    gpu(Nvml(0, 5_000, end))
    with EnergyWindow(root=tmp_path) as window:
        pass
    assert window.reading.value is None


def test_the_model_says_what_it_is():
    reading = modelled(65.0, 10.0)
    assert reading.value == 650.0
    assert reading.how == "modelled: 65 W x 10 CPU s; relative use only"
    for watts, seconds in ((0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, -1.0)):
        with pytest.raises(InputError):
            modelled(watts, seconds)


def test_carbon_comes_from_measured_joules_only():
    grams = carbon(Reading(3.6e6, "RAPL package-0", ("gpu",)), 400.0, "national grid, 2024")
    assert grams.value == pytest.approx(400.0)
    assert "400 g/kWh (national grid, 2024)" in grams.how
    assert grams.missed == ("gpu",)
    for nothing in (Reading(None, "not measured: no meter"), modelled(65.0, 10.0)):
        assert carbon(nothing, 400.0, "national grid, 2024").value is None


@pytest.mark.parametrize(("grams", "source"), [(-1.0, "grid"), (float("inf"), "grid"), (400.0, " ")])
def test_carbon_needs_an_intensity_and_its_source(grams, source):
    with pytest.raises(InputError, match="source"):
        carbon(Reading(1.0, "RAPL package-0"), grams, source)


def test_the_extra_that_brings_nvml_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtraError, match=r"scrimp\[gpu\]"):
        energy.require("pynvml", "gpu")
