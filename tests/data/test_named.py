"""Named sets: where they are looked for and in which order, what is said when there are none; packed sets."""

import gzip
import io
import itertools
import pickle
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as vision

from scrimp.data import load_images, packed
from scrimp.data import named as named_module
from scrimp.data.named import data_root, named_source
from scrimp.primitives.errors import InputError


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No set of this machine, no network: a test sees only what it makes."""

    def offline(self):
        print("Downloading")  # torchvision prints; nothing of it may reach our standard output
        raise URLError("no route\nto host")

    monkeypatch.setattr(vision.MNIST, "download", offline)
    monkeypatch.setattr(vision.CIFAR10, "download", offline)
    monkeypatch.setattr(named_module, "DEBIAN_FASHION_MNIST", tmp_path / "no-debian")
    monkeypatch.setenv("SCRIMP_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))


def write_mnist(folder, value, *, packer=lambda content: content, ending=""):
    """20 training and 10 test images in IDX files, all filled with ``value``."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images, labels = np.full((count, 28, 28), value, np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
            (folder / f"{prefix}-{kind}-ubyte{ending}").write_bytes(packer(content))


def write_debian(tmp_path, value):
    write_mnist(tmp_path / "no-debian", value, packer=gzip.compress, ending=".gz")


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_folder(tmp_path, name, folder):
    write_mnist(tmp_path / "root" / folder / "raw", 7)
    data = load_images(name)
    assert data.name == name
    assert (len(data.classes), len(data.train), len(data.test)) == (10, 20, 10)
    assert data.train.shape == (1, 28, 28)
    assert data.train.pixels.unique().tolist() == [7]
    assert data.train.labels.tolist() == [*range(10)] * 2
    assert load_images(name, size=14).train.shape == (1, 14, 14)


def test_root_argument_environment_and_default(tmp_path, monkeypatch):
    assert data_root(tmp_path / "x") == tmp_path / "x"
    assert data_root() == tmp_path / "root"
    monkeypatch.delenv("SCRIMP_DATA")
    assert data_root() == tmp_path / "cache" / "data"
    monkeypatch.delenv("SCRIMP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache" / "scrimp" / "data"
    write_mnist(tmp_path / "x" / "MNIST" / "raw", 3)
    assert load_images("mnist", root=tmp_path / "x").train.pixels.unique().tolist() == [3]


def test_debian_package_comes_after_torchvision_folder(tmp_path):
    write_debian(tmp_path, 5)
    data = load_images("fashion-mnist")
    assert data.train.pixels.unique().tolist() == [5]
    assert data.test.labels.tolist() == [*range(10)]
    assert data.classes == tuple(vision.FashionMNIST.classes)
    write_mnist(tmp_path / "root" / "FashionMNIST" / "raw", 7)
    assert load_images("fashion-mnist").train.pixels.unique().tolist() == [7]
    assert "mnist" in message(load_images, "mnist")


def test_damaged_files_are_named(tmp_path):
    write_debian(tmp_path, 5)
    path = tmp_path / "no-debian" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged ones in" in message(load_images, "fashion-mnist")
    write_mnist(tmp_path / "root" / "MNIST" / "raw", 7)
    path = tmp_path / "root" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged ones in" in message(load_images, "mnist")


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_offline_says_what_to_do_in_one_line(tmp_path, name, capsys):
    text = message(load_images, name)
    assert f"expected the data set {name}; got none in {str(tmp_path / 'root')!r}" in text
    assert "no route to host" in text
    assert "SCRIMP_DATA" in text
    assert "pass a folder" in text
    assert ("dataset-fashion-mnist" in text) == (name == "fashion-mnist")
    assert ("cifar10-jpeg.tar.xz" in text) == (name == "cifar10")
    assert capsys.readouterr().out == ""


def test_download_comes_last(tmp_path, monkeypatch):
    def download(self):
        write_mnist(tmp_path / "root" / "MNIST" / "raw", 9)

    monkeypatch.setattr(vision.MNIST, "download", download)
    assert load_images("mnist").train.pixels.unique().tolist() == [9]


@pytest.mark.parametrize(("name", "count"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_torchvision_layout(tmp_path, monkeypatch, name, count):
    kind = vision.CIFAR10 if count == 10 else vision.CIFAR100
    folder = tmp_path / "root" / kind.base_folder
    folder.mkdir(parents=True)
    rows = np.arange(count, dtype=np.uint8)
    flat = np.repeat(rows[:, None], 3072, 1)
    flat[:, :1024] = 200  # the red plane comes first
    content = pickle.dumps({"data": flat, "labels": rows.tolist(), "fine_labels": rows.tolist()})
    for file, _ in kind.train_list + kind.test_list:
        (folder / file).write_bytes(content)
    meta = {key: [f"class {row}" for row in range(count)] for key in ("label_names", "fine_label_names")}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    data = load_images(name)
    assert data.train.shape == (3, 32, 32)
    assert len(data.test) == count
    assert data.classes[-1] == f"class {count - 1}"
    row = 5
    assert data.test.labels[row] == row
    assert data.test.pixels[row].flatten(1).unique(dim=1).flatten().tolist() == [200, row, row]


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def jpeg(value):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(buffer, format="JPEG", quality=100)
    return buffer.getvalue()


def small_set(splits=("train", "test"), classes=("cat", "ant"), count=3):
    for split, (label, name), row in itertools.product(splits, enumerate(classes), range(count)):
        yield f"{split}/{name}/{row}.jpg", jpeg(100 * label + row)


@pytest.fixture
def archive(tmp_path):
    return pack(tmp_path / "root" / "cifar10-jpeg.tar.xz", [*small_set(), ("README", b"text")])


def test_packed_set(archive):
    seen = []
    data = load_images("cifar10", progress=lambda done, total: seen.append((done, total)))
    assert (data.name, data.classes) == ("cifar10-jpeg", ("ant", "cat"))
    assert data.train.shape == (3, 32, 32)
    assert data.train.labels.tolist() == [1] * 3 + [0] * 3
    assert data.train.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert data.test.pixels.equal(data.train.pixels)
    assert seen == [(12, 12)]


def test_packed_set_is_decoded_once(archive, tmp_path, monkeypatch):
    first = load_images("cifar10")
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.suffix == ".safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(packed, "_members", lambda path: pytest.fail("decoded again"))
        again = load_images("cifar10")
    assert again.train.pixels.equal(first.train.pixels)
    assert again.test.labels.equal(first.test.labels)
    assert again.classes == first.classes
    pack(archive, small_set(count=4))
    assert len(load_images("cifar10").train) == 8


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:4], lambda content: b""])
def test_damaged_cache_is_made_again(archive, tmp_path, damage):
    first = load_images("cifar10")
    (cached,) = (tmp_path / "cache").iterdir()
    content = cached.read_bytes()
    cached.write_bytes(damage(content))
    assert load_images("cifar10").train.pixels.equal(first.train.pixels)
    assert cached.read_bytes() == content


def test_cache_that_cannot_be_written_warns(archive, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        data = load_images("cifar10")
    assert len(data.train) == 6


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (list(small_set(splits=("train",))), "only in train: 'ant', 'cat'"),
        ([("README", b"text")], "train/CLASS/"),
        ([*small_set(), ("test/cat/bad.jpg", b"no picture")], "'test/cat/bad.jpg' (no image format recognised)"),
    ],
)
def test_packed_set_that_does_not_fit(tmp_path, members, words):
    pack(tmp_path / "root" / "cifar10-jpeg.tar.xz", members)
    assert words in message(load_images, "cifar10")
    assert not (tmp_path / "cache").exists()


def test_damaged_archive(archive):
    content = archive.read_bytes()
    flipped = bytes([*content[:200], content[200] ^ 1, *content[201:]])
    for damage in (content[: len(content) // 2], content[:40], b"no archive", b"", flipped):
        archive.write_bytes(damage)
        assert "a whole tar archive" in message(load_images, "cifar10")


def test_packed_set_at_another_size(archive):
    assert load_images("cifar10", size=16).train.shape == (3, 16, 16)


def test_real_jpegs_of_cifar10(shared_data, tmp_path):
    """The first images of the real archive, packed anew: the whole of it takes too long for a quick test."""
    source = shared_data / "cifar10-jpeg.tar.xz"
    if not source.is_file():
        pytest.skip(f"no {source}")
    with tarfile.open(source, "r|xz") as stream:
        files = itertools.islice((member for member in stream if member.isfile()), 40)
        contents = [stream.extractfile(member).read() for member in files]
    members = [
        (f"{split}/{name}/{row}.jpg", content)
        for split in ("train", "test")
        for name in "ab"
        for row, content in enumerate(contents)
    ]
    pack(tmp_path / "root" / "cifar10-jpeg.tar.xz", members)
    data = load_images("cifar10")
    with Image.open(io.BytesIO(contents[7])) as picture:
        wanted = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert data.train.pixels[7].equal(wanted)


@pytest.mark.slow
def test_the_whole_of_cifar10(shared_data):
    if not (shared_data / "cifar10-jpeg.tar.xz").is_file():
        pytest.skip(f"no cifar10-jpeg.tar.xz in {shared_data}")
    first, second = (named_source("cifar10", shared_data) for _ in range(2))
    assert first.train.labels.bincount().tolist() == [5000] * 10
    assert first.test.labels.bincount().tolist() == [1000] * 10
    assert first.classes[0] == "airplane"
    assert second.train.pixels.equal(first.train.pixels)
