"""The compiled library: built, dispatched, sharing torch's threads; and the words said where it is missing."""

from __future__ import annotations

import importlib
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scrimp import native
from scrimp.select import gradient_norm_bound
from scrimp.select.importance import gradient_norm_bound_twin

LEVELS = {"generic", "avx2", "avx512", "neon"}


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module, its instruction set put back afterwards."""
    if not native.available() and not os.environ.get("SCRIMP_REQUIRE_NATIVE"):
        pytest.skip("the native library is not built here; CI sets SCRIMP_REQUIRE_NATIVE and then this fails")
    module = native.load()
    assert module is not None
    chosen = module.capabilities()["simd"]
    yield module
    module.set_simd(chosen)


def runnable(kernels: ModuleType) -> list[str]:
    """The instruction sets this processor has, found by asking for each."""
    found = []
    for level in sorted(LEVELS):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        found.append(level)
    return found


def vectors(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator), torch.randn(count, generator=generator)


def run(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_capabilities_name_the_machine(kernels: ModuleType) -> None:
    found = native.capabilities()
    assert found is not None
    assert set(found) == {"simd", "openmp", "threads", "compiler"}
    assert found["simd"] in LEVELS
    assert found["compiler"].split()[0] in {"gcc", "clang", "msvc"}
    if platform.machine() == "x86_64" and sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text().split()
        assert (found["simd"] == "generic") == ("avx2" not in flags)
        assert (found["simd"] == "avx512") == ("avx512vl" in flags and "avx512dq" in flags and "avx512bw" in flags)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 4095, 4096, 4097, 300_001])
def test_dot_agrees_with_its_reference(kernels: ModuleType, count: int) -> None:
    a, b = vectors(count)
    exact = float(a.double() @ b.double())
    scale = float(a.double().abs() @ b.double().abs())
    # 4096 float32 products a block in 16 lanes: at most 256 + 4 roundings of 2**-24 each, relative to the sum of |ab|.
    assert abs(kernels.dot(a, b) - exact) <= 261 * 2**-24 * scale


@given(st.lists(st.integers(-8, 8), max_size=70))
def test_dot_of_small_integers_is_exact(values: list[int]) -> None:
    module = native.load()
    if module is None:
        pytest.skip("the native library is not built here")
    assert module.dot(torch.tensor(values, dtype=torch.float32), torch.ones(len(values))) == sum(values)


def test_every_instruction_set_and_thread_count_gives_the_same_bits(kernels: ModuleType) -> None:
    a, b = vectors(300_001)
    results = set()
    for level in runnable(kernels):
        kernels.set_simd(level)
        assert kernels.capabilities()["simd"] == level
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.add(kernels.dot(a, b))
    assert len(results) == 1


def test_reads_torch_and_numpy_memory_in_place(kernels: ModuleType) -> None:
    a = torch.arange(6, dtype=torch.float32)
    assert kernels.dot(a, a) == kernels.dot(a.numpy(), a.numpy()) == 55.0
    view = a[2:5]
    assert kernels.dot(view, view) == 29.0
    read_only = numpy.ones(3, dtype=numpy.float32)
    read_only.flags.writeable = False
    assert kernels.dot(read_only, read_only) == 3.0


@pytest.mark.parametrize(
    "other",
    [torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2], torch.zeros(2, 2), torch.zeros(4, device="meta"), None],
    ids=["float64", "strided", "matrix", "meta", "none"],
)
def test_refuses_what_it_would_have_to_copy(kernels: ModuleType, other: object) -> None:
    with pytest.raises(TypeError, match=r"dot\(\)"):
        kernels.dot(torch.zeros(4), other)


def test_refuses_other_lengths_and_unknown_sets(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 4 and 3"):
        kernels.dot(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match="got 'sse9'"):
        kernels.set_simd("sse9")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels use OpenMP on Linux only")
@pytest.mark.parametrize("first", ["import torch", "from scrimp import native; native.load()"])
def test_one_openmp_runtime_whichever_comes_first(kernels: ModuleType, first: str) -> None:
    code = f"""
{first}
import torch
from scrimp import native
from scrimp.select import gradient_norm_bound
from scrimp.select.importance import gradient_norm_bound_twin
a = torch.ones(200_000)
assert native.load().dot(a, a) == 200_000 and (a @ a).item() == 200_000
seen = {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}}
torch.set_num_threads(1)
one = native.capabilities()["threads"]
torch.set_num_threads(2)
print(len(seen), one, native.capabilities()["threads"])
"""
    assert run(code) == "1 1 2"


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the module was not built."""
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> ModuleType:
        if name == "scrimp.native._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    def forget() -> None:
        native._load.cache_clear()
        native._warn_once.cache_clear()

    forget()
    monkeypatch.setattr(importlib, "import_module", absent)
    yield
    forget()


@pytest.mark.usefixtures("without_library")
def test_a_missing_library_is_said_once_and_only_on_use() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert native.available() is False
        assert native.capabilities() is None
        assert said == []
        assert native.load() is None
        assert native.load() is None
    (warning,) = said
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    assert "install g++" in str(warning.message)


@pytest.mark.usefixtures("without_library")
def test_a_broken_library_is_missing_for_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, package: str | None = None) -> ModuleType:
        raise ImportError("undefined symbol: GOMP_parallel")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="does not load .undefined symbol: GOMP_parallel"):
        assert native.load() is None


@pytest.mark.slow
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """`pip install` with compilers that always fail, into a folder of its own."""
    blind = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    project = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(project)]
    subprocess.run(command, env=blind, check=True, capture_output=True, text=True)
    search = [str(tmp_path), str(Path(torch.__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {search}; from scrimp import native; print(native.__file__); "
    # -S: an editable install of this checkout would otherwise stand in for the one just made.
    shown = run(code + "print(native.available(), native.capabilities())", "-S").splitlines()
    assert shown == [f"{tmp_path}/scrimp/native/__init__.py", "False None"]


@pytest.mark.parametrize("shape", [(1, 2), (64, 10), (7, 1000), (0, 5)])
def test_the_gradient_norm_bound_is_its_twins(kernels: ModuleType, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(shape, generator=generator)
    targets = torch.randint(0, shape[1], shape[:1], generator=generator)
    targets[::5] = -100
    found = torch.full(shape[:1], float("nan"))
    kernels.gradient_norm_bound(logits.data_ptr(), targets.data_ptr(), *shape, -100, found.data_ptr())
    exact = gradient_norm_bound_twin(logits.double(), targets, -100)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, gradient_norm_bound(logits, targets))


def test_the_gradient_norm_bound_keeps_small_values_and_refuses_strange_targets(kernels: ModuleType) -> None:
    logits, found = torch.tensor([[30.0, 0.0]]), torch.empty(1)
    for target, expected in ((0, 2**0.5 * math.exp(-30)), (1, 2**0.5)):
        targets = torch.tensor([target])
        kernels.gradient_norm_bound(logits.data_ptr(), targets.data_ptr(), 1, 2, -100, found.data_ptr())
        assert float(found) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(IndexError, match="expected targets from 0 to 1; got 2"):
        gradient_norm_bound(logits, torch.tensor([2]))
