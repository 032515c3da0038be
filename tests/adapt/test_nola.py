"""NOLA against the paper's formula, basis by basis; what starts how, and what is trained."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from scrimp.adapt import attach_, basis, independent, nola, orthogonal
from scrimp.adapt.basis import signs
from scrimp.adapt.combine import orthogonal_basis
from scrimp.adapt.nola import Nola, NolaFactors
from scrimp.adapt.quantize import fake_quantize
from scrimp.primitives.errors import InputError

SHAPES = [(5, 7), (12, 3), (1, 9), (16, 16)]


def made(method: Nola, shapes: list[tuple[int, int]] | None = None, seed: int = 0) -> list[NolaFactors]:
    """Factors in float64 with numbers unlike those of the start."""
    factors = method.factors(shapes or SHAPES)
    generator = torch.Generator().manual_seed(seed)
    for part in factors:
        part.double()
        for number in part.parameters():
            number.data.copy_(torch.randn(number.shape, generator=generator, dtype=torch.float64))
    return factors  # type: ignore[return-value]


def one_basis(method: Nola, index: int, count: int, bases: int, stream: int) -> Tensor:
    if method.kind == "independent":
        return basis(method.seed, index, (count,), stream=stream, dtype=torch.float64)
    return orthogonal_basis(method.seed, index, count, bases=bases, stream=stream).double()


def summed(method: Nola, numbers: Tensor, count: int, stream: int) -> Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for index, number in enumerate(numbers):
        total = total + number * one_basis(method, index, count, len(numbers), stream) / math.sqrt(len(numbers))
    return total


def delta(method: Nola, numbers: tuple[Tensor, Tensor], shape: tuple[int, int], place: int) -> Tensor:
    """``c / r  B A`` as the paper has it, with A_0 as this library has it."""
    out, inn = shape
    start = signs(method.seed, 2, method.rank * inn, stream=2 * place).double() / math.sqrt(3 * inn)
    a = (start + summed(method, numbers[0], method.rank * inn, 2 * place)).view(method.rank, inn)
    b = summed(method, numbers[1], method.rank * out, 2 * place + 1).view(out, method.rank)
    return method.alpha / method.rank * b @ a


METHODS = {
    "orthogonal": nola(3, 8, 11),
    "the paper's": nola(3, 8, 11, combine=independent),
    "scaled": nola(2, 4, 2**64 - 1, alpha=0.5),
    "a number of bases that is no power of two": nola(2, 13),
    "one basis": nola(1, 1),
    "more bases than some factors have entries": nola(2, 20),
    "more bases than any has": nola(2, 1000),
    "shared": nola(3, 8, 5, shared=True),
    "shared, more than some factors have entries": nola(1, 30, 5, shared=True),
    "shared, of the paper": nola(2, 6, shared=True, combine=independent),
    "without a cache": nola(3, 8, 11, cache_bytes=0),
}


@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_the_formulas(name: str) -> None:
    method = METHODS[name]
    factors = made(method)
    for place, (part, shape) in enumerate(zip(factors, SHAPES, strict=True)):
        owner = factors[0] if method.shared else part
        numbers = (owner.alpha, owner.beta)
        a, b = part()
        expected = delta(method, numbers, shape, place)
        assert (b @ a).shape == shape
        torch.testing.assert_close(b @ a, expected, atol=1e-12, rtol=1e-12)
        towards = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(shape)
        got = torch.autograd.grad(((b @ a) * towards).sum(), numbers)
        want = torch.autograd.grad((expected * towards).sum(), numbers)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_fake_quantised_training_uses_the_quantised_numbers_and_passes_the_gradient() -> None:
    method = nola(2, 8, 3, bits=3)
    for place, (part, shape) in enumerate(zip(made(method), SHAPES, strict=True)):
        numbers = tuple(fake_quantize(number, 3) for number in (part.alpha, part.beta))
        a, b = part()
        expected = delta(method, numbers, shape, place)  # type: ignore[arg-type]
        torch.testing.assert_close(b @ a, expected, atol=1e-12, rtol=1e-12)
        assert (expected - delta(method, (part.alpha, part.beta), shape, place)).abs().max() > 1e-3
        got = torch.autograd.grad((b @ a).sum(), list(part.parameters()))
        want = torch.autograd.grad(expected.sum(), list(part.parameters()))
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_starts_as_the_identity_and_gradient_reaches_beta_first(bits: int | None, shared: bool) -> None:
    for part in nola(4, 8, bits=bits, shared=shared).factors([(6, 10), (4, 6)]):
        a, b = part()
        assert not bool(b.any())
        assert bool(a.all())
        owner = part._owner[0] or part  # type: ignore[union-attr, index]
        owner.zero_grad()  # type: ignore[union-attr, operator]
        ((b @ a) * torch.linspace(-1, 2, b.shape[0] * a.shape[1]).view(b.shape[0], -1)).sum().backward()
        assert bool(owner.beta.grad.any())  # type: ignore[union-attr]
        assert not bool(owner.alpha.grad.any())  # type: ignore[union-attr]


def test_the_first_a_has_the_variance_of_a_linears_start() -> None:
    (part,) = nola(8, 4, 1).factors([(4, 300)])
    a, _ = part()
    kaiming = nn.init.kaiming_uniform_(torch.empty(8, 300), a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert a.abs().unique().numel() == 1
    assert a.std().item() == pytest.approx(kaiming.std().item(), rel=0.05)
    assert abs(a.mean().item()) < 0.1 * a.std().item()


def test_seeds_and_places_are_independent() -> None:
    shapes = [(24, 24), (24, 24)]
    one, other = made(nola(4, 64, 1), shapes), made(nola(4, 64, 2), shapes)
    same = made(nola(4, 64, 1), shapes)
    other[0].load_state_dict(one[0].state_dict())
    one[1].load_state_dict(one[0].state_dict())
    same[0].load_state_dict(one[0].state_dict())
    for left, right in zip(one[0](), same[0](), strict=True):
        assert torch.equal(left, right)
    for stranger in (other[0], one[1]):
        for left, right in zip(one[0](), stranger(), strict=True):
            assert abs(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()) < 0.35
    a, b = one[0]()
    assert not torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize(
    ("method", "counted"),
    [
        (nola(2, 8), (8 + 8) + (6 + 8) + (8 + 2) + (8 + 8)),
        (nola(1, 8), (7 + 5) + (3 + 8) + (8 + 1) + (8 + 8)),
        (nola(4, 10**9), 4 * sum(map(sum, SHAPES))),
        (nola(4, 100, shared=True), 200),
    ],
)
def test_numbers_counted(method: Nola, counted: int) -> None:
    factors = method.factors(SHAPES)
    lengths = [number.numel() for part in factors for number in part.parameters()]
    assert sum(lengths) == counted
    assert method.lengths(SHAPES) == lengths


@pytest.mark.touches_global_rng
def test_shared_numbers_are_owned_once_and_survive_a_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    attach_(model, nola(2, 5, shared=True), where=r".")
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    trained = [name for name, parameter in copied.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    inputs = torch.ones(1, 4)
    assert (copied(inputs) - model(inputs)).abs().max() > 1e-3
    assert (copied[1](torch.ones(1, 6)) - model[1](torch.ones(1, 6))).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_half_precision_give_float32_factors(dtype: torch.dtype) -> None:
    (part,) = nola(2, 8).factors([(6, 5)])
    part.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = part()
    assert a.dtype == b.dtype == torch.float32


@pytest.mark.parametrize("combine", [orthogonal, independent])
def test_training_recovers_a_delta_it_can_express(combine: object) -> None:
    """Least squares on the weight itself: the loss all but vanishes where the target is a NOLA of the same bases."""
    method = nola(2, 16, 9, combine=combine)  # type: ignore[arg-type]
    target = made(method, [(8, 6)], seed=4)[0]
    wanted = (target()[1] @ target()[0]).detach() * 0.1
    (part,) = method.factors([(8, 6)])
    part.double()
    optimizer = torch.optim.LBFGS(part.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        a, b = part()
        loss: Tensor = (b @ a - wanted).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    first = closure().item()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert closure().item() < 1e-2 * first


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank at least 1"),
        ({"bases": 0}, "bases at least 1"),
        ({"seed": -1}, "seed in"),
        ({"seed": 2**64}, "seed in"),
        ({"alpha": math.inf}, "alpha finite"),
        ({"alpha": 0.0}, "alpha finite"),
        ({"bits": 5}, "bits 8, 4, 3, 2"),
        ({"bits": 16}, "bits 8, 4, 3, 2"),
        ({"combine": torch.add}, "combine scrimp.adapt"),
        ({"cache_bytes": -1}, "cache_bytes at least 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        nola(**settings)  # type: ignore[arg-type]
