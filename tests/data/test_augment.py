"""Whole-batch augmentation against a loop over images; the same draws for one process and for several."""

import numpy as np
import pytest
import torch

from scrimp.data import crop_flip, normalise
from scrimp.primitives.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(9))


def reference(images, padding, flip, mode, generator):
    """Pad, cut and mirror one image after another, with numpy."""
    corners = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=generator)
    mirrored = torch.randint(0, 2, (len(images),), generator=generator)
    height, width = images.shape[2:]
    out = []
    for image, (down, right), mirror in zip(images.numpy(), corners.tolist(), mirrored.tolist(), strict=True):
        frame = [(0, 0), (padding, padding), (padding, padding)]
        padded = np.pad(image, frame, mode="constant" if mode == "zero" else "reflect")
        window = padded[:, down : down + height, right : right + width]
        out.append(window[:, :, ::-1] if flip and mirror else window)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize(
    ("shape", "padding"), [((33, 3, 8, 8), 3), ((5, 1, 7, 4), 2), ((9, 2, 5, 11), 4), ((3, 3, 6, 6), 0)]
)
@pytest.mark.parametrize("flip", [True, False])
def test_equals_the_loop(shape, padding, flip, mode):
    images = noise(*shape)
    before = images.clone()
    out = crop_flip(images, padding=padding, flip=flip, generator=seeded(), mode=mode)
    assert out.dtype == torch.uint8
    assert torch.equal(out, reference(images, padding, flip, mode, seeded()))
    assert torch.equal(images, before)
    assert out.data_ptr() != images.data_ptr()


def test_floats_and_channels_last():
    images = noise(6, 3, 9, 5)
    wanted = crop_flip(images, padding=2, flip=True, generator=seeded())
    assert torch.equal(crop_flip(images.float(), padding=2, flip=True, generator=seeded()), wanted.float())
    turned = images.to(memory_format=torch.channels_last)
    assert torch.equal(crop_flip(turned, padding=2, flip=True, generator=seeded()), wanted)


def test_one_pixel_and_no_image():
    images = noise(4, 3, 1, 1)
    out = crop_flip(images, padding=1, flip=True, generator=seeded())
    assert torch.equal(out, reference(images, 1, True, "zero", seeded()))
    none = crop_flip(images[:0], padding=1, flip=True, generator=seeded(), rows=slice(4, 4), total=4)
    assert none.shape == (0, 3, 1, 1)


@pytest.mark.parametrize("parts", [[slice(0, 6), slice(6, 11)], [slice(0, None, 2), slice(1, None, 2)]])
def test_processes_together_do_what_one_does(parts):
    images = noise(11, 3, 8, 8)
    wanted = crop_flip(images, padding=2, flip=True, generator=seeded())
    for rows in parts:
        generator = seeded()
        out = crop_flip(images[rows], padding=2, flip=True, generator=generator, rows=rows, total=11)
        assert torch.equal(out, wanted[rows])


def test_draws_do_not_depend_on_what_is_switched_on():
    states = []
    for padding, flip in [(0, False), (4, False), (0, True), (4, True)]:
        generator = seeded()
        crop_flip(noise(5, 1, 8, 8), padding=padding, flip=flip, generator=generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert not torch.equal(states[0], seeded().get_state())


def test_every_shift_and_both_sides_occur():
    images = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 1] = 1
    places = crop_flip(images, padding=1, flip=True, generator=seeded()).view(2000, 25).float().argmax(1)
    assert {(place // 5, place % 5) for place in places.tolist()} == {
        (y, x) for y in (1, 2, 3) for x in (0, 1, 2, 2, 3, 4)
    }


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    crop_flip(noise(5, 1, 8, 8), padding=2, flip=True, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"padding": -1}, "-1"),
        ({"padding": 8, "mode": "reflect"}, "at most 7"),
        ({"mode": "wrap"}, "wrap"),
        ({"rows": slice(0, 3)}, "4 and 3"),
        ({"total": 9}, "4 and 9"),
        ({"images": torch.zeros(3, 8, 8)}, "shape"),
    ],
)
def test_wrong_input(changes, word):
    arguments = {"images": noise(4, 3, 8, 8), "padding": 1, "flip": True, "generator": seeded()} | changes
    with pytest.raises(InputError, match=word):
        crop_flip(arguments.pop("images"), **arguments)


def test_normalise():
    images = noise(4, 3, 6, 5)
    before = images.clone()
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 1.0)
    out = normalise(images, mean, std)
    wanted = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-6)
    assert torch.equal(images, before)
    turned = normalise(images.to(memory_format=torch.channels_last), mean, std)
    assert turned.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("images", "mean"), [(torch.zeros(2, 3, 4, 4), (0, 0, 0)), (noise(2, 3, 4, 4), (0,))])
def test_normalise_wrong_input(images, mean):
    with pytest.raises(InputError):
        normalise(images, mean, (1, 1, 1))
