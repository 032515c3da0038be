"""The map of embeddings as a figure, and as a person gets it: drawn in a browser, pointed at, clicked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report_browser import drain, open_page, until

from scrimp.jobs.encoder_pictures import embedding_section
from scrimp.receipts import Receipt
from scrimp.report import write_report
from scrimp.report.scatter import MARKS, POINT_COLOURS, class_scatter

Study = Callable[..., list[Receipt]]
CLASSES = ("shirt", "a < b & c", "<script>window.broken = 1</script>")
FIGURE = "#figure-5"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_stand_out_from_both_pages() -> None:
    assert len(set(POINT_COLOURS)) == 10
    dark = luminance("#15181c")
    for colour in POINT_COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 2.3
        assert (luminance(colour) + 0.05) / (dark + 0.05) >= 2.3


def test_seventy_classes_look_different_and_keep_their_looks() -> None:
    groups = [[(float(place), 1.0)] for place in range(71)]
    names = [f"class {place}" for place in range(71)]
    looks = [(trace.marker.color, trace.marker.symbol) for trace in class_scatter(names, groups).data]
    assert len(set(looks[:70])) == 70 == len(POINT_COLOURS) * len(MARKS)
    assert looks[70] == looks[0]
    assert len({colour for colour, _ in looks[:10]}) == 10
    fewer = class_scatter(names, [[], *groups[1:3], *[[]] * 68])
    assert [(trace.name, trace.marker.color) for trace in fewer.data] == [
        ("class 1", looks[1][0]),
        ("class 2", looks[2][0]),
    ]


def test_points_are_where_they_belong_on_equal_scales() -> None:
    figure = class_scatter(["a", "b"], [[(1.0, 2.0), (3.0, 4.0)], [(5.0, 6.0)]])
    assert [(trace.x, trace.y) for trace in figure.data] == [((1.0, 3.0), (2.0, 4.0)), ((5.0,), (6.0,))]
    assert {trace.type for trace in figure.data} == {"scatter"}
    assert figure.layout.yaxis.scaleanchor == "x"


def test_names_and_groups_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        class_scatter(["a", "b"], [[]])


@pytest.fixture(scope="module")
def report(make_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study, with a map of three groups of embeddings, badly named."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels].repeat(1, 4) + 0.1 * torch.randn(60, 12, generator=generator)
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(make_study(), path, sections=[embedding_section(features, labels, CLASSES)])


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The browser with the report open; after each test, the console is silent and no request has left the page."""
    if browser.current_url != report.as_uri():
        open_page(browser, report)
        until(lambda: len(drawn(browser)) == 3)
    yield browser
    assert drain(browser) == ([], [])


def drawn(browser: Any) -> list[Any]:
    return browser.find_elements("css selector", f"{FIGURE} .scatterlayer .trace")


def test_the_map_is_drawn_with_its_legend(opened: Any) -> None:
    assert [len(trace.find_elements("css selector", ".point")) for trace in drawn(opened)] == [20, 20, 20]
    legend = [entry.text for entry in opened.find_elements("css selector", f"{FIGURE} .legendtext")]
    assert legend == list(CLASSES)
    assert opened.execute_script("return window.broken === undefined") is True
    heading = opened.find_element("xpath", "//section[.//*[@id='figure-5']]/h2")
    assert heading.text == "Map of the embeddings"


def test_the_points_are_inside_the_figure_and_their_classes_apart(opened: Any) -> None:
    boxes = opened.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' .scatterlayer .trace')].map(trace =>"
        " [...trace.querySelectorAll('.point')].map(point => {"
        " const box = point.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }))",
        FIGURE,
    )
    area = opened.execute_script(
        "const box = document.querySelector(arguments[0] + ' .nsewdrag').getBoundingClientRect();"
        "return [box.left, box.top, box.right, box.bottom];",
        FIGURE,
    )
    points = torch.tensor(boxes)
    assert (points.amin((0, 1)) >= torch.tensor(area[:2])).all()
    assert (points.amax((0, 1)) <= torch.tensor(area[2:])).all()
    flat, owner = points.flatten(0, 1), torch.arange(3).repeat_interleave(20)
    nearest = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(owner[nearest], owner)


def test_pointing_at_a_point_tells_its_class(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    for trace, name in zip(drawn(opened), CLASSES, strict=True):
        point = trace.find_elements("css selector", ".point")[0]
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        ActionChains(opened).move_to_element(point).perform()
        until(lambda name=name: opened.find_element("css selector", f"{FIGURE} .hoverlayer").text == name)


def test_clicking_on_the_legend_hides_a_class_and_brings_it_back(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    def click() -> None:
        entry = opened.find_elements("css selector", f"{FIGURE} .legendtoggle")[0]
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
        ActionChains(opened).move_to_element(entry).click().perform()

    click()
    until(lambda: len(drawn(opened)) == 2)
    click()
    until(lambda: len(drawn(opened)) == 3)
