"""`load_images` on other libraries' data sets: torch's map-style ones and Hugging Face's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from scrimp.data import TensorImages, load_images
from scrimp.data.foreign import DatasetImages
from scrimp.data.images import Images
from scrimp.primitives.errors import InputError


def pixels(count=12, channels=3, side=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


class Listed(Dataset):
    """Samples from a list; calls those that are callable."""

    def __init__(self, images, labels=None):
        self.images = list(images)
        self.labels = [row % 3 for row in range(len(self.images))] if labels is None else labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        image = self.images[row]
        return image() if callable(image) else image, self.labels[row]


def as_pil(image):
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


KINDS = {
    "pil": as_pil,
    "tensor": lambda image: image,
    "float": lambda image: image.float() / 255,
    "double": lambda image: image.double() / 255,
    "numpy": lambda image: image.permute(1, 2, 0).numpy(),
    "numpy float": lambda image: (image.permute(1, 2, 0).float() / 255).numpy(),
    "numpy channels first": lambda image: image.numpy(),
}


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_comes_through_exactly(kind, channels):
    images = pixels(channels=channels)
    data = load_images((Listed(map(KINDS[kind], images)), Listed(map(KINDS[kind], images[:3]))))
    assert isinstance(data.train, TensorImages)
    assert torch.equal(data.train.pixels, images)
    assert torch.equal(data.test.pixels, images[:3])
    assert data.train.labels.tolist() == [row % 3 for row in range(12)]
    assert data.classes == ("0", "1", "2")
    assert data.name == "Listed"


def test_flat_grey_images():
    images = pixels(channels=1)
    for samples in (images[:, 0], images[:, 0].numpy()):
        assert torch.equal(load_images((Listed(samples), Listed(samples))).train.pixels, images)


def test_sizes_and_colours_are_brought_together():
    images = [as_pil(pixels(1, 1, 8)[0]), as_pil(pixels(1, 3, 20)[0]), pixels(1, 1, 9)[0], pixels(1, 3, 9)[0]] * 2
    data = load_images((Listed(images), Listed(images)), size=10)
    assert data.train.shape == (3, 10, 10)
    assert load_images((Listed(images), Listed(images))).train.shape == (3, 224, 224)


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2)])
def test_kinds_of_labels(label):
    data = load_images((Listed(pixels(3), [0, 1, label]), Listed(pixels(3), [0, 1, label])))
    assert data.train.labels.tolist() == [0, 1, 2]


def test_a_single_set_is_split():
    data = load_images(Listed(pixels(60)), test_fraction=0.1)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    assert len(data.train) == 54


def test_other_containers():
    pairs = [(image, row % 2) for row, image in enumerate(pixels(8))]
    assert len(load_images(pairs, test=pairs).train) == 8
    tensors = TensorDataset(pixels(8), torch.arange(8) % 2)
    assert torch.equal(load_images(tensors, test=tensors).train.pixels, pixels(8))
    ours = TensorImages(pixels(8), torch.arange(8) % 2)
    assert torch.equal(load_images((ours, ours)).train.pixels, pixels(8))


def test_class_names_are_taken_over():
    named = Listed(pixels(6))
    named.classes = ["cat", "dog", "owl"]
    assert load_images((named, named)).classes == ("cat", "dog", "owl")
    assert load_images((Subset(named, [0, 1, 2]), Listed(pixels(3)))).classes == ("cat", "dog", "owl")
    few = Listed(pixels(6))
    few.classes = ["cat", "dog"]
    assert "class numbers up to 1" in message(load_images, (few, few))
    other = Listed(pixels(6))
    other.classes = ["cat", "dog", "emu"]
    assert "only in train: 'owl', only in test: 'emu'" in message(load_images, (named, other))
    turned = Listed(pixels(6))
    turned.classes = ["owl", "dog", "cat"]
    assert "order" in message(load_images, (named, turned))


def test_unnamed_classes_that_disagree():
    train, test = Listed(pixels(4), [0, 1, 1, 0]), Listed(pixels(4), [0, 1, 4, 4])
    assert "only in test: '4'" in message(load_images, (train, test))
    assert load_images((test, train)).classes == ("0", "1", "2", "3", "4")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_large_sets_stay_where_they_are():
    dataset = Listed(map(as_pil, pixels()))
    data = load_images(dataset, cache_bytes=12 * 3 * 36 - 1)
    assert isinstance(data.train, DatasetImages)
    assert isinstance(load_images(dataset, cache_bytes=12 * 3 * 36).train, TensorImages)
    wanted: Images = load_images(dataset).train
    generator = torch.Generator().manual_seed(0)
    for workers in (0, 2):
        loader = DataLoader(data.train, batch_size=4, num_workers=workers, collate_fn=list, generator=generator)
        assert torch.equal(torch.cat([images for images, _, _ in loader]), wanted.pixels)
    assert torch.equal(data.train.labels, wanted.labels)
    assert torch.equal(data.train.take(torch.tensor([3, 1]))[0][0], wanted.pixels[3])


def broken_picture():
    raise OSError("image file is truncated")


@pytest.mark.parametrize("cache_bytes", [2e9, 0])
def test_broken_rows(cache_bytes):
    images = [*pixels(9), broken_picture]
    text = message(load_images, Listed(images), cache_bytes=cache_bytes)
    assert "got 'row 9' (image file is truncated)" in text
    data = load_images(Listed(images), cache_bytes=cache_bytes, on_corrupt="skip")
    assert data.skipped == ("row 9",)
    assert len(data.train) + len(data.test) == 9


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1, "leave normalising out"),
        (torch.full((3, 6, 6), float("nan")), "nan"),
        (torch.full((3, 6, 6), 7), "int64 at row 2"),
        (torch.zeros(4, 6, 6, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(6, dtype=torch.uint8), "shape [6]"),
        (torch.zeros(3, 0, 6, dtype=torch.uint8), "shape [3, 0, 6]"),
        (np.zeros((6, 6), object), "object"),
        (np.full((6, 6), 300, np.uint16), "uint16 at row 2"),
        ("picture.png", "str at row 2"),
    ],
)
@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
def test_other_values_are_refused_by_row(image, words, on_corrupt):
    images = [*pixels(2), image]
    assert words in message(load_images, (Listed(images), Listed(pixels(3))), on_corrupt=on_corrupt)


@pytest.mark.parametrize(
    ("label", "words"), [(-1, "-1 at row 1"), ("cat", "'cat' at row 1"), (1.0, "1.0"), (None, "None")]
)
def test_other_labels_are_refused_by_row(label, words):
    assert words in message(load_images, Listed(pixels(2), [0, label]))


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


def test_what_is_no_map_style_set():
    assert "Endless" in message(load_images, Endless())
    assert "length 0" in message(load_images, Listed([]))
    assert "Tensor at row 0" in message(load_images, pixels(4))
    assert "only 'valid'" in message(load_images, {"valid": Listed(pixels())})


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")


def hub_set(hub, images, labels=None, names=("cat", "dog", "owl"), **columns):
    features = {"id": hub.Value("int64"), "picture": hub.Image(), "kind": hub.ClassLabel(names=list(names))}
    features |= {name: kind for name, (kind, _) in columns.items()}
    content = {
        "id": list(range(len(images))),
        "picture": [{"bytes": image, "path": None} for image in images],
        "kind": [row % 3 for row in range(len(images))] if labels is None else labels,
    } | {name: values for name, (_, values) in columns.items()}
    return hub.Dataset.from_dict(content, features=hub.Features(features))


def encoded(image, **options):
    buffer = io.BytesIO()
    as_pil(image).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def test_hub_set(hub):
    images = pixels()
    dataset = hub_set(hub, [encoded(image) for image in images])
    data = load_images(dataset, test_fraction=0.25)
    assert data.classes == ("cat", "dog", "owl")
    assert isinstance(data.train, TensorImages)
    assert data.test.labels.tolist() == sorted(data.test.labels.tolist()) or len(data.test) == 3
    both = load_images((dataset, dataset))
    assert torch.equal(both.train.pixels, images)
    assert both.train.labels.tolist() == [row % 3 for row in range(12)]
    lazy = load_images((dataset, dataset), cache_bytes=0)
    assert isinstance(lazy.train, DatasetImages)
    assert torch.equal(lazy.train.batch(torch.arange(12)), images)


def test_hub_format_and_orientation(hub):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = pixels(1, 1, 6)[0, :, :4]
    dataset = hub_set(hub, [encoded(image, exif=exif)] * 6).with_format("numpy")
    data = load_images((dataset, dataset))
    assert torch.equal(data.train.pixels[0, 0], image[0].rot90(3))


def test_hub_dict(hub):
    train, held = (hub_set(hub, [encoded(image) for image in pixels(count)]) for count in (12, 6))
    data = load_images(hub.DatasetDict(train=train, validation=held))
    assert (len(data.train), len(data.test)) == (12, 6)
    assert len(load_images(hub.DatasetDict(train=train)).test) == 3
    assert "only 'other'" in message(load_images, hub.DatasetDict(other=train))


def test_hub_columns_must_be_clear(hub):
    images = [encoded(image) for image in pixels(3)]
    more = {"mask": (hub.Image(), [{"bytes": image, "path": None} for image in images])}
    text = message(load_images, hub_set(hub, images, **more))
    assert "2 among" in text
    assert "mask (Image)" in text
    assert "one column of type ClassLabel" in message(load_images, hub_set(hub, images).remove_columns("kind"))
    assert "one column of type Image" in message(load_images, hub_set(hub, images).remove_columns("picture"))


def test_hub_labels_that_disagree_or_are_unknown(hub):
    images = [encoded(image) for image in pixels(3)]
    train = hub_set(hub, images)
    text = message(load_images, (train, hub_set(hub, images, names=("cat", "dog", "emu"))))
    assert "only in test: 'emu'" in text
    assert "-1 at row 1" in message(load_images, (train, hub_set(hub, images, labels=[0, -1, 2])))
    assert "one library" in message(load_images, (train, Listed(pixels())))


@pytest.mark.parametrize("bad", [b"no picture", b""])
def test_hub_broken_rows(hub, bad):
    images = [encoded(image) for image in pixels(9)]
    dataset = hub_set(hub, [*images[:4], bad, *images[4:]], labels=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    assert "got 'row 4'" in message(load_images, dataset)
    data = load_images(dataset, on_corrupt="skip")
    assert data.skipped == ("row 4",)
    assert len(data.train) + len(data.test) == 9
    assert "row 4" in message(lambda: [load_images(dataset, cache_bytes=0).train.batch(torch.arange(7))])
