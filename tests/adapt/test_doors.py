"""Every way into a module: values and gradients beside the forward pass are those of the changed weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scrimp.adapt.attach import attach_, detach_, merge_
from scrimp.adapt.doors import Adapter, Door, doors_of, fit_, unfit_
from scrimp.adapt.lora import lora
from scrimp.primitives.errors import InputError

RANK = 2


class Given(nn.Module):
    """Factors as they are, in float64."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, shape[1], generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


def build(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def compare(
    module: nn.Module, inputs: tuple, *, rank: int = RANK, weight_of=lambda delta, weight: delta.view_as(weight)
):
    """Output and gradients through the door against those of the module with W + delta in its place."""
    doors = doors_of(module)
    generator = torch.Generator().manual_seed(7)
    changed, leaves = {}, []
    adapters = [Adapter(Given(door.matrix(module), rank, generator), door) for door in doors]
    for adapter in adapters:
        a, b = (part.detach().clone().requires_grad_() for part in adapter.factors())
        weight = getattr(module, adapter.door.name).detach().clone()
        changed[adapter.door.name] = weight + weight_of(b @ a, weight)
        leaves += [a, b]
    reference = first(functional_call(module, changed, inputs))
    before = dict(module.__dict__), type(module), {key: value.clone() for key, value in module.state_dict().items()}
    for adapter in adapters:
        fit_(module, adapter)
    output = first(module(*inputs))
    torch.testing.assert_close(output, reference, rtol=1e-10, atol=1e-10)

    sources = [part for part in inputs if isinstance(part, Tensor) and part.requires_grad]
    upstream = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    numbers = [number for adapter in adapters for number in adapter.factors.parameters()]
    got = torch.autograd.grad(output, [*numbers, *sources], upstream)
    expected = torch.autograd.grad(reference, [*leaves, *sources], upstream)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert any(float(item.abs().max()) > 1e-3 for item in got)

    for adapter in adapters:
        unfit_(module, adapter)
    assert type(module) is before[1]
    assert list(module.state_dict()) == list(before[2])
    assert all(torch.equal(value, before[2][key]) for key, value in module.state_dict().items())
    assert module.__dict__.keys() == before[0].keys()
    assert not module._forward_hooks
    assert not module._forward_hooks_with_kwargs
    assert "adapter" not in module._modules


def first(output):
    return output[0] if isinstance(output, tuple) else output


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_linear(rank, shape):
    compare(build(lambda: nn.Linear(7, 4)), (draw(*shape),), rank=rank)


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(7, 4), (0, 7)), (lambda: nn.Conv2d(3, 4, 2), (0, 3, 5, 5))]
)
def test_no_examples(make, shape):
    model = nn.Sequential(build(make))
    attach_(model, lora(2))
    output = model(draw(*shape))
    assert output.shape[:2] == (0, 4)
    output.sum().backward()
    assert all(not item.grad.any() for item in model.parameters() if item.requires_grad)


def test_linear_with_a_named_argument():
    module = build(lambda: nn.Linear(3, 5, bias=False))
    adapter = Adapter(Given((5, 3), 2, torch.Generator().manual_seed(1)), doors_of(module)[0])
    inputs = draw(4, 3)
    reference = inputs @ (module.weight + adapter.delta()).T
    fit_(module, adapter)
    torch.testing.assert_close(module(input=inputs), reference)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1d stride": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (2, 4, 9)),
    "1d one example": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "2d": (lambda: nn.Conv2d(3, 8, (3, 5), padding=(1, 2)), (2, 3, 6, 7)),
    "2d stride, dilation": (lambda: nn.Conv2d(3, 8, 3, stride=(2, 1), dilation=2, padding=2), (2, 3, 9, 7)),
    "2d same": (lambda: nn.Conv2d(3, 8, 5, padding="same", dilation=2), (2, 3, 6, 7)),
    "2d reflect": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
    "2d circular same": (lambda: nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"), (2, 3, 6, 7)),
    "2d replicate": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="replicate"), (2, 3, 6, 7)),
    "2d patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
    "2d 1x1": (lambda: nn.Conv2d(6, 2, 1), (2, 6, 3, 3)),
    "2d groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 4, 5)),
    "2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1, padding_mode="reflect"), (2, 6, 4, 5)),
    "3d": (lambda: nn.Conv3d(2, 5, (1, 3, 2), stride=(1, 2, 1)), (2, 2, 3, 5, 4)),
    "3d groups": (lambda: nn.Conv3d(4, 4, 3, groups=4, padding=1), (1, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("rank", [1, 30])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, rank):
    make, shape = CONVOLUTIONS[kind]
    compare(build(make), (draw(*shape),), rank=rank)


TOKENS = torch.tensor([[0, 3, 3, 2], [5, 3, 0, 1]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"max_norm": 0.9},
        {"scale_grad_by_freq": True},
        {"padding_idx": 0, "max_norm": 1.5},
    ],
    ids=str,
)
def test_embedding(options):
    compare(build(lambda: nn.Embedding(6, 5, **options)), (TOKENS,))


def test_a_limited_norm_leaves_the_table_alone():
    """Without adapter torch renews the norm of the rows in place; the adapted rows are another table."""
    module = build(lambda: nn.Embedding(6, 5, max_norm=0.5))
    before = module.weight.detach().clone()
    attach_(module, lora(2), where=nn.Embedding)
    rows = module(TOKENS)
    assert float(rows.detach().norm(dim=-1).max()) <= 0.5 + 1e-6
    detach_(module)
    assert torch.equal(module.weight, before)


def test_sparse_embedding_gives_the_numbers_dense_gradients():
    module = build(lambda: nn.Embedding(6, 5, sparse=True))
    attach_(module, lora(2), where=nn.Embedding)
    module(TOKENS).sum().backward()
    grads = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert len(grads) == 2
    assert all(grad.layout is torch.strided for grad in grads)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 6, "vdim": 10}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(options, training):
    module = build(lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)).train(training)
    inputs = (draw(2, 3, 8), draw(2, 5, options.get("kdim", 8)), draw(2, 5, options.get("vdim", 8)))
    compare(module, inputs)


def test_attention_over_itself_on_the_fast_path():
    module = build(lambda: nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    attach_(module, lora(2), where=nn.MultiheadAttention)
    shake_(module)
    inputs = draw(2, 3, 8, grad=False)
    slow = module(inputs, inputs, inputs, need_weights=False)[0]
    assert slow.requires_grad
    with torch.no_grad():
        fast = module(inputs, inputs, inputs, need_weights=False)[0]
    torch.testing.assert_close(fast, slow.detach())


def shake_(model: nn.Module) -> None:
    """Give all trained numbers values as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_layers_in_every_mode(training, masked):
    """In evaluation torch's layer reads all weights and calls no child: hooks would not act."""

    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2)

    model = build(make).train(training)
    inputs = draw(2, 3, 8, grad=False)
    mask = torch.tensor([[False, False, True], [False, False, False]]) if masked else None
    names = attach_(model, lora(2))
    assert len(names) == 8
    shake_(model)
    with torch.no_grad():
        quick = model(inputs, src_key_padding_mask=mask)
    slow = model(inputs, src_key_padding_mask=mask)
    grads = torch.autograd.grad(slow.sum(), [item for item in model.parameters() if item.requires_grad])
    assert len(grads) == 16
    merge_(model)
    plain = model(inputs, src_key_padding_mask=mask)
    kept = ~mask if masked else torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(slow[kept], plain[kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quick[kept], plain[kept], rtol=1e-6, atol=1e-6)


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = build(lambda: pytorch_utils.Conv1D(6, 4))
    compare(module, (draw(2, 3, 4),), weight_of=lambda delta, weight: delta.T)


@pytest.mark.parametrize("kind", ["Conv2dSame", "ScaledStdConv2d", "StdConv2d", "ScaledStdConv2dSame"])
def test_convolutions_with_a_forward_of_their_own(kind):
    layers = pytest.importorskip("timm.layers")
    make = getattr(layers, kind) if hasattr(layers, kind) else getattr(layers.std_conv, kind)
    module = build(lambda: make(3, 6, 3, stride=2)).eval()
    assert doors_of(module)[0].apply is None
    compare(module, (draw(2, 3, 7, 7),))


class Doubled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, 2 * self.weight.tanh(), self.bias)


def test_a_linear_with_a_forward_of_its_own():
    compare(build(lambda: Doubled(5, 4)), (draw(3, 5),))


class Packed(nn.Linear):
    """Eight bits a weight, as quantising libraries hold them."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=whole.bias is not None)
        step = whole.weight.detach().abs().amax() / 127
        codes = (whole.weight.detach() / step).round().to(torch.int8)
        self.weight = nn.Parameter(codes.flatten()[:, None], requires_grad=False)  # in a shape of their own
        self.bias = whole.bias
        self.register_buffer("step", step)

    def whole(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) * self.step

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.whole(), self.bias)


class Reader(nn.Module):
    """Takes its layer's weight by itself."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.layer.weight, self.layer.bias)


def test_packed_weights_train_beside_and_refuse_to_merge():
    packed = build(lambda: Packed(nn.Linear(6, 5)))
    model = nn.Sequential(packed)
    names = attach_(model, lora(2))
    assert names == ["0"]
    shake_(model)
    inputs = draw(3, 6)
    output = model(inputs)
    reference = inputs @ (packed.whole() + packed.adapter.delta().double()).T + packed.bias
    torch.testing.assert_close(output, reference)
    output.sum().backward()
    assert packed.adapter.factors.a.grad is not None
    with pytest.raises(InputError, match=r"0: Parameter of torch.int8; load the base unquantised"):
        merge_(model)
    torch.testing.assert_close(model(inputs), reference)
    detach_(model)
    assert packed.weight.dtype is torch.int8


def test_a_weight_read_by_the_parent_is_changed_itself():
    model = build(lambda: Reader(nn.Linear(4, 3)))
    attach_(model, lora(2), where="layer")
    shake_(model)
    inputs = draw(2, 4)
    output = model(inputs)
    assert output.requires_grad
    merge_(model)
    torch.testing.assert_close(model(inputs), output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose2d(3, 4, 2), lambda: nn.LayerNorm(4), lambda: nn.LSTM(3, 4)])
def test_other_modules_have_no_door(make):
    assert doors_of(build(make)) == []


def test_the_comparison_sees_a_wrong_door():
    """The reference is of no use if a door that scales wrongly passes."""
    module = build(lambda: nn.Linear(7, 4))
    right = doors_of(module)[0]

    def wrong(module: nn.Module, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return 1.01 * nn.functional.linear(inputs, b @ a)

    adapter = Adapter(Given((4, 7), 2, torch.Generator().manual_seed(1)), Door(right.matrix, wrong, right.weight))
    inputs = draw(2, 7)
    reference = nn.functional.linear(inputs, module.weight + adapter.delta(), module.bias)
    fit_(module, adapter)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(module(inputs), reference)
