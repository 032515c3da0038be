"""Denoising networks: built by name, kept in folders that diffusers opens, refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from scrimp.adapt import attach_, lora, save_adapter
from scrimp.jobs.denoise_models import (
    INDEX,
    build_denoiser,
    find_model,
    load_denoiser,
    new_denoiser,
    routed,
    save_denoiser,
)
from scrimp.primitives.errors import InputError

pytest.importorskip("diffusers")

SHAPE = (1, 8, 8)


def stirred(name: str, classes: int | None, prediction: str = "v"):
    """A network whose last layers, which start at zero, are noise as well."""
    denoiser = new_denoiser(name, SHAPE, classes, prediction, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in denoiser.model.parameters():
            item += 0.1 * torch.randn(item.shape, generator=generator)
    return dataclasses.replace(denoiser, model=denoiser.model.eval())


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["unet-8", "dit-16", "dit-32/2"])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_model_comes_back_as_it_went(name, classes, tmp_path):
    denoiser, x = stirred(name, classes), noise()
    stored = save_denoiser(denoiser, tmp_path / "model")
    again = load_denoiser(tmp_path)  # the folder above does as well
    assert (again.shape, again.classes, again.null_label) == (SHAPE, classes, classes)
    assert again.process.prediction == "v"
    assert torch.equal(again.process.signal, denoiser.process.signal)
    assert stored == sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.safetensors"))
    labels = None if classes is None else torch.tensor([0, 2, 1])
    with torch.no_grad():
        assert torch.equal(denoiser.predict(x, 7, labels), again.predict(x, 7, labels))
    save_denoiser(denoiser, tmp_path / "model")  # over the one that is there
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    assert str(tmp_path) not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))


def test_a_unet_opens_as_a_pipeline_of_diffusers(tmp_path):
    from diffusers import DDPMPipeline

    save_denoiser(stirred("unet-8", None, "epsilon"), tmp_path / "model")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.unet.config.block_out_channels == [8, 16, 32]
    assert pipeline.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["unet-8", "dit-16"])
def test_labels_and_timesteps_count(name):
    denoiser, x = stirred(name, 3), noise(2)
    with torch.no_grad():
        none, null, one = (
            denoiser.predict(x, 5.0, labels) for labels in (None, torch.tensor([3, 3]), torch.tensor([1, 1]))
        )
        later = denoiser.predict(x, torch.tensor([5.0, 900.0]), None)
    assert torch.equal(none, null)
    assert not torch.allclose(none, one)
    assert torch.allclose(later[0], none[0], atol=1e-5)
    assert not torch.allclose(later[1], none[1], atol=1e-3)


def test_nothing_random_inside(tmp_path):
    """diffusers drops labels by the global generator in training; the guard of the tests would see it."""
    save_denoiser(stirred("dit-16", 3), tmp_path / "model")
    denoiser, x = load_denoiser(tmp_path / "model"), noise()
    denoiser.model.train()
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(denoiser.predict(x, 7, labels), denoiser.predict(x, 7, labels))


def test_a_seed_fixes_the_weights():
    one, two, other = (build_denoiser("unet-8", SHAPE, seed=seed) for seed in (1, 1, 2))
    states = [torch.cat([item.flatten() for item in model.parameters()]) for model in (one, two, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_new_transformer_gives_zeros_and_still_learns():
    denoiser = new_denoiser("dit-16", SHAPE, 3, "v", seed=0)
    output = denoiser.predict(noise(), 7, torch.tensor([0, 1, 2]))
    assert not output.detach().any()
    (output - 1).square().mean().backward()
    assert denoiser.model.proj_out_2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ["linear", "clustered"])
def test_the_attention_is_kept_with_the_model(attention, tmp_path):
    denoiser, x = stirred("dit-16/2", None), noise()
    other = dataclasses.replace(denoiser, attention=attention)
    save_denoiser(other, tmp_path / "model")
    again = load_denoiser(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.predict(x, 7), other.predict(x, 7))
        assert again.attention == attention
        if attention == "linear":  # 16 tokens are 16 clusters at most: each query its own
            assert not torch.allclose(other.predict(x, 7), denoiser.predict(x, 7), atol=1e-5)


def test_an_adapter_is_attached(tmp_path):
    denoiser, x = stirred("unet-8", None), noise()
    save_denoiser(denoiser, tmp_path / "model")
    attach_(denoiser.model, lora(2))
    with torch.no_grad():
        for name, item in denoiser.model.named_parameters():
            if item.requires_grad:
                item.fill_(0.3 if name.endswith("b") else 0.2)
    save_adapter(denoiser.model, tmp_path / "adapter.safetensors")
    plain = load_denoiser(tmp_path / "model")
    adapted = load_denoiser(tmp_path / "model", adapter=tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.allclose(adapted.predict(x, 7), denoiser.predict(x, 7), atol=1e-5)
        assert not torch.allclose(adapted.predict(x, 7), plain.predict(x, 7), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("unet", SHAPE, "unet-WIDTH"),
        ("unet-8/4", SHAPE, "unet-WIDTH"),
        ("unet-12", SHAPE, "multiple of 8"),
        ("dit-24", SHAPE, "multiple of 16"),
        ("unet-8", (1, 10, 8), "multiples of 4"),
        ("dit-16", (1, 8, 12), "square"),
        ("dit-16/3", SHAPE, "multiple of 3"),
    ],
)
def test_names_that_do_not_fit(name, shape, said):
    with pytest.raises(InputError, match=said):
        build_denoiser(name, shape)


def test_patches_grow_with_the_images():
    sizes = {side: build_denoiser("dit-16", (1, side, side)).config.patch_size for side in (8, 32, 64, 128)}
    assert sizes == {8: 4, 32: 4, 64: 8, 128: 16}


def test_labels_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="no labels"):
        stirred("unet-8", None).predict(noise(), 7, torch.tensor([0, 1, 2]))
    foreign = dataclasses.replace(stirred("unet-8", 3), null_label=None)
    with pytest.raises(InputError, match="label for none"):
        foreign.predict(noise(), 7)
    with pytest.raises(InputError, match="attention"), routed("linear", torch.nn.Identity()):
        pass
    with pytest.raises(InputError, match="attention out of"), routed("sparse", foreign.model):
        pass


def damage(root, what: str) -> None:
    weights = next(root.rglob("*.safetensors"))
    if what == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "index":
        (root / INDEX).write_text("{")
    elif what == "kind":
        content = json.loads((root / INDEX).read_text())
        (root / INDEX).write_text(json.dumps({**content, "unet": ["diffusers", "UNet1DModel"]}))
    elif what == "scheduler":
        content = json.loads((root / INDEX).read_text())
        (root / INDEX).write_text(json.dumps({**content, "scheduler": ["diffusers", "NoSuch"]}))
    else:
        (root / INDEX).unlink()


@pytest.mark.parametrize("what", ["weights", "index", "kind", "scheduler", "nothing"])
def test_damaged_folders_are_refused(what, tmp_path):
    save_denoiser(stirred("unet-8", None), tmp_path / "model")
    assert find_model(tmp_path) == tmp_path / "model"
    damage(tmp_path / "model", what)
    with pytest.raises(InputError):
        load_denoiser(tmp_path)
