"""`scrimp adapt` on text: blocks and rows against plain loops, perplexity against transformers' own loss."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_adapt import Killed, stop_after

from scrimp.adapt import attach_, load_adapter_, nola
from scrimp.cli import main
from scrimp.jobs.adapt import BASELINE, adapt
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_models import text_model
from scrimp.jobs.adapt_run import ADAPTER
from scrimp.jobs.adapt_text import load_text, load_tokenizer
from scrimp.jobs.checkpoint import load_checkpoint
from scrimp.jobs.folder import CHECKPOINT, RECEIPT
from scrimp.jobs.merge import merge
from scrimp.jobs.merge_config import MergeConfig
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "from", "here", "to", "there"]
USUAL = {"batch_size": 8, "evaluations": 2, "length": 16, "precision": "fp32", "json": True, "device": "cpu"}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def config(out: Path, model: Path, data: Path, **settings) -> AdaptConfig:
    return AdaptConfig(model=str(model), data=str(data), **{**USUAL, **settings}, out=out)


@pytest.fixture(scope="module")
def text() -> str:
    """Sentences that walk through a list of words in order, from anywhere."""
    chance = random.Random(0)
    starts = [chance.randrange(len(WORDS)) for _ in range(150)]
    return "\n".join(" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in starts)


@pytest.fixture(scope="module")
def models(text, tmp_path_factory) -> dict[str, Path]:
    """Tiny models of several kinds, as they are drawn, each with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    known = tokenizers.trainers.WordLevelTrainer(special_tokens=["?", "<end>"], show_progress=False)
    pieces.train_from_iterator([text], known)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>", unk_token="?")
    common = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1}
    wide = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **wide)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **SMALL)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**common, **SMALL, pad_token_id=1)),
    }
    for name, make in made.items():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            make().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture(scope="module")
def files(text, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "walk.txt").write_text(text)
    chance = random.Random(1)
    rows = []
    for number in range(120):
        words = WORDS[:6] if number % 2 else WORDS[6:]
        rows.append((" ".join(chance.choice(words) for _ in range(3 + number % 5)), "near" if number % 2 else "far"))
    lines = [json.dumps({"said": said, "where": where}) for said, where in rows]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    (root / "rows.csv").write_text("text,label\n" + "\n".join(f'"{said}",{where}' for said, where in rows))
    return root


COMMON = ["--device", "cpu", "--json"]
ROWS = {"text_column": "said", "label_column": "where"}


def test_blocks_hold_every_token_once_and_the_end_is_held_out(models, files, text):
    tokenizer = load_tokenizer(str(models["gpt2"]))
    data = load_text(config(Path(), models["gpt2"], files / "walk.txt", length=7), tokenizer)
    tokens = tokenizer(text)["input_ids"]
    cut = len(tokens) - round(0.1 * len(tokens))
    for part, kept in ((data.train, tokens[:cut]), (data.test, tokens[cut:])):
        count = (len(kept) - 1) // 7
        assert len(part) == count
        predicted = [token for block in part.tokens for token in block[1:].tolist()]
        assert predicted == kept[1 : 7 * count + 1]
        assert part.tokens[:, 0].tolist() == kept[: 7 * count : 7]
    assert data.classes == ()


def test_files_of_a_folder_are_put_one_after_another(models, files, tmp_path):
    for name, words in (("b", "dog ran far " * 10), ("a", "cat sat on " * 10)):
        (tmp_path / f"{name}.txt").write_text(words)
    tokenizer = load_tokenizer(str(models["gpt2"]))
    data = load_text(config(Path(), models["gpt2"], tmp_path, length=5), tokenizer)
    first, second = (
        [tokenizer.convert_tokens_to_ids(word) for word in said.split()] for said in ("cat sat on", "dog ran far")
    )
    whole = [*(first * 10)[:27], 1, *(second * 10)[:27]]
    assert data.train.tokens[:, :-1].flatten().tolist() == whole[:50]
    assert data.test.tokens.tolist() == [[*first, 1, *second[:2]]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_rows_are_padded_and_split_by_class(models, files, name):
    tokenizer = load_tokenizer(str(models["gpt2"]))
    settings = ROWS if name.endswith("jsonl") else {}
    data = load_text(config(Path(), models["gpt2"], files / name, length=6, **settings), tokenizer)
    assert data.classes == ("far", "near")
    assert (len(data.train), len(data.test)) == (108, 12)
    assert data.test.labels.bincount().tolist() == [6, 6]
    assert data.train.tokens.shape == (108, 2, 6)
    ids, mask = data.train.tokens.unbind(1)
    assert set(ids[mask == 0].tolist()) == {tokenizer.pad_token_id}
    assert mask.sum(1).unique().tolist() == [3, 4, 5, 6]
    near = {tokenizer.convert_tokens_to_ids(word) for word in WORDS[:6]}
    for row, counts, label in zip(ids, mask.bool(), data.train.labels.tolist(), strict=True):
        assert set(row[counts].tolist()) <= near if label else not set(row[counts].tolist()) & near


def test_a_file_to_test_on(models, files, tmp_path):
    (tmp_path / "test.csv").write_text("text,label\ncat sat,near\ndog ran,far\ndog here,far\n")
    tokenizer = load_tokenizer(str(models["gpt2"]))
    run = config(Path(), models["gpt2"], files / "rows.csv", test=tmp_path / "test.csv")
    data = load_text(run, tokenizer)
    assert (len(data.train), data.test.labels.tolist()) == (120, [1, 0, 0])
    (tmp_path / "test.csv").write_text("text,label\ncat sat,elsewhere\n")
    with pytest.raises(InputError, match="'elsewhere'"):
        load_text(run, tokenizer)


def own_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """By transformers' own loss: every block predicts the same number of tokens, so means may be averaged."""
    with torch.no_grad():
        return float(
            sum(model.eval()(input_ids=block[None], labels=block[None]).loss for block in blocks) / len(blocks)
        )


@pytest.mark.parametrize(("name", "method"), [("gpt2", "nola"), ("gpt2", "full"), ("llama", "lora")])
def test_continued_text(models, files, tmp_path, name, method):
    run = config(tmp_path / "run", models[name], files / "walk.txt", method=method, epochs=2.0, lr=0.01)
    (receipt,) = adapt(run)
    quality = receipt.quality
    assert quality["test_perplexity"] == pytest.approx(math.exp(quality["test_loss"]))
    assert quality["test_perplexity"] < 0.97 * quality["untouched_perplexity"]
    assert receipt.curve[0]["flops"] == 0
    assert (receipt.cost.labels.value, receipt.cost.flops.missed) == (0, ())
    blocks = load_text(run, load_tokenizer(run.model)).test.tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(models[name]).float()
    assert quality["untouched_perplexity"] == pytest.approx(math.exp(own_loss(model, blocks)), rel=1e-4)
    load_adapter_(model, tmp_path / "run" / ADAPTER)
    assert quality["test_loss"] == pytest.approx(own_loss(model, blocks), rel=1e-4)
    assert receipt.cost.stored_bytes.value == (tmp_path / "run" / ADAPTER).stat().st_size


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_classified_rows(models, files, tmp_path, name):
    settings = {**ROWS, "epochs": 5.0, "shots": 40, "lr": 0.02, "baseline": "linear"}
    receipt, beside = adapt(config(tmp_path / "run", models[name], files / "rows.jsonl", **settings))
    assert receipt.quality["test_accuracy"] > 0.8
    assert receipt.cost.labels.value == beside.cost.labels.value == 80
    assert beside.notes["trained numbers"] == 0
    assert beside.notes["trained numbers of the classifier"] == receipt.notes["trained numbers of the classifier"]
    wanted = {
        "gpt2": {"score.weight"},
        "bert": {f"{part}.{kind}" for part in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")},
    }
    assert set(load_file(tmp_path / "run" / BASELINE / ADAPTER)) == wanted[name]
    assert set(load_file(tmp_path / "run" / ADAPTER)) > wanted[name]


def test_the_cost_of_a_step(models, files, tmp_path):
    """Counted at two sizes of batch and drawn through: exact at a third."""
    run = config(tmp_path / "run", models["gpt2"], files / "walk.txt", epochs=1.0)
    (receipt,) = adapt(run)
    model = text_model(run.model, ()).eval()
    attach_(model.model, nola())
    tokens = load_text(run, load_tokenizer(run.model)).train.tokens[:8]

    def step() -> None:
        torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens[:, 1:]).backward()

    each = receipt.cost.flops.value / (receipt.cost.samples.value / 8)
    assert each == pytest.approx(count_flops(step).value)


def test_a_killed_run_resumes_to_the_same_bytes(models, files, tmp_path):
    settings = {"epochs": 1.0, "baseline": "none"}
    adapt(config(tmp_path / "whole", models["gpt2"], files / "walk.txt", **settings))
    killed = config(tmp_path / "killed", models["gpt2"], files / "walk.txt", **settings)
    with stop_after(4), pytest.raises(Killed):
        adapt(killed)
    kept = load_checkpoint(tmp_path / "killed" / CHECKPOINT)["model"]
    assert kept
    assert all(name.endswith((".alpha", ".beta")) for name in kept)
    (receipt,) = adapt(replace(killed, resume=True))
    assert receipt.notes["resumed"] == 1
    assert receipt.quality == load_receipt(tmp_path / "whole" / RECEIPT).quality
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize(("data", "kind"), [("walk.txt", "CausalLM"), ("rows.csv", "SequenceClassification")])
def test_merged_models_load_anywhere(models, files, tmp_path, data, kind):
    run = config(tmp_path / "run", models["gpt2"], files / data, epochs=1.0, lr=0.05)
    adapt(run)
    done = merge(MergeConfig(model=run.model, adapter=tmp_path / "run", out=tmp_path / "merged", device="cpu"))
    assert done.weights == 8
    assert done.difference < 1e-5 < done.largest
    tokens = torch.tensor([[5, 4, 3, 2], [2, 3, 4, 5]])
    auto = getattr(transformers, f"AutoModelFor{kind}")
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    adapted = text_model(run.model, () if kind == "CausalLM" else ("far", "near")).model.eval()
    load_adapter_(adapted, tmp_path / "run" / ADAPTER)
    adapted.config.pad_token_id = merged.config.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-5, rtol=1e-4)
    assert load_tokenizer(str(tmp_path / "merged"))("cat sat")["input_ids"]
    if kind != "CausalLM":
        assert merged.config.id2label == {0: "far", 1: "near"}
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("gpt2", ["rows.jsonl"], "column 'text'"),
        ("gpt2", ["walk.txt", "--length", "5000"], "--length"),
        ("gpt2", ["walk.txt", "--length", "100"], "positions"),
        ("gpt2", ["walk.txt", "--length", "16", "--method", "linear"], "linear"),
        ("gpt2", ["walk.txt", "--length", "16", "--shots", "3"], "--shots"),
        ("gpt2", ["absent.txt"], "absent"),
        ("gpt2", ["walk.txt", "--length", "16", "--where", "nowhere"], "nowhere"),
        ("gpt2", ["broken.jsonl"], "line 2"),
        ("gpt2", ["latin.txt"], "UTF-8"),
        ("bert", ["walk.txt"], "looks ahead"),
        ("mute", ["walk.txt"], "tokenizer"),
        ("half", ["walk.txt"], "safetensors"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(models, files, tmp_path, monkeypatch, capsys, model, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    for name, left_out in (("mute", "tokenizer"), ("half", "model.safetensors")):
        (tmp_path / name).mkdir()
        for file in models["gpt2"].iterdir():
            if left_out not in file.name:
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    before = set(tmp_path.rglob("*"))
    folder = models.get(model, tmp_path / model)
    data = next((found for root in (files, tmp_path) if (found := root / arguments[0]).exists()), arguments[0])
    assert main(["adapt", str(folder), str(data), *(arguments[1:] or ["--length", "16"]), *COMMON]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("scrimp: expected ")
    assert words in line
    assert set(tmp_path.rglob("*")) == before
