"""The benchmark of adaptive models' speed: what is timed is the model it says, and receipts are gone on with."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    module = importlib.import_module("adaptive_speed")
    monkeypatch.setattr(module, "SHAPES", {"tiny-64": ("tiny", 64)})
    monkeypatch.setattr(module, "build", tiny)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def tables(bench: ModuleType) -> ModuleType:
    return importlib.import_module("adaptive_tables")


def tiny(name: str, size: int, *, seed: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        options: Any = {"patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 4}
        model: nn.Module = VisionTransformer(img_size=size, **options)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def test_images_are_textured_on_more_and_more_of_their_area(bench: ModuleType) -> None:
    images = bench.pictures(4, 30, seed=0)
    assert torch.equal(images, bench.pictures(4, 30, seed=0))
    share = (images != images[:, :, -1:, -1:]).any(1).double().mean((1, 2))
    assert torch.equal(share, share.sort().values)
    assert float(share[0]) == pytest.approx(0.1, abs=0.03)
    assert float(share[-1]) > 0.99
    assert float((bench.pictures(1, 30, seed=0) != 0).double().mean()) > 0.4


def test_a_twin_has_the_same_numbers_and_the_model_stays_as_it_is(bench: ModuleType) -> None:
    model, images = tiny("", 64, seed=0), bench.pictures(3, 64, seed=0)
    plain = bench.forward(model, images)
    thin = bench.twin(model)
    bench.attach("merging-13", thin, bench.Numbers(0, 1), seed=0)
    assert all(a is b for a, b in zip(model.parameters(), thin.parameters(), strict=True))
    assert torch.equal(bench.forward(model, images), plain)
    assert not torch.equal(bench.forward(thin, images), plain)


def test_methods_spend_less_and_unlike_images_unlike_much(bench: ModuleType) -> None:
    model, images = tiny("", 64, seed=0), bench.pictures(6, 64, seed=0)
    numbers = bench.numbers_of(model, images)
    assert len(numbers.sizes) == 5
    tokens: dict[str, Tensor] = {}
    settings = {}
    for method in ("merging-13", "sampling-110", "sampling-110-masked", "halting", "gating"):
        controller, settings[method] = bench.attach(method, thin := bench.twin(model), numbers, seed=0)
        bench.forward(thin, images)
        tokens[method] = controller.tokens
        assert int(controller.tokens.min()) < 65, method
    assert settings["merging-13"] == "r = 4"
    assert settings["sampling-110"] == "36 samples"
    assert tokens["merging-13"][:, -1].unique().tolist() == [65 - 5 * 4]
    for method in ("sampling-110", "halting", "gating"):
        assert len(tokens[method].sum(1).unique()) > 1, method
    assert torch.equal(tokens["sampling-110"], tokens["sampling-110-masked"])
    assert set(tokens) < set(bench.METHODS)
    with pytest.raises(InputError, match="a method out of"):
        bench.attach("merged", bench.twin(model), numbers, seed=0)


def test_a_receipt_is_gone_on_with_and_read(
    bench: ModuleType, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tables.card(tmp_path) == "Not measured yet."
    asked: list[list[str]] = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *args: asked.append(args[3]) or measure(*args))
    order: dict[str, Any] = {
        "shapes": ("tiny-64",),
        "batches": (2,),
        "rounds": 2,
        "folder": tmp_path / "adaptive-speed",
    }
    for methods in (("halting",), ("merging-13", "halting"), ("merging-13",)):
        bench.run(bench.Run(methods=methods, **order))
    assert asked == [["halting"], ["merging-13"]]
    receipt = load_receipt(tmp_path / "adaptive-speed" / "tiny-64-2.json")
    found = receipt.notes["methods"]
    assert list(found) == ["merging-13", "halting"]
    merged = found["merging-13"]
    assert merged["flops gain"] == merged["dense flops"] / merged["flops"] > 1
    assert merged["share kept"] == merged["time gain"]["median"] / merged["flops gain"]
    assert receipt.cost.flops.value == 2 * merged["flops"]
    assert f"| tiny 64 | merging, r = 13 | {tables._gain(merged)} |" in tables.card(tmp_path)
    with pytest.raises(InputError, match="a receipt of"):
        bench.run(bench.Run(methods=("gating",), seed=1, **order))
    with pytest.raises(InputError, match="a shape out of"):
        bench.run(bench.Run(shapes=("vit-h",)))


def test_exports_say_what_is_not_installed(
    bench: ModuleType, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = importlib.import_module("adaptive_runtimes")

    def doubled(model: nn.Module, images: Tensor, path: Path, threads: int) -> Any:
        return lambda: 2 * bench.forward(model, images).numpy()

    monkeypatch.setattr(runtimes, "RUNTIMES", {"there": (("json",), doubled), "other": (("json", "no_such"), doubled)})
    bench.run_export(bench.Export(("tiny-64",), (1,), rounds=2, folder=tmp_path / "adaptive-speed"))
    (receipt,) = [load_receipt(path) for path in (tmp_path / "adaptive-speed").iterdir()]
    assert list(receipt.notes["sides"]) == ["torch fp32, merging", "there, dense", "there, merging"]
    assert receipt.notes["sides"]["there, merging"]["apart from torch"] == pytest.approx(1, abs=1e-5)
    assert receipt.notes["not installed"] == ["other: no no_such"]
    assert "not installed: other: no no_such" in tables.speed([receipt])
    assert tables.card(tmp_path).count("| 1e+00 |") == 2


def item(flops: float, time: float) -> dict[str, Any]:
    return {"flops gain": flops, "time gain": {"median": time}, "share kept": time / flops}


def test_the_figure_and_where_it_does_not_pay(tables: ModuleType) -> None:
    methods = {"merging-13": item(1.7, 1.6), "sampling-110-masked": item(1.5, 0.92), "halting": item(2.0, 1.5)}
    late = Receipt("benchmark", "x", "x", config={"shape": "deit-s-224", "batch": 32}, notes={"methods": methods})
    early = Receipt(
        "benchmark",
        "x",
        "x",
        config={"shape": "deit-s-224", "batch": 8},
        notes={"methods": {"merging-13": item(1.7, 1.5)}},
    )
    assert tables.speed([late, early]) == (
        "merging, r = 13: DeiT-S 224 batch 8 1.50x (1.70x), 88 % kept, DeiT-S 224 batch 32 1.60x (1.70x), 94 % kept; "
        "halting: DeiT-S 224 batch 32 1.50x (2.00x), 75 % kept"
    )
    rows = [row for row in tables.losses_table([late, early]).splitlines() if row.startswith("| DeiT")]
    assert rows == [
        "| DeiT-S 224, sampling, masked | 32 | 1.50x | 0.92x | 61 % |",
        "| DeiT-S 224, halting | 32 | 2.00x | 1.50x | 75 % |",
    ]
    assert "| DeiT-S 224 | halting | - | 1.50x (2.00x) |" in tables.gains_table([late, early])
    assert tables.speed([]) == "Not measured yet."
