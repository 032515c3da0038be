"""Journals and sessions of labels: what is acknowledged is kept, and nobody loses anything to another."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import pytest

from scrimp.jobs.label_journal import JOURNAL, Journal
from scrimp.jobs.label_session import Conflict, Round, Session
from scrimp.primitives.errors import InputError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(folder: Path, *, images: int = 30, budget: int = 10, clock: Clock | None = None) -> Session:
    journal = Journal(folder / JOURNAL, {"images": "some"})
    return Session(
        journal, images=images, classes=3, budget=budget, lease_seconds=60, **({"clock": clock} if clock else {})
    )


def begin(session: Session, *rows: int, audit: tuple[int, ...] = ()) -> None:
    session.begin(Round(rows, frozenset(audit)), {"labels": float(len(rows)), "seconds": 0.5, "cpu_seconds": None})


def reopened(session: Session, folder: Path, **options) -> Session:
    session.journal.close()
    return opened(folder, **options)


def test_two_annotators_never_have_the_same_image_and_lose_nothing(tmp_path):
    session = opened(tmp_path, budget=6)
    begin(session, 4, 9, 2)
    first, second = session.next("ann"), session.next("ben")
    assert (first, second) == (4, 9)
    assert session.next("ann") == 4  # still in hand
    with pytest.raises(Conflict, match="not handed out"):
        session.label("ann", 9, 1)
    session.label("ben", 9, 2)
    with pytest.raises(Conflict, match="another annotator"):
        session.label("ann", 9, 1)
    session.label("ann", 4, 0)
    session.label("ann", 4, 1)  # a change of one's own
    assert [(row["image"], row["class"], row["who"]) for row in session.rows()] == [(4, 1, "ann"), (9, 2, "ben")]
    again = reopened(session, tmp_path, budget=6)
    assert again.rows() == [*session.rows()]
    assert again.points == session.points
    assert again.next("cat") == 2


def test_leases_run_out_and_the_first_label_holds(tmp_path):
    clock = Clock()
    session = opened(tmp_path, clock=clock)
    begin(session, 7)
    assert session.next("ann") == 7
    clock.now = 50
    session.keep("ann")
    clock.now = 100
    assert session.next("ben") is None
    clock.now = 111
    assert session.next("ben") == 7
    session.label("ann", 7, 1)  # slow, but first
    with pytest.raises(Conflict, match="another annotator"):
        session.label("ben", 7, 2)
    begin(session, 8)
    assert session.next("ben") == 8
    session.release("ben")
    assert session.next("ann") == 8


def test_undo_is_ones_own_and_survives(tmp_path):
    session = opened(tmp_path)
    begin(session, 1, 2, 3)
    for who, row in (("ann", 1), ("ben", 2)):
        assert session.next(who) == row
        session.label(who, row, 0)
    assert session.next("ben") == 3
    assert session.undo("ann") == 1
    assert session.undo("ann") is None
    assert session.label_of(1) is None
    again = reopened(session, tmp_path)
    assert [row["image"] for row in again.rows()] == [2]
    assert again.undo("ben") == 2  # known after a restart too
    assert again.rows() == []


def test_the_budget_is_never_exceeded(tmp_path):
    session = opened(tmp_path, budget=2)
    begin(session, 1, 2)
    session.next("ann")
    session.label("ann", 1, None)
    assert session.next("ann") == 2
    session.label("ann", 2, 0)
    assert session.next("ann") is None
    assert session.wants_round()
    assert session.snapshot().wanted == 1
    begin(session, 3, 4)  # more than is left
    assert session.next("ann") == 3
    assert session.next("ben") is None
    session.label("ann", 3, 2)
    assert session.done
    with pytest.raises(Conflict, match="budget"):
        session.label("ann", 1, 0)  # skipped before
    assert not session.wants_round()
    session.undo("ann")
    assert not session.done


def test_a_round_is_chosen_around_what_others_hold(tmp_path):
    session = opened(tmp_path)
    begin(session, 5, 6, audit=(5,))
    assert session.next("ann") == 5
    assert session.next("ben") == 6
    assert not session.wants_round()
    session.label("ben", 6, 0)
    assert session.next("ben") is None
    assert session.wants_round()
    now = session.snapshot()
    assert now.taken == {5, 6}
    assert now.audit == frozenset()
    assert now.wanted == 8
    session.label("ann", 5, 0)
    assert session.snapshot().audit == {5}


def test_nothing_left_ends_it(tmp_path):
    session = opened(tmp_path)
    session.next("ann")
    session.begin(Round((), frozenset()))
    assert session.done
    assert session.status()["ended"] == "every image has been seen"


@pytest.mark.parametrize("torn", [b'{"event":"label","ima', b"{", b"\xff\xfe"])
def test_a_torn_end_is_dropped_and_written_over(tmp_path, torn):
    session = opened(tmp_path)
    begin(session, 1, 2)
    session.next("ann")
    session.label("ann", 1, 2)
    session.journal.close()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = opened(tmp_path)
    assert path.read_bytes() == whole
    assert again.next("ben") == 2
    again.label("ben", 2, 0)
    assert [row["class"] for row in reopened(again, tmp_path).rows()] == [2, 0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2"),
        ("[1]", "line 2"),
        ('{"event":"label","image":99,"who":"a","class":0}', "another event"),
        ('{"event":"label","image":1,"who":"a","class":7}', "another event"),
        ('{"event":"label","image":1,"who":"a","class":0}', "another event"),  # of no round
        ('{"event":"undo","image":1,"who":"a"}', "another event"),
        ('{"event":"round","images":[true],"audit":[],"point":null}', "another event"),
        ('{"event":"round","images":3,"audit":[],"point":null}', "another event"),
        ('{"event":"magic"}', "another event"),
    ],
)
def test_a_damaged_journal_is_refused_by_name(tmp_path, line, said):
    path = tmp_path / JOURNAL
    start = json.dumps({"event": "start", "images": "some"})
    path.write_text(f"{start}\n{line}\n")
    with pytest.raises(InputError, match=said) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_journal_is_of_one_data_set_and_one_process(tmp_path):
    session = opened(tmp_path)
    with pytest.raises(InputError, match="another process"):
        opened(tmp_path)
    session.journal.close()
    with pytest.raises(InputError, match="same images"):
        Journal(tmp_path / JOURNAL, {"images": "others"})
    (tmp_path / JOURNAL).write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        opened(tmp_path)


def test_a_full_disk_keeps_nothing_and_says_so(tmp_path, monkeypatch):
    session = opened(tmp_path)
    begin(session, 1)
    session.next("ann")
    before = (tmp_path / JOURNAL).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            session.label("ann", 1, 1)
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert session.rows() == []
    session.label("ann", 1, 1)
    assert [row["class"] for row in reopened(session, tmp_path).rows()] == [1]


def test_many_annotators_at_once_agree_with_the_journal(tmp_path):
    """Against a replay written anew: the last word on an image is its owner's, and each image has one owner."""
    session = opened(tmp_path, images=200, budget=60)
    begin(session, *range(0, 160, 2))

    def work(who: str) -> None:
        draw = random.Random(who)
        while not session.done:
            row = session.next(who)
            if row is None:
                return
            session.label(who, row, draw.choice([0, 1, 2, None]))
            if draw.random() < 0.2:
                session.undo(who)

    threads = [threading.Thread(target=work, args=(f"a{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owners, said = {}, {}
    for line in itertools.islice((tmp_path / JOURNAL).read_text().splitlines(), 1, None):
        event = json.loads(line)
        if event["event"] == "undo":
            assert owners.pop(event["image"]) == event["who"]
            said.pop(event["image"])
        elif event["event"] != "round":
            assert owners.setdefault(event["image"], event["who"]) == event["who"]
            said[event["image"]] = event.get("class")
    expected = {row: number for row, number in said.items() if number is not None}
    assert {row["image"]: row["class"] for row in session.rows()} == expected
    assert 0 < len(expected) <= 60
    session.journal.close()
