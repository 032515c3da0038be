"""The model under the knife: how it is called, and what its outputs mean as rows to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scrimp.attend.reroute import attention
from scrimp.jobs.swap_settings import Setting
from scrimp.primitives.errors import InputError

NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """What one pass is given: positional or named tensors, and labels [batch] where they are known."""

    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    labels: Tensor | None = None

    def to(self, device: str) -> Batch:
        inputs: tuple[Tensor, ...] | dict[str, Tensor]
        if isinstance(self.inputs, dict):
            inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        else:
            inputs = tuple(tensor.to(device) for tensor in self.inputs)
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class Subject:
    """A model with what a job must know of it.

    Attributes:
        name: what receipts call it.
        gives: classes [batch, classes], tokens [batch, tokens, vocabulary] (a causal language model, its own text
            being the labels), or features, pooled over tokens.
        layers: regular expression of the layers to swap; ``None`` for all.
        native: side in pixels or tokens the model was made for, where known.
        mean, std: of the pixels the model was trained on, where known.
        channels: of its images, where known.
        classes: how many it tells apart, where known; labels of data with another number are not its own.
        main_input: the name its images are passed by; ``None`` for by place.
        tokenizer: of a text model.
        options: further keywords of every call.
    """

    model: nn.Module
    name: str
    gives: Literal["classes", "tokens", "features"] = "classes"
    layers: str | None = None
    native: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    classes: int | None = None
    main_input: str | None = None
    tokenizer: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, batch: Batch) -> Any:
        """The model's own output."""
        if isinstance(batch.inputs, dict):
            return self.model(**batch.inputs, **self.options)
        return self.model(*batch.inputs, **self.options)

    def swapped(self, batch: Batch, setting: Setting, seed: int) -> Any:
        """The output with another attention.

        Raises:
            InputError: the attention cannot honour what the model asks, or nothing was swapped.
        """
        # Hooks on every module take time: only where layers are to be told apart.
        model = None if self.layers is None else self.model
        with attention(setting.function(seed), model=model, where=self.layers):
            return self.run(batch)

    def rows(self, output: Any, batch: Batch) -> Tensor:
        """[rows, classes or dim] of an output."""
        tensor = _tensor_of(output)
        if self.gives == "tokens":
            return tensor[:, :-1].flatten(0, 1)  # the last place predicts what is not there
        if tensor.dim() <= 2:
            return tensor
        if self.gives == "classes":
            return tensor.flatten(0, -2)
        return _pooled(tensor, batch)

    def labels(self, batch: Batch) -> Tensor | None:
        """[rows]: the labels of `rows`."""
        if self.gives == "tokens" and isinstance(batch.inputs, dict) and "input_ids" in batch.inputs:
            following = batch.inputs["input_ids"][:, 1:]
            if "attention_mask" in batch.inputs:
                following = following.masked_fill(batch.inputs["attention_mask"][:, 1:] == 0, NO_LABEL)
            return following.flatten()
        return None if self.gives == "features" or batch.labels is None else batch.labels.flatten()


def subject_of(model: nn.Module, name: str, *, layers: str | None) -> Subject:
    """A model that somebody built: what it gives is read from its class, as transformers names them."""
    kind = type(model).__name__
    causal = kind.endswith(("ForCausalLM", "LMHeadModel"))
    headless = hasattr(model, "config") and hasattr(model.config, "model_type") and "For" not in kind and not causal
    gives: Literal["classes", "tokens", "features"] = "tokens" if causal else "features" if headless else "classes"
    return Subject(model, name, gives=gives, layers=layers)


def batches_of(data: Any) -> list[Batch]:
    """What a person hands over as batches: tensors, (inputs, labels) pairs, or mappings with perhaps ``labels``.

    Raises:
        InputError: something else, or nothing.
    """
    found = [_batch_of(item) for item in data]
    if not found:
        raise InputError("one batch or more", "none", "pass a list of batches")
    return found


def _batch_of(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        return Batch({key: value for key, value in item.items() if key != "labels"}, item.get("labels"))
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, labels = item
        return replace(_batch_of(inputs), labels=labels)
    raise InputError("batches as tensors, (inputs, labels) or mappings", type(item).__name__, "collate them so")


def _tensor_of(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise InputError("a model that returns a tensor or logits", type(output).__name__, "wrap the model")
    return found


def _pooled(tensor: Tensor, batch: Batch) -> Tensor:
    """[batch, tokens, dim] -> [batch, dim]: the mean over tokens that exist."""
    tensor = tensor.flatten(1, -2)
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if mask is None or mask.shape != tensor.shape[:2]:
        return tensor.mean(1)
    weights = mask.to(tensor.dtype)[..., None]
    return (tensor * weights).sum(1) / weights.sum(1).clamp(min=1)
