"""Encoders from every kind of source give the features that the model itself gives; what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scrimp.data import TensorImages
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.encoders import (
    EncoderFacts,
    create_encoder,
    encode,
    encoder_from_metadata,
    encoder_metadata,
    features_of,
    load_encoder,
)
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.models import create_model
from scrimp.jobs.train import train
from scrimp.primitives.errors import InputError

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def seeded(make: Any, *arguments: Any, **settings: Any) -> Any:
    """A model with fixed weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **settings).eval()


def pixels(count: int, *shape: int, seed: int = 0) -> TensorImages:
    values = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return TensorImages(values.to(torch.uint8), torch.zeros(count, dtype=torch.int64))


def normalised(images: TensorImages, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """By hand."""
    values = images.pixels.double() / 255
    return ((values - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).float()


def saved(path: Path, model: nn.Module, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path, metadata)
    return path


def said(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        load_encoder(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_metadata_comes_back_whole():
    facts = {"channels": 3, "size": 32, "mean": (0.49, 0.5, 1e-7), "std": (0.2, 0.25, 1 / 3), "dim": 512}
    written = encoder_metadata("resnet18", **facts)
    assert written["kind"] == "encoder"
    assert all(isinstance(value, str) for value in written.values())
    assert encoder_from_metadata(written) == EncoderFacts(name="resnet18", **facts)
    for key, value in (("size", "wide"), ("std", "0.1"), ("mean", "")):
        with pytest.raises(InputError):
            encoder_from_metadata({**written, key: value})
    with pytest.raises(InputError, match="dim"):
        encoder_from_metadata({key: value for key, value in written.items() if key != "dim"})


@pytest.mark.parametrize("name", ["convnet-4", "small-resnet18-4", "resnet10t"])
@pytest.mark.parametrize("as_run", [False, True])
def test_an_encoders_file_says_everything(tmp_path, name, as_run):
    model = seeded(create_encoder, name, channels=3, size=32)
    dim = model(torch.zeros(1, 3, 32, 32)).shape[1]
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    about = encoder_metadata(name, channels=3, size=32, mean=mean, std=std, dim=dim)
    file = saved(tmp_path / "run" / (WEIGHTS if as_run else "mine.safetensors"), model, about)
    found = load_encoder(file.parent if as_run else file)
    assert (found.name, found.dim, found.channels, found.size, found.mean, found.std) == (name, dim, 3, 32, mean, std)
    assert not found.model.training
    images = pixels(5, 3, 32, 32)
    with torch.no_grad():
        wanted = model(normalised(images, mean, std))
    assert torch.allclose(features_of(found, images, device="cpu"), wanted, atol=1e-4)


def test_timm_loads_the_same_file(tmp_path):
    import timm

    model = seeded(create_encoder, "resnet10t", channels=3, size=32)
    file = saved(tmp_path / "mine.safetensors", model)
    from safetensors.torch import load_file

    with torch.random.fork_rng():
        timm.create_model("resnet10t", num_classes=0).load_state_dict(load_file(file))


@pytest.mark.parametrize("name", ["convnet-4", "resnet10t"])
def test_a_classifier_of_train_loses_its_head(shapes, tmp_path, name):
    small = replace(shapes, train=shapes.train.take(torch.arange(16)), test=shapes.test.take(torch.arange(6)))
    settings = {"epochs": 1.0, "batch_size": 8, "evaluations": 1, "json": True, "device": "cpu"}
    train(TrainConfig(model=name, out=tmp_path / "run", **settings), data=small)
    asked = []
    found = load_encoder(tmp_path / "run", data=lambda: asked.append(1) or small)
    assert asked == [1]
    assert (found.channels, found.size, found.mean, found.std) == (1, 16, small.mean, small.std)
    classifier = seeded(create_model, name, classes=3, channels=1, size=16)
    from scrimp.jobs.models import load_weights_

    load_weights_(classifier, tmp_path / "run" / WEIGHTS)
    before: list[Tensor] = []
    head = classifier.head if name == "convnet-4" else classifier.fc
    head.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with torch.no_grad():
        classifier(normalised(small.test, small.mean, small.std))
    assert torch.allclose(features_of(found, small.test, device="cpu"), before[0], atol=1e-4)
    assert "pass data=" in said(tmp_path / "run")
    if name == "convnet-4":
        assert "whose classifier takes 64" in said(tmp_path / "run", data=small, size=32)


def test_a_foreign_file_is_what_timm_says_of_the_model_named(tmp_path):
    import timm

    file = saved(tmp_path / "theirs.safetensors", seeded(timm.create_model, "resnet10t", num_classes=7))
    found = load_encoder(file, model="resnet10t")
    about = timm.get_pretrained_cfg("resnet10t")
    assert (found.size, found.mean, found.std) == (about.input_size[-1], about.mean, about.std)
    assert found.dim == 512
    assert load_encoder(file, model="resnet10t", size=48).size == 48
    grey = saved(tmp_path / "grey.safetensors", seeded(timm.create_model, "resnet10t", num_classes=0, in_chans=1))
    found = load_encoder(grey, model="resnet10t", size=32)
    assert found.channels == 1
    assert found.mean == pytest.approx((sum(about.mean) / 3,))


def test_a_convnet_file_that_says_nothing_takes_the_datas_figures(shapes, tmp_path):
    file = saved(tmp_path / "bare.safetensors", seeded(create_encoder, "convnet-4", channels=3, size=16))
    found = load_encoder(file, model="convnet-4", data=shapes)
    assert (found.channels, found.size, found.mean) == (3, 16, (0.2, 0.2, 0.2))
    assert "--model NAME" in said(file)


def test_timm_by_name_only_with_its_weights(monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def offline(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return seeded(create, name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    found = load_encoder("resnet10t.c3_in1k", pretrained=True, size=64)
    assert asked[-1]
    about = timm.get_pretrained_cfg("resnet10t.c3_in1k")
    assert (found.name, found.dim, found.channels, found.size) == ("resnet10t.c3_in1k", 512, 3, 64)
    assert (found.mean, found.std) == (about.mean, about.std)
    assert "weights for resnet10t; got none" in said("resnet10t")
    assert "weights for convnet; got none" in said("convnet")
    assert "did you mean" in said("resnet10", pretrained=True)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture
def processor() -> dict[str, Any]:
    return {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "size": {"height": 16, "width": 16}}


def folder_of(path: Path, model: nn.Module, processor: dict[str, Any] | None) -> Path:
    model.save_pretrained(path)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_transformers_pooled_class_token_and_mean(transformers, processor, tmp_path):
    images = pixels(3, 3, 16, 16)
    ready = normalised(images, tuple(processor["image_mean"]), tuple(processor["image_std"]))
    settings = transformers.ViTConfig(**VIT, image_size=16, patch_size=8)
    model = seeded(transformers.ViTModel, settings)
    pooled = load_encoder(folder_of(tmp_path / "pooled", model, processor))
    assert (pooled.name, pooled.dim, pooled.size) == ("pooled", 32, 16)
    assert (pooled.mean, pooled.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    with torch.no_grad():
        output = model(ready)
    assert torch.allclose(features_of(pooled, images, device="cpu"), output.pooler_output, atol=1e-5)

    classifier = seeded(transformers.ViTForImageClassification, settings)  # has no weights of a pooling
    found = load_encoder(folder_of(tmp_path / "token", classifier, processor))
    with torch.no_grad():
        last = classifier.vit(ready).last_hidden_state
    assert torch.allclose(features_of(found, images, device="cpu"), last[:, 0], atol=1e-5)

    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    maps = seeded(transformers.ResNetModel, resnet)
    found = load_encoder(folder_of(tmp_path / "maps", maps, {**processor, "do_center_crop": True, "crop_size": 32}))
    assert (found.dim, found.size) == (16, 32)
    larger = pixels(3, 3, 32, 32)
    ready = normalised(larger, tuple(processor["image_mean"]), tuple(processor["image_std"]))
    with torch.no_grad():
        wanted = maps(ready).last_hidden_state.mean((2, 3))
    assert torch.allclose(features_of(found, larger, device="cpu"), wanted, atol=1e-5)


def test_transformers_folders_that_do_not_do(transformers, processor, tmp_path):
    vit = seeded(transformers.ViTModel, transformers.ViTConfig(**VIT, image_size=16, patch_size=8))
    assert "preprocessor_config.json" in said(folder_of(tmp_path / "bare", vit, None))
    assert "image_mean" in said(folder_of(tmp_path / "half", vit, {"size": 16}))
    masked = transformers.ViTMAEConfig(**VIT, image_size=16, patch_size=8)
    assert "whole images" in said(folder_of(tmp_path / "mae", seeded(transformers.ViTMAEModel, masked), processor))
    words = seeded(transformers.BertModel, transformers.BertConfig(**VIT, vocab_size=20))
    assert "a vision model" in said(folder_of(tmp_path / "words", words, processor))
    pickled = folder_of(tmp_path / "pickled", vit, processor)
    (pickled / "model.safetensors").unlink()
    torch.save(vit.state_dict(), pickled / "pytorch_model.bin")
    assert "safetensors" in said(pickled)
    assert "config.json" in said(tmp_path)
    assert "a transformers folder alone" in said(tmp_path / "half", model="resnet18")


def test_files_that_do_not_do(tmp_path, shapes):
    model = seeded(create_encoder, "convnet-4", channels=1, size=16)
    about = encoder_metadata("convnet-4", channels=1, size=16, mean=(0.5,), std=(0.5,), dim=64)
    file = saved(tmp_path / "mine.safetensors", model, about)
    assert "absent" in said(tmp_path / "none.safetensors")
    assert "absent" in said("no/such/folder")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    assert "other formats can run code" in said(tmp_path / "mine.pt")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-9])
    assert "whole .safetensors" in said(tmp_path / "torn.safetensors")
    assert "no other model" in said(file, model="resnet18")
    assert "both" in said(file, pretrained=True)
    wrong = saved(tmp_path / "wrong.safetensors", model, {**about, "model": "convnet-8"})
    assert "features.0.weight and" in said(wrong)
    odd = saved(tmp_path / "odd.safetensors", nn.Sequential(model), about)
    assert "differing" in said(odd)


def test_encode_leaves_the_model_as_it_was_and_counts():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(0.5))
    model[2].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, told = pixels(7, 3, 4, 4), []
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "device": "cpu"}
    found = encode(model, images, **options, batch_size=3, progress=lambda *step: told.append(step))
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert found.shape == (7, 48)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    wanted = (normalised(images, (0.5,) * 3, (0.5,) * 3) / (1 + 1e-5) ** 0.5).flatten(1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(found, encode(model, images, **options))


def test_encode_repeats_grey_and_resizes():
    flat = nn.Flatten()
    grey = pixels(2, 1, 4, 4)
    found = encode(flat, grey, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), device="cpu")
    wanted = normalised(TensorImages(grey.pixels.repeat(1, 3, 1, 1), grey.labels), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert torch.allclose(found, wanted.flatten(1), atol=1e-5)
    halved = encode(flat, grey, mean=(0.0,), std=(1.0,), device="cpu", size=2).view(2, 2, 2)
    assert halved.std() > 0.01
    assert torch.allclose(halved.mean((1, 2)), (grey.pixels.float() / 255).mean((1, 2, 3)), atol=0.1)
    same = TensorImages(torch.full((1, 1, 6, 6), 51, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    assert torch.allclose(encode(flat, same, mean=(0.0,), std=(1.0,), device="cpu", size=3), torch.full((1, 9), 0.2))


def test_encode_refuses():
    options = {"mean": (0.5,), "std": (0.5,), "device": "cpu"}
    with pytest.raises(InputError, match="1 channel"):
        encode(nn.Flatten(), pixels(2, 3, 4, 4), **options)
    with pytest.raises(InputError, match="one image or more"):
        encode(nn.Flatten(), pixels(0, 1, 4, 4), **options)
    with pytest.raises(InputError, match="pool its output"):
        encode(nn.Identity(), pixels(2, 1, 4, 4), **options)
    with pytest.raises(InputError, match="check their size"):
        encode(nn.Sequential(nn.Flatten(), seeded(nn.Linear, 3, 2)), pixels(2, 1, 4, 4), **options)
    with pytest.raises(InputError, match="4 x 5"):
        encode(nn.Flatten(), pixels(2, 1, 4, 5), **options, size=4)


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    model = seeded(create_encoder, "convnet-4", channels=1, size=16)
    about = encoder_metadata("convnet-4", channels=1, size=16, mean=(0.5,), std=(0.5,), dim=64)
    before = torch.random.get_rng_state()
    load_encoder(saved(tmp_path / "mine.safetensors", model, about), data=lambda: pytest.fail("images were loaded"))
    assert torch.equal(before, torch.random.get_rng_state())
