"""Photographs with poses told by transforms.json, of synthetic and of real sets, and points that lie beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_dataset import on_photograph

from scrimp.primitives.errors import InputError
from scrimp.splats.dataset import Dataset, View, open_dataset
from scrimp.splats.transforms import read_points


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
