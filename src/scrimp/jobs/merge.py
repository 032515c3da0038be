"""`scrimp merge`: an adapter added to the weights of its model, checked, and written as an ordinary model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adapt import load_adapter_, merge_
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.adapt_models import bare, fit_for_, image_model, quiet, text_model
from scrimp.jobs.adapt_run import ADAPTER
from scrimp.jobs.adapt_text import load_tokenizer
from scrimp.jobs.device import pick_device
from scrimp.jobs.encoders import load_encoder
from scrimp.jobs.folder import CONFIG, read_yaml
from scrimp.jobs.merge_config import MergeConfig
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError, require
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights

TOLERANCE = 1e-4
"""Of the largest output: how far the merged model's may be from the adapted one's."""
_BATCH, _TOKENS = 2, 16
_SHOWN = 7  # key of the draw of the batch that is shown


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        path: file or folder.
        difference: largest of the outputs of a batch, merged and adapted.
        largest: output among them.
        weights: how many were changed.
    """

    path: Path
    difference: float
    largest: float
    weights: int


def merge(config: MergeConfig) -> Merged:
    """Merge an adapter and write the model: weights (.safetensors) of an image model, a folder of a transformers one.

    Raises:
        InputError: a model or an adapter that cannot be used or do not belong together, or outputs that differ.
    """
    path = config.adapter / ADAPTER if config.adapter.is_dir() else config.adapter
    facts = _facts(path)
    images = facts["kind"] == "images"
    out = config.out or path.parent / ("merged.safetensors" if images else "merged")
    _check_free(out, file=images)
    device = pick_device(config.device)
    model = (_image_model(config, facts) if images else _text_model(config, facts)).to(device).eval()
    shown = _batch(facts, model, config.seed).to(device)
    names = load_adapter_(bare(model), path)
    with torch.no_grad():
        before = model(shown)
        merge_(bare(model))
        after = model(shown)
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        got = f"outputs that differ by {difference:.3g} of {largest:.3g}"
        raise InputError("a merged model that answers as the adapted one", got, "keep the adapter beside its model")
    _write_weights(model, facts, out) if images else _write_folder(model, config.model, out)
    return Merged(out, difference, largest, len(names))


def _facts(adapter: Path) -> Mapping[str, Any]:
    """What the adapter's run says of its model."""
    if not adapter.is_file():
        raise InputError(
            f"a run folder of scrimp adapt with {ADAPTER}", f"{adapter}, which is absent", "check the path"
        )
    if not (adapter.parent / CONFIG).is_file():
        raise InputError(f"an adapter with its run's {CONFIG} beside", f"{adapter} alone", "pass its run folder")
    facts: Any = read_yaml(adapter.parent / CONFIG).get("resolved", {}).get("model")
    if not isinstance(facts, dict) or facts.get("kind") not in ("images", "causal", "classifier"):
        raise InputError("the run folder of scrimp adapt", f"{adapter.parent} of another job", "check the path")
    return facts


def _check_free(out: Path, *, file: bool) -> None:
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        raise InputError("a new file for --out" if file else "a new folder for --out", f"{out}", "pass another --out")


def _image_model(config: MergeConfig, facts: Mapping[str, Any]) -> nn.Module:
    encoder = load_encoder(
        config.model if config.weights is None else config.weights,
        model=None if config.weights is None else config.model,
        pretrained=config.pretrained,
        size=facts["size"],
        data=_stand_in(facts),
    )
    if encoder.name != facts["architecture"]:
        raise InputError(f"the adapted model, {facts['architecture']}", encoder.name, "name it as for scrimp adapt")
    return image_model(facts, encoder.model.state_dict())


def _stand_in(facts: Mapping[str, Any]) -> ImageData:
    """What a classifier's file is read by: images of the form that was adapted to."""
    one = TensorImages(torch.zeros(1, facts["channels"], facts["size"], facts["size"], dtype=torch.uint8), _zero())
    classes, mean, std = (tuple(facts[key]) for key in ("classes", "mean", "std"))
    return ImageData(train=one, test=one, classes=classes, name="", mean=mean, std=std)


def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _text_model(config: MergeConfig, facts: Mapping[str, Any]) -> nn.Module:
    model = text_model(config.model, tuple(facts["classes"]))
    if facts["kind"] == "classifier":
        fit_for_(model, length=_TOKENS, padding=load_tokenizer(config.model).pad_token_id)
    return model


def _batch(facts: Mapping[str, Any], model: nn.Module, seed: int) -> Tensor:
    """Noise, or tokens at random."""
    generator = generator_for(seed, _SHOWN)
    if facts["kind"] == "images":
        return torch.randn(_BATCH, facts["channels"], facts["size"], facts["size"], generator=generator)
    settings: Any = bare(model).config
    words = settings.get_text_config().vocab_size
    tokens = torch.randint(words, (_BATCH, _TOKENS), generator=generator)
    return tokens if facts["kind"] == "causal" else torch.stack([tokens, torch.ones_like(tokens)], 1)


def _write_weights(model: nn.Module, facts: Mapping[str, Any], out: Path) -> None:
    names = {"model": facts["architecture"], "classes": "\n".join(facts["classes"]), "format": "pt"}
    write_atomic(out, pack_weights({key: value.cpu() for key, value in model.state_dict().items()}, names))


def _write_folder(model: nn.Module, source: str, out: Path) -> None:
    """The model and its tokenizer as transformers writes them, moved into place once whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        saved: Any = bare(model)
        with quiet(require("transformers", "hf")):
            saved.save_pretrained(temporary)
        load_tokenizer(source).save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes private folders; results are ordinary ones
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
