"""`scrimp swap`: small pretrained models, stand-ins for the attentions so that what they lose is known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import scrimp.attend
from scrimp.attend import softmax_attention
from scrimp.jobs.folder import CONFIG, REPORT
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.swap import RECOMMENDATION, swap
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.swap_scores import Scores
from scrimp.jobs.swap_table import recommend, sentences, swap_table
from scrimp.meter import Cost
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

TIMM = "vit_tiny_patch16_224"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SENTENCE = "the quick brown fox jumps over a lazy dog while it rains and nobody looks up"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax with noise that falls with the clusters (drawn from the generator), and one that is plainly wrong."""

    def noisy(query: Tensor, key: Tensor, value: Tensor, *, clusters: int = 100, generator: Any, **rest: Any) -> Tensor:
        rest.pop("topk", None)
        noise = torch.randn(query.shape, generator=generator) * value.std() / clusters**2
        return softmax_attention(query, key, value, **rest) + noise

    def linear(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, key_lengths: Any = None) -> Tensor:
        return value.mean(2, keepdim=True).expand(*query.shape[:3], -1).contiguous()

    def improved(query: Tensor, key: Tensor, value: Tensor, *, topk: int = 32, **rest: Any) -> Tensor:
        return noisy(query, key, value, **rest)

    for name, fn in (("clustered", noisy), ("improved_clustered", improved), ("linear", linear)):
        monkeypatch.setattr(scrimp.attend, f"{name}_attention", fn, raising=False)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a timm ViT for grey images of 32 pixels and three classes, as `scrimp train` saves them."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(TIMM, img_size=32, in_chans=1, num_classes=3, depth=2, embed_dim=48)
        nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("vit") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named model at a size that a test can run."""
    import timm

    create = timm.create_model

    def small(name: str, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            return create(name, **({"depth": 2, "embed_dim": 48} if name == TIMM else {}), **options)

    monkeypatch.setattr(timm, "create_model", small)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[UNK]", *dict.fromkeys(SENTENCE.split())]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny transformers models with random weights, as `save_pretrained` leaves them."""
    transformers = pytest.importorskip("transformers")
    places, length = {"vocab_size": 40, "pad_token_id": 0}, {"max_position_embeddings": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    makers = {
        "words": ("BertForSequenceClassification", "BertConfig", {**TINY, **places, **length, "num_labels": 3}),
        "encoder": ("BertModel", "BertConfig", {**TINY, **places, **length}),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**TINY, **places, **length, **ends, "num_key_value_heads": 2}),
        "pictures": ("ViTForImageClassification", "ViTConfig", {**TINY, "image_size": 32, "patch_size": 8}),
    }
    makers["pictures"][2].update(num_channels=3, num_labels=3)
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (model, config, settings) in makers.items():
            found[name] = tmp_path_factory.mktemp(name)
            getattr(transformers, model)(getattr(transformers, config)(**settings)).save_pretrained(found[name])
            if name != "pictures":
                tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root, words = tmp_path_factory.mktemp("texts"), SENTENCE.split()
    (root / "long.txt").write_text(" ".join(words[(7 * place) % len(words)] for place in range(300)))
    with (root / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([" ".join(words[start : start + 2 + start % 9]), start % 3] for start in range(12))
    return {"txt": str(root / "long.txt"), "csv": str(root / "rows.csv")}


def config(out: Path, model: Any = TIMM, data: Any = "builtin", **settings: Any) -> SwapConfig:
    usual = {"clusters": (2, 1000), "topk": (8,), "samples": 24, "repeats": 2, "json": True, "device": "cpu"}
    return SwapConfig(**{**usual, **settings}, model=str(model), data=str(data), out=out)


def test_timm_weights_at_two_sizes(vit, shape_folder, tmp_path):
    attentions = ("softmax", "improved-clustered", "linear")
    found = swap(
        config(tmp_path / "run", data=shape_folder, weights=vit, sizes=(48, 32), attention=attentions, tolerance=0.1)
    )
    ways = ["original", "softmax", "improved-clustered C=2 k=8", "improved-clustered C=1000 k=8", "linear"]
    assert [item.way for item in found.receipts] == 2 * ways
    assert [item.baseline for item in found.receipts] == 2 * [True, *[False] * 4]
    assert list(found.recommended) == [f"{TIMM} at {size} px" for size in (32, 48)]
    original, softmax, rough, fine, linear = (item.quality for item in found.receipts[:5])
    assert softmax["agreement"] == fine["agreement"] == original["agreement"] == 1
    assert softmax["accuracy"] == original["accuracy"]
    assert softmax["output_error"] < 1e-6
    assert fine["output_error"] < rough["output_error"]
    assert linear["output_error"] > 1e-3
    assert softmax["kl"] < 1e-6 < linear["kl"]
    small, large = found.receipts[0], found.receipts[5]
    assert large.cost.flops.value > small.cost.flops.value
    same = found.receipts[1]
    assert same.cost.flops.value == small.cost.flops.value
    assert same.notes["attention_flops"] == small.notes["attention_flops"] == 2 * 2 * 2 * 8 * 3 * 5 * 5 * 16
    assert {"cpu_seconds", "seconds"} <= set(same.notes["ratios"])
    assert (tmp_path / "run" / CONFIG).is_file()
    assert "improved-clustered C=1000 k=8" in (tmp_path / "run" / REPORT).read_text()
    assert json.loads((tmp_path / "run" / RECOMMENDATION).read_text())["recommended"] == found.recommended
    kept = sorted((tmp_path / "run" / "receipts" / "32").glob("*.json"))
    assert {load_receipt(file).way for file in kept} == set(ways)


def test_the_same_seed_gives_the_same_figures(vit, shape_folder, tmp_path):
    settings = {"weights": vit, "data": shape_folder, "sizes": (32,), "clusters": (2,)}
    first, second = (swap(config(tmp_path / name, **settings)).receipts[1].quality for name in "ab")
    assert first == second
    other = swap(config(tmp_path / "c", **settings, seed=1)).receipts[1].quality
    assert other["output_error"] != first["output_error"]


def test_only_chosen_layers(vit, shape_folder, tmp_path):
    settings = {"weights": vit, "data": shape_folder, "sizes": (32,), "attention": ("linear",)}
    every = swap(config(tmp_path / "every", **settings)).receipts
    one = swap(config(tmp_path / "one", **settings, layers=r"blocks\.1\.")).receipts
    assert 0 < one[1].quality["output_error"] < every[1].quality["output_error"]
    assert one[0].notes["attention_flops"] == every[0].notes["attention_flops"] / 2


@pytest.mark.parametrize(
    ("name", "kind", "qualities"),
    [
        ("words", "csv", {"accuracy", "loss", "agreement", "output_error", "kl"}),
        ("words", "txt", {"agreement", "output_error", "kl"}),
        ("encoder", "txt", {"agreement", "output_error"}),
        ("encoder", "csv", {"agreement", "output_error"}),
        ("llama", "txt", {"accuracy", "loss", "agreement", "output_error", "kl"}),
    ],
)
def test_transformers_folders_with_text(folders, texts, tmp_path, name, kind, qualities):
    settings = {"attention": ("softmax", "clustered"), "sizes": (16,)}
    original, softmax, _rough, fine = swap(config(tmp_path / "run", folders[name], texts[kind], **settings)).receipts
    assert set(softmax.quality) == qualities
    assert original.name == f"{folders[name].name} at 16 tokens"
    assert softmax.quality["output_error"] < 1e-6
    assert softmax.quality["agreement"] == 1
    assert fine.quality["output_error"] < 1e-4
    if "loss" in qualities:
        assert softmax.quality["loss"] == pytest.approx(original.quality["loss"], abs=1e-5)


def test_a_language_models_loss_is_that_of_the_next_token(folders, texts, tmp_path):
    from transformers import LlamaForCausalLM

    settings = {"attention": ("softmax",), "sizes": (16,), "samples": 3}
    original = swap(config(tmp_path / "run", folders["llama"], texts["txt"], **settings)).receipts[0]
    tokens = torch.tensor(tokenizer()(Path(texts["txt"]).read_text())["input_ids"])[: 300 // 16 * 16].view(-1, 16)
    chosen = tokens[[0, 6, 12]]
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(folders["llama"])(chosen, labels=chosen).loss
    assert original.quality["loss"] == pytest.approx(float(wanted), abs=1e-5)


def test_a_transformers_folder_with_images_of_other_sizes(folders, shape_folder, tmp_path):
    settings = {"attention": ("softmax",), "sizes": (32, 48)}
    receipts = swap(config(tmp_path / "run", folders["pictures"], shape_folder, **settings)).receipts
    assert [item.quality["agreement"] for item in receipts] == [1] * 4
    assert all("accuracy" in item.quality for item in receipts)
    assert receipts[2].cost.flops.value > receipts[0].cost.flops.value


def test_from_python_with_a_ready_model_and_batches(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.Sequential(
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.LazyLinear(4)
        )
        model(torch.zeros(1, 5, 16))
    batches = [torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(place)) for place in range(2)]
    labelled = [(batch, torch.tensor([0, 1, 2])) for batch in batches]
    model.train()
    found = swap(config(tmp_path / "run", "mine", attention=("softmax",)), model=model, data=labelled)
    assert model.training
    assert [item.name for item in found.receipts] == ["mine", "mine"]
    model.eval()
    right = sum(int((model(batch).argmax(1) == labels).sum()) for batch, labels in labelled)
    assert found.receipts[0].quality["accuracy"] == right / 6
    by_size = {5: batches, 50: batches}
    found = swap(config(tmp_path / "sizes", "mine", attention=("softmax",)), model=model, data=by_size)
    assert [item.name for item in found.receipts] == ["mine at 5 px", "mine at 5 px", "mine at 50 px", "mine at 50 px"]
    assert "accuracy" not in found.receipts[0].quality


def test_a_stopped_swap_goes_on_and_measures_nothing_twice(vit, shape_folder, tmp_path, monkeypatch):
    settings = {"weights": vit, "data": shape_folder, "sizes": (32,)}
    with monkeypatch.context() as patch:
        scores, done = Scores.quality, []

        def stopping(self):
            done.append(1)
            if len(done) == 2:
                raise Interrupted
            return scores(self)

        patch.setattr(Scores, "quality", stopping)
        with pytest.raises(Interrupted):
            swap(config(tmp_path / "run", **settings))
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "receipts" / "32").iterdir()}
    assert set(before) == {"original.json", "improved-clustered-C2-k8.json"}
    found = swap(config(tmp_path / "run", **settings, resume=True))
    assert len(found.receipts) == 3
    assert all((tmp_path / "run" / "receipts" / "32" / name).read_bytes() == text for name, text in before.items())
    monkeypatch.setattr("scrimp.jobs.swap_measure.Bench.scores", lambda *_: pytest.fail("measured again"))
    again = swap(config(tmp_path / "run", **settings, resume=True))
    assert [item.created for item in again.receipts] == [item.created for item in found.receipts]
    with pytest.raises(InputError, match="clusters"):
        swap(config(tmp_path / "run", **settings, resume=True, clusters=(3,)))


def test_a_signal_stops_between_batches(vit, shape_folder, tmp_path, monkeypatch):
    import os
    import signal

    monkeypatch.setattr(
        "scrimp.jobs.swap_measure.Bench.cost_of_original", lambda self: os.kill(os.getpid(), signal.SIGINT) or Cost()
    )
    with pytest.raises(Interrupted):
        swap(config(tmp_path / "run", data=shape_folder, weights=vit, sizes=(32,)))
    assert [file.name for file in (tmp_path / "run").rglob("*.json")] == ["original.json"]


def test_mistakes_are_told_in_a_line(vit, shape_folder, folders, texts, tmp_path):
    def said(**settings: Any) -> str:
        out = tmp_path / "run"
        with pytest.raises(InputError) as error:
            swap(config(out, **settings))
        assert not out.exists() or not list(out.rglob("*"))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--pretrained or --weights" in said()
    assert "pretrained weights of" in said(pretrained=True)
    assert "absent.safetensors" in said(weights=tmp_path / "absent.safetensors")
    assert "no/such/model" in said(model="no/such/model")
    assert "config.json" in said(model=tmp_path)
    assert "vit_tiny" in said(model="vit_tiny_patch1", weights=vit)
    assert "--clusters" in said(clusters=(0,))
    assert "--attention" in said(attention=("linear", "linear"))
    assert "--tolerance" in said(tolerance=2.0)
    assert "--sizes" in said(weights=vit, sizes=(33,), data=shape_folder)
    assert "up to 32 tokens" in said(model=folders["words"], data=texts["csv"], sizes=(64,))
    assert "at least 24 tokens" in said(model=folders["llama"], data=_short(tmp_path), sizes=(24,))
    assert "'text'" in said(model=folders["words"], data=_no_column(tmp_path), sizes=(8,))
    assert "a .txt or .csv file" in said(model=folders["words"], data="builtin", sizes=(8,))
    assert "images for this model" in said(weights=vit, data=texts["txt"])
    assert "none chosen out of blocks.0.attn" in said(weights=vit, data=shape_folder, layers="layer9")
    assert "one of the devices" in said(weights=vit, device="cuda")


def _short(folder: Path) -> Path:
    (folder / "short.txt").write_text(SENTENCE)
    return folder / "short.txt"


def _no_column(folder: Path) -> Path:
    (folder / "other.csv").write_text("words,label\nthe fox,1\n")
    return folder / "other.csv"


def test_a_model_that_asks_too_much_is_refused_before_anything_is_written(tmp_path):
    class Biased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, torch.full((3, 3), 0.5))[:, 0, 0]

    with pytest.raises(InputError, match="a bias added to the scores"):
        swap(config(tmp_path / "run", "mine"), model=Biased(), data=[torch.ones(2, 1, 3, 4)])
    assert not (tmp_path / "run").exists()


def receipt(way: str, agreement: float, cpu: float, *, high: float | None = None) -> Receipt:
    ratio = {"median": cpu, "low": cpu, "high": high or cpu, "count": 3}
    notes = {"ratios": {"cpu_seconds": ratio, "seconds": ratio}}
    return Receipt(kind="run", name="m", way=way, quality={"agreement": agreement}, notes=notes)


ORIGINAL = Receipt(kind="run", name="m", way="original", baseline=True, quality={"agreement": 1.0})


@pytest.mark.parametrize(
    ("tolerance", "wanted"), [(0.0, None), (0.01, "fine"), (0.05, "middle"), (0.2, "rough"), (1.0, "wrong")]
)
def test_the_cheapest_within_the_tolerance_is_recommended(tolerance, wanted):
    ladder = [("slow", 1.0, 1.2), ("fine", 0.99, 0.8), ("middle", 0.95, 0.5), ("rough", 0.85, 0.4), ("wrong", 0.1, 0.1)]
    receipts = [ORIGINAL, receipt("softmax", 1.0, 0.01), *(receipt(*step) for step in ladder)]
    receipts.append(receipt("noise", 1.0, 0.05, high=1.01))
    assert recommend(receipts, tolerance) == {"m": wanted}
    (said,) = sentences(receipts, tolerance)
    assert (f"take {wanted}:" in said) if wanted else ("none is recommended" in said)


def test_the_table_holds_every_setting():
    from rich.console import Console

    console = Console(width=160, file=io.StringIO())
    console.print(swap_table([ORIGINAL, receipt("fine", 0.99, 0.8)], 0.01))
    text = console.file.getvalue()
    assert "0.8x" in text
    assert "99.0 %" in text
    assert "take fine" in text


def test_scores_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(10, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(10) % 4
    scores = Scores(features=False)
    for rows in (slice(0, 7), slice(7, 10)):
        scores.add(before[rows], after[rows], labels[rows])
    known, found = before.softmax(1), after.softmax(1)
    wanted = {
        "accuracy": float((after.argmax(1) == labels).double().mean()),
        "loss": float(nn.functional.cross_entropy(after, labels)),
        "agreement": float((before.argmax(1) == after.argmax(1)).double().mean()),
        "output_error": float((after - before).norm() / before.norm()),
        "kl": float((known * (known / found).log()).sum(1).mean()),
    }
    assert scores.quality() == pytest.approx(wanted)
    features = Scores(features=True)
    features.add(before, -before, None)
    assert features.quality() == {"agreement": 1.0, "output_error": pytest.approx(2.0)}
    few = Scores(features=True)
    few.add(before[:2], after[:2], None)
    assert few.quality()["agreement"] is None
