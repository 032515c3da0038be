"""Training steps of a small network without labels, for measuring one way of learning beside another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scrimp.primitives.draw import generator_for
from scrimp.represent import (
    EmbeddingCache,
    Memory,
    byol_loss,
    constrained_mean_shift_loss,
    earlier_views,
    follow_,
    logit_distillation_loss,
    mean_shift_loss,
    predictor,
    projector,
    regression_head,
    regression_loss,
    target_of,
)

BATCH, MEMORY, DIM, CLASSES = 64, 4096, 32, 100


class Pretraining:
    """One step on two views of 64 images of 3 x 32 x 32 noise, by mean shift, constrained mean shift or BYOL.

    All train the same tensors, as the sides of a comparison must. Nothing is updated but the target, the memories and
    the statistics of normalisation, so that the work stays the same however often it is done. The memories and the
    cache are full from the start, as they are in all epochs but the first.
    """

    def __init__(self, *, seed: int = 0, device: str = "cpu") -> None:
        generator = generator_for(seed)
        self.views = [torch.randn(BATCH, 3, 32, 32, generator=generator).to(device) for _ in range(2)]
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which are replaced
            self.online = nn.Sequential(_encoder(32), projector(128, dim=DIM))
            self.predict = predictor(DIM)
        for part in (self.online, self.predict):
            _redraw_(part, generator)
            part.to(device)
        self.target = target_of(self.online)
        self.memory, self.before = (Memory(MEMORY, DIM, device=device) for _ in range(2))
        for memory in (self.memory, self.before):
            memory.push_(torch.randn(MEMORY, DIM, generator=generator).to(device))
        self.cache, self.indices = EmbeddingCache(BATCH, DIM), torch.arange(BATCH)
        self.cache.write_(self.indices, torch.randn(BATCH, DIM, generator=generator))

    def mean_shift(self) -> None:
        """One forward pass of the target, one forward and backward pass of the online network."""
        follow_(self.target, self.online)
        target = self._embed(self.views[0])
        self.memory.push_(target)
        self._learn(mean_shift_loss(self._online(self.views[1]), target, self.memory, k=5))

    def constrained(self) -> None:
        """As mean shift; the earlier views come from the cache, which takes up the present ones."""
        follow_(self.target, self.online)
        target, earlier = self._embed(self.views[0]), self.cache.read(self.indices, device=self.views[0].device)
        self.memory.push_(target)
        self.before.push_(earlier)
        constraint = earlier_views(earlier, self.before)
        self._learn(
            constrained_mean_shift_loss(self._online(self.views[1]), target, self.memory, constraint=constraint, k=5)
        )
        self.cache.write_(self.indices, target)

    def byol(self) -> None:
        """Both views through both networks, each prediction held against the other view's target."""
        follow_(self.target, self.online)
        one, two = (self._embed(view) for view in self.views)
        self._learn((byol_loss(self._online(self.views[0]), two) + byol_loss(self._online(self.views[1]), one)) / 2)

    def _online(self, images: Tensor) -> Tensor:
        prediction: Tensor = self.predict(self.online(images))
        return prediction

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.target(images)
        return embedding

    def _learn(self, loss: Tensor) -> None:
        for part in (self.online, self.predict):
            part.zero_grad()
        loss.backward()


class Distillation:
    """One step of a student on 64 images of 3 x 32 x 32 noise, under a teacher twice as wide."""

    def __init__(self, *, seed: int = 0, device: str = "cpu") -> None:
        generator = generator_for(seed)
        self.images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device)
        with torch.random.fork_rng(devices=[]):
            self.teacher, self.student = _encoder(64), _encoder(32)
            self.head = regression_head(128, 256)
            self.judge, self.classify = nn.Linear(256, CLASSES), nn.Linear(128, CLASSES)
        for part in (self.teacher, self.student, self.head, self.judge, self.classify):
            _redraw_(part, generator)
            part.to(device)
        self.teacher.eval()

    def regression(self) -> None:
        """The teacher's features, through the throw-away head."""
        with torch.no_grad():
            features = self.teacher(self.images)
        self._learn(regression_loss(self.head(self.student(self.images)), features))

    def logits(self) -> None:
        """The logits of the teacher's classifier."""
        with torch.no_grad():
            logits = self.judge(self.teacher(self.images))
        self._learn(logit_distillation_loss(self.classify(self.student(self.images)), logits))

    def _learn(self, loss: Tensor) -> None:
        for part in (self.student, self.head, self.classify):
            part.zero_grad()
        loss.backward()


def _encoder(width: int) -> nn.Sequential:
    """Three convolutions with batch normalisation: [n, 3, 32, 32] -> [n, 4 * width]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@torch.no_grad()
def _redraw_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights from the seed; biases and normalisation as they are made, but no bias that was drawn."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
            if layer.bias is not None:
                layer.bias.zero_()
