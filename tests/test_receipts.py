"""Receipts: written whole or not at all, read back the same, and damaged ones refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scrimp.meter.cost import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import SCHEMA, Receipt, load_receipt, save_receipt


@pytest.fixture
def receipt():
    return Receipt(
        kind="run",
        name="study",
        way="history",
        seed=1,
        quality={"test_accuracy": 0.91, "train_loss": None},
        cost=Cost(
            flops=Reading(2 * 10**15 + 1, "counted", ("aten::_cdist_forward",)),
            seconds=Reading(1.25, "wall, one call"),
            labels=Reading(12_000, "labels of the training set"),
        ),
        curve=[{"flops": 1e9, "train_loss": 0.5}, {"flops": 2e9, "train_loss": None}],
        config={"epochs": 2, "layers": [8, 16], "compile": False},
        notes={"data": "fashion-mnist", "images": 12_000},
    )


@pytest.fixture
def path(receipt, tmp_path):
    return save_receipt(receipt, tmp_path / "runs" / "receipt.json")


class TestRoundTrip:
    def test_what_is_read_is_what_was_written(self, receipt, path):
        assert load_receipt(path) == receipt

    def test_writing_again_gives_the_same_bytes(self, path, tmp_path):
        again = save_receipt(load_receipt(path), tmp_path / "again.json")
        assert again.read_bytes() == path.read_bytes()

    def test_it_is_plain_json_with_a_schema_version(self, path):
        record = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert record["schema"] == SCHEMA
        assert record["cost"]["flops"] == {
            "value": 2 * 10**15 + 1,
            "how": "counted",
            "missed": ["aten::_cdist_forward"],
        }

    def test_unknown_stays_unknown(self, path):
        cost = load_receipt(path).cost
        assert cost.joules == Reading(None, "not measured: no meter")
        assert cost.peak_bytes.value is None

    def test_non_finite_numbers_become_null(self, tmp_path):
        odd = Receipt(
            kind="run",
            name="odd",
            way="uniform",
            quality={"train_loss": float("nan")},
            cost=Cost(flops=Reading(float("inf"), "counted")),
            curve=[{"train_loss": float("-inf")}],
        )
        read = load_receipt(save_receipt(odd, tmp_path / "odd.json"))
        assert read.quality == {"train_loss": None}
        assert read.cost.flops.value is None
        assert read.curve == [{"train_loss": None}]

    @pytest.mark.parametrize(
        ("value", "kept"),
        [
            (np.float32(0.5), 0.5),
            (np.float64("nan"), None),
            (np.int64(3), 3),
            (torch.tensor(0.25), 0.25),
            (Path("data"), "data"),
            ((1, 2), [1, 2]),
            ({3: float("inf")}, {"3": None}),
        ],
    )
    def test_values_of_other_libraries_become_plain_ones(self, tmp_path, value, kept):
        one = Receipt(kind="run", name="n", way="w", notes={"value": value})
        assert load_receipt(save_receipt(one, tmp_path / "one.json")).notes == {"value": kept}

    def test_fields_of_a_later_minor_version_are_passed_over(self, path, receipt):
        record = json.loads(path.read_text()) | {"colour": "blue"}
        path.write_text(json.dumps(record))
        assert load_receipt(path) == receipt

    def test_fields_added_since_take_their_defaults(self, path):
        record = json.loads(path.read_text())
        del record["notes"], record["cost"]["labels"], record["baseline"]
        path.write_text(json.dumps(record))
        read = load_receipt(path)
        assert (read.notes, read.cost.labels.value, read.baseline) == ({}, None, False)


class TestDamage:
    def refuse(self, path, words):
        with pytest.raises(InputError, match=words) as caught:
            load_receipt(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_truncated_anywhere(self, path):
        whole = path.read_bytes().rstrip()
        for length in range(0, len(whole), 101):
            path.write_bytes(whole[:length])
            self.refuse(path, "not whole JSON")

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{]", b"[" * 100_000, b'{"schema": NaN}'])
    def test_no_json(self, path, content):
        path.write_bytes(content)
        self.refuse(path, "not whole JSON")

    def test_a_flipped_byte_gives_a_receipt_or_a_refusal(self, path):
        whole = path.read_bytes()
        refused = 0
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                load_receipt(path)
            except InputError:
                refused += 1
        assert refused > 10

    def test_missing(self, tmp_path):
        self.refuse(tmp_path / "none.json", "No such file")

    def test_a_folder(self, tmp_path):
        self.refuse(tmp_path, "directory")

    @pytest.mark.parametrize("content", ["[]", "3", "null", '{"name": "x"}'])
    def test_json_that_is_no_receipt(self, path, content):
        path.write_text(content)
        self.refuse(path, "schema version")

    @pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None])
    def test_another_schema(self, path, schema):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
        self.refuse(path, f"receipt schema {SCHEMA}")

    @pytest.mark.parametrize("name", ["kind", "name", "way", "cost", "versions", "machine", "created"])
    def test_a_missing_field_is_not_filled_in_from_the_reader(self, path, name):
        record = json.loads(path.read_text())
        del record[name]
        path.write_text(json.dumps(record))
        self.refuse(path, name)

    @pytest.mark.parametrize(
        "change",
        [
            {"quality": 3},
            {"quality": {"test_accuracy": "high"}},
            {"curve": {}},
            {"curve": [3]},
            {"curve": [{"flops": "many"}]},
            {"cost": []},
            {"cost": {"flops": 3}},
            {"cost": {"flops": {"value": 3}}},
            {"cost": {"flops": {"value": "3", "how": "counted"}}},
            {"cost": {"flops": {"value": 3, "how": None}}},
            {"seed": "one"},
            {"baseline": "yes"},
            {"name": None},
        ],
        ids=str,
    )
    def test_a_misshapen_field(self, path, change):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        self.refuse(path, "missing or misshapen")


class TestAtomicWrite:
    @pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
    def test_a_failure_midway_leaves_the_old_file_whole(self, path, receipt, monkeypatch, step):
        before = path.read_bytes()

        def fail(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="No space"):
                save_receipt(Receipt(kind="run", name="other", way="w"), path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
        assert load_receipt(path) == receipt

    def test_an_interrupt_midway_leaves_no_litter(self, tmp_path, receipt, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_receipt(receipt, tmp_path / "receipt.json")
        assert os.listdir(tmp_path) == []

    def test_a_new_file_replaces_the_old_one(self, path):
        other = Receipt(kind="run", name="other", way="w")
        save_receipt(other, path)
        assert load_receipt(path).name == "other"
        assert path.stat().st_mode & 0o777 == 0o644


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import scrimp", "import scrimp.receipts"])
def test_importing_loads_neither_torch_nor_numpy(statement):
    loaded = modules_after(statement)
    assert "scrimp" in loaded
    assert not loaded & {"torch", "numpy", "timm", "torchvision", "accelerate", "rich", "plotly"}


def test_reading_a_receipt_loads_no_torch(path):
    loaded = modules_after(f"from scrimp.receipts import load_receipt; load_receipt({str(path)!r})")
    assert "scrimp.receipts" in loaded
    assert "torch" not in loaded


def test_the_package_itself_imports_almost_nothing():
    assert modules_after("import scrimp") - modules_after("import json, importlib.metadata") == {"scrimp"}
