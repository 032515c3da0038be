"""The page that asks a person for labels, served to this machine alone.

Bound to 127.0.0.1, under a path of 128 random bits. What names another host (a page elsewhere whose name was made to
point here) or comes from another origin is refused; nothing is served but the page, the images by number and the
session's state.
"""

from __future__ import annotations

import hmac
import io
import json
import mimetypes
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from scrimp.data import Images
from scrimp.jobs.label_config import KEYS
from scrimp.jobs.label_session import Conflict, Session

HOST = "127.0.0.1"
_SHOWN = frozenset({".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".avif"})  # what browsers draw by themselves
_LARGEST = 1600  # side in pixels of what is converted for the page
_BODY = 65536  # bytes of a request that is looked at
_PATIENCE = 30.0  # seconds for a request to arrive
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is answered by a status and a line."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class LabelServer:
    """Serves one session until closed.

    Args:
        session: what is asked for.
        images: what is shown, by number; ``paths`` of their files where there are any.
        names: of the images.
        classes: their names.
        news: further figures for the page, as JSON holds them, such as the estimate of accuracy.
        port: 0 takes a free one.

    Attributes:
        url: of the page.
        finished: set once an annotator has said that it is enough.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        session: Session,
        images: Images,
        *,
        paths: tuple[str, ...] | None,
        names: tuple[str, ...],
        classes: tuple[str, ...],
        news: Callable[[], dict[str, Any]],
        port: int = 0,
    ) -> None:
        self.session, self.images, self.paths = session, images, paths
        self.names, self.classes, self.news = names, classes, news
        self.token = secrets.token_urlsafe(16)
        self.finished = threading.Event()
        self._http = _Http((HOST, port), _Handler)
        self._http.app = self
        self.port = self._http.server_address[1]
        self.hosts = frozenset(f"{host}:{self.port}" for host in (HOST, "localhost"))
        self.url = f"http://{HOST}:{self.port}/{self.token}/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what has been asked, then no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def get(self, path: str) -> tuple[str, bytes]:
        """Type and content of what is at ``path`` below the token.

        Raises:
            Refused: nothing is.
        """
        if path == "":
            return "text/html; charset=utf-8", page()
        if path == "state":
            return _json(self.state())
        kind, _, number = path.partition("/")
        if kind == "image" and number.isascii() and number.isdigit() and len(number) < 12:
            row = int(number)
            if row < len(self.names):
                return picture(self.images, self.paths, row)
        raise Refused(HTTPStatus.NOT_FOUND, "nothing here")

    def post(self, path: str, asked: dict[str, Any]) -> tuple[str, bytes]:
        """The answer to an action.

        Raises:
            Refused: no such action, or without what it needs.
            Conflict: it cannot be.
        """
        who = asked.get("who")
        if not isinstance(who, str) or not 1 <= len(who) <= 64 or not who.isascii() or not who.isprintable():
            raise Refused(HTTPStatus.BAD_REQUEST, "expected who, a name of 1 to 64 characters")
        if path == "label":
            self.session.label(who, *self._said(asked))
        elif path == "undo":
            return self._answer(self.session.undo(who), undone=True)
        elif path == "keep":
            self.session.keep(who)
            return _json(self.state())
        elif path == "release":
            self.session.release(who)
            return _json({})
        elif path == "finish":
            self.finished.set()
            return _json(self.state())
        elif path != "next":
            raise Refused(HTTPStatus.NOT_FOUND, "no such action")
        return self._answer(None if self.session.done else self.session.next(who))

    def state(self) -> dict[str, Any]:
        keys = KEYS if len(self.classes) <= len(KEYS) else ""
        return {
            **self.session.status(),
            "classes": list(self.classes),
            "keys": keys[: len(self.classes)],
            "finished": self.finished.is_set(),
            **self.news(),
        }

    def _said(self, asked: dict[str, Any]) -> tuple[int, int | None]:
        row, number = asked.get("image"), asked.get("class")
        # True is an int to Python.
        if type(row) is not int or not (number is None or type(number) is int):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected image, a number, and class, a number or null")
        return row, number

    def _answer(self, row: int | None, *, undone: bool = False) -> tuple[str, bytes]:
        image = None if row is None else {"image": row, "name": self.names[row], "url": f"image/{row}"}
        return _json({"given": image, "undone": undone and row is not None, "state": self.state()})


def page() -> bytes:
    """The page: one file that asks for nothing but the session and its images."""
    return resources.files("scrimp.jobs").joinpath("label_page", "page.html").read_bytes()


def picture(images: Images, paths: tuple[str, ...] | None, row: int) -> tuple[str, bytes]:
    """The type and bytes of an image: the file as it is where browsers draw it, else a PNG.

    Raises:
        Refused: the file cannot be read any more.
    """
    from PIL import Image, ImageOps

    from scrimp.primitives.pixels import eight_bits

    if paths is None:
        return "image/png", _png(Image.fromarray(_pixels(images, row)))
    path = Path(paths[row])
    try:
        if path.suffix.lower() in _SHOWN:
            return mimetypes.guess_type(path.name)[0] or "image/avif", path.read_bytes()
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            upright.thumbnail((_LARGEST, _LARGEST))
            return "image/png", _png(eight_bits(upright))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused(HTTPStatus.NOT_FOUND, f"{path.name} cannot be read") from error


def _pixels(images: Images, row: int) -> Any:
    values = images.batch(torch.tensor([row]))[0]
    return values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).contiguous().numpy()


def _png(drawn: Any) -> bytes:
    target = io.BytesIO()
    drawn.save(target, "PNG")
    return target.getvalue()


def _json(value: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = False
    app: LabelServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle is no news for the terminal."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "scrimp", ""
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer(lambda path: self.server.app.get(path))

    def do_POST(self) -> None:
        self._answer(lambda path: self.server.app.post(path, self._asked()))

    def _answer(self, work: Callable[[str], tuple[str, bytes]]) -> None:
        self._read = False
        try:
            kind, content = work(self._path())
            self._send(HTTPStatus.OK, kind, content)
        except Refused as error:
            self._refuse(error.status, str(error))
        except Conflict as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        except OSError as error:  # the journal could not be written: what was said is not kept
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, error.strerror or "not kept")

    def _path(self) -> str:
        """Below the token, where host, origin and token are right."""
        app = self.server.app
        if self.headers.get_all("Host") is None or any(
            host.lower() not in app.hosts for host in self.headers.get_all("Host", [])
        ):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "not this host")
        origins = self.headers.get_all("Origin", [])
        if any(origin.lower() not in {f"http://{host}" for host in app.hosts} for origin in origins):
            raise Refused(HTTPStatus.FORBIDDEN, "not from another origin")
        # A link in another page, such as a terminal's, may open this one; it can neither frame nor read it.
        opened = self.command == "GET" and self.headers.get("Sec-Fetch-Dest") == "document"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not opened:
            raise Refused(HTTPStatus.FORBIDDEN, "not from another site")
        token, slash, rest = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), app.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "open the address that scrimp label printed")
        return rest

    def _asked(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or self.headers.get("Transfer-Encoding"):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 9 or int(length) > _BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {_BODY} bytes")
        # A form of another page can send no such type without asking first.
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        content = self.rfile.read(int(length))
        self._read = True
        try:
            asked = json.loads(content)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return asked

    def _refuse(self, status: HTTPStatus, line: str) -> None:
        if self.command != "GET" and not self._read:
            self.close_connection = True  # its body would be taken for the next request
        self._send(status, *_json({"error": line}))

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Connection", "close" if self.close_connection else "keep-alive"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal shows progress, and addresses with the token belong in no log."""
