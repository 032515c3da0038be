"""A training step of realistic size, for measuring what a method adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, RandomSampler

BATCH = 64
ROUND = 8  # steps in a pass over the data, so that every pass's planning is in every call measured


class Workload:
    """A small convnet (about 4 MFLOP a forward pass) on 512 images of 1 x 28 x 28 noise.

    Both sides of a comparison train the same tensors: two copies may lie differently in memory, which alone can be
    worth a percent. The learning rate is 0, so that the work stays the same however often it is done.
    """

    def __init__(self, *, seed: int = 0, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        count = BATCH * ROUND
        self.model = _network(generator).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.images = torch.randn(count, 1, 28, 28, generator=generator).to(device)
        self.labels = torch.randint(0, 10, (count,), generator=generator).to(device)
        self._order = generator

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self) -> Iterator[list[int]]:
        """Indices of shuffled batches without end, from torch's own samplers."""
        shuffled = RandomSampler(range(len(self)), generator=self._order)
        while True:
            yield from BatchSampler(shuffled, BATCH, drop_last=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches without end: images [64, 1, 28, 28] and labels [64]."""
        for rows in self.rows():
            yield self.images[rows], self.labels[rows]

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def plain(self) -> Iterator[None]:
        """The baseline: a shuffled loop, one step for each item taken."""
        for images, labels in self.batches():
            self.learn(functional.cross_entropy(self.model(images), labels))
            yield


def advance(stream: Iterator[object], steps: int) -> Callable[[], None]:
    """A call that takes ``steps`` items from an endless stream."""

    def call() -> None:
        for _ in range(steps):
            next(stream)

    return call


def _network(generator: torch.Generator) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which are replaced
        model = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, 10),
        )
    with torch.no_grad():
        for item in model.parameters():
            item.copy_(torch.randn(item.shape, generator=generator) / item[0].numel() ** 0.5)
    return model
