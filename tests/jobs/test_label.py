"""`scrimp label` end to end with oracles: choosing, learning, estimating, stopping, exporting, going on."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from scrimp.cli import main
from scrimp.data import ImageData, TensorImages, load_images
from scrimp.jobs.encoders import create_encoder, encoder_metadata
from scrimp.jobs.folder import RECEIPT, REPORT
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.label import label
from scrimp.jobs.label_ask import ask_oracle
from scrimp.jobs.label_config import KEYS, LabelConfig, Name
from scrimp.jobs.label_data import load_pool
from scrimp.jobs.label_export import write_labels
from scrimp.jobs.label_learner import Learner, strategy_named, wilson
from scrimp.jobs.label_oracle import read_oracle
from scrimp.jobs.label_report import labels_to
from scrimp.jobs.label_session import Round, Snapshot
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.primitives.weights import pack_weights
from scrimp.represent.knn import unit_rows
from scrimp.represent.linear import linear_accuracy

SHADES = {"dark": 30, "mid": 120, "pale": 220}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of three shades in class folders, some further down."""
    root = tmp_path_factory.mktemp("photos")
    for place, (name, shade) in enumerate(SHADES.items()):
        for number in range(8):
            folder = root / name / ("deep" if number % 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 7), (shade + number, shade, 255 - shade)).save(folder / f"{place}{number}.png")
    return root


@pytest.fixture
def flat(photos: Path, tmp_path: Path) -> Path:
    """The same pictures without their classes."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in photos.rglob("*.png"):
        shutil.copy(path, folder / path.name)
    return folder


def config(data: Path | str, out: Path, **settings) -> LabelConfig:
    usual = {"budget": 9, "batch": 3, "json": True, "device": "cpu", "oracle": "data"}
    return LabelConfig(data=str(data), out=out, **{**usual, **settings})


def blobs(count: int = 90, classes: int = 3, seed: int = 0) -> ImageData:
    """Images told apart by their brightness in thirds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 90, (count, 1, 6, 6), generator=generator)
    for place in range(classes):
        pixels[labels == place, :, 2 * place : 2 * place + 2] += 70
    images = TensorImages(pixels.to(torch.uint8), labels)
    rows = torch.arange(count)
    names = tuple(f"class {place}" for place in range(classes))
    return ImageData(images.take(rows[30:]), images.take(rows[:30]), names, "blobs", (0.3,), (0.2,))


def test_the_datas_own_labels_beside_random(tmp_path):
    done = label(config("blobs", tmp_path / "run", strategy="centres", seeds=2), data=blobs())
    assert [(run.way, run.seed, run.baseline) for run in done.receipts] == [
        ("random", 0, True),
        ("random", 1, True),
        ("centres", 0, False),
        ("centres", 1, False),
    ]
    run = done.receipts[2]
    assert [point["labels"] for point in run.curve] == [3, 6, 9]
    assert run.quality["test_accuracy"] == run.curve[-1]["test_accuracy"]
    assert run.cost.labels.value == 9
    assert run.cost.flops.value == 0
    assert "no network" in run.cost.flops.how
    assert run.notes["test images"] == 30
    assert sum(run.notes["labels a class"].values()) == 9
    page = (tmp_path / "run" / REPORT).read_text()
    assert "Accuracy against labels" in page
    assert "All labels give" in page
    with (tmp_path / "run" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = blobs()
    assert len(rows) == len({row["image"] for row in rows}) == 9
    assert all(data.classes[int(data.train.labels[int(row["image"][:-4])])] == row["label"] for row in rows)
    # The last point again, by the labels in the file alone.
    pool = load_pool(config("blobs", tmp_path), data, None)
    from scrimp.jobs.encoders import features_of
    from scrimp.represent.knn import unit_rows

    train, test = (
        unit_rows(features_of(pool[1], images, device="cpu", size=pool[1].size)) for images in (data.train, data.test)
    )
    chosen = torch.tensor([int(row["image"][:-4]) for row in rows])
    expected = linear_accuracy(train[chosen], data.train.labels[chosen], test, data.test.labels, unlabelled=train)
    assert run.quality["test_accuracy"] == expected


def test_an_oracle_in_class_folders_a_csv_and_back(photos, flat, tmp_path):
    """The export of one run is the oracle of the next, with the same labels."""
    first = label(config(flat, tmp_path / "one", oracle=str(photos), budget=24, batch=8, export_folders="symlink"))
    truth = {path.name: path.relative_to(photos).parts[0] for path in photos.rglob("*.png")}
    with first.labels.open(newline="") as file:
        assert {row["image"]: row["label"] for row in csv.DictReader(file)} == truth
    links = list((tmp_path / "one" / "labelled").rglob("*.png"))
    assert {path.name: path.parent.name for path in links} == truth
    assert all(path.is_symlink() and path.read_bytes() == (flat / path.name).read_bytes() for path in links)
    assert load_images(tmp_path / "one" / "labelled").classes == tuple(sorted(SHADES))
    second = label(config(flat, tmp_path / "two", oracle=str(first.labels), export_folders="copy"))
    assert second.receipts[0].way == LabelConfig(data="").strategy  # nothing to hold random against
    with second.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert all(truth[row["image"]] == row["label"] for row in rows)
    assert sum(int(row["audit"]) for row in rows) == 2  # a fifth of nine
    assert not any(path.is_symlink() for path in (tmp_path / "two" / "labelled").rglob("*.png"))
    assert second.receipts[0].quality["estimated_accuracy"] is not None
    assert "drawn at random" in second.receipts[0].notes["estimate"]["how"]


def test_images_the_oracle_does_not_know_are_skipped(photos, flat, tmp_path):
    known = sorted(path.name for path in flat.iterdir())[:20]
    lines = [f"{name},{'low' if name < '1' else 'high'}" for name in known if not name.startswith("05")]
    (tmp_path / "some.csv").write_text("\ufeffImage,Class,more\n" + "\n".join(lines) + "\nother.png,low\n05.png,\n")
    done = label(config(flat, tmp_path / "run", oracle=str(tmp_path / "some.csv"), budget=24, batch=5))
    run = done.receipts[0]
    assert run.cost.labels.value == 19
    assert run.notes["skipped while labelling"] == 5
    assert run.notes["stopped early"] == "every image has been seen"
    assert run.notes["labels a class"] == {"low": 7, "high": 12} or run.notes["labels a class"] == {
        "high": 12,
        "low": 7,
    }


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("name", get_args(Name))
def test_every_strategy_chooses_as_many_as_are_wanted(name: Name, balance: bool, tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator))
    learner = Learner(config("x", tmp_path, until=3, balance=balance, strategy=name, batch=7), features, 3, 0, name)
    labels: dict[int, int] = {}
    for rounds in range(3):
        chosen, why = learner.choose(Snapshot(dict(labels), frozenset(labels), frozenset(), 20 - len(labels), rounds))
        assert (why, len(chosen.rows)) == ("", (7, 7, 6)[rounds])
        assert not set(chosen.rows) & set(labels)
        labels |= {row: row % 3 for row in chosen.rows}
    assert len(labels) == 20


def test_an_interrupted_run_goes_on_to_the_same_labels(tmp_path, monkeypatch):
    whole = label(config("blobs", tmp_path / "whole", strategy="badge"), data=blobs())
    calls = []

    def stopping(session, learner, oracle, *, stop, tell):
        calls.append(learner.strategy)
        left = iter([False] * 4 + [True] * 99)
        ask_oracle(session, learner, oracle, stop=lambda: next(left) and len(calls) == 2, tell=tell)

    with monkeypatch.context() as patched:
        patched.setattr("scrimp.jobs.label.ask_oracle", stopping)
        with pytest.raises(Interrupted):
            label(config("blobs", tmp_path / "run", strategy="badge"), data=blobs())
    assert calls == ["random", "badge"]
    assert (tmp_path / "run" / "random" / "seed-0" / RECEIPT).is_file()
    assert not (tmp_path / "run" / "badge" / "seed-0" / RECEIPT).exists()
    done = label(config("blobs", tmp_path / "run", strategy="badge", resume=True), data=blobs())
    assert done.labels.read_text() == whole.labels.read_text()
    assert [point["test_accuracy"] for point in done.receipts[1].curve] == [
        point["test_accuracy"] for point in whole.receipts[1].curve
    ]
    assert done.receipts[1].notes["features made by an earlier run"] is True


def test_it_stops_once_little_is_left_to_gain(tmp_path):
    easy = {"budget": 40, "batch": 4, "stop": 0.9, "ceiling": False, "beside": "none"}
    run = label(config("blobs", tmp_path / "run", **easy), data=blobs()).receipts[0]
    assert run.cost.labels.value == 16  # the fewest fits that tell
    assert "less than 0.9" in run.notes["stopped early"]
    assert run.notes["gain left"]["high"] < 0.9


def test_the_estimate_is_of_images_drawn_at_random_by_who_has_not_seen_them(tmp_path):
    """Held against folds made by hand: labels that no classifier can guess must be got right by chance alone."""
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(200, 40, generator=generator))
    noise = torch.randint(2, (120,), generator=generator).tolist()
    learner = Learner(config("x", tmp_path), features, 2, 0, "random", audit=0.5)
    audit = frozenset(range(60))
    learner.learn(Snapshot(dict(enumerate(noise)), frozenset(range(120)), audit, 0, 1))
    assert learner.estimate is not None
    assert learner.estimate.count == 60
    assert 0.25 < learner.estimate.accuracy < 0.75  # seen, they would all be right
    assert learner.estimate.low < 0.5 < learner.estimate.high
    whole = Learner(config("x", tmp_path), features, 2, 0, "random")
    whole.learn(Snapshot(dict(enumerate(noise)), frozenset(range(120)), frozenset(), 0, 1))
    assert whole.estimate is not None
    assert whole.estimate.count == 120
    assert "not typical" in whole.estimate.how


def test_the_audit_has_its_share_over_many_small_rounds(tmp_path):
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    learner = Learner(config("x", tmp_path, batch=3), features, 2, 0, "random", audit=0.2)
    drawn, taken = 0, frozenset()
    for rounds in range(20):
        chosen, why = learner.choose(Snapshot({}, taken, frozenset(), 60, rounds))
        assert (why, len(chosen.rows), len(set(chosen.rows) | taken)) == ("", 3, len(taken) + 3)
        assert chosen.audit <= set(chosen.rows)
        drawn, taken = drawn + len(chosen.audit), taken | set(chosen.rows)
    assert drawn == 12


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 10), (7, 10), (10, 10), (450, 1000)])
def test_wilsons_interval_is_where_the_test_of_a_share_turns(right, count):
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / count)
            assert abs(right / count - end) / deviation == pytest.approx(statistics.NormalDist().inv_cdf(0.975))


def test_labels_to_reach_an_accuracy():
    curve = [{"labels": 10.0, "test_accuracy": 0.5}, {"labels": 20.0, "test_accuracy": 0.8}, {"labels": 30.0}]
    assert labels_to(curve, 0.6) == 20
    assert labels_to(curve, 0.9) is None


def test_names_that_could_not_be_read_back_are_quoted(tmp_path):
    rows = [{"image": 0, "class": 1, "round": 1, "audit": False, "who": "a"}]
    path = write_labels(rows, ['odd, "name"\n.png'], ["a", "b,c"], tmp_path / "labels.csv")
    with path.open(newline="") as file:
        assert list(csv.reader(file))[1][:2] == ['odd, "name"\n.png', "b,c"]


def test_images_without_files_are_exported_as_pictures(tmp_path):
    data = replace(blobs(40, 2), classes=("a/b", "c"))
    done = label(config("x", tmp_path / "run", beside="none", ceiling=False, export_folders="copy"), data=data)
    found = sorted((done.folder / "labelled").rglob("*.png"))
    assert len(found) == 9
    for path in found:
        row = int(path.stem)
        assert path.parent.name == ("a-b", "c")[int(data.train.labels[row])]
        assert Image.open(path).tobytes() == bytes(data.train.batch(torch.tensor([row])).flatten().tolist())
    with pytest.raises(InputError, match="use copy"):
        label(config("x", tmp_path / "two", export_folders="symlink"), data=data)


def test_keys_of_classes_are_no_commands():
    assert len(set(KEYS)) == len(KEYS)
    assert not set(KEYS) & set("su")


def test_a_strategy_that_asks_a_classifier_begins_without(tmp_path):
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    strategy = strategy_named(config("x", tmp_path, until=5), "badge", 2)
    found = strategy(features, None, torch.arange(2), 3, generator=torch.Generator())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "columns image and label"),
        ("name,kind\na,b\n", "columns image and label"),
        ("image,label\n00.png,a\n00.png,b\n", "one label an image"),
        ("image,label\n00.png,a\n01.png,a\n", "two classes"),
        ("image,label\nx.png,a\ny.png,b\n", "labels of the images"),
        ('image,label\n"00.png,a\n', "CSV in UTF-8"),
        (b"image,label\n\xff\xfe,a\n", "CSV in UTF-8"),
        ("image,label\n00.png,a\x01b\n01.png,c\n", "printable"),
    ],
)
def test_an_oracle_that_is_none(flat, tmp_path, content, said):
    path = tmp_path / "oracle.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as caught:
        label(config(flat, tmp_path / "run", oracle=str(path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0}, "--budget"),
        ({"audit": 1.0}, "--audit"),
        ({"stop": 0.0}, "--stop"),
        ({"classes": ("cat",)}, "2 to 1000 classes"),
        ({"classes": ("cat", "cat")}, "twice"),
        ({"classes": ("cat", "")}, "printable"),
        ({"classes": ("a/b", "a-b"), "export_folders": "copy"}, "can be folders"),
        ({"classes": (".a", "b"), "export_folders": "symlink"}, "can be folders"),
        ({"seeds": 2}, "oracle"),
        ({"pretrained": True}, "--encoder"),
        ({"oracle": "absent.csv"}, "absent.csv"),
        ({"oracle": "data", "classes": ("a", "b")}, "leave one out"),
        ({"lease_seconds": 0.0}, "--lease-seconds"),
        ({"port": 70000}, "--port"),
        ({"strategy": "magic"}, "--strategy"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({}, "--classes NAME NAME"),  # a flat folder needs them
    ],
)
def test_what_no_run_can_mean_is_refused_before_anything_is_written(flat, tmp_path, settings, said):
    with pytest.raises(InputError, match=said) as caught:
        label(config(**{"data": flat, "out": tmp_path / "run", "oracle": None, **settings}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_mistake_gets_one_line_and_code_2(flat, tmp_path, capsys):
    assert main(["label", str(flat), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--classes NAME NAME" in error


def test_a_damaged_image_is_named_or_left_out(flat, photos, tmp_path):
    (flat / "00.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"00\.png"):
        label(config(flat, tmp_path / "one", oracle=str(photos)))
    done = label(config(flat, tmp_path / "two", oracle=str(photos), on_corrupt="skip"))
    assert done.receipts[0].notes["skipped images"] == 1
    assert "00.png" not in done.labels.read_text()


def test_names_shared_by_two_files_are_matched_by_their_folders(tmp_path):
    for folder, shade in (("a", 10), ("b", 200)):
        for name in ("x.png", f"only-{folder}.png"):
            path = tmp_path / "data" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), shade).save(path)
    (tmp_path / "known.csv").write_text("image,label\nx.png,p\na/x.png,q\nelsewhere/only-b.png,p\n")
    asked = config(tmp_path / "data", tmp_path / "run", oracle=str(tmp_path / "known.csv"))
    pool, _ = load_pool(asked, None, None)
    oracle = read_oracle(asked, pool)
    assert pool.names == ("a/only-a.png", "a/x.png", "b/only-b.png", "b/x.png")
    assert [None if item is None else oracle.classes[item] for item in oracle.labels] == [None, "q", "p", None]


def test_the_shell_prints_receipts_and_paths(photos, tmp_path, capsys):
    arguments = ["--oracle", "data", "--budget", "6", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    assert main(["label", str(photos), *arguments]) == 0
    printed = capsys.readouterr()
    assert [run["way"] for run in json.loads(printed.out)] == ["random", LabelConfig(data="").strategy]
    assert printed.err == ""


def test_the_gain_left_is_the_same_after_an_interruption(tmp_path):
    data = blobs(150)
    features = unit_rows(data.train.pixels.flatten(1).float())
    given = (config("x", tmp_path), features, 3, 0, "random")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1)).tolist()

    def labels(count: int) -> dict[int, int]:
        return {row: int(data.train.labels[row]) for row in order[:count]}

    def learn(learner: Learner, count: int) -> None:
        learner.learn(Snapshot(labels(count), frozenset(), frozenset(), 9, 1))

    whole = Learner(*given)
    for count in (6, 12, 18, 24):
        learn(whole, count)
    resumed = Learner(*given, earlier=labels(27), curve=[dict(point) for point in whole.curve])
    for learner in (whole, resumed):
        learn(learner, 30)
    assert whole.gain is not None
    assert vars(resumed.gain) == vars(whole.gain)
    assert Learner(*given, curve=[dict(point) for point in whole.curve]).gain is None  # all was taken back


def test_an_empty_round_is_no_event(tmp_path):
    learner = Learner(config("x", tmp_path), torch.randn(4, 3, generator=torch.Generator()), 2, 0, "typicality")
    assert learner.choose(Snapshot({}, frozenset(range(4)), frozenset(), 5, 1)) == (Round((), frozenset()), "")


def test_an_encoders_features_are_made_once_and_trusted_only_whole(tmp_path):
    data = blobs()
    with torch.random.fork_rng([]):
        model = create_encoder("convnet-8", channels=1, size=8)
    with torch.no_grad():
        dim = model.eval()(torch.zeros(1, 1, 8, 8)).shape[1]
    facts = encoder_metadata("convnet-8", channels=1, size=8, mean=(0.3,), std=(0.2,), dim=dim)
    (tmp_path / "e.safetensors").write_bytes(pack_weights(model.state_dict(), facts))
    kept = {"encoder": str(tmp_path / "e.safetensors"), "cache_folder": tmp_path / "kept", "ceiling": False}
    data = replace(data, train=grown(data.train), test=grown(data.test))
    first = label(config("x", tmp_path / "one", **kept), data=data).receipts[1]
    step = count_flops(lambda: model(torch.zeros(1, 1, 8, 8))).value
    assert first.cost.flops.value == pytest.approx(60 * step)
    assert first.notes["features made by an earlier run"] is False
    again = label(config("x", tmp_path / "two", **kept), data=data).receipts[1]
    assert again.notes["features made by an earlier run"] is True
    assert again.notes["seconds of features"] == first.notes["seconds of features"]  # what they cost all the same
    assert again.curve[-1]["test_accuracy"] == first.curve[-1]["test_accuracy"]
    (file,) = (tmp_path / "kept").glob("*.npy")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        label(config("x", tmp_path / "three", **kept), data=data)


def grown(images: TensorImages) -> TensorImages:
    return TensorImages(torch.nn.functional.pad(images.pixels, (1, 1, 1, 1)), images.labels)
