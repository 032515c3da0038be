"""The built-in set: what is in it, its licence, and that the script in the repository makes it."""

import dataclasses
import gzip
import importlib.util
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scrimp.data import load as load_module
from scrimp.data import load_images
from scrimp.data import named as named_module
from scrimp.primitives.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(named_module.__file__).parent / "builtin"
FILE = FOLDER / "fashion-mnist-sample.npz.xz"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "make_builtin_data.py"
    if not path.is_file():
        pytest.skip(f"no {path}: not a checkout")
    specification = importlib.util.spec_from_file_location("make_builtin_data", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_source(folder, train=40, test=20):
    """A small set in Fashion-MNIST's layout: image i is filled with i, classes take turns."""
    for prefix, count in (("train", train), ("t10k", test)):
        rows = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(rows[:, None, None], (count, 28, 28))
        heads = {"images-idx3": (b"\0\0\x08\x03", (count, 28, 28)), "labels-idx1": (b"\0\0\x08\x01", (count,))}
        for kind, values in (("images-idx3", images), ("labels-idx1", rows % 10)):
            magic, shape = heads[kind]
            content = magic + np.array(shape, ">u4").tobytes() + values.tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


@pytest.fixture(scope="module")
def data():
    return load_images()


def test_contents(data):
    assert data.name == "fashion-mnist-sample"
    assert (len(data.classes), data.classes[0], data.classes[9]) == (10, "T-shirt/top", "Ankle boot")
    assert data.train.pixels.shape == (12_000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [1200] * 10
    assert data.test.labels.bincount().tolist() == [200] * 10
    # Fashion-MNIST's own figures are 0.2860 and 0.3530.
    assert data.mean[0] == pytest.approx(0.286, abs=0.003)
    assert data.std[0] == pytest.approx(0.353, abs=0.003)
    assert len({image.tobytes() for image in data.train.pixels.numpy()}) > 11_990


def test_name_and_other_size(data, monkeypatch):
    source = named_module.builtin_source()
    rows = torch.arange(0, 2000, 20)
    short = dataclasses.replace(source, train=source.train.take(rows), test=source.test.take(rows))
    monkeypatch.setattr(load_module, "builtin_source", lambda: short)
    small = load_images("builtin", size=14)
    assert small.train.shape == (1, 14, 14)
    assert torch.equal(small.train.labels, data.train.labels[rows])
    assert (small.name, small.classes) == (data.name, data.classes)
    full = data.train.pixels[rows].float()
    wanted = torch.nn.functional.interpolate(full, size=14, mode="bilinear", antialias=True)
    assert (small.train.pixels.float() - wanted).abs().mean() < 1
    assert load_images(size=28).train is short.train


def test_test_data_beside_it_are_refused(data):
    with pytest.raises(InputError, match="leave test out"):
        load_images(test=data.test)


def test_file_and_licence():
    assert FILE.stat().st_size <= 6_000_000
    archive = zipfile.ZipFile(io.BytesIO(lzma.decompress(FILE.read_bytes())))
    assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    licence = (FOLDER / "LICENSE-fashion-mnist").read_text()
    for words in ("MIT License", "2017 Zalando SE", "Permission is hereby granted", "1,200", "dataset-fashion-mnist"):
        assert words in licence


def test_file_is_what_the_script_makes(script):
    if not script.SOURCE.is_dir():
        pytest.skip(f"no {script.SOURCE}: Debian's package dataset-fashion-mnist is not installed")
    # The .npz inside is compared: versions of liblzma may pack the same bytes differently.
    assert lzma.decompress(FILE.read_bytes()) == script.sample()


def test_script_is_deterministic_and_stratified(script, tmp_path, monkeypatch):
    write_source(tmp_path)
    monkeypatch.setattr(script, "PER_CLASS", {"train": 3, "test": 1})
    content = script.sample(tmp_path)
    assert content == script.sample(tmp_path)
    assert script.compress(content) == script.compress(content)
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        rows = archive["train_images"][:, 0, 0]
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert np.array_equal(rows % 10, archive["train_labels"])
        assert np.bincount(archive["train_labels"]).tolist() == [3] * 10
        assert np.bincount(archive["test_labels"]).tolist() == [1] * 10
    monkeypatch.setattr(script, "SEED", 1)
    assert script.sample(tmp_path) != content


def test_script_needs_only_numpy(script):
    lines = (ROOT / "scripts" / "make_builtin_data.py").read_text().splitlines()
    modules = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert modules - {"numpy"} <= {"__future__", "argparse", "gzip", "hashlib", "io", "lzma", "pathlib", "zipfile"}


def test_damaged_file_is_an_error(tmp_path, monkeypatch):
    spoilt = tmp_path / "builtin" / FILE.name
    spoilt.parent.mkdir()
    content = bytearray(FILE.read_bytes())
    content[len(content) // 2] ^= 1
    for damage in (bytes(content), bytes(content[:1000]), b""):
        spoilt.write_bytes(damage)
        monkeypatch.setattr(named_module.resources, "files", lambda package: tmp_path)
        with pytest.raises(InputError, match="install scrimp again"):
            load_images()
