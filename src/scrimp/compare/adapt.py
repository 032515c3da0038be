"""Fine-tuning with few numbers: bases summed one by one as reference, LoRA as baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scrimp.adapt import attach_, independent, lora, nola, orthogonal
from scrimp.adapt.basis import basis, signs
from scrimp.adapt.combine import orthogonal_basis
from scrimp.adapt.nola import Nola
from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.primitives.draw import generator_for

Combine = Callable[..., Tensor]
_KEY = 2**63 + 11  # a seed that needs all 64 bits
_SIZES = ((5, 24), (16, 64), (37, 100), (64, 33))  # bases and entries: even, odd, more bases than entries
_RANK, _OUT, _IN, _BASES = 3, 20, 14, 9
_WIDTH, _DEPTH, _TOKENS = 192, 4, 256


def check(
    *,
    seed: int = 0,
    orthogonal: Combine = orthogonal,
    independent: Combine = independent,
    method: Callable[..., Nola] = nola,
) -> list[Finding]:
    """Hold both kinds of combinations, and a layer's delta, against bases made and added one by one in float64."""
    found = []
    for bases, count in _SIZES:
        numbers = torch.randn(bases, generator=generator_for(seed, bases)).requires_grad_()
        for kind, combine, one in (
            ("orthogonal", orthogonal, _orthogonal_one(bases)),
            ("independent", independent, _independent_one),
        ):
            ours = combine(numbers, count, seed=_KEY, stream=3)
            theirs = _one_by_one(numbers, count, 3, one)
            found += _agree(f"{kind}, {bases} bases of {count}", ours, theirs, [numbers])
    return [*found, *_check_delta(seed, method)]


def sides(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """One training step of the same frozen layers: 128 numbers a layer, or LoRA of the same rank, 4."""
    return Sides(_Step(nola(4, 64), seed, device), _Step(lora(4), seed, device), repeats=repeats)


class _Step:
    """Four frozen perceptrons of a ViT-Ti with adapters on every layer: forward and backward of 256 tokens."""

    def __init__(self, method: object, seed: int, device: str) -> None:
        generator = generator_for(seed)
        parts: list[nn.Module] = []
        for _ in range(_DEPTH):
            parts += [_layer(_WIDTH, 4 * _WIDTH, generator), nn.GELU(), _layer(4 * _WIDTH, _WIDTH, generator)]
        self.model = nn.Sequential(*parts).to(device)
        self.tokens = torch.randn(_TOKENS, _WIDTH, generator=generator).to(device)
        attach_(self.model, method)  # type: ignore[arg-type]

    def __call__(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model(self.tokens).square().mean().backward()


def _layer(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(std=inputs**-0.5, generator=generator)
        layer.bias.zero_()
    return layer


def _check_delta(seed: int, method: Callable[..., Nola]) -> list[Finding]:
    """``delta = (alpha / rank) B A`` of the second adapted layer, after its numbers have left zero."""
    layers = nn.Sequential(_layer(6, _IN, generator_for(seed, 1)), _layer(_IN, _OUT, generator_for(seed, 2)))
    attach_(layers, method(_RANK, _BASES, _KEY, alpha=2.0, combine=independent))
    factors: nn.Module = layers[1].adapter.factors  # type: ignore[union-attr,assignment]
    start = float((factors()[1] @ factors()[0]).detach().abs().max())
    with torch.no_grad():
        for stream, numbers in enumerate(factors.parameters()):
            numbers.copy_(torch.randn(numbers.shape, generator=generator_for(seed, 3, stream)))
    a, b = factors()
    leaves: list[Tensor] = list(factors.parameters())
    return [
        at_most("delta of a layer: at the start", start, 0),
        *_agree("delta of a layer", (b @ a).flatten(), _delta(*leaves).flatten(), leaves),
    ]


def _delta(alpha: Tensor, beta: Tensor) -> Tensor:
    """The paper's formula, streams 2 and 3 being those of the second layer."""
    first = signs(_KEY, 2, _RANK * _IN, stream=2).double() * (3 * _IN) ** -0.5
    a = first + _one_by_one(alpha, _RANK * _IN, 2, _independent_one) * _BASES**-0.5
    b = _one_by_one(beta, _RANK * _OUT, 3, _independent_one) * _BASES**-0.5
    return 2.0 / _RANK * b.view(_OUT, _RANK) @ a.view(_RANK, _IN)


def _one_by_one(numbers: Tensor, count: int, stream: int, one: Callable[[int, int, int], Tensor]) -> Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for index, number in enumerate(numbers.double()):
        total = total + number * one(index, count, stream).double()
    return total


def _independent_one(index: int, count: int, stream: int) -> Tensor:
    return basis(_KEY, index, (count,), stream=stream)


def _orthogonal_one(bases: int) -> Callable[[int, int, int], Tensor]:
    return lambda index, count, stream: orthogonal_basis(_KEY, index, count, bases=bases, stream=stream)


def _agree(what: str, ours: Tensor, theirs: Tensor, leaves: list[Tensor], *, bound: float = 2e-5) -> list[Finding]:
    """Largest errors of values, and of the gradients of an uneven sum of them."""
    weights = torch.linspace(0.5, 2, len(theirs), dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    gradients = [torch.autograd.grad((item * weights).sum(), leaves) for item in (ours, theirs)]
    worst = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    value = float((ours.detach() - theirs.detach()).abs().max())
    return [at_most(f"{what}: values", value, bound), at_most(f"{what}: gradients", worst, bound)]
