"""Folders of images that nobody sorted."""

import pytest
import torch
from PIL import Image

from scrimp.data import FileImages, TensorImages, load_images
from scrimp.primitives.errors import InputError


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (value, 10, 20)).save(path)


def reds(images):
    return sorted(images.batch(torch.arange(len(images)))[:, 0, 0, 0].tolist())


def message(*arguments, **options):
    with pytest.raises(InputError) as caught:
        load_images(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flat_folder(tmp_path):
    for value in range(20):
        save(tmp_path / f"{value}.png", value)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "odd.png").mkdir()
    data = load_images(tmp_path, unlabelled=True)
    assert data.classes == ("unlabelled",)
    assert data.name == tmp_path.name
    assert (len(data.train), len(data.test)) == (18, 2)
    assert set(data.train.labels.tolist()) | set(data.test.labels.tolist()) == {0}
    assert sorted(reds(data.train) + reds(data.test)) == list(range(20))
    assert isinstance(data.train, TensorImages)
    again, other = (load_images(tmp_path, unlabelled=True, seed=seed) for seed in (0, 5))
    assert reds(again.test) == reds(data.test)
    assert reds(other.test) != reds(data.test)


def test_any_depth_and_nothing_hidden(tmp_path):
    for value, place in enumerate(
        ["a.png", "b/0.png", "b/c/d/1.png", "train/2.png", "val/3.png", ".no/4.png", "._5.png"]
    ):
        save(tmp_path / place, value)
    save(tmp_path / "train" / "deep" / "6.png", 6)
    data = load_images(tmp_path / "b", unlabelled=True, test_fraction=0.5)
    assert reds(data.train) + reds(data.test) in ([1, 2], [2, 1])
    (tmp_path / "val").rename(tmp_path / "more")
    data = load_images(tmp_path, unlabelled=True, cache_bytes=0)
    assert isinstance(data.train, FileImages)
    assert list(data.train.paths) == sorted(data.train.paths)
    assert sorted(reds(data.train) + reds(data.test)) == [0, 1, 2, 3, 4, 6]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    for value, place in enumerate(
        ["train/cat/0.png", "train/1.png", "test/2.png", "val/3.png", "extra/4.png", "5.png"]
    ):
        save(tmp_path / place, value)
    data = load_images(tmp_path, unlabelled=True)
    assert (reds(data.train), reds(data.test)) == ([0, 1, 4, 5], [2])
    data = load_images(tmp_path, test=tmp_path / "val", unlabelled=True)
    assert (reds(data.train), reds(data.test)) == ([0, 1, 4, 5], [3])
    data = load_images((tmp_path / "train", tmp_path / "extra"), unlabelled=True)
    assert (reds(data.train), reds(data.test)) == ([0, 1], [4])
    (tmp_path / "train").rename(tmp_path / "first")
    data = load_images(tmp_path, unlabelled=True)  # no split without a train folder
    assert sorted(reds(data.train) + reds(data.test)) == list(range(6))


def test_class_folders_keep_their_labels_unless_asked(tmp_path):
    for name in ("a", "b"):
        for value in range(4):
            save(tmp_path / name / f"{value}.png", value)
    data = load_images(tmp_path)
    assert data.classes == ("a", "b")
    assert data.train.labels.bincount().tolist() == [3, 3]
    data = load_images(tmp_path, unlabelled=True, test_fraction=0.25)
    assert data.classes == ("unlabelled",)
    assert (len(data.train), len(data.test)) == (6, 2)


def test_damaged_files(tmp_path):
    for value in range(6):
        save(tmp_path / f"{value}.png", value)
    (tmp_path / "bad.png").write_text("no picture")
    assert "bad.png" in message(tmp_path, unlabelled=True)
    data = load_images(tmp_path, unlabelled=True, on_corrupt="skip")
    assert data.skipped == (str(tmp_path / "bad.png"),)
    assert len(data.train) + len(data.test) == 6


def test_the_way_is_shown_where_labels_lack(tmp_path):
    save(tmp_path / "one" / "0.png")
    save(tmp_path / "1.png")
    assert "scrimp pretrain --unlabelled" in message(tmp_path / "one")
    assert "1 images directly" in message(tmp_path / "one")
    assert "scrimp pretrain --unlabelled" in message(tmp_path)


def test_what_is_no_folder_of_images(tmp_path):
    assert "none below" in message(tmp_path, unlabelled=True)
    assert "a folder of images" in message(tmp_path / "absent", unlabelled=True)
    save(tmp_path / "train" / "0.png")
    assert "to test on" in message(tmp_path, unlabelled=True)  # a single one
    (tmp_path / "test").mkdir()
    assert "test" in message(tmp_path, unlabelled=True)
    save(tmp_path / "test" / "0.png")
    (tmp_path / "train" / "0.png").unlink()
    assert "besides those in 'test'" in message(tmp_path, unlabelled=True)
    save(tmp_path / "train" / "0.png")
    data = load_images(tmp_path, unlabelled=True)
    for other, word in [(None, "None"), ("cifar10", "cifar10"), (data, "ImageData"), ([1], "list")]:
        assert word in message(other, unlabelled=True)
    assert "TensorImages" in message(tmp_path, test=data.test, unlabelled=True)
    assert "did you mean" in message("cifar-10", unlabelled=True)
