"""The training loss and its metrics: the twin against loops, the native kernel against the twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats.loss import image_loss, image_loss_backward_op, image_loss_op, image_loss_twin, psnr, ssim


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module, its instruction set put back afterwards."""
    module = native.load()
    if module is None or not hasattr(module, "splat_image_loss"):
        pytest.skip("the native library is not built here")
    chosen = module.capabilities()["simd"]
    yield module
    module.set_simd(chosen)


def pair(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures and a mask with a part of one pixel at least."""
    generator = torch.Generator().manual_seed(height * width)
    target = torch.rand(height, width, 3, generator=generator)
    rendered = (target + 0.2 * torch.randn(height, width, 3, generator=generator)).clamp(0, 1)
    mask = torch.rand(height, width, generator=generator).round()
    mask[0, 0] = 0.5
    return rendered, target, mask


def by_loops(x: Tensor, y: Tensor) -> float:
    """SSIM, a window at a time."""
    taps = [math.exp(-(k * k) / 4.5) for k in range(-5, 6)]
    height, width, total = *x.shape[:2], 0.0
    for row in range(height):
        for column in range(width):
            moments = torch.zeros(5, 3, dtype=torch.float64)
            for i in range(max(0, row - 5), min(height, row + 6)):
                for j in range(max(0, column - 5), min(width, column + 6)):
                    a, b = x[i, j], y[i, j]
                    weight = taps[i - row + 5] * taps[j - column + 5] / sum(taps) ** 2
                    moments += weight * torch.stack([a, b, a * a, b * b, a * b])
            mx, my, xx, yy, xy = moments
            top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
            total += float((top / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4))).sum())
    return total / (3 * height * width)


def test_the_twin_is_the_formula_by_loops() -> None:
    rendered, target, _ = (values.double() for values in pair(7, 8))
    similar, apart = by_loops(rendered, target), float((rendered - target).abs().mean())
    found = image_loss_twin(rendered, target, ssim_weight=0.3)
    assert float(found) == pytest.approx(0.7 * apart + 0.3 * (1 - similar), abs=1e-12)
    assert float(ssim(rendered, target)) == pytest.approx(similar, abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 40), (40, 7), (33, 50), (99, 21)])
def test_the_kernel_is_its_twin(kernels: ModuleType, size: tuple[int, int], masked: bool) -> None:
    rendered, target, mask = pair(*size)
    exact = rendered.double().requires_grad_()
    wanted = image_loss_twin(exact, target.double(), mask=mask.double() if masked else None)
    (pull,) = torch.autograd.grad(3 * wanted, exact)
    for level in ("generic", "avx2", "avx512", "neon"):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        own = rendered.clone().requires_grad_()
        found = image_loss(own, target, mask=mask if masked else None)
        (grad,) = torch.autograd.grad(3 * found, own)
        assert abs(float(found.detach()) - float(wanted.detach())) < 1e-6, level
        assert float((grad - pull).norm()) < 1e-5 * float(pull.norm()), level


def test_the_same_bits_whatever_the_threads(kernels: ModuleType) -> None:
    rendered, target, mask = pair(130, 31)
    chosen, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = rendered.clone().requires_grad_()
        loss = image_loss(own, target, mask=mask)
        results.append((loss.detach(), *torch.autograd.grad(loss, own)))
    torch.set_num_threads(chosen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside opcheck
def test_the_operators_are_sound(kernels: ModuleType) -> None:
    rendered, target, mask = pair(6, 9)
    for kept, wanted in ((mask, True), (None, False)):
        torch.library.opcheck(image_loss_op, (rendered.requires_grad_(wanted), target, kept, 0.2, wanted))
    torch.library.opcheck(image_loss_backward_op, (torch.tensor(2.0), rendered, target))


def test_compiles_whole_counts_its_windows_and_refuses_a_second_derivative(kernels: ModuleType) -> None:
    rendered, target, mask = pair(6, 9)
    own = rendered.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        plain = image_loss(own, target, mask=mask)
    # Windows of 11 along rows and columns, of five images and, for the gradient, of three.
    assert counter.get_total_flops() == 2 * (6 * 9 * 3) * (11 + 11) * (5 + 3)
    found = torch.compile(image_loss, fullgraph=True, backend="aot_eager")(own, target, mask=mask)
    assert torch.equal(found, plain)
    (pull,) = torch.autograd.grad(plain, own, create_graph=True)
    assert torch.equal(torch.autograd.grad(found, own)[0], pull)
    with pytest.raises(RuntimeError, match="derived by hand"):
        pull.sum().backward()
    assert image_loss(own.to("meta"), target.to("meta")).is_meta


def test_what_the_mask_hides_does_not_count() -> None:
    rendered, target, mask = pair(20, 24)
    hidden = (mask == 0)[..., None]
    other = torch.where(hidden, 1 - rendered, rendered).requires_grad_()
    loss = image_loss(other, target, mask=mask)
    assert torch.equal(loss.detach(), image_loss(rendered, target, mask=mask))
    (pull,) = torch.autograd.grad(loss, other)
    assert not pull[hidden.expand_as(pull)].any()
    torch.testing.assert_close(psnr(other.detach(), target, mask=mask), psnr(rendered, target, mask=mask))


def test_equal_pictures_and_known_distances() -> None:
    rendered, target, _ = pair(12, 13)
    assert float(image_loss(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(ssim(target, target)) == pytest.approx(1, abs=1e-6)
    assert float(psnr(target, target)) == math.inf
    assert float(psnr(target, target + 0.1)) == pytest.approx(20, abs=1e-4)
    assert float(image_loss(rendered, rendered + 0.25, ssim_weight=0)) == pytest.approx(0.25, abs=1e-6)
    # Neither argument is touched, and the target gets no gradient.
    before, wanted = rendered.clone(), target.clone().requires_grad_()
    own = rendered.requires_grad_()
    image_loss(own, wanted).backward()
    assert wanted.grad is None
    assert torch.equal(before, own.detach())


def test_wrong_input_is_told() -> None:
    rendered, target, mask = pair(4, 5)
    with pytest.raises(InputError, match=r"a picture \[h, w, 3\]; got \[3, 4, 5\]"):
        image_loss(rendered.permute(2, 0, 1), target)
    with pytest.raises(InputError, match=r"target torch\.float32"):
        image_loss(rendered, target.double())
    with pytest.raises(InputError, match=r"mask \[4, 5\]; got \[5, 4\]"):
        psnr(rendered, target, mask=mask.T)
    with pytest.raises(InputError, match="a mask that keeps a pixel"):
        image_loss(rendered, target, mask=torch.zeros(4, 5))
    with pytest.raises(InputError, match="ssim_weight from 0 to 1"):
        image_loss(rendered, target, ssim_weight=1.5)
