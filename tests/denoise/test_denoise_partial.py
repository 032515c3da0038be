"""Training on part of an image: kept tokens beside single images of those tokens alone, what it costs, and squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scrimp.denoise import TokenDrop, cut
from scrimp.primitives.errors import InputError

SIDE, PATCH, CHANNELS = 8, 2, 3
TOKENS = (SIDE // PATCH) ** 2
_SHARED: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "sample_size": SIDE,
    "patch_size": PATCH,
}


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**_SHARED, num_embeds_ada_norm=10)


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(**_SHARED, cross_attention_dim=16, caption_channels=12)


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **_SHARED, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=6
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {"dit": _dit, "pixart": _pixart, "sd3": _sd3}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Float64, every weight away from 0, evaluation mode (label dropout draws from the global generator)."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, make in MAKERS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        made[name] = model
    return made


def arguments(name: str, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    given = {"hidden_states": normal(CHANNELS, SIDE, SIDE), "timestep": torch.arange(batch) * 2}
    if name == "dit":
        return {**given, "class_labels": torch.arange(batch) % 10}
    if name == "pixart":
        return {**given, "encoder_hidden_states": normal(5, 12)}
    return {**given, "encoder_hidden_states": normal(5, 12), "pooled_projections": normal(8)}


def call(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given).sample


def tokens_of(mask: Tensor) -> list[list[int]]:
    """The kept tokens of each image, by one pixel of each."""
    return [row.flatten().nonzero().flatten().tolist() for row in mask[:, 0, ::PATCH, ::PATCH]]


def alone(model: nn.Module, given: dict[str, Tensor], image: int, places: list[int]) -> dict[int, Tensor]:
    """One image's patches at ``places`` through the model's own parts, as if the image had no others."""
    one: dict[str, Any] = {key: value[image : image + 1] for key, value in given.items()}
    states = model.pos_embed(one["hidden_states"])[:, places]
    time = one["timestep"]
    if isinstance(model, diffusers.DiTTransformer2DModel):
        for block in model.transformer_blocks:
            states = block(states, timestep=time, class_labels=one["class_labels"])
        embedded = model.transformer_blocks[0].norm1.emb(time, one["class_labels"], hidden_dtype=states.dtype)
        shift, scale = model.proj_out_1(nn.functional.silu(embedded)).chunk(2, dim=1)
        states = model.proj_out_2(model.norm_out(states) * (1 + scale[:, None]) + shift[:, None])
    elif isinstance(model, diffusers.PixArtTransformer2DModel):
        emb, embedded = model.adaln_single(time, None, batch_size=1, hidden_dtype=states.dtype)
        text = model.caption_projection(one["encoder_hidden_states"])
        for block in model.transformer_blocks:
            states = block(states, encoder_hidden_states=text, timestep=emb)
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        states = model.proj_out(model.norm_out(states) * (1 + scale) + shift)
    else:
        emb = model.time_text_embed(time, one["pooled_projections"])
        text = model.context_embedder(one["encoder_hidden_states"])
        for block in model.transformer_blocks:
            text, states = block(hidden_states=states, encoder_hidden_states=text, temb=emb)
        states = model.proj_out(model.norm_out(states, emb))
    patches = states[0].view(-1, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2)
    return dict(zip(places, patches, strict=True))


def kept_are_as_alone(model: nn.Module, name: str, keep: float) -> None:
    """Each kept patch is what its image would give with the kept tokens only; the others are zeros."""
    given, drop = arguments(name, 3), TokenDrop(model, keep)
    try:
        with drop.dropping(3, generator=torch.Generator().manual_seed(4)) as mask, torch.no_grad():
            output = call(model, given)
    finally:
        drop.remove()
    across = SIDE // PATCH
    with torch.no_grad():
        for image, places in enumerate(tokens_of(mask)):
            want = alone(model, given, image, places)
            for token in range(TOKENS):
                row, column = PATCH * (token // across), PATCH * (token % across)
                patch = output[image, :, row : row + PATCH, column : column + PATCH]
                assert torch.allclose(patch, want.get(token, torch.zeros_like(patch)), atol=1e-12)


@pytest.mark.parametrize("keep", [0.01, 0.4, 0.5, 0.99])
@pytest.mark.parametrize("name", MAKERS)
def test_kept_tokens_are_as_if_alone(models: dict[str, nn.Module], name: str, keep: float) -> None:
    kept_are_as_alone(models[name], name, keep)


def test_tokens_put_back_elsewhere_are_noticed(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    good = TokenDrop._scatter

    def shifted(self: TokenDrop, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        found = good(self, module, inputs, output)
        return None if found is None else found.roll(1, dims=1)

    monkeypatch.setattr(TokenDrop, "_scatter", shifted)
    with pytest.raises(AssertionError):
        kept_are_as_alone(models["dit"], "dit", 0.4)


@pytest.mark.parametrize("name", MAKERS)
def test_all_kept_is_the_plain_model_to_the_bit(models: dict[str, nn.Module], name: str) -> None:
    model, given = models[name], arguments(name, 2)
    with torch.no_grad():
        plain = call(model, given)
        drop = TokenDrop(model, 1.0)
        with drop.dropping(2, generator=torch.Generator().manual_seed(0)) as mask:
            output = call(model, given)
        drop.remove()
    assert bool(mask.all())
    assert torch.equal(output, plain)


@pytest.mark.parametrize("name", MAKERS)
def test_the_model_is_its_own_outside_and_afterwards(models: dict[str, nn.Module], name: str) -> None:
    model, given = models[name], arguments(name, 2)
    hooks = {key: len(part._forward_hooks) for key, part in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        plain = call(model, given)
        drop = TokenDrop(model, 0.5)
        assert torch.equal(call(model, given), plain)
        with drop.dropping(2, generator=torch.Generator().manual_seed(0)):
            assert not torch.equal(call(model, given), plain)
        assert torch.equal(call(model, given), plain)
        with pytest.raises(KeyError), drop.dropping(2, generator=torch.Generator().manual_seed(0)):
            raise KeyError
        assert torch.equal(call(model, given), plain)
        drop.remove()
        drop.remove()
    assert {key: len(part._forward_hooks) for key, part in model.named_modules()} == hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="one removed"), drop.dropping(2, generator=torch.Generator()):
        pass


@pytest.mark.parametrize("name", MAKERS)
def test_flops_really_fall(models: dict[str, nn.Module], name: str) -> None:
    model, given, counts = models[name], arguments(name, 2), {}
    for keep in (1.0, 0.5, 0.25):
        drop = TokenDrop(model, keep)
        with (
            drop.dropping(2, generator=torch.Generator().manual_seed(0)),
            FlopCounterMode(display=False) as flops,
        ):
            call(model, given).sum().backward()
        drop.remove()
        # Work on the image's tokens only: embedding time, label and text costs the same for any share.
        parts = flops.get_flop_counts()
        found = sum(sum(count.values()) for key, count in parts.items() if key.endswith(("ff.net.0.proj", "ff.net.2")))
        counts[keep] = (found, flops.get_total_flops())
    model.zero_grad()
    assert counts[1.0][0] > 0
    assert counts[0.5][0] * 2 == counts[1.0][0]
    assert counts[0.25][0] * 4 == counts[1.0][0]
    assert counts[0.25][1] < counts[0.5][1] < 0.8 * counts[1.0][1]


def test_gradients_are_those_of_the_kept_patches(models: dict[str, nn.Module]) -> None:
    model, given = models["dit"], arguments("dit", 2)
    pixels = given["hidden_states"].clone().requires_grad_()
    drop = TokenDrop(model, 0.4)
    with drop.dropping(2, generator=torch.Generator().manual_seed(3)) as mask:
        (slopes,) = torch.autograd.grad(call(model, {**given, "hidden_states": pixels}).square().sum(), pixels)
    drop.remove()
    assert torch.equal((slopes != 0).any(1, keepdim=True), mask)


def test_the_mask_and_the_draw(models: dict[str, nn.Module]) -> None:
    drop = TokenDrop(models["dit"], 0.4)
    with drop.dropping(300, generator=torch.Generator().manual_seed(0)) as mask:
        pass
    with drop.dropping(300, generator=torch.Generator().manual_seed(0)) as again:
        pass
    drop.remove()
    assert mask.shape == (300, 1, SIDE, SIDE)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, again)
    kept = tokens_of(mask)
    assert {len(places) for places in kept} == {round(0.4 * TOKENS)} == {drop.kept}
    blocks = mask.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(-2)
    assert torch.equal(blocks.any(-1), blocks.all(-1))
    share = drop.kept / TOKENS
    counts = torch.bincount(torch.tensor([place for places in kept for place in places]), minlength=TOKENS)
    assert bool(((counts - 300 * share).abs() < 4.5 * (300 * share * (1 - share)) ** 0.5).all())


def test_unsupported_models_and_wrong_calls(models: dict[str, nn.Module]) -> None:
    with torch.random.fork_rng():
        unet = diffusers.UNet2DModel(
            8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
    for model in (unet, nn.Sequential(models["dit"])):
        with pytest.raises(InputError, match="tokens can be left out"):
            TokenDrop(model, 0.5)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="share of tokens"):
            TokenDrop(models["dit"], keep)
    drop, generator = TokenDrop(models["dit"], 0.5), torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="3 images of 16 tokens"), drop.dropping(3, generator=generator):
        call(models["dit"], arguments("dit", 2))
    with (
        pytest.raises(InputError, match="one choice of tokens"),
        drop.dropping(2, generator=generator),
        drop.dropping(2, generator=generator),
    ):
        pass
    drop.remove()


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9))
def test_cut_squares_are_those_of_the_image(
    images: int, channels: int, height: int, width: int, side: int, seed: int
) -> None:
    side = min(side, height, width)
    numbers = torch.arange(images * channels * height * width).view(images, channels, height, width)
    before = numbers.clone()
    squares = cut(numbers, side, generator=torch.Generator().manual_seed(seed))
    assert squares.shape == (images, channels, side, side)
    for image, square in zip(numbers, squares, strict=True):
        found = [
            (top, left)
            for top in range(height - side + 1)
            for left in range(width - side + 1)
            if torch.equal(image[:, top : top + side, left : left + side], square)
        ]
        assert len(found) == 1
    assert torch.equal(squares, cut(numbers, side, generator=torch.Generator().manual_seed(seed)))
    squares += 1
    assert torch.equal(numbers, before)


def test_every_square_is_as_likely_as_every_other() -> None:
    corners = torch.arange(12).view(1, 1, 3, 4).expand(6000, -1, -1, -1)
    squares = cut(corners, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(squares[:, 0, 0, 0], minlength=7)
    assert counts[3] == 0
    tops = counts[[0, 1, 2, 4, 5, 6]]
    assert bool(((tops - 1000).abs() < 4.5 * (6000 / 6 * 5 / 6) ** 0.5).all())


def test_wrong_squares() -> None:
    images = torch.zeros(1, 1, 3, 4)
    for side in (0, 4):
        with pytest.raises(InputError, match="a side from 1 to 3"):
            cut(images, side, generator=torch.Generator())
    with pytest.raises(InputError, match="images"):
        cut(images[0], 2, generator=torch.Generator())
