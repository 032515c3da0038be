"""Features of everything `scrimp label` looks at, made once and kept in a file that says what made them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.data import Images
from scrimp.jobs.distill_teachers import data_fingerprint
from scrimp.jobs.encoders import Encoder, as_encoder_takes, features_of
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.label_config import PIXELS, LabelConfig
from scrimp.jobs.label_data import LabelPool
from scrimp.jobs.teacher_cache import TeacherCache
from scrimp.meter import Reading, count_flops
from scrimp.represent.knn import unit_rows

_BLOCK = 2048  # images between two times that what is finished is made to count
_COUNTED = 8  # images of the batch whose FLOPs are counted


@dataclass(frozen=True, eq=False)
class Features:
    """What was made, and what that cost.

    Attributes:
        pool: [n, dim], float32, of unit length.
        test: [m, dim], or ``None``.
        seconds, cpu_seconds: spent on them, by whichever run did; the test images' part left out.
        flops: of the encoder on all images of the pool.
        reused: whether an earlier run had made them all.
    """

    pool: Tensor
    test: Tensor | None
    seconds: float
    cpu_seconds: float
    flops: Reading
    reused: bool


def make_features(
    config: LabelConfig,
    pool: LabelPool,
    encoder: Encoder,
    *,
    folder: Path,
    device: str,
    stop: Callable[[], bool],
    report: Callable[[int, int], None],
    begun: Callable[[], None],
) -> Features:
    """Encode what no earlier run did.

    Args:
        folder: where they are kept, unless ``config.cache_folder`` says another.
        report: told images done and images in all.
        begun: called once encoder and images are known to go together, before anything is written.

    Raises:
        InputError: encoder and images do not go together, or the file is damaged.
        Interrupted: a stop was asked for; whole blocks are kept.
    """
    encoder.model.to(device)
    flops = _flops(encoder, pool.data.train, len(pool), device)
    begun()
    parts = [pool.data.train, *([pool.data.test] if pool.labelled else [])]
    about = _about(config, encoder, parts)
    key = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    path = (config.cache_folder or folder) / f"features-{key}.npy"
    total = sum(map(len, parts))
    cache = TeacherCache((1, total, encoder.dim), "float32", path=path, about=about)
    reused = cache.finished == total

    def encode(rows: Tensor, images: Images, start: int) -> Tensor:
        def tell(done: int, _: int) -> None:
            if stop():
                raise Interrupted
            report(start + done, total)

        options: dict[str, Any] = {"size": encoder.size, "batch_size": config.batch_size, "progress": tell}
        return features_of(encoder, images.take(rows), device=device, **options)

    _fill(cache, parts, encode)
    found = unit_rows(cache.read(0, torch.arange(total)))
    return Features(
        found[: len(pool)],
        found[len(pool) :] if pool.labelled else None,
        cache.seconds * len(pool) / total,
        cache.cpu_seconds * len(pool) / total,
        flops,
        reused,
    )


def _fill(cache: TeacherCache, parts: list[Images], encode: Callable[[Tensor, Images, int], Tensor]) -> None:
    """Block by block, from where the last run was stopped."""
    before = 0
    for images in parts:
        done = min(max(0, cache.finished - before), len(images))
        for start in range(done, len(images), _BLOCK):
            rows = torch.arange(start, min(start + _BLOCK, len(images)))
            clock, cpu = time.perf_counter(), time.process_time()
            cache.append_(encode(rows, images, before + start))
            cache.seconds += time.perf_counter() - clock
            cache.cpu_seconds += time.process_time() - cpu
            cache.save_()
        before += len(images)


def _about(config: LabelConfig, encoder: Encoder, parts: list[Images]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, value in sorted(encoder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "encoder": encoder.name,
        "weights": digest.hexdigest(),
        "size": encoder.size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "data": [data_fingerprint(images) for images in parts],
    }


def _flops(encoder: Encoder, images: Images, count: int, device: str) -> Reading:
    """Of the forward passes, which also shows that encoder and images go together, before anything is written."""
    few = images.take(torch.arange(min(_COUNTED, len(images))))
    features_of(encoder, few, device=device, size=encoder.size)
    if encoder.name == PIXELS:
        return Reading(0.0, "no network: the images themselves, shrunk")
    batch = few.batch(torch.arange(len(few))).to(device)
    ready = as_encoder_takes(batch, mean=encoder.mean, std=encoder.std, size=encoder.size)
    with torch.no_grad():
        counted = count_flops(lambda: encoder.model(ready))
    how = "counted for the encoder's forward pass, times the images; selection and classifier left out"
    value = None if counted.value is None else counted.value / len(few) * count
    return Reading(value, how, counted.missed)
