"""Memory of tensors: exact against sizes worked out by hand, the same on every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from scrimp.meter import saved_bytes
from scrimp.meter.memory import peak_and_saved, peak_bytes

FLOAT = 4


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mlp():
    with torch.random.fork_rng():
        return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


class TestSaved:
    def test_activations_once_each_and_no_parameters(self, mlp):
        x = images(8, 10)
        # The input (for the first weight), and the hidden layer, which ReLU and the second weight share.
        reading = saved_bytes(lambda: mlp(x).sum().backward())
        assert (reading.value, reading.missed) == (8 * (10 + 20) * FLOAT, ())

    def test_frozen_parameters_are_no_activations(self, mlp):
        mlp.requires_grad_(False)
        x = images(8, 10).requires_grad_()
        # Frozen weights need no inputs kept; ReLU keeps its output. The weights themselves are parameters.
        assert saved_bytes(lambda: mlp(x).sum().backward()).value == 8 * 20 * FLOAT

    def test_parameters_made_during_the_call_are_none_either(self):
        x = images(8, 10).requires_grad_()
        weight = torch.ones(5, 10)
        assert saved_bytes(lambda: F.linear(x, nn.Parameter(weight))).value == 8 * 10 * FLOAT

    def test_views_of_one_storage_count_once(self):
        x = images(6, 7).requires_grad_()
        assert saved_bytes(lambda: (x[:3].sin() + x[3:].cos() + x.view(2, 21)[0].exp().sum()).sum()).value == (
            6 * 7 * FLOAT + 21 * FLOAT  # x itself; and the output that exp keeps
        )

    def test_without_gradients_nothing_is_kept(self, mlp):
        with torch.no_grad():
            assert saved_bytes(lambda: mlp(images(8, 10))).value == 0

    def test_steps_one_after_another_keep_no_more_than_one(self, mlp):
        x = images(8, 10)

        def steps():
            for _ in range(3):
                mlp(x).sum().backward()

        assert saved_bytes(steps).value == 8 * (10 + 20) * FLOAT

    def test_losses_held_together_add_up(self, mlp):
        x, y = images(8, 10), images(8, 10)
        assert saved_bytes(lambda: (mlp(x).sum() + mlp(y).sum()).backward()).value == 2 * 8 * (10 + 20) * FLOAT

    def test_checkpointing_keeps_less(self, mlp):
        x = images(8, 10).requires_grad_()
        kept = saved_bytes(lambda: checkpoint(mlp, x, use_reentrant=False).sum().backward()).value
        assert 0 < kept < saved_bytes(lambda: mlp(x).sum().backward()).value

    def test_gradients_are_those_of_an_unwatched_call(self, mlp):
        x = images(8, 10)
        mlp(x).exp().sum().backward()
        expected = [parameter.grad.clone() for parameter in mlp.parameters()]
        mlp.zero_grad()
        saved_bytes(lambda: mlp(x).exp().sum().backward())
        assert all(torch.equal(p.grad, e) for p, e in zip(mlp.parameters(), expected, strict=True))

    def test_nothing_outlives_the_call(self):
        """A node that keeps its own output (exp) must not keep it for ever."""
        import gc
        import weakref

        ends = []

        def call():
            out = images(4).requires_grad_().exp()
            ends.append(weakref.ref(out.untyped_storage()))

        gc.disable()
        try:
            saved_bytes(call)
            assert ends[0]() is None
        finally:
            gc.enable()


class TestPeak:
    def test_tensors_alive_at_once(self):
        def call():
            a = torch.empty(1000)
            b = torch.empty(500)
            del a
            return b, torch.empty(250)

        reading = peak_bytes(call)
        assert (reading.value, reading.missed) == (1500 * FLOAT, ())

    def test_views_and_writes_in_place_take_nothing(self):
        old = images(100)
        assert peak_bytes(lambda: old.view(10, 10).t().add_(1).mul_(2)[3:].zero_()).value == 0

    def test_tensors_from_lists_count(self):
        assert peak_bytes(lambda: torch.tensor([1.0, 2.0, 3.0])).value == 3 * FLOAT

    def test_growing_in_place_counts(self):
        assert peak_bytes(lambda: torch.empty(2).resize_(100).resize_(50)).value == 100 * FLOAT

    def test_old_tensors_freed_make_no_room(self):
        """What ran before, such as gradients left behind, may not change the figure."""
        old = [torch.empty(10_000)]
        assert peak_bytes(lambda: (old.clear(), torch.empty(10))).value == 10 * FLOAT

    def test_a_training_step_costs_the_same_the_second_time(self, mlp):
        optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
        x = images(8, 10)

        def step():
            optimizer.zero_grad()
            mlp(x).sum().backward()
            optimizer.step()

        first = peak_bytes(step).value
        assert first == peak_bytes(step).value > 8 * 20 * FLOAT

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_inference_holds_two_layers_at_most(self, mlp, context):
        x = images(8, 10)
        with context():
            assert peak_bytes(lambda: mlp(x)).value == 8 * (20 + 20) * FLOAT

    def test_a_product_holds_its_operands_and_result(self):
        n = 32
        square = images(n, n)
        # (a @ a), then its product with a, while it still lives.
        assert peak_bytes(lambda: square @ square @ square).value == 2 * n * n * FLOAT


def test_compiled_code_is_followed_as_eager_code():
    square = images(16, 16).requires_grad_()
    compiled = torch.compile(lambda x: (x @ x).relu(), backend="eager", fullgraph=True)
    compiled(square)
    peak, saved = peak_and_saved(lambda: compiled(square))
    assert (peak.value, saved.value) == (2 * 16 * 16 * FLOAT, 2 * 16 * 16 * FLOAT)


def test_sparse_tensors_are_named_as_missed():
    assert peak_bytes(lambda: torch.eye(3).to_sparse()).missed == ("sparse_coo tensors",)


def test_torch_func_leaves_the_saved_bytes_unmeasured():
    peak, saved = peak_and_saved(lambda: torch.func.grad(lambda x: x.exp().sum())(images(5)))
    assert saved.value is None
    assert saved.how.startswith("not measured")
    assert peak.value >= 2 * 5 * FLOAT


def test_errors_of_the_call_are_not_swallowed():
    def fail():
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        peak_and_saved(fail)


class FakeCuda:
    """An allocator of two devices that has 100 bytes each at the start and peaks at 150 and 120."""

    def __init__(self):
        self.resets = []

    def device_count(self):
        return 2

    def synchronize(self, device=None):
        pass

    def reset_peak_memory_stats(self, device):
        self.resets.append(device)

    def memory_allocated(self, device):
        return 100

    def max_memory_allocated(self, device):
        return (150, 120)[device]


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("scrimp.meter.memory.cuda_in_use", lambda: fake)
    reading = peak_bytes(lambda: None)
    assert reading.value == 70
    assert "cuda" in reading.how
    assert fake.resets == [0, 1]
