"""The report as a person gets it: opened from disk in a browser, drawn, pointed at, clicked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scrimp.receipts import Receipt
from scrimp.report import Section, picture, write_report

Study = Callable[..., list[Receipt]]
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000"
    "040001f61738550000000049454e44ae426082"
)
EVIL = "<script>window.broken = 1</script>"


@pytest.fixture(scope="module")
def report(make_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study, one way badly named, and of a picture."""
    receipts = make_study(ways=("uniform", "history", EVIL))
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(receipts, path, sections=[Section("Picture", picture(PIXEL, "one pixel"))])


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The browser with the report open; after each test, the console is silent and no request has left the page."""
    if browser.current_url != report.as_uri():
        open_page(browser, report)
    yield browser
    assert drain(browser) == ([], [])


def open_page(browser: Any, path: Path) -> None:
    """Open the file and wait until its figures are drawn; it asks for itself and for nothing else."""
    browser.get("about:blank")
    drain(browser)
    browser.get(path.as_uri())
    until(lambda: len(browser.find_elements("css selector", "#figure-4 .main-svg .trace")) > 0)
    assert drain(browser) == ([], [path.as_uri()])


def drain(browser: Any) -> tuple[list[str], list[str]]:
    """Console messages, and the addresses that the page asked for (its own data apart), since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent" and event["params"]["documentURL"].startswith("file:")
    ]
    sockets = [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    outside = [url for url in requests + sockets if not url.startswith(("data:", "blob:"))]
    return [entry["message"] for entry in browser.get_log("browser")], outside


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return found


def point_at(browser: Any, figure: str, across: float = 0.5) -> None:
    """Move the mouse over the figure's plotting area, as far ``across`` as said."""
    from selenium.webdriver import ActionChains

    area = browser.find_element("css selector", f"#{figure} .draglayer .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    shift = int((across - 0.5) * area.rect["width"])
    ActionChains(browser).move_to_element(area).move_to_element_with_offset(area, shift, 0).perform()


def test_the_table_reads_as_it_should(opened: Any) -> None:
    rows = [row.text.split("\n") for row in opened.find_elements("css selector", "table.figures tbody tr")]
    assert len(rows) == 3
    text = " ".join(rows[1])
    assert text.startswith("history n=3 88.5 ± 0.3 % tie 0.262 ± 0.004 better -0.078 901 G 59.3 s 31.2 s")
    assert " ".join(rows[2]).startswith(EVIL)
    assert "no meter" in opened.find_element("css selector", "table.figures caption").text


def test_every_figure_is_drawn(opened: Any) -> None:
    for figure, traces in (("figure-1", 12), ("figure-2", 12), ("figure-4", 8)):
        drawn = opened.execute_script(
            "return [...document.querySelectorAll(`#${arguments[0]} .trace .js-line`)].map(e => e.getAttribute('d'))",
            figure,
        )
        assert len(drawn) == traces
        assert all(path.startswith("M") and path.count(",") > 10 for path in drawn)
    assert len(opened.find_elements("css selector", "#figure-3 .trace .point")) == 3 * (3 + 1)
    assert len(opened.find_elements("css selector", "#figure-3 .yerror")) == 3
    legend = [entry.text for entry in opened.find_elements("css selector", "#figure-1 .legendtext")]
    assert legend == ["uniform", "history", EVIL]


def test_a_name_is_no_script(opened: Any) -> None:
    assert opened.execute_script("return window.broken === undefined") is True


def test_pointing_at_a_curve_tells_its_figures(opened: Any) -> None:
    point_at(opened, "figure-1")
    label = until(lambda: opened.find_element("css selector", "#figure-1 .hoverlayer").text)
    assert "history" in label
    assert "±" in label
    assert "%" in label


def test_pointing_at_a_mark_tells_quality_and_cost(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    mark = opened.find_elements("css selector", "#figure-3 .trace .point")[3]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(opened).move_to_element(mark).perform()
    label = until(lambda: opened.find_element("css selector", "#figure-3 .hoverlayer").text)
    assert "88.4 ± 0.4 % for 900 GFLOP" in label


def test_the_buttons_change_the_axis(opened: Any) -> None:
    def title() -> str:
        return str(opened.find_element("css selector", "#figure-1 .xtitle").text)

    def ends() -> float:
        return float(opened.execute_script("return document.getElementById('figure-1').data[3].x.at(-1)"))

    def drawn() -> str:
        return str(opened.find_elements("css selector", "#figure-1 .trace .js-line")[3].get_attribute("d"))

    buttons = opened.find_elements("css selector", ".axes")[0].find_elements("css selector", "button")
    assert [button.text for button in buttons] == ["FLOPs", "CPU time", "wall time"]
    before = drawn()
    assert ends() == pytest.approx(9e11)
    assert title() == "compute (FLOP)"
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[1])
    buttons[1].click()
    until(lambda: title() == "CPU time (s)")
    assert ends() == pytest.approx(55, abs=3)
    assert drawn() != before
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "true", "false"]
    buttons[0].send_keys("\ue007")  # Enter: the keyboard reaches them
    until(lambda: title() == "compute (FLOP)")
    assert ends() == pytest.approx(9e11)


def test_dragging_zooms(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    area = opened.find_element("css selector", "#figure-2 .draglayer .nsewdrag")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    span = "return document.getElementById('figure-2').layout.xaxis.range"
    low, high = opened.execute_script(span)
    ActionChains(opened).move_to_element(area).click_and_hold().move_by_offset(120, 60).release().perform()
    until(lambda: opened.execute_script(span) != [low, high])
    closer = opened.execute_script(span)
    assert low < closer[0] < closer[1] < high


def test_a_figure_can_be_saved_as_a_picture(opened: Any) -> None:
    data = opened.execute_async_script(
        "const done = arguments[0], size = {format: 'png', width: 300, height: 200};"
        "Plotly.toImage('figure-1', size).then(done, error => done(String(error)));"
    )
    assert data.startswith("data:image/png;base64,")


def test_pictures_are_shown(opened: Any) -> None:
    assert opened.execute_script("return document.querySelector('img').naturalWidth") == 1


def test_there_is_no_way_to_upload_a_figure(opened: Any) -> None:
    names = opened.execute_script("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert len(names) == 4 * 4
    assert not [name for name in names if any(word in name.lower() for word in ("share", "cloud", "edit", "upload"))]


def test_a_narrow_page_does_not_scroll_sideways(opened: Any) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        until(lambda: opened.execute_script("return document.querySelector('#figure-1 .main-svg').clientWidth") < 400)
        assert opened.execute_script(wide) <= 0
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_dark_page_is_dark_and_its_figures_are_legible(opened: Any) -> None:
    colours = (
        "const style = name => getComputedStyle(document.querySelector(name));"
        "return [style('body').backgroundColor, style('.xtitle').fill];"
    )
    light = opened.execute_script(colours)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        assert opened.execute_script(colours) == ["rgb(21, 24, 28)", "rgb(228, 231, 234)"]
        assert light == ["rgb(255, 255, 255)", "rgb(34, 38, 43)"]
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_policy_stops_a_script_that_would_call_home(browser: Any, make_study: Study, tmp_path: Path) -> None:
    # The one test with a complaint in the console; it shows that the others' silence means something.
    open_page(browser, write_report(make_study(), tmp_path / "report.html"))
    refused = browser.execute_async_script(
        "addEventListener('securitypolicyviolation', event => arguments[0](event.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {});"
    )
    messages, _ = drain(browser)
    assert refused == "connect-src"
    assert any("Content Security Policy" in message for message in messages)


def test_a_missing_browser_skips_or_fails_where_one_is_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile("def test_page(browser):\n    assert browser")
    monkeypatch.setenv("PATH", str(pytester.path))
    monkeypatch.delenv("SCRIMP_REQUIRE_BROWSER", raising=False)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(skipped=1)
    monkeypatch.setenv("SCRIMP_REQUIRE_BROWSER", "1")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(errors=1)
