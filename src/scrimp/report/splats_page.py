"""Scenes of splats as one HTML file that opens offline, with the viewer inside: one scene, or two under a slider."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from scrimp.primitives.errors import InputError
from scrimp.report import units
from scrimp.report.html import POLICY, head, resource
from scrimp.report.parts import facts_table

VIEWER_POLICY = f"{POLICY}; worker-src blob:; connect-src blob:"
"""The report's, and that the viewer may sort in a worker and unpack pictures that are both made of the page's bytes."""

_HELP = "Drag to turn, scroll or pinch to come nearer, drag with the right button or two fingers to move."
_SIDES = ("left", "right")
_TAIL = """
<noscript><p class="notice">This page draws the scene with JavaScript, which is switched off here. The scene is inside
the file: open it where JavaScript may run.</p></noscript>"""

Vector = tuple[float, float, float]
_Quaternion = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """Where a page starts to look from, in the coordinates of the scene's file.

    Attributes:
        position, target: of the camera and of what it looks at; orbits go round the target.
        fov: of the picture's height, degrees.
        up: what is above in the scene; the default is that of cameras whose y points down.
        background: red, green, blue, 0 to 1.

    Raises:
        InputError: numbers that make no camera.
    """

    position: Vector
    target: Vector
    fov: float = 60.0
    up: Vector = (0.0, -1.0, 0.0)
    background: Vector = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        vectors = (self.position, self.target, self.up, self.background)
        if any(len(vector) != 3 or not all(map(math.isfinite, vector)) for vector in vectors):
            raise InputError("three finite numbers each", f"{vectors}", "correct the view")
        if math.dist(self.position, self.target) == 0 or math.hypot(*self.up) == 0:
            raise InputError("a target apart from the position, and an up of some length", f"{self}", "move one")
        if not 0 < self.fov < 180:
            raise InputError("a field of view between 0 and 180 degrees", f"{self.fov}", "pass that of the height")


@dataclass(frozen=True)
class Side:
    """One of two scenes that a page compares.

    Attributes:
        scene: bytes of a .sog file.
        name, text: plain text, escaped on the page; ``text`` says what it cost and gave.
        count: of its Gaussians.
        picture: a PNG of the same view, shown until the scene is drawn, or where it cannot be.
        antialiased: whether to draw it with the compensation that it was trained with.
    """

    scene: bytes
    name: str
    text: str = ""
    count: int | None = None
    picture: bytes | None = None
    antialiased: bool = False


def scene_page(
    scene: bytes,
    *,
    title: str,
    camera: View | None = None,
    text: str = "",
    count: int | None = None,
    picture: bytes | None = None,
    antialiased: bool = False,
) -> str:
    """HTML that shows one scene and asks no network for anything: viewer and scene are inside.

    Args:
        scene: bytes of a .sog file.
        title, text: plain text, escaped; ``text`` is the line of the receipt's figures.
        camera: to start with; without it the whole scene is framed, from -z as cameras of COLMAP look.
        count: of Gaussians, None when unknown.
        picture, antialiased: as in `Side`.

    Raises:
        InputError: not the bytes of a .sog.
    """
    side = Side(scene, title, text, count, picture, antialiased)
    lines = [_size(side), text]
    header = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    body = f"<header><h1>{escape(title)}</h1>{header}</header>\n{_stage([side], title)}"
    return _document(title, body, [side], camera)


def compare_page(
    left: Side,
    right: Side,
    *,
    title: str,
    camera: View | None = None,
    text: str = "",
    table: Sequence[Sequence[str]] = (),
) -> str:
    """HTML that shows two scenes from one shared camera with a slider between them, and asks no network for anything.

    Args:
        left, right: what stands on each side of the slider.
        title, text: plain text, escaped.
        camera: to start with; without it the whole right scene is framed, as by `scene_page`.
        table: the receipt: a row of headings, then rows of texts, all equally long.

    Raises:
        InputError: not the bytes of two .sog files, or a ragged table.
    """
    if len({len(row) for row in table}) > 1:
        raise InputError("rows of one length", f"{sorted({len(row) for row in table})}", "fill the missing cells")
    sides = [left, right]
    header = f"<p>{escape(text)}</p>" if text else ""
    captions = "".join(f"<div><h2>{escape(side.name)}</h2>{_caption(side)}</div>" for side in sides)
    body = (
        f"<header><h1>{escape(title)}</h1>{header}</header>\n{_stage(sides, title)}\n"
        f'<section class="captions">{captions}</section>\n'
    )
    if len(table) > 1:
        body += f"<section>{facts_table('What each cost and gave', table[0], table[1:])}</section>"
    return _document(title, body, sides, camera)


def _caption(side: Side) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in (_size(side), side.text) if line)


def _size(side: Side) -> str:
    gaussians = (
        f"{units.count(side.count)} Gaussian{'' if side.count == 1 else 's'}, " if side.count is not None else ""
    )
    return gaussians + units.size(len(side.scene))


def _stage(sides: Sequence[Side], title: str) -> str:
    """Where the script draws. Of two scenes the left one lies on top, cut off at the slider."""
    views = [_view(name, side) for name, side in zip(_SIDES[-len(sides) :], sides, strict=True)]
    slider = ""
    if len(sides) > 1:
        label = escape(f"Share of the width that shows {sides[0].name}, in percent")
        slider = (
            '<div class="edge"></div>'
            f'<input id="slider" type="range" min="0" max="100" step="0.5" value="50" aria-label="{label}">'
        )
    return (
        f'<div id="stage" role="application" tabindex="0" aria-label="{escape(f"{title}. {_HELP}")}">'
        f"{''.join(reversed(views))}{slider}"
        '<p id="status" role="status" class="notice" hidden></p><div id="buttons" hidden></div></div>\n'
        f'<p class="help">{_HELP}</p>{_TAIL}'
    )


def _view(name: str, side: Side) -> str:
    picture = ""
    if side.picture is not None:
        data = base64.b64encode(side.picture).decode("ascii")
        picture = f'<img src="data:image/png;base64,{data}" alt="{escape(side.name)}">'
    return f'<div class="view" id="{name}">{picture}</div>'


def _document(title: str, body: str, sides: Sequence[Side], camera: View | None) -> str:
    named = dict(zip(_SIDES[-len(sides) :], sides, strict=True))
    antialiased = {name: side.antialiased for name, side in named.items()}
    settings = json.dumps(_settings(camera) | {"antialiased": antialiased})
    packed = [_packed(f"{name}-scene", _checked(side)) for name, side in named.items()]
    return f"""{head(title, VIEWER_POLICY, ["page.css", "splats_page.css"])}
<body>
<main>
{body}
<details><summary>Drawn by SuperSplat Viewer on the PlayCanvas engine</summary>
<pre>{escape(resource("viewer", "LICENSE"))}</pre></details>
</main>
<script type="application/json" id="settings">{settings}</script>
{"".join(packed)}{_packed("viewer", _viewer())}<script>
{resource("splats_page.js")}</script>
</body>
</html>
"""


def _packed(identity: str, data: bytes) -> str:
    return f'<script type="text/plain" id="{identity}">{base64.b64encode(data).decode("ascii")}</script>\n'


def _checked(side: Side) -> bytes:
    if not side.scene.startswith(b"PK\3\4"):
        raise InputError("the bytes of a .sog", f"{len(side.scene)} bytes that are of none", "write it as .sog first")
    return side.scene


@functools.cache
def _viewer() -> bytes:
    """Compressed: it is most of the page where the scene is small."""
    return gzip.compress(resource("viewer", "supersplat-viewer.min.js").encode(), 9, mtime=0)


def _settings(camera: View | None) -> dict[str, Any]:
    """The view in the viewer's coordinates, whose y points up, and the rotation of the scene into them."""
    if camera is None:  # half a turn about x: y points up, and the side that was seen from -z to the viewer, at +z
        return {"rotation": (1.0, 0.0, 0.0, 0.0), "background": (0, 0, 0), "camera": None}
    rotation = _upright(camera.up)
    return {
        "rotation": rotation,
        "background": camera.background,
        "camera": {
            "position": _rotate(rotation, camera.position),
            "target": _rotate(rotation, camera.target),
            "fov": camera.fov,
        },
    }


def _upright(up: Vector) -> _Quaternion:
    """Quaternion x y z w that takes ``up`` to +y: the shortest turn to -y, then half a turn about z.

    The half turn is what the viewer, and every other of its kind, does to scenes of cameras whose y points down.
    """
    x, y, z = (value / math.hypot(*up) for value in up)
    real = math.sqrt(max(0.0, (1 - y) / 2))
    if real < 1e-6:
        return (0.0, 0.0, 0.0, 1.0)
    # up x (0, -1, 0) = (z, 0, -x) is the axis of the shortest turn; k * (a + real) is the half turn after it.
    a, c = z / (2 * real), -x / (2 * real)
    return (0.0, a, real, -c)


def _rotate(rotation: _Quaternion, vector: Vector) -> Vector:
    """v + 2 w (q x v) + 2 q x (q x v), q the imaginary part."""
    q, w = rotation[:3], rotation[3]
    once = _cross(q, vector)
    twice = _cross(q, once)
    x, y, z = (v + 2 * w * a + 2 * b for v, a, b in zip(vector, once, twice, strict=True))
    return (x, y, z)


def _cross(a: Vector, b: Vector) -> Vector:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
