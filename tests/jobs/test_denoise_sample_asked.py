"""`scrimp denoise sample`: pipelines, classes, an earlier run's setting, mistakes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from denoise_sample_small import FIXED, config, make_models, saved

from scrimp.jobs.denoise_models import load_denoiser, save_denoiser
from scrimp.jobs.denoise_sample import denoise_sample
from scrimp.jobs.denoise_sample_config import parse_cache
from scrimp.jobs.denoise_sample_model import chosen_classes
from scrimp.jobs.denoise_sample_open import class_names, of_pixels
from scrimp.primitives.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_models(tmp_path_factory.mktemp("denoisers"))


def test_pipelines_of_diffusers(tmp_path):
    """A pipeline with a decoder goes through its own call; its FLOPs and calls are counted at its network."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=4, patch_size=2,
            num_embeds_ada_norm=1000, norm_num_groups=1, out_channels=4,
        )  # fmt: skip
        decoder = AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(8,), latent_channels=4, norm_num_groups=4
        )
    DiTPipeline(transformer=network, vae=decoder, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    usual = {**FIXED, "count": 3, "save": True}
    asked = config(tmp_path / "pipe", tmp_path / "run", **usual, classes=("2",))
    receipt = denoise_sample(asked)
    assert receipt.notes["pipeline"] == "DiTPipeline"
    assert saved(tmp_path / "run").shape == (3, 4, 4, 3)
    cached = denoise_sample(config(tmp_path / "pipe", tmp_path / "cached", **{**usual, "cache": "every:3"}))
    assert cached.notes["taken"]["calls reused"] == 2
    assert cached.cost.flops.value < 0.8 * receipt.cost.flops.value
    with pytest.raises(InputError, match="--class a name of the pipeline or a number below 1000; got 'cat'"):
        denoise_sample(config(tmp_path / "pipe", tmp_path / "no", **usual, classes=("cat",)))
    with pytest.raises(InputError, match="--prompt"):
        denoise_sample(config(tmp_path / "pipe", tmp_path / "no", **usual, prompt="a cat"))


def test_which_folders_are_opened_as_networks():
    pixels = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}
    assert of_pixels(pixels)
    assert of_pixels({**pixels, "vae": [None, None]})
    assert not of_pixels({**pixels, "vae": ["diffusers", "AutoencoderKL"]})
    assert not of_pixels({**pixels, "unet": ["diffusers", "UNet2DConditionModel"]})


def test_class_names_are_those_that_training_noted(models, tmp_path):
    assert class_names(models / "dit" / "model") == []
    named = dataclasses.replace(load_denoiser(models / "dit"), names=("bag", "boot", "coat"))
    save_denoiser(named, tmp_path / "named")
    assert class_names(tmp_path / "named") == ["bag", "boot", "coat"]
    assert chosen_classes(("coat", "0"), 3, ["bag", "boot", "coat"]) == [2, 0]
    with pytest.raises(InputError, match="--class out of: bag, boot, coat; got 'hat'"):
        chosen_classes(("hat",), 3, ["bag", "boot", "coat"])


@pytest.mark.parametrize("text", ["auto", "none", "every:3", "0.1", "2"])
def test_caches_that_are_understood(text):
    assert str(parse_cache(text)).replace("3", "every:3") in {text, f"{text}.0"}


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("unet", {"cache": "every:0"}, "--cache none, auto, every:N or a tolerance"),
        ("unet", {"cache": "nan"}, "--cache none, auto"),
        ("unet", {"count": 0}, "--count of at least 1"),
        ("unet", {"merge": 1.0}, r"--merge in \[0, 1\)"),
        ("unet", {"calibrate": 5}, "--calibrate of at least 19, or 0"),
        ("unet", {"reference_steps": 5}, "--reference-steps above --baseline-steps"),
        ("unet", {"solver": "auto", "pilot": 0}, "--pilot of at least 1"),
        ("unet", {"seconds": 5.0}, "something for --seconds to choose from"),
        ("unet", {"tolerance": 0.1}, "something for --tolerance to choose from"),
        ("unet", {"solver": "euler"}, "a solver for a model of epsilon prediction; got 'euler'; use ddim"),
        ("flow", {"solver": "ddim"}, "a solver for a model of flow prediction; got 'ddim'; use euler"),
        ("unet", {"solver": "magic"}, "got 'magic'"),
        ("unet", {"classes": ("1",)}, "--class for a model with classes; got a model without"),
        ("unet", {"guidance": 2.0}, "--guidance for a model with classes"),
        ("unet", {"prompt": "a cat"}, "--prompt for a pipeline that takes text"),
        ("dit", {"classes": ("7",)}, "--class out of: 0, 1, 2; got '7'"),
        ("nowhere", {}, "a folder that exists, or .online. a hub id"),
        (".", {}, "model_index.json"),
    ],
)
def test_mistakes_are_told_in_a_line(models, tmp_path, model, settings, said):
    with pytest.raises(InputError, match=said) as error:
        denoise_sample(config(models / model, tmp_path / "run", **{**FIXED, **settings}))
    assert "\n" not in str(error.value)


def test_a_model_that_gives_nan_is_refused(models, tmp_path):
    denoiser = load_denoiser(models / "unet")
    with torch.no_grad():
        next(denoiser.model.parameters()).fill_(math.nan)
    save_denoiser(denoiser, tmp_path / "broken")
    with pytest.raises(InputError, match="finite"):
        denoise_sample(config(tmp_path / "broken", tmp_path / "run", **FIXED))


def test_another_seed_cannot_resume(models, tmp_path):
    denoise_sample(config(models / "unet", tmp_path / "run", **FIXED))
    with pytest.raises(InputError, match="interrupted run's seed"):
        denoise_sample(config(models / "unet", tmp_path / "run", **FIXED, seed=1, resume=True))


def test_an_earlier_runs_setting_is_taken_over_with_its_calibration(models, tmp_path):
    usual = {"cache": "0.9", "solver": "dpm++", "steps": 8, "calibrate": 20}
    first = denoise_sample(config(models / "dit", tmp_path / "first", **usual, save=True))
    again = denoise_sample(config(models / "dit", tmp_path / "again", like=tmp_path / "first", pilot=0, save=True))
    assert first.notes["taken"]["calls reused"] > 0
    assert again.notes["way"] == first.notes["way"]
    assert again.notes["calibration"] == first.notes["calibration"]
    assert again.cost.flops.value == first.cost.flops.value
    assert torch.equal(saved(tmp_path / "first"), saved(tmp_path / "again"))
    found = first.notes["calibration"]
    assert found["calibration"]["samples"] >= 19
    assert found["tested"]["samples"] == 20
    assert found["tested"]["worst"] > 0
    with pytest.raises(InputError, match="--like alone"):
        denoise_sample(config(models / "dit", tmp_path / "no", like=tmp_path / "first", steps=3))
    with pytest.raises(InputError, match="a receipt"):
        denoise_sample(config(models / "dit", tmp_path / "no", like=tmp_path))
