"""Linear attention inside torch: operator checks, compilation, autocast, vmap, FLOPs, memory."""

from __future__ import annotations

import pytest
import torch
from linear_reference import inputs, reference
from torch.utils.flop_counter import FlopCounterMode

from scrimp.attend import linear_ops
from scrimp.attend.linear import linear_attention
from scrimp.meter.memory import peak_bytes, saved_bytes

# Torch's own words while it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, causal: bool) -> None:
    query, key, value, _ = inputs(queries=9, keys=9, dtype=dtype, token_major=causal)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    lengths = torch.tensor([9, 4])
    wide = torch.promote_types(dtype, torch.float32)
    state = torch.ones(2, 2, 8, 5, dtype=wide), torch.ones(2, 2, 8, dtype=wide)
    for before in ((None, None), state):
        torch.library.opcheck(linear_ops.attention_op, (*leaves, lengths, *before, causal, 1, 1, 1e-6))
    token = [tensor[:, :, :1].detach() for tensor in leaves]
    torch.library.opcheck(linear_ops.step_op, (*token, *state, 1, 1, 1e-6))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return linear_attention(query * 2, key, value, causal=True).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 70):
        query, key, value, _ = inputs(queries=tokens, keys=tokens)
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        plain, found = layer(*leaves), compiled(*leaves)
        torch.testing.assert_close(found, plain)
        for mine, right in zip(
            torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, right)


@pytest.fixture
def projection() -> torch.nn.Linear:
    return torch.nn.Linear(8, 3 * 8)


def test_autocast_computes_sums_in_float32(projection: torch.nn.Linear) -> None:
    x = inputs(queries=300, keys=300)[0]
    with torch.autocast("cpu", torch.bfloat16):
        query, key, value = projection(x).chunk(3, -1)
        assert query.dtype == torch.bfloat16
        out = linear_attention(query, key, value, causal=True)
        assert out.dtype == torch.bfloat16
        assert linear_attention(x, x, x).dtype == torch.bfloat16  # cast as for torch's own attention
    out.float().sum().backward()
    assert projection.weight.grad.dtype == torch.float32
    exact = reference(query.detach(), key.detach(), value.detach(), causal=True)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=8e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_vmap_and_torch_func(causal: bool) -> None:
    query, key, value, _ = inputs(batch=6, queries=20, keys=20)
    query, key = query.unflatten(0, (3, 2)), key.unflatten(0, (3, 2))
    value, lengths = value[:2], torch.tensor([20, 11])

    def attend(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return linear_attention(query, key, value, causal=causal, key_lengths=lengths)

    looped = torch.stack([attend(*pair) for pair in zip(query, key, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(query, key), looped)
    torch.testing.assert_close(torch.vmap(attend, in_dims=(1, 0))(query.transpose(0, 1), key), looped)

    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return attend(query, key).square().sum()

    mapped = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(query, key)
    for index in range(3):
        pair = [query[index].clone().requires_grad_(), key[index].clone().requires_grad_()]
        for all_of_them, one in zip(mapped, torch.autograd.grad(loss(*pair), pair), strict=True):
            torch.testing.assert_close(all_of_them[index], one)


def test_batched_gradients() -> None:
    query, key, value, grad = inputs(queries=9, keys=9)
    out = linear_attention(query.requires_grad_(), key, value)
    both = torch.autograd.grad(out, query, torch.stack([grad, 2 * grad]), is_grads_batched=True)[0]
    out = linear_attention(query, key, value)
    torch.testing.assert_close(both[1], torch.autograd.grad(out, query, 2 * grad)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_counted(causal: bool) -> None:
    query, key, value, grad = inputs(1, 4, 2, 128, 128, 8, 16)
    query.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_attention(query, key, value, causal=causal).backward(grad)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    by_queries, by_keys = 4 * 128 * 8 * 16, 2 * 128 * 8 * 16
    row = 4 * sum(1 + index % 64 for index in range(128)) * causal  # numbers in the triangles of one product
    assert counts == {
        "scrimp.linear_attention": 2 * (by_queries + by_keys + row * (8 + 16)),
        "scrimp.linear_attention_backward": 2 * (2 * by_queries + (2 + causal) * by_keys + 3 * row * (8 + 16)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_kept_for_the_backward_are_the_inputs_the_output_and_the_denominators(causal: bool, dtype: torch.dtype) -> None:
    for tokens in (64, 1024):
        query, key, value, _ = inputs(1, 2, 2, tokens, tokens, 16, 24, dtype=dtype)
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        read = saved_bytes(lambda leaves=leaves: linear_attention(*leaves, causal=causal))
        expected = 2 * tokens * (16 + 16 + 24 + 24 + 1)
        if not causal:
            expected += 2 * 16 * (24 + 1)  # the state of all keys
        assert read.value == expected * query.element_size()


def test_peak_memory_is_at_most_one_and_a_half_times_inputs_and_gradients() -> None:
    query, key, value, grad = inputs(1, 8, 8, 2048, 2048, 64, 64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    # Beside the four given tensors: output and three gradients (and denominators).
    made = peak_bytes(lambda: torch.autograd.grad(linear_attention(*leaves, causal=True), leaves, grad)).value
    tensor = query.numel() * 4
    assert (made + 3 * tensor) <= 1.5 * (6 * tensor)
