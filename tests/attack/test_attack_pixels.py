"""Patches and perturbations where the best one is known; levels, ball, drift, goals, ensembles, what stays as is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_victims import Toy, pixels
from torch import Tensor

from scrimp.attack import (
    Normalised,
    Patch,
    attack_success,
    costs_of,
    flat_colours,
    noise_images,
    perturb,
    query_patch,
    query_perturb,
    random_patch,
    transfer,
    universal_patch,
)
from scrimp.attack.objective import objective_for
from scrimp.attack.pixels import to_ball
from scrimp.primitives.errors import InputError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So little work is done sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _on_levels(values: Tensor) -> bool:
    return torch.equal((values * 255).round() / 255, values) and bool(((values >= 0) & (values <= 1)).all())


def _put(images: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    out = images.clone()
    for image in out:
        image[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return out


def test_the_best_patch_is_found_and_nothing_else_is_touched() -> None:
    victim, images = Toy(), pixels(5)
    victim.model.train()
    victim.model.answer.requires_grad_(False)
    before = [images.clone(), *(part.detach().clone() for part in victim.model.parameters())]
    with torch.no_grad():  # the caller's mode is not the attack's
        patch = universal_patch(victim, images, size=(3, 2), place=(4, 5), steps=20, generator=_gen())
    assert torch.equal(patch.pixels, (victim.model.weights[:, 4:7, 5:7] > 0).float())
    assert torch.equal(patch.on(images), _put(images, patch.pixels, 4, 5))
    after = [images, *victim.model.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert victim.model.training
    assert victim.model.mode.training
    assert [part.requires_grad for part in victim.model.parameters()] == [True, False]
    assert all(part.grad is None for part in victim.model.parameters())
    again = universal_patch(victim, images, size=(3, 2), place=(4, 5), steps=3, generator=_gen(), batch=2)
    twin = universal_patch(victim, images, size=(3, 2), place=(4, 5), steps=3, generator=_gen(), batch=2)
    assert torch.equal(again.pixels, twin.pixels)
    assert again.trace == twin.trace
    assert _on_levels(again.pixels)


def test_pixels_do_not_drift_and_small_steps_add_up() -> None:
    victim, images = Toy(scale=0.0), pixels(2)
    start = random_patch(images, size=4, generator=_gen())
    assert _on_levels(start.pixels)
    assert torch.equal(universal_patch(victim, images, size=4, steps=40, generator=_gen()).pixels, start.pixels)
    step = 0.3 / 255  # of Adam, whatever the gradient's size: less than half a level
    moved = universal_patch(Toy(), images, size=4, steps=20, lr=step, generator=_gen()).pixels
    way = Toy().model.weights.detach()[:, :4, :4].sign()
    wanted = (start.pixels + 20 * step * way).clamp(0, 1)
    assert _on_levels(moved)
    assert float((moved - wanted).abs().max()) <= 0.51 / 255


def test_an_image_that_breaks_the_model_spoils_nothing() -> None:
    images, marks = pixels(3), torch.tensor([1.0, torch.nan, torch.inf])
    way = Toy().model.weights.detach()

    def broken(part: Tensor) -> Tensor:
        return -(part * way).sum((1, 2, 3)) * marks[: len(part)]

    patch = universal_patch(Toy(), images, size=8, steps=20, generator=_gen(), policy_loss=broken)
    assert torch.equal(patch.pixels, (way > 0).float())
    found = perturb(Toy(), images, epsilon=8 / 255, steps=10, generator=_gen(), policy_loss=broken)
    shown = found.on(images)
    assert torch.equal(shown[0], to_ball(images[:1] + 8 / 255 * way.sign(), images[:1], 8 / 255)[0])
    assert _on_levels(shown)
    shared = perturb(Toy(), images, epsilon=8 / 255, steps=10, universal=True, generator=_gen(), policy_loss=broken)
    assert torch.equal(shared.on(images)[0], shown[0])
    lost = perturb(Toy(), images[:1], epsilon=8 / 255, generator=_gen(), policy_loss=lambda x: broken(x) * torch.nan)
    assert _on_levels(lost.on(images[:1]))


@pytest.mark.parametrize("off", [0.0, 0.0013])
def test_the_best_perturbation_is_found_in_the_ball_on_the_levels(off: float) -> None:
    victim, images = Toy(), (pixels(4) * (1 - off) + off / 2).clamp(0, 1)
    kept, eps = images.clone(), 8 / 255
    way = victim.model.weights.detach().sign()
    own = perturb(victim, images, epsilon=eps, steps=10, generator=_gen())
    shared = perturb(victim, images, epsilon=eps, steps=10, universal=True, generator=_gen())
    for found in (own, shared):
        shown = found.on(images)
        assert _on_levels(shown)
        assert float((shown - images).abs().max()) <= eps + 1e-6
        assert torch.equal(shown, to_ball(images + eps * way, images, eps))
        if not off:
            assert torch.equal(shown, ((images * 255).round() + 8 * way).clamp(0, 255) / 255)  # all of the ball
    assert torch.equal(images, kept)
    fresh = pixels(3, seed=9)
    assert torch.equal(shared.on(fresh), to_ball(fresh + eps * way, fresh, eps))
    with pytest.raises(InputError, match="pass rows="):
        own.on(fresh)
    for attack in (shared, random_patch(images, size=2, generator=_gen())):
        with pytest.raises(InputError, match="floating"):
            attack.on((images * 255).to(torch.uint8))
    twin = perturb(victim, images, epsilon=eps, steps=2, batch=3, generator=_gen(4))
    assert torch.equal(twin.deltas, perturb(victim, images, epsilon=eps, steps=2, batch=3, generator=_gen(4)).deltas)


def test_one_perturbation_a_class() -> None:
    victim, images, classes = Toy(), pixels(6), torch.tensor([2, 0, 2, 0, 2, 2])
    signs = torch.where(classes == 2, -1.0, 1.0)

    def loss(part: Tensor) -> Tensor:
        return -signs * (part * victim.model.weights).sum((1, 2, 3))

    found = perturb(victim, images, epsilon=4 / 255, steps=10, classes=classes, policy_loss=loss, generator=_gen())
    way = victim.model.weights.detach().sign() * 4 / 255
    assert len(found.deltas) == 3
    assert torch.allclose(found.deltas[0], way, atol=0.5 / 255)
    assert torch.allclose(found.deltas[2], -way, atol=0.5 / 255)
    shown = found.on(images, classes)
    assert torch.equal(shown[1], to_ball(images[1:2] + way, images[1:2], 4 / 255)[0])
    with pytest.raises(InputError, match="rows below 3"):
        found.on(images, classes + 1)


def test_goals_and_ensembles_are_what_they_say() -> None:
    first, second = Toy(0), Toy(1, scale=3.0)
    images, labels, rows = pixels(3).double(), torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2])

    def losses(goal: Any, labels: Tensor | None = labels, both: bool = False) -> list[float]:
        victims = [first, second] if both else first
        task = objective_for(victims, images, goal=goal, labels=labels, task_weight=0.5, policy_loss=_policy)
        return task.losses(images, rows).tolist()

    def _policy(part: Tensor) -> Tensor:
        return -(part * first.model.weights.detach()).sum((1, 2, 3))

    policy = _policy(images).tolist()
    logits = [first.logits(images[i : i + 1])[0].tolist() for i in range(3)]
    task = [0.5 * (float(torch.tensor(row).logsumexp(0)) - row[int(y)]) for row, y in zip(logits, labels, strict=True)]
    assert losses("ignore") == pytest.approx(policy)
    assert losses("preserve") == pytest.approx([p + t for p, t in zip(policy, task, strict=True)], rel=1e-5)
    assert losses("destroy") == pytest.approx([p - t for p, t in zip(policy, task, strict=True)], rel=1e-5)
    assert losses("accuracy") == pytest.approx([-t for t in task], rel=1e-4)
    own = torch.tensor([row.index(max(row)) for row in logits])
    assert losses("preserve", None) == losses("preserve", own)
    patch = universal_patch([first, second], pixels(3), size=8, steps=20, generator=_gen())
    assert torch.equal(patch.pixels, (first.model.weights + 3 * second.model.weights > 0).float())
    clean = [float(costs_of(one.cost, pixels(2)).double().mean()) for one in (first, second)]
    there = [float(costs_of(one.cost, patch.on(pixels(2))).double().mean()) for one in (first, second)]
    wanted = [(a - c) / (3000 - c) for a, c in zip(there, clean, strict=True)]
    assert transfer(patch, [first, second], pixels(2)) == pytest.approx(wanted)


def test_places() -> None:
    images, patch = pixels(40), Patch(torch.ones(3, 3, 5), None)
    shown = patch.on(images, generator=_gen(3))
    seen = set()
    for image, new in zip(images, shown, strict=True):
        fits = [
            (t, x) for t in range(6) for x in range(4) if torch.equal(_put(image[None], patch.pixels, t, x)[0], new)
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 12
    assert {top for top, _ in seen} == set(range(6))
    anywhere = universal_patch(Toy(), images, size=7, place=None, steps=2, generator=_gen())
    assert anywhere.place is None
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shift, scale = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    there = Patch(torch.rand(3, 2, 2, generator=_gen()), (6, 0))
    normed = there.on((images - shift) / scale, mean=mean, std=std)
    assert torch.allclose(normed, (there.on(images) - shift) / scale)
    seen_by = Normalised(torch.nn.Identity(), mean, std)(images)
    assert torch.allclose(seen_by, (images - shift) / scale)


def test_queries_raise_the_cost_within_their_budget() -> None:
    victim, images = Toy(), pixels(3)
    patch = query_patch(victim.cost, images, size=4, place=(2, 1), queries=60, generator=_gen())
    assert victim.asked == 180
    assert list(patch.trace) == sorted(patch.trace)
    assert patch.trace[-1] == float(costs_of(victim.cost, patch.on(images)).double().mean())
    assert attack_success(victim.cost(patch.on(images)), victim.cost(images), 3000) > 0.005
    assert set(patch.pixels.unique().tolist()) == {0, 1}
    victim.asked = 0
    found = query_perturb(victim.cost, images, epsilon=16 / 255, queries=40, generator=_gen())
    assert victim.asked == 120
    shown = found.on(images)
    assert _on_levels(shown)
    assert float((shown - images).abs().max()) <= 16 / 255 + 1e-6
    first = query_perturb(victim.cost, images, epsilon=16 / 255, queries=1, generator=_gen())
    rise = victim.cost(shown) - victim.cost(first.on(images))
    assert int(rise.min()) >= 0
    assert int(rise.max()) > 0


def test_controls() -> None:
    flat = flat_colours(pixels(1), levels=3)
    assert flat.shape == (27, 3, 8, 8)
    assert len(flat[:, :, 0, 0].unique(dim=0)) == 27
    assert torch.equal(flat, flat[:, :, :1, :1].expand_as(flat))
    assert _on_levels(flat)
    noise = noise_images(pixels(1), 4, generator=_gen(), smooth=3)
    assert noise.shape == (4, 3, 8, 8)
    assert _on_levels(noise)
    assert torch.equal(noise[:, :, 3:6, 6:], noise[:, :, 3:4, 6:7].expand(-1, -1, 3, 2))
    assert len(noise_images(pixels(1), 0, generator=_gen())) == 0
    assert len(costs_of(Toy().cost, pixels(0))) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"images": pixels(0)}, "1 image or more"),
        ({"images": pixels(1) * 255}, "from 0 to 1"),
        ({"images": pixels(1) * torch.nan}, "from 0 to 1"),
        ({"size": 9}, "inside"),
        ({"size": 0}, "at least 1 pixel"),
        ({"place": (7, 0)}, "inside"),
        ({"lr": 0.0}, "lr above 0"),
        ({"goal": "annoy"}, "a goal out of"),
        ({"labels": torch.tensor([0.0])}, "labels as int64"),
        ({"policy_loss": lambda images: images}, "a loss by image"),
    ],
)
def test_wrong_patches_are_refused(wrong: dict[str, Any], said: str) -> None:
    images = wrong.pop("images", pixels(1))
    with pytest.raises(InputError, match=said):
        universal_patch(Toy(), images, **{"size": 2, "generator": _gen(), "steps": 1, **wrong})


@pytest.mark.parametrize("epsilon", [0.0, 0.5 / 255, 2.0, float("nan")])
def test_a_ball_without_levels_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon from 1/255"):
        perturb(Toy(), pixels(1), epsilon=epsilon, generator=_gen())
