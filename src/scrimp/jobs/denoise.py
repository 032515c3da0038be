"""`scrimp denoise train`: a diffusion model under a budget, or a few numbers that teach one something new."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scrimp.adapt import attach_, lora, nola_of_bytes
from scrimp.data import ImageData, load_images
from scrimp.data.named import BUILTIN, NAMED
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.denoise_models import Denoiser, load_denoiser, new_denoiser
from scrimp.jobs.denoise_train_plan import Costs, Plan, count_costs, make_plan
from scrimp.jobs.denoise_train_run import STORED_BITS, DenoiseRun, DenoiseSetup
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.folder import choose_folder, record_config
from scrimp.jobs.setup import default_name
from scrimp.primitives.errors import InputError, require
from scrimp.receipts import Receipt

if TYPE_CHECKING:
    from accelerate import Accelerator


def denoise_train(config: DenoiseTrainConfig, *, data: Any = None, accelerator: Accelerator | None = None) -> Receipt:
    """Train a denoiser under a budget; writes model/ (or adapter.safetensors), samples.png, configuration and receipt.

    Args:
        config: see `DenoiseTrainConfig`.
        data: anything `scrimp.data.load_images` takes; instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the data cannot be used, or the loss is no number any more.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
        MissingExtraError: diffusers is not installed.
    """
    config.check()
    require("diffusers", "diffusers")
    with accelerated(config, accelerator) as started:
        return _train(config, config.data if data is None else data, started)


def _train(config: DenoiseTrainConfig, source: Any, accelerator: Accelerator) -> Receipt:
    what = config.model.replace("/", "p") if config.start is None else f"{config.start.name}-{config.adapter}"
    name = default_name(f"denoise-{what}", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    start = None if config.start is None else load_denoiser(config.start)
    images = _load(config, source, start, accelerator)
    config = _fitted(config, images, accelerator)
    labelled = config.classes and config.adapter == "none" and len(images.classes) > 1
    denoiser = _denoiser(config, images, start, labelled=labelled)
    denoiser.model.to(accelerator.device)
    costs = count_costs(config, denoiser, labelled=labelled)
    wanted = {} if config.resume else _resolved(config, denoiser, costs, images, accelerator, labelled)
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    setup = DenoiseSetup(config, name, folder, images, accelerator, costs, Plan(**resolved["plan"]), labelled)
    return DenoiseRun(setup).receipt_of(denoiser)


def _resolved(
    config: DenoiseTrainConfig,
    denoiser: Denoiser,
    costs: Costs,
    images: ImageData,
    accelerator: Accelerator,
    labelled: bool,
) -> dict[str, Any]:
    plan = make_plan(config, denoiser, costs, accelerator=accelerator, images=len(images.train), labelled=labelled)
    return plan.record(config.batch_size)


def _load(config: DenoiseTrainConfig, data: Any, start: Denoiser | None, accelerator: Accelerator) -> ImageData:
    """The images, of the size and the channels of the model to start from."""
    size: int | tuple[int, int] | None = config.size
    if start is not None:
        if size is not None and (size, size) != start.shape[1:]:
            raise InputError(f"--size {start.shape[1]}, as the model has", f"{size}", "leave it out")
        size = start.shape[1:]
    folder = isinstance(data, (str, os.PathLike)) and data not in (BUILTIN, *NAMED)
    bare = folder and (config.adapter != "none" or not config.classes)
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        images = load_images(data, size=size, on_corrupt=config.on_corrupt, unlabelled=bare)
    if start is not None and images.train.shape != start.shape:
        got = "x".join(map(str, images.train.shape))
        raise InputError(f"images of {'x'.join(map(str, start.shape))} for this model", got, "pass others")
    return images


def _fitted(config: DenoiseTrainConfig, images: ImageData, accelerator: Accelerator) -> DenoiseTrainConfig:
    """With a batch size that the images can fill; of the few that an adapter is often given, all."""
    world, count = accelerator.num_processes, len(images.train)
    if config.adapter != "none" and config.batch_size > count >= world:
        config = replace(config, batch_size=count // world * world)
    if config.batch_size % world or config.batch_size > count:
        raise InputError(
            f"a batch size up to {count} that {world} process(es) share evenly",
            f"{config.batch_size}",
            "pass another --batch-size",
        )
    return config


def _denoiser(config: DenoiseTrainConfig, images: ImageData, start: Denoiser | None, *, labelled: bool) -> Denoiser:
    """A new one, or the one to start from, with its adapter."""
    if start is None:
        count, shape = len(images.classes) if labelled else None, images.train.shape
        new = new_denoiser(config.model, shape, count, config.part("prediction"), seed=config.seed)
        return replace(new, attention=config.attention, names=tuple(images.classes) if labelled else ())
    if labelled and start.classes != len(images.classes):
        raise InputError(
            f"images of {start.classes or 'no'} classes, as the model knows",
            f"{len(images.classes)}",
            "pass --no-classes, or --adapter nola to teach it a new one",
        )
    if not labelled and start.classes is not None and start.null_label is None:
        raise InputError("a model with a label for none", "one without", "train on images of its classes")
    if config.attention != "softmax":
        start = replace(start, attention=config.attention)
    if config.adapter == "nola":
        method = nola_of_bytes(
            start.model, config.adapter_bytes, bits=STORED_BITS["nola"], rank=config.rank, seed=config.seed
        )
        attach_(start.model, method)
    elif config.adapter == "lora":
        attach_(start.model, lora(config.rank, seed=config.seed))
    return start
