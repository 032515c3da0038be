"""Large images in parts: every kind of file against the array it was made of, and every kind of damage."""

import importlib.util
import json
import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from scrimp.data import PixelCache, open_image
from scrimp.data.decode import ImageError
from scrimp.data.large_array import ArrayImage, touched_pages
from scrimp.data.large_pixels import eight_bits, shrink, without_alpha
from scrimp.data.large_slide import SlideImage
from scrimp.data.open_image import thumbnail_size
from scrimp.primitives.errors import InputError, MissingExtraError

WIDTH, HEIGHT = 53, 37


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def scene(width=WIDTH, height=HEIGHT):
    """RGB noise: any pixel out of place shows."""
    return noise(height, width, 3)


def tifffile():
    return pytest.importorskip("tifffile", reason="tifffile is not installed; it comes with the extra zoom")


def zarr():
    return pytest.importorskip("zarr", reason="zarr is not installed; it comes with the extra zoom")


def png(path, values):
    Image.fromarray(values).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def npy(path, values):
    np.save(path.with_suffix(".npy"), values)
    return path.with_suffix(".npy")


def npy_channels_first(path, values):
    return npy(path, np.ascontiguousarray(values.transpose(2, 0, 1)))


def npy_fortran(path, values):
    return npy(path, np.asfortranarray(values))


def tiff(path, values, **options):
    tifffile().imwrite(path.with_suffix(".tif"), values, **{"photometric": "rgb", **options})
    return path.with_suffix(".tif")


def tiff_tiled(path, values):
    return tiff(path, values, tile=(16, 16), compression="zlib", predictor=True)


def tiff_big_endian(path, values):
    return tiff(path, values, tile=(16, 32), bigtiff=True, byteorder=">")


def tiff_strips(path, values):
    return tiff(path, values, rowsperstrip=5, compression="zlib")


def tiff_one_strip(path, values):
    return tiff(path, values)


def tiff_planes(path, values):
    return tiff(path, values.transpose(2, 0, 1), planarconfig="separate", tile=(16, 16))


def tiff_planes_one_strip(path, values):
    return tiff(path, values.transpose(2, 0, 1), planarconfig="separate")


def tiff_page_a_colour(path, values):
    return tiff(path, values.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"}, rowsperstrip=8)


def zarr_array(path, values, *, chunks=(16, 16, 3), **options):
    made = zarr().create_array(
        path.with_suffix(".zarr"), shape=values.shape, chunks=chunks, dtype=values.dtype, **options
    )
    made[...] = values
    return path.with_suffix(".zarr")


def zarr_old(path, values):
    return zarr_array(path, values, zarr_format=2)


def zarr_channels_first(path, values):
    return zarr_array(path, values.transpose(2, 0, 1), chunks=(1, 10, 20))


def zarr_shards(path, values):
    return zarr_array(path, values, chunks=(16, 16, 3), shards=(32, 32, 3))


TIFFS = [
    tiff_tiled,
    tiff_big_endian,
    tiff_strips,
    tiff_one_strip,
    tiff_planes,
    tiff_planes_one_strip,
    tiff_page_a_colour,
]
ZARRS = [zarr_array, zarr_old, zarr_channels_first, zarr_shards]
KINDS = [png, npy, npy_channels_first, npy_fortran, *TIFFS, *ZARRS]
each_kind = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


def as_array(image):
    return image.permute(1, 2, 0).numpy()


def padded(values, box):
    """The reference: the box cut pixel by pixel, zero outside."""
    left, top, width, height = box
    out = np.zeros((height, width, values.shape[2]), np.uint8)
    for y in range(height):
        for x in range(width):
            if 0 <= top + y < values.shape[0] and 0 <= left + x < values.shape[1]:
                out[y, x] = values[top + y, left + x]
    return out


BOXES = [
    (0, 0, 1, 1),
    (0, 0, WIDTH, HEIGHT),
    (15, 15, 2, 2),
    (16, 16, 16, 16),
    (-3, -4, 10, 9),
    (45, 30, 20, 20),
    (-5, -5, WIDTH + 10, HEIGHT + 11),
    (WIDTH, 0, 4, 4),
    (-9, 3, 9, 2),
    (100, -100, 3, 5),
]


def check_parts(image, values):
    for box in BOXES:
        part = image.read(box)
        assert part.dtype == torch.uint8
        assert part.is_contiguous()
        np.testing.assert_array_equal(as_array(part), padded(values, box), err_msg=str(box))


@each_kind
def test_parts_are_those_of_the_array(tmp_path, make):
    values = scene()
    with open_image(make(tmp_path / "a", values), cache=PixelCache(2000)) as image:
        assert image.size == (WIDTH, HEIGHT)
        assert list(image.levels) == [(WIDTH, HEIGHT)]
        assert image.channels == 3
        check_parts(image, values)
        check_parts(image, values)


@pytest.mark.parametrize("make", [png, npy, npy_fortran, *TIFFS[:-1], zarr_array], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (40, 1), (1, 40)])
def test_degenerate_sizes(tmp_path, make, width, height):
    values = noise(height, width, 3)
    image = open_image(make(tmp_path / "a", values, **({"chunks": (1, 1, 3)} if make is zarr_array else {})))
    box = (-1, -1, width + 2, height + 2)
    np.testing.assert_array_equal(as_array(image.read(box)), padded(values, box))
    assert image.size == (width, height)
    assert tuple(image.thumbnail(4).shape) == (3, min(height, 4), min(width, 4))


def test_a_reader_that_is_off_by_one_does_not_pass(tmp_path):
    class Shifted(ArrayImage):
        def _region(self, box, level):
            return super()._region((max(box[0] - 1, 0), *box[1:]), level)

    with pytest.raises(AssertionError):
        check_parts(Shifted(npy(tmp_path / "a", scene())), scene())


@each_kind
def test_grey_has_one_channel(tmp_path, make):
    values = noise(HEIGHT, WIDTH)
    grey = {"tile": (16, 16), "photometric": "minisblack"}
    if make is png:
        path = png(tmp_path / "a", values)
    elif make in TIFFS:
        options = grey if make is tiff_tiled else {"photometric": "minisblack"}
        path = tiff(tmp_path / "a", values, **options)
    elif make in ZARRS:
        path = zarr_array(tmp_path / "a", values, chunks=(16, 16))
    else:
        path = npy(tmp_path / "a", values)
    image = open_image(path)
    assert image.channels == 1
    np.testing.assert_array_equal(image.read((3, 5, 20, 11))[0].numpy(), values[5:16, 3:23])


@pytest.mark.parametrize("make", [png, npy, tiff, tiff_tiled, zarr_array], ids=lambda make: make.__name__)
def test_sixteen_bits_are_scaled(tmp_path, make):
    wide = noise(HEIGHT, WIDTH, dtype=np.uint16)
    expected = np.round(wide / 257).astype(np.uint8)
    if make in (tiff, tiff_tiled):
        tile = {"tile": (16, 16)} if make is tiff_tiled else {}
        path = tiff(tmp_path / "a", wide, photometric="minisblack", byteorder=">", **tile)
    else:
        path = zarr_array(tmp_path / "a", wide, chunks=(16, 16)) if make is zarr_array else make(tmp_path / "a", wide)
    np.testing.assert_array_equal(open_image(path).read((0, 0, WIDTH, HEIGHT))[0].numpy(), expected)


def test_bits_reference():
    assert eight_bits(np.array([0, 1, 4095], np.uint16), 12).tolist() == [0, 0, 255]
    assert eight_bits(np.array([False, True])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="float32 pixels have no agreed range"):
        eight_bits(np.zeros(1, np.float32))


@pytest.mark.parametrize("make", [png, npy, tiff, tiff_tiled, tiff_planes, zarr_array], ids=lambda make: make.__name__)
def test_opacity_is_laid_on_white(tmp_path, make):
    values = noise(HEIGHT, WIDTH, 4)
    path = (
        zarr_array(tmp_path / "a", values, chunks=(16, 16, 2)) if make is zarr_array else make(tmp_path / "a", values)
    )
    image = open_image(path)
    opacity = values[..., 3:] / 255
    expected = values[..., :3] * opacity + 255 * (1 - opacity)
    assert image.channels == 3
    assert np.abs(as_array(image.read((0, 0, WIDTH, HEIGHT))) - expected).max() <= 1


def test_opacity_premultiplied_or_unspecified(tmp_path):
    values = noise(8, 8, 4)
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    multiplied = open_image(tiff(tmp_path / "a", values, extrasamples=["assocalpha"])).read((0, 0, 8, 8))
    np.testing.assert_array_equal(as_array(multiplied), values[..., :3] + (255 - values[..., 3:]))
    unspecified = open_image(tiff(tmp_path / "b", values, extrasamples=["unspecified"])).read((0, 0, 8, 8))
    np.testing.assert_array_equal(as_array(unspecified), values[..., :3])
    assert without_alpha(np.array([[[100, 0]]], np.uint8)).tolist() == [[[255]]]


def test_tiff_colour_kinds(tmp_path):
    values = noise(HEIGHT, WIDTH)
    white = open_image(tiff(tmp_path / "w", values, photometric="miniswhite", tile=(16, 16)))
    np.testing.assert_array_equal(white.read((0, 0, WIDTH, HEIGHT))[0].numpy(), 255 - values)
    table = noise(3, 256, dtype=np.uint16)
    palette = open_image(tiff(tmp_path / "p", values, photometric="palette", colormap=table))
    expected = np.round(table / 257).astype(np.uint8).T[values]
    np.testing.assert_array_equal(as_array(palette.read((0, 0, WIDTH, HEIGHT))), expected)
    Image.fromarray(values).convert("1").save(tmp_path / "b.tif")
    bits = np.asarray(Image.open(tmp_path / "b.tif")).astype(np.uint8) * 255
    np.testing.assert_array_equal(open_image(tmp_path / "b.tif").read((0, 0, WIDTH, HEIGHT))[0].numpy(), bits)
    Image.fromarray(scene()).convert("CMYK").save(tmp_path / "c.tif")
    with pytest.raises(ImageError, match="4 samples a pixel of kind"):
        open_image(tmp_path / "c.tif")
    with pytest.raises(ImageError, match="float32 pixels have no agreed range"):
        open_image(tiff(tmp_path / "f", values.astype(np.float32), photometric="minisblack"))
    with pytest.raises(ImageError, match="a stack of images"):
        open_image(tiff(tmp_path / "s", noise(5, 8, 8), photometric="minisblack"))
    with pytest.raises(ImageError, match="a stack of images"):  # tifffile writes this as one page of 3 x 40
        open_image(tiff_page_a_colour(tmp_path / "n", noise(40, 1, 3)))


def test_tiff_with_jpeg_inside(tmp_path):
    pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: no JPEG inside TIFF")
    y, x = np.mgrid[:64, :80]
    smooth = np.stack([3 * x, 3 * y, x + y], 2).astype(np.uint8)
    options = {"compression": "jpeg", "compressionargs": {"level": 95}, "tile": (32, 32)}
    image = open_image(tiff(tmp_path / "a", smooth, **options))
    assert np.abs(as_array(image.read((5, 7, 60, 50))).astype(int) - smooth[7:57, 5:65]).max() <= 12


def test_empty_tiles_are_background(tmp_path):
    blank = np.zeros((32, 32), np.uint8)
    tiles = (blank[:16, :16].tobytes() if row else b"" for row in range(4))
    with tifffile().TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(tiles, shape=(32, 32), dtype=np.uint8, tile=(16, 16), photometric="minisblack", compression=None)
    assert open_image(tmp_path / "a.tif").read((0, 0, 32, 32)).sum() == 0


# Levels


def halved(values):
    return np.ascontiguousarray(values[::2, ::2])


def pyramid(values, count=3):
    levels = [values]
    while len(levels) < count:
        levels.append(halved(levels[-1]))
    return levels


def tiff_subifds(path, levels):
    with tifffile().TiffWriter(path) as writer:
        writer.write(levels[0], subifds=len(levels) - 1, tile=(16, 16), photometric="rgb")
        for level in levels[1:]:
            writer.write(level, subfiletype=1, tile=(16, 16), photometric="rgb")


def tiff_pages(path, levels):
    with tifffile().TiffWriter(path) as writer:
        for place, level in enumerate(levels):
            writer.write(level, subfiletype=min(place, 1), tile=(16, 16), photometric="rgb")


def zarr_plain_group(path, levels):
    group = zarr().create_group(path)
    for place in reversed(range(len(levels))):
        group.create_array(str(place), shape=levels[place].shape, chunks=(16, 16, 3), dtype="u1")[...] = levels[place]
    return group


def zarr_multiscales(path, levels, zarr_format):
    group = zarr().create_group(path, zarr_format=zarr_format)
    names = [f"scale{place}" for place in range(len(levels))]
    for name, level in zip(names, levels, strict=True):
        turned = level.transpose(2, 0, 1)[None, :, None]
        group.create_array(name, shape=turned.shape, chunks=(1, 1, 1, 16, 16), dtype="u1")[...] = turned
    scales = [{"axes": [{"name": axis} for axis in "tczyx"], "datasets": [{"path": name} for name in names]}]
    group.attrs.update({"multiscales": scales} if zarr_format == 2 else {"ome": {"multiscales": scales}})
    group.create_array("labels", shape=(4, 4), chunks=(4, 4), dtype="u1")


def zarr_multiscales_old(path, levels):
    zarr_multiscales(path, levels, 2)


def zarr_multiscales_new(path, levels):
    zarr_multiscales(path, levels, 3)


PYRAMIDS = [tiff_subifds, tiff_pages, zarr_plain_group, zarr_multiscales_old, zarr_multiscales_new]


@pytest.mark.parametrize("make", PYRAMIDS, ids=lambda make: make.__name__)
def test_levels(tmp_path, make):
    levels = pyramid(scene(160, 96))
    path = tmp_path / ("a.tif" if "tiff" in make.__name__ else "a.zarr")
    make(path, levels)
    image = open_image(path)
    assert list(image.levels) == [(160, 96), (80, 48), (40, 24)]
    for level, values in enumerate(levels):
        step = 2**level
        part = image.read((8 * step, 4 * step, 20 * step, 10 * step), level)
        np.testing.assert_array_equal(as_array(part), values[4:14, 8:28])
        beyond = image.read((-4 * step, 90, 8 * step, 20 * step), level)
        np.testing.assert_array_equal(as_array(beyond), padded(values, (-4, round(90 / step + 1e-9), 8, 20)))
    before = image.bytes_read
    thumbnail = image.thumbnail(40)
    np.testing.assert_array_equal(as_array(thumbnail), levels[2])
    assert image.bytes_read - before <= 40 * 24 * 3 * 2
    for wrong in (3, -1):
        with pytest.raises(InputError, match="expected a level from 0 to 2"):
            image.read((0, 0, 4, 4), wrong)


def test_the_shape_follows_from_the_size_of_the_box_alone(tmp_path):
    levels = [scene(101, 67), scene(50, 33)]
    tiff_subifds(tmp_path / "a.tif", levels)
    image = open_image(tmp_path / "a.tif")
    shapes = {tuple(image.read((left, left // 2, 9, 1), 1).shape) for left in range(-20, 120)}
    assert shapes == {(3, 1, 4)}
    assert as_array(image.read((0, 0, 101, 67), 1)).tolist() == levels[1].tolist()


# Thumbnails


@each_kind
def test_thumbnail_is_the_array_resized(tmp_path, make):
    values = scene()
    image = open_image(make(tmp_path / "a", values), cache=PixelCache(2000))
    for size, expected in ((20, (20, 14)), ((20, 9), (13, 9)), ((500, 30), (43, 30)), (1, (1, 1)), (400, (53, 37))):
        view = image.thumbnail(size)
        resized = np.asarray(Image.fromarray(values).resize(expected, Image.Resampling.BILINEAR)).astype(int)
        assert (view.shape[2], view.shape[1]) == expected
        assert np.abs(as_array(view) - resized).mean() < (3 if make is png else 6), size
    np.testing.assert_array_equal(as_array(image.thumbnail(WIDTH)), values)
    for wrong in (0, (5, 0)):
        with pytest.raises(InputError, match="expected a thumbnail of at least 1 pixel"):
            image.thumbnail(wrong)


@pytest.mark.parametrize(("size", "to"), [((997, 613), (41, 25)), ((640, 480), (64, 48)), ((5000, 3), (50, 1))])
def test_reduction_keeps_brightness_and_place(size, to):
    """A ramp stays the same ramp: a shift by a tenth of a thumbnail's pixel would show."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 / width, y * 255 / height, 0 * x + 77], 2).round().astype(np.uint8)
    bands = [((0, top, width, min(50, height - top)), values[top : top + 50]) for top in range(0, height, 50)]
    view = shrink(bands, size, to, 3).astype(float)
    columns = (np.arange(to[0]) + 0.5) * 255 / to[0]
    assert np.abs(view[:, 1:-1, 0] - columns[None, 1:-1]).max() < 1.3
    assert view[..., 2].tolist() == np.full(view.shape[:2], 77.0).tolist()
    if to[1] > 2:
        rows = (np.arange(to[1]) + 0.5) * 255 / to[1]
        assert np.abs(view[1:-1, :, 1] - rows[1:-1, None]).max() < 1.3


def test_thumbnail_size():
    assert thumbnail_size((100, 50), 10) == (10, 5)
    assert thumbnail_size((50, 100), 10) == (5, 10)
    assert thumbnail_size((100, 50), (10, 2)) == (4, 2)
    assert thumbnail_size((7, 3), 10) == (7, 3)
    assert thumbnail_size((1000, 1), 10) == (10, 1)


def test_jpeg_thumbnail_is_decoded_at_a_fraction_and_kept_nowhere(tmp_path, monkeypatch):
    y, x = np.mgrid[:800, :1200]
    smooth = np.stack([x * 255 // 1200, y * 255 // 800, 0 * x + 50], 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    decoded = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: decoded.append(self.size) or resize(self, *a, **k))
    cache = PixelCache()
    image = open_image(tmp_path / "a.jpg", cache=cache)
    view = image.thumbnail(60)
    assert decoded == [(300, 200)]
    assert cache.nbytes == 0
    stored = (tmp_path / "a.jpg").stat().st_size
    assert image.bytes_read == stored
    expected = np.asarray(Image.fromarray(smooth).resize((60, 40), Image.Resampling.BOX)).astype(int)
    assert np.abs(as_array(view) - expected).max() <= 4
    image.read((0, 0, 5, 5))
    image.read((900, 700, 5, 5))
    assert image.bytes_read == 2 * stored
    assert cache.nbytes == smooth.nbytes
    assert torch.equal(image.thumbnail(60), view)


def test_exif_orientation(tmp_path):
    values = np.zeros((24, 40, 3), np.uint8)
    values[:, :20, 0], values[:, 20:, 2] = 200, 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (24, 40)
    upright = np.rot90(values, 3)
    assert np.abs(as_array(image.read((3, 2, 18, 36))).astype(int) - upright[2:38, 3:21]).mean() < 4
    assert np.abs(as_array(image.thumbnail(20)).astype(int)[:9] - upright[:18:2, ::2]).mean() < 12


# Bytes and memory


def test_only_touched_tiles_are_read_of_a_large_tiff(tmp_path):
    tile, side = 256, 6000
    blank = np.random.default_rng(0).integers(0, 256, (tile, tile, 3), dtype=np.uint8)
    across = -(-side // tile)
    with tifffile().TiffWriter(tmp_path / "a.tif") as writer:
        tiles = (blank for _ in range(across * across))
        writer.write(tiles, shape=(side, side, 3), dtype=np.uint8, tile=(tile, tile), photometric="rgb")
    cache = PixelCache(8 * blank.nbytes)
    image = open_image(tmp_path / "a.tif", cache=cache)
    assert image.bytes_read == 0
    part = image.read((2 * tile + 100, 300, 50, 50))
    np.testing.assert_array_equal(as_array(part), blank[44:94, 100:150])
    assert image.bytes_read == blank.nbytes
    image.read((2 * tile + 10, 300, 50, 50))
    assert image.bytes_read == blank.nbytes
    draw = np.random.default_rng(1)
    touched = {(2, 1)}
    for _ in range(50):
        left, top = draw.integers(0, side - 50, 2).tolist()
        image.read((left, top, 50, 50))
        touched |= {(x // tile, y // tile) for x in (left, left + 49) for y in (top, top + 49)}
        assert cache.nbytes <= cache.max_bytes
    assert len(touched) <= image.bytes_read / blank.nbytes <= 4 * 50 + 1
    assert image.bytes_read < 0.2 * (tmp_path / "a.tif").stat().st_size


def test_rows_of_one_long_strip_are_read_alone(tmp_path):
    values = noise(2000, 1000, 3)
    image = open_image(tiff(tmp_path / "a", values))
    np.testing.assert_array_equal(as_array(image.read((500, 1200, 30, 20))), values[1200:1220, 500:530])
    assert image.bytes_read <= 2 * 2**18


def test_bytes_of_each_kind(tmp_path):
    values = scene()
    path = png(tmp_path / "a", values)
    image = open_image(path, cache=PixelCache())
    for _ in range(3):
        image.read((0, 0, 4, 4))
    assert image.bytes_read == path.stat().st_size
    image = open_image(zarr_array(tmp_path / "a", values, compressors=None), cache=PixelCache())
    assert image.bytes_read == 0
    image.read((0, 0, 16, 17))
    assert image.bytes_read == 2 * 16 * 16 * 3


@pytest.mark.parametrize("order", ["C", "F"])
def test_touched_pages_against_a_set(order):
    values = np.zeros((70, 90, 3), np.uint16, order=order)
    draw = np.random.default_rng(3)
    for _ in range(20):
        y, x = draw.integers(0, 60, 2)
        part = values[y : y + draw.integers(1, 40), x : x + draw.integers(1, 40)]
        start = part.__array_interface__["data"][0]
        places = {
            (start + int(np.dot(place, part.strides)) + byte) // 4096
            for place in np.ndindex(part.shape)
            for byte in (0, 1)
        }
        assert touched_pages(part) == len(places)


def test_the_cache_keeps_to_its_limit():
    cache = PixelCache(100)
    made = []

    def make(name, count):
        return cache.get(name, lambda: made.append(name) or np.zeros((count, 1, 1), np.uint8))

    for name in "abac":
        make(name, 40)
    assert (made, cache.nbytes) == (["a", "b", "c"], 80)
    make("a", 40)
    make("b", 40)
    assert made == ["a", "b", "c", "b"]
    make("large", 500)
    assert cache.nbytes == 500
    make("d", 40)
    assert cache.nbytes == 40
    nothing = PixelCache(0)
    nothing.get("a", lambda: np.zeros((5, 1, 1), np.uint8))
    assert nothing.nbytes == 0
    for wrong in (-1, 2.5):
        with pytest.raises(InputError, match="expected a number of bytes from 0 on"):
            PixelCache(wrong)


# Processes and threads


class Parts(torch.utils.data.Dataset):
    def __init__(self, images, boxes):
        self.images, self.boxes = images, boxes

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, index):
        return self.images[index % len(self.images)].read(self.boxes[index])


@each_kind
def test_pickled_and_forked_and_in_threads(tmp_path, make):
    values = scene()
    image = open_image(make(tmp_path / "a", values), cache=PixelCache(3000))
    image.read((0, 0, 5, 5))
    copy = pickle.loads(pickle.dumps(image))
    assert copy.cache.nbytes == 0
    assert copy.bytes_read == 0
    check_parts(copy, values)
    boxes = [(left, left // 2, 12, 12) for left in range(0, 48, 2)] * 2
    with ThreadPoolExecutor(4) as pool:
        for box, part in zip(boxes, pool.map(image.read, boxes), strict=True):
            np.testing.assert_array_equal(as_array(part), padded(values, box))
    if make in (tiff_tiled, zarr_array, npy) and "fork" in multiprocessing.get_all_start_methods():
        forked = {"num_workers": 2, "multiprocessing_context": "fork", "generator": torch.Generator()}
        loader = DataLoader(Parts([image, copy], boxes), batch_size=None, **forked)
        for box, part in zip(boxes, loader, strict=True):
            np.testing.assert_array_equal(as_array(part), padded(values, box))


def test_images_that_share_a_cache_share_it_after_pickling(tmp_path):
    cache = PixelCache(999)
    path = npy(tmp_path / "a", scene())
    one, two = pickle.loads(pickle.dumps([open_image(path, cache=cache), open_image(path, cache=cache)]))
    assert one.cache is two.cache
    assert one.cache.max_bytes == 999
    alone = open_image(path)
    assert pickle.loads(pickle.dumps(alone)).cache is alone.cache


@each_kind
def test_closed_is_closed(tmp_path, make):
    with open_image(make(tmp_path / "a", scene())) as image:
        image.read((0, 0, 5, 5))
    for use in (lambda: image.read((0, 0, 5, 5)), lambda: image.thumbnail(9)):
        with pytest.raises(InputError, match="which was closed; open it again"):
            use()
    image.close()


# Damage and misuse


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((0, 0, 0, 5), "expected a box of at least 1 x 1 pixels; got 0 x 5"),
        ((0, 0, 5, -1), "at least 1 x 1"),
        ((0, 0, 5), "expected a box of four whole numbers"),
        ((0, 0.5, 5, 5), "four whole numbers"),
        (7, "four whole numbers"),
    ],
)
def test_boxes_without_area(tmp_path, box, said):
    image = open_image(npy(tmp_path / "a", scene()))
    with pytest.raises(InputError, match=said):
        image.read(box)


@pytest.mark.parametrize("make", [png, npy, *TIFFS], ids=lambda make: make.__name__)
def test_a_truncated_file_is_one_line_and_nothing_half_read(tmp_path, make):
    path = make(tmp_path / "a", scene())
    whole = path.read_bytes()
    for length in sorted({0, 1, 7, 9, 60, len(whole) // 3, len(whole) // 2, len(whole) - 200}):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError) as caught:
            open_image(path, cache=PixelCache(0)).read((0, 0, WIDTH, HEIGHT))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [png, npy, tiff_tiled, tiff_strips], ids=lambda make: make.__name__)
def test_damaged_bytes_raise_or_keep_the_shape(tmp_path, make):
    path = make(tmp_path / "a", scene())
    whole = path.read_bytes()
    draw, raised = np.random.default_rng(0), 0
    for _ in range(60):
        spoilt = bytearray(whole)
        spoilt[draw.integers(0, min(len(whole), 600))] ^= int(draw.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            image = open_image(path, cache=PixelCache(0))
            assert image.read((0, 0, 30, 30)).shape == (image.channels, 30, 30)
        except (ImageError, MissingExtraError):
            raised += 1
    assert raised > 5


def test_a_file_cut_while_open(tmp_path):
    path = tiff_tiled(tmp_path / "a", scene())
    image = open_image(path, cache=PixelCache(0))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError, match="truncated"):
        image.read((0, 0, WIDTH, HEIGHT))


def test_a_damaged_chunk(tmp_path):
    path = zarr_array(tmp_path / "a", scene())
    image = open_image(path, cache=PixelCache(0))
    (path / "c/1/1/0").write_bytes((path / "c/1/1/0").read_bytes()[:20])
    assert image.read((0, 0, 16, 16)).shape == (3, 16, 16)
    with pytest.raises(ImageError, match="expected a readable image"):
        image.read((10, 10, 16, 16))


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(ImageError, match="which is not there; check the path"):
        open_image(tmp_path / "none.tif")
    (tmp_path / "text.png").write_text("not an image at all")
    with pytest.raises(ImageError, match="no image format recognised"):
        open_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match="expected an image file or a zarr folder"):
        open_image(tmp_path)
    for name, values in (("rank", noise(2, 3, 4, 5)), ("many", noise(9, 9, 9)), ("empty", np.zeros((0, 4), np.uint8))):
        with pytest.raises(ImageError, match=r"an array|no pixels"):
            open_image(npy(tmp_path / name, values))
    for name, values in (("float", np.zeros((4, 4))), ("signed", np.zeros((4, 4), np.int16))):
        with pytest.raises(ImageError, match="have no agreed range"):
            open_image(npy(tmp_path / name, values))
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ImageError, match="expected a readable image"):
        open_image(tmp_path / "objects.npy")


def test_zarr_groups_that_are_no_images(tmp_path):
    empty = zarr().create_group(tmp_path / "e.zarr")
    with pytest.raises(ImageError, match="a group without arrays"):
        open_image(tmp_path / "e.zarr")
    empty.create_array("0", shape=(2, 8, 8), chunks=(1, 8, 8), dtype="u1")
    empty.attrs["multiscales"] = [{"axes": ["z", "y", "x"], "datasets": [{"path": "0"}]}]
    with pytest.raises(ImageError, match="is not one image of 1 to 4 channels"):
        open_image(tmp_path / "e.zarr")
    empty.attrs["multiscales"] = [{"datasets": [{"path": "lost"}]}]
    with pytest.raises(ImageError, match="lost"):
        open_image(tmp_path / "e.zarr")
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr" / "zarr.json").write_text(json.dumps({"zarr_format": 3}))
    with pytest.raises(ImageError, match="expected a readable image"):
        open_image(tmp_path / "d.zarr")


@pytest.mark.parametrize(
    ("name", "head", "package", "extra"),
    [("a.tif", b"II*\0", "tifffile", "zoom"), ("a.ndpi", b"II*\0", "openslide", "slides")],
)
def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch, name, head, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(head)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*scrimp\[{extra}\]"):
        open_image(tmp_path / name)


def test_absent_packages_leave_the_rest(tmp_path):
    if all(importlib.util.find_spec(name) for name in ("tifffile", "zarr", "openslide")):
        pytest.skip("all optional packages are installed")
    assert open_image(npy(tmp_path / "a", scene())).size == (WIDTH, HEIGHT)


# Slides


def test_slides(tmp_path):
    pytest.importorskip("openslide", reason="openslide is not installed; it comes with the extra slides")
    values = scene(300, 200)
    levels = [values, halved(values)]
    with tifffile().TiffWriter(tmp_path / "a.tif") as writer:
        for place, level in enumerate(levels):
            writer.write(level, subfiletype=place, tile=(64, 64), photometric="rgb")
    image = SlideImage(tmp_path / "a.tif")
    assert list(image.levels) == [(300, 200), (150, 100)]
    for box in ((10, 20, 33, 44), (-5, 190, 20, 20), (60, 60, 10, 10)):
        np.testing.assert_array_equal(as_array(image.read(box)), padded(values, box))
    np.testing.assert_array_equal(as_array(image.read((20, 40, 60, 30), 1)), levels[1][20:35, 10:40])
    np.testing.assert_array_equal(as_array(image.thumbnail(150)), levels[1])
    np.testing.assert_array_equal(as_array(pickle.loads(pickle.dumps(image)).read((3, 3, 7, 7))), values[3:10, 3:10])
    assert image.bytes_read is None
    path = tmp_path / "b.ndpi"
    path.write_bytes(b"no slide")
    with pytest.raises(ImageError, match="expected a readable image"):
        open_image(path)
