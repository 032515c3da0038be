"""Padded execution against the ragged one; latencies, poisoned batches and energy under clocks and meters of ours."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from scrimp.adaptive import gating_, restore_, token_halting_, token_merging_, token_sampling_
from scrimp.attack import AdaptiveVictim, Patch, victim_of
from scrimp.jobs import audit_speed
from scrimp.jobs.audit_padded import padded
from scrimp.jobs.audit_pictures import as_bytes, attack_picture, enlarged, patch_picture
from scrimp.jobs.audit_speed import energies, speeds
from scrimp.jobs.interrupt import Interrupted
from scrimp.meter.cost import Reading
from scrimp.primitives.errors import InputError

METHODS: dict[str, Callable[[Any], Any]] = {
    "sampling": lambda model: token_sampling_(model, blocks=[1, 2], least=2),
    "halting": lambda model: token_halting_(model, gate_scale=10.0, gate_center=3.0),
    "gating": lambda model: _opened(gating_(model)),
    "merging": lambda model: token_merging_(model, 2),
}


def _opened(controller: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for part in controller.parameters():
        part.data.copy_(2 * torch.randn(part.shape, generator=generator))
    return controller


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Plain ones, and one with rotary embeddings and mean pooling."""
    found = {}
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4}
            model = timm.create_model(name, pretrained=False, **options)
            for part in model.parameters():
                part.data.add_(0.2 * torch.randn(part.shape))
            model.cls_token.data[..., 0] = -2  # what halting reads: late in the class token, where the head looks
        found[name[:3]] = model.eval()
    return found


def victim(models: dict[str, nn.Module], method: str, kind: str = "vit") -> AdaptiveVictim:
    model = copy.deepcopy(models[kind])
    METHODS[method](model)
    return victim_of(model)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Images [count, 3, 32, 32] from 0 to 1, of unlike contrast."""
    noise = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (noise * torch.linspace(0.02, 1, count)[:, None, None, None]) ** 2


@contextmanager
def rows_of(model: Any) -> Iterator[list[torch.Size]]:
    """Shapes that the MLPs of the blocks are given."""
    seen: list[torch.Size] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for block in model.blocks
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["vit", "eva"])
@pytest.mark.parametrize("method", ["sampling", "halting", "gating"])
@pytest.mark.parametrize("count", [1, 6])
def test_padded_gives_what_ragged_gives(models: dict[str, nn.Module], method: str, kind: str, count: int) -> None:
    found, images = victim(models, method, kind), pictures(7)[7 - count :] * (1 if count > 1 else 0.3)
    controller = found.controller
    before = controller.method
    with torch.no_grad():
        controller.form = "ragged"
        wanted, tokens = found.ready(images), controller.tokens
        with padded(controller), rows_of(found.model) as seen:
            given = found.ready(images)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    assert tokens is not None
    longest = [max(1, int(most)) for most in tokens.max(0).values]
    assert [tuple(shape[:2]) for shape in seen] == [(count, most) for most in longest]
    assert (controller.method, controller.form) == (before, "ragged")
    if count > 1:
        assert min(longest) < 17 or method == "gating"
        assert len(set(tokens.sum(1).tolist())) > 1


def test_padded_goes_on_where_nothing_is_left(models: dict[str, nn.Module]) -> None:
    model = copy.deepcopy(models["vit"])
    controller = token_halting_(model, gate_scale=10.0, gate_center=-50.0)  # all halt in the first block
    images = pictures(2)
    with torch.no_grad():
        wanted = model(images)
        assert controller.tokens is not None
        assert controller.tokens[:, 1:].sum() == 0
        with padded(controller):
            torch.testing.assert_close(model(images), wanted)


def test_a_failure_leaves_the_method_in_place(models: dict[str, nn.Module]) -> None:
    controller = victim(models, "sampling").controller
    before = controller.method
    with pytest.raises(RuntimeError, match="on the way"), padded(controller):
        raise RuntimeError("on the way")
    assert (controller.method, controller.form) == (before, "auto")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """A clock that the brightness of the images drives: what was shown, as batch and seconds."""
    shown: list[tuple[int, float]] = []

    def lap(call: Callable[[], Any]) -> tuple[float, float]:
        images = next(cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, Tensor))  # type: ignore[attr-defined, union-attr]
        shown.append((len(images), float(images.double().mean())))
        call()
        return 1e9, shown[-1][1]

    monkeypatch.setattr(audit_speed, "lap", lap)
    return shown


def test_latencies_are_those_of_the_clock(models: dict[str, nn.Module], ticks: list[tuple[int, float]]) -> None:
    found, dense = victim(models, "sampling"), models["vit"]
    clean = (torch.arange(1, 7) / 32)[:, None, None, None].expand(6, 3, 32, 32).contiguous()
    rows = speeds(found, dense, {"clean": clean, "bad": clean * 2}, batches=(1, 4, 9), calls=6)
    assert len(rows) == 7 + 7 + 2  # nine images a call there are not
    assert {row["clock"] for row in rows} == {"process CPU"}
    of = {(row["execution"], row["batch"], row["inputs"]): row for row in rows}
    assert [row["seconds"] for row in rows[:2]] == [{"p50": 3 / 32, "p95": 6 / 32, "p99": 6 / 32}] * 2
    for form in ("ragged", "masked", "padded"):
        assert of[form, 1, "clean"]["ratio"] == 1
        assert of[form, 4, "bad"]["ratio"] == pytest.approx(2)
        assert of[form, 1, "bad"]["factor"] is None
    assert {name for name in of if "1 of" in name[2]} == {("ragged", 4, "1 of 4 bad"), ("padded", 4, "1 of 4 bad")}
    factor = of["padded", 4, "1 of 4 bad"]["factor"]
    assert 1 < factor["low"] <= factor["median"] <= factor["high"] < 2
    single = ticks[7:49]  # after the first round, which is not counted: each call other images, one round all the same
    assert [len({round(32 * value) for _, value in single[at : at + 7]}) for at in range(0, 42, 7)] == [2] * 6
    assert found.controller.form == "auto"


def test_a_static_method_has_one_form(models: dict[str, nn.Module]) -> None:
    images = pictures(3)
    rows = speeds(victim(models, "merging"), models["vit"], {"clean": images, "bad": images}, batches=(2,), calls=1)
    assert [row["execution"] for row in rows] == ["dense", "ragged", "ragged", "ragged"]
    assert all(row["seconds"]["p50"] >= 0 for row in rows)


def test_what_cannot_be_timed_is_refused(models: dict[str, nn.Module]) -> None:
    found, images = victim(models, "merging"), pictures(3)
    for inputs, calls in (
        ({}, 1),
        ({"bad": images}, 1),
        ({"clean": images, "bad": images[:2]}, 1),
        ({"clean": images}, 0),
    ):
        with pytest.raises(InputError, match="clean images first"):
            speeds(found, models["vit"], inputs, calls=calls)
    with pytest.raises(InputError, match="clean ones alone"):
        energies(found, {"clean": images})
    with pytest.raises(Interrupted):
        speeds(found, models["vit"], {"clean": images}, stop=lambda: True)


def test_no_meter_is_no_joule(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    _meter(monkeypatch, None)
    inputs = {"clean": pictures(3), "bad": pictures(3, 1)}
    found = energies(victim(models, "merging"), inputs, seconds=0.0)
    assert found == {"clean_joules": None, "attacked_joules": None, "how": "a meter of ours"}
    found = energies(victim(models, "merging"), inputs, seconds=0.0, watts=20.0)
    assert found["clean_joules"] is None
    assert found["clean_modelled"] > 0
    assert found["how_modelled"].startswith("modelled: 20 W")


def test_a_meter_is_shared_out_over_images(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    _meter(monkeypatch, 12.0)
    inputs = {"clean": pictures(3), "bad": pictures(3, 1)}
    found = energies(victim(models, "sampling"), inputs, batch=2, seconds=0.0)
    assert found == {"clean_joules": 6.0, "attacked_joules": 6.0, "how": "a meter of ours"}


def _meter(monkeypatch: pytest.MonkeyPatch, joules: float | None) -> None:
    class Meter:
        reading = Reading(joules, "a meter of ours")

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(audit_speed, "EnergyWindow", Meter)


def test_the_picture_shows_images_with_and_without(models: dict[str, nn.Module]) -> None:
    found, images = victim(models, "sampling"), pictures(2)
    patch = Patch(torch.ones(3, 8, 8), (0, 0))
    png = attack_picture(found, images, patch)
    assert png is not None
    drawn = np.asarray(Image.open(io.BytesIO(png)))
    side, gap, head = 96, 6, 16  # 32 pixels thrice as large
    tiles = [drawn[gap + row * (side + head + gap) + head :][:side, gap : gap + side] for row in range(4)]
    for row, tile in enumerate(tiles):
        wanted = as_bytes(images[row // 2 :][:1])[0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
        assert np.array_equal(tile[24:], wanted[24:])
        assert bool((tile[:24, :24] == 255).all()) == (row % 2 == 1)
    assert math.isclose(len(drawn), gap + 4 * (side + head + gap))
    with pytest.raises(InputError, match="grey or RGB"):
        attack_picture(found, images[:0], patch)


def test_a_patch_is_enlarged_by_whole_pixels() -> None:
    pixels = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = np.asarray(Image.open(io.BytesIO(enlarged(patch_picture(pixels), side=22))))
    assert whole.shape == (12, 20, 3)
    assert np.array_equal(whole[::4, ::4, 1], as_bytes(pixels[None])[0, 0].numpy())


def test_speeds_leave_the_model_as_it_was(models: dict[str, nn.Module]) -> None:
    found, images = victim(models, "halting"), pictures(4)
    found.model.train()
    speeds(found, models["vit"], {"clean": images, "bad": images.flip(0)}, batches=(2,), calls=1)
    assert found.model.training
    assert all(part.requires_grad for part in found.model.parameters())
    restore_(found.model)
    with torch.no_grad():
        assert torch.equal(found.model.eval()(images), models["vit"](images))
