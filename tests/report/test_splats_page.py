"""Pages of splats: what they hold, that they ask nothing of the network, and that a browser draws what we draw."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_report_browser import drain, until

from scrimp.jobs.splats_pages import clearest
from scrimp.primitives.errors import InputError
from scrimp.report.splats_page import Side, View, _settings, compare_page, scene_page

EVIL = "</script><script>window.broken = 1</script>\"'><img src=x onerror='window.broken = 2'>"
SCENE = b"PK\3\4" + bytes(range(256)) * 3
PIXEL = b"\x89PNG of one pixel"
VIEW = View((0.5, -0.7, -3.0), (0.1, 0.2, 0.3), 50)


class Page(HTMLParser):
    """Elements with their attributes, the text outside scripts and styles, and what the named scripts hold."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._inside: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(str(dict(attributes).get("id")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside[-1]] = self.scripts.get(self._inside[-1], "") + data
        else:
            self.text += data

    def bytes_of(self, name: str) -> bytes:
        return base64.b64decode(self.scripts[name], validate=True)


def test_a_page_holds_its_scene_and_escapes_what_people_wrote() -> None:
    source = scene_page(SCENE, title=EVIL, camera=VIEW, text=f"PSNR {EVIL}", count=1, picture=PIXEL)
    page = Page(source)
    assert page.bytes_of("right-scene") == SCENE
    assert page.text.count(EVIL) == 3  # title, heading, line
    assert "1 Gaussian, 772 B" in page.text
    assert [tag for tag, _ in page.elements].count("script") == 4  # settings, scene, viewer, the page's own
    (image,) = [attributes for tag, attributes in page.elements if tag == "img"]
    assert image == {"src": f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}", "alt": EVIL}
    assert not [tag for tag, attributes in page.elements if "onerror" in attributes]
    assert "JavaScript" in page.text
    assert scene_page(SCENE, title=EVIL, camera=VIEW, text=f"PSNR {EVIL}", count=1, picture=PIXEL) == source


def test_nothing_on_a_page_comes_from_elsewhere() -> None:
    page = Page(compare_page(Side(SCENE, "a"), Side(SCENE + b"x", "b"), title="t"))
    sources = [attributes.get(name) or "" for _, attributes in page.elements for name in ("src", "href")]
    assert {source for source in sources if source} == {"data:,"}
    viewer = gzip.decompress(page.bytes_of("viewer")).decode()
    written = "".join(
        text for name, text in page.scripts.items() if name not in ("viewer", "right-scene", "left-scene")
    )
    assert len(viewer) > 1_000_000
    assert re.findall(r"(?:https?|wss?)://.{20}|@import", viewer + written) == []
    (policy,) = [a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert {source for rule in rules.values() for source in rule.split()} <= {
        *("'none'", "'unsafe-inline'", "data:", "blob:")
    }


def test_the_viewer_is_the_one_that_its_notes_name() -> None:
    folder = resources.files("scrimp.report") / "viewer"
    code = (folder / "supersplat-viewer.min.js").read_bytes()
    assert hashlib.sha256(code).hexdigest() in (folder / "README.md").read_text("utf-8")
    licence = (folder / "LICENSE").read_text("utf-8")
    assert licence.startswith("MIT License")
    assert licence in Page(scene_page(SCENE, title="t")).text  # a copy has to carry it


def test_a_comparison_holds_both_scenes_and_the_receipt() -> None:
    left, right = Side(SCENE, "all <b>", "60 dB", 90_854), Side(SCENE + b"!", "half & half", "40 dB")
    source = compare_page(
        left, right, title=EVIL, text="words <i>", table=[["way", "bytes"], ["a <u>", "7"], ["b", EVIL]]
    )
    page = Page(source)
    assert page.bytes_of("left-scene") == left.scene
    assert page.bytes_of("right-scene") == right.scene
    for text in ("all <b>", "60 dB", "90,854 Gaussians, 772 B", "half & half", "40 dB", "words <i>", "a <u>", "7"):
        assert text in page.text
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("td"), tags.count("b"), tags.count("i"), tags.count("u")) == (2, 0, 0, 0)
    (slider,) = [attributes for tag, attributes in page.elements if tag == "input"]
    assert "all <b>" in (slider["aria-label"] or "")


@pytest.mark.parametrize("up", [(0, -1, 0), (0, 1, 0), (0, 0, 1), (-3, 0, 0), (0.2, -0.5, 0.8), (1e-9, 1, 1e-9)])
def test_the_scene_is_turned_upright_and_the_camera_with_it(up: tuple[float, float, float]) -> None:
    settings = _settings(View((1, 2, 3), (-1, 0.5, 0), up=up))
    x, y, z, w = settings["rotation"]
    assert math.hypot(x, y, z, w) == pytest.approx(1)
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    np.testing.assert_allclose(matrix @ up / np.linalg.norm(up), [0, 1, 0], atol=1e-8)
    np.testing.assert_allclose(settings["camera"]["position"], matrix @ [1, 2, 3], atol=1e-12)
    np.testing.assert_allclose(settings["camera"]["target"], matrix @ [-1, 0.5, 0], atol=1e-12)


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(InputError, match=r"\.sog"):
        scene_page(b"ply\n", title="t")
    with pytest.raises(InputError, match="one length"):
        compare_page(Side(SCENE, "a"), Side(SCENE, "b"), title="t", table=[["a"], ["b", "c"]])
    for wrong in (
        {"target": VIEW.position},
        {"position": (0.0, math.nan, 0.0)},
        {"up": (0.0, 0.0, 0.0)},
        {"fov": 180.0},
    ):
        with pytest.raises(InputError):
            View(**{"position": VIEW.position, "target": VIEW.target, **wrong})


def test_the_whole_scene_is_framed_from_the_side_that_cameras_of_colmap_look_from() -> None:
    settings = _settings(None)
    assert (settings["rotation"], settings["camera"]) == ((1.0, 0.0, 0.0, 0.0), None)  # y and z turned round, x kept
    for antialiased in (False, True):
        page = Page(scene_page(SCENE, title="t", antialiased=antialiased))
        assert json.loads(page.scripts["settings"])["antialiased"] == {"right": antialiased}


def test_a_page_starts_where_most_is_seen() -> None:
    plain, marked = torch.full((4, 6, 3), 0.5), torch.zeros(4, 6, 3)
    marked[1, 2] = 1.0
    assert clearest([plain, 0.1 * marked, marked, plain]) == 2
    assert clearest([plain]) == 0


def ball(n: int, seed: int) -> Any:
    """Opaque coloured blobs in a unit ball, of several sizes."""
    from scrimp.splats.scene import Splats

    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=draw)
    means = means / means.norm(dim=1, keepdim=True) * torch.rand(n, 1, generator=draw).sqrt()
    return Splats(
        means,
        torch.randn(n, 4, generator=draw),
        torch.rand(n, 3, generator=draw) - 3,
        4 * torch.rand(n, generator=draw),
        1.5 * torch.randn(n, 3, generator=draw),
        torch.zeros(n, 0, 3),
    )


def picture_of(browser: Any) -> np.ndarray:
    """The stage as it is on the screen, without its buttons and corners, [h, w, 3] in 0 to 1."""
    from PIL import Image

    browser.execute_script("buttons.hidden = true; stage.style.borderRadius = 0")
    shot = Image.open(io.BytesIO(browser.find_element("id", "stage").screenshot_as_png)).convert("RGB")
    return np.asarray(shot, dtype=np.float64) / 255


def open_scene(browser: Any, source: str, path: Path) -> str:
    """Open the page and wait until it says nothing more, or what is wrong; it asks for itself and for nothing else."""
    path.write_text(source, encoding="utf-8")
    browser.get("about:blank")
    drain(browser)
    browser.get(path.as_uri())
    said = "return document.getElementById('status').textContent"
    until(lambda: not browser.execute_script(said).startswith("Loading"), 300)
    return str(browser.execute_script(said))


@pytest.fixture
def quiet(browser: Any) -> Iterator[Any]:
    """The browser; after each test, nothing but the page itself has been asked for."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    yield browser
    messages, asked = drain(browser)
    assert [url for url in asked if not url.endswith(".html")] == []
    assert [text for text in messages if "Refused" in text or "Uncaught" in text] == []


@pytest.mark.slow
def test_the_page_draws_what_we_draw(quiet: Any, tmp_path: Path) -> None:
    from scrimp.splats.camera import look_at
    from scrimp.splats.render import render
    from scrimp.splats.sog import read_sog, write_sog

    scene, up = write_sog(ball(300, 0)), (0.3, -0.9, 0.2)
    (tmp_path / "scene.sog").write_bytes(scene)
    view = View(VIEW.position, VIEW.target, VIEW.fov, up, (0.2, 0.4, 0.6))
    assert open_scene(quiet, scene_page(scene, title="ball", camera=view, count=300), tmp_path / "page.html") == ""
    assert quiet.execute_script("return viewers[0].app.stats.frame.gsplats") == 300
    seen = picture_of(quiet)
    height, width = seen.shape[:2]
    position, target, above = (torch.tensor(vector) for vector in (VIEW.position, VIEW.target, up))
    camera = look_at(position, target, up=above, width=width, height=height, field_of_view=VIEW.fov)
    ours = render(read_sog(tmp_path / "scene.sog"), camera, background=view.background).clamp(0, 1).numpy()
    assert ours.std() > 0.1
    psnr = -10 * math.log10(float(((seen - ours) ** 2).mean()))
    # Its Gaussians end at 2.83 standard deviations and are blended in 8 bits; in the order of distances it is 37.9 dB.
    assert psnr > 40, f"{psnr:.1f} dB"


@pytest.mark.slow
def test_two_scenes_share_one_camera_and_a_slider(quiet: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    from scrimp.splats.sog import write_sog

    sides = [Side(write_sog(ball(200, seed)), name) for seed, name in ((1, "one"), (2, "two"))]
    open_scene(quiet, compare_page(*sides, title="t", camera=VIEW), tmp_path / "page.html")
    poses = (
        "return viewers.map(v => v.app.root.findByName('camera'))"
        ".map(e => [...e.getWorldTransform().data, ...e.camera.projectionMatrix.data])"
    )
    until(lambda: np.ptp(quiet.execute_script(poses), axis=0).max() < 1e-5, 120)
    before = quiet.execute_script(poses)[0]
    quiet.execute_script("window.drawn = 0; viewers.forEach(v => v.app.on('postrender', () => drawn++))")
    stage, slider = quiet.find_element("id", "stage"), quiet.find_element("id", "slider")
    # From the left half, which the left scene covers, so it is that one which must let the mouse through.
    drag = ActionChains(quiet).move_to_element_with_offset(stage, -200, 50)
    drag.click_and_hold().move_by_offset(90, 40).release().perform()
    until(lambda: np.abs(np.subtract(quiet.execute_script(poses)[0], before)).max() > 0.1, 120)
    until(lambda: np.ptp(quiet.execute_script(poses), axis=0).max() < 1e-5, 120)

    settled = stable(quiet)
    drawn = quiet.execute_script("return drawn")
    slider.send_keys(Keys.HOME)
    right = stable(quiet)
    slider.send_keys(Keys.END)
    left = stable(quiet)
    assert quiet.execute_script("return drawn") == drawn  # at rest, and for the slider, nothing is drawn again
    middle = left.shape[1] // 2
    far = slice(60, middle - 60), slice(middle + 60, -60)
    assert np.abs(left - right).mean() > 0.01
    np.testing.assert_array_equal(settled[:, far[0]], left[:, far[0]])
    np.testing.assert_array_equal(settled[:, far[1]], right[:, far[1]])


def stable(browser: Any) -> np.ndarray:
    """The stage once nothing has been drawn for a second: turns run out slowly."""

    def still() -> bool:
        before = browser.execute_script("return drawn")
        time.sleep(1)
        return bool(browser.execute_script("return drawn") == before)

    until(still, 120)
    return picture_of(browser)


@pytest.mark.slow
def test_a_page_says_why_it_shows_nothing(quiet: Any, tmp_path: Path) -> None:
    damaged = scene_page(SCENE, title="t")
    assert "could not be shown" in open_scene(quiet, damaged, tmp_path / "damaged.html")
    script = {"source": "HTMLCanvasElement.prototype.getContext = () => null"}
    added = quiet.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        assert "WebGL" in open_scene(quiet, damaged, tmp_path / "no-webgl.html")
    finally:
        quiet.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    quiet.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        quiet.get((tmp_path / "damaged.html").as_uri())
        assert "JavaScript" in quiet.find_element("tag name", "noscript").text
    finally:
        quiet.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
