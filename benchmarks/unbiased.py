"""Importance sampling on real images: is its gradient unbiased, and is the bound in the order of the exact norms?

    python benchmarks/unbiased.py            # about a minute on one core

The built-in convnet is trained on the built-in images, by plain shuffled batches. Then every sample's own gradient over
all parameters is computed, in float64, for some training images and as many test images. The mean of the weighted
gradient is compared on the test images: on those it was trained on the mean gradient nearly vanishes beside its noise.

An unbiased mean still has the noise of its draws. It is known exactly from the gradients and printed beside the error.
A draw is large enough for it to be well below 1 %; with draws of one training batch it is not, and that error is
printed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from common import RECEIPTS, as_input, built_in_network, keep
from scrimp.compare.exact import deviation
from scrimp.data import ImageData, load_images
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.fit import make_optimizer, schedule
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.select import Record, Selection, gradient_norm_bound, history, importance_sample

BATCH = 64
CHUNK = 64  # samples whose gradients are computed together
REPLAYED = 5  # draws whose gradient is also taken by an ordinary backward pass


@dataclass(frozen=True)
class Unbiased:
    """Mean weighted gradient against the full batch's, and Spearman of bound and exact norms, on real images."""

    images: int = 500
    """Images of each kind whose exact gradients are computed: the full batch."""
    draws: int = 2000
    """Weighted gradients that are averaged."""
    draw_size: int = 4096
    """Images in each draw, repeats included."""
    passes: int = 4
    """Passes of training before."""
    seed: int = 0
    out: Path = RECEIPTS / "unbiased.json"


@dataclass(frozen=True)
class View:
    """Images, labels, the bound on each and its exact gradient, float64 [count, parameters]."""

    images: Tensor
    labels: Tensor
    bound: Tensor
    gradients: Tensor


def run(order: Unbiased) -> Receipt:
    torch.set_num_threads(1)
    data = load_images("builtin")
    model = trained(data, passes=order.passes, seed=order.seed)
    seen, unseen = (view(model, data, order, test=test) for test in (False, True))
    model.double()
    return Receipt(
        kind="benchmark",
        name="unbiased",
        way="importance sampling",
        seed=order.seed,
        quality={
            "spearman_training_images": spearman(seen.bound, seen.gradients.norm(dim=1)),
            "spearman_test_images": spearman(unseen.bound, unseen.gradients.norm(dim=1)),
            **mean_gradient(unseen, order),
            "backward_pass_against_its_sum": replayed(model, unseen, order),
        },
        config={**asdict(order), "out": None},
        notes={
            "data": data.name,
            "training images": len(data.train),
            "parameters": seen.gradients.shape[1],
            "test_accuracy": accuracy(model, data),
            "full batch": f"{len(unseen.labels)} test images",
            "images a draw": order.draw_size,
            "images a draw, one batch": BATCH,
            "draws": order.draws,
        },
    )


def trained(data: ImageData, *, passes: int, seed: int) -> nn.Module:
    """On shuffled batches, with the optimiser and the learning rates of `scrimp train`."""
    config, model = TrainConfig(), built_in_network(data, seed=seed)
    optimizer, steps = make_optimizer(model, config), passes * (len(data.train) // BATCH)
    rows = (item for number in range(passes) for item in shuffled(len(data.train), seed=seed, number=number))
    for step, chosen in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step / steps, config)
        images, labels = as_input(data, chosen)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def shuffled(count: int, *, seed: int, number: int) -> tuple[Tensor, ...]:
    order = torch.randperm(count, generator=generator_for(seed, number))
    return order[: count // BATCH * BATCH].split(BATCH)


def view(model: nn.Module, data: ImageData, order: Unbiased, *, test: bool) -> View:
    """A random part of a set as the network sees it; the bound in float32, as in use."""
    count = len(data.test if test else data.train)
    rows = torch.randperm(count, generator=generator_for(order.seed, 100 + test))[: order.images]
    images, labels = as_input(data, rows, test=test)
    with torch.no_grad():
        bound = gradient_norm_bound(model(images), labels)
    return View(images, labels, bound, sample_gradients(model, images.double(), labels))


def sample_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Each sample's cross-entropy gradient over all parameters, [count, parameters], float64."""
    weights = {name: value.detach().double() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    each: Callable[..., dict[str, Tensor]] = vmap(grad(loss), in_dims=(None, 0, 0))
    parts = [each(weights, *pair) for pair in zip(images.split(CHUNK), labels.split(CHUNK), strict=True)]
    return torch.cat([torch.cat([part[name].flatten(1) for name in weights], 1) for part in parts])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([item.argsort().argsort().double() for item in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_gradient(view: View, order: Unbiased) -> dict[str, float | None]:
    """How far the mean of many weighted gradients lies from the full batch's, relative to its norm; and its noise."""
    scores, gradients = view.bound, view.gradients
    plan, record = history(gate=1.0), Record(scores, torch.zeros(len(scores), dtype=torch.int64))
    probabilities = scores.double() / scores.double().sum()
    even = torch.full_like(probabilities, 1 / len(probabilities))

    def error(sampler: Callable[..., Selection], first: Any, size: int) -> float:
        draws = (sampler(first, size, generator=generator_for(order.seed, 200, turn)) for turn in range(order.draws))
        return error_of_mean(gradients, draws, count=order.draws)

    def noise(probabilities: Tensor, size: int) -> float:
        return deviation(gradients, probabilities, size) / order.draws**0.5

    return {
        "mean_gradient_error": error(importance_sample, scores, order.draw_size),
        "mean_gradient_noise": noise(probabilities, order.draw_size),
        "mean_gradient_error_history": error(plan, record, order.draw_size),
        "mean_gradient_noise_uniform": noise(even, order.draw_size),
        "mean_gradient_error_one_batch": error(importance_sample, scores, BATCH),
        "mean_gradient_noise_one_batch": noise(probabilities, BATCH),
    }


def error_of_mean(gradients: Tensor, draws: Iterable[Selection], *, count: int) -> float:
    """Relative distance of the weighted draws' mean gradient from the mean over all samples.

    A weighted batch's gradient is the sum of its samples' own gradients times their weights, so none is computed anew.
    """
    mean, shares = gradients.mean(0), torch.zeros(len(gradients), dtype=torch.float64)
    for chosen in draws:
        shares.index_add_(0, chosen.indices, chosen.weights.double() / (count * len(chosen)))
    return float((shares @ gradients - mean).norm() / mean.norm())


def replayed(model: nn.Module, view: View, order: Unbiased) -> float:
    """Largest relative difference of a weighted batch's backward pass from the sum over its samples' own gradients."""
    worst = 0.0
    for number in range(REPLAYED):
        chosen = importance_sample(view.bound, BATCH, generator=generator_for(order.seed, 200, number))
        weights = chosen.weights.double()
        losses = functional.cross_entropy(
            model(view.images[chosen.indices].double()), view.labels[chosen.indices], reduction="none"
        )
        parts = torch.autograd.grad((weights * losses).mean(), list(model.parameters()))
        ours, summed = torch.cat([item.flatten() for item in parts]), weights @ view.gradients[chosen.indices]
        worst = max(worst, float((ours - summed / len(weights)).norm() / ours.norm()))
    return worst


def accuracy(model: nn.Module, data: ImageData) -> float:
    """Of a float64 model on the whole test set."""
    right = 0
    with torch.no_grad():
        for part in torch.arange(len(data.test)).split(500):
            images, labels = as_input(data, part, test=True)
            right += int((model(images.double()).argmax(1) == labels).sum())
    return right / len(data.test)


def main() -> None:
    order = tyro.cli(Unbiased)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
