"""The report as a file: what it holds, that it asks nothing of the network, and that names cannot break out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pytest

from scrimp.meter.cost import Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt
from scrimp.report import Section, picture, write_report

Study = Callable[..., list[Receipt]]
EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


class Page(HTMLParser):
    """Elements with their attributes, the text outside scripts, and the data of the figures."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.figures: list[dict[str, object]] = []
        self._inside: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(str(dict(attributes).get("type") or tag))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)
        elif self._inside[-1] == "application/json":
            self.figures.append(json.loads(data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(receipts: list[Receipt], folder: Path, **options: object) -> Page:
    return Page(write_report(receipts, folder / "report.html", **options).read_text("utf-8"))  # type: ignore[arg-type]


def test_the_report_is_whole(make_study: Study, tmp_path: Path) -> None:
    found = page(make_study(), tmp_path)
    for part in (
        "Test accuracy: presample is worse than uniform; history and prune tie with uniform.",
        "history reached a test accuracy of 88.5 % against 88.4 % for uniform at the same 900 GFLOP: a tie",
        "88.5 ± 0.3 % tie",
        "Energy not measured: no meter.",
        "counted once per shape by FlopCounterMode, times steps",  # how it was measured
        "budget.flops 9e+11",  # configuration
        "images 12000",
        "sampling uniform: uniform; presample: presample; history: history; prune: prune",
        "torch 2.14.1",
        "A processor",
        "4 ways, 3 seeds, 12 runs, 2026-01-02",
    ):
        assert part in found.text
    assert len(found.figures) == 4


def test_the_same_receipts_make_the_same_bytes(make_study: Study, tmp_path: Path) -> None:
    one, two = (write_report(make_study(), tmp_path / name / "report.html") for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert [file.name for file in one.parent.iterdir()] == ["report.html"]


def test_no_element_points_anywhere_else(make_study: Study, tmp_path: Path) -> None:
    found = page(make_study(), tmp_path)
    for name, attributes in found.elements:
        for key in ("src", "href", "action", "data", "poster", "srcset", "background"):
            assert not attributes.get(key) or str(attributes[key]).startswith("data:"), (name, attributes)
    assert not found.all("a")
    assert not found.all("iframe")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text("utf-8"), re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|https?:", style[1])


def test_the_policy_forbids_the_network(make_study: Study, tmp_path: Path) -> None:
    (policy,) = [meta["content"] for meta in page(make_study(), tmp_path).all("meta") if meta.get("http-equiv")]
    rules = dict(rule.split(maxsplit=1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert not re.search(r"https?:|\*|self|eval", str(policy))
    assert not {"connect-src", "frame-src", "font-src"} & set(rules)


def test_names_cannot_break_out(make_study: Study, tmp_path: Path) -> None:
    receipts = [
        replace(
            run, name=EVIL, config={EVIL: EVIL}, notes={EVIL: EVIL}, machine={"processor": EVIL}, versions={EVIL: EVIL}
        )
        for run in make_study(ways=("uniform", EVIL))
    ]
    receipts = [replace(run, cost=replace(run.cost, flops=Reading(9e11, EVIL, (EVIL,)))) for run in receipts]
    figure = go.Figure(go.Scatter(x=[1], y=[1], name=EVIL), layout={"title": {"text": EVIL}})
    sections = [Section(EVIL, picture(b"\x89PNG", EVIL, caption=EVIL), EVIL), Section(EVIL, figure)]
    found = page(receipts, tmp_path, sections=sections)
    assert len(found.all("script")) == len(found.figures) + 2
    assert [image.get("alt") for image in found.all("img")] == [EVIL]
    assert EVIL in found.text
    assert all("onerror" not in attributes for _, attributes in found.elements)


def test_it_can_be_read_without_seeing_it(make_study: Study, tmp_path: Path) -> None:
    found = page(make_study(), tmp_path)
    assert found.all("html")[0]["lang"] == "en"
    assert "fmnist: scrimp report" in found.text
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(heading.get("scope") in ("row", "col") for heading in found.all("th"))
    figures = [part for part in found.all("div") if part.get("class") == "plot"]
    assert len(figures) == 4
    assert all(part["role"] == "img" and part["aria-label"] for part in figures)
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_several_studies_share_one_page(make_study: Study, tmp_path: Path) -> None:
    found = page(make_study(name="one") + make_study(name="two", ways=("uniform", "history")), tmp_path)
    assert "2 studies" in found.text
    assert len(found.all("article")) == 2
    assert len(found.figures) == 8
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_other_machines_are_said_on_the_page(make_study: Study, tmp_path: Path) -> None:
    receipts = make_study()
    receipts[0] = replace(receipts[0], machine={**receipts[0].machine, "cores": 64})
    found = page(receipts, tmp_path)
    assert "2 machines (differing in cores): their times are not comparable" in found.text
    assert "uniform: 64, 2; presample, history, prune: 2" in found.text


def test_further_sections_come_in_order(make_study: Study, tmp_path: Path) -> None:
    sections = [
        Section("Reconstructions", picture(b"\x89PNG\r\n", "three images", caption="Left: before."), "What to see."),
        Section("Bars", go.Figure(go.Bar(x=[1, 2], y=[3, 4]))),
        Section("Words", "<p>any <b>HTML</b></p>"),
    ]
    found = page(make_study(), tmp_path, sections=sections)
    titles = [
        found.text.index(title) for title in ("Reconstructions", "Left: before.", "Bars", "any HTML", "Machine and")
    ]
    assert titles == sorted(titles)
    (image,) = found.all("img")
    assert image == {"src": "data:image/png;base64,iVBORw0K", "alt": "three images"}
    assert found.figures[-1]["data"][0]["type"] == "bar"  # type: ignore[index]


def test_receipts_without_figures_need_no_script(make_study: Study, tmp_path: Path) -> None:
    bare = [replace(run, curve=[], quality={}) for run in make_study()]
    found = page(bare, tmp_path)
    assert not found.all("script")
    assert (tmp_path / "report.html").stat().st_size < 30_000


def test_no_receipts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one receipt or more"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
