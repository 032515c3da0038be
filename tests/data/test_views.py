"""Views of whole batches against torchvision, image by image; the same draws for one process and for several."""

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from scrimp.data import (
    STRONG,
    WEAK,
    View,
    crop_resize,
    draw_crops,
    per_image,
    standardise,
    strong_for,
    two_views,
    view_of,
    views,
)
from scrimp.data.view_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_jitter,
    gaussian_blur,
    kernel_size,
    luminance,
    to_grey,
)
from scrimp.primitives.errors import InputError

STEPS = [
    (adjust_brightness, tv.adjust_brightness),
    (adjust_contrast, tv.adjust_contrast),
    (adjust_saturation, tv.adjust_saturation),
    (adjust_hue, tv.adjust_hue),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(9))


def floats(*shape):
    """With black, white, grey and primary pixels among the noise: where hues are ambiguous."""
    images = torch.rand(shape, generator=seeded(8))
    corner = torch.tensor([[0, 1, 0.5, 1, 0, 0, 1], [0, 1, 0.5, 0, 1, 0, 1], [0, 1, 0.5, 0, 0, 1, 0]])
    images[:, :, 0, :7] = corner[: shape[1]]
    return images


def close(actual, wanted, atol=2e-6):
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


def cropped(image, crop, size, antialias):
    top, left, height, width, mirrored = (int(value) for value in crop)
    out = tv.resized_crop(image[None], top, left, height, width, list(size), antialias=antialias)[0]
    return out.flip(2) if mirrored else out


# Crops


@pytest.mark.parametrize(
    ("shape", "size"),
    [((40, 3, 32, 32), (32, 32)), ((20, 1, 7, 12), (9, 9)), ((20, 2, 40, 23), (11, 30)), ((5, 3, 1, 1), (4, 4))],
)
def test_crops_equal_torchvision(shape, size):
    images = noise(*shape)
    crops = draw_crops(len(images), View(scale=(0.05, 1)), height=shape[2], width=shape[3], generator=seeded())
    before = images.clone(), crops.clone()
    out = crop_resize(images, crops, size=size)
    wanted = [cropped(image / 255, crop, size, True) for image, crop in zip(images, crops, strict=True)]
    close(out, torch.stack(wanted), atol=1e-5)
    assert out.dtype == torch.float32
    assert torch.equal(images, before[0])
    assert torch.equal(crops, before[1])
    close(crop_resize(images / 255, crops, size=size), out)
    assert crop_resize(images.double() / 255, crops, size=size).dtype == torch.float64


def test_enlarged_crops_are_plain_bilinear():
    images = noise(30, 3, 20, 14)
    crops = draw_crops(30, WEAK, height=20, width=14, generator=seeded())
    wanted = [cropped(image / 255, crop, (20, 20), False) for image, crop in zip(images, crops, strict=True)]
    close(crop_resize(images, crops, size=20), torch.stack(wanted), atol=1e-5)


def test_whole_crop_is_the_image_and_its_mirror():
    images = noise(2, 3, 5, 5)
    out = crop_resize(images, torch.tensor([[0, 0, 5, 5, 0.0], [0, 0, 5, 5, 1]]), size=5)
    close(out * 255, torch.stack([images[0], images[1].flip(2)]).float(), atol=1e-4)


def test_crops_keep_their_precision_under_autocast():
    images, crops = noise(4, 3, 8, 8), draw_crops(4, WEAK, height=8, width=8, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = crop_resize(images, crops, size=8)
        strong = view_of(images, STRONG, generator=seeded())
    assert torch.equal(out, crop_resize(images, crops, size=8))
    assert torch.equal(strong, view_of(images, STRONG, generator=seeded()))


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (40, 24, (0.6, 1.0)), (9, 30, (0.05, 1))])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    view, count = View(scale=scale), 3000
    ours = draw_crops(count, view, height=height, width=width, generator=seeded()).double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image, make = torch.zeros(1, height, width), v2.RandomResizedCrop(8, scale=scale, ratio=view.ratio)
        drawn = [make.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[each[name] for name in ("top", "left", "height", "width")] for each in drawn]).double()
    for crops in (ours, theirs):
        assert bool((crops[:, :2] >= 0).all())
        assert bool((crops[:, 0] + crops[:, 2] <= height).all())
        assert bool((crops[:, 1] + crops[:, 3] <= width).all())
    assert torch.equal(ours, ours.round())
    measures = [lambda c: c[:, 2] * c[:, 3], lambda c: (c[:, 3] / c[:, 2]).log(), lambda c: c[:, 0], lambda c: c[:, 1]]
    for measure in measures:
        first, second = measure(ours), measure(theirs)
        spread = max(first.std().item(), second.std().item())
        assert abs(first.mean() - second.mean()) < 4.5 * spread * (2 / count) ** 0.5
        # Kolmogorov and Smirnov's distance; 2.0 sqrt(2 / n) is passed by chance once in three thousand.
        points = torch.cat([first, second]).unique()
        below = [torch.searchsorted(part.sort().values, points, right=True) / count for part in (first, second)]
        assert (below[0] - below[1]).abs().max() < 2.0 * (2 / count) ** 0.5
    assert abs(ours[:, 4].mean() - 0.5) < 0.04


@pytest.mark.parametrize(("height", "width"), [(4, 90), (90, 4), (1, 50), (30, 40)])
def test_no_proposal_fits(height, width):
    """As large as the image and in another ratio: never inside, so the centre is taken."""
    scale, ratio = (1.0, 1.0), (0.9, 1.1) if height != 30 else (0.5, 0.6)
    out = draw_crops(3, View(scale=scale, ratio=ratio, flip=0), height=height, width=width, generator=seeded())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
        wanted = make.make_params([torch.zeros(1, height, width)])
    assert out.tolist() == [[*(float(wanted[name]) for name in ("top", "left", "height", "width")), 0.0]] * 3


def test_every_place_of_a_crop_occurs():
    crops = draw_crops(2000, View(scale=(0.25, 0.25), ratio=(1, 1)), height=8, width=8, generator=seeded())
    assert set(crops[:, 2:4].flatten().tolist()) == {4.0}
    assert crops[:, 0].long().bincount().tolist() == pytest.approx([400] * 5, abs=90)
    assert crops[:, 1].long().bincount().tolist() == pytest.approx([400] * 5, abs=90)
    assert set(draw_crops(9, View(flip=1), height=8, width=8, generator=seeded())[:, 4].tolist()) == {1.0}
    assert draw_crops(0, WEAK, height=8, width=8, generator=seeded()).shape == (0, 5)


# Colour and blur


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), STEPS, ids=lambda step: step.__module__.split(".")[0])
def test_colours_equal_torchvision(ours, theirs, channels):
    images = floats(7, channels, 9, 11)
    before = images.clone()
    amounts = [0.0, 1.0, 0.3, 0.6, 1.4, 2.0, 1.7] if ours is not adjust_hue else [0, 0.5, -0.5, 0.1, -0.07, 0.3, 1 / 3]
    wanted = torch.stack([theirs(image, amount) for image, amount in zip(images, amounts, strict=True)])
    out = ours(images, torch.tensor(amounts))
    close(out, wanted)
    assert torch.equal(images, before)
    assert out.data_ptr() != images.data_ptr()
    if channels == 1 and ours in (adjust_saturation, adjust_hue):
        assert torch.equal(out, images)
    else:
        assert not torch.equal(out, images)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_a_chain(order, channels):
    images = floats(5, channels, 8, 8)
    strengths = torch.rand(5, 4, generator=seeded()) * torch.tensor([1, 1, 1, 0.4]) + torch.tensor(
        [0.5, 0.5, 0.5, -0.2]
    )
    wanted = []
    for image, strength in zip(images, strengths.tolist(), strict=True):
        for step in order:
            image = STEPS[step][1](image, strength[step])
        wanted.append(image)
    close(colour_jitter(images, strengths, order), torch.stack(wanted), atol=1e-5)


def test_grey():
    images = floats(4, 3, 6, 7)
    close(to_grey(images), tv.rgb_to_grayscale(images, num_output_channels=3))
    close(luminance(images), tv.rgb_to_grayscale(images))
    assert torch.equal(to_grey(images[:, :1]), images[:, :1])


@pytest.mark.parametrize(("height", "width", "kernel"), [(32, 32, 3), (9, 12, 7), (23, 5, 9), (2, 4, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_equals_torchvision(channels, height, width, kernel):
    images = torch.rand(5, channels, height, width, generator=seeded())
    before = images.clone()
    sigmas = [0.1, 0.5, 1.0, 2.0, 7.5]
    wanted = [tv.gaussian_blur(image, [kernel] * 2, [sigma] * 2) for image, sigma in zip(images, sigmas, strict=True)]
    close(gaussian_blur(images, torch.tensor(sigmas), kernel=kernel), torch.stack(wanted))
    assert torch.equal(images, before)


def test_blur_of_too_few_pixels():
    images = torch.rand(2, 3, 1, 6, generator=seeded())
    out = gaussian_blur(images, torch.tensor([1.0, 2.0]), kernel=5)
    row = torch.nn.functional.pad(images, (2, 2, 0, 0), mode="reflect")
    weights = torch.exp(-(torch.arange(-2, 3.0) ** 2) / torch.tensor([[2.0], [8.0]]))
    weights /= weights.sum(1, keepdim=True)
    wanted = sum(row[..., place : place + 6] * weights[:, place].view(2, 1, 1, 1) for place in range(5))
    close(out, wanted)
    one = torch.rand(2, 1, 1, 1, generator=seeded())
    assert torch.equal(gaussian_blur(one, torch.ones(2), kernel=3), one)


def test_kernel_size():
    assert [kernel_size(side) for side in (1, 28, 32, 64, 96, 224)] == [3, 3, 3, 7, 9, 23]


# Whole views

LOUD = View(jitter=(0.4, 0.9, 1.5, 0.2), grey=0.3, blur=(0.1, 2.0), size=10)


def reference(images, view, generator):
    """One image after another through torchvision's functions, with the numbers drawn alike."""
    count, _, height, width = images.shape
    crops = draw_crops(count, view, height=height, width=width, generator=generator)
    chances = torch.rand(count, 8, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    low, high = view.blur
    out = []
    for image, crop, chance in zip(images, crops, chances, strict=True):
        made = cropped(image / 255, crop, (view.size, view.size), True)
        for step in order if chance[4] < view.jitter_p else ():
            strength = view.jitter[step]
            least = max(0, 1 - strength) if step < 3 else -strength
            most = 1 + strength if step < 3 else strength
            made = STEPS[step][1](made, least + chance[step] * (most - least))
        if chance[5] < view.grey:
            made = tv.rgb_to_grayscale(made, num_output_channels=len(made))
        if chance[6] < view.blur_p:
            made = tv.gaussian_blur(made, [3, 3], [low + chance[7] * (high - low)] * 2)
        out.append(made)
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(60, 3, 12, 12), (25, 1, 9, 16), (1, 3, 5, 5)])
def test_views_equal_the_loop(shape):
    images = noise(*shape)
    before = images.clone()
    out = view_of(images, LOUD, generator=seeded())
    close(out, reference(images, LOUD, seeded()), atol=2e-5)
    close(view_of(images.to(memory_format=torch.channels_last), LOUD, generator=seeded()), out)
    assert out.dtype == torch.float32
    assert torch.equal(images, before)
    assert not torch.equal(out, view_of(images, LOUD, generator=seeded(1)))


def test_size_out():
    assert view_of(noise(2, 3, 9, 14), WEAK, generator=seeded()).shape == (2, 3, 9, 14)
    assert view_of(noise(2, 3, 9, 14), View(size=6), generator=seeded()).shape == (2, 3, 6, 6)
    assert view_of(noise(0, 3, 9, 9), STRONG, generator=seeded()).shape == (0, 3, 9, 9)


def test_shares_of_images_changed():
    images = noise(1, 3, 4, 4).expand(2000, 3, 4, 4)
    still = View(scale=(1, 1), ratio=(1, 1), flip=0)
    plain = view_of(images, still, generator=seeded())
    for change, share in [
        ({"jitter": (0.4, 0.4, 0.4, 0.1)}, 0.8),
        ({"jitter": (0, 0.5, 0, 0), "jitter_p": 0.1}, 0.1),
        ({"grey": 0.2}, 0.2),
        ({"blur": (1.0, 2.0)}, 0.5),
        ({"flip": 0.3}, 0.3),
    ]:
        out = view_of(images, View(**{"scale": (1, 1), "ratio": (1, 1), "flip": 0} | change), generator=seeded())
        changed = (out - plain).abs().amax((1, 2, 3)) > 1e-4
        assert abs(changed.float().mean().item() - share) < 0.05


@pytest.mark.parametrize("parts", [[slice(0, 6), slice(6, 11)], [slice(0, None, 2), slice(1, None, 2)]])
def test_processes_together_do_what_one_does(parts):
    images = noise(11, 3, 12, 12)
    wanted = view_of(images, LOUD, generator=seeded())
    states = []
    for rows in parts:
        generator = seeded()
        out = view_of(images[rows], LOUD, generator=generator, rows=rows, total=11)
        close(out, wanted[rows])
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_draws_do_not_depend_on_what_is_switched_on():
    states = []
    for view in (WEAK, STRONG, LOUD):
        generator = seeded()
        view_of(noise(5, 1, 8, 8), view, generator=generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_pieces_of_a_batch_do_not_show(monkeypatch):
    images = noise(9, 3, 8, 8)
    wanted = view_of(images, LOUD, generator=seeded())
    monkeypatch.setattr(views, "_CHUNK", 400)
    close(view_of(images, LOUD, generator=seeded()), wanted)


def test_crops_can_be_used_again():
    images, generator = noise(6, 3, 8, 8), seeded()
    crops = draw_crops(6, LOUD, height=8, width=8, generator=generator)
    close(view_of(images, LOUD, generator=generator, crops=crops), view_of(images, LOUD, generator=seeded()))
    weak = view_of(images, WEAK, generator=seeded(3), crops=crops)
    assert torch.equal(weak, crop_resize(images, crops, size=8))
    part = view_of(images[2:4], WEAK, generator=seeded(), crops=crops[2:4], rows=slice(2, 4), total=6)
    close(part, weak[2:4])


def test_views_of_the_papers():
    assert (WEAK.jitter, WEAK.grey, WEAK.blur, WEAK.scale) == (None, 0.0, None, (0.2, 1.0))
    assert strong_for(65) == STRONG
    assert (strong_for(64).blur, strong_for(64).jitter) == (None, STRONG.jitter)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.2)}, "at most 1"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"blur": (0.0, 1.0)}, "blur"),
        ({"flip": 1.5}, "flip"),
        ({"jitter_p": -0.1}, "jitter_p"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue"),
        ({"jitter": (0.4, -0.4, 0.4, 0.1)}, "jitter"),
        ({"size": 0}, "size"),
    ],
)
def test_wrong_views(changes, word):
    with pytest.raises(InputError, match=word):
        View(**changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rows": slice(0, 3)}, "4 and 3"),
        ({"total": 9}, "4 and 9"),
        ({"images": torch.rand(4, 3, 8, 8, generator=seeded())}, "uint8"),
        ({"images": noise(3, 8, 8)}, "uint8"),
        ({"images": noise(4, 3, 0, 8)}, r"\[4, 3, 0, 8\]"),
        ({"images": noise(4, 2, 8, 8), "view": View(jitter=(0, 0, 0, 0), jitter_p=0)}, "1 or 3 channels"),
        ({"images": noise(4, 4, 8, 8), "view": View(grey=0.01)}, "1 or 3 channels"),
        ({"crops": torch.zeros(3, 5)}, r"\[4, 5\]"),
        ({"crops": torch.tensor([[0, 0, 9, 8, 0.0]]).expand(4, 5)}, "8 x 8"),
        ({"crops": torch.tensor([[0, 0, 0, 8, 0.0]]).expand(4, 5)}, "inside"),
    ],
)
def test_wrong_input(changes, word):
    arguments = {"images": noise(4, 3, 8, 8), "view": View(jitter=(1, 1, 1, 0.5), jitter_p=1), "generator": seeded()}
    arguments |= changes
    with pytest.raises(InputError, match=word):
        view_of(arguments.pop("images"), arguments.pop("view"), **arguments)


def test_wrong_pieces():
    with pytest.raises(InputError, match="odd"):
        gaussian_blur(floats(2, 3, 8, 8), torch.ones(2), kernel=4)
    with pytest.raises(InputError, match="pixel"):
        draw_crops(3, WEAK, height=0, width=4, generator=seeded())
    with pytest.raises(InputError, match="floats in 0 to 1"):
        crop_resize(torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.zeros(2, 5), size=8)
    with pytest.raises(InputError, match="channels"):
        adjust_hue(torch.zeros(2, 4, 8, 8), torch.zeros(2))


def test_standardise():
    images = floats(4, 3, 6, 8)
    before = images.clone()
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 1.0)
    out = standardise(images, mean, std)
    close(out, (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), atol=2e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert standardise(images.double(), mean, std).dtype == torch.float64
    for wrong in (noise(4, 3, 6, 8), images[:, :2], images[0]):
        with pytest.raises(InputError):
            standardise(wrong, mean, std)


# Other libraries' views


def test_batches_of_two_views():
    first, second, small = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8), torch.ones(4, 3, 5, 5)
    target, names = torch.arange(4), ("a", "b", "c", "d")
    for batch in (
        (first, second),
        [first, second],
        ((first, second), target, names),
        ([first, second, small, small], target, names),
        [[first, second], target],
        (first, second, small),
        ([first, second],),
    ):
        found = two_views(batch)
        assert found[0] is first
        assert found[1] is second


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 4, 3, 8, 8),
        (torch.zeros(4, 3, 8, 8), torch.arange(4)),
        (torch.zeros(4, 3, 8, 8),),
        (torch.zeros(4, 3, 8, 8), torch.zeros(5, 3, 8, 8)),
        ([torch.zeros(4, 3, 8, 8)], torch.arange(4)),
        {"image": 1},
        (),
        None,
    ],
)
def test_batches_of_something_else(batch):
    with pytest.raises(InputError, match="two views"):
        two_views(batch)


def lightly_like(image):
    """Two views and two small ones of a PIL image, drawn from all three global generators."""
    pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
    drawn = [v2.RandomResizedCrop(6)(pixels) for _ in range(2)]
    shifted = [view * np.random.rand() + random.random() for view in drawn]
    return [*shifted, pixels[:, :2, :2], pixels[:, :2, :2]]


def test_transforms_of_one_image():
    images, make = noise(5, 3, 8, 8), per_image(lightly_like, seed=3)
    np_before, py_before, before = np.random.get_state()[1].copy(), random.getstate(), images.clone()
    first, second = make(images, seeded())
    assert first.shape == second.shape == (5, 3, 6, 6)
    assert not torch.equal(first, second)
    assert np.array_equal(np.random.get_state()[1], np_before)
    assert random.getstate() == py_before  # torch's own is watched over in conftest.py
    assert torch.equal(images, before)
    again = make(images, seeded())
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    generator = seeded()
    assert not torch.equal(make(images, generator)[0], make(images, generator)[0])
    assert not torch.equal(per_image(lightly_like, seed=4)(images, seeded())[0], first)
    part = make(images[3:], seeded(), rows=slice(3, 5), total=5)
    assert torch.equal(part[0], first[3:])
    same = make(images[:1].expand(5, -1, -1, -1), seeded())[0]
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_that_give_one_view(channels):
    images = noise(4, channels, 8, 8)
    flips = v2.RandomHorizontalFlip()
    for pil in (True, False):  # PIL images and bytes come back, and go to 0 to 1
        first, second = per_image(flips, seed=0, pil=pil)(images, seeded())
        for view in (first, second):
            straight, turned = (
                (view - wanted / 255).abs().amax((1, 2, 3)) < 1e-6 for wanted in (images, images.flip(3))
            )
            assert bool((straight | turned).all())
        assert not torch.equal(first, second)
    wrapped = per_image(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), seed=0)(images, seeded())[0]
    assert type(wrapped) is torch.Tensor
    close(wrapped, images / 255)


def test_transforms_that_fail():
    images, numbers = noise(2, 3, 8, 8), random.getstate()

    def broken(image):
        random.random()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        per_image(broken, seed=0)(images, seeded())
    assert random.getstate() == numbers
    for transform, word in [
        (lambda image: [image], "one view or two"),
        (lambda image: "text", "str"),
        (lambda image: torch.zeros(3, random.randint(1, 99), 4), "one shape"),
    ]:
        with pytest.raises(InputError, match=word):
            per_image(transform, seed=0)(images, seeded())
    with pytest.raises(InputError, match="uint8"):
        per_image(lightly_like, seed=0)(images.float(), seeded())
