"""Adam for what was seen: the kernel against float64 loops and its twin, a whole model against torch's own Adam."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from splat_scenes import scene
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats import adam
from scrimp.splats.adam import AdamField, sparse_adam_, sparse_adam_twin_
from scrimp.splats.optimise import Model

SHAPES = ((3,), (4,), (), (15, 3), (0, 3), (7,))


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module, its instruction set put back afterwards."""
    module = native.load()
    if module is None or not hasattr(module, "splat_adam"):
        pytest.skip("the native library is not built here")
    chosen = module.capabilities()["simd"]
    yield module
    module.set_simd(chosen)


def fields(count: int, dtype: torch.dtype = torch.float32) -> list[AdamField]:
    draw = torch.Generator().manual_seed(count)

    def some(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(count, *shape, generator=draw).to(dtype)

    return [AdamField(some(s), some(s), some(s), some(s).square(), 1e-3 * (i + 1)) for i, s in enumerate(SHAPES)]


def seen_of(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.4


def numbers(found: list[AdamField]) -> list[Tensor]:
    return [part for field in found for part in (field.values, field.first, field.second)]


def by_loops(found: list[AdamField], seen: Tensor, steps: tuple[int, ...]) -> list[list[float]]:
    """Kingma and Ba's algorithm 1, number by number: values, first and second moments of each field."""
    results = []
    for field in found:
        parts = [part.flatten().tolist() for part in (field.values, field.pull, field.first, field.second)]
        values, pull, first, second = parts
        for i in range(len(values)):
            for t in steps if seen[i * len(seen) // len(values)] else ():
                first[i] = 0.9 * first[i] + 0.1 * pull[i]
                second[i] = 0.999 * second[i] + 0.001 * pull[i] ** 2
                mean, square = first[i] / (1 - 0.9**t), second[i] / (1 - 0.999**t)
                values[i] -= field.rate * mean / (square**0.5 + 1e-15)
        results += [values, first, second]
    return results


def test_the_twin_is_the_algorithm_by_loops() -> None:
    found, seen = fields(9, torch.float64), seen_of(9)
    exact = by_loops(found, seen, (1, 2, 40))
    for updates in (1, 2, 40):
        sparse_adam_(found, seen, updates)  # float64: the twin
    assert 0 < int(seen.sum()) < 9
    for mine, right in zip(numbers(found), exact, strict=True):
        assert mine.flatten().tolist() == pytest.approx(right, abs=1e-14, rel=1e-12)


@pytest.mark.parametrize("count", [0, 1, 7, 1100])
def test_the_kernel_is_its_twin_on_every_processor_and_leaves_the_unseen(kernels: ModuleType, count: int) -> None:
    seen, results = seen_of(count), []
    before, exact = fields(count), fields(count, torch.float64)
    for updates in (1, 2, 300):
        sparse_adam_twin_(exact, seen, updates)
    for level in ("generic", "avx2", "avx57", "neon"):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        found = fields(count)
        for updates in (1, 2, 300):
            sparse_adam_(found, seen, updates)
        results.append(numbers(found))
    for first, mine, right, was in zip(results[0], results[-1], numbers(exact), numbers(before), strict=True):
        assert torch.equal(first, mine)
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-5, check_dtype=False)
        assert torch.equal(mine[~seen], was[~seen])
        assert not mine.numel() or not seen.any() or not torch.equal(mine[seen], was[seen])


def test_the_same_bits_whatever_the_threads(kernels: ModuleType) -> None:
    chosen, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found = fields(3000)
        sparse_adam_(found, seen_of(3000), 1)
        results.append(numbers(found))
    torch.set_num_threads(chosen)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def stepped(model: Model, steps: int, seen: Tensor | None) -> None:
    rates = dict.fromkeys(model.leaves, 1e-2)
    for _ in range(steps):
        parts = [(leaf * leaf.detach().cos()).sum() for leaf in model.leaves.values()]
        torch.stack(parts).sum().backward()
        model.update_(rates, seen)


def test_where_all_are_seen_it_is_torchs_adam() -> None:
    sparse, dense = Model(scene(33, 2), sparse=True), Model(scene(33, 2))
    stepped(sparse, 12, torch.ones(33, dtype=torch.bool))
    stepped(dense, 12, None)
    state = dense.state_dict()
    for name, values in sparse.state_dict().items():
        torch.testing.assert_close(values, state[name], atol=1e-6, rtol=1e-6)
    assert not torch.equal(dense.detached().means, scene(33, 2).means)


def test_a_sparse_model_resumes_to_the_same_bits_while_gaussians_come_and_go() -> None:
    def change(model: Model) -> None:
        model.append_(scene(5, 1, seed=9))
        model.set_(torch.tensor([2, 40]), scene(2, 1, seed=8))
        model.take_(torch.arange(1, 43))

    whole = Model(scene(40, 1), sparse=True)
    stepped(whole, 3, seen_of(40))
    change(whole)
    resumed = Model(scene(3, 1), sparse=True)
    # Strides are no part of a state: one that comes back in another order of memory is the same.
    turned = {name: v.t().contiguous().t() if v.dim() == 2 else v for name, v in whole.state_dict().items()}
    resumed.load_state_dict(turned)
    for model in (whole, resumed):
        stepped(model, 3, seen_of(42))
    state, other = whole.state_dict(), resumed.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert int(state["updates"]) == 6
    assert all(leaf.grad is None for leaf in whole.leaves.values())


def test_a_sparse_model_must_know_what_was_seen() -> None:
    model = Model(scene(4), sparse=True)
    for wrong in (None, torch.ones(4), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"seen, bool \[4\]"):
            model.update_({}, wrong)


def test_gsplat_gets_the_moments_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Selective:
        """What gsplat's optimiser is and does: torch's state by leaf, no correction of the moments."""

        def __init__(self, params: list[dict[str, Any]], eps: float, betas: tuple[float, float]) -> None:
            self.groups, self.eps, self.betas = params, eps, betas
            self.state: dict[Tensor, dict[str, Tensor]] = {}

        @torch.no_grad()
        def step(self, visibility: Tensor) -> None:
            ((leaf,), rate) = self.groups[0]["params"], self.groups[0]["lr"]
            first, second, pull = self.state[leaf]["exp_avg"], self.state[leaf]["exp_avg_sq"], leaf.grad
            assert pull is not None
            first[visibility] = self.betas[0] * first[visibility] + (1 - self.betas[0]) * pull[visibility]
            second[visibility] = self.betas[1] * second[visibility] + (1 - self.betas[1]) * pull[visibility].square()
            leaf[visibility] -= rate * (first[visibility] / (second[visibility].sqrt() + self.eps))

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(SelectiveAdam=Selective))
    found, right, seen = fields(11)[:4], fields(11)[:4], seen_of(11)
    for updates in (1, 2, 9):
        adam._by_gsplat(found, seen, updates)
        sparse_adam_twin_(right, seen, updates)
    for mine, exact in zip(numbers(found), numbers(right), strict=True):
        assert torch.equal(mine.detach(), exact)
