"""The page's server as its clients meet it: two at once, strangers, and SIGKILL."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from scrimp.data import FileImages, TensorImages
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.label import label
from scrimp.jobs.label_config import LabelConfig
from scrimp.jobs.label_journal import JOURNAL, Journal
from scrimp.jobs.label_server import LabelServer, page, picture
from scrimp.jobs.label_session import Round, Session
from scrimp.primitives.errors import InputError

CLASSES = ("cat", "dog")


class Client:
    """Talks to a server by raw requests, as an annotator of a name."""

    def __init__(self, url: str, who: str = "ann") -> None:
        self.parts, self.who = urlsplit(url), who

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.parts.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=named)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, dict(answer.headers)

    def post(self, action: str, **more) -> dict:
        body = json.dumps({"who": self.who, **more}).encode()
        status, content, _ = self.ask("POST", self.parts.path + action, body, Content_Type="application/json")
        return {"status": status, **json.loads(content)}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[LabelServer, Session]]:
    journal = Journal(tmp_path / JOURNAL, {})
    session = Session(journal, images=40, classes=2, budget=20)
    session.begin(Round(tuple(range(40)), frozenset()))
    images = TensorImages(torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    names = tuple(f"{row}.png" for row in range(40))
    news = {"estimate": None, "gain": None}
    server = LabelServer(session, images, paths=None, names=names, classes=CLASSES, news=lambda: news)
    yield server, session
    server.close()
    journal.close()


def test_two_clients_share_the_work_and_lose_nothing(served):
    server, session = served
    said: dict[str, dict[int, int]] = {"ann": {}, "ben": {}}

    def work(who: str) -> None:
        client = Client(server.url, who)
        answer = client.post("next")
        while answer["given"] is not None:
            row = answer["given"]["image"]
            number = (row + len(who + said[who].__repr__())) % 2
            answer = client.post("label", **{"image": row, "class": number})
            assert answer["status"] == 200
            said[who][row] = number

    threads = [threading.Thread(target=work, args=(who,)) for who in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not said["ann"].keys() & said["ben"].keys()
    everything = said["ann"] | said["ben"]
    assert len(everything) == 20
    assert {row["image"]: row["class"] for row in session.rows()} == everything
    state = json.loads(
        Client(server.url).ask("GET", server.url.removeprefix(f"http://127.0.0.1:{server.port}") + "state")[1]
    )
    assert state["done"] is True
    assert state["counts"] == [list(everything.values()).count(0), list(everything.values()).count(1)]
    assert (state["classes"], state["keys"], state["labels"]) == (["cat", "dog"], "12", 20)


def test_an_image_of_another_is_refused_and_undo_gives_it_back(served):
    server, _ = served
    ann, ben = Client(server.url, "ann"), Client(server.url, "ben")
    row = ann.post("next")["given"]["image"]
    refused = ben.post("label", **{"image": row, "class": 0})
    assert (refused["status"], refused["error"]) == (409, "this image was not handed out to you")
    assert ann.post("label", **{"image": row, "class": 1})["state"]["labels"] == 1
    assert ben.post("label", **{"image": row, "class": 0})["status"] == 409
    assert ben.post("undo")["undone"] is False
    back = ann.post("undo")
    assert (back["undone"], back["given"]["image"], back["state"]["labels"]) == (True, row, 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1"}, 421),  # without the port: not what this page is opened by
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),  # what a form elsewhere could send unasked
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_strangers_are_refused(served, headers, status):
    server, session = served
    body = json.dumps({"who": "ann"}).encode()
    sent = {"Content-Type": "application/json", **headers}
    client = Client(server.url)
    found, _, _ = client.ask("POST", client.parts.path + "next", body, **sent)
    assert found == status
    assert session.next("ben") == (1 if status == 200 else 0)  # the first is taken only then


def test_a_link_elsewhere_opens_the_page_and_reads_nothing(served):
    server, _ = served
    client = Client(server.url)
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert client.ask("GET", client.parts.path, **linked)[0] == 200
    for kind in ("image", "empty", "iframe"):
        assert client.ask("GET", client.parts.path + "state", **{**linked, "Sec-Fetch-Dest": kind})[0] == 403


def test_the_token_is_needed_and_new_each_time(served, tmp_path):
    server, _ = served
    client = Client(server.url)
    for path in (
        "/",
        "/state",
        "/wrong/state",
        f"/{server.token}",
        f"/{server.token[:-1]}/state",
        f"/%20{server.token}/",
    ):
        assert client.ask("GET", path)[0] == 403
    assert len(server.token) >= 22  # 128 bits
    assert server._http.server_address[0] == "127.0.0.1"


def test_nothing_is_served_but_page_state_and_images(served):
    server, _ = served
    client = Client(server.url)
    top = client.parts.path
    for path in (
        "image/40",
        "image/-1",
        "image/1e1",
        "image/../state",
        "../../etc/passwd",
        "label",
        "page.html",
        "image/" + "1" * 30,
    ):
        assert client.ask("GET", top + path)[0] == 404
    status, content, headers = client.ask("GET", top)
    assert (status, content) == (200, page())
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert client.ask("GET", top + "image/3")[1].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"[" * 60000, 400),
        (b'{"who": ""}', 400),
        (b'{"who": 3}', 400),
        (b'{"who": "a", "image": "0", "class": 1}', 400),
        (b'{"who": "a", "image": true, "class": 1}', 400),
        (b'{"who": "a", "image": 0, "class": 0.5}', 400),
        (b'{"who": "a", "image": 10000000, "class": 1}', 409),
        (b'{"who": "a", "image": 0, "class": 2}', 409),
        (b'{"who": "a", "image": 0, "class": -1}', 409),
        (b" " * 70000, 413),
    ],
)
def test_bodies_that_are_no_labels(served, body, status):
    server, session = served
    client = Client(server.url)
    found, content, _ = client.ask("POST", client.parts.path + "label", body, Content_Type="application/json")
    assert found == status
    assert set(json.loads(content)) == {"error"}
    assert session.rows() == []


def test_the_page_asks_nothing_of_any_network():
    source = page().decode()
    assert re.findall(r"https?://|//[a-z]+\.|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", source) == []
    assert source.count("<script") == 1
    assert "innerHTML" not in source  # names of images and classes are text


def test_files_are_shown_as_they_are_or_as_png(tmp_path):
    paths = []
    for name, mode in (("a.jpg", "RGB"), ("b.tif", "I;16"), ("c.png", "L")):
        path = tmp_path / name
        Image.new(mode, (5, 3)).save(path)
        paths.append(str(path))
    paths.append(str(tmp_path / "absent.png"))
    images = FileImages(paths, torch.zeros(4, dtype=torch.int64), size=8)
    assert picture(images, images.paths, 0) == ("image/jpeg", Path(paths[0]).read_bytes())
    kind, content = picture(images, images.paths, 1)
    assert kind == "image/png"
    assert content.startswith(b"\x89PNG")
    with pytest.raises(Exception, match=r"absent\.png cannot be read"):
        picture(images, images.paths, 3)
    grey = TensorImages(torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2), torch.tensor([0]))
    (tmp_path / "grey.png").write_bytes(picture(grey, None, 0)[1])
    assert list(Image.open(tmp_path / "grey.png").tobytes()) == [0, 1, 2, 3]


def start(folder: Path, *more: str) -> tuple[subprocess.Popen[str], Client]:
    """The command with its page; a client of it."""
    command = [
        sys.executable,
        "-m",
        "scrimp",
        "label",
        "flat",
        "--classes",
        "cat",
        "dog",
        "--budget",
        "8",
        "--batch",
        "4",
    ]
    process = subprocess.Popen(
        [*command, "--out", "run", "--json", "--device", "cpu", *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("label at http://127.0.0.1:"), line + process.stderr.read()
    return process, Client(line.removeprefix("label at ").strip())


def give(client: Client, count: int) -> dict[int, int]:
    """So many labels, by the first letter of the image's name, all acknowledged."""
    said = {}
    answer = client.post("next")
    while len(said) < count:
        if answer["given"] is None:
            answer = client.post("next")
            continue
        row = answer["given"]["image"]
        number = int(answer["given"]["name"].startswith("d"))
        answer = client.post("label", **{"image": row, "class": number})
        assert answer["status"] == 200
        said[row] = number
    return said


def annotator(said: dict[int, int], count: int, then: Callable[[Client], Any]) -> Callable[[LabelServer], None]:
    """Somebody who gives so many labels once the page is there, and then does something else."""

    def ready(server: LabelServer) -> None:
        def work() -> None:
            client = Client(server.url)
            said.update(give(client, count))
            then(client)

        threading.Thread(target=work).start()

    return ready


def labels_of(journal: Path) -> dict[int, int]:
    found = {}
    for line in journal.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "label":
            found[event["image"]] = event["class"]
    return found


def test_sigkill_loses_nothing_acknowledged_and_resume_goes_on(tmp_path, monkeypatch):
    for number in range(12):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.new("RGB", (6, 6), (250 * (number % 2), 20 * number, 90)).save(
            tmp_path / "flat" / f"{'cd'[number % 2]}{number}.png"
        )
    victim, client = start(tmp_path)
    first = give(client, 5)  # into the second round
    victim.kill()
    victim.communicate()
    assert labels_of(tmp_path / "run" / JOURNAL) == first
    monkeypatch.chdir(tmp_path)
    config = {"out": Path("run"), "json": True, "device": "cpu", "budget": 8, "batch": 4}
    resumed = LabelConfig(data="flat", classes=CLASSES, resume=True, **config)
    second: dict[int, int] = {}
    with pytest.raises(Interrupted):
        label(resumed, ready=annotator(second, 1, lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert len((tmp_path / "run" / "labels.csv").read_text().splitlines()) == 1 + 6
    third: dict[int, int] = {}
    done = label(resumed, ready=annotator(third, 2, lambda client: client.post("finish")))
    receipt = done.receipts[0].to_dict()
    assert receipt["cost"]["labels"]["value"] == 8
    assert sorted(first | second | third) == sorted(labels_of(tmp_path / "run" / JOURNAL))
    csv = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert csv[0] == "image,label,round,audit,annotator"
    assert all(line.split(",")[1] == {"c": "cat", "d": "dog"}[line[0]] for line in csv[1:])
    assert receipt["notes"]["labels a class"] == {
        "cat": sum("cat" in line for line in csv),
        "dog": sum("dog" in line for line in csv),
    }


def test_a_taken_port_is_one_line(tmp_path, served):
    server, _ = served
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("L", (6, 6), number).save(tmp_path / "flat" / f"{number}.png")
    config = LabelConfig(
        data=str(tmp_path / "flat"), classes=CLASSES, port=server.port, out=tmp_path / "run", json=True, device="cpu"
    )
    with pytest.raises(InputError, match="free port"):
        label(config)
