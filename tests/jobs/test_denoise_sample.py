"""`scrimp denoise sample`: what it makes and counts, what it chooses, resuming to the same bytes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from denoise_sample_small import FIXED, SHAPE, config, make_models, saved
from PIL import Image

from scrimp.denoise import paired_error, solver_for
from scrimp.jobs import denoise_sample as job
from scrimp.jobs.denoise_models import load_denoiser
from scrimp.jobs.denoise_sample import Sampling, denoise_sample
from scrimp.jobs.denoise_sample_open import open_subject
from scrimp.jobs.denoise_sample_ways import Way
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT
from scrimp.jobs.interrupt import Interrupted
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_models(tmp_path_factory.mktemp("denoisers"))


def test_it_makes_the_images_of_diffusers_own_loop(models, tmp_path):
    """DDIM with diffusers' own scheduler, from the noise of the image's number."""
    denoise_sample(config(models / "dit", tmp_path / "run", solver="ddim", steps=5, cache="none", save=True))
    images = saved(tmp_path / "run")
    denoiser = load_denoiser(models / "dit")
    scheduler = solver_for("ddim", denoiser.scheduler)
    scheduler.set_timesteps(5)
    x = torch.stack([torch.randn(SHAPE, generator=generator_for(0, 11, number)) for number in range(5)])
    with torch.no_grad():
        for time in scheduler.timesteps:
            made = denoiser.predict(x, time, torch.arange(5) % 3)
            x = scheduler.step(made, time, x, return_dict=False, use_clipped_model_output=True)[0]
    wanted = x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)[:, 0]
    assert int((images.int() - wanted.int()).abs().max()) <= 1
    assert images.unique().numel() > 20


def test_files_receipt_and_figures(models, tmp_path):
    receipt = denoise_sample(config(models / "dit", tmp_path / "run", **FIXED, save=True))
    out = tmp_path / "run"
    assert {item.name for item in out.iterdir()} == {CONFIG, RECEIPT, "samples.png", "images"}
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (3 * 9 + 1, 2 * 9 + 1)
    assert load_receipt(out / RECEIPT).quality == receipt.quality
    taken, base = receipt.notes["taken"], receipt.notes["baseline"]
    assert (taken["nfe"], base["nfe"], base["way"]) == (3, 5, "ddim, 5 steps")
    assert receipt.cost.flops.value == 5 * taken["flops"]
    assert receipt.quality["flops_ratio"] == pytest.approx(5 / 3)
    assert receipt.quality["paired_error"] == taken["paired error"] > 0
    assert receipt.cost.samples.value == 5


def test_flops_of_reused_calls_are_those_of_whole_trajectories(models, tmp_path):
    receipt = denoise_sample(config(models / "unet", tmp_path / "run", **{**FIXED, "steps": 4, "cache": "every:2"}))
    subject = open_subject(config(models / "unet", tmp_path), torch.device("cpu"))
    counted = count_flops(lambda: subject.sample(Way("dpm++", 4, "every:2"), range(1)))
    assert receipt.notes["taken"]["calls reused"] == 2
    assert receipt.cost.flops.value == 5 * counted.value
    whole = denoise_sample(config(models / "unet", tmp_path / "whole", **{**FIXED, "steps": 4}))
    assert receipt.cost.flops.value < 0.9 * whole.cost.flops.value


def test_extrapolation_costs_the_same_and_is_passed_on(models, tmp_path):
    usual = {**FIXED, "steps": 6, "cache": "every:2", "pilot": 0, "save": True}
    on, off = (
        denoise_sample(config(models / "unet", tmp_path / str(told), **usual, extrapolate=told))
        for told in (True, False)
    )
    assert (on.way, off.way) == ("dpm++, 6 steps, extrapolate every:2", "dpm++, 6 steps, reuse every:2")
    assert on.cost.flops.value == off.cost.flops.value
    assert not torch.equal(saved(tmp_path / "True"), saved(tmp_path / "False"))
    for told in (True, False):
        again = config(models / "unet", tmp_path / f"{told} again", like=tmp_path / str(told), pilot=0, save=True)
        denoise_sample(again)
        assert torch.equal(saved(tmp_path / str(told)), saved(tmp_path / f"{told} again"))


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_refreshing_every_call_gives_the_same_bytes(models, tmp_path, name):
    for cache in ("none", "every:1"):
        denoise_sample(config(models / name, tmp_path / cache, **{**FIXED, "cache": cache}, save=True))
    assert torch.equal(saved(tmp_path / "none"), saved(tmp_path / "every:1"))


def test_images_depend_on_their_number_and_the_seed_alone(models, tmp_path):
    for name, settings in (("a", {"batch": 5}), ("b", {"batch": 2, "count": 3}), ("c", {"seed": 1})):
        denoise_sample(config(models / "flow", tmp_path / name, **{**FIXED, "pilot": 0, "save": True, **settings}))
    a, b, c = (saved(tmp_path / name).int() for name in "abc")
    assert int((a[:3] - b).abs().max()) <= 1
    assert not torch.equal(a, c)


def test_classes_come_in_turn_and_guidance_of_1_is_none(models, tmp_path):
    for name, settings in (
        ("all", {}),
        ("one", {"classes": ("1",)}),
        ("guided", {"guidance": 3.0}),
        ("unguided", {"guidance": 1.0}),
    ):
        denoise_sample(config(models / "dit", tmp_path / name, **FIXED, save=True, pilot=0, **settings))
    drawn = {name: saved(tmp_path / name) for name in ("all", "one", "guided", "unguided")}
    assert [bool(torch.equal(a, b)) for a, b in zip(drawn["all"], drawn["one"], strict=True)] == [
        number % 3 == 1 for number in range(5)
    ]
    assert torch.equal(drawn["all"], drawn["unguided"])
    assert not torch.equal(drawn["all"], drawn["guided"])


def test_guidance_is_counted_twice(models, tmp_path):
    plain, guided = (
        denoise_sample(config(models / "dit", tmp_path / str(strength), **FIXED, pilot=0, guidance=strength))
        for strength in (1.0, 2.0)
    )
    assert guided.cost.flops.value == pytest.approx(2 * plain.cost.flops.value)


def test_merging_and_reuse_go_together(models, tmp_path):
    """Merged tokens change the images and cost less; a model without attention to merge is refused."""
    usual = {**FIXED, "pilot": 0, "save": True}
    plain = denoise_sample(config(models / "big", tmp_path / "plain", **usual))
    merged = denoise_sample(config(models / "big", tmp_path / "merged", **usual, merge=0.5))
    both = denoise_sample(config(models / "big", tmp_path / "both", **{**usual, "cache": "every:2"}, merge=0.5))
    assert both.cost.flops.value < merged.cost.flops.value < plain.cost.flops.value
    assert not torch.equal(saved(tmp_path / "plain"), saved(tmp_path / "merged"))
    with pytest.raises(InputError, match="a share from 0 to"):
        denoise_sample(config(models / "big", tmp_path / "no", **usual, merge=0.9))


@pytest.mark.parametrize("cache", ["none", "every:2"])
def test_another_attention_is_what_it_says(models, tmp_path, cache):
    usual = {**FIXED, "cache": cache, "save": True, "pilot": 0}
    for attention in (None, "softmax", "linear"):
        denoise_sample(config(models / "unet", tmp_path / str(attention), **usual, attention=attention))
    own, softmax, linear = (saved(tmp_path / name) for name in ("None", "softmax", "linear"))
    assert torch.equal(own, softmax)
    assert not torch.equal(own, linear)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 20, 26])
def test_a_killed_job_resumes_to_the_same_bytes(models, tmp_path, monkeypatch, after):
    """Killed in the reference samples, in the pilot's ways, between two batches."""
    usual = {**FIXED, "cache": "every:2", "save": True}
    denoise_sample(config(models / "unet", tmp_path / "whole", **usual))
    calls = [0]
    keep = Sampling._keep

    def dying(self):
        keep(self)
        calls[0] += 1
        if calls[0] == {1: 1, 20: 2, 26: 5}[after]:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "_keep", dying)
        with pytest.raises(Stop):
            denoise_sample(config(models / "unet", tmp_path / "killed", **usual))
    assert (tmp_path / "killed" / CHECKPOINT).is_file()
    receipt = denoise_sample(config(models / "unet", tmp_path / "killed", **usual, resume=True))
    assert receipt.notes["resumed"] == 1
    assert (tmp_path / "killed" / "samples.png").read_bytes() == (tmp_path / "whole" / "samples.png").read_bytes()
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    again = denoise_sample(config(models / "unet", tmp_path / "killed", **usual, resume=True))
    assert again.created == receipt.created


def test_a_stop_request_leaves_a_checkpoint(models, tmp_path, monkeypatch):
    asked = [0]

    @contextmanager
    def requests():
        def stop() -> bool:
            asked[0] += 1
            return asked[0] > 7  # within the third batch of two calls each

        yield stop

    usual = {"solver": "dpm++", "steps": 2, "cache": "none", "pilot": 0, "save": True}
    with monkeypatch.context() as patch:
        patch.setattr(job, "stop_requests", requests)
        with pytest.raises(Interrupted):
            denoise_sample(config(models / "unet", tmp_path / "run", **usual, count=7))
    assert len(list((tmp_path / "run" / "images").iterdir())) == 6
    denoise_sample(config(models / "unet", tmp_path / "run", **usual, count=7, resume=True))
    denoise_sample(config(models / "unet", tmp_path / "whole", **usual, count=7))
    assert torch.equal(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_a_search_end_to_end(models, tmp_path):
    receipt = denoise_sample(config(models / "flow", tmp_path / "run", tolerance=0.6, count=3))
    notes = receipt.notes
    assert receipt.quality["paired_error"] <= notes["largest paired error"] == 0.6
    assert notes["taken"] in notes["ways"]
    assert notes["baseline"]["way"] == "euler, 5 steps"
    assert len(notes["ways"]) == len({way["way"] for way in notes["ways"]}) > 2


def test_the_pilots_error_is_that_of_the_images(models, tmp_path):
    receipt = denoise_sample(config(models / "unet", tmp_path / "run", **FIXED, count=2))
    subject = open_subject(config(models / "unet", tmp_path), torch.device("cpu"))
    images, reference = (subject.sample(Way(*way), range(2)).images for way in (("dpm++", 3), ("dpm++", 10)))
    assert receipt.quality["paired_error"] == pytest.approx(float(paired_error(images, reference).mean()))
