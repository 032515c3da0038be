"""Photographs with poses: lenses, COLMAP's models, and the pixels that come out."""

from __future__ import annotations

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
from scrimp.splats.dataset import Dataset, open_dataset
from scrimp.splats.distortion import Lens, distort, straight, undistort, undistort_points

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
