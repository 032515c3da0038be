"""Facts with one home, arrows that point down, and what a wheel carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import scrimp

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILTIN = "src/scrimp/data/builtin/"
MIB = 2**20


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the checkout that are, or would be, under version control."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nothing is tracked")
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts(tracked: list[str]) -> dict[str, str]:
    """The text files among them."""
    found = {}
    for name in tracked:
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            found[name] = content.decode("utf-8", errors="replace")
    return found


def lines_with(pattern: str, tracked: list[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in texts(tracked).items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_the_version_is_the_same_everywhere() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == scrimp.__version__
    released = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == scrimp.__version__
    try:
        installed = importlib.metadata.version("scrimp")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert installed == scrimp.__version__


def test_the_licence_is_the_same_everywhere() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_every_core_dependency_is_justified() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    wanted = [re.match(r"[\w-]+", line)[0] for line in PYPROJECT["project"]["dependencies"]]
    assert [package for package, _ in rows] == wanted


def test_no_file_is_heavy(tracked: list[str]) -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    heavy = {name: size for name, size in sizes.items() if size > 2 * MIB and not name.startswith(BUILTIN)}
    assert heavy == {}
    assert sum(size for name, size in sizes.items() if name.startswith(BUILTIN)) <= 6_000_000


def test_no_path_of_one_machine(tracked: list[str]) -> None:
    assert lines_with(r"(?<![\w.])/(work|tmp|root|farm|home|Users)/[a-zA-Z]", tracked) == []


def test_no_host_of_a_package_registry(tracked: list[str]) -> None:
    hosts = r"\b(pypi|pythonhosted|npmjs)\W(org|com)\b|\b(deb|security|ftp)\Wdebian\W|\bdownload\Wpytorch\W"
    assert lines_with(hosts, tracked) == []


@pytest.mark.parametrize(
    ("check", "line"),
    [(test_no_path_of_one_machine, "open('/ro" + "ot/data')"), (test_no_host_of_a_package_registry, "py" + "pi.org")],
)
def test_the_searches_find(check: object, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"bad\.py:1"):
        check(["bad.py"])


def test_importing_scrimp_loads_no_torch() -> None:
    code = "import sys, scrimp; print(sorted({'torch', 'numpy', 'timm', 'accelerate', 'tyro'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def lint_imports(package: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with this project's contracts over the copy of the package in ``package``."""
    linter = Path(importlib.util.find_spec("importlinter").origin).parent.parent
    code = f"import sys; sys.path[:0] = {[str(package.parent), str(linter)]}; from importlinter import cli; "
    options = ["--no-logo", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        # -S: an editable install of this checkout would otherwise be linted in the copy's place.
        [sys.executable, "-S", "-c", code + "cli.lint_imports_command()", *options],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's Python files, to be spoilt."""
    pytest.importorskip("importlinter", reason="import-linter is not installed; it comes with --group lint")
    only = shutil.ignore_patterns("builtin", "__pycache__", "*.so")
    return Path(shutil.copytree(ROOT / "src" / "scrimp", tmp_path / "scrimp", ignore=only))


def test_the_arrows_hold(copy: Path) -> None:
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("where", "line", "said"),
    [
        ("select/selection.py", "import scrimp.meter", "scrimp.select is not allowed to import scrimp.meter"),
        ("primitives/files.py", "import scrimp.jobs", "scrimp.primitives is not allowed to import scrimp.jobs"),
        ("select/selection.py", "import timm", "scrimp.select is not allowed to import timm"),
        ("report/__init__.py", "import accelerate", "scrimp.report is not allowed to import accelerate"),
        ("stray.py", "", "scrimp.stray"),
    ],
)
def test_a_wrong_arrow_fails(copy: Path, where: str, line: str, said: str) -> None:
    file = copy / where
    file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode != 0
    assert said in " ".join(done.stdout.split())


GUARDED = """
import pytest
import torch


@pytest.fixture
def layer():
    return torch.nn.Linear(2, 2)


def test_draws():
    torch.rand(1)


def test_seeds():
    torch.manual_seed(0)


def test_fixture_may_draw(layer):
    layer(torch.zeros(1, 2))


def test_own_draws_kept_apart():
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)


@pytest.mark.touches_global_rng
def test_says_so():
    torch.rand(1)


def test_uses_a_generator():
    torch.rand(1, generator=torch.Generator().manual_seed(0))
"""


@pytest.mark.touches_global_rng  # by way of the tests it runs
def test_the_guard_of_the_global_generator_fails_a_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = touches_global_rng")
    pytester.makepyfile(GUARDED)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.fnmatch_lines(["FAILED *test_draws*", "FAILED *test_seeds*"])


@pytest.mark.slow
def test_the_wheel_carries_what_it_should(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("scrimp-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "scrimp"
    files = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*") if path.is_file()}
    left_out = {name for name in files if name.startswith("scrimp/native/src/") or name.endswith((".pyc", ".so"))}
    assert files - left_out <= names
    assert any(name.startswith("scrimp/data/builtin/") for name in names)
    assert "scrimp/py.typed" in names
    assert f"scrimp-{scrimp.__version__}.dist-info/licenses/LICENSE" in names
    assert any(name.startswith("scrimp/native/_native.") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".pyc"))]
    assert wheel.stat().st_size < 8 * MIB
