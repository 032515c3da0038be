"""`scrimp thin`: a tiny transformer in every method; what receipts, pictures, exports and refusals hold."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import CLASSES, draw
from scrimp.adaptive import gating_, image_costs, keep_tokens_, restore_, token_merging_, token_sampling_
from scrimp.cli import main
from scrimp.data import ImageData, TensorImages, normalise
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.models import create_model
from scrimp.jobs.thin import thin
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.thin_fit import TRAINING
from scrimp.jobs.thin_measure import EXPORTED, Answers, spread_out
from scrimp.jobs.thin_methods import gates_of
from scrimp.jobs.thin_models import GATES
from scrimp.jobs.thin_pictures import KEPT, dimmed, shown_blocks
from scrimp.jobs.thin_table import accuracy_figure, grid, sections
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

HERE = Path(__file__).parent
NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}


def shapes_of(train: int, test: int) -> ImageData:
    parts = TensorImages(*draw(train, 0)), TensorImages(*draw(test, 1))
    return ImageData(train=parts[0], test=parts[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))


def tiny_vit() -> nn.Module:
    """A classifier of the shapes with 16 patches, its weights far from each other's."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(NAME, img_size=16, in_chans=1, num_classes=3, **TINY)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named model at a size that a test can run."""
    import timm

    create = timm.create_model

    def small(name: str, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            return create(name, **{**(TINY if name == NAME else {}), **options})

    monkeypatch.setattr(timm, "create_model", small)


def config(out: Path, **settings: Any) -> ThinConfig:
    usual = {"model": "vit", "data": "unused", "json": True, "device": "cpu", "batches": (4,), "repeats": 1}
    return ThinConfig(**{**usual, "batch_size": 12, "pictures": 2, "probe": 12, **settings}, out=out)


def pixels(data: ImageData) -> Tensor:
    return normalise(data.test.batch(torch.arange(len(data.test))), data.mean, data.std)


@contextmanager
def stop_after(steps: int) -> Iterator[None]:
    """Have the training loop be asked to stop after so many steps."""
    agreed = Fitting._agreed

    def halting(self: Fitting, stop: Any) -> tuple[bool, bool]:
        return (True, True) if self.spent.steps == steps else agreed(self, stop)

    Fitting._agreed = halting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fitting._agreed = agreed  # type: ignore[method-assign]


def test_a_ladder_without_training(vit: nn.Module, tmp_path: Path) -> None:
    """Every receipt beside the method called by hand; the model that was given stays as it is."""
    data, before = shapes_of(12, 10), copy.deepcopy(vit.state_dict())
    done = thin(config(tmp_path, r=(0, 2)), model=vit, data=data)
    images, labels = pixels(data), data.test.labels
    with torch.no_grad():
        plain = vit(images)
    for receipt, r in zip(done.receipts, (None, 0, 2), strict=True):
        twin = copy.deepcopy(vit)
        token_merging_(twin, r or 0)
        costs = image_costs(twin, images)
        with torch.no_grad():
            right = (twin(images).argmax(1) == labels).double().mean()
        assert receipt.quality["test_accuracy"] == pytest.approx(float(right))
        assert receipt.cost.flops.value == receipt.notes["flops_an_image"]["worst"] == int(costs[0])
        assert receipt.way == ("dense" if r is None else f"tome-{r}")
        assert receipt.baseline == (r is None)
        assert load_receipt(tmp_path / receipt.way / RECEIPT) == receipt
    dense, nothing, merged = done.receipts
    assert nothing.quality["test_loss"] == pytest.approx(dense.quality["test_loss"], rel=1e-5)
    assert merged.notes["tokens after each block, mean"] == [15, 13, 11, 9]
    assert merged.cost.flops.value < 0.8 * dense.cost.flops.value
    with torch.no_grad():
        assert torch.equal(vit(images), plain)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    page = (tmp_path / REPORT).read_text()
    assert "What tome-2 keeps" in page
    assert page.count('alt="Images with the patches') == 2
    assert (tmp_path / "tome-2" / KEPT).is_file()


@pytest.mark.slow
def test_a_fixed_schedule_is_exported(vit: nn.Module, tmp_path: Path) -> None:
    data = shapes_of(12, 10)
    (_, merged) = thin(config(tmp_path, r=(2,), export=True, repeats=0), model=vit, data=data).receipts
    told, file = merged.notes["export"], tmp_path / "tome-2" / EXPORTED
    assert told["largest difference"] < 1e-5
    assert told["bytes"] == file.stat().st_size
    twin = copy.deepcopy(vit)
    token_merging_(twin, 2)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(file).module()(pixels(data)[:7]), twin(pixels(data)[:7]), atol=1e-5)


def test_token_sampling_pays_by_image(vit: nn.Module, tmp_path: Path) -> None:
    data = shapes_of(12, 30)
    settings = {"method": "ats", "samples": (9,), "batches": (1, 64), "export": True, "batch_size": 2}
    dense, sampled = thin(config(tmp_path, **settings), model=vit, data=data).receipts
    twin = copy.deepcopy(vit)
    token_sampling_(twin, 9, blocks=range(1, 4), least=8)
    costs = sorted(image_costs(twin, pixels(data)).tolist())
    told = sampled.notes["flops_an_image"]
    assert costs[0] < costs[-1]
    assert told == {"mean": sum(costs) / 30, "p50": costs[14], "p95": costs[28], "p99": costs[29], "worst": costs[29]}
    assert dense.notes["flops_an_image"]["p50"] > costs[-1]
    assert sampled.notes["masked and ragged differ by"] < 1e-5
    assert "fixed shapes" in sampled.notes["export"]["why not"]
    assert not (tmp_path / "ats-9" / EXPORTED).exists()
    timed = [(item["batch"], item["form"]) for item in sampled.notes["speed"]]
    assert timed == [(1, "masked"), (1, "ragged")]  # there are no 64 test images


def test_a_budget_that_no_image_exceeds(vit: nn.Module, tmp_path: Path) -> None:
    data, most = shapes_of(12, 12), 220_000
    settings = {"method": "keep", "ratio": (1.0,), "max_flops": most, "repeats": 0, "pictures": 0}
    dense, kept = thin(config(tmp_path, **settings), model=vit, data=data).receipts
    assert kept.notes["flops_an_image"]["worst"] <= most < dense.notes["flops_an_image"]["p50"]
    assert kept.cost.cpu_seconds.value is None
    with pytest.raises(InputError, match="max_flops of at least"):
        thin(config(tmp_path / "other", **{**settings, "max_flops": 1000}), model=vit, data=data)
    assert not (tmp_path / "other").exists()


def test_fine_tuning_beside_dense_under_the_same_budget(vit: nn.Module, tmp_path: Path) -> None:
    """Trained weights are saved, and read again; killed, it goes on the same."""
    data = shapes_of(48, 12)
    settings: dict[str, Any] = {"method": "keep", "ratio": (0.5,), "epochs": 1, "lr": 1e-3, "evaluations": 1}
    whole = thin(config(tmp_path / "whole", **settings), model=vit, data=data)
    with pytest.raises(Interrupted), stop_after(2):
        thin(config(tmp_path / "parts", **settings), model=vit, data=data)
    assert (tmp_path / "parts" / "dense" / CHECKPOINT).is_file()
    parts = thin(config(tmp_path / "parts", **settings, resume=True), model=vit, data=data)
    for way in ("dense", "keep-0.5"):
        ours, theirs = (load_file(tmp_path / run / way / WEIGHTS) for run in ("whole", "parts"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert any(not torch.equal(ours[name], value) for name, value in vit.state_dict().items())
        training = load_receipt(tmp_path / "whole" / way / TRAINING / RECEIPT)
        assert training.cost.samples.value == 48
        assert training.way == way
        assert not (tmp_path / "parts" / way / CHECKPOINT).exists()
    assert [item.quality for item in whole.receipts] == [item.quality for item in parts.receipts]
    twin = copy.deepcopy(vit)
    twin.load_state_dict(load_file(tmp_path / "whole" / "keep-0.5" / WEIGHTS))
    keep_tokens_(twin, 0.5, blocks=(1, 2, 3))
    with torch.no_grad():
        right = (twin(pixels(data)).argmax(1) == data.test.labels).double().mean()
    restore_(twin)
    assert whole.receipts[1].quality["test_accuracy"] == pytest.approx(float(right))
    page = (tmp_path / "whole" / REPORT).read_text()
    assert "fine-tuning" in page


@pytest.mark.usefixtures("small_timm")
def test_what_was_learnt_is_taken_up_again(tmp_path: Path, shape_folder: Path) -> None:
    """Gates: trained from a weights file by the shell, then only measured from the folder they were saved in."""
    from safetensors.torch import save_file

    save_file(tiny_vit().state_dict(), tmp_path / "vit.safetensors")
    usual = ["--size", "16", "--device", "cpu", "--repeats", "0", "--pictures", "0", "--probe", "8", "--json"]
    given = ["thin", NAME, str(shape_folder), "--weights", str(tmp_path / "vit.safetensors"), "--method", "adavit"]
    assert main([*given, *usual]) == 2  # gates that have learnt nothing
    trained = ["--epochs", "2", "--lr", "0.01", "--evaluations", "1", "--baseline", "given", "--usage", "0.2"]
    assert main([*given, *usual, *trained, "--out", str(tmp_path / "run")]) == 0
    home = tmp_path / "run" / "adavit-0.2"
    assert not (tmp_path / "run" / "dense" / WEIGHTS).exists()
    gates = load_file(home / GATES)
    assert any(bool(value.any()) for name, value in gates.items() if name.endswith("weight"))
    with safe_open(home / WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["thin"]) == {"method": "adavit", "usage": 0.2}
        assert set(file.keys()) == set(tiny_vit().state_dict())
    again = ["thin", str(home), str(shape_folder), "--method", "adavit", "--usage", "0.2", *usual]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    first, second = (load_receipt(tmp_path / run / "adavit-0.2" / RECEIPT) for run in ("run", "again"))
    assert first.quality == second.quality
    assert first.notes["flops_an_image"] == second.notes["flops_an_image"]
    gates.pop(next(iter(gates)))
    save_file(gates, home / GATES)
    assert main([*again, "--out", str(tmp_path / "damaged")]) == 2


def test_gates_have_a_rate_of_their_own(vit: nn.Module, tmp_path: Path) -> None:
    settings = {"method": "adavit", "usage": (0.2,), "epochs": 1, "evaluations": 1, "baseline": "given", "pictures": 0}
    thin(config(tmp_path / "run", **settings, lr=1e-9, gate_lr=0.5), model=vit, data=shapes_of(48, 12))
    home, before = tmp_path / "run" / "adavit-0.2", vit.state_dict()
    assert all(torch.allclose(value, before[name], atol=1e-7) for name, value in load_file(home / WEIGHTS).items())
    gates = gates_of(gating_(copy.deepcopy(vit)))
    assert gates is not None
    fresh = gates.state_dict()
    moved = [float((value - fresh[name]).max()) for name, value in load_file(home / GATES).items() if "bias" in name]
    assert statistics.median(moved) < -0.5  # towards being shut


@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["convnet", "--weights", "convnet.safetensors"], "ConvNet without a list of 'blocks'"),
        ([NAME], "without any"),
        ([NAME, "--weights", "vit.safetensors", "--method", "keep", "--r", "4"], "settings of keep"),
        ([NAME, "--weights", "vit.safetensors", "--gate-lr", "0.1"], "settings of tome"),
        ([NAME, "--weights", "vit.safetensors", "--ratio", "1.5", "--method", "keep"], "--ratio above 0"),
        ([NAME, "--weights", "vit.safetensors", "--method", "keep", "--blocks", "7"], "blocks from 0 to 3"),
        ([NAME, "--weights", "headless.safetensors"], "--epochs to train one"),
        ([NAME, "--weights", "vit.safetensors", "--method", "avit"], "weights that learnt avit"),
        ([NAME, "--weights", "vit.safetensors", "--epochs", "1", "--batch-size", "500"], "a batch size up to 192"),
        (["nowhere/run"], "without any"),
    ],
)
def test_what_cannot_be_thinned_is_refused_before_anything_is_written(
    settings: list[str],
    said: str,
    tmp_path: Path,
    shape_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    state = tiny_vit().state_dict()
    save_file(state, "vit.safetensors")
    save_file({name: value for name, value in state.items() if not name.startswith("head")}, "headless.safetensors")
    with torch.random.fork_rng():
        save_file(create_model("convnet", classes=3, channels=1, size=16).state_dict(), "convnet.safetensors")
    command = ["thin", settings[0], str(shape_folder), "--size", "16", "--device", "cpu", "--json", *settings[1:]]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_picture_dims_what_is_gone() -> None:
    image = torch.full((3, 5, 4), 200, dtype=torch.uint8)
    there = torch.tensor([[True, False], [False, True]])
    drawn = dimmed(image, there)
    assert drawn.shape == image.shape
    assert (drawn[:, :3, :2] == 200).all()
    assert (drawn[:, 3:, 2:] == 200).all()
    assert (drawn[:, :3, 2:] == round(200 * 0.18 + 128 * 0.82)).all()
    kept = torch.ones(2, 5, 1, 4, dtype=torch.bool)
    kept[1, 1:, 0, 0] = False
    kept[0, 4, 0, 3] = False
    assert shown_blocks(kept) == [1, 4]
    assert shown_blocks(kept[:, :1]) == [0]
    many = torch.ones(1, 20, 4, 8, dtype=torch.bool).flatten(2)
    for block in range(20):
        many[0, block, : block + 1] = False
    shown = shown_blocks(many.view(1, 20, 4, 8))
    assert (len(shown), shown[0], shown[-1]) == (7, 0, 19)


def test_ranks_of_costs() -> None:
    costs = torch.tensor([5, 1, 4, 2, 3])
    assert spread_out(costs, 3) == [1, 4, 0]
    assert spread_out(costs, 9) == [1, 3, 4, 2, 0]
    assert spread_out(costs, 1) == [1]
    assert spread_out(costs, 0) == []
    one = Answers(torch.zeros(1), torch.ones(1), torch.tensor([7]), None).flops()
    assert one == {"mean": 7.0, "p50": 7.0, "p95": 7.0, "p99": 7.0, "worst": 7.0}


def test_the_table_says_what_is_unknown_and_how_much_quicker() -> None:
    def spent(mean: float) -> dict[str, float]:
        return dict.fromkeys(("mean", "p50", "p95", "p99", "worst"), mean)

    ratio = {"median": 0.5, "low": 0.4, "high": 0.8, "count": 5}
    times = dict.fromkeys(("seconds", "cpu_seconds", "dense_seconds", "dense_cpu_seconds"), 0.5)
    paired = {"cpu_ratio": ratio, "ratio": {**ratio, "median": 0.25}}
    speed: list[dict[str, Any]] = [{"batch": 8, "form": "ragged", "flops": 1e9, **times, **paired}]
    dense = Receipt(
        "run", "s", "dense", baseline=True, quality={"test_accuracy": 0.5}, notes={"flops_an_image": spent(2e9)}
    )
    thinned = Receipt("run", "s", "tome-8", notes={"flops_an_image": spent(1e9), "speed": speed, "device": "cpu"})
    headings, rows = grid([dense, thinned])
    assert headings == ["way", "test accuracy", "FLOPs mean", "FLOPs p50", "FLOPs p95", "FLOPs p99", "FLOPs worst",
                        "FLOPs of dense", "quicker batch 8"]  # fmt: skip
    assert rows[0] == ["dense", "50.0 %", *["2.00 G"] * 5, "1x", "-"]
    assert rows[1] == ["tome-8", "-", *["1.00 G"] * 5, "0.5x", "2x"]
    thinned.notes["device"] = "cuda"  # a CPU that waits is no measure
    assert grid([dense, thinned])[1][1][-1] == "4x"
    (about, *_) = sections([dense, thinned])
    assert isinstance(about.content, str)
    assert "the quickest is tome-8, 4x as quick" in about.content
    speed[0]["ratio"] = {**ratio, "high": 1.1}
    assert "no way is quicker than dense" in str(sections([dense, thinned])[0].content)
    figure = accuracy_figure([dense, thinned])
    assert [list(trace.x) for trace in figure.data] == [[2e9], [1e9]]
