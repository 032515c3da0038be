"""Every fenced code block of the documentation runs; and the runner itself is shown to fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs_runner import DocsError, check_install, read_blocks, run_blocks, shell_commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")] if page.is_file()
)
SLOW_PAGES = [page for page in PAGES if any(block.slow and not block.skipped for block in read_blocks(page))]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Where a page's blocks run: a folder that holds the reader's `photos/`, two classes of small pictures."""
    from PIL import Image

    for part, count in (("train", 100), ("test", 20)):
        for label, shade in (("day", 200), ("night", 50)):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (28, 28), (shade + number % 40, shade, shade)).save(folder / f"{number}.png")
    return tmp_path


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def accelerator_of_a_page() -> Iterator[None]:
    """A page's reader ends the process with the page."""
    yield
    module = sys.modules.get("accelerate.state")
    if module is not None:
        module.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerator_of_a_page")
@pytest.mark.touches_global_rng  # an example may seed torch, as its reader would
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of(page: Path, desk: Path) -> None:
    run_blocks(read_blocks(page), desk, ROOT)


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator_of_a_page")
@pytest.mark.touches_global_rng
@pytest.mark.parametrize("page", SLOW_PAGES, ids=name)
def test_slow_blocks_of(page: Path, desk: Path) -> None:
    run_blocks(read_blocks(page), desk, ROOT, slow=True)


def write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def run_text(folder: Path, text: str, *, slow: bool = False) -> int:
    work = folder / "work"
    work.mkdir()
    return run_blocks(read_blocks(write(folder, text)), work, ROOT, slow=slow)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nassert 1 == 2\n```", r"page\.md:2: AssertionError"),
        ("text\n\n```python\nx = 1\n```\n\n```python\ny\n```", r"page\.md:8: NameError: name 'y'"),
        ("```python\nx = = 1\n```", "SyntaxError"),
        ("```python\nraise SystemExit(3)\n```", "SystemExit: 3"),
        ("```bash\ntrue\nfalse\ntrue\n```", r"page\.md:2: exit code 1"),
        ("```bash\nfalse | true\n```", "exit code 1"),
        ("```console\n$ python -c 'raise SystemExit(3)'\nits output\n```", "exit code 3"),
        ("```bash\ntorchrun --nproc-per-node 2 job.py\n```", "carries <!-- test: torchrun -->"),
        ("```bash\npip install scrimp-of-another-name\n```", r"is no line of \.ci/run"),
        ("```bash\npip install 'scrimp[gpu,rocket]'\n```", "no such extra: rocket"),
        ("```bash\napt-get install -y chromium rocket\n```", "does not install rocket"),
        ("```json\n{1: 2}\n```", "JSONDecodeError"),
        ("```toml\na = \n```", "TOMLDecodeError"),
        ("```yaml\na: [\n```", "ParserError"),
    ],
)
def test_a_failing_block_fails_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DocsError, match=said):
        run_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- test: skip -->\n```python\n1 / 0\n```", "a skipped block needs its reason"),
        ("<!-- test: skip because -->\n```python\n1 / 0\n```", "a skipped block needs its reason"),
        ("<!-- test: later -->\n```python\n1 / 0\n```", "got 'later'"),
        ("```\nwhat am I\n```", "expected a known language"),
        ("```pyhton\n1\n```", "got 'pyhton'"),
        ("```python\n1 / 0\n", r"page\.md:1: this fence is never closed"),
    ],
)
def test_no_block_is_passed_over_in_silence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DocsError, match=said):
        read_blocks(write(tmp_path, text))


def test_marks_skip_and_delay(tmp_path: Path) -> None:
    skipped = "<!-- test: skip because no GPU here -->\n```python\n1 / 0\n```\n"
    text = skipped + "\n<!-- test: slow -->\n```bash\ntouch late\n```\n"
    assert run_text(tmp_path, text) == 0
    assert not (tmp_path / "work" / "late").exists()
    again = tmp_path / "again"
    again.mkdir()
    assert run_text(again, text, slow=True) == 1
    assert (again / "work" / "late").exists()


def test_blocks_of_a_page_share_names_and_folder(tmp_path: Path) -> None:
    text = """
```python
import pickle
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Point:
    x: int
```

1. In a list:

   ```python
   Path("made").write_bytes(pickle.dumps(Point(3)))
   assert pickle.loads(Path("made").read_bytes()).x == 3
   ```

```bash
# a comment
test -f made && \\
  python -c "print(1)" > printed
VALUE=2 python -c "import os; assert os.environ['VALUE'] == '2'"
```

```python
assert Path("printed").read_text() == "1\\n"
if __name__ == "__main__":
    Path("guarded").touch()
```

~~~text
not run
~~~
"""
    before, main = Path.cwd(), sys.modules["__main__"]
    assert run_text(tmp_path, text) == 4
    assert (tmp_path / "work" / "guarded").exists()
    assert (Path.cwd(), sys.modules["__main__"]) == (before, main)


def test_a_console_block_is_its_commands(tmp_path: Path) -> None:
    (block,) = read_blocks(
        write(tmp_path, "```console\n$ scrimp train \\\n    photos\nepoch 1\n$ ls\n# no command\n```")
    )
    assert [" ".join(command.split()) for command in shell_commands(block)] == ["scrimp train photos", "ls"]


@pytest.mark.parametrize(
    "command",
    [
        "git clone URL scrimp",
        "python -m venv .venv",
        ". .venv/bin/activate",
        "pip install 'scrimp[gpu]'",
        "pip install -e .",
    ],
)
def test_install_lines_that_pass(command: str) -> None:
    assert (check_install(command, ROOT) is None) == (command != "pip install -e .")
