"""Denoising networks of diffusers behind one call: built by name, kept in diffusers' own folders.

A folder holds ``model_index.json``, ``unet/`` or ``transformer/`` (``config.json`` and
``diffusion_pytorch_model.safetensors``) and ``scheduler/``. diffusers opens the parts, and
``DDPMPipeline.from_pretrained`` the whole of a UNet without classes. Images are scaled to [-1, 1].
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scrimp.jobs.denoise_networks import build_denoiser, keep_labels_
from scrimp.primitives.errors import InputError, require
from scrimp.primitives.files import write_json

if TYPE_CHECKING:
    from scrimp.denoise.process import Process

__all__ = [
    "ATTENTIONS",
    "CLUSTERS",
    "INDEX",
    "Denoiser",
    "build_denoiser",
    "find_model",
    "load_denoiser",
    "new_denoiser",
    "routed",
    "save_denoiser",
]

INDEX = "model_index.json"
CLUSTERS = 16
"""Groups of queries of clustered attention."""
ATTENTIONS = ("softmax", "linear", "clustered")
_FOLDERS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
_PIPELINES = {"unet": "DDPMPipeline", "transformer": "DiTPipeline"}


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the process it undoes.

    Attributes:
        model: UNet2DModel or DiTTransformer2DModel.
        process: what noise it was trained on and what it predicts.
        scheduler: diffusers' scheduler of that process.
        shape: channels, height, width.
        classes: how many it knows; None: it takes no labels.
        null_label: the label that stands for none, for guidance; None: it has no such label.
        attention: what takes the place of its attention in `predict`, a name out of `ATTENTIONS`.
        names: of its classes; empty where nobody noted them.
    """

    model: nn.Module
    process: Process
    scheduler: Any
    shape: tuple[int, int, int]
    classes: int | None = None
    null_label: int | None = None
    attention: str = "softmax"
    names: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def predict(
        self, x: Tensor, timestep: Tensor | float, labels: Tensor | None = None, *, through: nn.Module | None = None
    ) -> Tensor:
        """What the network makes of noisy images.

        Args:
            x: [batch, channels, height, width].
            timestep: one for all or [batch], as `Process.timestep` gives.
            labels: int64 [batch]; None stands for no class.
            through: a wrapped form of the model to call instead, such as a replica's.

        Returns:
            Noise, velocity or clean image, as the process says; [batch, channels, height, width].

        Raises:
            InputError: labels for a network without classes, or none for one that needs them.
        """
        with routed(self.attention, self.model):
            return self._predict(x, timestep, labels, self.model if through is None else through)

    def _predict(self, x: Tensor, timestep: Tensor | float, labels: Tensor | None, model: nn.Module) -> Tensor:
        times = torch.as_tensor(timestep, device=x.device).expand(len(x))
        if isinstance(self.model, _transformer_class()):
            output = model(x, timestep=times, class_labels=self._labels(x, labels), return_dict=False)[0]
        elif self.classes is None:
            self._labels(x, labels)
            output = model(x, times, return_dict=False)[0]
        else:
            output = model(x, times, class_labels=self._labels(x, labels), return_dict=False)[0]
        return cast(Tensor, output)[:, : self.shape[0]]  # some predict a variance behind it

    def _labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if self.classes is None:
            if labels is not None:
                raise InputError("no labels for a model without classes", "some", "leave them out")
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)  # a transformer always takes one
        if labels is not None:
            return labels.to(x.device)
        if self.null_label is None:
            raise InputError("labels for a model that knows no label for none", "none", "pass one for each image")
        return torch.full((len(x),), self.null_label, device=x.device)


@contextmanager
def routed(attention: str, model: nn.Module) -> Iterator[None]:
    """Within it, the model's attention is the one named; of ``softmax`` it stays as it is.

    Raises:
        InputError: no such name, or a model without attention.
    """
    if attention == "softmax":
        yield
        return
    if attention not in ATTENTIONS:
        raise InputError(f"an attention out of: {', '.join(ATTENTIONS)}", attention, "correct it")
    if not any(type(module).__name__ == "Attention" for module in model.modules()):
        raise InputError(f"a model with attention, to make it {attention}", type(model).__name__, "take softmax")
    from scrimp import attend

    members = {"linear": attend.linear_attention, "clustered": partial(attend.clustered_attention, clusters=CLUSTERS)}
    with attend.attention(cast(Any, members[attention])):
        yield


def new_denoiser(
    name: str, shape: tuple[int, int, int], classes: int | None, prediction: str, *, seed: int
) -> Denoiser:
    """A fresh network with the process of ``prediction``, see `scrimp.denoise.process.new_scheduler`."""
    from scrimp.denoise.process import new_scheduler, process_of

    model = build_denoiser(name, shape, classes, seed=seed)
    scheduler = new_scheduler(prediction)
    return Denoiser(model, process_of(scheduler), scheduler, shape, classes, classes)


def save_denoiser(denoiser: Denoiser, folder: str | os.PathLike[str]) -> int:
    """Write the folder, whole or not at all; one that is there is replaced.

    Returns:
        Bytes of the weights' file.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _FOLDERS[type(denoiser.model).__name__]
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        cast(Any, denoiser.model).save_pretrained(beside / part, safe_serialization=True)
        _without_paths(beside / part / "config.json")
        denoiser.scheduler.save_pretrained(beside / "scheduler")
        write_json(beside / INDEX, _index(denoiser, part))
        for item in (beside, *beside.rglob("*")):
            os.chmod(item, 0o755 if item.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return sum(item.stat().st_size for item in (target / part).glob("*.safetensors"))


def load_denoiser(folder: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None) -> Denoiser:
    """A model from a folder as `save_denoiser` or diffusers writes it, in eval mode.

    Args:
        folder: the folder, or the run folder of ``scrimp denoise train``.
        adapter: file of `scrimp.adapt`, attached to the model.

    Raises:
        InputError: no such folder, parts missing or damaged, a network of another kind, or an adapter of another model.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = cast(Any, require("diffusers", "diffusers"))
    from scrimp.denoise.process import process_of

    root = find_model(folder)
    index = _read(root / INDEX)
    part, name = _network(index, root)
    model = _opened(lambda: getattr(diffusers, name).from_pretrained(root / part, local_files_only=True), root / part)
    kind = index.get("scheduler", [None, None])[1]
    if kind is None or not hasattr(diffusers, kind):
        raise InputError("a scheduler of diffusers in the folder", f"{kind} in {root / INDEX}", "pass another model")
    scheduler = _opened(lambda: getattr(diffusers, kind).from_pretrained(root / "scheduler"), root / "scheduler")
    keep_labels_(model)
    if adapter is not None:
        from scrimp.adapt import load_adapter_

        load_adapter_(model, adapter)
    shape, classes, null = _facts(model, index)
    own = index.get("_scrimp", {})
    names = tuple(str(name) for name in own.get("names", ()))
    return Denoiser(
        model.eval(), process_of(scheduler), scheduler, shape, classes, null, own.get("attention", "softmax"), names
    )


def find_model(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds ``model_index.json``: the one given, or ``model`` in it.

    Raises:
        InputError: neither does.
    """
    for root in (Path(folder), Path(folder) / "model"):
        if (root / INDEX).is_file():
            return root
    raise InputError(
        f"a model folder of diffusers, with {INDEX}", f"{folder} without one", "pass RUN/model of scrimp denoise train"
    )


def _transformer_class() -> type[nn.Module]:
    from diffusers import DiTTransformer2DModel

    return cast(type[nn.Module], DiTTransformer2DModel)


def _index(denoiser: Denoiser, part: str) -> dict[str, Any]:
    diffusers = cast(Any, require("diffusers", "diffusers"))
    index: dict[str, Any] = {"_class_name": _PIPELINES[part], "_diffusers_version": diffusers.__version__}
    own: dict[str, Any] = {"attention": denoiser.attention}
    if denoiser.classes is not None:
        own |= {"classes": denoiser.classes, "null_label": denoiser.null_label}
    if denoiser.names:
        own |= {"names": list(denoiser.names)}
    index["_scrimp"] = own
    scheduler = ["diffusers", type(denoiser.scheduler).__name__]
    return {**index, part: ["diffusers", type(denoiser.model).__name__], "scheduler": scheduler}


def _without_paths(file: Path) -> None:
    """diffusers notes where a model was loaded from: nothing a folder that is passed on should hold."""
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    write_json(file, config)


def _network(index: dict[str, Any], root: Path) -> tuple[str, str]:
    for part in ("unet", "transformer"):
        name = (index.get(part) or [None, None])[1]
        if _FOLDERS.get(name) == part:
            return part, name
    found = next((index[part][1] for part in ("unet", "transformer") if index.get(part)), "none")
    raise InputError(f"a network out of: {', '.join(_FOLDERS)}", f"{found} in {root / INDEX}", "pass another model")


def _facts(model: Any, index: dict[str, Any]) -> tuple[tuple[int, int, int], int | None, int | None]:
    """Shape, classes, label for none; of a foreign UNet with classes it is not known that it has such a label."""
    config = model.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    shape = (config.in_channels, height, width)
    noted = index.get("_scrimp", {})
    if "num_class_embeds" in config:
        return shape, noted.get("classes", config.num_class_embeds), noted.get("null_label")
    classes = None if config.num_embeds_ada_norm == 1 else config.num_embeds_ada_norm
    return shape, classes, classes


def _read(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], _opened(lambda: json.loads(file.read_text()), file))


def _opened(load: Callable[[], Any], place: Path) -> Any:
    try:
        return load()
    except Exception as error:  # diffusers and safetensors raise classes of many kinds
        got = f"{place} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise InputError("a whole part of a diffusers folder", got, "copy or train it again") from error
