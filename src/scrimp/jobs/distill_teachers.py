"""Frozen teachers: from views of images to features of unit length, on one process or shared out over several."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.data import ImageData, standardise
from scrimp.data.images import Images, TensorImages
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.encoders import Encoder, load_encoder
from scrimp.meter import Reading, count_flops
from scrimp.primitives.errors import InputError
from scrimp.represent.knn import unit_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

_SAMPLE = 256  # images of a set too large for memory that stand for all of it


class Teacher:
    """A frozen encoder that takes the student's view as it is and brings it to its own size, channels and scale.

    Args:
        encoder: copied, so that the caller's stays where it is.
        device: where to compute.
    """

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self.encoder = encoder
        model = copy.deepcopy(encoder.model).eval().requires_grad_(False)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, views: Tensor, *, autocast: Callable[[], Any]) -> Tensor:
        """Views, floats [n, C, H, W] in 0 to 1 -> features [n, dim] of unit length, float32, without gradient."""
        with torch.no_grad():
            shown = self.ready(views)
            with autocast():
                found = self.model(shown)
            return unit_rows(found)

    def ready(self, views: Tensor) -> Tensor:
        """The views as the encoder takes them: its size (bilinear, antialiased), its channels, its mean and std."""
        facts = self.encoder
        if views.shape[1] == 1 and facts.channels > 1:
            views = views.expand(-1, facts.channels, -1, -1)
        if views.shape[2:] != (facts.size, facts.size):
            views = functional.interpolate(views, (facts.size, facts.size), mode="bilinear", antialias=True)
        return standardise(views, facts.mean, facts.std)

    def cost(self, shape: tuple[int, int, int], device: torch.device) -> Reading:
        """Counted FLOPs of one image's forward pass; ``shape``: channels, height and width of a view.

        Raises:
            InputError: an encoder that gives no features [n, dim] as wide as it says, or that cannot be counted.
        """
        shown = self.ready(torch.zeros(2, *shape, device=device))
        found: list[Tensor] = []
        with torch.no_grad():
            counted = count_flops(lambda: found.append(self.model(shown)))
        if list(found[0].shape) != [2, self.encoder.dim]:
            wanted = f"a teacher that gives features [n, {self.encoder.dim}]"
            raise InputError(wanted, f"{list(found[0].shape)} for 2 images", "choose another --teacher")
        if counted.value is None:
            raise InputError("a teacher whose FLOPs can be counted", self.encoder.name, "choose another --teacher")
        return Reading(counted.value / 2, counted.how, counted.missed)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and of how images are shown to them."""
        facts = self.encoder
        digest = hashlib.sha256(repr((facts.size, facts.channels, tuple(facts.mean), tuple(facts.std))).encode())
        digest.update(type(self.model).__qualname__.encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_teachers(config: DistillConfig, data: ImageData, encoders: Sequence[Encoder] | None) -> list[Encoder]:
    """The teachers given, or those the configuration names; none where the student learns from labels alone.

    Raises:
        InputError: none, one that cannot be loaded, or one that takes other channels than the images have.
    """
    if config.method == "scratch":
        return []
    if encoders is None:
        encoders = [_loaded(source, config, data) for source in config.teacher]
    if not encoders:
        raise InputError("a teacher", "none", "pass --teacher PATH or --teacher NAME --teacher-pretrained")
    channels = data.train.shape[0]
    for encoder in encoders:
        if encoder.channels != channels and channels != 1:
            got = f"{encoder.name}, which takes {encoder.channels}"
            raise InputError(f"a teacher of images with {channels} channels", got, "choose another --teacher")
    return list(encoders)


def _loaded(source: str, config: DistillConfig, data: ImageData) -> Encoder:
    path = Path(source).expanduser()
    fetched = config.teacher_pretrained and not path.exists()
    return load_encoder(source, model=config.teacher_model if path.is_file() else None, pretrained=fetched, data=data)


def data_fingerprint(images: Images) -> str:
    """SHA-256 of a set: of every pixel where it is in memory, else of some images and of the names of all."""
    everything = isinstance(images, TensorImages)
    count = len(images) if everything else min(len(images), _SAMPLE)
    digest = hashlib.sha256(repr((len(images), tuple(images.shape))).encode())
    for rows in (torch.arange(count) * len(images) // count).split(_SAMPLE):
        digest.update(images.batch(rows).contiguous().numpy().data)
    for path in getattr(images, "paths", ()):
        digest.update("/".join(str(path).split("/")[-2:]).encode())
    return digest.hexdigest()


def shared_out(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of a block that this process works on: as many on every process, some twice where they do not divide."""
    world, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(rows) // world)
    return rows[(torch.arange(share) * world + rank) % len(rows)]


def put_together(found: Tensor, count: int, accelerator: Accelerator) -> Tensor:
    """What every process found for the ``count`` rows that `shared_out` dealt, in their order; on every process."""
    every = cast(Tensor, accelerator.gather(found))
    return every.view(accelerator.num_processes, len(found), -1).transpose(0, 1).flatten(0, 1)[:count]
