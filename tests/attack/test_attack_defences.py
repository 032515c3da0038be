"""The figures by brute force; the patch set, filters, the detector's false alarms, exits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_victims import Toy, pixels
from torch import Tensor, nn

from scrimp.attack import (
    Filtered,
    MultiExit,
    Patch,
    PatchSet,
    attack_success,
    batch_poisoning,
    fit_detector,
    gaussian_filter,
    median_filter,
    perturb,
)
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


def test_attack_success_by_hand() -> None:
    clean, attacked = torch.tensor([10, 20]), torch.tensor([30, 40, 20])
    assert attack_success(attacked, clean, 55) == pytest.approx(15 / 40)
    assert attack_success(clean, attacked, 45) == pytest.approx(-1)
    assert attack_success(torch.tensor([60]), clean, 55) == pytest.approx(45 / 40)  # not clipped
    big = torch.full((3,), 2**53 + 1)
    for full in (2**53, 2**60):
        assert attack_success(big, big.clone(), full) == 0
    assert attack_success(torch.tensor([8]), torch.tensor([9]), 9) == 0
    for wrong in (torch.zeros(0), torch.tensor([torch.nan])):
        with pytest.raises(InputError, match="costs"):
            attack_success(wrong, clean, 55)


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_poisoning_is_the_mean_over_all_batches(batch: int) -> None:
    clean = torch.tensor([[3, 9], [5, 5], [5, 1], [8, 2], [1, 1], [2, 7]])
    attacked = torch.tensor([[5, 1], [9, 20], [0, 0]])
    got = batch_poisoning(clean, attacked, batch)
    whole = [clean[list(rows)].amax(0).sum() for rows in itertools.combinations(range(6), batch)]
    with_one = [
        torch.cat([clean[list(rows)], bad[None]]).amax(0).sum()
        for bad in attacked
        for rows in itertools.combinations(range(6), batch - 1)
    ]
    assert got.clean == pytest.approx(float(sum(whole)) / len(whole), rel=1e-12)
    assert got.poisoned == pytest.approx(float(sum(with_one)) / len(with_one), rel=1e-12)
    assert got.own == pytest.approx(float(clean.sum()) / 6)
    assert got.factor == pytest.approx(got.poisoned / got.clean)
    one = batch_poisoning(clean[:, 0], attacked[:, 0], batch)
    assert one.clean == pytest.approx(batch_poisoning(clean[:, :1], attacked[:, :1], batch).clean)
    alike = torch.tensor([[7, 9]]).expand(6, 2)
    assert batch_poisoning(alike, alike[:2], batch).factor == 1
    with pytest.raises(InputError, match="from 1 to the 6"):
        batch_poisoning(clean, attacked, 7)


def test_the_patch_set_grows_and_deals() -> None:
    victim, images = Toy(), pixels(4)
    patches = PatchSet()
    assert patches.on(images, generator=_gen()) is images
    victim.model.train()
    for _ in range(2):
        grown = patches.grow(victim, images, size=3, steps=15, generator=_gen(), lr=0.8)
        victim.model.weights.data.neg_()  # what the model learns in between
    assert victim.model.training
    assert len(patches) == 2
    assert patches.patches[1] is grown
    assert torch.equal(patches.patches[0].pixels, 1 - grown.pixels)
    generator, seen = _gen(1), []
    for _ in range(200):
        shown = patches.on(images, generator=generator)
        seen.append([torch.equal(shown, one.on(images)) for one in patches.patches].index(True))
    assert 70 < sum(seen) < 130
    copy = PatchSet(clean=0.75)
    copy.load_state_dict(patches.state_dict())
    assert copy.clean == 0
    assert [one.place for one in copy.patches] == [(0, 0), (0, 0)]
    copy.clean = 0.75
    left = sum(copy.draw(generator) is None for _ in range(200))
    assert 120 < left < 180
    with pytest.raises(InputError, match="clean share"):
        PatchSet(clean=1.5)
    elsewhere = PatchSet([Patch(grown.pixels, None)])
    assert not torch.equal(elsewhere.on(images, generator=_gen()), elsewhere.on(images, generator=_gen(1)))


def _around(image: Tensor, row: int, column: int, radius: int) -> list[list[float]]:
    height, width = image.shape
    rows = [min(max(row + i, 0), height - 1) for i in range(-radius, radius + 1)]
    columns = [min(max(column + i, 0), width - 1) for i in range(-radius, radius + 1)]
    return [[float(image[r, c]) for c in columns] for r in rows]


def test_filters_against_loops() -> None:
    images = torch.rand(2, 3, 4, 3, generator=_gen(), dtype=torch.float64)
    median, blur = median_filter(images, 5), gaussian_filter(images, 0.6)
    bell = torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64).square().div(-2 * 0.6**2).exp()
    bell = (bell / bell.sum()).tolist()
    for image, channel, row, column in itertools.product(range(2), range(3), range(4), range(3)):
        near = _around(images[image, channel], row, column, 2)
        assert float(median[image, channel, row, column]) == sorted(itertools.chain(*near))[12]
        wanted = sum(bell[i] * bell[j] * near[i][j] for i in range(5) for j in range(5))
        assert float(blur[image, channel, row, column]) == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(median_filter(images, 1), images)
    assert torch.equal(gaussian_filter(images, 0), images)
    assert median_filter(images[:0]).shape == (0, 3, 4, 3)
    for wrong in (0, 2):
        with pytest.raises(InputError, match="odd"):
            median_filter(images, wrong)


def test_an_attack_that_knows_the_filter_goes_through_it() -> None:
    victim, images = Toy(), pixels(3)
    known = Filtered(victim, gaussian_filter)
    blind, aware = (perturb(one, images, epsilon=16 / 255, steps=10, generator=_gen()) for one in (victim, known))
    weights = victim.model.weights.detach()
    losses = [float((gaussian_filter(a.on(images)) * weights).sum()) for a in (blind, aware)]
    assert losses[1] > losses[0] + 1
    assert torch.equal(known.cost(images), victim.cost(gaussian_filter(images)))
    assert (known.full, known.ceiling, known.model) == (3000, None, victim.model)


def test_false_alarms_are_as_asked_for() -> None:
    mix = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    clean = torch.randn(4000, 3, generator=_gen()) @ mix + 5
    detector = fit_detector(clean[:400], generator=_gen(), false_alarms=0.1)
    assert 0.05 < float(detector.alarms(clean[400:]).double().mean()) < 0.15
    attacked = clean[400:] + torch.tensor([0.0, 8, 0])
    assert bool(detector.alarms(attacked).double().mean() > 0.95)
    assert bool(detector.alarms(torch.full((1, 3), torch.nan)).all())
    held = clean[:400].double()[torch.randperm(400, generator=_gen())]
    known, rest = held[:200], held[200:]
    near = torch.linalg.pinv(torch.cov(known.T), atol=1e-6)
    far = [float((row - known.mean(0)) @ near @ (row - known.mean(0))) ** 0.5 for row in rest]
    assert detector.threshold == pytest.approx(sorted(far)[180], rel=1e-3)  # the 181st of 200
    single = fit_detector(torch.arange(38.0)[:, None], generator=_gen(), false_alarms=0.05)
    assert int(single.alarms(torch.arange(38.0)[:, None]).sum()) <= 19
    for wrong in (torch.zeros(16, 2), torch.full((100, 2), torch.inf), torch.zeros(100)):
        with pytest.raises(InputError):
            fit_detector(wrong, generator=_gen(), false_alarms=0.1)


class _Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ParameterList(torch.randn(192, 4, generator=_gen(seed)) / 6 for seed in range(3))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.flatten(1) @ way for way in self.ways]


def test_exits() -> None:
    model: Any = _Exits()
    victim, images = MultiExit(model, [10, 20, 40], threshold=0.7), pixels(40)
    outs = [out.detach().softmax(1).max(1).values for out in model(images)]
    wanted = [next(e for e in range(3) if e == 2 or float(outs[e][i]) >= 0.7) for i in range(40)]
    assert victim.exits(images).tolist() == wanted
    assert {0, 1, 2} == set(wanted)
    assert victim.cost(images).tolist() == [(10, 20, 40)[e] for e in wanted]
    assert torch.equal(victim.logits(images)[:, 0], torch.stack([model(images)[e][i, 0] for i, e in enumerate(wanted)]))
    found = perturb(victim, images, epsilon=32 / 255, steps=20, generator=_gen())
    assert attack_success(victim.cost(found.on(images)), victim.cost(images), victim.full) > 0.5
    alone = MultiExit(_One(), [7])
    assert alone.cost(images[:2]).tolist() == [7, 7]
    assert alone.policy_loss(images[:2]).tolist() == [0, 0]
    with pytest.raises(InputError, match="logits of 2 exits"):
        MultiExit(model, [1, 2]).cost(images)
    with pytest.raises(InputError, match="not falling"):
        MultiExit(model, [3, 2, 4])


class _One(nn.Module):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.flatten(1)[:, :3]]
