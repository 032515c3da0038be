"""The models that `scrimp adapt` and `scrimp merge` start from: how each is made anew, and what is its classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.jobs.encoders import Encoder
from scrimp.jobs.models import create_model
from scrimp.primitives.errors import InputError, require

_TEXT_HEADS = ("score", "classifier", "classification_head", "pre_classifier", "logits_proj", "sequence_summary")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to adapt.

    Attributes:
        name: what receipts call it.
        build: makes it anew: frozen weights as they were, the classifier fixed by the seed.
        facts: what `scrimp merge` needs to make it again, as YAML keeps it.
        encoder: of an image model, the same without classifier.
    """

    name: str
    build: Callable[[int], nn.Module]
    facts: dict[str, Any]
    encoder: Encoder | None = None

    @property
    def continues(self) -> bool:
        """Whether it continues text, instead of telling classes apart."""
        return self.facts["kind"] == "causal"


class TextModel(nn.Module):
    """A transformers model as tokens -> logits; the model itself is ``model``.

    Args:
        model: causal, or a classifier of sequences.
        head: parameters of its new classifier.
    """

    def __init__(self, model: nn.Module, head: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length + 1] -> next-token logits [n, length, words]; tokens and mask [n, 2, length] -> [n, classes]."""
        if tokens.ndim == 2:
            return self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return self.model(input_ids=tokens[:, 0], attention_mask=tokens[:, 1]).logits


def bare(model: nn.Module) -> nn.Module:
    """The model as other programs know it, which adapters are attached to."""
    return model.model if isinstance(model, TextModel) else model  # type: ignore[return-value]


def head_of(model: nn.Module) -> str | None:
    """Regular expression of the classifier's parameters in `bare`; ``None`` where there is none."""
    if isinstance(model, TextModel):
        return "^(" + "|".join(map(re.escape, model.head)) + ")$" if model.head else None
    named = getattr(model, "default_cfg", {}).get("classifier", ("head", "fc"))
    return "^(" + "|".join(re.escape(name) for name in ([named] if isinstance(named, str) else named)) + r")\."


def image_subject(encoder: Encoder, classes: tuple[str, ...]) -> Subject:
    """A classifier of these classes on an encoder.

    Raises:
        InputError: one that is no timm or built-in architecture.
    """
    facts = {
        "kind": "images",
        "architecture": encoder.name,
        "channels": encoder.channels,
        "size": encoder.size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "classes": list(classes),
    }
    state = encoder.model.state_dict()
    return Subject(
        name=encoder.name, build=lambda seed: image_model(facts, state, seed=seed), facts=facts, encoder=encoder
    )


def image_model(facts: Mapping[str, Any], state: Mapping[str, Tensor], *, seed: int = 0) -> nn.Module:
    """The classifier that ``facts`` describe with an encoder's weights; the classifier on top is fresh.

    Raises:
        InputError: weights that are missing or of another shape.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = create_model(
            facts["architecture"], classes=len(facts["classes"]), channels=facts["channels"], size=facts["size"]
        )
    own, head = model.state_dict(), re.compile(head_of(model) or "$^")
    wanted = {key: value for key, value in own.items() if not head.search(key)}
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        got = f"other ones: {wrong[0]} and {len(wrong) - 1} more differ"
        raise InputError(f"weights of {facts['architecture']}", got, "pass the model that was meant")
    model.load_state_dict({key: state[key] for key in wanted}, strict=False)
    return model


def text_subject(source: str, classes: tuple[str, ...]) -> Subject:
    """A transformers model in a folder, or of a hub name; a classifier of these classes where there are any."""
    facts = {"kind": "classifier" if classes else "causal", "classes": list(classes)}
    name = Path(source).expanduser().resolve().name if Path(source).expanduser().is_dir() else source
    return Subject(name=name, build=lambda seed: text_model(source, classes, seed=seed), facts=facts)


def text_model(source: str, classes: tuple[str, ...], *, seed: int = 0) -> TextModel:
    """Load it in float32, from safetensors only; what its classifier lacks is fixed by the seed.

    Raises:
        InputError: no such model, or weights missing.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    folder = Path(source).expanduser()
    local = folder.is_dir()
    options: dict[str, Any] = {"local_files_only": local, "use_safetensors": True, "output_loading_info": True}
    kind = transformers.AutoModelForCausalLM
    if classes:
        kind = transformers.AutoModelForSequenceClassification
        names = dict(enumerate(classes))
        options |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        options |= {"ignore_mismatched_sizes": True}
    try:
        with torch.random.fork_rng([]), quiet(transformers):
            torch.manual_seed(seed)
            model, report = kind.from_pretrained(str(folder) if local else source, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        got = f"{source} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        wanted = "a transformers language model in safetensors"
        raise InputError(wanted, got, "check the folder, or save the model again") from error
    head = _head_names(model, report) if classes else ()
    _refuse_lost(source, [key for key in report["missing_keys"] if key not in head])
    found = TextModel(model.float(), head)
    if not classes:
        _refuse_looking_ahead(source, found)
    return found


def fit_for_(model: nn.Module, *, length: int, padding: int) -> None:
    """Tell a classifier of sequences which token fills them up, and see that the model takes so many tokens.

    Raises:
        InputError: it does not.
    """
    settings: Any = bare(model).config
    most = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(f"at most the model's {most} positions", f"--length {length}", "pass a shorter --length")
    if getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = padding


def _head_names(model: nn.Module, report: dict[str, Any]) -> tuple[str, ...]:
    """Parameters on top of the pretrained part: the classifier's, and what the file lacks of a pooling before it."""
    fresh = {*report["missing_keys"], *(item[0] for item in report["mismatched_keys"])}
    named = {name for name, _ in model.named_parameters() if name.split(".")[0] in _TEXT_HEADS}
    return tuple(sorted(named | {name for name in fresh if "pooler" in name}))


def _refuse_lost(source: str, lost: list[str]) -> None:
    if lost:
        got = f"{source} without {sorted(lost)[0]} and {len(lost) - 1} more"
        raise InputError("all weights of the model", got, "save it again")


def _refuse_looking_ahead(source: str, model: TextModel) -> None:
    """A model of masked words, run as if it were causal, would see what it is to predict."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 4]])
    with torch.no_grad():
        first = model.eval()(tokens)[:, :2]
    if not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-4):
        got = f"{source}, which looks ahead"
        raise InputError("a causal language model for text to be continued", got, "choose another MODEL")


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars, and its table of freshly drawn weights: they are meant."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
