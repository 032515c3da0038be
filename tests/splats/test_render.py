"""The rasteriser: its reference against loops and finite differences, its native kernels against the reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError, MissingExtraError
from scrimp.splats.camera import Camera, look_at
from scrimp.splats.harmonics import harmonic_basis
from scrimp.splats.rasterize import _FRAMES, Look, draw, draw_backward, rasterize_cuda
from scrimp.splats.reference import rasterize_reference
from scrimp.splats.render import Rendered, rasterize, render
from scrimp.splats.scene import COUNTS, SH_C0, Splats

BACKGROUND = (0.2, 0.5, 0.7)


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module, its instruction set put back afterwards."""
    module = native.load()
    if module is None or not hasattr(module, "splat_forward"):
        pytest.skip("the native library is not built here")
    chosen = module.capabilities()["simd"]
    yield module
    module.set_simd(chosen)


def levels(kernels: ModuleType) -> Iterator[str]:
    for level in ("generic", "avx2", "avx512", "neon"):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        yield level


def scene(count: int, degree: int = 0, *, size: float = -2.0, seed: int = 0) -> Splats:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    harmonics = 0.3 * draw(count, COUNTS[degree], 3)
    scales = size + 0.7 * draw(count, 3)
    return Splats(draw(count, 3), 2 * draw(count, 4), scales, 1 + 2 * draw(count), draw(count, 3), harmonics)


def camera(width: int, height: int) -> Camera:
    position, up = torch.tensor([0.3, -0.5, -4.0]), torch.tensor([0.0, -1.0, 0.0])
    return look_at(position, torch.zeros(3), up=up, width=width, height=height, field_of_view=50.0)


def drawn(splats: Splats, view: Camera, dtype: torch.dtype, **options: Any) -> tuple[Rendered, dict[str, Tensor]]:
    """The images, and the gradients of a sum of them all by random factors."""
    leaves = {name: values.to(dtype, copy=True).requires_grad_() for name, values in splats.tensors().items()}
    offsets = torch.zeros(len(splats), 2, dtype=dtype, requires_grad=True)
    found = rasterize(Splats(**leaves), view, depth=True, offsets=offsets, **options)
    assert found.depth is not None
    generator, loss = torch.Generator().manual_seed(1), torch.zeros((), dtype=dtype)
    # Depth by its alpha: the quotient alone amplifies the rounding of a pixel that shows next to nothing.
    for image in (found.color, found.alpha, found.depth * found.alpha):
        loss = loss + (image * torch.randn(image.shape, generator=generator).to(dtype)).sum()
    loss.backward()
    leaves["offsets"] = offsets
    return found, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def turn(quaternion: Tensor) -> Tensor:
    """As a matrix, column by column: v + 2 w (u x v) + 2 u x (u x v)."""
    w, u = quaternion[0] / quaternion.norm(), quaternion[1:] / quaternion.norm()
    columns = []
    for v in torch.eye(3, dtype=quaternion.dtype):
        across = torch.linalg.cross(u, v)
        columns.append(v + 2 * w * across + 2 * torch.linalg.cross(u, across))
    return torch.stack(columns, 1)


def by_loops(splats: Splats, view: Camera, antialias: bool) -> tuple[Tensor, Tensor]:
    """Colour and alpha of degree 0, pixel by pixel with inverse matrices, as the paper writes it."""
    motion, ellipses = view.world_to_camera.double(), []
    for i in range(len(splats)):
        x, y, z = (motion[:3, :3] @ splats.means[i] + motion[:3, 3]).tolist()
        fx, fy = view.focal
        # The Jacobian is taken no further out than 1.3 times the tangent of half the field of view.
        right, down = 0.65 * view.width / fx, 0.65 * view.height / fy
        u, v = min(max(x / z, -right), right), min(max(y / z, -down), down)
        jacobian = torch.tensor([[fx / z, 0, -fx * u / z], [0, fy / z, -fy * v / z]], dtype=torch.float64)
        axes = jacobian @ motion[:3, :3] @ turn(splats.quaternions[i]) @ torch.diag(splats.scales[i].exp())
        sharp = axes @ axes.T
        wide = sharp + 0.3 * torch.eye(2)
        opacity = float(splats.opacities[i].sigmoid())
        opacity *= math.sqrt(torch.det(sharp) / torch.det(wide)) if antialias else 1
        place = torch.tensor([fx * x / z + view.centre[0], fy * y / z + view.centre[1]], dtype=torch.float64)
        ellipses.append((z, place, torch.linalg.inv(wide), opacity, (0.5 + SH_C0 * splats.colors[i]).clamp_min(0)))
    ellipses.sort(key=lambda ellipse: ellipse[0])
    color, alphas = torch.zeros(view.height, view.width, 3).double(), torch.zeros(view.height, view.width).double()
    for row in range(view.height):
        for column in range(view.width):
            clear = 1.0
            for _, place, inverse, opacity, shade in ellipses:
                apart = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64) - place
                alpha = min(0.999, opacity * math.exp(-0.5 * float(apart @ inverse @ apart)))
                if alpha < 1 / 255:
                    continue
                if clear * (1 - alpha) <= 1e-4:
                    break
                color[row, column] += clear * alpha * shade
                clear *= 1 - alpha
            color[row, column] += clear * torch.tensor(BACKGROUND, dtype=torch.float64)
            alphas[row, column] = 1 - clear
    return color, alphas


@pytest.mark.parametrize("antialias", [False, True])
def test_the_reference_is_the_formula_by_loops(antialias: bool) -> None:
    splats, view = scene(9, size=-0.8, seed=3).to(torch.float64), camera(6, 7)
    splats.opacities[:3], splats.scales[:3] = 9.0, 1.0
    color, alpha = by_loops(splats, view, antialias)
    found = rasterize(splats, view, background=BACKGROUND, antialias=antialias)
    torch.testing.assert_close(found.color, color, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.alpha, alpha, atol=1e-6, rtol=0)
    assert float(alpha.max()) == pytest.approx(0.999, abs=1e-3)  # the second would leave less than 1e-4


@pytest.mark.parametrize("antialias", [False, True])
def test_the_references_gradients_are_finite_differences(antialias: bool) -> None:
    splats, view = scene(3, 2, size=-0.5, seed=5).to(torch.float64), camera(3, 2)
    inputs = [values.clone().requires_grad_() for values in splats.tensors().values()]
    offsets = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)

    def images(*values: Tensor) -> tuple[Tensor, ...]:
        moved = Splats(*values[:-1])
        return rasterize_reference(moved, view, background=BACKGROUND, antialias=antialias, offsets=values[-1])[:3]

    assert torch.autograd.gradcheck(images, (*inputs, offsets), eps=1e-6, atol=1e-6)


def test_harmonics_are_orthonormal_up_to_degree_four() -> None:
    steps, weights = numpy.polynomial.legendre.leggauss(6)
    around = torch.arange(12).double() * (math.pi / 6)
    z = torch.from_numpy(steps).repeat_interleave(12)
    ring = (1 - z * z).sqrt()
    turn_ = around.repeat(6)
    basis = harmonic_basis(torch.stack([ring * turn_.cos(), ring * turn_.sin(), z], 1), 4)
    area = torch.from_numpy(weights).repeat_interleave(12) * (math.pi / 6)
    torch.testing.assert_close(basis.T @ (area[:, None] * basis), torch.eye(24).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("count", "degree", "size", "antialias", "pixels"),
    [
        (60, 3, -2.5, False, (45, 37)),
        (60, 4, -3.5, True, (50, 33)),
        (40, 1, -1.0, False, (16, 16)),
        (9, 2, -0.5, True, (1, 1)),
        (0, 2, 0.0, False, (5, 3)),
    ],
)
def test_the_kernels_draw_and_differentiate_as_the_reference(
    kernels: ModuleType, count: int, degree: int, size: float, antialias: bool, pixels: tuple[int, int]
) -> None:
    splats, view = scene(count, degree, size=size, seed=count), camera(*pixels)
    exact, grads = drawn(splats, view, torch.float64, background=BACKGROUND, antialias=antialias)
    assert count == 0 or float(exact.alpha.detach().max()) > 0.3
    for level in levels(kernels):
        found, pulls = drawn(splats, view, torch.float32, background=BACKGROUND, antialias=antialias)
        assert float((found.color - exact.color).detach().abs().amax()) < 1e-5, level
        assert float((found.alpha - exact.alpha).detach().abs().amax()) < 1e-5, level
        torch.testing.assert_close(found.depth, exact.depth, atol=1e-4, rtol=0, check_dtype=False)
        torch.testing.assert_close(found.radii, exact.radii, atol=1e-4, rtol=1e-5, check_dtype=False)
        for name, grad in grads.items():
            assert float((pulls[name] - grad).norm()) <= 1e-4 * float(grad.norm()), (level, name)


def test_a_needle_across_the_picture_loses_nothing_to_rounding(kernels: ModuleType) -> None:
    # 400 pixels long and a blur wide: the difference xx yy - xy^2 would have no correct digit.
    one = scene(1, seed=2).to(torch.float64)
    one.means[:] = 0.0
    one.quaternions[:] = torch.tensor([math.cos(math.pi / 8), 0.0, 0.0, math.sin(math.pi / 8)])
    one.scales[:] = torch.tensor([math.log(2.0), -9.0, -9.0])
    one.opacities[:] = 3.0
    view = camera(200, 150)
    exact, found = render(one, view), render(one.to(torch.float32), view)
    assert float(exact.amax()) > 0.3
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=0, check_dtype=False)


def test_the_same_bits_whatever_the_threads(kernels: ModuleType) -> None:
    splats, view = scene(6000, 1, size=-3.0), camera(90, 70)
    chosen, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found, grads = drawn(splats, view, torch.float32)
        results.append([found.color, found.alpha, *grads.values()])
    torch.set_num_threads(chosen)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_seen_or_not_a_number_changes_nothing(kernels: ModuleType) -> None:
    splats, view = scene(30, 1, seed=8), camera(20, 20)
    splats.means[4] = view.position - 2 * torch.nn.functional.normalize(-view.position, dim=0)
    splats.means[5], splats.scales[6], splats.quaternions[7] = math.nan, math.inf, 0.0
    splats.opacities[8], splats.opacities[9] = -9.0, math.nan
    lost = torch.arange(4, 10)
    kept = torch.tensor([i for i in range(30) if not 4 <= i < 10])
    found, grads = drawn(splats, view, torch.float32)
    alone, pulls = drawn(splats.take(kept), view, torch.float32)
    assert torch.equal(found.color, alone.color)
    assert torch.equal(found.radii[lost], torch.zeros(6))
    for name, grad in grads.items():
        assert torch.equal(grad[kept], pulls[name])
        assert not grad[lost].any(), name


def test_a_lower_degree_is_the_scene_without_the_rest() -> None:
    splats, view = scene(12, 3, seed=1), camera(17, 9)
    found, grads = drawn(splats, view, torch.float32, degree=1)
    torch.testing.assert_close(found.color, render(splats.of_degree(1), view))
    assert grads["harmonics"][:, :3].any()
    assert not grads["harmonics"][:, 3:].any()
    assert torch.equal(render(splats, view, degree=9), render(splats, view))


def test_depth_alpha_and_background_of_one_thing() -> None:
    one, view = scene(1), camera(8, 8)
    one.means[:], one.scales[:], one.opacities[:] = 0.0, 3.0, 20.0
    found = rasterize(one, view, depth=True, background=BACKGROUND)
    assert found.depth is not None
    torch.testing.assert_close(found.depth, torch.full((8, 8), float(view.position.norm())), atol=1e-4, rtol=0)
    assert float(found.alpha.amin()) > 0.99
    away = rasterize(one.take(torch.arange(0)), view, depth=True, background=BACKGROUND)
    assert torch.equal(away.color, torch.tensor(BACKGROUND).expand(8, 8, 3))
    assert not away.alpha.any()
    assert rasterize(one, view).depth is None


def test_gradients_of_what_is_wanted_only(kernels: ModuleType) -> None:
    splats, view = scene(5, 1, seed=4), camera(12, 12)
    colors = splats.colors.clone().requires_grad_()
    picture = render(Splats(**(splats.tensors() | {"colors": colors})), view)
    picture.sum().backward(retain_graph=True)
    first = colors.grad
    colors.grad = None
    picture.sum().backward()
    assert first is not None
    assert colors.grad is not None
    assert torch.equal(first, colors.grad)


def given(splats: Splats, look: Look, offsets: Tensor | None = None) -> tuple[Any, ...]:
    return (*splats.tensors().values(), offsets, look.camera.world_to_camera, look.sizes(), look.lens())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside opcheck
def test_the_operators_are_sound(kernels: ModuleType) -> None:
    for count, depth in ((6, True), (0, False)):
        plain, look = scene(count, 2), Look(camera(9, 7), BACKGROUND, 1, True, depth)
        leaves = Splats(**{name: values.requires_grad_() for name, values in plain.tensors().items()})
        inputs = given(leaves, look, torch.zeros(count, 2) if depth else None)
        torch.library.opcheck(draw, inputs)
    inputs = [values.detach() if isinstance(values, Tensor) else values for values in inputs]
    *images, frame = draw(*inputs)
    pulls = (torch.ones_like(images[0]), None, None)
    torch.library.opcheck(draw_backward, (*pulls, *images[:3], frame, [True, False] * 3 + [False], *inputs))


def test_compiles_whole_and_has_shapes_without_numbers(kernels: ModuleType) -> None:
    splats, view = scene(12, 1, seed=3), camera(14, 11)
    leaves = {name: values.requires_grad_() for name, values in splats.tensors().items()}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        found = rasterize(Splats(**leaves), view, depth=True)
        assert found.depth is not None
        return (2 * found.color).square().mean() + found.depth.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves)
    plain = loss(leaves)
    assert torch.equal(compiled, plain)
    pairs = zip(*(torch.autograd.grad(found, list(leaves.values())) for found in (compiled, plain)), strict=True)
    assert all(torch.equal(mine, right) for mine, right in pairs)
    nowhere = rasterize(splats.to("meta"), view)
    assert (nowhere.color.shape, nowhere.color.is_meta, nowhere.depth) == ((11, 14, 3), True, None)


def test_a_frame_lives_as_long_as_its_graph_and_is_drawn_again_where_it_is_lost(kernels: ModuleType) -> None:
    splats, look, before = scene(20, 1, seed=6), Look(camera(20, 20), BACKGROUND, 1, False, False), len(_FRAMES)
    means = splats.means.clone().requires_grad_()
    picture = render(Splats(**(splats.tensors() | {"means": means})), look.camera, background=BACKGROUND)
    assert len(_FRAMES) == before + 1
    (right,) = torch.autograd.grad(picture.sum(), means)
    assert right.any()
    picture = None
    assert len(_FRAMES) == before
    *images, frame = draw(*given(splats, look))
    arguments = (torch.ones_like(images[0]), None, None, *images[:3], frame.clone(), [True, *[False] * 6])
    del frame
    assert torch.equal(draw_backward(*arguments, *given(splats, look))[0], right)
    assert len(_FRAMES) == before


def test_a_second_derivative_is_refused(kernels: ModuleType) -> None:
    splats = scene(5, seed=4)
    colors = splats.colors.clone().requires_grad_()
    picture = render(Splats(**(splats.tensors() | {"colors": colors})), camera(12, 12))
    (pull,) = torch.autograd.grad(picture.square().sum(), colors, create_graph=True)
    with pytest.raises(RuntimeError, match="derived by hand"):
        pull.square().sum().backward()


def test_a_scene_trained_on_photographs(kernels: ModuleType, shared_data: Path) -> None:
    head, _, body = (shared_data / "scenes" / "fox60k.ply").read_bytes().partition(b"end_header\n")
    names = [line.split()[-1].decode() for line in head.splitlines() if line.startswith(b"property")]
    rows = torch.from_numpy(numpy.frombuffer(body, "<f4").reshape(-1, len(names))[::200].copy())

    def field(stem: str, count: int) -> Tensor:
        return rows[:, [names.index(f"{stem}_{i}") for i in range(count)]]

    means = rows[:, [names.index(axis) for axis in "xyz"]]
    harmonics = field("f_rest", 45).reshape(-1, 3, 15).transpose(1, 2)
    opacities = rows[:, names.index("opacity")]
    splats = Splats(means, field("rot", 4), field("scale", 3), opacities, field("f_dc", 3), harmonics)
    position, up = torch.tensor([3.2, -5.5, -1.0]), torch.tensor([0.0, 0.0, 1.0])
    view = look_at(position, torch.zeros(3), up=up, width=34, height=60, field_of_view=70.0)
    exact = render(splats.to(torch.float64), view)
    assert float(exact.amax()) > 0.3
    torch.testing.assert_close(render(splats, view), exact, atol=1e-5, rtol=0, check_dtype=False)


def test_gsplat_gets_the_scene_as_it_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, view, asked = scene(4, 2), camera(6, 5), {}
    offsets = torch.zeros(4, 2, requires_grad=True)

    def rasterization(**given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        asked.update(given)
        places = (given["means"][None, :, :2] * 1).requires_grad_()
        color = places.sum() + torch.zeros(1, 5, 6, 4)
        radii = torch.tensor([[[3, 4], [0, 0], [2, 1], [1, 1]]], dtype=torch.int32)
        return color, color[..., :1], {"means2d": places, "radii": radii}

    look = Look(view, BACKGROUND, 1, True, True)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(MissingExtraError, match=r"scrimp\[splats\]"):
        rasterize_cuda(splats, look, None)
    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    color, alpha, depth, radii = rasterize_cuda(splats, look, offsets)
    assert depth is not None
    assert (color.shape, alpha.shape, depth.shape) == ((5, 6, 3), (5, 6), (5, 6))
    assert radii.tolist() == [4, 0, 2, 1]
    color.sum().backward()
    assert torch.equal(offsets.grad, torch.full((4, 2), 90.0))
    assert torch.equal(asked["scales"], splats.scales.exp())
    assert torch.equal(asked["colors"][:, 0], splats.colors)
    assert asked["colors"].shape == (4, 9, 3)
    assert (asked["sh_degree"], asked["rasterize_mode"], asked["near_plane"]) == (1, "antialiased", 0.01)
    assert asked["Ks"][0].tolist()[0] == pytest.approx([view.focal[0], 0, 3])


def test_wrong_input_is_told() -> None:
    splats, view = scene(2), camera(4, 4)
    with pytest.raises(InputError, match=r"float32 or float64; got torch\.float16"):
        render(splats.to(torch.float16), view)
    with pytest.raises(InputError, match=r"expected colors torch\.float32"):
        render(Splats(**(splats.tensors() | {"colors": splats.colors.double()})), view)
    with pytest.raises(InputError, match=r"offsets \[2, 2\]; got \[3, 2\]"):
        rasterize(splats, view, offsets=torch.zeros(3, 2))
    with pytest.raises(InputError, match="a background of 3"):
        render(splats, view, background=(1.0, 1.0))
    with pytest.raises(InputError, match="a degree of 0 or more"):
        render(splats, view, degree=-1)
