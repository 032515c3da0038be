"""What the runs of a distillation share: data, teachers, counted costs; and what a run makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scrimp.data import ImageData, standardise
from scrimp.jobs.budget import StepCost, seconds_a_step
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_fit import Before, DistillFitting, Teaching
from scrimp.jobs.distill_lessons import Lessons, kept_lessons, live_lessons
from scrimp.jobs.distill_plan import Outlay, Plan, plan_for
from scrimp.jobs.distill_prepare import Keeping, Preparation, Told
from scrimp.jobs.distill_student import Objective, Student, classify, follow_logits, make_student, regress
from scrimp.jobs.distill_teachers import Teacher, load_teachers
from scrimp.jobs.distill_views import LiveViews, view_named
from scrimp.jobs.encoder_run import EncoderRun, load_data, new_encoder, resolve_budget, run_encoder
from scrimp.jobs.encoders import Encoder
from scrimp.jobs.engine import shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, plain
from scrimp.jobs.labels import labelled_rows
from scrimp.jobs.teacher_cache import read_index
from scrimp.meter import Reading, count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt
from scrimp.represent.linear import fit_linear_probe

if TYPE_CHECKING:
    from accelerate import Accelerator

_COUNTED = 8  # images of the step that is counted
_PROGRESS = ("finished", "seconds", "cpu_seconds")  # of a file of features


@dataclass(frozen=True, eq=False)
class Distillation:
    """Data, teachers, accelerator and counted costs: what one run, or several of a study, go by.

    Attributes:
        cost: of an image in a step, the teachers' passes included where they see every step's own view.
        passes: of an image through each teacher.
    """

    config: DistillConfig
    data: ImageData
    accelerator: Accelerator
    cost: StepCost
    teachers: tuple[Teacher, ...]
    passes: tuple[Reading, ...]

    @property
    def way(self) -> str:
        """What receipts call the method."""
        method, layers = self.config.method, self.config.head_layers
        return f"regression-{layers}-layer" if method == "regression" and layers != 4 else method

    @property
    def live(self) -> bool:
        """Whether no features are kept."""
        return self.config.cache == "none" or not self.teachers

    def budget(self) -> float:
        """FLOPs of the run, the smallest of the budgets given; the teachers' passes are in it.

        Raises:
            InputError: no step can be made of it.
        """
        config, outlay = self.config, self._outlay(self._started(None))
        budgets = [] if config.flops is None else [config.flops * (1 + 1e-9)]
        if config.minutes is not None:
            left = config.minutes - self._seconds_before(outlay) / 60
            config = replace(config, minutes=max(left, 0.0))
        if config.minutes is not None or config.epochs is not None or not budgets:
            training = resolve_budget(replace(config, flops=None), self.data, self.cost, self._seconds)
            views = outlay.views_for(training / (self.cost.train * outlay.images))
            budgets.append(training + outlay.flops(views))
        self._plan(min(budgets), outlay)
        return min(budgets)

    def run(
        self,
        folder: Path,
        budget: float,
        report: Callable[[Spent], None],
        *,
        name: str,
        seed: int | None = None,
        baseline: bool = False,
        resume: bool = False,
        told: Told = lambda share: None,
        drawn: bool = True,
    ) -> Receipt:
        """Train one student into ``folder``; a finished run is read back, an interrupted one goes on.

        Args:
            folder, name, seed, baseline, resume: of the run.
            budget: FLOPs, the teachers' passes included.
            report: called after each step.
            told: see `scrimp.jobs.distill_prepare.Told`.
            drawn: with pictures and a report.
        """
        if resume and (folder / RECEIPT).is_file():  # its plan is gone, and a new one is not to be left there
            return load_receipt(folder / RECEIPT)
        me = self if seed is None else replace(self, config=replace(self.config, seed=seed))
        plan = shared(self.accelerator, lambda: me._planned(folder, budget, resume=resume))
        run = EncoderRun(
            name=name,
            way=me.way,
            folder=folder,
            seed=me.config.seed,
            budget=budget,
            baseline=baseline,
            drawn=drawn,
            config={**plain(me.config), "budget_flops": budget},
            labels=len(me._labelled()) if me.config.uses_labels else 0,
            notes=me._notes(plan),
        )
        return run_encoder(run, functools.partial(me._fitting, plan, folder, told), report, resume=resume)

    def _planned(self, folder: Path, budget: float, *, resume: bool) -> Plan:
        """The plan this run began with, or a new one, written down."""
        found = Plan.read(folder) if resume else None
        if found is None:
            started = self._started(folder)
            found = replace(self._plan(budget, self._outlay(started)), started=tuple(started))
            found.write(folder)
        return found

    def _plan(self, budget: float, outlay: Outlay) -> Plan:
        step = self.cost.train * self.config.batch_size
        return plan_for(budget, outlay, image_flops=self.cost.train, step_flops=step)

    def _outlay(self, started: Sequence[dict[str, float]]) -> Outlay:
        return Outlay(
            images=len(self.data.train),
            teachers=tuple(self._each()),
            finished=tuple(int(item["finished"]) for item in started),
            probed=len(self._labelled()) if self.config.method == "logits" else 0,
            most=0 if self.live else self.config.cache_views,
        )

    def _started(self, folder: Path | None) -> list[dict[str, float]]:
        """What each teacher's file holds already; nothing in a folder that is still to be made."""
        home = (self.config.cache_folder or folder) if self.config.cache == "disk" else None
        found = []
        for teacher in self.teachers:
            index = None
            if home is not None:
                index = read_index(self._keeping.path(teacher, home), self._keeping.about(teacher))
            found.append({name: index[name] if index else 0 for name in _PROGRESS})
        return found

    def _each(self) -> list[float]:
        """FLOPs of an image through each teacher."""
        return [reading.value for reading in self.passes if reading.value is not None]

    @functools.cached_property
    def _keeping(self) -> Keeping:
        return Keeping(self.config, self.data, self.accelerator)

    def _labelled(self) -> Tensor:
        """The images whose label may be used; the same for every method of one seed, of pretraining's as well."""
        return labelled_rows(self.data, self.config.labelled, seed=self.config.seed)

    def _fitting(self, plan: Plan, folder: Path, told: Told) -> DistillFitting:
        preparation = Preparation(self._keeping, told=told)
        lessons, objective = self._lessons(plan, folder, preparation), self._objective(preparation)
        teaching = Teaching(
            lessons,
            objective,
            teachers=self.teachers,
            labelled=self._labelled() if self.config.method == "scratch" else None,
            before=Before(plan.before, preparation.seconds, preparation.cpu_seconds),
        )
        return DistillFitting(
            self.config,
            new_student(self.config, self.data, self.teachers),
            teaching,
            self.data,
            accelerator=self.accelerator,
            cost=self.cost,
            budget=plan.training,
            checkpoint=folder / CHECKPOINT,
        )

    def _lessons(self, plan: Plan, folder: Path, preparation: Preparation) -> Lessons:
        if self.live:
            view = view_named(self.config.view, self.data.train.shape[1])
            return live_lessons(LiveViews(view, seed=self.config.seed, total=self.config.batch_size))
        pairs = zip(self.teachers, plan.started, strict=True)
        caches = [preparation.kept(one, folder, views=plan.views, started=started) for one, started in pairs]
        batches = len(self.data.train) // self.config.batch_size
        return kept_lessons(preparation.keeping.views, caches, used=plan.views, batches=batches)

    def _objective(self, preparation: Preparation) -> Objective:
        if self.config.method == "regression":
            return regress
        if self.config.method == "scratch":
            return classify
        rows, classes = self._labelled(), len(self.data.classes)
        labels = self.data.train.labels[rows]
        probes = [fit_linear_probe(preparation.plain(one, rows), labels, classes=classes) for one in self.teachers]
        return follow_logits(probes, temperature=self.config.temperature)

    def _notes(self, plan: Plan) -> dict[str, Any]:
        config, each = self.config, self._each()
        steps = int(plan.training // (self.cost.train * config.batch_size))
        shown = steps * config.batch_size * sum(each) if self.live else 0.0
        fresh = self._outlay([dict.fromkeys(_PROGRESS, 0)] * len(each))
        width = sum(teacher.encoder.dim for teacher in self.teachers)
        itemsize = int(config.cache_dtype.removeprefix("float")) // 8
        kept = f"{plan.views} views of each image, {config.cache}, {config.cache_dtype}"
        return {
            "method": self.way,
            "teachers": [teacher.encoder.name for teacher in self.teachers],
            "teacher dims": [teacher.encoder.dim for teacher in self.teachers],
            "teacher features": "none" if not each else "live" if self.live else kept,
            "teacher FLOPs an image": sum(each),
            "teacher FLOPs share": (plan.before + shown) / (plan.before + steps * config.batch_size * self.cost.train),
            "teacher FLOPs if no features were found": fresh.flops(plan.views) + shown,
            "cache bytes": plan.views * len(self.data.train) * width * itemsize,
            "view": config.view,
            "unit of train_loss": "squared distance of unit vectors" if config.method == "regression" else "nats",
        }

    def _seconds(self) -> tuple[float, float]:
        """Wall seconds of one training step on this process, and of one look at the neighbours."""
        rows = self.config.batch_size // self.accelerator.num_processes
        casts = self.accelerator.autocast
        student, views = new_student(self.config, self.data, self.teachers), _some_views(self.data, rows)
        student = student.to(self.accelerator.device)
        views = views.to(self.accelerator.device)
        shown = standardise(views, self.data.mean, self.data.std)
        asked = self.teachers if self.live else ()

        def step() -> None:
            for teacher in asked:
                teacher(views, autocast=casts)
            with casts():
                outputs = student.train()([shown])
            sum(item.float().square().mean() for item in outputs).backward()  # type: ignore[union-attr]

        def look() -> None:
            with torch.no_grad(), casts():
                student.eval()([shown], features=True)

        return seconds_a_step(step, repeats=3), seconds_a_step(look, repeats=3)

    def _seconds_before(self, outlay: Outlay) -> float:
        """Wall seconds of the teachers before the first step, where all views are kept."""
        views = _some_views(self.data, _COUNTED).to(self.accelerator.device)
        seconds = 0.0
        for teacher, finished in zip(self.teachers, outlay.finished, strict=True):
            rows = max(0, outlay.most * outlay.images - finished) + outlay.probed
            ask = functools.partial(teacher, views, autocast=self.accelerator.autocast)
            seconds += rows * seconds_a_step(ask, repeats=3) / _COUNTED if rows else 0.0
        return seconds / self.accelerator.num_processes


def prepare_distillation(
    config: DistillConfig, source: Any, accelerator: Accelerator, *, teachers: Sequence[Encoder] | None = None
) -> Distillation:
    """Load images and teachers, and count the cost of a step.

    Raises:
        InputError: data, teachers, student or batch size that cannot be used.
    """
    data = load_data(config, source, accelerator)
    with accelerator.main_process_first():  # weights may be fetched, which the others then find
        encoders = load_teachers(config, data, teachers)
    frozen = tuple(Teacher(encoder, accelerator.device) for encoder in encoders)
    if len({teacher.fingerprint for teacher in frozen}) < len(frozen):
        raise InputError("teachers that differ", "one of them twice", "name each once")
    passes = tuple(teacher.cost(data.train.shape, accelerator.device) for teacher in frozen)
    student = new_student(config, data, frozen).to(accelerator.device)
    shown = standardise(_some_views(data, _COUNTED).to(accelerator.device), data.mean, data.std)
    counted = count_flops(lambda: sum(item.mean() for item in student([shown])).backward())  # type: ignore[union-attr]
    if counted.value is None:
        raise InputError("a model whose FLOPs can be counted", str(config.model), "choose another --student")
    live = sum(reading.value or 0.0 for reading in passes) if config.cache == "none" else 0.0
    missed = {name for reading in (counted, *passes) for name in reading.missed}
    cost = StepCost(counted.value / _COUNTED + live, 0.0, tuple(sorted(missed)))
    return Distillation(config, data, accelerator, cost, frozen, passes)


def new_student(config: DistillConfig, data: ImageData, teachers: Sequence[Teacher]) -> Student:
    """The student and its heads, their initial weights fixed by the seed."""
    backbone, features = new_encoder(config, data)
    dims = [teacher.encoder.dim for teacher in teachers]
    return make_student(backbone, features, config, dims=dims, classes=len(data.classes))


def _some_views(data: ImageData, rows: int) -> Tensor:
    """Images as views, floats [rows, C, H, W] in 0 to 1."""
    return data.train.batch(torch.arange(rows) % len(data.train)).float() / 255
