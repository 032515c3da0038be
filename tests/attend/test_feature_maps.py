"""Feature maps: what they promise about the kernel they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from linear_reference import inputs

from scrimp.attend.feature_maps import SoftmaxMimic, elu_plus_one, identity, random_features, relu
from scrimp.attend.linear import linear_attention
from scrimp.attend.recurrent import linear_attention_step
from scrimp.attend.softmax import softmax_attention
from scrimp.primitives.errors import InputError


def test_elu_plus_one_and_its_gradient() -> None:
    x = torch.linspace(-20, 20, 101, dtype=torch.float64).requires_grad_()
    found, exact = elu_plus_one(x), torch.nn.functional.elu(x) + 1
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(exact.sum(), x))
    huge = torch.tensor([100.0, -1000.0], requires_grad=True)  # exp(100) must not reach the gradient
    elu_plus_one(huge).sum().backward()
    assert huge.grad.tolist() == [1.0, 0.0]


def test_elu_plus_one_in_bfloat16_keeps_what_is_small() -> None:
    x = torch.tensor([-8.0, -20.0], dtype=torch.bfloat16)
    assert not (torch.nn.functional.elu(x) + 1).any()
    torch.testing.assert_close(elu_plus_one(x), x.exp())


def test_relu_and_identity() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert relu(x).tolist() == [0.0, 2.0]
    assert identity(x) is x


@pytest.mark.parametrize("heads", [1, 4])
def test_the_mimic_begins_with_softmax_exponents_and_learns(heads: int) -> None:
    query, key, value, _ = inputs(key_heads=4, queries=12, keys=12)
    mimic = SoftmaxMimic(8, heads=heads)
    features = mimic(query)
    assert features.shape == (2, 4, 12, 16)
    torch.testing.assert_close(features[..., :8].log(), query * 8**-0.25)
    torch.testing.assert_close(features[..., 8:].log(), -query * 8**-0.25)

    wanted = softmax_attention(query, key, value, causal=True)
    optimiser = torch.optim.Adam(mimic.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (linear_attention(query, key, value, causal=True, feature_map=mimic) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_mimic_works_in_bfloat16_and_under_autocast() -> None:
    query = inputs(dtype=torch.bfloat16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = SoftmaxMimic(8)(query)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), SoftmaxMimic(8)(query.float()), rtol=8e-3, atol=0)


def test_random_features_estimate_the_softmax_kernel_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    # Small enough for an estimate's distribution to be near to normal: its tail is that of exp of a normal draw.
    query, key = 0.5 * torch.randn(2, 20, 8, dtype=torch.float64, generator=generator)
    exact = (query @ key.mT / math.sqrt(8)).exp()
    estimates = []
    for _ in range(200):
        queries, keys = random_features(8, 64, generator=generator)
        queries.stabilise = False
        estimates.append(queries(query) @ keys(key).mT)
    found = torch.stack(estimates)
    error = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(200))
    assert float(error.max()) < 5  # standard errors, the largest of 400
    assert float((found.mean(0) / exact - 1).abs().mean()) < 0.03


def test_more_random_features_come_nearer_to_softmax() -> None:
    query, key, value, _ = inputs(queries=60, keys=60, dim=16)
    query, key = query / 2, key / 2
    wanted = softmax_attention(query, key, value, causal=True)
    errors = []
    for features in (16, 256, 4096):
        maps = random_features(16, features, generator=torch.Generator().manual_seed(1))
        found = linear_attention(query, key, value, causal=True, feature_map=maps)
        errors.append(float((found - wanted).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.1


def test_stabilising_the_queries_leaves_the_ratio() -> None:
    query, key, value, _ = inputs(dtype=torch.float64)
    queries, keys = random_features(8, 32, generator=torch.Generator().manual_seed(2))
    stable = linear_attention(query, key, value, feature_map=(queries, keys), eps=0.0)
    assert float(queries(query).max()) <= 1
    queries.stabilise = False
    torch.testing.assert_close(stable, linear_attention(query, key, value, feature_map=(queries, keys), eps=0.0))
    queries.stabilise = True
    far = linear_attention(query * 40, key, value, feature_map=(queries, keys))
    assert far.isfinite().all()


def test_keys_features_do_not_depend_on_other_keys() -> None:
    """Else the steps of a recurrence would not add up."""
    query, key, value, _ = inputs(queries=30, keys=30)
    maps = random_features(8, 64, generator=torch.Generator().manual_seed(3))
    whole = linear_attention(query, key, value, causal=True, feature_map=maps)
    state, parts = None, []
    for part in (slice(0, 11), slice(11, 12), slice(12, 30)):
        state, out = linear_attention_step(
            state, query[:, :, part], key[:, :, part], value[:, :, part], feature_map=maps
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)


def test_random_features_are_orthogonal_normal_and_reproducible() -> None:
    queries, keys = random_features(16, 40, generator=torch.Generator().manual_seed(4))
    again, _ = random_features(16, 40, generator=torch.Generator().manual_seed(4))
    rows = queries.projection
    assert rows.shape == (40, 16)
    assert keys.projection is rows
    assert torch.equal(rows, again.projection)
    for block in (rows[:16], rows[16:32], rows[32:]):
        gram = block.double() @ block.double().mT
        assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-4
    many, _ = random_features(4, 40_000, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(many.projection.T.cov(), torch.eye(4), atol=0.03, rtol=0)


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="dim >= 1"):
        random_features(0, 4, generator=torch.Generator())
    with pytest.raises(InputError, match="dim >= 1"):
        SoftmaxMimic(8, heads=0)
