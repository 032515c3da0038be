"""`to_lora` against unmodified peft and diffusers: the same outputs as the adapter it was made from."""

from __future__ import annotations

import json
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.adapt import attach_, full, linear, lora, nola, to_lora, use_
from scrimp.adapt.methods import Method, bias
from scrimp.primitives.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# peft fills what it then loads at random.
pytestmark = [pytest.mark.touches_global_rng, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every trained number moved, so that no part of the adapter is still at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exported(
    base: nn.Module, folder: Path, method: Method | None = None, *, where: object = r".", also: str | None = None
) -> tuple[nn.Module, nn.Module]:
    """The adapted model, and a fresh copy of its base under what peft makes of the exported folder."""
    adapted = deepcopy(base)
    attach_(adapted, method or nola(3, 16, seed=5), where=where, also=also)  # type: ignore[arg-type]
    to_lora(randomized(adapted), folder)
    return adapted.eval(), peft.PeftModel.from_pretrained(deepcopy(base), folder).eval()


class Words(nn.Module):
    """An embedding, a convolution, a transposed and an ordinary linear layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(11, 8, padding_idx=0)
            self.mix = nn.Conv1d(8, 6, 3, stride=2, padding=1)
            self.hidden = nn.Linear(6, 7)
            self.norm = nn.LayerNorm(7)
            self.head = nn.Linear(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.words(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(torch.relu(self.hidden(mixed)))).mean(1)


TOKENS = torch.tensor([[0, 3, 10, 1, 5], [2, 2, 7, 0, 9]])


@pytest.mark.parametrize("method", [nola(3, 16, seed=5, alpha=1.5), nola(2, 64, bits=4), lora(3, alpha=7.0)])
def test_embedding_convolution_and_linear(tmp_path: Path, method: Method) -> None:
    adapted, loaded = exported(Words(), tmp_path, method, where=r"words|mix|hidden")
    base = Words().eval()
    assert (adapted(TOKENS) - base(TOKENS)).abs().max() > 1e-2
    torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS), atol=1e-5, rtol=0)


def test_parameters_in_full_are_modules_to_save(tmp_path: Path) -> None:
    adapted, loaded = exported(Words(), tmp_path, where=r"words|mix|hidden", also=r"^head\.|^norm\.weight")
    torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["norm", "head"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (1, 3), padding="same", bias=False),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(8, 4, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv3d(4, 3, 2),
    ],
)
def test_convolutions(tmp_path: Path, layer: nn.Module) -> None:
    base = nn.Sequential(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd")
        adapted, loaded = exported(base, tmp_path)
    images = inputs(2, layer.in_channels, *[7] * len(layer.kernel_size))  # type: ignore[arg-type]
    torch.testing.assert_close(loaded(images), adapted(images), atol=1e-5, rtol=0)


def test_ranks_of_grouped_convolutions_stand_beside_the_others(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.Conv2d(8, 2, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd")
        adapted, loaded = exported(base, tmp_path)
    torch.testing.assert_close(loaded(inputs(2, 4, 5, 5)), adapted(inputs(2, 4, 5, 5)), atol=1e-5, rtol=0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.attention(tokens, tokens, tokens)[0]
        return mixed


def test_packed_attention(tmp_path: Path) -> None:
    adapted, loaded = exported(Attention(), tmp_path, where="in_proj_weight")
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs(2, 5, 8)), adapted(inputs(2, 5, 8)), atol=1e-5, rtol=0)


def test_turned_layers_of_gpt2(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    adapted, loaded = exported(transformers.GPT2LMHeadModel(config), tmp_path, where=r"c_attn|mlp\.c_proj")
    tokens = TOKENS % 19
    torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits, atol=1e-5, rtol=0)


class Fusible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def fused(self) -> Tensor:
        return self.body.weight * 2

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


def test_weights_that_only_other_functions_read(tmp_path: Path) -> None:
    adapted, loaded = exported(Fusible(), tmp_path)
    torch.testing.assert_close(loaded(inputs(3, 4)), adapted(inputs(3, 4)), atol=1e-5, rtol=0)


def test_names_that_end_alike_are_not_mistaken(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner["fc"](self.fc(inputs))

    adapted, loaded = exported(Pair(), tmp_path, where=r"^fc$")
    torch.testing.assert_close(loaded(inputs(3, 4)), adapted(inputs(3, 4)), atol=1e-5, rtol=0)
    assert not any("inner" in name for name, _ in loaded.named_parameters() if "lora" in name)


def test_modules_to_save_that_end_alike_are_all_saved(tmp_path: Path) -> None:
    base = nn.Sequential()
    for name, layer in (("body", nn.Linear(4, 4)), ("fc_norm", nn.LayerNorm(4)), ("norm", nn.LayerNorm(4))):
        base.add_module(name, layer)
    adapted, loaded = exported(base, tmp_path, where="body", also=r"^norm\.")
    torch.testing.assert_close(loaded(inputs(3, 4)), adapted(inputs(3, 4)), atol=1e-5, rtol=0)


def test_diffusers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("diffusers", reason="diffusers is not installed")
        base = models.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
        )
    adapted, loaded = deepcopy(base), deepcopy(base)
    attach_(adapted, nola(2, 16), where=r"to_[qkv]$|proj_in$|ff\.net|conv1$")
    to_lora(randomized(adapted), tmp_path)
    given = (inputs(1, 4, 8, 8), torch.tensor([3]), inputs(1, 3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    want, got = adapted(*given).sample, loaded(*given).sample
    assert (want - base(*given).sample).abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_what_vllm_reads(tmp_path: Path) -> None:
    """vllm/lora/peft_helper.py and utils.py: fields with these values, keys with these ends, nothing beside."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    attach_(model, lora(2), where=r".")
    to_lora(model, tmp_path, base="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert config["target_modules"] == ["0", "1"]
    assert [config[key] for key in ("modules_to_save", "bias", "use_dora", "use_rslora")] == [
        None,
        "none",
        False,
        False,
    ]
    assert config["base_model_name_or_path"] == "some/base"
    shapes = {name: list(value.shape) for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.0.lora_A.weight": [2, 4],
        "base_model.model.0.lora_B.weight": [6, 2],
        "base_model.model.1.lora_A.weight": [2, 6],
        "base_model.model.1.lora_B.weight": [2, 2],
    }


def test_same_bytes_twice_and_model_untouched(tmp_path: Path) -> None:
    model = Words()
    attach_(model, nola(2, 8), where=r"hidden", also=r"^head\.")
    before = {name: value.clone() for name, value in randomized(model).state_dict().items()}
    drawn = torch.random.get_rng_state()
    one, two = to_lora(model, tmp_path / "one"), to_lora(model, tmp_path / "two")
    assert torch.equal(drawn, torch.random.get_rng_state())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_needs_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = nn.Sequential(nn.Linear(4, 4))
    attach_(model, lora(1), where=r".")
    assert (to_lora(model, tmp_path) / "adapter_config.json").is_file()


class _Own(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight * 2, self.bias)


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.body.weight)


class _Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)


REFUSED = {
    "only existing parameters": (nn.Sequential(nn.Linear(4, 4)), bias(), None, None, "bias, which trains"),
    "everything": (nn.Sequential(nn.Linear(4, 4)), full(), None, None, "full, which trains"),
    "the head alone": (nn.Sequential(nn.Linear(4, 4)), linear(), None, r"0", "linear, which trains"),
    "a forward of its own": (nn.Sequential(_Own(4, 4)), nola(1, 4), r".", None, "torch's own forward pass"),
    "dilated": (nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2)), nola(1, 4), r".", None, "without dilation"),
    "padded by mirror": (
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), nola(1, 4), r".", None, "zeros"
    ),
    "separate projections": (
        nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3)), nola(1, 4), r"q_proj", None, "torch's own forward pass"
    ),
    "a layer that is never called": (_Reader(), nola(1, 4), r"body", None, "layers that are called"),
    "attention's output layer": (Attention(), nola(1, 4), r"out_proj", None, "torch's own forward pass"),
    "a loose parameter": (_Loose(), nola(1, 4), "body", "^token$", "token, the whole model's own"),
    "in full and adapted, by an ending": (
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(11)]), nola(1, 4), r"^10$", r"^0\.", "10 and 10 in it"
    ),
    "in full and adapted": (nn.Sequential(nn.Linear(4, 4)), nola(1, 4), r".", r"0\.bias", "0 and 0 in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(tmp_path: Path, case: str) -> None:
    model, method, where, also, said = REFUSED[case]
    attach_(model, method, where=where, also=also)
    with pytest.raises(InputError, match=said):
        to_lora(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_no_live_adapter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="a model with an adapter"):
        to_lora(model, tmp_path / "folder")
    attach_(model, lora(1), where=r".")
    use_(model, None)
    with pytest.raises(InputError, match="live adapter to export"):
        to_lora(model, tmp_path / "folder")
