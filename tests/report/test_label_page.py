"""The labelling page in a real browser, by the keyboard alone: every label is on disk before the next image shows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report_browser import until

from scrimp.data import TensorImages
from scrimp.jobs.label_journal import JOURNAL, Journal
from scrimp.jobs.label_server import LabelServer
from scrimp.jobs.label_session import Round, Session

CLASSES = ("<b>cat</b>", "dog", "émeu")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[LabelServer, Session]]]:
    """Makes a server of coloured images; rounds of four follow one another."""
    left: list[Callable[[], None]] = []

    def make(count: int = 12, budget: int = 6, classes: tuple[str, ...] = CLASSES) -> tuple[LabelServer, Session]:
        journal = Journal(tmp_path / JOURNAL, {})
        session = Session(journal, images=count, classes=len(classes), budget=budget)
        pixels = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 5, 7).contiguous().to(torch.uint8)
        images = TensorImages(pixels, torch.zeros(count, dtype=torch.int64))
        names = tuple(f"<i>{row}</i>.png" for row in range(count))
        news = {"estimate": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "count": 8, "how": "images"}, "gain": 0.125}
        server = LabelServer(session, images, paths=None, names=names, classes=classes, news=lambda: news)
        over = threading.Event()

        def choose() -> None:
            while not over.wait(0.01):
                if session.wants_round():
                    start = 4 * session.snapshot().rounds
                    session.begin(Round(tuple(range(start, min(start + 4, count))), frozenset()))

        thread = threading.Thread(target=choose)
        thread.start()
        left.extend([over.set, thread.join, server.close, journal.close])
        return server, session

    yield make
    for end in left:
        end()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """The browser; afterwards, nothing was asked of anybody but the server, and the console is silent."""
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    yield browser
    browser.get("about:blank")
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def shown(browser: Any) -> int | None:
    """The number of the image that is on the page, once it is drawn and keys are heeded."""
    script = (
        "const image = document.getElementById('image'); return busy || !seen || image.hidden ? null "
        ": Number(new URL(image.src).pathname.split('/').pop())"
    )
    return browser.execute_script(script)


def text(browser: Any, name: str) -> str:
    return browser.find_element("id", name).text


def on_disk(session: Session) -> dict[int, int]:
    found: dict[int, int] = {}
    for line in session.journal.path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "label":
            found[event["image"]] = event["class"]
        elif event["event"] in ("undo", "skip"):
            found.pop(event["image"], None)
    return found


def addresses(browser: Any) -> set[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    found = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    return {url for url in found if not url.startswith(("data:", "about:"))}


def test_images_are_labelled_by_the_keyboard_alone(serve: Any, tab: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    server, session = serve()
    tab.get(server.url)
    until(lambda: shown(tab) == 0)
    assert text(tab, "name") == "<i>0</i>.png"
    assert [item.text for item in tab.find_elements("css selector", ".word")] == list(CLASSES)
    press(tab, "1")
    until(lambda: shown(tab) == 1)
    assert on_disk(session) == {0: 0}
    press(tab, "3")
    until(lambda: shown(tab) == 2)
    press(tab, "s")
    until(lambda: shown(tab) == 3)
    assert on_disk(session) == {0: 0, 1: 2}
    press(tab, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    until(lambda: shown(tab) == 1)
    assert text(tab, "said") == "émeu"
    press(tab, "2")  # a change of mind, and on
    until(lambda: shown(tab) == 2)
    assert text(tab, "said") == "skipped"
    press(tab, Keys.ARROW_RIGHT)
    until(lambda: shown(tab) == 3)
    press(tab, "9")  # no class
    press(tab, "2")
    until(lambda: shown(tab) == 4)  # of the second round
    assert on_disk(session) == {0: 0, 1: 1, 3: 1}
    press(tab, "u")
    until(lambda: shown(tab) == 3)
    assert on_disk(session) == {0: 0, 1: 1}
    press(tab, "1")
    until(lambda: shown(tab) == 4)
    ActionChains(tab).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    until(lambda: shown(tab) == 3)
    for row, following in ((3, 4), (4, 5), (5, 6)):
        until(lambda row=row: shown(tab) == row)
        press(tab, "2")
        until(lambda following=following: shown(tab) == following)
    assert text(tab, "count") == "5 of 6 labels, round 2, 1 skipped"
    assert text(tab, "estimate") == "accuracy 50.0 % (25.0 % to 75.0 %)"
    press(tab, "1")
    until(lambda: "6 labels are given" in text(tab, "panel"))
    assert on_disk(session) == {0: 0, 1: 1, 3: 1, 4: 1, 5: 1, 6: 0}
    press(tab, Keys.ENTER)
    until(server.finished.is_set)
    until(lambda: "Finished" in text(tab, "panel"))
    assert all(url.startswith(server.url) for url in addresses(tab))


def test_two_tabs_share_the_work_and_a_reload_goes_on(serve: Any, tab: Any) -> None:
    server, session = serve()
    tab.get(server.url)
    until(lambda: shown(tab) == 0)
    first = tab.current_window_handle
    tab.switch_to.new_window("tab")
    second = tab.current_window_handle
    tab.get(server.url)
    until(lambda: shown(tab) == 1)
    press(tab, "2")
    until(lambda: shown(tab) == 2)
    tab.switch_to.window(first)
    press(tab, "1")
    until(lambda: shown(tab) == 3)
    assert on_disk(session) == {0: 0, 1: 1}
    assert len({row["who"] for row in session.rows()}) == 2
    tab.refresh()
    until(lambda: shown(tab) == 3)
    press(tab, "u")  # the same annotator as before
    until(lambda: shown(tab) == 0)
    assert on_disk(session) == {1: 1}
    tab.switch_to.window(second)
    tab.close()
    tab.switch_to.window(first)
    until(lambda: session.status()["held"] == 1)  # the other was given back as its tab closed


def test_many_classes_are_found_by_name(serve: Any, tab: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    classes = tuple(f"kind {number}" for number in range(40))
    server, session = serve(classes=classes)
    tab.get(server.url)
    until(lambda: shown(tab) == 0)
    for words, row in (("kind 3", 0), ("39", 1)):
        press(tab, Keys.ENTER)
        press(tab, words)
        press(tab, Keys.ENTER)
        until(lambda row=row: shown(tab) == row + 1)
    assert on_disk(session) == {0: 3, 1: 39}
    press(tab, "s")  # not in the field any more
    until(lambda: session.status()["skipped"] == 1)


def test_what_is_not_kept_is_not_shown_as_kept(serve: Any, tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, session = serve()
    tab.get(server.url)
    until(lambda: shown(tab) == 0)
    append, full = session.journal.append, threading.Event()
    full.set()

    def failing(events: Any) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        append(events)

    monkeypatch.setattr(session.journal, "append", failing)
    press(tab, "1")
    until(lambda: "not saved: No space left on device" in text(tab, "saved"))
    assert tab.execute_script("return busy")
    full.clear()
    until(lambda: shown(tab) == 1)
    assert text(tab, "saved") == "saved"
    assert on_disk(session) == {0: 0}
    assert any("507" in entry["message"] for entry in tab.get_log("browser"))


@pytest.mark.slow
def test_a_hundred_images_by_keyboard(serve: Any, tab: Any) -> None:
    server, session = serve(count=120, budget=100)
    tab.get(server.url)
    clock = time.monotonic()
    for row in range(100):
        until(lambda row=row: shown(tab) == row)
        press(tab, "123"[row % 3])
    until(lambda: "100 labels are given" in text(tab, "panel"))
    assert on_disk(session) == {row: row % 3 for row in range(100)}
    assert time.monotonic() - clock < 120
