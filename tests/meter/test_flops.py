"""FLOPs: exact against dimensions, honest about what has no formula."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from scrimp.meter import count_flops, counting, register_flops
from scrimp.meter.flops import _FORMULAS
from scrimp.meter.ops import _FREE, is_free
from scrimp.primitives.errors import InputError


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        return timm.create_model("vit_tiny_patch16_224").eval()


def vit_products(model):
    """FLOPs of the patch embedding and of all other products of one forward pass, from the dimensions alone."""
    width, blocks, heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
    hidden, classes = model.blocks[0].mlp.fc1.out_features, model.num_classes
    patches, patch = model.patch_embed.num_patches, model.patch_embed.patch_size[0]
    tokens, head_width = patches + 1, width // heads
    attention = heads * (tokens * head_width * tokens + tokens * tokens * head_width)  # q k^T and a v
    block = tokens * width * 3 * width + attention + tokens * width * width + 2 * tokens * width * hidden
    return 2 * patches * 3 * patch * patch * width, 2 * (blocks * block + width * classes)


class TestVit:
    image = drawn(1, 3, 224, 224)

    def test_forward_is_exact(self, vit):
        reading = count_flops(lambda: vit(self.image))
        assert reading.value == pytest.approx(sum(vit_products(vit)), rel=1e-3)
        assert reading.value == pytest.approx(2.5074e9, rel=1e-3)
        assert reading.missed == ()

    def test_forward_without_gradients_costs_the_same(self, vit):
        with torch.inference_mode():
            reading = count_flops(lambda: vit(self.image))
        assert reading.value == sum(vit_products(vit))
        assert reading.missed == ()

    def test_backward_is_exact(self, vit):
        # Each product has two gradients, but nobody asks for the image's.
        embedding, rest = vit_products(vit)
        reading = count_flops(lambda: F.cross_entropy(vit(self.image), torch.tensor([3])).backward())
        assert reading.value == pytest.approx(2 * embedding + 3 * rest, rel=1e-3)
        assert reading.missed == ()


CONVOLUTIONS = {
    "plain": (lambda x, w: F.conv2d(x, w, padding=1), (6, 8, 3, 3), 9 * 9),
    "strided": (lambda x, w: F.conv2d(x, w, stride=2), (6, 8, 3, 3), 4 * 4),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (6, 4, 3, 3), 7 * 7),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=8), (8, 1, 3, 3), 7 * 7),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w), (8, 6, 3, 3), 9 * 9),
    "transposed, grouped": (lambda x, w: F.conv_transpose2d(x, w, groups=2), (8, 3, 3, 3), 9 * 9),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_costs_the_same_forward_and_for_each_gradient(kind):
    convolve, shape, places = CONVOLUTIONS[kind]
    image, weight = drawn(2, 8, 9, 9), drawn(*shape, requires_grad=True)
    once = 2 * 2 * places * weight.numel()
    assert count_flops(lambda: convolve(image, weight)).value == once
    assert count_flops(lambda: convolve(image, weight).sum().backward()).value == 2 * once
    image.requires_grad_()
    assert count_flops(lambda: convolve(image, weight).sum().backward()).value == 3 * once


MATRIX, OTHER, VECTOR = drawn(3, 4), drawn(4, 5), drawn(4)
PRODUCTS = {
    "mm": (lambda: MATRIX @ OTHER, 2 * 3 * 4 * 5),
    "mm.out": (lambda: torch.mm(MATRIX, OTHER, out=torch.empty(3, 5)), 2 * 3 * 4 * 5),
    "mv": (lambda: MATRIX @ VECTOR, 2 * 3 * 4),
    "mv.out": (lambda: torch.mv(MATRIX, VECTOR, out=torch.empty(3)), 2 * 3 * 4),
    "addmv": (lambda: torch.addmv(torch.zeros(3), MATRIX, VECTOR, beta=0.5), 2 * 3 * 4),
    "dot": (lambda: VECTOR @ VECTOR, 2 * 4),
    "addmm_": (lambda: torch.zeros(3, 5).addmm_(MATRIX, OTHER, alpha=2), 2 * 3 * 4 * 5),
    "baddbmm_": (lambda: torch.zeros(1, 3, 5).baddbmm_(MATRIX[None], OTHER[None]), 2 * 3 * 4 * 5),
    "addbmm": (lambda: torch.addbmm(torch.zeros(3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "einsum": (lambda: torch.einsum("ij,jk->ik", MATRIX, OTHER), 2 * 3 * 4 * 5),
    "linear, inference": (
        lambda: torch.inference_mode()(F.linear)(torch.ones(2, 3, 4), torch.ones(5, 4)),
        2 * 2 * 3 * 4 * 5,
    ),
    "attention": (lambda: F.scaled_dot_product_attention(*[torch.ones(2, 3, 5, 4)] * 3), 2 * 2 * 6 * 5 * 5 * 4),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_product_is_exact(kind):
    product, flops = PRODUCTS[kind]
    reading = count_flops(product)
    assert (reading.value, reading.missed) == (flops, ())


def test_our_formulas_shadow_nothing_else():
    """But for the convolution's backward, torch counts nothing where we have a formula of our own."""
    assert set(_FORMULAS) & set(flop_registry) == {torch.ops.aten.convolution_backward}


@pytest.fixture
def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "lstm": nn.LSTM(8, 16),
            "bilinear": nn.Bilinear(3, 4, 5),
            "encoder": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(),
            "mlp": nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)),
        }


MISSED = {
    "cdist": (lambda layers: torch.cdist(MATRIX, MATRIX), "aten::_cdist_forward"),
    "lstm": (lambda layers: layers["lstm"](drawn(3, 2, 8)), "aten::mkldnn_rnn_layer"),
    "bilinear": (lambda layers: layers["bilinear"](drawn(2, 3), drawn(2, 4)), "aten::_trilinear"),
    "fft": (lambda layers: torch.fft.rfft(VECTOR), "aten::_fft_r2c"),
    "inverse": (lambda layers: torch.linalg.inv(torch.eye(3)), "aten::linalg_inv_ex"),
    "fused attention": (
        lambda layers: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[torch.ones(1, 1, 4, 8)] * 3),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
}


@pytest.mark.parametrize("kind", MISSED)
def test_work_without_a_formula_is_named(kind, layers):
    call, name = MISSED[kind]
    reading = count_flops(lambda: call(layers))
    if kind == "lstm" and not torch.backends.mkldnn.is_available():
        name = "aten::_thnn_fused_lstm_cell"
    assert name in reading.missed
    assert list(reading.missed) == sorted(set(reading.missed))
    assert "lower bound" in reading.how


def test_control_flow_is_named_or_refused_aloud():
    def branch():
        return torch.cond(torch.tensor(True), lambda x: x @ x.T, lambda x: x + 1, (torch.eye(3),))

    with contextlib.suppress(NotImplementedError):  # torch before it let modes see higher-order operators
        assert count_flops(branch).missed == ("higher_order::cond",)


def everyday(layers):
    """A training step with all that is not a product: nothing of it may be cried over."""
    net = layers["mlp"]
    optimizer = torch.optim.AdamW(net.parameters())
    x = drawn(6, 8)
    x = F.layer_norm(F.gelu(x), (8,)) + F.hardswish(x).cumsum(1).softmax(1) + x.topk(8).values
    x[x > 3] = 0
    images = F.interpolate(F.max_pool2d(F.pad(drawn(1, 2, 8, 8), (1, 1, 1, 1)), 2), scale_factor=2, mode="bilinear")
    x = torch.cat([x[:, :4], x[:, 4:]], 1) + images.mean() + F.embedding(torch.arange(6), drawn(6, 8))
    F.cross_entropy(net(x), torch.randperm(6, generator=torch.Generator().manual_seed(1)) % 3).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    torch.multinomial(x.abs().sum(1), 2, generator=torch.Generator().manual_seed(1)).sort()


def test_everyday_work_is_not_missed(layers):
    first, second = 2 * 6 * 8 * 4, 2 * 6 * 4 * 3
    reading = count_flops(lambda: everyday(layers))
    # Nothing before the first layer is trained, so it has one gradient, not two.
    assert (reading.value, reading.missed) == (2 * first + 3 * second, ())


def test_encoder_fast_path_is_counted_and_left_as_it_was(layers):
    tokens = drawn(2, 5, 16)
    with torch.no_grad():
        reading = count_flops(lambda: layers["encoder"](tokens))
    per_image = 5 * 16 * 48 + 2 * 2 * 5 * 5 * 8 + 5 * 16 * 16 + 2 * 5 * 16 * 32
    assert (reading.value, reading.missed) == (2 * 2 * per_image, ())
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_code_is_counted_as_the_eager_code_it_stands_for():
    def fused(graph, inputs):
        """A backend whose kernels, as real ones do, bypass the dispatcher."""
        return lambda x: (torch.from_numpy((x.numpy() @ x.numpy()).clip(0)),)

    compiled = torch.compile(lambda x: (x @ x).relu(), backend=fused, fullgraph=True)
    square = drawn(4, 4)
    assert torch.allclose(compiled(square), (square @ square).relu())
    assert count_flops(lambda: compiled(square)).value == 2 * 4**3


def test_per_sample_gradients_agree_with_torch(layers):
    net = layers["mlp"]
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def loss(weights, image, target):
        return F.cross_entropy(torch.func.functional_call(net, weights, (image[None],)), target[None])

    def call():
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        return each(weights, drawn(5, 8), torch.zeros(5, dtype=torch.long))

    with FlopCounterMode(display=False) as counter:
        call()
    assert count_flops(call).value == counter.get_total_flops() > 0


def test_recomputation_is_counted_as_it_runs(layers):
    images = drawn(5, 8, requires_grad=True)
    plain = count_flops(lambda: layers["mlp"](images).sum().backward()).value
    again = count_flops(
        lambda: torch.utils.checkpoint.checkpoint(layers["mlp"], images, use_reentrant=False).sum().backward()
    ).value
    assert again > plain


def test_counting_adds_up_inside_the_block():
    with counting() as counter:
        MATRIX @ OTHER
        first = counter.reading()
        MATRIX @ OTHER
        torch.cdist(MATRIX, MATRIX)
    MATRIX @ OTHER
    assert (first.value, first.missed) == (120, ())
    assert (counter.reading().value, counter.reading().missed) == (240, ("aten::_cdist_forward",))


def test_an_error_passes_through_and_leaves_nothing_on():
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 // 0)
    with FlopCounterMode(display=False) as counter:
        MATRIX @ OTHER
    assert counter.get_total_flops() == 120
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@torch.library.custom_op("scrimp_test::outer", mutates_args=())
def outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left[:, None] * right[None, :]


def test_a_registered_operator_is_counted_instead_of_missed():
    before = count_flops(lambda: outer(VECTOR, VECTOR))
    assert (before.value, before.missed) == (0, ("scrimp_test::outer",))
    register_flops(outer, lambda left, right, out_shape=None: left[0] * right[0] + sum(out_shape))
    after = count_flops(lambda: outer(VECTOR, VECTOR))
    assert (after.value, after.missed) == (4 * 4 + 4 + 4, ())
    with pytest.raises(InputError, match="once"):
        register_flops(torch.ops.scrimp_test.outer, lambda *_, **__: 1)


@pytest.mark.parametrize("op", [torch.ops.aten.mm, torch.ops.aten.mv.default, torch.relu, "aten::relu"])
def test_what_cannot_be_registered_is_refused(op):
    with pytest.raises(InputError):
        register_flops(op, lambda *_, **__: 1)


def test_no_operator_with_a_formula_passes_as_free():
    packets = {packet for packet in {*flop_registry, *_FORMULAS} if isinstance(packet, torch._ops.OpOverloadPacket)}
    assert len(packets) > 20
    free = {str(packet) for packet in packets for name in packet.overloads() if is_free(getattr(packet, name))}
    assert free == set()


def test_the_table_of_free_operators_lists_each_once():
    stems = [stem for row in _FREE.values() for stem in row.split()]
    assert len(stems) == len(set(stems))
