"""`scrimp pixels sample`: images written pixel by pixel, or the lower halves of given ones."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from scrimp.data import ImageData, load_images
from scrimp.jobs.checkpoint import load_checkpoint, save_checkpoint
from scrimp.jobs.engine import accelerated
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, WEIGHTS, choose_folder, plain, read_yaml, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.models import load_weights_
from scrimp.jobs.pixels_config import PixelsSampleConfig
from scrimp.jobs.pixels_generate import SAMPLES, draws, generate, save_grid, steps_flops
from scrimp.jobs.pixels_model import PixelTransformer, as_sequence
from scrimp.jobs.pixels_step import make_decoder
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.meter.device import synchronise
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator

JOB = "pixelstrain"
"""What a run folder calls the job whose model can be sampled."""


def pixels_sample(config: PixelsSampleConfig, *, data: Any = None) -> Receipt:
    """Generate images with a trained model; writes samples.png, configuration and receipt to the run folder.

    Args:
        config: see `PixelsSampleConfig`.
        data: anything `scrimp.data.load_images` takes, whose test images are to be completed; instead of
            ``config.complete``.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: ``config.run`` is no run of `scrimp pixels train`, or a setting or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config) as accelerator:
        return _sample(config, data, accelerator)


def _sample(config: PixelsSampleConfig, data: Any, accelerator: Accelerator) -> Receipt:
    if accelerator.num_processes > 1:
        raise InputError("one process", f"{accelerator.num_processes}", "start it without torchrun")
    model = load_model(config.run).to(accelerator.device)
    given = config.complete if data is None else data
    originals = None if given is None else _originals(given, model.shape, config)
    folder = choose_folder(config.out, f"pixels-sample-{config.run.resolve().name}", resume=config.resume)
    record_config(folder, config, {})
    if config.resume and (folder / RECEIPT).is_file():
        return load_receipt(folder / RECEIPT)
    sampling = _Sampling(config, model, originals, folder / CHECKPOINT)
    with ResidentPeak() as peak, EnergyWindow() as energy:
        images = sampling.run()
    _save_picture(images, originals, folder / SAMPLES)
    if not config.json:
        console.print(f"samples: {folder / SAMPLES}", soft_wrap=True)
    receipt = sampling.receipt(peak.reading, energy.reading)
    save_receipt(receipt, folder / RECEIPT)
    sampling.checkpoint.unlink(missing_ok=True)
    return receipt


def load_model(run: Path) -> PixelTransformer:
    """The model in a run folder, in eval mode.

    Raises:
        InputError: the folder is none of `scrimp pixels train`, is not finished, or is damaged.
    """
    remedy = "pass a folder that scrimp pixels train wrote"
    if not (run / CONFIG).is_file():
        raise InputError("a run folder of scrimp pixels train", f"{run} without {CONFIG}", remedy)
    content = read_yaml(run / CONFIG)
    if content.get("job") != JOB:
        raise InputError("a run of scrimp pixels train", f"one of another job in {run}", remedy)
    if not (run / WEIGHTS).is_file():
        raise InputError("a finished run", f"{run} without {WEIGHTS}", "finish it with --resume")
    try:
        settings, shape = content["config"], content["resolved"]["shape"]
        model = build_model(settings, tuple(shape))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("a whole configuration", f"{run / CONFIG} ({error!r})", remedy) from error
    if load_weights_(model, run / WEIGHTS):
        raise InputError("weights of this configuration", f"others in {run}", remedy)
    return model.eval()


def build_model(settings: dict[str, Any], shape: tuple[int, ...], *, seed: int = 0) -> PixelTransformer:
    """A fresh model of these settings, its weights fixed by ``seed``."""
    names = ("attention", "output", "layers", "heads", "head_dim")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return PixelTransformer(cast(tuple[int, int, int], shape), **{name: settings[name] for name in names})


@dataclass
class _Done:
    """How far the job is; ``images``: those finished, a tensor a batch."""

    images: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumes: int = 0


class _Sampling:
    """Images batch by batch; interrupted, it goes on with the batch that was not finished."""

    def __init__(
        self, config: PixelsSampleConfig, model: PixelTransformer, originals: Tensor | None, checkpoint: Path
    ) -> None:
        self.config, self.model, self.checkpoint = config, model, checkpoint
        half = model.shape[1] // 2 * model.shape[2] * model.shape[0]
        self.known = None if originals is None else as_sequence(originals)[:, :half]
        self.given = 0 if self.known is None else half
        self.done = _Done()

    def run(self) -> Tensor:
        """All images, uint8 [count, channels, height, width]."""
        if self.config.resume and self.checkpoint.is_file():
            self.done = _Done(**load_checkpoint(self.checkpoint))
            self.done.resumes += 1
        finished = sum(map(len, self.done.images))
        with progress_bar(shown=not self.config.json) as progress, stop_requests() as stop:
            bar = add_bar(progress, "pixels", total=self.config.count * (self.model.tokens - self.given))

            def after_pixel() -> None:
                progress.advance(bar, rows)
                if stop():
                    save_checkpoint(self.checkpoint, vars(self.done))
                    raise Interrupted

            for first in range(finished, self.config.count, self.config.batch):
                rows = min(self.config.batch, self.config.count - first)
                progress.update(bar, completed=first * (self.model.tokens - self.given), figures=self._figures())
                self._batch(first, rows, after_pixel)
                save_checkpoint(self.checkpoint, vars(self.done))
        return torch.cat(self.done.images)

    def _batch(self, first: int, rows: int, after_pixel: Any) -> None:
        device = self.model.head.weight.device
        numbers = range(first, first + rows)
        uniforms = draws(numbers, self.model.tokens, seed=self.config.seed).to(device)
        known = None if self.known is None else self.known[first : first + rows].to(device)
        begin, cpu = time.perf_counter(), time.process_time()
        decoder = make_decoder(self.model, rows, cache=self.config.cache, weights=self.config.weights)
        images = generate(decoder, uniforms, known=known, temperature=self.config.temperature, each=after_pixel)
        synchronise()
        self.done.seconds += time.perf_counter() - begin
        self.done.cpu_seconds += time.process_time() - cpu
        self.done.images.append(images.cpu())

    def _figures(self) -> str:
        finished = sum(map(len, self.done.images))
        return f"{finished / self.done.seconds:.3g} images/s" if finished else ""

    def receipt(self, peak: Reading, energy: Reading) -> Receipt:
        count, seconds, config = self.config.count, self.done.seconds, self.config
        pixels = count * (self.model.tokens - self.given)
        kept = {"linear": "state", "softmax": "key-value cache"}[self.model.attention]
        return Receipt(
            kind="run",
            name=f"pixels-sample-{config.run.resolve().name}",
            way=f"{self.model.attention}, {'no cache' if config.cache == 'none' else kept}",
            seed=config.seed,
            quality={"images_a_second": count / seconds, "seconds_a_token": seconds / pixels},
            cost=Cost(
                seconds=Reading(seconds, "wall clock: all pixels, laying out the weights included"),
                cpu_seconds=Reading(self.done.cpu_seconds, "process CPU time: the same"),
                flops=self._flops(),
                peak_bytes=peak,
                joules=energy,
                samples=Reading(float(count), "images generated"),
            ),
            config=plain(config),
            notes={
                "shape": list(self.model.shape),
                "pixels given": self.given,
                "batch": min(config.batch, count),
                "device": str(self.model.head.weight.device),
                "resumed": self.done.resumes,
            },
        )

    def _flops(self) -> Reading:
        if self.config.cache == "none":
            return Reading(how="not counted: another number for each pixel")
        steps = steps_flops(make_decoder(self.model, 1), given=self.given)
        if steps.value is None or self.known is None:
            return Reading(None if steps.value is None else steps.value * self.config.count, steps.how, steps.missed)
        return Reading(steps.value * self.config.count, f"{steps.how}; the given pixels' left out", steps.missed)


def _originals(data: Any, shape: tuple[int, int, int], config: PixelsSampleConfig) -> Tensor:
    """``config.count`` test images, drawn by the seed; uint8."""
    channels, *side = shape
    images: ImageData = load_images(data, size=(side[0], side[1]))
    if images.test.shape != shape:
        raise InputError(f"images of {channels} channel(s)", f"{images.test.shape[0]}", "pass data like the model's")
    if len(images.test) < config.count:
        raise InputError(f"--count of at most {len(images.test)}, the test images", f"{config.count}", "lower it")
    order = torch.randperm(len(images.test), generator=generator_for(config.seed))
    return images.test.batch(order[: config.count])


def _save_picture(images: Tensor, originals: Tensor | None, path: Path) -> None:
    if originals is None:
        save_grid(images, path)
        return
    given = originals.clone()
    given[:, :, given.shape[2] // 2 :] = 128
    rows = torch.stack([given, images, originals], 1).flatten(0, 1)  # what was given, what was made of it, the truth
    save_grid(rows, path, columns=3 * math.ceil(math.sqrt(len(images) / 3)))
