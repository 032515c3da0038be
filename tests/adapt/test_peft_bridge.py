"""NOLA as a method of peft, by peft's public doors alone, against `attach_`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.adapt import attach_, independent, nola
from scrimp.primitives.errors import InputError, MissingExtraError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from scrimp.adapt.peft_bridge import NolaConfig, NolaLayer

pytestmark = [pytest.mark.touches_global_rng, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]


class Net(nn.Module):
    """Every kind of layer that can be adapted, and a head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.mix = nn.Conv2d(1, 4, 3, padding=1)
        self.turned = Conv1D(6, 8)
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.words(tokens).unsqueeze(1)).mean(1)
        return self.head(torch.tanh(self.hidden(self.turned(mixed)))).mean(1)


TOKENS = torch.tensor([[0, 3, 10, 1], [2, 2, 7, 9]])
TARGETS = ["words", "mix", "turned", "hidden"]


def bare() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def moved(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "nola_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def adapted(seed: int = 0, **settings: Any) -> Any:
    config = NolaConfig(**({"r": 2, "bases": 16, "seed": 7, "target_modules": TARGETS} | settings))
    return moved(peft.get_peft_model(bare(), config), seed)


def test_starts_as_the_identity_and_trains_coefficients_alone() -> None:
    model = peft.get_peft_model(bare(), NolaConfig(r=2, bases=16, target_modules=TARGETS))
    assert torch.equal(model(TOKENS), bare()(TOKENS))
    model(TOKENS).square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"alpha", "beta"}
    assert all(bool(parameter.grad.any()) == name.endswith("beta") for name, parameter in trained.items())  # type: ignore[union-attr]
    assert model.get_nb_trainable_parameters()[0] == sum(
        min(16, 2 * side) for sides in ((8, 11), (9, 4), (8, 6), (6, 5)) for side in sides
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "independent"},
        {"shared": True, "nola_alpha": 0.5},
        {"bits": 4},
    ],
)
def test_the_bases_are_those_of_attach(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    ours = bare()
    combine = {"combine": independent} if settings.get("kind") else {}
    method = nola(
        2, 16, 7, alpha=settings.get("nola_alpha"), shared=settings.get("shared", False), bits=settings.get("bits"),
        **combine,
    )  # fmt: skip
    attach_(ours, method, where="^(words|mix|turned|hidden)$")
    theirs = [parameter for name, parameter in model.named_parameters() if "nola_" in name]
    own = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for one, other in zip(own, theirs, strict=True):
            one.copy_(other)
    assert (model(TOKENS) - bare()(TOKENS)).abs().max() > 1e-3
    assert torch.equal(model(TOKENS), ours(TOKENS))


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"bits": 2}, {"modules_to_save": ["head"]}])
def test_reload_differs_by_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(), tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert type(again.peft_config["default"]) is NolaConfig
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name for name in saved if not name.endswith(("nola_factors.alpha", "nola_factors.beta"))}
    heads = {f"base_model.model.head.{part}" for part in ("weight", "bias")}
    assert kept == (heads if "modules_to_save" in settings else set())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["seed"], config["generator"], config["peft_type"]) == (7, "philox-1", "NOLA")
    assert config["weights"] == "words:11x8,mix:4x9,turned:6x8,hidden:5x6"


@pytest.mark.slow
def test_a_fresh_process_finds_the_same_outputs(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    model = moved(peft.get_peft_model(deepcopy(base), NolaConfig(r=2, bases=8, target_modules=["0", "2"])))
    model.save_pretrained(tmp_path)
    torch.save((base, model(torch.ones(1, 6)).detach()), tmp_path / "case.pt")
    code = (
        "import sys, torch, peft, scrimp.adapt.peft_bridge\n"
        "base, want = torch.load(sys.argv[1] + '/case.pt', weights_only=False)\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[1])\n"
        "assert torch.equal(model(torch.ones(1, 6)), want)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ)


def test_several_adapters_and_none() -> None:
    model = adapted()
    one = model(TOKENS)
    model.add_adapter("other", NolaConfig(r=3, bases=8, seed=1, target_modules=["hidden"]))
    assert torch.equal(model(TOKENS), one)
    model.set_adapter("other")
    assert torch.equal(model(TOKENS), bare()(TOKENS))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".other." in name for name in trained)
    moved(model, 3)
    assert (model(TOKENS) - bare()(TOKENS)).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), bare()(TOKENS))
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    model.set_adapter("default")
    moved(model, 0)
    torch.testing.assert_close(model(TOKENS), one)


def test_merge_and_back() -> None:
    model = adapted()
    want = model(TOKENS)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(TOKENS), want, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS), want, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert type(merged) is Net
    assert not any(isinstance(module, NolaLayer) for module in merged.modules())
    torch.testing.assert_close(merged(TOKENS), want, atol=1e-5, rtol=0)
    unloaded = adapted().unload()
    assert torch.equal(unloaded(TOKENS), bare()(TOKENS))


def test_low_memory_loading_and_half_precision(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(TOKENS), model(TOKENS))
    half = peft.PeftModel.from_pretrained(bare().bfloat16(), tmp_path)
    assert all(value.dtype == torch.float32 for name, value in half.named_parameters() if "nola_" in name)
    torch.testing.assert_close(half(TOKENS).float(), model(TOKENS), atol=0.1, rtol=0.1)


def test_language_models_have_their_usual_targets(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    model = moved(peft.get_peft_model(deepcopy(base), NolaConfig(task_type="CAUSAL_LM"))).eval()
    assert model.targeted_module_names == [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_other_weights_than_it_was_made_for(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    other = bare()
    other.hidden = nn.Linear(6, 4)
    with pytest.raises(InputError, match=r"own weights words:11x8,mix:4x9,turned:6x8,hidden:5x6; got .*hidden:4x6"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_a_config_can_be_used_for_several_models() -> None:
    config = NolaConfig(r=1, bases=4, target_modules=["0"])
    for width in (3, 4):
        peft.get_peft_model(nn.Sequential(nn.Linear(width, 2)), config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "rank at least 1"),
        ({"bits": 5}, "bits 8, 4"),
        ({"kind": "sparse"}, "kind of bases out of: orthogonal, independent"),
        ({"generator": "philox-2"}, "generator philox-1; got philox-2"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        NolaConfig(**settings)


def test_layers_that_cannot_be_adapted() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(InputError, match="got 0, a MultiheadAttention"):
        peft.get_peft_model(attention, NolaConfig(target_modules=["0"]))
    with pytest.raises(InputError, match=r"got 0\.out_proj, a NonDynamically"):
        peft.get_peft_model(attention, NolaConfig(target_modules=["out_proj"]))
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    layered = peft.get_peft_model(model, NolaConfig(target_modules=["0"], r=1, bases=4))
    with pytest.raises(InputError, match="floating-point weights to merge into; got int8"):
        layered.merge_and_unload()


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "scrimp.adapt.peft_bridge")
    with pytest.raises(MissingExtraError, match=r"pip install 'scrimp\[peft\]'"):
        import scrimp.adapt.peft_bridge  # noqa: F401
