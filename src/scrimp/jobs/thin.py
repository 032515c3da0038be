"""`scrimp thin`: a vision transformer that leaves tokens out, held against the same one with all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from scrimp.adaptive import Controller
from scrimp.jobs.budget import StepCost
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, REPORT, choose_folder, plain, record_config
from scrimp.jobs.interrupt import stop_requests
from scrimp.jobs.progress import add_bar, figures, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.thin_defend import defence_section
from scrimp.jobs.thin_fit import Thinned, ThinSetup, Training, fine_tune
from scrimp.jobs.thin_measure import Answers, answers, export, forms_apart, speeds
from scrimp.jobs.thin_methods import DENSE, Build, Setting, build_of, settings_of
from scrimp.jobs.thin_models import load_thin_subject
from scrimp.jobs.thin_pictures import KEPT, keep_picture, kept_section
from scrimp.jobs.thin_table import sections
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

_USUAL_RATE = 1e-4


@dataclass(frozen=True)
class Slimmed:
    """What a job leaves.

    Attributes:
        folder: the run folder.
        receipts: of the model with all tokens, then of each setting.
    """

    folder: Path
    receipts: list[Receipt]


def thin(
    config: ThinConfig, *, model: nn.Module | None = None, data: Any = None, accelerator: Accelerator | None = None
) -> Slimmed:
    """Thin a classifier in every setting; writes configuration, receipts, report and, where trained, weights.

    Args:
        config: see `ThinConfig`.
        model: a ready classifier instead of the one ``config.model`` names (which then only names it); left as it is.
        data: anything `scrimp.data.load_images` takes, instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Raises:
        InputError: model, data or configuration cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator) as started, stop_requests() as stop:
        return _thin(config, source, model, started, stop)


def _thin(
    config: ThinConfig, source: Any, model: nn.Module | None, accelerator: Accelerator, stop: Callable[[], bool]
) -> Slimmed:
    name = default_name(f"thin-{config.method}", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        subject, data = load_thin_subject(config, source, model)
    _check_batch(config, len(data.train), accelerator)
    lr = config.lr or _USUAL_RATE * (10 if config.optimizer == "sgd" else 1)
    setup = ThinSetup(replace(config, lr=lr), subject, data, accelerator)
    build = build_of(subject)
    ways: dict[str, Setting | None] = {DENSE: None, **{item.way: item for item in settings_of(config, build)}}
    for setting in ways.values():
        setup.model(setting)  # nothing is written before all is known to work
    costs = {way: setup.cost(setting) for way, setting in ways.items() if _trained(config, way)}
    wanted = {}
    if not config.resume:
        wanted = {"budget_flops": {way: setup.budget(ways[way], cost) for way, cost in costs.items()}}
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    job = _Job(setup, build, folder, name, resolved["budget_flops"], costs, stop)
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:
        receipts = [job.way(setting, _shown(progress, way, resolved)) for way, setting in ways.items()]
    if accelerator.is_main_process:
        _write_report(folder, receipts)
    accelerator.wait_for_everyone()
    return Slimmed(folder, receipts)


def _trained(config: ThinConfig, way: str) -> bool:
    return config.trains and (way != DENSE or config.baseline == "tuned")


def _check_batch(config: ThinConfig, images: int, accelerator: Accelerator) -> None:
    if config.trains and (config.batch_size % accelerator.num_processes or config.batch_size > images):
        wanted = f"a batch size up to {images} that {accelerator.num_processes} process(es) share evenly"
        raise InputError(wanted, f"{config.batch_size}", "pass another --batch-size")


def _shown(progress: Any, way: str, resolved: dict[str, Any]) -> Callable[..., None]:
    bar, budget = add_bar(progress, way), resolved["budget_flops"].get(way)

    def report(spent: Spent | None, doing: str = "") -> None:
        if spent is None or budget is None:
            progress.update(bar, completed=1.0)
        else:
            latest = spent.curve[-1] if spent.curve else {}
            progress.update(bar, completed=0.95 * spent.flops / budget, figures=doing or figures(latest))

    return report


@dataclass(frozen=True)
class _Job:
    setup: ThinSetup
    build: Build
    folder: Path
    name: str
    budgets: dict[str, float]
    costs: dict[str, StepCost]
    stop: Callable[[], bool]

    def way(self, setting: Setting | None, report: Callable[..., None]) -> Receipt:
        """Trained, measured and written, or read from where an interrupted run left it."""
        way = DENSE if setting is None else setting.way
        home, config = self.folder / way, self.setup.config
        if config.resume and (home / RECEIPT).is_file():
            report(None)
            return load_receipt(home / RECEIPT)
        training = None
        if way in self.budgets:
            run = Training(self.name, way, home, self.budgets[way], self.costs[way])
            thinned, controller, training = fine_tune(self.setup, setting, run, report)
        else:
            thinned, controller = self.setup.model(setting)
        given = answers(self.setup, thinned, controller, self.build, self.stop)
        receipt = _blank(self, way, given, training)
        if self.setup.accelerator.is_main_process:
            receipt = self._measured(receipt, thinned, controller, given, home)
            save_receipt(receipt, home / RECEIPT)
        report(None)
        self.setup.accelerator.wait_for_everyone()
        return receipt

    def _measured(
        self, receipt: Receipt, thinned: Thinned, controller: Controller | None, given: Answers, home: Path
    ) -> Receipt:
        """With what one process finds out alone: times, agreement of the forms, the picture, the export."""
        dense, _ = self.setup.model(None)
        speed = speeds(self.setup, thinned, dense, controller, self.stop)
        notes: dict[str, Any] = {"speed": speed, "forms": 1}
        if controller is not None:
            apart = forms_apart(self.setup, thinned, controller)
            notes |= {"masked and ragged differ by": apart, "forms": 1 if apart is None else 2}
            keep_picture(self.setup, thinned, controller, self.build, costs=given.costs, path=home / KEPT)
            if self.setup.config.export:
                notes["export"] = export(self.setup, thinned.model, home)
        return replace(receipt, cost=_timed(receipt.cost, speed), notes={**receipt.notes, **notes})


def _blank(job: _Job, way: str, given: Answers, training: Receipt | None) -> Receipt:
    setup, flops = job.setup, given.flops()
    tokens = None if given.tokens is None else given.tokens.double().mean(0).tolist()
    notes = {
        "model": setup.subject.name,
        "data": setup.data.name,
        "test images": len(setup.data.test),
        "tokens": job.build.patches + job.build.prefix,
        "flops_an_image": flops,
        "tokens after each block, mean": tokens,
        "processes": setup.accelerator.num_processes,
        "device": str(setup.accelerator.device),
        "precision": setup.accelerator.mixed_precision,
        "fine-tuning": None if training is None else training.cost.to_dict(),
    }
    if training is not None and "defence" in training.notes:
        notes["defence"] = training.notes["defence"]
    return Receipt(
        kind="run",
        name=job.name,
        way=way,
        seed=setup.config.seed,
        baseline=way == DENSE,
        quality={"test_accuracy": float(given.right.double().mean()), "test_loss": float(given.losses.double().mean())},
        cost=Cost(flops=Reading(flops["mean"], "of an image, mean over the test images, counted by the parts it used")),
        config=plain(setup.config),
        notes=notes,
    )


def _timed(cost: Cost, speed: list[dict[str, Any]]) -> Cost:
    """With the times of an image in the largest batch, in the ragged form."""
    last = next((item for item in reversed(speed) if item["form"] == "ragged"), None)
    if last is None:
        return cost
    how = f"of an image in a batch of {last['batch']}, median of calls in turn with dense"
    seconds, cpu = (None if last[key] is None else last[key] / last["batch"] for key in ("seconds", "cpu_seconds"))
    return replace(cost, seconds=Reading(seconds, f"wall, {how}"), cpu_seconds=Reading(cpu, f"process CPU, {how}"))


def _write_report(folder: Path, receipts: list[Receipt]) -> None:
    found = sections(receipts)
    for item in receipts:
        picture = folder / item.way / KEPT
        if picture.is_file():
            found.append(replace(kept_section(item.way, picture.read_bytes()), first=True))
        if "defence" in item.notes:
            found.append(defence_section(item.way, item.notes["defence"], folder / item.way))
    trained = [folder / item.way / "training" / RECEIPT for item in receipts]
    tuned = [load_receipt(file) for file in trained if file.is_file()]
    write_report([*receipts, *tuned], folder / REPORT, sections=found)
