"""Adapters on the models people have: timm, torchvision, transformers, diffusers, and quantised bases."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scrimp.adapt.attach import adapters, attach_, detach_, merge_, use_
from scrimp.adapt.install import numbers_of, state_of
from scrimp.adapt.lora import lora
from scrimp.adapt.nola import nola
from scrimp.adapt.targets import adaptable, find_targets
from scrimp.primitives.errors import InputError


@pytest.fixture(autouse=True)
def one_thread():
    """Small models by the dozen are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(make: Callable[[], nn.Module]) -> nn.Module:
    """A fresh model without zeros: many end their branches in some, and no adapter would show."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().eval()
        for parameter in model.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.2)
    return model


def shake_(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for number in numbers_of(state_of(model)):
            number.copy_(0.2 * torch.randn(number.shape, generator=generator))


def check(model: nn.Module, call: Callable[[nn.Module], Tensor], **options) -> list[str]:
    """Identity at the start, every number at work, merged the same, and back bit for bit."""
    with torch.no_grad():
        bare = call(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = attach_(model, lora(1), name="a", **options)
    shake_(model)
    attach_(model, nola(1, 4), **options)
    with torch.no_grad():
        assert torch.equal(call(model), bare)
    shake_(model)
    call(model).square().sum().backward()
    idle = [
        name
        for name, item in model.named_parameters()
        if item.requires_grad and (item.grad is None or not item.grad.any())
    ]
    assert idle == []
    with torch.no_grad():
        adapted = call(model)
    assert float((adapted - bare).abs().max()) > 1e-4 * float(bare.abs().max())
    use_(model, "a")
    use_(model, "default")
    with torch.no_grad():
        assert torch.equal(call(model), adapted)
    use_(model, None)
    with torch.no_grad():
        assert torch.equal(call(model), bare)
    use_(model, "default")
    merge_(model)
    with torch.no_grad():
        merged = call(model)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5 * float(adapted.abs().max()))
    model.load_state_dict(before)
    attach_(model, lora(1), **options)
    shake_(model)
    detach_(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return names


def pictures(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


WINDOWS = {"img_size": 64, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "window_size": 4}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "efficientnet": ("efficientnet_b0", {}),
    "own padding": ("tf_mobilenetv3_small_minimal_100", {}),
    "resnet18": ("resnet18", {}),
    "own normalisation": ("nf_resnet26", {}),
    "swin v2": ("swinv2_tiny_window8_256", WINDOWS),
    "another swin v2": ("swinv2_cr_tiny_224", WINDOWS),
    "beit": ("beit_base_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 24, "num_heads": 2}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 28}),
    "two heads": ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 32}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind):
    timm = pytest.importorskip("timm")
    name, options = TIMM[kind]
    model = quiet(lambda: timm.create_model(name, num_classes=5, **options))
    side = options.get("img_size", 32)
    names = check(model, lambda model: model(pictures(side)))
    heads = model.get_classifier()
    inner = {id(part) for head in (heads if isinstance(heads, tuple) else (heads,)) for part in head.modules()}
    weights = [item for item in model.modules() if isinstance(item, nn.Linear | nn.Conv2d) and id(item) not in inner]
    assert [model.get_submodule(name) for name in names] == weights
    assert inner


VIT = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
SWIN = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
TORCHVISION = {
    "resnet18": ("resnet18", {}, "fc"),
    "vit": ("VisionTransformer", VIT, "heads"),
    "swin": ("SwinTransformer", SWIN, "head"),
}


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision(kind):
    models = pytest.importorskip("torchvision.models")
    name, options, head = TORCHVISION[kind]
    make = getattr(models, name) if hasattr(models, name) else getattr(models.swin_transformer, name)
    model = quiet(lambda: make(num_classes=4, **options))
    names = check(model, lambda model: model(pictures()))
    assert not any(name.startswith(head) for name in names)
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    packed = [f"{n}.in_proj_weight" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert sorted(names) == sorted([name for name in every if not name.startswith(head)] + packed)


TOKENS = torch.tensor([[1, 5, 3, 2, 9], [4, 4, 8, 0, 2]])
SMALL = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def gpt2(transformers) -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **SMALL)
    return quiet(lambda: transformers.GPT2LMHeadModel(config))


def test_gpt2(gpt2):
    """Turned weights, and a table tied to the output layer."""
    names = check(gpt2, lambda model: model(input_ids=TOKENS).logits)
    assert len(names) == 8
    assert all(part in name for name in names for part in ("transformer.h.",))
    assert check(gpt2, lambda model: model(input_ids=TOKENS).logits, where="wpe") == ["transformer.wpe"]
    for where in ("wte", "lm_head"):
        before = list(gpt2.state_dict())
        with pytest.raises(InputError, match=r"transformer\.wte\.weight, which is also lm_head\.weight"):
            attach_(gpt2, lora(1), where=where)
        assert list(gpt2.state_dict()) == before
        assert adapters(gpt2) == ()
    attach_(gpt2, lora(1), also=r"^lm_head\.weight$")
    trained = [name for name, item in gpt2.named_parameters() if item.requires_grad and "adapter" not in name]
    assert trained == ["transformer.wte.weight"]


def test_llama(transformers):
    config = transformers.LlamaConfig(**SMALL, **WIDE)
    model = quiet(lambda: transformers.LlamaForCausalLM(config))
    names = check(model, lambda model: model(input_ids=TOKENS).logits)
    assert len(names) == 14
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    attach_(model, nola(1, 4), where=r"[qv]_proj")
    shake_(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(item.grad is not None and item.grad.any() for item in numbers_of(state_of(model)))


def test_bert(transformers):
    config = transformers.BertConfig(**SMALL, **WIDE, num_labels=3, attn_implementation="eager")
    model = quiet(lambda: transformers.BertForSequenceClassification(config))
    names = check(model, lambda model: model(input_ids=TOKENS, attention_mask=(TOKENS != 0).long()).logits)
    assert len(names) == 13  # the pooling layer with them, the classifier not
    assert "classifier" not in names
    table = "bert.embeddings.word_embeddings"
    assert check(model, lambda model: model(input_ids=TOKENS).logits, where=table) == [table]


def test_causal_classifier(transformers):
    config = transformers.LlamaConfig(**SMALL, **WIDE, num_labels=3)
    model = quiet(lambda: transformers.LlamaForSequenceClassification(config))
    names = [target.name for target in find_targets(model, None)]
    assert len(names) == 14
    assert "score" not in names


def test_t5_with_a_shared_table(transformers):
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    model = quiet(lambda: transformers.T5ForConditionalGeneration(config))
    names = check(model, lambda model: model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits)
    assert not any("shared" in name or "lm_head" in name for name in names)


def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    model = quiet(lambda: diffusers.UNet2DModel(sample_size=8, **kinds))
    names = check(model, lambda model: model(pictures(8), 3).sample)
    assert any("to_q" in name for name in names)
    assert any("conv1" in name for name in names)
    assert len(names) == sum(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules())


def test_peft_wrapped_models_are_adapted_inside():
    """What another library put around the layers is no obstacle."""
    peft = pytest.importorskip("peft")
    inner = quiet(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with torch.random.fork_rng():
        model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["0"])).eval()
    names = [target.name for target in adaptable(model) if "lora_" not in target.name]
    assert [name.split("model.")[-1] for name in names] == ["0.base_layer", "1"]


def test_a_thousand_adapters_on_one_base():
    """Kept as numbers, each comes back to the last bit."""
    timm = pytest.importorskip("timm")
    model = quiet(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10))
    names = attach_(model, nola(4, 64), name="0", where=r"blocks\.\d+\.(attn|mlp)", also=r"^head\.")
    assert len(names) == 48
    state = state_of(model)
    numbers, head = numbers_of(state), model.head.weight
    size = sum(item.numel() for item in numbers)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(1000, size, generator=generator)
    from scrimp.adapt.install import Values, load_values_

    for number, values in enumerate(wanted):
        also = {"head.weight": torch.full_like(head, number), "head.bias": torch.zeros(10)}
        state.kept[f"n{number}"] = (state.recipe, Values(values.clone(), also))
    load_values_(model, Values(torch.zeros(size), {}))
    order = torch.randperm(1000, generator=generator).tolist()
    wrong = []
    for number in order + order[:50]:
        use_(model, f"n{number}")
        if not torch.equal(torch.cat([item.detach().flatten() for item in numbers]), wanted[number]):
            wrong.append(number)
        if float(model.head.weight.detach().min()) != number:
            wrong.append(number)
    assert wrong == []
    assert len(adapters(model)) == 1001
    assert all(torch.equal(state.kept[f"n{number}"][1].factors, wanted[number]) for number in order[50:])


def packed_by(kind: str) -> nn.Module:
    """Three layers, the middle one quantised by a library, or skip."""
    model = quiet(lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)))
    model = model.to(torch.bfloat16)
    if kind.startswith("torchao"):
        pytest.importorskip("torchao", reason="torchao is not installed")
        quantization = importlib.import_module("torchao.quantization")
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(model, config, filter_fn=lambda module, name: name == "2")
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4") if kind.endswith("4") else (
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))  # fmt: skip
    made.load_state_dict(model[2].state_dict())
    model[2] = made
    return model.to("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torchao 8", "bitsandbytes 4", "bitsandbytes 8"])
def test_quantised_bases(kind):
    with torch.random.fork_rng():
        model = packed_by(kind)
    inputs = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    with torch.no_grad():
        bare = model(inputs)
    attach_(model, nola(4, 16), where="2")
    with torch.no_grad():
        assert torch.equal(model(inputs), bare)
        hidden = nn.functional.gelu(model[0](inputs))
    shake_(model)
    delta = model[2].adapter.delta().detach()
    with torch.no_grad():
        change = model[2](hidden).float() - base_output(model[2], hidden)
    torch.testing.assert_close(change, hidden.float() @ delta.T, rtol=0.05, atol=0.05)
    model(inputs).float().square().sum().backward()
    assert all(item.grad is not None and item.grad.any() for item in numbers_of(state_of(model)))
    with pytest.raises(InputError, match="plain floating-point weights to merge into; got 2:"):
        merge_(model)
    detach_(model)
    with torch.no_grad():
        assert torch.equal(model(inputs), bare)


def base_output(module: nn.Module, hidden: Tensor) -> Tensor:
    module.adapter.on = False
    output = module(hidden).float()
    module.adapter.on = True
    return output
