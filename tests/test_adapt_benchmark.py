"""The adapter benchmark: every way trains what it says on the same batches, and its receipts hold what was written."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.data.named import data_root
from scrimp.meter import Cost
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt, load_receipt, save_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
BESIDE_PEFT = ("lora-4", "lora-1", "vera", "randlora", "vblora", "tinylora", "lokr", "ia3", "fourierft", "unilora-256")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def tasks() -> Any:
    return importlib.import_module("adapt_tasks")


@pytest.fixture
def ways() -> Any:
    return importlib.import_module("adapt_ways")


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("adapters")


class Net(nn.Module):
    """Two layers to adapt, and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 3)
        generator = generator_for(seed)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.fc2(functional.gelu(self.fc1(inputs))))


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes by the largest of the first three coordinates."""
    inputs = torch.randn(count, 64, generator=generator_for(seed))
    return inputs, inputs[:, :3].argmax(1)


@pytest.fixture
def tiny(tasks: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task of 8 steps in the place of all, which every way of CIFAR-10 can do."""
    parts = {"test": points(30, 1), "held-out": points(30, 2)}
    pictures = tasks.Pictures(points(60, 0), parts, shots=8, batch=8, steps=8)

    def fresh(_: int) -> nn.Module:
        with torch.random.fork_rng([]):
            return Net(5)

    task = tasks.Task(
        name="cifar10",
        about="points",
        metric="accuracy",
        better=1,
        targets=r"fc[12]",
        feedforward=r"fc2",
        steps=8,
        fresh=fresh,
        batches=pictures.batches,
        held=pictures.held,
        head="head",
        labels=24,
    )
    monkeypatch.setattr(bench, "TASKS", {"cifar10": lambda: task})
    return task


def made(ways: Any, task: Any, name: str) -> Any:
    return ways.Training(task, ways.WAYS[name], seed=0, rate=1e-2)


def test_shots_are_as_many_of_every_class_and_all_are_seen_once_a_round(tasks: Any) -> None:
    inputs, labels = points(200, 0)
    pictures = tasks.Pictures((inputs, labels), {}, shots=4, batch=3, steps=8)
    seen = list(pictures.batches(0))
    rounds = [torch.cat([batch[0] for batch in seen[start : start + 4]]) for start in (0, 4)]
    assert torch.cat([batch[1] for batch in seen[:4]]).bincount().tolist() == [4, 4, 4]
    assert len(rounds[0].unique(dim=0)) == 12
    assert torch.equal(rounds[0].unique(dim=0), rounds[1].unique(dim=0))
    assert not torch.equal(rounds[0], rounds[1])
    again, other = list(pictures.batches(0)), list(pictures.batches(1))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(seen, again, strict=True))
    assert not torch.equal(seen[0][0], other[0][0])


def test_a_round_that_does_not_divide_into_batches_leaves_nobody_out(tasks: Any) -> None:
    pictures = tasks.Pictures(points(200, 0), {}, shots=5, batch=4, steps=15)  # four rounds of 15
    seen = torch.cat([inputs for inputs, _ in pictures.batches(3)])
    assert seen.unique(dim=0, return_counts=True)[1].tolist() == [4] * 15


def test_scores_are_those_of_a_loop(tiny: Any) -> None:
    model = tiny.fresh(0)
    found = tiny.score(model, "test")
    inputs, labels = points(30, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([model(row[None]) for row in inputs]).float()
    losses = [-math.log(torch.softmax(row, 0)[label]) for row, label in zip(logits, labels, strict=True)]
    assert found["accuracy"] == sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True)) / 30
    assert found["loss"] == pytest.approx(sum(losses) / 30, rel=1e-2)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert tiny.score(model, "held-out")["loss"] != found["loss"]


@pytest.mark.parametrize("name", BESIDE_PEFT)
def test_a_tuner_trains_its_own_numbers_and_writes_them(ways: Any, tiny: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    training = made(ways, tiny, name)
    before = {key: value.detach().clone() for key, value in training.model.named_parameters()}
    training.run(0)
    moved = {key for key, value in training.model.named_parameters() if not torch.equal(value, before[key])}
    assert moved <= {*training.adapter, *training.head}
    assert moved & set(training.adapter)
    assert set(training.head) <= moved
    file = ways.WAYS[name].store(training.handle, tmp_path)
    assert file.stat().st_size >= 2 * training.numbers()


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_has_the_numbers_of_its_factors(ways: Any, tiny: Any, rank: int) -> None:
    pytest.importorskip("peft")
    assert made(ways, tiny, f"lora-{rank}").numbers() == 2 * rank * (64 + 128)


@pytest.mark.parametrize("name", ["vera", "randlora", "tinylora", "vblora"])
def test_the_small_file_is_smaller_and_the_setting_goes_back(ways: Any, tiny: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    handle = made(ways, tiny, name).handle
    sizes = [ways.WAYS[form].store(handle, tmp_path).stat().st_size for form in (name, f"{name}-small", name)]
    assert sizes[1] < sizes[0] == sizes[2]


def test_the_usual_ways_train_what_they_say(ways: Any, tiny: Any) -> None:
    assert set(made(ways, tiny, "bias").adapter) == {"fc1.bias", "fc2.bias"}
    assert set(made(ways, tiny, "full").adapter) == {"fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"}
    assert made(ways, tiny, "linear").numbers() == 0
    assert set(made(ways, tiny, "linear").head) == {"head.bias", "head.weight"}


def test_nola_has_two_coefficients_a_basis_and_matrix(ways: Any, tiny: Any) -> None:
    assert made(ways, tiny, "nola-16").numbers() == 2 * 16 * 2
    assert made(ways, tiny, "nola-shared-64").numbers() == 2 * 64


def test_the_rate_warms_up_and_ends_near_zero(ways: Any, tiny: Any) -> None:
    training = made(ways, tiny, "bias")
    rates = []
    for batch in tiny.batches(0):
        rates.append([group["lr"] for group in training.optimiser.param_groups])
        training.step(batch)
    expected = [1.0] + [0.5 + 0.5 * math.cos(math.pi * step / 7) for step in range(7)]
    assert [rate[0] for rate in rates] == pytest.approx([1e-2 * share for share in expected])
    assert [rate[1] for rate in rates] == pytest.approx([ways.HEAD_RATE * share for share in expected])


def test_all_ways_start_from_the_same_head(ways: Any, tiny: Any) -> None:
    pytest.importorskip("peft")
    heads = [made(ways, tiny, name).head["head.weight"] for name in ("linear", "lora-4", "nola-16")]
    assert all(torch.equal(heads[0], head) for head in heads)


def test_run_leaves_receipts_and_does_nothing_twice(bench: Any, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    order = bench.Run(tasks=("cifar10",), ways=("linear", "bias", "nola-64-2bit", "nola-64"), seeds=2, out=tmp_path)
    trained: list[str] = []
    plain = bench.Training

    def counted(task: Any, way: Any, **settings: Any) -> Any:
        trained.append(way.about)
        return plain(task, way, **settings)

    monkeypatch.setattr(bench, "Training", counted)
    bench.run(order)
    assert len(trained) == 3 * 2  # both forms of NOLA are of one training
    assert len(list(tmp_path.rglob("*.json"))) == 4 * 2
    bench.run(order)
    assert len(trained) == 6
    first = load_receipt(tmp_path / "cifar10" / "bias-s0.json")
    assert (first.way, first.seed, first.notes["trainable"]) == ("bias", 0, 128 + 64)
    assert first.notes["adapter_bytes"] == first.cost.stored_bytes.value >= 4 * (128 + 64)
    assert first.notes["head_bytes"] >= 4 * (64 * 3 + 3)
    linear = load_receipt(tmp_path / "cifar10" / "linear-s1.json")
    assert (linear.notes["adapter_bytes"], linear.notes["head_bytes"]) == (0, first.notes["head_bytes"])


def test_a_rounded_file_is_judged_as_it_is_stored(bench: Any, tiny: Any, tmp_path: Path) -> None:
    bench.run(bench.Run(tasks=("cifar10",), ways=("nola-64", "nola-64-8bit", "nola-64-2bit"), seeds=1, out=tmp_path))
    exact, eight, two = (
        load_receipt(tmp_path / "cifar10" / f"{name}-s0.json") for name in ("nola-64", "nola-64-8bit", "nola-64-2bit")
    )
    sizes = [item.notes["adapter_bytes"] for item in (exact, eight, two)]
    assert sizes[0] - sizes[1] >= 2 * 128 * 3 - 64
    assert sizes[1] > sizes[2]
    assert two.quality["loss"] != exact.quality["loss"]


def test_reloading_without_rounding_changes_nothing(bench: Any, ways: Any, tiny: Any, tmp_path: Path) -> None:
    training = made(ways, tiny, "nola-64")
    training.run(0)
    file = ways.WAYS["nola-64"].store(training.handle, tmp_path)
    way = ways.WAYS["nola-64-4bit"]
    assert bench.again(training, way, file, 0) == tiny.score(training.model.eval(), "test")


def test_tuning_looks_at_held_out_data_only(bench: Any, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    held = tiny.held

    def watched(part: str) -> Iterator[Any]:
        asked.append(part)
        return held(part)

    object.__setattr__(tiny, "held", watched)
    bench.tune(bench.Tune(tasks=("cifar10",), ways=("bias",), out=tmp_path))
    assert set(asked) == {"held-out"}
    found = [load_receipt(path) for path in sorted((tmp_path / "cifar10" / "rates").iterdir())]
    rates = {round(item.config["rate"], 4) for item in found}
    assert rates >= {1e-3, 3e-3, 9e-3}
    assert {item.seed for item in found} == {bench.HELD_OUT_SEED}


@pytest.mark.parametrize(("optimum", "trainings"), [(0, 3), (1, 4), (-2, 5), (9, 5)])
def test_the_best_rate_lies_between_others_or_at_the_end(
    bench: Any, tiny: Any, tmp_path: Path, monkeypatch: Any, optimum: int, trainings: int
) -> None:
    asked: list[int] = []

    def tried(task: Any, way: str, factor: float, out: Path) -> float:
        asked.append(round(math.log(factor, 3)))
        return -float(abs(asked[-1] - optimum))

    monkeypatch.setattr(bench, "tried", tried)
    at_most = max(-3, min(3, optimum))
    assert bench.best_rate(tiny, "bias", tmp_path) == pytest.approx(3e-3 * 3.0**at_most)
    assert len(asked) == len(set(asked)) == trainings


def published(out: Path, way: str, seed: int, accuracy: float, *, size: int = 400, numbers: int = 100) -> None:
    notes = {"adapter_bytes": size, "trainable": numbers}
    quality, config = {"accuracy": accuracy}, {"training_of": way.removesuffix("-4bit")}
    receipt = Receipt("benchmark", "adapters/cifar10", way, seed=seed, quality=quality, config=config, notes=notes)
    save_receipt(receipt, out / "cifar10" / f"{way}-s{seed}.json")


def test_the_table_pairs_seeds_with_the_baseline(bench: Any, tiny: Any, tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.7)):
        published(tmp_path, "lora-4", seed, accuracy)
    for seed, accuracy in enumerate((0.51, 0.73, 0.9)):
        published(tmp_path, "nola-64", seed, accuracy, size=100)
    published(tmp_path, "nola-64-4bit", 0, 0.4, size=50)
    step = Receipt("benchmark", "s", "nola-64", quality={"cpu_ratio": 1.25, "saved_ratio": 0.5}, cost=Cost())
    save_receipt(step, tmp_path / "cifar10" / "step-time" / "nola-64.json")
    rows = [
        [cell.strip() for cell in row.split("|")[2:-1]] for row in bench.table_text(tmp_path, "cifar10").split("\n")
    ]
    assert ["100", "400", "4.00", "60.0 ± 14.1", "0.0 ± 0.0", "-", "-", "2"] in rows
    assert ["100", "100", "1.00", "71.3 ± 19.6", "2.0 ± 1.4", "1.25x", "0.50x", "3"] in rows
    assert ["100", "50", "0.50", "40.0", "-10.0", "1.25x", "0.50x", "1"] in rows


def test_the_picture_has_a_line_of_each_precision(bench: Any, tiny: Any, tmp_path: Path) -> None:
    for size, way in enumerate(("nola-16", "nola-64", "nola-16-4bit", "lora-4", "linear"), 1):
        published(tmp_path, way, 0, size / 10, size=0 if way == "linear" else 1000 * size)
    figure = bench.curve(tmp_path, "cifar10")
    float_line, packed, _, others = figure.data
    assert (list(float_line.x), list(float_line.y)) == ([1000, 2000], pytest.approx([10, 20]))
    assert list(packed.x) == [3000]
    assert (list(others.x), list(others.text)) == ([4000], ["lora-4"])
    assert figure.layout.xaxis.type == "log"


def test_a_step_beside_the_baseline_is_timed_and_its_activations_counted(bench: Any, tiny: Any) -> None:
    pytest.importorskip("peft")
    receipt = bench.step_receipt(tiny, "lora-4", repeats=3)
    assert receipt.quality["saved_ratio"] == 1.0
    assert receipt.quality["cpu_ratio"] > 0
    assert receipt.cost.saved_bytes.value > 0
    assert bench.step_receipt(tiny, "bias", repeats=1).quality["saved_ratio"] < 1


def test_no_image_to_choose_rates_by_is_trained_on(tasks: Any) -> None:
    if not any(data_root().glob("cifar*")):
        pytest.skip(f"no CIFAR-10 in {data_root()}")
    pictures = tasks.cifar10(size=14, pool=50, held=20)
    (pool, labels), (held, _), (test, _) = pictures.pool, pictures.parts["held-out"], pictures.parts["test"]
    assert (pool.shape, held.shape, test.shape) == ((50, 3, 14, 14), (20, 3, 14, 14), (20, 3, 14, 14))
    assert len(torch.cat([pool, held, test]).flatten(1).unique(dim=0)) == 90
    assert labels.max() < 10


def test_every_way_that_shares_a_training_follows_it(ways: Any) -> None:
    last = ""
    for name, way in ways.WAYS.items():
        assert way.of in (None, last)
        last = way.of or name
        assert way.rates == ways.WAYS[last].rates
