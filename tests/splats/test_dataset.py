"""Photographs with poses: lenses, COLMAP's models, transforms.json, and the pixels that come out."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.dataset import Dataset, View, open_dataset
from scrimp.splats.distortion import Lens, distort, straight, undistort, undistort_points
from scrimp.splats.transforms import read_points

WIDTH, HEIGHT = 103, 181
FOCAL, CENTRE = (127.0, 125.0), (53.5, 88.25)
LENSES = {
    "pinhole": Lens(WIDTH, HEIGHT, FOCAL, CENTRE),
    "brown": Lens(WIDTH, HEIGHT, FOCAL, CENTRE, (-0.2, 0.06, -0.01), (), (0.002, -0.003)),
    "rational": Lens(WIDTH, HEIGHT, FOCAL, CENTRE, (0.3, 0.1, 0.01), (0.4, 0.05, 0.0), (-0.001, 0.001)),
    "pincushion": Lens(WIDTH, HEIGHT, FOCAL, CENTRE, (0.25, 0.02)),
    "fisheye": Lens(WIDTH, HEIGHT, FOCAL, CENTRE, (-0.03, 0.01, -0.002, 0.0003), fisheye=True),
}
BENT = [lens for name, lens in LENSES.items() if name != "pinhole"]
FOLDS = Lens(WIDTH, HEIGHT, FOCAL, CENTRE, (-0.5,))  # r (1 - r^2 / 2) turns round at r = sqrt(2 / 3)


def by_formula(lens: Lens, points: torch.Tensor) -> torch.Tensor:
    """[n, 2] to [n, 2] distorted, written out as OpenCV's documentation has it."""
    x, y = points.double().numpy().T
    r = np.hypot(x, y)
    k = [*lens.radial, 0.0, 0.0, 0.0, 0.0]
    if lens.fisheye:
        angle = np.arctan(r)
        bent = angle * (1 + k[0] * angle**2 + k[1] * angle**4 + k[2] * angle**6 + k[3] * angle**8)
        return torch.from_numpy(np.stack([x, y], 1) * (bent / np.maximum(r, 1e-300))[:, None])
    q, (p1, p2) = [*lens.divisor, 0.0, 0.0, 0.0], lens.tangential
    factor = (1 + k[0] * r**2 + k[1] * r**4 + k[2] * r**6) / (1 + q[0] * r**2 + q[1] * r**4 + q[2] * r**6)
    across = x * factor + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2)
    down = y * factor + 2 * p2 * x * y + p1 * (r**2 + 2 * y**2)
    return torch.from_numpy(np.stack([across, down], 1))


def on_photograph(lens: Lens, points: torch.Tensor) -> torch.Tensor:
    """[n, 2] pixels."""
    return by_formula(lens, points) * torch.tensor(lens.focal) + torch.tensor(lens.centre)


@pytest.mark.parametrize("lens", LENSES.values(), ids=LENSES)
def test_distortion_is_the_formula_and_is_inverted(lens: Lens) -> None:
    points = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.7
    points[0] = 0
    bent = distort(lens, points)
    assert torch.allclose(bent, by_formula(lens, points), rtol=0, atol=1e-14)
    assert torch.allclose(undistort_points(lens, bent), points, rtol=0, atol=1e-12)
    assert undistort_points(lens, bent[:0].float()).shape == (0, 2)


@pytest.mark.parametrize("lens", [*BENT, FOLDS])
def test_the_inverse_is_what_a_search_finds(lens: Lens) -> None:
    # Within the field only: beyond it, other points land on the same place.
    reach = math.sqrt(2 / 3) if lens is FOLDS else 1.2
    axis = torch.linspace(-1.2, 1.2, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    grid = grid[grid.norm(dim=1) < reach]
    targets = torch.tensor([[0.0, 0.0], [0.31, -0.22], [-0.4, 0.3], [0.02, 0.5]], dtype=torch.float64)
    nearest = (by_formula(lens, grid) - targets[:, None]).norm(dim=2).argmin(1)
    assert (undistort_points(lens, targets) - grid[nearest]).abs().max() < 0.01


def test_nothing_folds_back() -> None:
    reach, most = math.sqrt(2 / 3), math.sqrt(2 / 3) * 2 / 3
    radii = torch.tensor([0.1, 0.99 * reach, 1.01 * reach, 1.3, 1.6], dtype=torch.float64)
    bent = distort(FOLDS, torch.stack([radii, 0 * radii], 1))
    assert bent.isnan().any(1).tolist() == [False, False, True, True, True]
    back = undistort_points(FOLDS, torch.tensor([[0.999 * most, 0.0], [0.0, 1.001 * most]], dtype=torch.float64))
    assert back.isnan().any(1).tolist() == [False, True]
    assert back[0, 0] < reach
    focal, centre = straight(FOLDS)
    corner = max(math.hypot(x / focal[0], y / focal[1]) for x in (centre[0], WIDTH - centre[0]) for y in (centre[1],))
    assert corner < reach


@pytest.mark.parametrize("lens", BENT)
def test_the_straight_picture_is_the_largest_without_a_border(lens: Lens) -> None:
    focal, centre = straight(lens)
    low = [-centre[0] / focal[0], -centre[1] / focal[1]]
    high = [(WIDTH - centre[0]) / focal[0], (HEIGHT - centre[1]) / focal[1]]
    for axis, far in ((0, WIDTH), (1, HEIGHT)):
        along = torch.linspace(low[1 - axis], high[1 - axis], 60)
        for edge, bound in ((low, 0), (high, far)):
            sides = [along, torch.full_like(along, edge[axis])]
            places = on_photograph(lens, torch.stack(sides[::-1] if axis == 0 else sides, 1))
            assert torch.minimum(places, torch.tensor([WIDTH, HEIGHT]) - places).min() > -0.5
            assert (places[:, axis] - bound).abs().min() < 0.5


def test_a_wide_fisheye_keeps_half_its_focal_length() -> None:
    lens = Lens(100, 100, (32.0, 32.0), (50.0, 50.0), (0.0, 0.0, 0.0, 0.0), fisheye=True)  # 180 degrees
    assert straight(lens) == ((16.0, 16.0), (50.0, 50.0))


SPAN = np.array([1.1, 2.2])
"""Of the coordinates that 8 bits tell: of 125 pixels' focal length a step is 1/2 and 1 pixel."""


def encoded(lens: Lens) -> np.ndarray:
    """uint8 [h, w, 3]: red and green say which way each pixel looks, x / z and y / z."""
    x, y = np.meshgrid(np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5)
    bent = np.stack([(x - lens.centre[0]) / lens.focal[0], (y - lens.centre[1]) / lens.focal[1]], -1)
    looks = undistort_points(lens, torch.from_numpy(bent)).numpy()
    values = np.concatenate([255 * (looks / SPAN + 0.5), np.full((*looks.shape[:2], 1), 128.0)], 2)
    # Dithered, so that means are finer than a step.
    return np.floor(values + np.random.default_rng(0).random(values.shape)).clip(0, 255).astype(np.uint8)


def decoded(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels[..., :2].double() / 255 - 0.5) * torch.from_numpy(SPAN)


def rays(camera: Camera) -> torch.Tensor:
    x, y = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    looks = [(x - camera.centre[0]) / camera.focal[0], (y - camera.centre[1]) / camera.focal[1]]
    return torch.from_numpy(np.stack(looks, -1))


MODELS = {
    "SIMPLE_PINHOLE": (0, [126.0, *CENTRE]),
    "PINHOLE": (1, [*FOCAL, *CENTRE]),
    "SIMPLE_RADIAL": (2, [126.0, *CENTRE, -0.1]),
    "RADIAL": (3, [126.0, *CENTRE, -0.1, 0.02]),
    "OPENCV": (4, [*FOCAL, *CENTRE, -0.2, 0.06, 0.002, -0.003]),
    "OPENCV_FISHEYE": (5, [*FOCAL, *CENTRE, -0.03, 0.01, -0.002, 0.0003]),
    "FULL_OPENCV": (6, [*FOCAL, *CENTRE, 0.3, 0.1, -0.001, 0.001, 0.01, 0.4, 0.05, 0.0]),
    "RADIAL_FISHEYE": (9, [126.0, *CENTRE, -0.03, 0.01]),
}
EXPECTED = {
    "RADIAL": Lens(WIDTH, HEIGHT, (126.0, 126.0), CENTRE, (-0.1, 0.02, 0.0), (0.0, 0.0, 0.0)),
    "OPENCV": replace(LENSES["brown"], radial=(-0.2, 0.06, 0.0), divisor=(0.0, 0.0, 0.0)),
    "OPENCV_FISHEYE": LENSES["fisheye"],
    "FULL_OPENCV": LENSES["rational"],
}
NAMES = [f"{kind} {number}.{'jpg' if number % 2 else 'png'}" for number, kind in enumerate(sorted(MODELS))]
POINTS = [([0.1, -0.2, 3.0], [255, 0, 7], 2), ([1.5, 2.5, -3.5], [1, 2, 3], 0), ([9.0, 8.0, 7.0], [4, 5, 6], 1)]


def pose(number: int) -> list[float]:
    """w x y z of length 2, and a shift."""
    values = np.random.default_rng(number).normal(size=7)
    return [*(2 * values[:4] / np.linalg.norm(values[:4])), *values[4:]]


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    cameras, images, points = (struct.pack("<Q", len(items)) for items in (MODELS, NAMES, POINTS))
    for number, params in MODELS.values():
        cameras += struct.pack(f"<IiQQ{len(params)}d", number + 5, number, WIDTH, HEIGHT, *params)
    for row, name in enumerate(NAMES):
        images += struct.pack("<I7dI", row, *pose(row), MODELS[name.split()[0]][0] + 5) + name.encode() + b"\0"
        images += struct.pack("<Q", row % 3) + struct.pack("<ddq", 1.5, 2.5, -1) * (row % 3)
    for row, (xyz, rgb, track) in enumerate(POINTS):
        points += struct.pack("<Q3d3BdQ", row, *xyz, *rgb, 0.5, track) + struct.pack("<II", 1, 2) * track
    for title, content in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{title}.bin").write_bytes(content)


def write_text(folder: Path) -> None:
    folder.mkdir(parents=True)
    cameras, images, points = "# Camera list\n", "# Image list\n# of two lines each\n", "# 3D points\n"
    for model, (number, params) in MODELS.items():
        cameras += f"{number + 5} {model} {WIDTH} {HEIGHT} {' '.join(map(repr, params))}\n"
    for row, name in enumerate(NAMES):
        numbers = " ".join(repr(float(value)) for value in pose(row))
        images += f"{row} {numbers} {MODELS[name.split()[0]][0] + 5} {name}\n{'1.5 2.5 -1 ' * (row % 3)}\n"
    for row, (xyz, rgb, track) in enumerate(POINTS):
        points += f"{row} {' '.join(map(str, [*xyz, *rgb]))} 0.5{' 1 2' * track}\n"
    for title, text in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{title}.txt").write_text(text)


@pytest.fixture(scope="module")
def colmap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of the same photographs, ``binary`` and ``text``, whose pixels say where they look."""
    root = tmp_path_factory.mktemp("colmap")
    write_binary(root / "binary" / "sparse" / "0")
    write_text(root / "text" / "sparse")
    (root / "text" / "images").mkdir()
    write_text(root / "unlisted" / "colmap" / "sparse")
    for name in NAMES:
        number, params = MODELS[name.split()[0]]
        focal = params[:2] if number in (1, 4, 5, 6) else params[:1] * 2
        lens = EXPECTED.get(name.split()[0]) or Lens(WIDTH, HEIGHT, tuple(focal), CENTRE, tuple(params[3:]))
        lens = LENSES["pinhole"] if number == 1 else lens
        lens = replace(lens, fisheye="FISHEYE" in name)
        picture = Image.fromarray(encoded(lens))
        picture.save(root / "text" / "images" / name, **({"quality": 97, "subsampling": 0} if "jpg" in name else {}))
    (root / "binary" / "images").symlink_to(root / "text" / "images")
    return root


@pytest.fixture(scope="module")
def both(colmap: Path) -> tuple[Dataset, Dataset]:
    return open_dataset(colmap / "binary"), open_dataset(colmap / "text", test_every=0)


def test_both_forms_of_colmap_are_one(both: tuple[Dataset, Dataset]) -> None:
    binary, text = both
    assert [view.name for view in binary.views] == [view.name for view in text.views] == sorted(NAMES)
    assert [view.name for view in binary.test] == sorted(NAMES)[:1]
    assert text.test == ()
    for one, other in zip(binary.views, text.views, strict=True):
        assert one.lens == other.lens
        assert one.lens == EXPECTED.get(one.name.split()[0], one.lens)
        assert torch.equal(one.camera.world_to_camera, other.camera.world_to_camera)
    for found in both:
        assert torch.equal(found.points, torch.tensor([point[0] for point in POINTS]))
        assert torch.equal(found.colors, torch.tensor([point[1] for point in POINTS], dtype=torch.uint8))


def test_poses_turn_as_quaternions_do(both: tuple[Dataset, Dataset]) -> None:
    for row, name in enumerate(NAMES):
        view = next(view for view in both[0].views if view.name == name)
        w, *axis, x, y, z = np.array(pose(row)) / np.array([2] * 4 + [1] * 3)
        point = np.array([0.3, -1.2, 0.7])
        turned = point + 2 * np.cross(axis, np.cross(axis, point) + w * point) + [x, y, z]
        found = view.camera.world_to_camera.double() @ torch.tensor([*point, 1.0], dtype=torch.float64)
        assert np.allclose(found[:3], turned, atol=1e-6)


@pytest.mark.parametrize("longest", [None, 100, 31])
def test_a_point_lands_on_what_the_photograph_shows_of_it(colmap: Path, longest: int | None) -> None:
    found = open_dataset(colmap / "binary", longest=longest)
    for view in found.views:
        pixels, camera = found.load(view), view.camera
        assert pixels.shape == (camera.height, camera.width, 3)
        assert camera.height == (longest or HEIGHT)
        # At the edge a part is averaged from pixels that are not there.
        off = ((decoded(pixels) - rays(camera)) * torch.tensor(camera.focal))[1:-1, 1:-1]
        assert off.abs().max() < 3 * SPAN[1] / 255 * camera.focal[1] + 0.1, view.name  # three steps of 8 bits
        for half in (part for axis in range(2) for part in off.chunk(2, axis)):
            assert half.mean((0, 1)).abs().max() < 0.05, view.name
        assert (pixels[..., 2].int() - 128).abs().max() <= 4


def test_another_camera_sees_black_beyond_the_photograph(both: tuple[Dataset, Dataset]) -> None:
    view = next(view for view in both[0].views if view.name.startswith("OPENCV "))
    wide = replace(view.camera, width=90, height=80, focal=(60.0, 50.0), centre=(45.0, 40.0))
    pixels = both[0].load(replace(view, camera=wide))
    there = pixels[..., 2] > 0
    places = on_photograph(view.lens, rays(wide).reshape(-1, 2)).reshape(80, 90, 2)
    margin = torch.minimum(places, torch.tensor([WIDTH, HEIGHT]) - places).amin(-1)
    assert there[margin > 6].all()
    assert not there[margin < -6].any()
    assert 0.1 < there.double().mean() < 0.9
    assert ((decoded(pixels) - rays(wide))[margin > 10].abs() * 60).max() < 0.8


def test_undistort_takes_any_size_and_keeps_a_pinhole() -> None:
    lens = LENSES["pinhole"]
    image = torch.from_numpy(encoded(lens))
    camera = Camera(WIDTH, HEIGHT, FOCAL, CENTRE, torch.eye(4))
    assert torch.equal(undistort(image, lens, camera), image)
    assert undistort(image[:1, :1], lens, camera.scaled(3, 5)).shape == (5, 3, 3)


@pytest.mark.parametrize("title", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("form", ["binary", "text"])
def test_damage_is_told_in_one_line(colmap: Path, tmp_path: Path, title: str, form: str) -> None:
    source = colmap / form / ("sparse/0" if form == "binary" else "sparse")
    root = tmp_path / "set"
    (root / "sparse").mkdir(parents=True)
    (root / "images").symlink_to(colmap / "text" / "images")
    for file in source.iterdir():
        (root / "sparse" / file.name).write_bytes(file.read_bytes())
    (victim,) = (root / "sparse").glob(f"{title}.*")
    whole = victim.read_bytes()
    spoilt = [whole[:length] for length in range(0, len(whole), 37)] if form == "binary" else []
    spoilt += [b"\xff" * 8 + whole[8:], whole[:12] + b"\xff" * 40 + whole[52:], b"\0" * 7 + b"\x70" + whole[8:]]
    for content in spoilt:
        victim.write_bytes(content)
        with pytest.raises(InputError) as error:
            open_dataset(root)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("camera", "said"),
    [
        ("1 FOV 9 9 5 4 4 0.1", "got FOV"),
        ("1 PINHOLE 9 9 5 4 4", "4 numbers for a PINHOLE"),
        ("1 PINHOLE 9 9 nan 4 4 4", "a lens"),
        ("1 PINHOLE 9 9 -5 5 4 4", "focal lengths above 0"),
        ("1 PINHOLE 9e9 9 5 5 4 4", "a lens"),
        ("1 PINHOLE 9 5 5 5 4 4", "proportions of 9 x 5"),
        ("2 PINHOLE 9 9 5 5 4 4", "camera 1 of a.png"),
        ("1 OPENCV 9 9 5 5 4 4 -9e11 -9e11 9e11 9e11", "straight picture"),
    ],
)
def test_what_no_camera_has_is_refused_by_name(tmp_path: Path, camera: str, said: str) -> None:
    write_one(tmp_path, camera=camera)
    with pytest.raises(InputError, match=said):
        open_dataset(tmp_path)


def write_one(root: Path, *, camera: str, image: str = "1 1 0 0 0 0 0 0 1 a.png") -> None:
    (root / "sparse").mkdir()
    (root / "images").mkdir()
    (root / "sparse" / "cameras.txt").write_text(camera)
    (root / "sparse" / "images.txt").write_text(f"{image}\n\n")
    Image.new("L", (9, 9), 200).save(root / "images" / "a.png")


def test_one_small_photograph_is_trained_on(tmp_path: Path) -> None:
    write_one(tmp_path, camera="1 PINHOLE 18 18 10 10 9 9")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((4, 4), 40, np.uint8)).save(tmp_path / "masks" / "a.png.png")
    found = open_dataset(tmp_path)
    (view,) = found.train
    assert (found.test, found.points, found.colors, found.scene_scale) == ((), None, None, 0.0)
    assert (view.camera.width, view.camera.focal, view.camera.centre) == (9, (5.0, 5.0), (4.5, 4.5))
    assert torch.equal(found.load(view), torch.full((9, 9, 3), 200, dtype=torch.uint8))
    assert torch.equal(found.load_mask(view), torch.full((9, 9), 40, dtype=torch.uint8))
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a readable image; got .*a\.png"):
        found.load(view)


@pytest.mark.parametrize("image", ["1 0 0 0 0 0 0 0 1 a.png", "1 1 0 0 0 nan 0 0 1 a.png"])
def test_a_pose_that_is_none_is_refused(tmp_path: Path, image: str) -> None:
    write_one(tmp_path, camera="1 PINHOLE 9 9 5 5 4 4", image=image)
    with pytest.raises(InputError, match=r"a\.png"):
        open_dataset(tmp_path)


def frame(name: str, **more: object) -> dict[str, object]:
    """At (1, 2, 3), looking along the world's -x, its own right along the world's y, up along -z."""
    matrix = [[0, 0, 1, 1], [1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]]
    return {"file_path": name, "transform_matrix": matrix, **more}


def write_synthetic(root: Path) -> None:
    """As NeRF's: no size, no endings, an angle of view, transparency, three files."""
    pixels = np.zeros((12, 16, 4), np.uint8)
    pixels[:, 8:] = [10, 20, 30, 255]
    pixels[:6, :8] = [100, 100, 100, 128]
    for split in ("train", "test", "val"):
        (root / split).mkdir()
        Image.fromarray(pixels).save(root / split / "r_0.png")
        stated = {"camera_angle_x": 2 * math.atan(0.5), "frames": [frame(f"./{split}/r_0")]}
        (root / f"transforms_{split}.json").write_text(json.dumps(stated))


def test_nerfs_synthetic_form(tmp_path: Path) -> None:
    write_synthetic(tmp_path)
    found = open_dataset(tmp_path, background=(0.0, 1.0, 0.0))
    assert [view.name for view in found.train] == ["train/r_0"]
    assert [view.name for view in found.test] == ["test/r_0"]
    (view,) = found.train
    assert view.camera.focal == pytest.approx((16.0, 16.0))
    assert view.camera.centre == (8.0, 6.0)
    assert torch.allclose(view.camera.position, torch.tensor([1.0, 2.0, 3.0]))
    # A step ahead, to its right and upwards: x grows, y shrinks, z is depth.
    where = view.camera.world_to_camera @ torch.tensor([1.0 - 4.0, 2.0 + 0.5, 3.0 + 0.25, 1.0])
    assert torch.allclose(where[:3], torch.tensor([0.5, -0.25, 4.0]), atol=1e-6)
    assert found.load(view)[[0, 11, 0], [0, 0, 8]].tolist() == [[50, 177, 50], [0, 255, 0], [10, 20, 30]]
    assert found.load_mask(view)[[0, 11, 0], [0, 0, 8]].tolist() == [128, 0, 255]


def write_ngp(root: Path, frames: list[dict[str, object]], **more: object) -> Dataset:
    stated = {"w": 20.0, "h": 10, "fl_x": 8, "frames": frames, **more}
    (root / "transforms.json").write_text(json.dumps(stated))
    return open_dataset(root, on_missing="skip")


def test_numbers_of_a_frame_overrule_the_sets(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "images" / name)
    Image.new("L", (10, 5), 255).save(tmp_path / "m.png")
    (tmp_path / "p.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n1 2 3 4 5 6\n-1 0 0.5 255 0 9\n"
    )
    frames = [
        frame("images/a.jpg", cx=7.5, k1=0.05),
        frame("images\\b.jpg", fl_x=6, fl_y=5, k1=0.0, mask_path="m.png", w=40, h=20),
        frame("images/c", camera_model="OPENCV_FISHEYE"),
        frame("images/gone.jpg"),
    ]
    found = write_ngp(tmp_path, frames, k1=0.01, p2=0.002, k3=0.03, ply_file_path="p.ply", val_filenames=["images/c"])
    assert [view.name for view in found.test] == ["images/c"]
    a, b, c = (view.lens for view in found.views)
    assert (a.focal, a.centre, a.radial, a.tangential) == ((8, 8), (7.5, 5), (0.05, 0, 0.03), (0, 0.002))
    assert (b.focal, b.centre, b.width, b.radial) == ((3, 2.5), (10, 5), 20, (0, 0, 0.03))
    assert (c.fisheye, c.radial) == (True, (0.01, 0, 0.03, 0))
    assert torch.equal(found.points, torch.tensor([[1, 2, 3], [-1, 0, 0.5]]))
    assert found.colors.tolist() == [[4, 5, 6], [255, 0, 9]]
    assert [found.load_mask(view) is None for view in found.views] == [True, False, True]
    with pytest.raises(InputError, match=r"1 absent: images/gone\.jpg"):
        open_dataset(tmp_path / "transforms.json")
    (tmp_path / "images_2").mkdir()
    Image.new("RGB", (10, 5)).save(tmp_path / "images_2" / "a.png")
    (small,) = open_dataset(tmp_path, images="images_2", on_missing="skip").train
    assert (small.lens.width, small.lens.focal, small.lens.centre) == (10, (4, 4), (3.75, 2.5))


MIRRORED = [[0, 0, 1, 1], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("frames", "more", "said"),
    [
        ([frame("a.png", transform_matrix=MIRRORED)], {}, "turn and move, nothing else; got another for a.png"),
        ([frame("a.png", transform_matrix=[[1, 2]])], {}, "none for a.png"),
        ([frame("a.png", transform_matrix="no")], {}, "none for a.png"),
        ([frame("a.png", camera_model="EQUIRECTANGULAR")], {}, "EQUIRECTANGULAR"),
        ([frame("a.png")], {"k4": 0.1}, "k4, k5 or k6"),
        ([frame("a.png")], {"fl_x": "8"}, "a number for fl_x"),
        ([frame("a.png")], {"fl_x": None}, "camera_angle_x"),
        ([frame("a.png")], {"cx": float("nan")}, "a number for cx"),
        ([frame("a.png")], {"w": 10**400}, "a number for w"),
        ([frame("a.png")], {"ply_file_path": "no.ply"}, "the points no.ply"),
        ([frame("a.png", mask_path="no.png")], {}, "the mask no.png"),
        ([frame("a.png")], {"train_filenames": []}, "photographs to train on"),
        ([{"file_path": 3}], {}, "file_path"),
        ([3], {}, "frames, a list"),
        ([], {}, "photographs to train on"),
        ([frame("b.png")], {}, "photographs to train on"),
    ],
)
def test_what_a_file_must_not_say(
    tmp_path: Path, frames: list[dict[str, object]], more: dict[str, object], said: str
) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=said):
        write_ngp(tmp_path, frames, **more)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{\xff", b"[" * 100000])
def test_what_is_no_such_file_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "transforms.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a transforms\.json"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="which is absent"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="longest from 1 on"):
        open_dataset(tmp_path, longest=0)


def test_points_of_binary_files_with_real_colours(tmp_path: Path) -> None:
    titles = ["x", "y", "z", "red", "green", "blue"]
    head = "".join(f"property double {title}\n" for title in titles)
    values = np.array([[1, 2, 3, 0, 0.5, 1]], ">f8")
    file = tmp_path / "p.ply"
    start = f"ply\nformat binary_big_endian 1.0\nelement vertex 1\n{head}end_header\n".encode()
    file.write_bytes(start + values.tobytes())
    points, colors = read_points(file)
    assert (points.tolist(), colors.tolist()) == ([[1, 2, 3]], [[0, 128, 255]])
    values[0, 1] = np.inf
    for content in (start + values.tobytes(), start + values.tobytes()[:-1], start.replace(b"double z", b"double w")):
        file.write_bytes(content)
        with pytest.raises(InputError):
            read_points(file)


@pytest.fixture(scope="module")
def fox(shared_data: Path) -> Dataset:
    folder = shared_data / "scenes" / "fox"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    return open_dataset(folder, longest=64, on_missing="skip")


def test_real_photographs_look_at_one_scene(fox: Dataset) -> None:
    assert (len(fox.train), len(fox.test)) == (43, 7)
    assert 1 < fox.scene_scale < 20
    # The point nearest to all optical axes: in front of every camera, and in nearly every picture.
    normal, moment = torch.zeros(3, 3), torch.zeros(3)
    for view in fox.views:
        ahead = view.camera.world_to_camera[2, :3]
        across = torch.eye(3) - ahead[:, None] * ahead
        normal, moment = normal + across, moment + across @ view.camera.position
    middle = torch.linalg.solve(normal, moment)
    seen = []
    for view in fox.views:
        x, y, z, _ = (view.camera.world_to_camera @ torch.tensor([*middle, 1.0])).tolist()
        assert z > 0
        seen.append(abs(x / z * view.camera.focal[0]) < 18 and abs(y / z * view.camera.focal[1]) < 32)
    assert sum(seen) > 40


def test_a_real_photograph_is_the_mean_of_what_each_pixel_covers(fox: Dataset) -> None:
    view: View = fox.views[3]
    pixels, camera, lens = fox.load(view), view.camera, view.lens
    with Image.open(view.image) as picture:
        whole = np.asarray(picture)
    off = []
    for column, row in [(3, 5), (18, 32), (33, 60), (30, 4), (2, 59), (25, 45), (12, 20)]:
        steps = (torch.cartesian_prod(torch.arange(20), torch.arange(20)) + 0.5) / 20
        looks = (steps + torch.tensor([column, row]) - torch.tensor(camera.centre)) / torch.tensor(camera.focal)
        x, y = on_photograph(lens, looks).long().numpy().T
        off.append(np.abs(whole[y, x].mean(0) - pixels[row, column].numpy()).max())
    assert np.mean(off) < 2.5


def test_real_photographs_all_load(fox: Dataset) -> None:
    for view in fox.views[::7]:
        pixels = fox.load(view)
        assert pixels.shape == (64, 36, 3)
        assert pixels.float().std() > 10
        assert fox.load_mask(view) is None
