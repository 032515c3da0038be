"""The journal of a labelling: one line of JSON an event, on the disk before anybody is told that it is kept.

A kill at any moment leaves whole lines and at most one torn one at the end, which nobody was told of and is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

JOURNAL = "labels.jsonl"

Event = dict[str, Any]


class Journal:
    """An append-only file of events, held by one process at a time.

    Args:
        path: made where it is not there; its folder too.
        about: what the events are about, as JSON holds it; the first line of the file.

    Attributes:
        events: what an earlier process wrote.

    Raises:
        InputError: the file is damaged, is about something else, or another process has it open.
    """

    def __init__(self, path: Path, about: Event) -> None:
        self.path = path
        if not path.is_file():
            write_atomic(path, _line({"event": "start", **about}))
        self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            _lock(self._file, path)
            first, *self.events = self._read()
            if first != {"event": "start", **json.loads(json.dumps(about))}:
                wrong = next((key for key, value in about.items() if first.get(key) != value), "start")
                raise InputError(f"a journal of the same {wrong}", f"another in {path}", "pass another --out")
        except BaseException:
            os.close(self._file)
            raise
        self._end = os.fstat(self._file).st_size

    def append(self, events: Iterable[Event]) -> None:
        """Write events; they are on the disk when this returns.

        Raises:
            OSError: they could not be written, and none of them is kept.
        """
        content = "".join(map(_line, events)).encode()
        try:
            written = 0
            while written < len(content):
                written += os.write(self._file, content[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(content)

    def close(self) -> None:
        os.close(self._file)

    def _read(self) -> list[Event]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
            os.fsync(self._file)
        found = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                got = f"{self.path} with a damaged line {number}"
                raise InputError("a whole journal of labels", got, "restore it from a copy, or correct that line")
            found.append(event)
        if not found:
            raise InputError("a whole journal of labels", f"{self.path}, empty", "pass another --out")
        return found


def _line(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError("a journal of its own", f"{path}, open in another process", "end that one first") from error
