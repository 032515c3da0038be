"""Who has which image, what was said of it, and what must never be lost: the state of one labelling, for any number of
annotators at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from scrimp.jobs.label_journal import Event, Journal
from scrimp.primitives.errors import InputError


class Conflict(Exception):
    """What an annotator asks cannot be, such as a label for an image that another one has labelled."""


@dataclass(frozen=True)
class Round:
    """Images chosen together.

    Attributes:
        rows: in the order they are handed out.
        audit: those drawn at random, to estimate accuracy on.
    """

    rows: tuple[int, ...]
    audit: frozenset[int]


@dataclass(frozen=True)
class Snapshot:
    """What a choice is made from.

    Attributes:
        labels: class numbers by image.
        taken: images that cannot be chosen: labelled, skipped, or chosen already.
        audit: those among the labelled that were drawn at random.
        wanted: labels that are to be spent yet.
        rounds: how many there were.
    """

    labels: dict[int, int]
    taken: frozenset[int]
    audit: frozenset[int]
    wanted: int
    rounds: int


@dataclass
class _State:
    labels: dict[int, int] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    said_by: dict[int, str] = field(default_factory=dict)
    history: dict[str, list[int]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    round_of: dict[int, int] = field(default_factory=dict)
    open: dict[int, None] = field(default_factory=dict)  # chosen, and nothing was said of them yet, in order
    leases: dict[int, tuple[str, float]] = field(default_factory=dict)
    given: dict[int, set[str]] = field(default_factory=dict)
    points: list[dict[str, float | None]] = field(default_factory=list)
    ended: str = ""


class Session:
    """Hands images out and takes labels in; every method may be called from any thread.

    An image is leased to one annotator at a time. A label counts once it is in the journal, on the disk; it then
    belongs to who gave it, and nobody else can change it.

    Args:
        journal: what it holds is taken up.
        images: how many there are.
        classes: how many.
        budget: labels to spend.
        lease_seconds: after which an image that was not labelled may go to another.
        clock: seconds that never go back.

    Raises:
        InputError: the journal speaks of images or classes that are not there.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        images: int,
        classes: int,
        budget: int,
        lease_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal, self.images, self.classes, self.budget = journal, images, classes, budget
        self._lease, self._clock = lease_seconds, clock
        self._state = _State()
        self._changed = threading.Condition(threading.RLock())
        self._waiting = False
        try:
            for event in journal.events:
                self._take_in(event)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            wanted = f"a journal of {images} images and {classes} classes"
            raise InputError(wanted, f"{journal.path} with another event", "pass another --out") from error

    def next(self, who: str) -> int | None:
        """An image for this annotator, the one in hand first; ``None`` where there is none at the moment."""
        with self._changed:
            state, now = self._state, self._clock()
            mine = [row for row, (name, _) in state.leases.items() if name == who]
            row = mine[0] if mine else next(iter(self._free(now)), None)
            if row is None:
                self._waiting = True
                self._changed.notify_all()
                return None
            self._give(row, who)
            return row

    def hold(self, who: str) -> int | None:
        """One more image for this annotator, besides those in hand; ``None`` as `next`."""
        with self._changed:
            row = next(iter(self._free(self._clock())), None)
            if row is None:
                self._waiting = True
                return None
            self._give(row, who)
            return row

    def keep(self, who: str) -> None:
        """This annotator is still looking."""
        with self._changed:
            for row, (name, _) in self._state.leases.items():
                if name == who:
                    self._state.leases[row] = (who, self._clock() + self._lease)

    def release(self, who: str) -> None:
        """This annotator has gone."""
        with self._changed:
            for row in [row for row, (name, _) in self._state.leases.items() if name == who]:
                del self._state.leases[row]
            self._changed.notify_all()

    def label(self, who: str, row: int, number: int | None) -> None:
        """Keep a label, or with ``None`` that the image has none; on the disk when this returns.

        Raises:
            Conflict: not this annotator's image, or one that another has labelled meanwhile.
            OSError: it could not be written, and is not kept.
        """
        self.label_many(who, [(row, number)])

    def label_many(self, who: str, found: Iterable[tuple[int, int | None]]) -> None:
        """The same for many at once: all or none of them."""
        with self._changed:
            state, events = self._state, []
            room = self.budget - len(state.labels)
            for row, number in found:
                if not (number is None or 0 <= number < self.classes):
                    raise Conflict(f"there is no class {number}")
                owner = state.said_by.get(row)
                if owner not in (None, who):
                    raise Conflict("another annotator has labelled this image")
                if owner is None and who not in state.given.get(row, ()):
                    raise Conflict("this image was not handed out to you")
                room -= number is not None and row not in state.labels
                if room < 0:
                    raise Conflict("the budget is spent")
                kind: Event = {"event": "skip"} if number is None else {"event": "label", "class": number}
                events.append({**kind, "image": row, "who": who, "time": round(time.time(), 3)})
            self.journal.append(events)
            for event in events:
                self._take_in(event)
            self._changed.notify_all()

    def undo(self, who: str) -> int | None:
        """Take this annotator's last label back and hand the image out again; ``None`` where there is none."""
        with self._changed:
            mine = self._state.history.get(who, [])
            if not mine:
                return None
            row = mine[-1]
            event = {"event": "undo", "image": row, "who": who, "time": round(time.time(), 3)}
            self.journal.append([event])
            self._take_in(event)
            self.release(who)
            self._give(row, who)
            self._changed.notify_all()
            return row

    def wants_round(self) -> bool:
        """Whether somebody waits, and images are to be chosen."""
        with self._changed:
            wanted = self._waiting and not self.done and self._wanted() > 0
            return wanted and next(iter(self._free(self._clock())), None) is None

    def snapshot(self) -> Snapshot:
        """The state as it is now."""
        with self._changed:
            state = self._state
            taken = {*state.labels, *state.skipped, *state.open}
            audit = frozenset().union(*(one.audit for one in state.rounds)) & state.labels.keys()
            return Snapshot(dict(state.labels), frozenset(taken), audit, self._wanted(), len(state.rounds))

    def begin(self, chosen: Round, point: dict[str, float | None] | None = None) -> None:
        """Hand these images out from now on; with none, labelling has come to its end.

        ``point``: what the classifier was worth that they were chosen by; see `points`.
        """
        with self._changed:
            if chosen.rows:
                event = {"event": "round", "images": list(chosen.rows), "audit": sorted(chosen.audit), "point": point}
                self.journal.append([event])
                self._take_in(event)
            else:
                self._state.ended = "every image has been seen"
            self._waiting = False
            self._changed.notify_all()

    def end(self, why: str) -> None:
        """Choose no further images."""
        with self._changed:
            self._state.ended = why
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until something changes, at most so long."""
        with self._changed:
            self._changed.wait(seconds)

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or nothing more is to be chosen and nothing is open."""
        with self._changed:
            state = self._state
            return len(state.labels) >= self.budget or (bool(state.ended) and not state.open)

    @property
    def ended(self) -> str:
        """Why labelling stopped before its budget; empty where it did not."""
        return self._state.ended

    @property
    def points(self) -> list[dict[str, float | None]]:
        """Of every round so far, those of earlier processes included."""
        return [dict(point) for point in self._state.points]

    def status(self) -> dict[str, Any]:
        """Counts, as JSON holds them."""
        with self._changed:
            counts = [0] * self.classes
            for number in self._state.labels.values():
                counts[number] += 1
            return {
                "labels": len(self._state.labels),
                "budget": self.budget,
                "skipped": len(self._state.skipped),
                "held": len(self._state.leases),
                "rounds": len(self._state.rounds),
                "counts": counts,
                "done": self.done,
                "ended": self._state.ended,
            }

    def label_of(self, row: int) -> int | None:
        """The class number said of an image."""
        with self._changed:
            return self._state.labels.get(row)

    def rows(self) -> list[dict[str, Any]]:
        """Every label, in the order of images: ``image``, ``class``, ``round`` (from 1), ``audit``, ``who``."""
        with self._changed:
            state = self._state
            drawn = frozenset().union(*(one.audit for one in state.rounds))
            return [
                {
                    "image": row,
                    "class": state.labels[row],
                    "round": state.round_of[row] + 1,
                    "audit": row in drawn,
                    "who": state.said_by[row],
                }
                for row in sorted(state.labels)
            ]

    def _give(self, row: int, who: str) -> None:
        self._state.leases[row] = (who, self._clock() + self._lease)
        self._state.given.setdefault(row, set()).add(who)

    def _free(self, now: float) -> list[int]:
        leases = self._state.leases
        for row in [row for row, (_, until) in leases.items() if until <= now]:
            del leases[row]
        return [row for row in self._state.open if row not in leases][: max(0, self.budget - self._spent())]

    def _spent(self) -> int:
        return len(self._state.labels) + len(self._state.leases)

    def _wanted(self) -> int:
        return max(0, self.budget - len(self._state.labels) - len(self._state.open))

    def _take_in(self, event: Event) -> None:
        """Change the state by one event: what a person just did, or what the journal says somebody did."""
        state, kind = self._state, event["event"]
        if kind == "round":
            number = len(state.rounds)
            state.rounds.append(Round(tuple(map(self._image, event["images"])), frozenset(event["audit"])))
            state.round_of.update(dict.fromkeys(state.rounds[-1].rows, number))
            state.open.update(dict.fromkeys(state.rounds[-1].rows))
            state.points += [dict(event["point"])] if event["point"] else []
            return
        row, who = self._image(event["image"]), str(event["who"])
        state.labels.pop(row, None)
        state.skipped.discard(row)
        state.leases.pop(row, None)
        state.open.pop(row, None)
        mine = state.history.setdefault(who, [])
        if kind == "undo":
            state.said_by.pop(row)
            mine.remove(row)
            state.open[row] = None
            return
        if row not in mine:
            mine.append(row)
        state.said_by[row] = who
        if kind == "label" and 0 <= int(event["class"]) < self.classes and row in state.round_of:
            state.labels[row] = int(event["class"])
        elif kind == "skip":
            state.skipped.add(row)
        else:
            raise ValueError(kind)

    def _image(self, row: Any) -> int:
        if type(row) is not int or not 0 <= row < self.images:  # True is an int to Python
            raise ValueError(row)
        return row
