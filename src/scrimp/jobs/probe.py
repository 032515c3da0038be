"""`scrimp probe`: what an encoder's features are worth to nearest neighbours and to linear classifiers."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from scrimp.data import ImageData, Images, load_images
from scrimp.jobs.device import pick_device
from scrimp.jobs.encoders import Encoder, as_encoder_takes, features_of, load_encoder
from scrimp.jobs.folder import RECEIPT, REPORT, WEIGHTS, choose_folder, plain, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.probe_config import ProbeConfig
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report
from scrimp.represent.knn import knn_accuracies
from scrimp.represent.linear import few_label_rows, linear_accuracy

NEIGHBOURS: dict[int, float | None] = {1: None, 20: None, 200: 0.1}
"""Numbers of neighbours, and the temperature of their votes; one vote each where there is none."""
FEW_LABELS = {"1pct": 0.01, "10pct": 0.1}
"""Shares of the labels that linear classifiers are given."""
_COUNTED = 8  # images of the batch whose FLOPs are counted


def probe(config: ProbeConfig, *, data: Any = None, encoder: Encoder | None = None) -> Receipt:
    """Measure an encoder's features; writes configuration, receipt and report.html to the run folder.

    Args:
        config: see `ProbeConfig`.
        data: anything `scrimp.data.load_images` takes, such as a pair of data sets; instead of ``config.data``.
        encoder: a ready encoder instead of the one that ``config.weights`` names (which then only names it); its model
            is moved to the device.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: encoder, data or configuration cannot be used.
        Interrupted: SIGINT or SIGTERM came; begin again with ``resume=True``.
    """
    config.check()
    device = pick_device(config.device)
    name = default_name("probe", config.data if data is None else data)
    folder = choose_folder(config.out, name, resume=config.resume)
    if config.resume:
        record_config(folder, config, {})  # the interrupted run's, or refused
        if (folder / RECEIPT).is_file():
            return load_receipt(folder / RECEIPT)
    encoder, images = _load(config, data, encoder)
    encoder.model.to(device)
    flops = _flops_per_image(encoder, images, device)
    if not config.resume:
        record_config(folder, config, {})  # nothing is written before all is known to work
    with stop_requests() as stop, progress_bar(shown=not config.json) as progress:
        run = _Run(config, encoder, images, device, stop, progress)
        with ResidentPeak() as peak, EnergyWindow() as energy:
            clock, cpu = time.perf_counter(), time.process_time()
            run.measure()
            spent = (time.perf_counter() - clock, time.process_time() - cpu)
    cost = _cost(run, spent, flops, peak.reading, energy.reading)
    receipt = _receipt(run, name, cost)
    write_report([receipt], folder / REPORT)
    save_receipt(receipt, folder / RECEIPT)
    return receipt


def _load(config: ProbeConfig, data: Any, encoder: Encoder | None) -> tuple[Encoder, ImageData]:
    """The encoder, and the images at its size: some encoders say it, others take it from the images."""

    @functools.cache
    def load(size: int | None) -> ImageData:
        return load_images(config.data if data is None else data, size=size, on_corrupt=config.on_corrupt)

    if encoder is None:
        encoder = load_encoder(
            config.weights,
            model=config.model,
            pretrained=config.pretrained,
            size=config.size,
            data=lambda: load(config.size),
        )
    elif config.size not in (None, encoder.size):
        raise InputError(f"images of the ready encoder's {encoder.size} pixels", f"{config.size}", "leave size out")
    usual = load(config.size) if load.cache_info().currsize else None
    if usual is not None and usual.train.shape[1:] == (encoder.size, encoder.size):
        return encoder, usual
    return encoder, load(encoder.size)


def _flops_per_image(encoder: Encoder, images: ImageData, device: str) -> Reading:
    """Of the forward pass, which also shows that encoder and images go together.

    Raises:
        InputError: they do not.
    """
    rows = torch.arange(min(_COUNTED, len(images.train)))
    batch = images.train.batch(rows).to(device)
    ready = as_encoder_takes(batch, mean=encoder.mean, std=encoder.std, size=encoder.size)
    few = images.train.take(rows)
    features_of(encoder, few, device=device, size=encoder.size)
    with torch.no_grad():
        counted = count_flops(lambda: encoder.model(ready))
    return Reading(None if counted.value is None else counted.value / len(rows), counted.how, counted.missed)


@dataclass
class _Run:
    """One probing, part by part."""

    config: ProbeConfig
    encoder: Encoder
    images: ImageData
    device: str
    stop: Callable[[], bool]
    progress: Progress
    quality: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self) -> None:
        """Fill ``quality``, ``notes`` and ``seconds``.

        Raises:
            Interrupted: a stop was asked for.
        """
        train = self._timed("training images encoded", lambda: self._encode(self.images.train, "training images"))
        test = self._timed("test images encoded", lambda: self._encode(self.images.test, "test images"))
        self._timed("neighbours", lambda: self._neighbours(train, test))
        bar = add_bar(self.progress, "linear classifiers", total=1 + len(FEW_LABELS) * self.config.draws)
        everything = torch.arange(len(train))
        self.quality["linear_accuracy"] = self._timed(
            "linear classifier", lambda: self._linear(train, test, everything)
        )
        self.progress.advance(bar)
        for place, (name, fraction) in enumerate(FEW_LABELS.items()):
            found = [self._few(train, test, fraction, key=(place, draw)) for draw in self._draws(bar)]
            self._put_few(f"linear_{name}_accuracy", found)

    def _draws(self, bar: Any) -> Any:
        for draw in range(self.config.draws):
            self._stop_if_asked()
            yield draw
            self.progress.advance(bar)

    def _encode(self, images: Images, name: str) -> Tensor:
        bar = add_bar(self.progress, name, total=len(images))

        def report(done: int, _: int) -> None:
            self._stop_if_asked()
            self.progress.update(bar, completed=done)

        size, batch = self.encoder.size, self.config.batch_size
        return features_of(self.encoder, images, device=self.device, size=size, batch_size=batch, progress=report)

    def _neighbours(self, train: Tensor, test: Tensor) -> None:
        known = {k: temperature for k, temperature in NEIGHBOURS.items() if k <= len(train)}
        weighted = {k: temperature for k, temperature in known.items() if temperature is not None}
        labels = self.images.train.labels, self.images.test.labels
        found = knn_accuracies(train, labels[0], test, labels[1], ks=tuple(known), temperatures=weighted)
        for k, temperature in NEIGHBOURS.items():
            key = f"knn{k}_accuracy"
            self.quality[key] = found.get(k)
            votes = "one vote each" if temperature is None else f"votes exp(similarity / {temperature})"
            self.notes[key] = votes if k in known else f"left out: there are only {len(train)} training images"

    def _linear(self, train: Tensor, test: Tensor, rows: Tensor) -> float:
        labels = self.images.train.labels[rows], self.images.test.labels
        # Few are labelled, but all may be looked at: mean and deviation come from all.
        return linear_accuracy(train[rows], labels[0], test, labels[1], l2=self.config.l2, unlabelled=train)

    def _few(self, train: Tensor, test: Tensor, fraction: float, *, key: tuple[int, int]) -> tuple[int, float]:
        generator = generator_for(self.config.seed, *key)
        rows = few_label_rows(self.images.train.labels, fraction=fraction, generator=generator)
        return len(rows), self._linear(train, test, rows)

    def _put_few(self, key: str, found: list[tuple[int, float]]) -> None:
        accuracies = [accuracy for _, accuracy in found]
        self.quality[key] = statistics.fmean(accuracies)
        self.notes[key] = {
            "labels": found[0][0],
            "draws": accuracies,
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        }

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        self._stop_if_asked()
        clock = time.perf_counter()
        done = work()
        self.seconds[part] = time.perf_counter() - clock
        return done

    def _stop_if_asked(self) -> None:
        if self.stop():
            raise Interrupted


def _cost(run: _Run, spent: tuple[float, float], flops: Reading, peak: Reading, energy: Reading) -> Cost:
    count = len(run.images.train) + len(run.images.test)
    how = "encoding, neighbours and linear classifiers"
    counted = "counted for the encoder's forward pass, times the images; neighbours and linear classifiers left out"
    return Cost(
        seconds=Reading(spent[0], f"wall clock: {how}"),
        cpu_seconds=Reading(spent[1], f"process CPU time: {how}"),
        flops=Reading(None if flops.value is None else flops.value * count, counted, flops.missed),
        peak_bytes=peak,
        joules=energy,
        stored_bytes=_stored(run.config.weights),
        labels=Reading(float(len(run.images.train)), "training images with a label"),
    )


def _stored(weights: str) -> Reading:
    path = _weights_file(weights)
    return Reading(float(path.stat().st_size), "size of the weights file") if path.is_file() else Reading()


def _weights_file(weights: str) -> Path:
    path = Path(weights).expanduser()
    return path / WEIGHTS if path.is_dir() else path


def _way(weights: str) -> str:
    """A name for the encoder: its run folder's where the file is called as all runs call it."""
    path = Path(weights).expanduser()
    if path.name == WEIGHTS:
        return path.resolve().parent.name
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix == ".safetensors" else path.name


def _receipt(run: _Run, name: str, cost: Cost) -> Receipt:
    encoder, images = run.encoder, run.images
    facts = {key: getattr(encoder, key) for key in ("name", "dim", "channels", "size", "mean", "std")}
    return Receipt(
        kind="run",
        name=name,
        way=_way(run.config.weights) or encoder.name,
        seed=run.config.seed,
        quality=run.quality,
        cost=cost,
        config=plain(run.config),
        notes={
            "data": images.name,
            "training images": len(images.train),
            "test images": len(images.test),
            "classes": len(images.classes),
            "skipped images": len(images.skipped),
            "device": run.device,
            "encoder": facts,
            "seconds of parts": run.seconds,
            **run.notes,
        },
    )
