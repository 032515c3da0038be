"""`load_images` on folders: layouts, splits, what is refused and with which words, damaged files."""

import traceback
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from scrimp.data import FileImages, ImageData, TensorImages, load_images
from scrimp.data.decode import ImageError
from scrimp.data.folders import folder_source
from scrimp.primitives.errors import InputError


def save(path, value=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


def fill(folder, classes, count=3, **options):
    """Image number i of a class is filled with i."""
    for name in classes:
        for value in range(count):
            save(folder / name / f"{value}.png", value, **options)


def reds(images):
    return sorted(images.batch(torch.arange(len(images)))[:, 0, 0, 0].tolist())


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("held", ["test", "val", "validation", "valid"])
def test_train_and_test_folders(tmp_path, held):
    fill(tmp_path / "train", ["cat", "ant"], 4)
    fill(tmp_path / held, ["cat", "ant"], 2)
    (tmp_path / "notes").mkdir()
    data = load_images(tmp_path)
    assert isinstance(data, ImageData)
    assert data.classes == ("ant", "cat")
    assert data.name == tmp_path.name
    assert (len(data.train), len(data.test)) == (8, 4)
    assert isinstance(data.train, TensorImages)
    assert data.train.shape == (3, 8, 8)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert reds(data.train) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.skipped == ()


def test_test_comes_before_validation(tmp_path):
    for name, count in (("train", 2), ("val", 3), ("test", 4)):
        fill(tmp_path / name, ["a", "b"], count)
    assert len(load_images(tmp_path).test) == 8


def test_class_folders_are_split_by_class_and_seed(tmp_path):
    fill(tmp_path, ["a", "b"], 20)
    fill(tmp_path, ["few"], 2)
    data = load_images(tmp_path, test_fraction=0.2)
    assert data.test.labels.bincount().tolist() == [4, 4, 1]
    assert data.train.labels.bincount().tolist() == [16, 16, 1]
    assert reds(data.train) != sorted([*range(16), *range(16), 0])
    assert sorted(reds(data.train) + reds(data.test)) == sorted([*range(20), *range(20), 0, 1])
    again, other = (load_images(tmp_path, test_fraction=0.2, seed=seed) for seed in (0, 1))
    assert torch.equal(again.test.pixels, data.test.pixels)
    assert not torch.equal(other.test.pixels, data.test.pixels)


def test_train_folder_alone_is_split(tmp_path):
    fill(tmp_path / "train", ["a", "b"], 10)
    data = load_images(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (18, 2, ("a", "b"))


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ["bus", "car", "train"])
    assert load_images(tmp_path).classes == ("bus", "car", "train")


def test_separate_test_folder_and_pair(tmp_path):
    fill(tmp_path / "one" / "train", ["a", "b"], 5)
    fill(tmp_path / "two", ["a", "b"], 2)
    for data in (
        load_images(tmp_path / "one", test=tmp_path / "two"),
        load_images((tmp_path / "one", str(tmp_path / "two"))),
    ):
        assert (len(data.train), len(data.test)) == (10, 4)
    assert "TensorImages" in message(load_images, tmp_path / "two", test=data.test)


def test_names_of_files_and_classes(tmp_path):
    fill(tmp_path / "train", ["Bäume", "木"], 2)
    fill(tmp_path / "test", [unicodedata.normalize("NFD", "Bäume"), "木"], 1)
    save(tmp_path / "train" / "木" / "deeper" / "x.png", 7)
    save(tmp_path / "train" / "木" / "tmp.jpg", 8)
    (tmp_path / "train" / "木" / "tmp.jpg").rename(tmp_path / "train" / "木" / "SHOUT.JPG")
    for name in (".DS_Store", "notes.txt", "._0.png", ".hidden/0.png", "deeper/.DS_Store"):
        path = tmp_path / "train" / "木" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no picture")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "__MACOSX").mkdir()
    (tmp_path / "train" / "README.md").write_text("text")
    data = load_images(tmp_path)
    assert data.classes == (unicodedata.normalize("NFC", "Bäume"), "木")
    assert data.train.labels.bincount().tolist() == [2, 4]
    assert reds(data.train)[:5] == [0, 0, 1, 1, 7]


def test_size_and_colour(tmp_path):
    fill(tmp_path / "grey", ["a", "b"], mode="L", size=(12, 9))
    assert load_images(tmp_path / "grey").train.shape == (1, 9, 12)
    assert load_images(tmp_path / "grey", size=4).train.shape == (1, 4, 4)
    assert load_images(tmp_path / "grey", size=(4, 6)).train.shape == (1, 4, 6)
    fill(tmp_path / "mixed", ["a", "b"], mode="L")
    save(tmp_path / "mixed" / "b" / "c.png", 200, size=(9, 9))
    data = load_images(tmp_path / "mixed")
    assert data.train.shape == (3, 224, 224)
    fill(tmp_path / "large", ["a", "b"], size=(65, 65))
    assert load_images(tmp_path / "large").train.shape == (3, 224, 224)
    assert "0" in message(load_images, tmp_path / "grey", size=0)


def test_odd_pictures_side_by_side(tmp_path):
    fill(tmp_path, ["a", "b"], 2)
    save(tmp_path / "a" / "one.png", 50, size=(1, 1))
    Image.fromarray(np.full((6, 6), 1000, np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("CMYK", (6, 6)).save(tmp_path / "b" / "print.jpg")
    palette = Image.new("P", (6, 6))
    palette.putpalette([1, 2, 3])
    palette.save(tmp_path / "b" / "palette.png", transparency=0)
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "b" / "moving.gif", save_all=True, append_images=frames[1:])
    data = load_images(tmp_path, size=16)
    assert len(data.train) + len(data.test) == 9
    assert data.train.shape == (3, 16, 16)


def test_mean_and_std(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / split / name / "0.png", 0)
            save(tmp_path / split / name / "1.png", 255)
    data = load_images(tmp_path)
    assert data.mean == (0.5, round(10 / 255, 4), round(20 / 255, 4))
    assert data.std == (0.5, 1.0, 1.0)  # a channel that never varies is left as it is
    assert load_images(tmp_path, cache_bytes=0).mean == data.mean


def test_large_sets_stay_files(tmp_path):
    fill(tmp_path, ["a", "b"], 10)
    cached, files = load_images(tmp_path), load_images(tmp_path, cache_bytes=20 * 3 * 64 - 1)
    assert isinstance(load_images(tmp_path, cache_bytes=20 * 3 * 64).train, TensorImages)
    assert isinstance(files.train, FileImages)
    assert isinstance(files.test, FileImages)
    rows = torch.arange(len(cached.train))
    assert torch.equal(files.train.batch(rows), cached.train.pixels)
    assert torch.equal(files.train.labels, cached.train.labels)


def test_progress(tmp_path):
    fill(tmp_path / "train", ["a", "b"], 4)
    fill(tmp_path / "test", ["a", "b"], 2)
    seen = []
    load_images(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 8), (4, 4)]


def test_what_is_no_data(tmp_path):
    assert "does not exist" in message(load_images, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "the file" in message(load_images, tmp_path / "file")
    assert "fashion-mnist" in message(load_images, "fashion-mnst")
    assert "did you mean 'cifar10'" in message(load_images, "cifar-10")
    assert "on_corrupt" in message(load_images, tmp_path, on_corrupt="ignore")
    assert "map-style" in message(load_images, 7)


def test_no_images(tmp_path):
    assert "no image below" in message(load_images, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    assert ".jpg" in message(load_images, tmp_path)


def test_images_without_class_folders(tmp_path):
    save(tmp_path / "0.png")
    save(tmp_path / "1.png")
    assert f"2 images directly in {str(tmp_path)!r}" in message(load_images, tmp_path)
    for split in ("train", "test"):
        save(tmp_path / "split" / split / "0.png")
    assert "1 images directly" in message(load_images, tmp_path / "split")


def test_test_folder_without_train(tmp_path):
    fill(tmp_path / "test", ["a", "b"])
    fill(tmp_path / "val", ["a", "b"])
    assert "'train'" in message(load_images, tmp_path)


def test_empty_class_folder_is_named(tmp_path):
    fill(tmp_path, ["a", "b"])
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / ".DS_Store").write_text("")
    assert "none in 'hollow'" in message(load_images, tmp_path)
    fill(tmp_path / "split" / "train", ["a", "b"])
    fill(tmp_path / "split" / "test", ["a"])
    (tmp_path / "split" / "test" / "b").mkdir()
    assert f"none in 'b' of {str(tmp_path / 'split' / 'test')!r}" in message(load_images, tmp_path / "split")


def test_single_class_folder(tmp_path):
    fill(tmp_path / "unpacked", ["a", "b"])
    assert "only 'unpacked'" in message(load_images, tmp_path)


def test_classes_that_disagree_are_named(tmp_path):
    fill(tmp_path / "train", ["a", "b", "c"])
    fill(tmp_path / "test", ["a", "d"])
    assert "only in train: 'b', 'c', only in test: 'd'" in message(load_images, tmp_path)


def spoil(path, kind):
    if kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_text({"empty": "", "text": "no picture"}[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
@pytest.mark.parametrize("cache_bytes", [2e9, 0])
@pytest.mark.parametrize("split", [True, False])
def test_corrupt_image_is_refused_or_skipped(tmp_path, kind, cache_bytes, split):
    fill(tmp_path / "train", ["a", "b"], 5)
    if split:
        fill(tmp_path / "test", ["a", "b"], 5)
    bad = tmp_path / "train" / "b" / "3.png"
    spoil(bad, kind)

    def draw_all():
        data = load_images(tmp_path, cache_bytes=cache_bytes)
        return reds(data.train) + reds(data.test)

    text = message(draw_all)
    assert f"{str(bad)!r}" in text
    assert "on_corrupt='skip'" in text
    data = load_images(tmp_path, cache_bytes=cache_bytes, on_corrupt="skip")
    assert data.skipped == (str(bad),)
    assert len(data.train) + (0 if split else len(data.test)) == 9
    assert sorted(reds(data.train) + ([] if split else reds(data.test))) == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert data.train.labels.bincount().tolist() == ([5, 4] if split else [4, 3])


def test_skipping_leaves_small_classes_something_to_be_tested_on(tmp_path):
    fill(tmp_path, ["a", "b"], 3)
    for seed in range(3):
        held = load_images(tmp_path, seed=seed).test.pixels[0, 0, 0, 0].item()
        path = tmp_path / "a" / f"{held}.png"
        content = path.read_bytes()
        path.write_bytes(b"")
        data = load_images(tmp_path, seed=seed, on_corrupt="skip")
        path.write_bytes(content)
        assert data.test.labels.bincount().tolist() == [1, 1]
        assert data.train.labels.bincount().tolist() == [1, 2]


def test_skipping_a_whole_class_is_refused(tmp_path):
    fill(tmp_path, ["a", "b"], 2)
    for value in range(2):
        (tmp_path / "a" / f"{value}.png").write_bytes(b"")
    assert "none in 'a'" in message(load_images, tmp_path, on_corrupt="skip")
    for value in range(2):
        (tmp_path / "b" / f"{value}.png").write_bytes(b"")
    assert "4 were skipped" in message(load_images, tmp_path, on_corrupt="skip")


def test_nothing_to_test_on(tmp_path):
    fill(tmp_path, ["a", "b"], 1)
    assert "images to test on" in message(load_images, tmp_path)
    fill(tmp_path, ["a", "b"], 2)
    assert "between 0 and 1" in message(load_images, tmp_path, test_fraction=0.0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_corrupt_image_comes_through_loader_workers(tmp_path):
    fill(tmp_path / "train", ["a", "b"], 1200)
    fill(tmp_path / "test", ["a", "b"], 1)
    # One of the images that the statistics, taken from a spread sample, do not touch.
    bad = folder_source(tmp_path).train.paths[1]
    spoil(Path(bad), "truncated")
    data = load_images(tmp_path, cache_bytes=0)
    loader = DataLoader(
        data.train, batch_size=4, num_workers=2, collate_fn=list, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ImageError) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # lets torch's workers go at once
    assert caught.value.got.startswith(f"{bad!r} (image file is truncated")


def test_nothing_random_is_touched(tmp_path):
    fill(tmp_path, ["a", "b"], 4)
    before = torch.get_rng_state()
    load_images(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_image_data_is_given_back(tmp_path):
    fill(tmp_path, ["a", "b"], 4)
    data = load_images(tmp_path)
    assert load_images(data) is data
