"""Runs the fenced code blocks of a Markdown page, so that documentation cannot drift from the code.

What a block's language means here:

- ``python``: executed; the blocks of one page share their names and one temporary working folder.
- ``bash``, ``sh``: executed by bash, stopping at the first error; ``console``: the lines after ``$``. A line that
  `.ci/run` runs too is not run again, and a line that installs something must be such a line (see `check_install`).
- ``json``, ``toml``, ``yaml``: parsed. ``text`` and the other `PROSE`: not run. Anything else is refused.

An HTML comment directly above a fence makes an exception: ``<!-- test: skip because REASON -->``, ``<!-- test: slow
-->`` (run by ``pytest -m slow`` only), ``<!-- test: torchrun -->`` (starts several processes; where gloo is missing it
is passed over).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path

import yaml

SHELL = {"bash", "sh", "console"}
PROSE = {"text", "markdown", "bibtex", "csv", "diff", "mermaid", "cpp"}
TIMEOUT_SECONDS = 900
LINKED = ("benchmarks", "examples", "scripts")
"""Folders of the checkout that commands in a page may name; they are linked into its working folder."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^`]*$")
_MARK = re.compile(r"^ *<!--\s*test:\s*(?P<what>.*?)\s*-->\s*$")
_INSTALL = re.compile(r"^(python3? -m )?(pip|venv)\b|^git clone\b|^cd scrimp\b|^(source|\.) |^(sudo )?apt(-get)? ")
_AS_INSTALLED = """
scrimp() { "$PYTHON" -m scrimp "$@"; }
python() { "$PYTHON" "$@"; }
torchrun() { "$PYTHON" -m torch.distributed.run "$@"; }
"""


class DocsError(AssertionError):
    """A block that fails, or that this runner may not pass over in silence. Says file and line."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, source, the line its source begins on, and the marks above it."""

    page: Path
    line: int
    language: str
    source: str
    marks: tuple[str, ...] = field(default=())

    @property
    def slow(self) -> bool:
        return "slow" in self.marks

    @property
    def skipped(self) -> bool:
        return any(mark.startswith("skip") for mark in self.marks)

    def fail(self, why: str) -> DocsError:
        return DocsError(f"{self.page}:{self.line}: {why}")


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order.

    Raises:
        DocsError: a fence is not closed, a language is unknown, or a mark is none of the known ones.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, at = [], 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        if not opened:
            at += 1
            continue
        end = next((row for row in range(at + 1, len(lines)) if _closes(lines[row], opened["ticks"])), None)
        if end is None:
            raise DocsError(f"{page}:{at + 1}: this fence is never closed")
        indent = len(opened["indent"])
        source = "\n".join(line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[at + 1 : end])
        block = Block(page, at + 2, opened["language"].lower(), source + "\n", _marks_above(lines, at))
        _check(block)
        blocks.append(block)
        at = end + 1
    return blocks


def run_blocks(blocks: list[Block], folder: Path, root: Path, *, slow: bool = False) -> int:
    """Run a page's blocks in ``folder``; slow ones only when asked for. Returns how many were run, parsed or checked.

    Args:
        root: the checkout, for `.ci/run` (the home of install commands) and the `LINKED` folders.

    Raises:
        DocsError: a block fails.
    """
    # As a script would: guarded code runs, and what a block defines is found again when it is unpickled.
    names, main = types.ModuleType("__main__"), sys.modules["__main__"]
    for linked in LINKED:
        (folder / linked).symlink_to(root / linked, target_is_directory=True)
    before, done = Path.cwd(), 0
    os.chdir(folder)
    sys.modules["__main__"] = names
    try:
        for block in blocks:
            if not (block.skipped or block.language in PROSE or (block.slow and not slow)):
                _run(block, names, root)
                done += 1
    finally:
        os.chdir(before)
        sys.modules["__main__"] = main
    return done


def shell_commands(block: Block) -> list[str]:
    """The lines of a shell block: continued ones joined, comments and a console's output left out."""
    lines = block.source.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check_install(command: str, root: Path) -> str | None:
    """Why an install line is wrong, or ``None``.

    ``pip install`` must be a line of `.ci/run`, or name extras that exist; a system package must be one that `.ci/run`
    installs; fetching the source, making and entering an environment differ from machine to machine and pass.
    """
    ci = (root / ".ci" / "run").read_text()
    if re.match(r"(python3? -m )?pip\b", command):
        known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.search(r"(?:scrimp|\.)\[([\w,-]+)\]", command)
        if asked:
            unknown = sorted(set(asked[1].split(",")) - set(known))
            return f"no such extra: {', '.join(unknown)}" if unknown else None
        return f"'{command}' is no line of .ci/run"
    if re.match(r"(sudo )?apt(-get)? ", command):
        packages = [word for word in command.partition("install")[2].split() if not word.startswith("-")]
        missing = [package for package in packages if package not in re.findall(r"[\w+-]+", ci)]
        return f".ci/run does not install {', '.join(missing)}" if missing else None
    return None


def _closes(line: str, ticks: str) -> bool:
    text = line.strip()
    return len(text) >= len(ticks) and set(text) == {ticks[0]}


def _marks_above(lines: list[str], fence: int) -> tuple[str, ...]:
    marks: list[str] = []
    while fence > 0 and (found := _MARK.match(lines[fence - 1])):
        marks.insert(0, found["what"])
        fence -= 1
    return tuple(marks)


def _check(block: Block) -> None:
    if block.language not in {"python", "json", "toml", "yaml"} | SHELL | PROSE:
        raise block.fail(f"expected a known language after the fence; got '{block.language}'; plain text is 'text'")
    for mark in block.marks:
        if mark not in {"slow", "torchrun"} and not re.fullmatch(r"skip because \S.*", mark):
            raise block.fail(
                f"expected 'skip because REASON', 'slow' or 'torchrun'; got '{mark}'; a skipped block needs its reason"
            )


def _run(block: Block, names: types.ModuleType, root: Path) -> None:
    try:
        if block.language == "python":
            # Empty lines in front give the page's own line numbers to tracebacks.
            exec(compile("\n" * (block.line - 1) + block.source, str(block.page), "exec"), names.__dict__)
        elif block.language in SHELL:
            _run_shell(block, root)
        else:
            {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}[block.language](block.source)
    except (Exception, SystemExit) as error:
        if isinstance(error, DocsError):
            raise
        raise block.fail(f"{type(error).__name__}: {error}") from error


def _run_shell(block: Block, root: Path) -> None:
    todo = [command for command in shell_commands(block) if not _runs_in_ci(command, root)]
    for command in filter(_INSTALL.match, todo):
        if wrong := check_install(command, root):
            raise block.fail(wrong)
    todo = [command for command in todo if not _INSTALL.match(command)]
    several = any("torchrun" in command for command in todo)
    if several and "torchrun" not in block.marks:
        raise block.fail("a block that starts several processes carries <!-- test: torchrun -->")
    if todo and not (several and not _gloo()):
        _run_bash(block, todo)


def _runs_in_ci(command: str, root: Path) -> bool:
    plain = re.escape(re.sub(r"^python3? -m (?=pip |pytest)", "", command.strip()))
    return re.search(rf"^step .*(?<!\S){plain}$", (root / ".ci" / "run").read_text(), re.MULTILINE) is not None


def _run_bash(block: Block, commands: list[str]) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _AS_INSTALLED + "\n".join(commands)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise block.fail(f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _gloo() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()
