"""Deep features reused between steps: the plain model where nothing is, and less arithmetic where something is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scrimp.denoise.reuse import Reuse, reuse
from scrimp.denoise.reuse_rules import below, every, relative_change, relative_error
from scrimp.primitives.errors import InputError

diffusers = pytest.importorskip("diffusers")

Call = Callable[[Tensor, float], Tensor]
SMALL_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "DiTTransformer2DModel": {
        **SMALL_TRANSFORMER,
        "in_channels": 4,
        "out_channels": 4,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 1,
    },
    "SD3Transformer2DModel": {
        **SMALL_TRANSFORMER,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    "SanaTransformer2DModel": {
        **SMALL_TRANSFORMER,
        "in_channels": 4,
        "out_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
    },
    "PixArtTransformer2DModel": {
        **SMALL_TRANSFORMER,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "use_additional_conditions": False,
        "norm_num_groups": 1,
    },
}
NAMES = [name for name in SETTINGS if hasattr(diffusers, name)]


def build(name: str, **more: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, name)(**{**SETTINGS[name], **more}).eval().requires_grad_(False)
        # Zero-initialised gates would make deep blocks say nothing.
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.1)
    return model


def caller(model: nn.Module) -> Call:
    """How each kind of model is called, on images [batch, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(5)
    text, pooled = (torch.randn(8, *shape, generator=generator) for shape in ((5, 8), (8,)))

    def call(images: Tensor, timestep: float) -> Tensor:
        rows = len(images)
        times = torch.full((rows,), timestep)
        named: dict[str, Any] = {
            "UNet2DModel": {},
            "UNet2DConditionModel": {"encoder_hidden_states": text[:rows]},
            "DiTTransformer2DModel": {"class_labels": torch.arange(rows)},
            "SD3Transformer2DModel": {"encoder_hidden_states": text[:rows], "pooled_projections": pooled[:rows]},
            "SanaTransformer2DModel": {"encoder_hidden_states": text[:rows]},
            "PixArtTransformer2DModel": {
                "encoder_hidden_states": text[:rows],
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        }[type(model).__name__]
        output: Tensor = model(images, timestep=times, **named).sample
        return output

    return call


def path(rows: int = 2, steps: int = 4, stride: float = 0.05) -> list[tuple[Tensor, float]]:
    """Images that slowly change, and falling timesteps."""
    generator = torch.Generator().manual_seed(1)
    begin, end = (torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(2))
    return [(begin + stride * step * end, 900.0 - 100 * step) for step in range(steps)]


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def refreshed(handle: Reuse) -> list[bool]:
    return [step.refreshed for step in handle.steps]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return build("UNet2DModel")


def test_refreshing_every_step_is_the_plain_model_bit_for_bit(model: nn.Module) -> None:
    call = caller(model)
    plain = [call(*step) for step in path()]
    for rule in (every(1), below(0.0)):
        with reuse(model, rule) as handle:
            again = [call(*step) for step in path()]
        assert refreshed(handle) == [True] * 4
        assert all(map(torch.equal, plain, again))
    assert all(torch.equal(one, call(*step)) for one, step in zip(plain, path(), strict=True))


def test_a_reused_step_leaves_the_deep_modules_out_at_every_depth(model: nn.Module) -> None:
    call, steps = caller(model), path()
    plain = [call(*step) for step in steps]
    whole = flops(lambda: call(*steps[0]))
    with reuse(model, every(2)) as handle:
        deepest = handle.plan.last_depth
    shares, errors = [], []
    for depth in sorted({1, 2, deepest // 2, deepest}):
        with reuse(model, every(2), depth=depth) as handle, counting(inside(handle)) as ran:
            assert torch.equal(call(*steps[0]), plain[0])
            assert ran
            ran.clear()
            with FlopCounterMode(display=False) as counter:
                output = call(*steps[1])
            assert not ran
            shares.append(counter.get_total_flops() / whole)
            errors.append(float(relative_error(output, plain[1]).max()))
            assert torch.equal(call(*steps[2]), plain[2])
            assert refreshed(handle) == [True, False, True]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    assert 0 < errors[-1] < errors[0] < 0.5


@contextmanager
def counting(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Grows by one at each call of any of the modules."""
    ran: list[int] = []
    hooks = [module.register_forward_hook(lambda *_: ran.append(1)) for module in modules]
    yield ran
    for hook in hooks:
        hook.remove()


def inside(handle: Reuse) -> list[nn.Module]:
    """Convolutions and matrices within what is left out; DiT asks its first block alone for an embedding."""
    kinds = (nn.Conv2d, nn.Linear)
    return [inner for module in handle.plan.skipped for inner in module.modules() if isinstance(inner, kinds)]


def test_the_same_images_at_the_same_time_reuse_without_error(model: nn.Module) -> None:
    call, (images, timestep) = caller(model), path()[0]
    with reuse(model, below(1e-6)) as handle:
        first, second = call(images, timestep), call(images.clone(), timestep)
        torch.testing.assert_close(first, second)
        assert refreshed(handle) == [True, False]
        assert handle.steps[0].estimate is None
        assert handle.steps[1].estimate.tolist() == [0.0, 0.0]


def test_one_sample_over_the_tolerance_refreshes_all(unet: nn.Module) -> None:
    call, (images, timestep) = caller(unet), path()[0]
    moved = images.clone()
    moved[1] *= 1.5
    with reuse(unet, below(0.2)) as handle:
        for later, given in enumerate((images, images * 1.1, moved, moved)):
            call(given, timestep - later)
        assert refreshed(handle) == [True, False, True, False]
        estimates = [step.estimate for step in handle.steps]
        assert estimates[1].max() < 0.2
        assert estimates[2][0] == 0
        assert estimates[2][1] > 0.2
        handle.rule = below(0.2, most=0)
        call(moved, timestep - 4)
        assert handle.steps[-1].refreshed


def test_a_tighter_tolerance_refreshes_more(model: nn.Module) -> None:
    call, counts = caller(model), []
    for tolerance in (0.0, 0.06, 10.0):
        with reuse(model, below(tolerance)) as handle:
            for step in path(steps=6):
                call(*step)
            counts.append(sum(refreshed(handle)))
    assert counts[0] == 6 > counts[1] > counts[2] == 1


def test_another_trajectory_batch_or_conditioning_refreshes(unet: nn.Module) -> None:
    call = caller(unet)
    (images, _), *_ = path(rows=3)
    with reuse(unet, every(100)) as handle:
        call(images, 500.0)
        call(images, 400.0)
        call(images, 900.0)  # a new trajectory
        call(images[:2], 800.0)  # a smaller batch
        call(images[:2], 800.0)
        assert refreshed(handle) == [True, False, True, True, False]
        handle.reset()
        assert handle.steps == []
        call(images[:2], 700.0)
        assert refreshed(handle) == [True]
        call(images[:2].clone(), 700.0)
        assert refreshed(handle) == [True, False]
        call(images[1:], 700.0)  # a trajectory of one step, and another
        assert refreshed(handle) == [True, False, True]
    dit = build("DiTTransformer2DModel")
    with reuse(dit, every(100)) as handle:
        for later, labels in enumerate(([0, 1], [0, 1], [1, 1])):
            dit(images[:2], timestep=torch.tensor([5 - later]), class_labels=torch.tensor(labels))
        assert refreshed(handle) == [True, False, True]


def test_guided_batches_are_estimated_row_by_row() -> None:
    model = build("UNet2DConditionModel")
    call = caller(model)
    with reuse(model, below(10.0)) as handle:
        for images, timestep in path(steps=2):
            call(torch.cat([images, images]), timestep)
        assert handle.steps[1].estimate.shape == (4,)
        assert handle.batch == 4


def test_control_residuals_still_reach_the_shallow_skips() -> None:
    model = build("UNet2DConditionModel")
    (images, timestep), text = path()[0], torch.zeros(2, 3, 8)
    skips = [(8, 8), (8, 8), (8, 4), (16, 4)]
    residuals = [torch.ones(2, channels, side, side) for channels, side in skips]

    def call(factor: float) -> Tensor:
        output: Tensor = model(
            images,
            timestep,
            text,
            down_block_additional_residuals=[factor * one for one in residuals],
            mid_block_additional_residual=factor * torch.ones(2, 16, 4, 4),
        ).sample
        return output

    with reuse(model, every(2)) as handle:
        first, second = call(0.5), call(0.6)
        assert refreshed(handle) == [True, False]
        assert 0 < float(relative_error(second, first).max()) < 0.5


def test_removal_gives_the_model_back(unet: nn.Module) -> None:
    before = {name: set(module.__dict__) for name, module in unet.named_modules()}
    handle = reuse(unet, every(2))
    assert before != {name: set(module.__dict__) for name, module in unet.named_modules()}
    with pytest.raises(InputError, match="has it already"):
        reuse(unet, every(3))
    caller(unet)(*path()[0])
    assert refreshed(handle) == [True]
    handle.remove()
    handle.remove()
    assert before == {name: set(module.__dict__) for name, module in unet.named_modules()}


def test_an_error_midway_does_not_leave_half_a_refresh(unet: nn.Module) -> None:
    call, steps = caller(unet), path()
    plain = call(*steps[1])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with reuse(unet, every(3)) as handle:
        hook = unet.conv_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(*steps[0])
        hook.remove()
        assert torch.equal(call(*steps[1]), plain)
        assert refreshed(handle) == [True]


def test_what_cannot_be_reused_is_told(unet: nn.Module) -> None:
    with pytest.raises(InputError, match=r"transformer_blocks\); got Sequential"):
        reuse(nn.Sequential(), every(2))
    with pytest.raises(InputError, match="a depth from 1 to 4 for this UNet; got 7"):
        reuse(unet, every(2), depth=7)
    with pytest.raises(InputError, match="SkipDownBlock2D"):
        reuse(build("UNet2DModel", down_block_types=("SkipDownBlock2D", "DownBlock2D")), every(2))
    with pytest.raises(InputError, match="nothing to leave out"):
        reuse(build("DiTTransformer2DModel", num_layers=1), every(2))
    with pytest.raises(InputError, match="tolerance of 0 or more"):
        below(float("nan"))
    with pytest.raises(InputError, match="every 1 or more"):
        every(0)
    call, (images, timestep) = caller(unet), path()[0]
    with reuse(unet, below(0.1)):
        call(images, timestep)
        with pytest.raises(InputError, match="NaN"):
            call(images * float("nan"), timestep - 1)


def test_a_layer_left_out_by_the_caller_is_told() -> None:
    model = build("SD3Transformer2DModel")
    (images, timestep), text = path()[0], torch.zeros(2, 3, 8)
    with reuse(model, every(2)), pytest.raises(InputError, match="skip_layers"):
        model(images, text, torch.zeros(2, 8), torch.tensor([timestep]), skip_layers=[1])


def test_the_measures() -> None:
    before = torch.tensor([[1.0, -3.0], [0.0, 0.0], [0.0, 0.0]])
    now = torch.tensor([[2.0, -4.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_change(now, before).tolist() == [0.5, 0.0, float("inf")]
    assert relative_error(now, before)[0] == pytest.approx((2 / 10) ** 0.5)
    assert relative_change(now.double(), before.double()).dtype == torch.float64
    halves = relative_error(torch.full((1, 4), 6e4).half(), torch.full((1, 4), 3e4).half())
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(1.0, rel=1e-3)
