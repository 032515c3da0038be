"""Heads: their layers, what they do in training and in use, and whether they really bend what they map."""

from __future__ import annotations

import copy

import pytest
import torch
from represent_reference import draws
from torch import nn

from scrimp.primitives.errors import InputError
from scrimp.represent import predictor, projector, regression_head


def made(make, *arguments, **options) -> nn.Module:
    """Layers draw their first weights from the global generator; not here."""
    with torch.random.fork_rng(devices=[]):
        return make(*arguments, **options)


def widths(head: nn.Module) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("make", "arguments", "options", "expected"),
    [
        (projector, (64,), {}, [(64, 128), (128, 16)]),
        (projector, (3,), {}, [(3, 6), (6, 1)]),
        (projector, (64,), {"hidden": 10, "dim": 7}, [(64, 10), (10, 7)]),
        (predictor, (16,), {}, [(16, 128), (128, 16)]),
        (predictor, (16,), {"hidden": 5}, [(16, 5), (5, 16)]),
        (regression_head, (6, 10), {}, [(6, 12), (12, 6), (6, 12), (12, 10)]),
        (regression_head, (6, 10), {"layers": 3}, [(6, 12), (12, 6), (6, 10)]),
        (regression_head, (6, 10), {"layers": 2}, [(6, 12), (12, 10)]),
        (regression_head, (6, 10), {"layers": 1}, [(6, 10)]),
        (regression_head, (6, 6), {"layers": 0}, []),
    ],
)
def test_widths_and_what_stands_between(make, arguments, options, expected) -> None:
    head = made(make, *arguments, **options)
    assert widths(head) == expected
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == (["Linear", "BatchNorm", "ReLU"] * len(expected))[:-2] if expected else kinds == ["Identity"]
    out = head(draws(4, arguments[0], dtype=torch.float32))
    assert out.shape == (4, expected[-1][1] if expected else arguments[1])


def bends(head: nn.Module, features: int) -> float:
    """How far the head is from f(a) - f(b) = f(a + c) - f(b + c), which every affine map keeps."""
    head = head.eval().double()
    a, b, c = (draws(50, features, seed=seed) for seed in range(3))
    with torch.no_grad():
        return float((head(a) - head(b) - head(a + c) + head(b + c)).abs().max())


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_every_head_of_two_layers_or_more_is_no_linear_map(layers: int) -> None:
    assert bends(made(regression_head, 6, 10, layers=layers), 6) > 1e-2


@pytest.mark.parametrize("layers", [0, 1])
def test_a_head_of_one_layer_is_linear_and_of_none_the_identity(layers: int) -> None:
    head = made(regression_head, 6, 6, layers=layers)
    assert bends(head, 6) < 1e-12
    x = draws(3, 6)
    assert torch.equal(head(x), x) == (layers == 0)


def test_each_layer_adds_a_bend() -> None:
    """Without one of its ReLUs the map changes: none of them is idle."""
    head = made(regression_head, 6, 10, layers=4).eval()
    x = draws(50, 6, dtype=torch.float32)
    for number, layer in enumerate(head):
        if isinstance(layer, nn.ReLU):
            without = copy.deepcopy(head)
            without[number] = nn.Identity()
            assert float((without(x) - head(x)).abs().max().detach()) > 1e-3


@pytest.mark.parametrize(("make", "width"), [(projector, 8), (predictor, 8), (lambda n: regression_head(n, 5), 8)])
def test_use_moves_no_statistics_and_training_does(make, width: int) -> None:
    head = made(make, width)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    x = draws(6, width, dtype=torch.float32)
    head.eval()
    first = head(x)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    torch.testing.assert_close(head(x[:1]), first[:1])  # one image at a time is fine in use
    head.train()
    head(x)
    assert not torch.equal(head[1].running_mean, before["1.running_mean"])


def test_the_input_is_left_alone() -> None:
    x = draws(6, 8, dtype=torch.float32)
    made(projector, 8)(x)
    assert torch.equal(x, draws(6, 8, dtype=torch.float32))


@pytest.mark.parametrize("make", [projector, predictor, lambda n: regression_head(n, 3, layers=2)])
def test_a_batch_of_one_is_refused_by_name_in_training(make) -> None:
    head = made(make, 4)
    with pytest.raises(InputError, match="a batch of 2 images or more in training; got 1; raise the batch size"):
        head(torch.ones(1, 4))
    assert made(regression_head, 4, 3, layers=1)(torch.ones(1, 4)).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: projector(0), "each at least 1; got"),
        (lambda: projector(8, hidden=0), "each at least 1; got"),
        (lambda: projector(8, dim=0), "each at least 1; got"),
        (lambda: predictor(0), "each at least 1; got"),
        (lambda: predictor(4, hidden=0), "each at least 1; got"),
        (lambda: regression_head(4, 0), "each at least 1; got"),
        (lambda: regression_head(4, 5, layers=-1), "0 layers or more; got -1"),
        (lambda: regression_head(4, 5, layers=0), "equally wide student and teacher .*; got 4 and 5; use 1 layer"),
    ],
)
def test_widths_and_layers_out_of_range(make, said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(make)
