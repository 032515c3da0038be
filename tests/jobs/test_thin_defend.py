"""`scrimp thin --defend`: patches made as the model goes, carried by training alone, kept through interruptions."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_thin import config, pixels, shapes_of, stop_after, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scrimp.adaptive import image_costs, token_halting_
from scrimp.attack import AdaptiveVictim, Patch, PatchSet
from scrimp.data import normalise
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.progress import progress_bar
from scrimp.jobs.thin import Slimmed, _shown, thin
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.thin_defend import PATCHES
from scrimp.jobs.thin_fit import TRAINING, Thinned
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

SIDE = 5  # 0.08 of 16 x 16 is a square of 4.5
HALTS: dict[str, Any] = {"gate_scale": 2.0, "gate_center": 1.0}
WAY = "avit-0.0005"


def defended(out: Path, **settings: Any) -> ThinConfig:
    """One pass of four steps, two patches."""
    quick = {"epochs": 1, "evaluations": 1, "baseline": "given", "repeats": 0, "pictures": 0, "lr": 1e-3}
    patches = {"defend": 2, "defend_steps": 4, "defend_images": 16}
    return config(out, method="avit", **{**HALTS, **quick, **patches, **settings})


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="module")
def whole(vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Slimmed:
    """A run that nothing disturbs, on one thread as the tests are: sums of several round otherwise."""
    folder, threads = tmp_path_factory.mktemp("defended") / "whole", torch.get_num_threads()
    torch.set_num_threads(1)
    done = thin(defended(folder), model=vit, data=shapes_of(48, 12))
    torch.set_num_threads(threads)
    return done


def test_a_killed_defence_goes_on_to_the_same_weights(
    vit: nn.Module, whole: Slimmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the first patch is made, between two steps, and while the second is made."""
    data, asked = shapes_of(48, 12), AdaptiveVictim.policy_and_logits
    calls: list[int] = []

    def killing(self: AdaptiveVictim, images: Tensor) -> Any:
        calls.append(1)
        if len(calls) in (3, 11):  # each making: one to count, then four
            signal.raise_signal(signal.SIGINT)
        return asked(self, images)

    monkeypatch.setattr(AdaptiveVictim, "policy_and_logits", killing)
    home = tmp_path / "parts" / WAY
    with pytest.raises(Interrupted):
        thin(defended(tmp_path / "parts"), model=vit, data=data)
    assert not (home / CHECKPOINT).exists()
    with pytest.raises(Interrupted), stop_after(1):
        thin(defended(tmp_path / "parts", resume=True), model=vit, data=data)
    assert (len(calls), (home / CHECKPOINT).is_file()) == (8, True)
    with pytest.raises(Interrupted):
        thin(defended(tmp_path / "parts", resume=True), model=vit, data=data)
    assert len(calls) == 11
    parts = thin(defended(tmp_path / "parts", resume=True), model=vit, data=data)
    for file in (WEIGHTS, PATCHES):
        ours, theirs = (load_file(run / WAY / file) for run in (whole.folder, tmp_path / "parts"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (run.receipts[1].notes["defence"]["made"] for run in (whole, parts))
    assert [{**one, "seconds": 0} for one in first] == [{**one, "seconds": 0} for one in second]
    assert whole.receipts[1].quality == parts.receipts[1].quality


def test_what_is_told_and_kept_of_the_patches(whole: Slimmed) -> None:
    """FLOPs by torch's own counter, successes by costs of images with what the file holds pasted on."""
    data, receipt = shapes_of(48, 12), whole.receipts[1]
    told, home = receipt.notes["defence"], whole.folder / WAY
    assert load_receipt(home / TRAINING / RECEIPT).notes["defence"] == told
    assert (told["patches"], told["side"], told["missed"]) == (2, SIDE, [])
    assert [one["at"] for one in told["made"]] == pytest.approx([0, 0.5], abs=1e-6)
    twin = tiny_vit()
    control = token_halting_(twin, **HALTS)
    images = data.train.batch(torch.arange(48))
    control.form, seen = "masked", []
    twin.blocks[-2].register_forward_hook(lambda *given: seen.append(given[2]))  # nothing depends on the last scores
    some = normalise(images[:3], data.mean, data.std).requires_grad_()
    for part in twin.parameters():
        part.requires_grad_(False)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        twin(some)
        seen[0].sum().backward()
    price = counter.get_total_flops() / 3
    assert [one["flops"] for one in told["made"]] == pytest.approx([4 * 12 * price] * 2, rel=0.02)
    assert told["flops"] == sum(one["flops"] for one in told["made"])
    assert receipt.cost.flops.value == receipt.notes["flops_an_image"]["mean"]
    assert receipt.notes["fine-tuning"]["samples"]["value"] == 48
    control.form = "auto"
    patches = load_file(home / PATCHES)
    with safe_open(home / PATCHES, framework="pt") as file:
        assert json.loads(file.metadata()["places"]) == [[0, 0], [0, 0]]
    for name, patch in patches.items():
        with Image.open(home / f"{name}.png") as png:
            assert png.tobytes() == bytes((patch[0] * 255).round().to(torch.uint8).flatten().tolist())
    assert sorted(patches) == ["patch-1", "patch-2"]
    assert not torch.equal(patches["patch-1"], patches["patch-2"])
    chosen = images[torch.randperm(48, generator=_generator_of_images())[:16]]
    clean = image_costs(twin, normalise(chosen, data.mean, data.std)).double().mean()
    chosen[:, :, :SIDE, :SIDE] = (patches["patch-1"] * 255).round().to(torch.uint8)
    attacked = image_costs(twin, normalise(chosen, data.mean, data.std)).double().mean()
    made = told["made"][0]
    assert (made["clean_flops"], made["attacked_flops"]) == (float(clean), float(attacked))
    assert made["success"] == pytest.approx(float((attacked - clean) / (made["dense_flops"] - clean)))
    page = (whole.folder / REPORT).read_text()
    assert f"What {WAY} was hardened with" in page
    assert page.count('alt="patch-') == 2


def _generator_of_images() -> torch.Generator:
    from scrimp.jobs.thin_defend import _SHOWN
    from scrimp.primitives.draw import generator_for

    return generator_for(0, _SHOWN)


def test_training_alone_sees_the_patch(vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A white patch on every batch: each training image has it somewhere, and evaluation has them as they are."""
    data, seen = shapes_of(24, 12), {True: [], False: []}
    white = normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), data.mean, data.std)  # no image has any

    def grow(self: PatchSet, victim: Any, images: Tensor, *, size: int, place: Any, **_: Any) -> Patch:
        self.patches.append(Patch(torch.ones(1, size, size), place))
        return self.patches[-1]

    forward = Thinned.forward

    def watching(self: Thinned, images: Tensor) -> Tensor:
        seen[self.training].append(images.detach().clone())
        return forward(self, images)

    monkeypatch.setattr(PatchSet, "grow", grow)
    monkeypatch.setattr(Thinned, "forward", watching)
    thin(defended(tmp_path, defend=1, defend_clean=0.0, defend_place="random"), model=vit, data=data)
    trained = [image for batch in seen[True] for image in batch if len(batch) == 12]
    whole = normalise(data.train.batch(torch.arange(24)), data.mean, data.std)
    corners = set()
    for image in trained:
        far = (whole - image).abs()
        match = int((far == 0).sum((1, 2, 3)).argmax())
        covered = (image[0] == white[0, 0]).nonzero()
        top, left = (int(at) for at in covered.amin(0))
        corners.add((top, left))
        assert bool((image[0, top : top + SIDE, left : left + SIDE] == white[0, 0]).all())
        far[match, :, top : top + SIDE, left : left + SIDE] = 0
        assert bool((far[match] == 0).all())
    assert len(trained) == 24
    assert len(corners) > 12
    shown = torch.cat([batch for batch in seen[False] if len(batch) == 12])
    known = torch.cat([whole, pixels(data)])
    assert all(bool((known == image).all((1, 2, 3)).any()) for image in shown)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "tome", "defend": 2, "epochs": 1}, "--defend with --method ats, avit, adavit"),
        ({"method": "keep", "defend": 2, "epochs": 1}, "spends the same on every image"),
        ({"defend": 2}, "a budget to --defend in"),
        ({"epochs": 1, "defend_size": 0.2}, "--defend N with --defend-size"),
        ({"epochs": 1, "defend_place": "random"}, "--defend N with --defend-place"),
        ({"epochs": 1, "defend": -1}, "--defend at least 0"),
        ({"epochs": 1, "defend": 1, "defend_size": 1.5}, "--defend-size above 0, at most 1"),
        ({"epochs": 1, "defend": 1, "defend_clean": 1.0}, "--defend-clean in"),
        ({"epochs": 1, "defend": 1, "defend_rate": float("nan")}, "--defend-rate above 0"),
        ({"epochs": 1, "defend": 1, "defend_steps": 0}, "--defend-steps at least 1"),
        ({"epochs": 1, "defend": 1, "defend_images": 0}, "--defend-images at least 1"),
    ],
)
def test_a_defence_that_cannot_be_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        config(tmp_path, **{"method": "avit", **settings}).check()
    assert "\n" not in str(caught.value)


def test_progress_shows_what_is_being_made() -> None:
    with progress_bar(shown=False) as progress:
        report = _shown(progress, WAY, {"budget_flops": {WAY: 8.0}})
        report(Spent(flops=4.0), "making patch 1 of 2")
        assert progress.tasks[0].fields["figures"] == "making patch 1 of 2"
        report(Spent(flops=4.0))
        assert progress.tasks[0].fields["figures"] == ""


def test_more_patches_than_steps_are_refused_before_anything_is_written(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 and 4 steps"):
        thin(defended(tmp_path / "run", defend=5), model=vit, data=shapes_of(48, 12))
    assert not (tmp_path / "run").exists()
