"""The two kinds of image sets keep one interface, by themselves and through torch's DataLoader."""

import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from scrimp.data import FileImages, TensorImages
from scrimp.data.decode import ImageError
from scrimp.data.images import read_all
from scrimp.primitives.errors import InputError


def whole(batch):
    return batch


def loader_of(images, workers):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(images, batch_size=3, num_workers=workers, collate_fn=whole, generator=generator)


def tensor_images(count=7, channels=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, 5, 6), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.arange(count) % 3)


def file_images(folder, count=7, mode="RGB"):
    images = tensor_images(count)
    paths = []
    for row in range(count):
        paths.append(folder / f"{row}.png")
        Image.fromarray(images.pixels[row].permute(1, 2, 0).numpy()).save(paths[-1])
    return FileImages(paths, images.labels, size=(5, 6), mode=mode)


@pytest.fixture(params=["tensor", "file"])
def images(request, tmp_path):
    return tensor_images() if request.param == "tensor" else file_images(tmp_path)


def test_interface(images):
    pixels = tensor_images().pixels
    assert len(images) == 7
    assert images.shape == (3, 5, 6)
    assert images.labels.dtype == torch.int64
    assert torch.equal(images.batch(torch.tensor([4, 0, 4])), pixels[[4, 0, 4]])
    image, label = images[5]
    assert torch.equal(image, pixels[5])
    assert (type(label), label) == (int, 2)
    assert torch.equal(images[-1][0], pixels[6])
    assert images.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 5, 6)
    with pytest.raises(IndexError):
        images[7]
    assert sum(1 for _ in images) == 7


def test_take(images):
    taken = images.take(torch.tensor([6, 1]))
    assert type(taken) is type(images)
    assert taken.labels.tolist() == [0, 1]
    assert torch.equal(taken.batch(torch.arange(2)), tensor_images().pixels[[6, 1]])
    assert len(images) == 7


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_hands_over_whole_batches(images, workers):
    loader = loader_of(images, workers)
    batches = list(loader)
    assert [len(pixels) for pixels, _, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([pixels for pixels, _, _ in batches]), tensor_images().pixels)
    assert torch.equal(torch.cat([labels for _, labels, _ in batches]), images.labels)
    assert torch.cat([rows for _, _, rows in batches]).tolist() == list(range(7))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_file_is_named_through_the_dataloader(tmp_path, workers):
    images = file_images(tmp_path)
    (tmp_path / "4.png").write_text("no picture")
    loader = loader_of(images, workers)
    with pytest.raises(InputError) as caught:
        list(loader)
    # Breaks the cycle of error and iterator: swept up later, torch would wait ten seconds for its workers.
    traceback.clear_frames(caught.tb)
    assert str(caught.value).startswith(f"expected a readable image; got {str(tmp_path / '4.png')!r} (no image format")
    assert "\n" not in str(caught.value)


def test_host_libraries_are_imported_where_they_are_used():
    code = "import sys, scrimp.data; print({'PIL', 'torchvision', 'datasets', 'safetensors'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_grey_files(tmp_path):
    images = file_images(tmp_path, mode="L")
    assert images.shape == (1, 5, 6)
    wanted = np.array(Image.open(tmp_path / "2.png").convert("L"))
    assert torch.equal(images[2][0], torch.from_numpy(wanted)[None])


def test_square_size(tmp_path):
    images = file_images(tmp_path)
    square = FileImages(images.paths, images.labels, size=4)
    assert square.shape == (3, 4, 4)
    assert square.batch(torch.arange(2)).shape == (2, 3, 4, 4)


def test_read_all_keeps_order_over_chunks_and_reports_progress(tmp_path):
    images = file_images(tmp_path, 7).take(torch.arange(150) % 7)
    seen = []
    pixels, broken = read_all(images, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(pixels, tensor_images().pixels[torch.arange(150) % 7])
    assert broken == []
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_read_all_refuses_or_lists_what_is_broken(tmp_path):
    images = file_images(tmp_path)
    for row in (2, 5):
        (tmp_path / f"{row}.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"2\.png"):
        read_all(images)
    pixels, broken = read_all(images, skip=True)
    assert broken == [2, 5]
    assert torch.equal(pixels[[0, 1, 3, 4, 6]], tensor_images().pixels[[0, 1, 3, 4, 6]])
    assert read_all(images, keep=False, skip=True) == (None, [2, 5])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: TensorImages(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)), "float32"),
        (lambda: TensorImages(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)), "uint8"),
        (lambda: TensorImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)), "int64"),
        (lambda: TensorImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)), "float32"),
        (lambda: FileImages(["a"], torch.zeros(2, dtype=torch.int64), size=4), "int64"),
        (lambda: FileImages(["a"], torch.zeros(1, dtype=torch.int64), size=0), "1 pixel"),
        (lambda: FileImages(["a"], torch.zeros(1, dtype=torch.int64), size=4, mode="CMYK"), "CMYK"),
    ],
)
def test_wrong_input(make, word):
    with pytest.raises(InputError, match=word):
        make()
