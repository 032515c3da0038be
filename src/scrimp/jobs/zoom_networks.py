"""The networks of `scrimp zoom`: what looks at the view, what looks at a patch. Built-in ones, or any of timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from scrimp.jobs.models import ConvNet, create_model
from scrimp.primitives.errors import InputError


class SmallAttention(nn.Module):
    """Three 3x3 convolutions, 8 channels, tanh: a location a pixel of the view (the paper's for Megapixel MNIST).

    Attributes:
        trim: pixels at each end of the view that have no location.
    """

    trim = 0

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()
        )
        self.head = nn.Conv2d(8, maps, 3, padding=1)

    def forward(self, views: Tensor) -> Tensor:
        """[batch, channels, h, w] -> logits [batch, maps, h, w]."""
        return self.head(self.layers(views))


class ContrastAttention(nn.Module):
    """Three convolutions, 8 channels, on half the view's resolution, added to how much the view varies about a place.

    Before anything is learnt the draws then go to where something is rather than to the empty background, of which
    most of a large image often consists; how much variation counts, per map, is learnt with the rest. Each location is
    the best of a few places, lest all patches fall on the same thing.

    Args:
        stride: pixels of the view from one location to the next, even.

    Attributes:
        trim: pixels at each end of the view that have no location.
        weight: of the variation, [maps].

    Raises:
        InputError: an odd stride.
    """

    trim = 0

    def __init__(self, channels: int, maps: int, stride: int = 4) -> None:
        super().__init__()
        if stride < 2 or stride % 2:
            raise InputError(
                "an even number of pixels in --attention contrast-STRIDE", f"{stride}", "pass 2, 4, 6, ..."
            )
        self.pool = stride // 2
        # Six pixels every two: the field of view is centred on its location, as with two every two.
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 6, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Conv2d(8, maps, 3, padding=1)
        self.weight = nn.Parameter(torch.ones(maps))

    def forward(self, views: Tensor) -> Tensor:
        """[batch, channels, h, w] -> logits [batch, maps, h', w'], one each stride; the last may span less."""
        logits = self.head(self.layers(views))
        varies = local_contrast(views, (logits.shape[2], logits.shape[3]))
        logits = logits + self.weight[:, None, None] * varies.to(logits.dtype)
        return nn.functional.max_pool2d(logits, self.pool, ceil_mode=True) if self.pool > 1 else logits


def local_contrast(views: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much the mean over the channels varies about each place of a grid, in units of its spread over the image.

    Args:
        views: [batch, channels, h, w].
        grid: rows and columns.

    Returns:
        [batch, 1, *grid], float32 or wider, without gradients: the standard deviation within 3 x 3 places less its
        mean, over its standard deviation; zeros where it is the same everywhere.
    """
    grey = views.detach().to(torch.promote_types(views.dtype, torch.float32)).mean(1, keepdim=True)
    grey = grey - grey.mean((2, 3), keepdim=True)  # the difference below would otherwise lose a bright image's digits
    level, power = (nn.functional.adaptive_avg_pool2d(part, grid) for part in (grey, grey.square()))
    level, power = (nn.functional.avg_pool2d(part, 3, 1, 1, count_include_pad=False) for part in (level, power))
    varies = (power - level.square()).clamp_min(0).sqrt()
    spread, middle = torch.std_mean(varies, (2, 3), correction=0, keepdim=True)
    return (varies - middle) / spread.clamp_min(1e-6)


class PooledAttention(nn.Module):
    """Four 3x3 convolutions without padding and a pooling by 8: few locations (the paper's for traffic signs).

    Without padding, attention cannot settle on the picture's edge for the edge's sake.
    """

    trim = 4

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        widths = (channels, 8, 16, 32)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3), nn.ReLU(inplace=True)]
        self.layers, self.head = nn.Sequential(*layers), nn.Conv2d(32, maps, 3)

    def forward(self, views: Tensor) -> Tensor:
        """[batch, channels, h, w] -> logits [batch, maps, ceil((h - 8) / 8), ceil((w - 8) / 8)]."""
        return nn.functional.max_pool2d(self.head(self.layers(views)), 8, ceil_mode=True)


class TimmAttention(nn.Module):
    """A map of features of a timm network, and one 1x1 convolution."""

    trim = 0

    def __init__(self, name: str, channels: int, maps: int, *, level: int, pretrained: bool) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            create_model(name, classes=0, channels=channels, size=224)  # says what is near
        try:
            self.layers = timm.create_model(name, features_only=True, in_chans=channels, pretrained=pretrained)
            info: Any = self.layers.feature_info
            self.level, found = level, info.channels()[level]
        except (RuntimeError, IndexError, AttributeError, OSError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                "a timm network that gives maps of features", f"{name} ({said})", "choose another"
            ) from error
        self.head = nn.Conv2d(found, maps, 1)

    def forward(self, views: Tensor) -> Tensor:
        """[batch, channels, h, w] -> logits [batch, maps, h', w'], as coarse as the map taken."""
        return self.head(cast(list[Tensor], self.layers(views))[self.level])


class PlainFeatures(nn.Module):
    """One 7x7 and three 3x3 convolutions at full resolution, then the largest value (the paper's Megapixel MNIST)."""

    def __init__(self, channels: int, width: int = 32, *, mean: bool = False) -> None:
        super().__init__()
        self.num_features, self.mean = width, mean
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 7), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        """[n, channels, side, side] -> [n, width]; sides of 13 pixels at least."""
        return pooled(self.layers(patches), mean=self.mean)


class PooledConvNet(nn.Module):
    """The convolutions of `scrimp.jobs.models.ConvNet`, and the largest value of each channel, or the mean."""

    def __init__(self, channels: int, width: int = 16, *, mean: bool = False) -> None:
        super().__init__()
        self.num_features, self.mean = 4 * width, mean
        self.layers = ConvNet(0, channels=channels, size=32, width=width).features[:-1]

    def forward(self, patches: Tensor) -> Tensor:
        """[n, channels, side, side] -> [n, 4 * width]; sides of 4 pixels at least."""
        return pooled(self.layers(patches), mean=self.mean)


def pooled(maps: Tensor, *, mean: bool) -> Tensor:
    """[n, channels, h, w] -> [n, channels]: the mean or the largest value. What is counted needs the mean."""
    return maps.mean((2, 3)) if mean else maps.amax((2, 3))


class PreactFeatures(nn.Module):
    """A residual network of four stages, normalised before each convolution, then the mean (the paper's for signs).

    Group normalisation: what a patch gives must not depend on the other patches of the batch.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.num_features = width
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Preact(width, 1 if number == 0 else 2) for number in range(4)))
        self.norm = nn.GroupNorm(1, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[n, channels, side, side] -> [n, width]."""
        return torch.relu(self.norm(self.blocks(self.stem(patches)))).mean((2, 3))


class _Preact(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        ready = torch.relu(self.norm1(maps))
        inner = self.conv2(torch.relu(self.norm2(self.conv1(ready))))
        return inner + (self.shortcut(ready) if isinstance(self.shortcut, nn.Conv2d) else maps)


_ATTENTION: dict[str, Callable[[int, int], nn.Module]] = {"small": SmallAttention, "pooled": PooledAttention}
_BUILT_IN = {"convnet": PooledConvNet, "plain": PlainFeatures}


def make_attention(name: str, channels: int, maps: int, *, level: int = -1, pretrained: bool = False) -> nn.Module:
    """Views [batch, channels, h, w] -> logits [batch, maps, h', w']; see `ZoomTrainConfig.attention`.

    Raises:
        InputError: no such network, or one without maps of features.
    """
    contrast = re.fullmatch(r"contrast(?:-(\d+))?", name)
    if contrast:
        return ContrastAttention(channels, maps, int(contrast.group(1) or 4))
    if name in _ATTENTION:
        return _ATTENTION[name](channels, maps)
    return TimmAttention(name, channels, maps, level=level, pretrained=pretrained)


def make_features(name: str, channels: int, size: int | tuple[int, int], *, pretrained: bool = False) -> nn.Module:
    """Patches [n, channels, size, size] -> features [n, dim]; see `ZoomTrainConfig.features`.

    Raises:
        InputError: no such network, or pretrained weights that cannot be had.
    """
    found = re.fullmatch(r"(?:(convnet|plain)(?:-(\d+))?(-mean)?|(preact)(?:-(\d+))?)", name)
    if found and not pretrained:
        kind, width, mean, preact, preact_width = found.groups()
        if preact:
            return PreactFeatures(channels, int(preact_width or 32))
        options = {"width": int(width)} if width else {}
        return _BUILT_IN[kind](channels, **options, mean=bool(mean))
    return create_model(name, classes=0, channels=channels, size=cast(int, size), pretrained=pretrained)


def width_of(features: nn.Module, channels: int, size: int | tuple[int, int]) -> int:
    """How many numbers it gives a patch.

    Raises:
        InputError: patches too small for the network.
    """
    height, width = (size, size) if isinstance(size, int) else size
    device = next(features.parameters()).device
    training = features.training
    try:
        with torch.no_grad():
            found = features.eval()(torch.zeros(1, channels, height, width, device=device))
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0]
        raise InputError(
            "patches that the feature network takes", f"{height} x {width} ({said})", "enlarge them"
        ) from error
    features.train(training)
    if found.ndim != 2:
        raise InputError("a network of one feature vector a patch", f"{list(found.shape)}", "choose another --features")
    return int(found.shape[1])
