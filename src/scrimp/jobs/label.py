"""`scrimp label`: which images to label, asked of a person or an oracle, and what the labels are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from scrimp.jobs.device import pick_device
from scrimp.jobs.distill_teachers import data_fingerprint
from scrimp.jobs.encoders import Encoder
from scrimp.jobs.folder import RECEIPT, REPORT, choose_folder, plain, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.label_ask import announce, ask_oracle, ask_person
from scrimp.jobs.label_config import OWN, LabelConfig
from scrimp.jobs.label_data import LabelPool, load_pool
from scrimp.jobs.label_export import (
    HEAD,
    LABELLED,
    LABELS,
    check_export,
    write_folders,
    write_head,
    write_labels,
)
from scrimp.jobs.label_features import Features, make_features
from scrimp.jobs.label_journal import JOURNAL, Journal
from scrimp.jobs.label_learner import Learner
from scrimp.jobs.label_oracle import Oracle, read_oracle
from scrimp.jobs.label_receipt import cost_of, notes_of, quality_of
from scrimp.jobs.label_report import sections
from scrimp.jobs.label_server import LabelServer
from scrimp.jobs.label_session import Session
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.meter import Cost, EnergyWindow, ResidentPeak
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report
from scrimp.represent.linear import linear_accuracy

_AUDIT = 0.2
_RANDOM = "random"


@dataclass(frozen=True)
class Labelled:
    """What a labelling leaves.

    Attributes:
        folder: the run folder.
        receipts: of each way and seed, random labels first where they stand beside.
        labels: the CSV; of several runs that of the strategy's first seed.
    """

    folder: Path
    receipts: list[Receipt]
    labels: Path


def label(
    config: LabelConfig,
    *,
    data: Any = None,
    encoder: Encoder | None = None,
    ready: Callable[[LabelServer], None] | None = None,
) -> Labelled:
    """Choose, ask, learn, round by round; writes configuration, journal, labels.csv, receipts and report.html.

    Args:
        config: see `LabelConfig`.
        data: anything `scrimp.data.load_images` takes, instead of ``config.data`` (which then only names it).
        encoder: a ready encoder instead of the one that ``config.encoder`` names; moved to the device.
        ready: called with the page's server once it answers, instead of printing its address.

    Raises:
        InputError: data, encoder, oracle or configuration cannot be used.
        Interrupted: SIGINT or SIGTERM came; every label is kept, go on with ``resume=True``.
    """
    config.check()
    device = pick_device(config.device)
    name = default_name("label", config.data if data is None else data)
    folder = choose_folder(config.out, name, resume=config.resume)
    if config.resume:
        record_config(folder, config, {})  # the interrupted run's, or refused
    pool, encoder = load_pool(config, data, encoder)
    oracle = None if config.oracle is None else read_oracle(config, pool)
    classes = oracle.classes if oracle is not None else config.classes or pool.data.classes
    check_export(config.export_folders, pool, classes)
    with stop_requests() as stop, progress_bar(shown=not config.json) as progress:
        bar = add_bar(progress, "features", total=len(pool))

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        features = make_features(
            config,
            pool,
            encoder,
            folder=folder,
            device=device,
            stop=stop,
            report=tell,
            begun=lambda: _begun(config, folder),
        )
        progress.update(bar, visible=False)
        job = _Job(config, pool, encoder.name, classes, features, folder, name, oracle, stop, progress)
        if oracle is None:
            return job.by_person(ready or (lambda server: announce(config, server)))
        return job.by_oracle(oracle)


def _begun(config: LabelConfig, folder: Path) -> None:
    """Nothing is written before all is known to work."""
    if not config.resume:
        record_config(folder, config, {})


@dataclass(frozen=True)
class _Job:
    config: LabelConfig
    pool: LabelPool
    encoder: str
    classes: tuple[str, ...]
    features: Features
    folder: Path
    name: str
    oracle: Oracle | None
    stop: Callable[[], bool]
    progress: Progress

    def by_person(self, ready: Callable[[LabelServer], None]) -> Labelled:
        def ask(session: Session, learner: Learner, tell: Callable[[Session], None]) -> None:
            asked: dict[str, Any] = {"stop": self.stop, "tell": tell, "ready": ready}
            ask_person(session, learner, self.pool, self.classes, **asked)

        if (self.folder / RECEIPT).is_file():
            receipts = [load_receipt(self.folder / RECEIPT)]
        else:
            receipts = [self.run(self.config.strategy, self.config.seed, self.folder, ask)]
        return self._left(receipts, self.folder / LABELS)

    def by_oracle(self, oracle: Oracle) -> Labelled:
        def ask(session: Session, learner: Learner, tell: Callable[[Session], None]) -> None:
            ask_oracle(session, learner, oracle, stop=self.stop, tell=tell)

        ways = dict.fromkeys([*([_RANDOM] if self._beside() else []), self.config.strategy])
        homes = [
            (way, self.config.seed + draw, self.folder / way / f"seed-{self.config.seed + draw}")
            for way in ways
            for draw in range(self.config.seeds)
        ]
        ceiling = self._ceiling()
        receipts = []
        for way, seed, home in homes:
            if not (home / RECEIPT).is_file():
                self.run(way, seed, home, ask, ceiling)
            receipts.append(load_receipt(home / RECEIPT))
        first = self.folder / self.config.strategy / f"seed-{self.config.seed}" / LABELS
        return self._left(receipts, first)

    def run(
        self,
        way: str,
        seed: int,
        home: Path,
        ask: Callable[[Session, Learner, Callable[[Session], None]], None],
        ceiling: float | None = None,
    ) -> Receipt:
        """One labelling, from its first label or from where its journal ends."""
        journal = Journal(home / JOURNAL, self._about(way, seed))
        bar = add_bar(self.progress, f"{way}, seed {seed}" if self.config.seeds > 1 else way, total=self.config.budget)

        def tell(session: Session) -> None:
            self.progress.update(bar, completed=session.status()["labels"])

        try:
            session = Session(
                journal,
                images=len(self.pool),
                classes=len(self.classes),
                budget=min(self.config.budget, len(self.pool)),
                lease_seconds=self.config.lease_seconds,
            )
            learner = self._learner(way, seed, session)
            with ResidentPeak() as peak, EnergyWindow() as energy:
                try:
                    ask(session, learner, tell)
                finally:
                    write_labels(session.rows(), self.pool.names, self.classes, home / LABELS)
                learner.learn(session.snapshot())
            if learner.probe is None:
                raise InputError("one label or more", "none", "label some images, or pass another --oracle")
            stored = write_head(learner.probe, self.classes, self.encoder, home / HEAD)
            self._export(session, way, seed)
            cost = cost_of(session, learner, self.features, stored)
            cost = replace(cost, peak_bytes=peak.reading, joules=energy.reading)
            receipt = self._receipt(session, learner, cost, ceiling=ceiling)
            save_receipt(receipt, home / RECEIPT)
            return receipt
        finally:
            journal.close()

    def _learner(self, way: str, seed: int, session: Session) -> Learner:
        test = None
        if self.features.test is not None:
            test = (self.features.test, self.pool.data.test.labels)
        usual = _AUDIT if test is None else 0.0
        return Learner(
            self.config,
            self.features.pool,
            len(self.classes),
            seed,
            way,
            audit=usual if self.config.audit is None else self.config.audit,
            test=test,
            earlier=session.snapshot().labels,
            curve=session.points,
        )

    def _beside(self) -> bool:
        return self.config.beside == _RANDOM and self.features.test is not None

    def _ceiling(self) -> float | None:
        """The accuracy with all labels, where it can be known."""
        features, data = self.features, self.pool.data
        if not (self.config.ceiling and self.config.oracle == OWN) or features.test is None:
            return None
        if self.stop():
            raise Interrupted
        train = (features.pool, data.train.labels)
        return linear_accuracy(*train, features.test, data.test.labels, l2=self.config.l2)

    def _about(self, way: str, seed: int) -> dict[str, Any]:
        return {
            "images": data_fingerprint(self.pool.data.train),
            "classes": list(self.classes),
            "strategy": way,
            "seed": seed,
        }

    def _export(self, session: Session, way: str, seed: int) -> None:
        if self.config.export_folders == "none" or (way, seed) != (self.config.strategy, self.config.seed):
            return
        links = self.config.export_folders == "symlink"
        write_folders(session.rows(), self.pool, self.classes, folder=self.folder / LABELLED, links=links)

    def _receipt(self, session: Session, learner: Learner, cost: Cost, *, ceiling: float | None) -> Receipt:
        way, seed = learner.strategy, learner.seed
        return Receipt(
            kind="run",
            name=self.name,
            way=way,
            seed=seed,
            baseline=way == _RANDOM and self.config.strategy != _RANDOM,
            quality=quality_of(learner),
            cost=cost,
            curve=learner.curve,
            config={**plain(self.config), "seed": seed, "strategy": way},
            notes={
                "data": self.pool.data.name,
                "images": len(self.pool),
                "classes": len(self.classes),
                "skipped images": len(self.pool.data.skipped),
                "encoder": self.encoder,
                **notes_of(session, learner, self.features, self.classes, ceiling=ceiling),
            },
        )

    def _left(self, receipts: list[Receipt], labels: Path) -> Labelled:
        write_report(receipts, self.folder / REPORT, sections=sections(receipts))
        if labels.parent != self.folder:
            (self.folder / LABELS).write_bytes(labels.read_bytes())
        return Labelled(self.folder, receipts, self.folder / LABELS)
