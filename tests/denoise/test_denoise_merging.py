"""Tokens merged before self-attention and parted after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scrimp.denoise.merging import Match, merge_tokens
from scrimp.denoise.reuse import reuse
from scrimp.denoise.reuse_rules import every
from scrimp.primitives.errors import InputError

diffusers = pytest.importorskip("diffusers")

TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
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
        **TRANSFORMER,
        "in_channels": 4,
        "out_channels": 4,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 1,
    },
    "SD3Transformer2DModel": {
        **TRANSFORMER,
        "in_channels": 4,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    "SanaTransformer2DModel": {
        **TRANSFORMER,
        "in_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
    },
}
MERGED = ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"]


def build(name: str) -> nn.Module:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, name)(**SETTINGS[name]).eval().requires_grad_(False)
    return model


def run(model: nn.Module, images: Tensor) -> Tensor:
    named: dict[str, Any] = {
        "UNet2DModel": {},
        "UNet2DConditionModel": {"encoder_hidden_states": torch.ones(len(images), 3, 8)},
        "DiTTransformer2DModel": {"class_labels": torch.zeros(len(images), dtype=torch.int64)},
    }[type(model).__name__]
    output: Tensor = model(images, timestep=torch.full((len(images),), 300), **named).sample
    return output


def images_of(side: int = 16) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MERGED)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_a_share_of_zero_is_the_plain_model_bit_for_bit(model: nn.Module) -> None:
    images = images_of()
    plain = run(model, images)
    with merge_tokens(model, 0.0) as handle:
        assert torch.equal(run(model, images), plain)
        assert handle.tokens == {}
    assert torch.equal(run(model, images), plain)


def test_merging_takes_fewer_tokens_and_less_arithmetic(model: nn.Module) -> None:
    images = images_of()
    plain, changes, costs = run(model, images), [], []
    for share in (0.25, 0.5, 0.75):
        with merge_tokens(model, share) as handle, FlopCounterMode(display=False) as counter:
            merged = run(model, images)
        assert handle.tokens
        assert all(after == before - int(share * before) for before, after in handle.tokens.values())
        assert merged.shape == plain.shape
        changes.append(float((merged - plain).norm() / plain.norm()))
        costs.append(counter.get_total_flops())
    assert all(0 < change < 0.5 for change in changes)
    # The match is arithmetic too, and does not fall with the share.
    assert costs == sorted(costs, reverse=True)


def test_images_of_one_colour_a_window_are_merged_without_error() -> None:
    model = build("DiTTransformer2DModel")
    model.pos_embed.pos_embed.zero_()
    model.pos_embed.proj.weight.zero_()
    images = images_of()
    plain = run(model, images)
    with merge_tokens(model, 0.75):
        # Equal keys: what the attention gives is the same however many there are.
        torch.testing.assert_close(run(model, images), plain)


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (1, 9), (4, 2)])
def test_parting_undoes_merging_but_for_the_means(size: tuple[int, int]) -> None:
    count = size[0] * size[1]
    tokens = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(2))
    for merged in (0, 1, count // 2, count):
        match = Match(tokens, merged, size=size, generator=torch.Generator().manual_seed(3))
        few = match.merge(tokens)
        back = match.part(few)
        assert few.shape == (2, count - match.merged, 6)
        assert back.shape == tokens.shape
        same = (back == tokens).all(-1)
        # Each merged token changes, and so may its destination, of which there are no more than of them.
        assert int(same.sum(1).min()) >= count - 2 * match.merged
        # Sums are kept: every token of a group has the group's mean.
        torch.testing.assert_close(back.sum(1), tokens.sum(1))


def test_the_most_alike_are_merged() -> None:
    tokens = torch.eye(16).unsqueeze(0).clone()
    tokens[0, 5] = 3 * tokens[0, 2] + 0.01  # 2 is a destination of the 4 x 4 grid, 5 is none
    match = Match(tokens, 1, size=(4, 4))
    back = match.part(match.merge(tokens))
    torch.testing.assert_close(back[0, 5], (tokens[0, 2] + tokens[0, 5]) / 2)
    torch.testing.assert_close(back[0, 2], back[0, 5])
    assert int((back == tokens).all(-1).sum()) == 14


def test_the_generator_moves_the_destinations() -> None:
    tokens = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(2))

    def merged(seed: int) -> Tensor:
        return Match(tokens, 20, size=(8, 8), generator=torch.Generator().manual_seed(seed)).merge(tokens)

    assert torch.equal(merged(0), merged(0))
    assert not torch.equal(merged(0), merged(1))


def test_merging_under_reuse_and_their_order(model: nn.Module) -> None:
    images = images_of()
    with merge_tokens(model, 0.5) as merging:
        once = run(model, images)
        with reuse(model, every(2)) as reusing:
            assert torch.equal(run(model, images), once)
            torch.testing.assert_close(run(model, images), once)
            assert [step.refreshed for step in reusing.steps] == [True, False]
            if type(model).__name__ == "UNet2DModel":  # whose attentions reuse leaves out one by one
                with pytest.raises(InputError, match="reverse order of attaching"):
                    merging.remove()
    with reuse(model, every(2)):
        if type(model).__name__ == "UNet2DModel":
            with pytest.raises(InputError, match="attach token merging first"):
                merge_tokens(model, 0.5)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("name", "said"),
    [("SD3Transformer2DModel", "joint attention of image and text"), ("SanaTransformer2DModel", "linear attention")],
)
def test_attention_that_cannot_be_merged_is_told(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        merge_tokens(build(name), 0.5)


def test_wrong_input_is_told() -> None:
    with pytest.raises(InputError, match="no diffusers Attention module"):
        merge_tokens(nn.Sequential(), 0.5)
    model = build("DiTTransformer2DModel")
    for share in (-0.1, 0.8, float("nan")):
        with pytest.raises(InputError, match=r"a share from 0 to 0.75"):
            merge_tokens(model, share)
    attention, tokens = model.transformer_blocks[0].attn1, torch.ones(1, 16, 16)
    with merge_tokens(model, 0.5):
        with pytest.raises(InputError, match="without a mask"):
            attention(tokens, attention_mask=torch.zeros(1, 1, 16))
        with pytest.raises(InputError, match="rotary"):
            attention(tokens, image_rotary_emb=(tokens, tokens))
