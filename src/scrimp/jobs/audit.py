"""`scrimp audit`: how dear an image can get to an adaptive model, by attacks, controls and defences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.attack import AuditReport, Victim, frozen
from scrimp.attack import audit as run_audit
from scrimp.jobs.audit_config import DEFAULT_BUDGET, LEAST_BUDGET, AuditConfig
from scrimp.jobs.audit_extras import break_even, measured, pictured, receipts_of
from scrimp.jobs.audit_page import write_audit_page
from scrimp.jobs.audit_store import Store
from scrimp.jobs.audit_subject import Subject, load_subject, others_of
from scrimp.jobs.engine import accelerated
from scrimp.jobs.folder import RECEIPT, choose_folder, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.primitives.files import write_json
from scrimp.receipts import Receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator

AUDIT = "audit.json"
"""File of the report in a run folder."""
_MEASURING = 50  # images that are looked at for each audited one; a look takes a third of forward and backward


@dataclass(frozen=True)
class Audited:
    """What a job leaves.

    Attributes:
        folder: the run folder, with ``audit.json`` and ``audit.html``.
        report: what `scrimp.attack.audit` found, with what was measured beside it.
        content: of ``audit.json``.
        receipts: of the clean images, then of each trial.
    """

    folder: Path
    report: AuditReport
    content: dict[str, Any]
    receipts: list[Receipt]


def audit(
    config: AuditConfig,
    *,
    model: nn.Module | None = None,
    victim: Victim | None = None,
    data: Any = None,
    accelerator: Accelerator | None = None,
) -> Audited:
    """Audit a model; writes configuration, attacks, trials, receipts, audit.json and audit.html.

    Args:
        config: see `AuditConfig`.
        model: a ready classifier instead of the one ``config.model`` names (which then only names it); left as it is.
        victim: a ready victim instead; with ``capped(max_flops)`` it can be audited with a hard budget too.
        data: anything `scrimp.data.load_images` takes, instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Raises:
        InputError: model, data or configuration cannot be used.
        Interrupted: SIGINT or SIGTERM came; finished trials are kept, go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator) as started, stop_requests() as stop:
        folder = choose_folder(config.out, default_name("audit", source), resume=config.resume)
        subject = load_subject(config, source, started, model=model, victim=victim)
        others = others_of(config, source, started)
        images, labels, learn = subject.images(config)
        subject.victim.cost(images[:1])  # nothing is written before it is known to work
        wanted = {} if config.resume else {"budget": _budget(config, subject.victim, images)}
        budget = int(record_config(folder, config, wanted)["budget"])
        job = _Job(config, subject, folder, budget, Store(folder, images, config.resume), stop)
        return job.run(images, labels, learn, others)


@dataclass(frozen=True, eq=False)
class _Job:
    config: AuditConfig
    subject: Subject
    folder: Path
    budget: int
    store: Store
    stop: Callable[[], bool]

    def run(self, images: Tensor, labels: Tensor | None, learn: Tensor, others: Mapping[str, Victim]) -> Audited:
        with progress_bar(shown=not self.config.json) as progress, self._stoppable(self.subject.victim):
            bar = add_bar(progress, "audit")
            report = run_audit(
                self.subject.victim,
                images,
                labels,
                learn=learn,
                budget=self.budget,
                seed=self.config.seed,
                others=others,
                capped=self.subject.capped,
                remember=self._remember,
                report=lambda name, done: progress.update(bar, completed=0.95 * done, figures=name),
                batch=self.config.batch_size,
            )
            found = measured(self.config, self.subject, report, images, self.folder, self.stop)
            pictured(self.subject, report, images, self.folder)
            static = break_even(self.subject, report, images, labels)
            progress.update(bar, completed=1.0)
        return self._written(replace(report, about={**self._about(), **found, "break_even": static}))

    def _about(self) -> dict[str, Any]:
        return {"model": self.subject.name, "method": self.subject.method, "data": self.subject.data.name}

    def _remember(self, name: str, make: Callable[[], Any]) -> Any:
        if self.stop():
            raise Interrupted
        return self.store.remember(name, make)

    @contextmanager
    def _stoppable(self, victim: Victim) -> Iterator[None]:
        """Stop between two forwards: a trial that is not finished is made again."""

        def ask(*_: Any) -> None:
            if self.stop():
                raise Interrupted

        handle = victim.model.register_forward_pre_hook(ask, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _written(self, report: AuditReport) -> Audited:
        names = [trial.case.name for trial, _ in report.entries()]
        files = {name: file for name in names if (file := self.store.file(name)) is not None}
        content = report.to_dict(files)
        receipts = receipts_of(self.config, self.subject, report)
        for receipt in receipts:
            save_receipt(receipt, self.store.home(receipt.way) / RECEIPT)
        write_audit_page(content, self.folder, receipts)
        write_json(self.folder / AUDIT, content)
        return Audited(self.folder, report, content, receipts)


def _budget(config: AuditConfig, victim: Victim, images: Tensor) -> int:
    """Images through forward and backward; minutes by timing steps, less what it takes to measure."""
    if config.minutes is None:
        return DEFAULT_BUDGET if config.budget is None else config.budget
    rows, times = images[: min(16, len(images))], []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        _step(victim, rows)
        times.append((time.perf_counter() - start) / len(rows))
    affordable = 0.9 * 60 * config.minutes / min(times) - _MEASURING * len(images)
    return max(LEAST_BUDGET, int(affordable))


def _step(victim: Victim, images: Tensor) -> None:
    with frozen(victim.model):
        point = images.clone().requires_grad_()
        loss = victim.policy_loss(point).sum()
        if loss.requires_grad:
            torch.autograd.grad(loss, point, allow_unused=True)
