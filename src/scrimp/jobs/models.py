"""Classifiers by name: a small convnet, ResNet or transformer for small images, or any timm model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from scrimp.primitives.errors import InputError


class ConvNet(nn.Module):
    """Three convolutions for 28 to 64 pixel images: about 90 % of Fashion-MNIST in a minute on two cores.

    Group normalisation, not batch normalisation: a sample's score must not depend on the batch it came in, nor on how
    many processes share that batch.

    Args:
        classes: outputs.
        channels: of the images.
        size: side of the images in pixels.
        width: channels of the first convolution; the next have twice and four times as many.
    """

    def __init__(self, classes: int, *, channels: int, size: int, width: int = 16) -> None:
        super().__init__()
        side = size // 2 // 2 // 2
        if side < 1:
            raise InputError("images of at least 8 pixels", f"{size}", "pass --size 8 or more")
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            *_after(width),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            *_after(2 * width),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            *_after(4 * width),
            nn.AdaptiveMaxPool2d(side) if size % 2 else nn.MaxPool2d(2),
        )
        self.head: nn.Module = nn.Linear(4 * width * side**2, classes) if classes else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, channels, size, size] -> logits [batch, classes]."""
        return self.head(self.features(images).flatten(1))


def _after(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(1, channels), nn.ReLU(inplace=True)


class SmallResNet(nn.Module):
    """ResNet-18 for images of 28 to 64 pixels: a 3x3 first convolution, no pooling before the blocks (He et al. 2016).

    Parameters have timm's names: with a width of 64 they are those of timm's ``resnet18`` but for the first
    convolution's size.

    Args:
        classes: outputs; 0 for the pooled features, 8 * width of them.
        channels: of the images.
        width: channels of the first stage; the next have 2, 4 and 8 times as many.
    """

    def __init__(self, classes: int, *, channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc: nn.Module = nn.Linear(8 * width, classes) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, channels, size, size] -> logits [batch, classes], or features [batch, 8 * width]."""
        maps = torch.relu_(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(maps.mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(maps)))))
        return torch.relu_(inner + (maps if self.downsample is None else self.downsample(maps)))


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, out, stride), _Block(out, out, 1))


def small_vit(classes: int, *, channels: int, size: int | tuple[int, int], width: int = 128) -> nn.Module:
    """A vision transformer for images of 28 to 64 pixels: patches of 4, six blocks, heads of 32 numbers, a class token.

    timm's ``VisionTransformer`` with timm's parameter names: 65 tokens at 32 pixels, 1.2 million parameters at a width
    of 128.

    Args:
        classes: outputs; 0 for the class token's features, ``width`` of them.
        channels: of the images.
        size: side of the images in pixels, or height and width.
        width: numbers of a token.

    Raises:
        InputError: a width that heads of 32 do not fill, or images that patches of 4 do not.
    """
    if width < 32 or width % 32:
        raise InputError("small-vit of a width of 32, 64, 96, ...", f"{width}", "pass such as small-vit-128")
    sides = (size,) if isinstance(size, int) else size
    if any(side < 4 or side % 4 for side in sides):
        raise InputError("images of a multiple of 4 pixels", f"{size}", f"pass --size {max(4, min(sides) // 4 * 4)}")
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {"img_size": size, "in_chans": channels, "num_classes": classes}
    return VisionTransformer(patch_size=4, embed_dim=width, depth=6, num_heads=width // 32, **options)


def create_model(name: str, *, classes: int, channels: int, size: int, pretrained: bool = False) -> nn.Module:
    """Build a classifier.

    Args:
        name: ``"convnet"``, ``"small-resnet18"``, ``"small-vit"``, each also with ``"-WIDTH"``, or a timm model name.
        classes, channels, size: of the data; size in pixels. 0 classes: an encoder, images -> features.
        pretrained: load timm's weights (fetched by timm where it has not cached them).

    Raises:
        InputError: no such model, or weights that cannot be had.
    """
    kind, _, width = name.partition("-")
    if kind == "convnet" and (width.isdigit() or not width) and not pretrained:
        return ConvNet(classes, channels=channels, size=size, width=int(width or 16))
    if (small := re.fullmatch(r"small-resnet18(?:-(\d+))?", name)) and not pretrained:
        return SmallResNet(classes, channels=channels, width=int(small.group(1) or 64))
    if (small := re.fullmatch(r"small-vit(?:-(\d+))?", name)) and not pretrained:
        return small_vit(classes, channels=channels, size=size, width=int(small.group(1) or 128))
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{kind}*")[:4]) or "see timm.list_models()"
        raise InputError(
            "'convnet', 'small-resnet18', 'small-vit' or a timm model name", f"'{name}'", f"did you mean one of: {near}"
        )
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "pretrained": pretrained}
    try:
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError:  # convnets take any size and no img_size
            return timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"pretrained weights of {name}", str(error).splitlines()[0], "go online once, or pass --weights FILE"
        ) from error


def load_weights_(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a .safetensors state dict into ``model``, in place; returns the entries left out for their shape.

    Only entries of the classifier may differ in shape (another set of classes).

    Raises:
        InputError: no such file, not safetensors, or weights of another architecture.
    """
    if not Path(path).is_file():
        raise InputError("a .safetensors file", f"{path}, which is absent", "check --weights")
    try:
        state = load_file(path)
    except Exception as error:  # safetensors' own error class has no stable home
        raise InputError("a whole .safetensors file", f"{path} ({error})", "copy it again") from error
    own = model.state_dict()
    misfits = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    head = _classifier_prefixes(model)
    strangers = sorted(set(state) ^ set(own)) + [key for key in misfits if not key.startswith(head)]
    if strangers:
        raise InputError("weights of this model", f"{path} with {strangers[0]} and {len(strangers) - 1} more differing",
                         "pass the --model that wrote them")  # fmt: skip
    model.load_state_dict({key: value for key, value in state.items() if key not in misfits}, strict=False)
    return misfits


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    named = getattr(model, "default_cfg", {}).get("classifier", ("head", "fc"))
    return tuple([named] if isinstance(named, str) else named)
