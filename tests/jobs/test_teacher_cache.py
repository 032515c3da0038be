"""Features on disk: what was appended is what is read; half-written, damaged and foreign files are never misread."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scrimp.jobs.teacher_cache import TeacherCache, index_of, read_index
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

SHAPE = (3, 7, 5)
ABOUT = {"teacher": "a" * 64, "seed": 3}


def features(rows: int = 21) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=generator_for(1)), dim=1)


def opened(path, dtype="float32", **options) -> TeacherCache:
    return TeacherCache(SHAPE, dtype, path=path, about=ABOUT, **options)


@pytest.mark.parametrize("on_disk", [False, True], ids=["ram", "disk"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("float16", 2**-11)])
def test_what_was_appended_is_read(tmp_path, on_disk, dtype, bound):
    given = features()
    cache = opened(tmp_path / "a.npy" if on_disk else None, dtype)
    for part in given.split(4):  # blocks that do not divide a view
        cache.append_(part)
    cache.save_()
    cache = opened(tmp_path / "a.npy", dtype, writes=False) if on_disk else cache
    rows = torch.tensor([6, 0, 3, 3])
    for view in range(3):
        found = cache.read(view, rows)
        assert found.dtype == torch.float32
        assert float((found - given.view(3, 7, 5)[view, rows]).abs().max()) <= bound
    assert cache.stored_bytes == 21 * 5 * np.dtype(dtype).itemsize


def test_another_process_reads_it_as_plain_npy(tmp_path):
    cache = opened(tmp_path / "a.npy")
    cache.append_(features())
    cache.save_()
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False).reshape(21, 5), features().numpy())


def test_it_goes_on_where_it_was_saved(tmp_path):
    cache = opened(tmp_path / "a.npy")
    cache.append_(features()[:9])
    cache.seconds = 2.5
    cache.save_()
    cache.append_(features()[9:15] + 1)  # written, but never vouched for
    again = opened(tmp_path / "a.npy")
    assert (again.finished, again.seconds) == (9, 2.5)
    again.append_(features()[9:])
    again.save_()
    assert torch.equal(opened(tmp_path / "a.npy").read(2, torch.arange(7)), features()[14:])


def test_a_file_without_an_index_is_made_again(tmp_path):
    opened(tmp_path / "a.npy").append_(features())
    index_of(tmp_path / "a.npy").unlink()
    again = opened(tmp_path / "a.npy")
    assert again.finished == 0
    assert not again._file.any()


def test_an_unfinished_view_is_not_read(tmp_path):
    cache = opened(tmp_path / "a.npy")
    cache.append_(features()[:13])
    cache.read(0, torch.tensor([6]))
    with pytest.raises(InputError, match="1 views that are finished"):
        cache.read(1, torch.tensor([0]))


def flip_a_byte(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def other_shape(path) -> None:
    np.save(path, np.zeros((3, 5, 7), np.float32))


@pytest.mark.parametrize(
    "harm",
    [lambda path: flip_a_byte(path, 128 + 3), truncate, other_shape, lambda path: path.unlink()],
    ids=["flipped", "truncated", "other shape", "absent"],
)
def test_damaged_features_are_refused(tmp_path, harm):
    cache = opened(tmp_path / "a.npy")
    cache.append_(features()[:12])
    cache.save_()
    harm(tmp_path / "a.npy")
    with pytest.raises(InputError, match="damaged") as caught:
        opened(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def test_bytes_beyond_the_finished_rows_do_not_matter(tmp_path):
    cache = opened(tmp_path / "a.npy")
    cache.append_(features()[:12])
    cache.save_()
    flip_a_byte(tmp_path / "a.npy", 128 + 12 * 20 + 1)
    assert torch.equal(opened(tmp_path / "a.npy").read(0, torch.arange(7)), features()[:7])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"about": {}, "finished": "3"}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    opened(tmp_path / "a.npy").save_()
    index_of(tmp_path / "a.npy").write_text(text)
    with pytest.raises(InputError, match="damaged"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize("finished", [-1, 22])
def test_an_index_that_cannot_be_is_refused(tmp_path, finished):
    opened(tmp_path / "a.npy").save_()
    file = index_of(tmp_path / "a.npy")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": finished}))
    with pytest.raises(InputError, match="damaged"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize(("key", "value"), [("teacher", "b" * 64), ("seed", 4), ("view", "weak")])
def test_features_of_another_making_are_refused(tmp_path, key, value):
    opened(tmp_path / "a.npy").save_()
    with pytest.raises(InputError, match=f"features made with {key}") as caught:
        TeacherCache(SHAPE, "float32", path=tmp_path / "a.npy", about={**ABOUT, key: value})
    assert "\n" not in str(caught.value)
    assert read_index(tmp_path / "a.npy", ABOUT)["finished"] == 0


def test_no_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="GB of room"):
        TeacherCache((4, 10**9, 10**6), "float32", path=tmp_path / "a.npy", about=ABOUT)
    assert list(tmp_path.iterdir()) == []
