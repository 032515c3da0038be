"""The small transformer: timm's own by another name, trained and thinned like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scrimp.data import ImageData
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.models import create_model
from scrimp.jobs.thin import thin
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.train import train
from scrimp.primitives.errors import InputError


def seeded(name: str, **facts: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return create_model(name, **facts).eval()


def test_the_small_transformer_has_timms_parameters_and_answers() -> None:
    import timm

    small = seeded("small-vit-64", classes=5, channels=1, size=28)
    shape: dict[str, Any] = {"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng([]):
        twin = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, **shape).eval()
    twin.load_state_dict(small.state_dict())
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small(images), twin(images))


def test_its_width_is_128_unless_named_and_it_encodes() -> None:
    encoder = seeded("small-vit", classes=0, channels=3, size=32)
    assert [block.attn.num_heads for block in encoder.blocks] == [4] * 6  # type: ignore[union-attr]
    with torch.no_grad():
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert seeded("small-vit-32", classes=0, channels=3, size=(8, 12)).pos_embed.shape == (1, 7, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("small-vit-48", 32, "width of 32, 64"),
        ("small-vit-0", 32, "width of 32, 64"),
        ("small-vit", 30, "--size 28"),
        ("small-vit", 2, "--size 4"),
        ("small-vitt", 32, "'small-vit' or a timm model name"),
    ],
)
def test_what_it_cannot_be_is_refused(name: str, size: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        create_model(name, classes=2, channels=3, size=size)


def test_a_run_of_train_is_thinned(shapes: ImageData, tmp_path: Path) -> None:
    data = replace(shapes, train=shapes.train.take(torch.arange(36)), test=shapes.test.take(torch.arange(12)))
    shared: dict[str, Any] = {"data": "unused", "json": True, "device": "cpu", "batch_size": 12}
    base = train(TrainConfig(model="small-vit-32", epochs=2, evaluations=1, out=tmp_path / "a", **shared), data=data)
    settings: dict[str, Any] = {"model": str(tmp_path / "a"), "r": (2,), "repeats": 0, "pictures": 0}
    dense, merged = thin(ThinConfig(out=tmp_path / "b", **settings, **shared), data=data).receipts
    assert dense.quality["test_accuracy"] == base.quality["test_accuracy"]
    assert merged.notes["tokens after each block, mean"] == [15, 13, 11, 9, 7, 5]
