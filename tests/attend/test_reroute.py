"""Unmodified models of timm, torchvision, transformers and diffusers with their attention sent elsewhere."""

from __future__ import annotations

import functools
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scrimp.attend import softmax_attention
from scrimp.attend.reroute import attention
from scrimp.attend.reroute_masks import read_mask
from scrimp.primitives.errors import InputError

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
SOUND = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with fixed weights, torch's global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def timm_model(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, img_size=32, depth=2, **options)


def hugging(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 16, 32)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zeros at first: any attention would give the same
    return model


def torch_encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def whisper() -> nn.Module:
    settings = {"max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8, "d_model": 32}
    settings |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return hugging("WhisperModel", "WhisperConfig", **settings, **WORDS, decoder_start_token_id=1)


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )


def words(config: str) -> dict[str, Any]:
    return {"config": config, **TINY, **WORDS}


PADDED = {"input_ids": TOKENS, "attention_mask": RIGHT}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(9)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224"), {"x": IMAGES}, 2),
    "timm deit3": (lambda: timm_model("deit3_small_patch16_224", embed_dim=48, num_heads=3), {"x": IMAGES}, 2),
    "timm eva": (lambda: timm_model("eva02_tiny_patch14_224", patch_size=8), {"x": IMAGES}, 2),
    "torchvision vit": (torchvision_vit, {"x": IMAGES}, 2),
    "torch encoder": (torch_encoder, {"src": SEQUENCE}, 2),
    "torch encoder, padded": (torch_encoder, {"src": SEQUENCE, "src_key_padding_mask": RIGHT == 0}, 2),
    "torch encoder, causal": (torch_encoder, {"src": SEQUENCE, "mask": CAUSAL, "is_causal": True}, 2),
    "bert": (lambda: hugging("BertModel", **words("BertConfig")), {"input_ids": TOKENS}, 2),
    "bert, padded": (lambda: hugging("BertModel", **words("BertConfig")), PADDED, 2),
    "llama": (lambda: hugging("LlamaModel", num_key_value_heads=2, **words("LlamaConfig")), {"input_ids": TOKENS}, 2),
    "llama, padded": (lambda: hugging("LlamaModel", num_key_value_heads=2, **words("LlamaConfig")), PADDED, 2),
    "gpt2": (lambda: hugging("GPT2Model", "GPT2Config", n_embd=32, n_layer=2, n_head=4, **WORDS), PADDED, 2),
    "clip text": (lambda: hugging("CLIPTextModel", **words("CLIPTextConfig")), PADDED, 2),
    "hf vit": (
        lambda: hugging("ViTModel", "ViTConfig", image_size=32, patch_size=8, **TINY),
        {"pixel_values": IMAGES},
        2,
    ),
    "dinov2": (
        lambda: hugging("Dinov2Model", "Dinov2Config", image_size=32, patch_size=8, **TINY),
        {"pixel_values": IMAGES},
        2,
    ),
    "whisper": (whisper, {"input_features": SOUND, "decoder_input_ids": TOKENS}, 6),
    "diffusers unet": (
        unet,
        {"sample": torch.ones(2, 4, 16, 16), "timestep": 3, "encoder_hidden_states": SEQUENCE},
        8,
    ),
}


def tensor_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", MODELS)
def test_softmax_in_an_unmodified_model_changes_nothing(name: str) -> None:
    make, inputs, layers = MODELS[name]
    model = built(make)
    with torch.no_grad():
        before = tensor_of(model(**inputs))
        with attention(softmax_attention, model=model) as routed:
            rerouted = tensor_of(model(**inputs))
        after = tensor_of(model(**inputs))
    # Padded positions hold what nobody reads: torch's encoder writes zeros or whatever there.
    kept = RIGHT.bool() if before.shape[:2] == RIGHT.shape else slice(None)
    torch.testing.assert_close(rerouted[kept], before[kept], rtol=0, atol=1e-6)
    assert torch.equal(after, before)
    assert routed.calls.total() == layers
    assert not routed.left
    assert all(call.module for call in routed.calls)


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit", "bert, padded", "llama, padded"])
def test_the_function_is_really_called(name: str) -> None:
    make, inputs, layers = MODELS[name]
    model, seen = built(make), []

    def zeros(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        seen.append(set(keywords))
        return torch.zeros_like(query)

    with torch.no_grad(), attention(zeros, model=model):
        changed = tensor_of(model(**inputs))
    with torch.no_grad():
        assert not torch.allclose(changed, tensor_of(model(**inputs)))
    wanted = {"bert, padded": {"key_lengths", "scale"}, "llama, padded": {"causal", "key_lengths", "scale"}}
    assert seen == [wanted.get(name, set())] * layers


def test_generation_with_a_cache_is_the_same() -> None:
    model = built(lambda: hugging("LlamaForCausalLM", num_key_value_heads=2, **words("LlamaConfig")))
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    plain = model.generate(TOKENS, **settings)
    with attention(softmax_attention, model=model) as routed:
        assert torch.equal(model.generate(TOKENS, **settings), plain)
    assert {call.query[2] for call in routed.calls} == {1, TOKENS.shape[1]}


def beit() -> nn.Module:
    model = timm_model("beit_base_patch16_224", embed_dim=48, num_heads=3)
    for block in model.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    return model


LEFT = {"input_ids": TOKENS, "attention_mask": RIGHT.flip(1)}
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "bias, timm beit": (beit, {"x": IMAGES}, r"a bias .* in 'blocks\.0\.attn'"),
    "bias, t5": (
        lambda: hugging("T5EncoderModel", "T5Config", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **WORDS),
        {"input_ids": TOKENS},
        r"a bias .* in 'encoder\.block\.0",
    ),
    "left padding": (
        lambda: hugging("BertModel", **words("BertConfig")),
        LEFT,
        r"padding on the left in 'encoder\.layer\.0",
    ),
    "sliding window": (
        lambda: hugging("MistralModel", num_key_value_heads=2, sliding_window=3, **words("MistralConfig")),
        {"input_ids": TOKENS},
        r"sliding window.* in 'layers\.0",
    ),
    "nothing, hf eager": (
        lambda: hugging("BertModel", attn_implementation="eager", **words("BertConfig")),
        {"input_ids": TOKENS},
        r"nothing was rerouted.*attn_implementation='sdpa'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    make, inputs, message = REFUSED[name]
    model = built(make)
    with torch.no_grad(), pytest.raises(InputError, match=message), attention(softmax_attention, model=model):
        model(**inputs)


def test_timm_without_fused_attention_is_refused() -> None:
    model = built(lambda: timm_model("vit_tiny_patch16_224"))
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(InputError, match=r"nothing was rerouted.*fused_attn = True"), attention(softmax_attention):
        model(IMAGES)


def test_a_bias_goes_to_a_function_that_takes_masks() -> None:
    model = built(beit)

    def masked(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask)

    with torch.no_grad():
        with attention(masked) as routed:
            rerouted = model(IMAGES)
        assert torch.equal(rerouted, model(IMAGES))
    assert routed.calls.total() == 2


def test_dropout_is_refused_or_passed_on() -> None:
    model = built(lambda: torch_encoder(dropout=0.3)).train()
    refused = pytest.raises(InputError, match=r"dropout 0\.3.*model\.eval\(\)")
    with torch.random.fork_rng(), refused, attention(softmax_attention, model=model):
        model(SEQUENCE)

    def dropping(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0) -> Tensor:
        assert dropout_p == 0.3
        return value

    with torch.random.fork_rng(), attention(dropping, model=model) as routed:
        model(SEQUENCE)
    assert routed.calls.total() == 2


def test_asking_for_weights_is_refused() -> None:
    layer = built(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    x = SEQUENCE[..., :8]
    with pytest.raises(InputError, match="need_weights=False"), attention(softmax_attention):
        layer(x, x, x)
    plain, _ = layer(x, x, x, need_weights=False)
    with attention(softmax_attention):
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], plain)


def qkv(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A function that takes nothing beside the three."""
    return softmax_attention(query, key, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "causal attention.*takes causal"),
        ({"scale": 0.7}, "scaled by 0.7.*takes scale"),
        ({"attn_mask": torch.arange(5) < torch.tensor([[[[3]]], [[[5]]]])}, "padded keys.*takes key_lengths"),
        ({"attn_mask": torch.zeros(5, 5, requires_grad=True)}, "being trained"),
    ],
)
def test_a_plain_function_gets_only_plain_calls(options: dict[str, Any], message: str) -> None:
    query, key, value = qkv(2, 3, 5, 4)
    with pytest.raises(InputError, match=message), attention(plain):
        scaled_dot_product_attention(query, key, value, **options)


def test_the_usual_scale_is_not_worth_a_refusal() -> None:
    query, key, value = qkv(2, 3, 5, 4)
    with attention(plain) as routed:
        scaled_dot_product_attention(query, key, value, scale=4**-0.5)
    assert routed.calls.total() == 1


def test_a_cached_causal_chunk_is_refused() -> None:
    query, key, value = qkv(2, 3, 5, 4)
    with pytest.raises(InputError, match="3 queries over 5 keys"), attention(softmax_attention):
        scaled_dot_product_attention(query[:, :, :3], key, value, is_causal=True)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(3, 5, 4)] * 3, {}),
        ([(3, 5, 4)] * 3, {"is_causal": True}),
        ([(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)], {"enable_gqa": True}),
        ([(2, 4, 5, 4), (1, 4, 7, 4), (1, 4, 7, 6)], {"scale": 0.3}),
        ([(2, 4, 1, 4), (2, 4, 7, 4), (2, 4, 7, 4)], {"attn_mask": (torch.arange(7) < 4)[None]}),
    ],
)
def test_calls_of_every_form_come_back_in_that_form(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    query, key, value = (qkv(*shape, seed=place)[0] for place, shape in enumerate(shapes))
    wanted = scaled_dot_product_attention(query, key, value, **options)
    with attention(softmax_attention):
        found = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, wanted)


LENGTHS = torch.tensor([3, 6])
PLACE = torch.arange(6)
TRIL = torch.ones(6, 6, dtype=torch.bool).tril()
ENDS = (LENGTHS[:, None] > PLACE)[:, None, None, :]


def added(mask: Tensor, hidden: float = float("-inf")) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


@pytest.mark.parametrize("form", [lambda mask: mask, added, lambda mask: added(mask, torch.finfo(torch.float32).min)])
@pytest.mark.parametrize(
    ("mask", "causal", "lengths"),
    [
        (torch.ones(6, 6, dtype=torch.bool), False, None),
        (TRIL, True, None),
        (TRIL.expand(2, 4, 6, 6), True, None),
        (ENDS, False, [3, 6]),
        (ENDS.expand(2, 4, 6, 6), False, [3, 6]),
        (ENDS.expand(2, 4, 6, 6).contiguous(), False, [3, 6]),
        (ENDS & TRIL, True, [3, 6]),
        (PLACE < 4, False, [4, 4]),
    ],
)
def test_masks_are_put_in_words(form: Any, mask: Tensor, causal: bool, lengths: list[int] | None) -> None:
    meaning = read_mask(form(mask), batch=2, queries=6, keys=6)
    assert meaning.causal == causal
    assert (None if meaning.key_lengths is None else meaning.key_lengths.tolist()) == lengths


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (ENDS.flip(-1), "left"),
        (PLACE != 2, "middle"),
        (TRIL & TRIL.T.roll(-2, 0), "neither causal nor padding"),
        (TRIL.T, "neither causal nor padding"),
        (TRIL & (PLACE[:, None] < 5), "middle|neither|padding"),
        (torch.stack([TRIL, TRIL.T])[None], "heads"),
        (torch.full((6, 6), 0.5), "bias"),
        (added(TRIL, -100.0), "bias"),
        (added(ENDS & (LENGTHS[:, None, None, None] > 3), torch.finfo(torch.float32).min), "without keys"),
        (TRIL[:4], "4 queries different parts of 6 keys"),
    ],
)
def test_masks_that_mean_something_else_are_named(mask: Tensor, said: str) -> None:
    found = read_mask(mask, batch=2, queries=mask.shape[-2] if mask.dim() > 1 else 6, keys=6)
    assert isinstance(found, str)
    assert re.search(said, found)


def test_a_mask_changed_in_place_is_read_again() -> None:
    query, key, value = qkv(2, 3, 6, 4)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    with attention(softmax_attention):
        scaled_dot_product_attention(query, key, value, mask)
        mask[0, ..., 4:] = False
        found = scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, mask))


def test_layers_are_chosen_by_name() -> None:
    model = built(MODELS["timm vit"][0])
    zeros = functools.partial(torch.mul, torch.zeros(()))  # any callable; never called below

    with attention(softmax_attention, model=model, where=r"blocks\.1\.") as routed:
        model(IMAGES)
    assert [call.module for call in routed.calls] == ["blocks.1.attn"]
    assert [call.module for call in routed.left] == ["blocks.0.attn"]
    with attention(softmax_attention, model=model, where=lambda name: "0" in name) as routed:
        model(IMAGES)
    assert [call.module for call in routed.calls] == ["blocks.0.attn"]
    with attention({"blocks.1": softmax_attention, "head": zeros}, model=model) as routed:
        model(IMAGES)
    assert [call.module for call in routed.left] == ["blocks.0.attn"]


def test_calls_from_elsewhere_are_left_alone_where_a_model_is_given() -> None:
    model, query = built(MODELS["torchvision vit"][0]), qkv(1, 1, 3, 4)
    with attention(softmax_attention, model=model) as routed:
        scaled_dot_product_attention(*query)
        model(IMAGES)
    assert [call.module for call in routed.left] == [None]
    assert routed.calls.total() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fn": softmax_attention, "where": "x"}, "model="),
        ({"fn": {"x": softmax_attention}}, "model="),
        ({"fn": 3}, "a function"),
        ({"fn": softmax_attention, "model": nn.Identity(), "where": "("}, "regular expression"),
        ({"fn": softmax_attention, "model": nn.Identity(), "where": 3}, "where="),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), attention(**arguments):
        pytest.fail("the block was entered")


def test_a_choice_that_fits_no_layer_names_what_there_is() -> None:
    model = built(MODELS["timm vit"][0])
    with (
        pytest.raises(InputError, match=r"none chosen out of blocks\.0\.attn, blocks\.1\.attn"),
        attention(softmax_attention, model=model, where="layer9"),
    ):
        model(IMAGES)


def test_a_function_of_the_wrong_shape_is_told() -> None:
    with pytest.raises(InputError, match=r"to return a tensor \[2, 3, 5, 4\]"), attention(lambda q, k, v: q[:1]):
        scaled_dot_product_attention(*qkv(2, 3, 5, 4))


def scaled(factor: float) -> Callable[..., Tensor]:
    return lambda query, key, value: factor * value


def test_the_innermost_block_wins_and_leaves_the_rest_to_the_outer() -> None:
    query, key, value = qkv(1, 1, 3, 4)
    with attention(scaled(2)) as outer:
        with attention(scaled(3)):
            assert torch.equal(scaled_dot_product_attention(query, key, value), 3 * value)
        with attention(softmax_attention):  # calls torch's attention itself: not the outer block's business
            inner = scaled_dot_product_attention(query, key, value)
        assert torch.equal(scaled_dot_product_attention(query, key, value), 2 * value)
    torch.testing.assert_close(inner, scaled_dot_product_attention(query, key, value))
    assert outer.calls.total() == 1
    model = built(MODELS["torchvision vit"][0])
    with (
        attention(softmax_attention, model=model) as outer,
        attention(softmax_attention, model=model, where="layer_1") as nested,
    ):
        model(IMAGES)
    assert Counter(call.module[-16:] for call in nested.calls) == {"1.self_attention": 1}
    assert Counter(call.module[-16:] for call in outer.calls) == {"0.self_attention": 1}


def test_everything_is_undone_after_an_error() -> None:
    query, key, value = qkv(1, 1, 3, 4)
    model = built(MODELS["torchvision vit"][0])

    def failing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), attention(failing, model=model):
            model(IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with attention(scaled(2)):
        assert torch.equal(scaled_dot_product_attention(query, key, value), 2 * value)
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value), plain(query, key, value))


def test_gradients_flow() -> None:
    query, key, value = (item.requires_grad_() for item in qkv(2, 3, 5, 4))
    with attention(softmax_attention):
        found = torch.autograd.grad(scaled_dot_product_attention(query, key, value).square().sum(), (query, key, value))
    wanted = torch.autograd.grad(scaled_dot_product_attention(query, key, value).square().sum(), (query, key, value))
    torch.testing.assert_close(found, wanted)


def test_other_threads_keep_torch_attention() -> None:
    model, other = built(MODELS["torchvision vit"][0]), []
    before = model(IMAGES)
    with attention(lambda query, key, value: value, model=model) as routed:
        rerouted = model(IMAGES)
        thread = threading.Thread(target=lambda: other.append(model(IMAGES)))
        thread.start()
        thread.join()
    assert routed.calls.total() == 2
    assert not torch.allclose(rerouted, before)
    torch.testing.assert_close(other[0], before, rtol=0, atol=1e-6)


def test_autocast_reaches_the_function() -> None:
    seen = []

    def watching(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append({query.dtype, key.dtype, value.dtype})
        return value

    query, key, value = (item.float() for item in qkv(1, 1, 3, 4))
    with torch.autocast("cpu", torch.bfloat16), attention(watching):
        assert scaled_dot_product_attention(query, key.bfloat16(), value).dtype == torch.bfloat16
    assert seen == [{torch.bfloat16}]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_models_run_rerouted_and_uncompiled(fullgraph: bool) -> None:
    query, key, value = qkv(1, 2, 3, 4)
    runs = []

    def count(graph: Any, _: Any) -> Any:
        runs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *x: scaled_dot_product_attention(*x) + 1, backend=count, fullgraph=fullgraph)
    with attention(scaled(2)):
        assert torch.equal(compiled(query, key, value), 2 * value + 1)
    assert not runs
    torch.testing.assert_close(compiled(query, key, value), plain(query, key, value) + 1)
    assert len(runs) == 1


def test_a_block_inside_a_compiled_function_is_refused() -> None:
    def inside(*x: Tensor) -> Tensor:
        with attention(scaled(2)):
            return scaled_dot_product_attention(*x)

    with pytest.raises(InputError, match="outside compiled functions"):
        torch.compile(inside, backend="eager")(*qkv(1, 2, 3, 4))
