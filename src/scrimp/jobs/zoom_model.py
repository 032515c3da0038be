"""Models of large images: patches where attention points, all patches, or the whole image. One signature for all.

``model(scenes, draws) -> (outputs [batch, outputs], entropy [batch])``; ``model.look(scenes, draws)`` tells more.

Source: Katharopoulos and Fleuret, "Processing Megapixel Images with Deep Attention-Sampling Models", ICML 2019 (arXiv
1905.03711); Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018 (arXiv 1802.04712).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.jobs.zoom_places import around, location_boxes, tiles
from scrimp.primitives.errors import InputError
from scrimp.select import Locations, entropy, expectation, expected_features, sample_locations, smoothed, top_locations

_HIDDEN = 128  # width of the gated attention
_AT_ONCE = 256  # patches a pass where nothing is kept for a backward one

Read = Callable[[int, Tensor], Tensor]
"""(row of the batch, boxes int64 [n, 4]) -> patches [n, C, side, side] as the network takes them, on its device."""

Draws = Callable[[int], Sequence[torch.Generator]]
"""(attention map) -> a generator for each row of the batch."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """A batch of large images, of which only what is asked for is read.

    Attributes:
        views: [batch, C, h, w], as the network takes them.
        sizes: int64 [batch, 2], width and height of each image, on the CPU.
        read: gives patches.
    """

    views: Tensor
    sizes: Tensor
    read: Read


@dataclass(frozen=True, eq=False)
class Look:
    """What a model saw and says.

    Attributes:
        outputs: [batch, outputs].
        entropy: [batch], of the attention, in nats, the mean over its maps; 0 without attention.
        attention: of each image, [maps, rows, columns]; none without attention.
        boxes: of each image, int64 [n, 4], the patches seen, map after map, the first ones of most attention; none of
            the whole image.
    """

    outputs: Tensor
    entropy: Tensor
    attention: list[Tensor]
    boxes: list[Tensor]


class Looking(Protocol):
    """What the loop asks of a model."""

    def __call__(self, scenes: Scenes, draws: Draws | None = None) -> tuple[Tensor, Tensor]: ...

    def look(self, scenes: Scenes, draws: Draws | None = None) -> Look:
        """The same, and what was seen."""


class _Model(nn.Module, ABC):
    def forward(self, scenes: Scenes, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        found = self.look(scenes, draws)
        return found.outputs, found.entropy

    @abstractmethod
    def look(self, scenes: Scenes, draws: Draws | None = None) -> Look:
        """Answers, and what was seen."""


class ZoomNet(_Model):
    """Attention sampling: features of a few patches, drawn where the view promises something.

    Args:
        attention: views [batch, C, h, w] -> logits [batch, maps, h', w']; its ``trim``, if any, as in `location_boxes`.
        features: patches [n, C, side, side] -> [n, dim].
        classifier: [batch, maps * sizes * dim] -> outputs.
        patch: sides in pixels of the patches around each location; ``features`` gets all at the first one's side.
        budget: patches an image and map.
        smooth: share of the draws that is uniform.
        replacement: draw with replacement.
        control: subtract a control variate from the attention's gradient.
    """

    def __init__(
        self,
        attention: nn.Module,
        features: nn.Module,
        classifier: nn.Module,
        *,
        patch: Sequence[int],
        budget: int,
        smooth: float = 1e-5,
        replacement: bool = False,
        control: bool = True,
    ) -> None:
        super().__init__()
        self.attention, self.features, self.classifier = attention, features, classifier
        self.patch, self.budget, self.smooth = tuple(patch), budget, smooth
        self.replacement, self.control = replacement, control

    def look(self, scenes: Scenes, draws: Draws | None = None) -> Look:
        """Patches drawn by ``draws``, or where it is omitted those of most attention.

        Raises:
            InputError: fewer locations than the budget.
        """
        maps = self.maps(scenes.views)
        flat = maps.flatten(2)
        if self.budget > flat.shape[2]:
            grid = f"{flat.shape[2]}, those of a {maps.shape[2]} x {maps.shape[3]} map"
            raise InputError(f"--patches of at most {grid}", f"{self.budget}", "lower it, or enlarge --view")
        seen, boxes = [], []
        for number in range(flat.shape[1]):
            attention = flat[:, number]
            chosen = self._chosen(attention, None if draws is None else draws(number))
            places = self.boxes(chosen.indices, maps, scenes)
            seen.append(expected_features(attention, chosen, self._seen(places, scenes), control=self.control))
            boxes.append(places)
        outputs = self.classifier(torch.cat(seen, 1))
        return Look(outputs, entropy(flat).mean(1), list(maps.detach()), list(torch.cat(boxes, 1)))

    def exact(self, scenes: Scenes) -> Tensor:
        """Outputs by the features of **all** locations: what training estimates, and its reference."""
        maps = self.maps(scenes.views)
        every = torch.arange(maps[0, 0].numel()).expand(len(maps), -1)
        features = self._seen(self.boxes(every, maps, scenes), scenes)
        return self.classifier(torch.cat([expectation(one, features) for one in maps.flatten(2).unbind(1)], 1))

    def maps(self, views: Tensor) -> Tensor:
        """Attention [batch, maps, h', w'], each map a distribution; float32 or wider."""
        logits = self.attention(views)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(2)
        return smoothed(wide.softmax(2), self.smooth).view(logits.shape)

    def boxes(self, indices: Tensor, maps: Tensor, scenes: Scenes) -> Tensor:
        """Boxes [batch, n, 4] of the first patch size around locations [batch, n], on the CPU."""
        grid, view = (maps.shape[2], maps.shape[3]), (scenes.views.shape[2], scenes.views.shape[3])
        trim = int(getattr(self.attention, "trim", 0))
        return location_boxes(indices.cpu(), grid, view, scenes.sizes, patch=self.patch[0], trim=trim)

    def _chosen(self, attention: Tensor, generators: Sequence[torch.Generator] | None) -> Locations:
        """One draw a row: an image's patches depend on its own generator, not on who shares its batch."""
        if generators is None:
            return top_locations(attention, self.budget)
        drawn = [
            sample_locations(row[None], self.budget, replacement=self.replacement, generator=generator)
            for row, generator in zip(attention, generators, strict=True)
        ]
        indices, weights = torch.cat([one.indices for one in drawn]), torch.cat([one.weights for one in drawn])
        return Locations(indices, weights, self.replacement)

    def _seen(self, boxes: Tensor, scenes: Scenes) -> Tensor:
        """Features [batch, n, sizes * dim] of the patches at ``boxes`` and of what lies around them.

        Of equal norms, for which sampling by attention alone has the least variance; and of root mean square 1, on
        which a fresh classifier learns many times sooner than on norm 1.
        """
        found = [_features_at(self.features, scenes, [around(row, side) for row in boxes]) for side in self.patch]
        features = torch.cat(found, 1)
        unit = functional.normalize(features, dim=1) * math.sqrt(features.shape[1])
        return unit.unflatten(0, boxes.shape[:2])


class WholeNet(_Model):
    """The feature network over the view, which is the whole image."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def look(self, scenes: Scenes, draws: Draws | None = None) -> Look:
        outputs = self.classifier(self.features(scenes.views))
        return Look(outputs, outputs.new_zeros(len(outputs)), [], [])


class AbmilNet(_Model):
    """Gated attention pooling over the features of all patches, side by side (Ilse et al. 2018, equation 9).

    Args:
        features: patches [n, C, side, side] -> [n, dim].
        classifier: [batch, dim] -> outputs.
        dim: width of the features.
        patch: side in pixels.
        shown: boxes of most attention that `look` tells.
    """

    def __init__(self, features: nn.Module, classifier: nn.Module, *, dim: int, patch: int, shown: int) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier
        self.value, self.gate = nn.Linear(dim, _HIDDEN), nn.Linear(dim, _HIDDEN)
        self.score = nn.Linear(_HIDDEN, 1)
        self.patch, self.shown = patch, shown

    def look(self, scenes: Scenes, draws: Draws | None = None) -> Look:
        pooled, spread, attention, boxes = [], [], [], []
        for row, (width, height) in enumerate(scenes.sizes.tolist()):
            every, grid = tiles((width, height), self.patch)
            features = _features_of_row(self.features, scenes.read, row, every)
            weights = self._weights(features)
            pooled.append(weights @ features.to(weights))
            spread.append(entropy(weights))
            attention.append(weights.detach().view(1, *grid))
            best = weights.detach().argsort(descending=True, stable=True)[: self.shown]
            boxes.append(every[best.cpu()])
        return Look(self.classifier(torch.stack(pooled)), torch.stack(spread), attention, boxes)

    def _weights(self, features: Tensor) -> Tensor:
        """Attention over patches [n], float32 or wider, from their features [n, dim]."""
        scores = self.score(torch.tanh(self.value(features)) * torch.sigmoid(self.gate(features)))[:, 0]
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(0)


def _features_at(network: nn.Module, scenes: Scenes, boxes: Sequence[Tensor]) -> Tensor:
    """Features of the patches of all rows, one after another."""
    if torch.is_grad_enabled():
        return network(torch.cat([scenes.read(row, places) for row, places in enumerate(boxes)]))
    return torch.cat([_features_of_row(network, scenes.read, row, places) for row, places in enumerate(boxes)])


def _features_of_row(network: nn.Module, read: Read, row: int, boxes: Tensor) -> Tensor:
    """The same of one image; with nothing to keep for a backward pass, few patches at a time."""
    parts = boxes.split(len(boxes) if torch.is_grad_enabled() else _AT_ONCE)
    return torch.cat([network(read(row, part)) for part in parts])
