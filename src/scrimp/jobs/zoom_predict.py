"""`scrimp zoom predict`: labels of large images, and the patches that were looked at for each."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scrimp.data.decode import ImageError
from scrimp.jobs.engine import accelerated
from scrimp.jobs.folder import RECEIPT, REPORT, choose_folder, plain, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.jobs.zoom_config import ZoomPredictConfig
from scrimp.jobs.zoom_files import Gallery, find_unlabelled
from scrimp.jobs.zoom_model import Looking
from scrimp.jobs.zoom_pictures import Seen, caption, look_at, overlay, overlay_section
from scrimp.jobs.zoom_plan import Plan, load_plan
from scrimp.jobs.zoom_readers import Readers, Views
from scrimp.jobs.zoom_setup import count_image
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic, write_json
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

PREDICTIONS, OVERLAYS = "predictions.csv", "overlays"
_PROGRESS = "progress.json"
_SAVE_SECONDS = 30.0


def zoom_predict(config: ZoomPredictConfig, *, data: Gallery | None = None) -> Receipt:
    """Predict; writes predictions.csv, overlays/, report, configuration and receipt to the run folder.

    Args:
        config: see `ZoomPredictConfig`.
        data: images instead of ``config.data``.

    Returns:
        The receipt, also written to the run folder; with the quality where the images' labels are known.

    Raises:
        InputError: ``config.run`` is no run of `scrimp zoom train`, or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config) as accelerator:
        return _predict(config, data, accelerator)


def _predict(config: ZoomPredictConfig, data: Gallery | None, accelerator: Accelerator) -> Receipt:
    if accelerator.num_processes > 1:
        raise InputError("one process", f"{accelerator.num_processes}", "start it without torchrun")
    plan, model = load_plan(config.run)
    gallery = find_unlabelled(config.data, plan.target.classes) if data is None else data
    folder = choose_folder(config.out, f"zoom-predict-{config.run.resolve().stem}", resume=config.resume)
    record_config(folder, config, {})
    if config.resume and (folder / RECEIPT).is_file():
        return load_receipt(folder / RECEIPT)
    cast(nn.Module, model).to(accelerator.device)
    job = _Prediction(config, plan, model, gallery, folder)
    with ResidentPeak() as peak, EnergyWindow() as energy:
        job.run(accelerator.device)
    receipt = job.receipt(peak.reading, energy.reading)
    job.write(receipt)
    if not config.json:
        console.print(f"predictions: {folder / PREDICTIONS}", soft_wrap=True)
    return receipt


@dataclass
class _Done:
    """How far the job is: a row of the table each, how many images were tried, and what was left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tried: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_read: int | None = 0
    resumes: int = 0


class _Prediction:
    """Images batch by batch; interrupted, it goes on with the batch that was not finished."""

    def __init__(self, config: ZoomPredictConfig, plan: Plan, model: Looking, gallery: Gallery, folder: Path) -> None:
        self.config, self.plan, self.model, self.gallery, self.folder = config, plan, model, gallery, folder
        self.readers = Readers(gallery, limit=config.open_images)
        self.views = Views(self.readers, plan.shape, None)
        self.done = _Done()

    def run(self, device: torch.device) -> None:
        """All images.

        Raises:
            Interrupted: a stop was asked for; what is done is kept.
        """
        kept = self.folder / _PROGRESS
        if self.config.resume and kept.is_file():
            self.done = _Done(**json.loads(kept.read_text()))
            self.done.resumes += 1
        saved = time.perf_counter()
        with progress_bar(shown=not self.config.json) as progress, stop_requests() as stop:
            bar = add_bar(progress, "images", total=len(self.gallery))
            while self.done.tried < len(self.gallery):
                self._batch(device)
                progress.update(bar, completed=self.done.tried)
                if stop() or time.perf_counter() - saved > _SAVE_SECONDS:
                    write_json(kept, asdict(self.done))
                    saved = time.perf_counter()
                if stop():
                    raise Interrupted

    def receipt(self, peak: Reading, energy: Reading) -> Receipt:
        done = self.done
        return Receipt(
            kind="run",
            name=self.folder.name,
            way=self.plan.method,
            seed=self.config.seed,
            quality=self._quality(),
            cost=Cost(
                seconds=Reading(done.seconds, "wall clock: reading, looking and drawing"),
                cpu_seconds=Reading(done.cpu_seconds, "process CPU time: the same"),
                flops=self._flops(),
                peak_bytes=peak,
                joules=energy,
                samples=Reading(float(len(done.rows)), "images predicted"),
            ),
            config=plain(self.config),
            notes={
                "images": len(done.rows),
                "skipped images": len(done.skipped),
                "task": self.plan.target.task,
                "patches an image": 0 if self.plan.method == "whole" else self.plan.patches * self.plan.maps,
                "images a second": len(done.rows) / done.seconds if done.rows else None,
                "bytes read": done.bytes_read,
                "resumed": done.resumes,
            },
        )

    def write(self, receipt: Receipt) -> None:
        """The table, the report and the receipt."""
        rows, columns = self.done.rows, ["path", "label", "probabilities", "boxes"]
        columns += ["given"] if self.gallery.labels is not None else []
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for row in rows:
            cells = {**row, "probabilities": json.dumps(row["probabilities"]), "boxes": json.dumps(row["boxes"])}
            table.writerow([cells[name] for name in columns])
        write_atomic(self.folder / PREDICTIONS, text.getvalue())
        drawn = [row for row in rows if row["overlay"]][: self.config.pictures]
        items = [
            ((self.folder / row["overlay"]).read_bytes(), caption(row["label"], row["given"]), Path(row["path"]).name)
            for row in drawn
        ]
        write_report([receipt], self.folder / REPORT, sections=[overlay_section(items)] if items else [])
        save_receipt(receipt, self.folder / RECEIPT)
        (self.folder / _PROGRESS).unlink(missing_ok=True)

    def _batch(self, device: torch.device) -> None:
        begin, cpu, before = time.perf_counter(), time.process_time(), self.readers.bytes_read
        last = min(self.done.tried + self.config.batch_size, len(self.gallery))
        rows = [row for row in range(self.done.tried, last) if self._readable(row)]
        size = self.config.batch_size
        looked = look_at(self.plan, self.model, self.views, rows, device=device, batch_size=size)
        found = [self._row(seen) for seen in looked]
        synchronise()
        done, after = self.done, self.readers.bytes_read
        done.rows += found
        done.tried = last
        done.seconds += time.perf_counter() - begin
        done.cpu_seconds += time.process_time() - cpu
        known = done.bytes_read is not None and before is not None and after is not None
        done.bytes_read = done.bytes_read + after - before if known else None  # type: ignore[operator]

    def _readable(self, row: int) -> bool:
        if self.config.on_corrupt == "refuse":
            return True
        try:
            self.views.get(row)
        except ImageError:
            self.done.skipped.append(self.gallery.name_of(row))
            return False
        return True

    def _row(self, seen: Seen) -> dict[str, Any]:
        """A line of the table, and its picture."""
        said, shares = self.plan.target.answers(seen.outputs[None])
        name = self.gallery.name_of(seen.row)
        drawn = None
        if self.config.overlays is None or seen.row < self.config.overlays:
            drawn = f"{OVERLAYS}/{seen.row:05}-{Path(name).stem}.png"
            write_atomic(self.folder / drawn, overlay(seen))
        return {
            "path": name,
            "label": said[0],
            "probabilities": {
                name: round(share, 6) for name, share in zip(self.plan.target.classes, shares[0], strict=True)
            },
            "boxes": seen.boxes.tolist(),
            "given": None if self.gallery.labels is None else self.gallery.labels[seen.row],
            "overlay": drawn,
            "outputs": seen.outputs.tolist(),
            "size": list(seen.size),
        }

    def _quality(self) -> dict[str, float | None]:
        """Where the labels of all images are known."""
        rows = self.done.rows
        if self.gallery.labels is None or not rows:
            return {}
        labels = self.plan.target.encode([row["given"] for row in rows])
        outputs: Tensor = torch.tensor([row["outputs"] for row in rows])
        return {f"test_{name}": value for name, value in self.plan.target.quality(outputs, labels).items()}

    def _flops(self) -> Reading:
        if not self.done.rows:
            return Reading(0.0, "no image was predicted")
        sizes = torch.tensor([row["size"] for row in self.done.rows])
        cost = count_image(self.plan, cast(nn.Module, self.model), sizes)
        return Reading(cost.score * len(self.done.rows), "counted for an image, times the images", cost.missed)
