"""Two who give labels: a person on the page, and an oracle."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable
from typing import Any

from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.label_config import LabelConfig
from scrimp.jobs.label_data import LabelPool
from scrimp.jobs.label_learner import Learner
from scrimp.jobs.label_oracle import Oracle
from scrimp.jobs.label_server import LabelServer
from scrimp.jobs.label_session import Session
from scrimp.primitives.errors import InputError

_ORACLE = "oracle"
_TICK = 0.2  # seconds between two looks at whether to stop

Tell = Callable[[Session], None]


def ask_oracle(session: Session, learner: Learner, oracle: Oracle, *, stop: Callable[[], bool], tell: Tell) -> None:
    """Label round after round; a round's labels reach the journal together.

    Raises:
        Interrupted: a stop was asked for; whole rounds are kept.
    """
    while not session.done:
        if stop():
            raise Interrupted
        found = []
        while (row := session.hold(_ORACLE)) is not None:
            found.append((row, oracle.labels[row]))
        if found:
            session.label_many(_ORACLE, found)
            tell(session)
        elif session.wants_round():
            _next_round(session, learner)


def ask_person(
    session: Session,
    learner: Learner,
    pool: LabelPool,
    classes: tuple[str, ...],
    *,
    stop: Callable[[], bool],
    tell: Tell,
    ready: Callable[[LabelServer], None],
) -> None:
    """Serve the page until somebody has said on it that it is enough.

    Args:
        ready: called with the server once it answers.

    Raises:
        InputError: the port is taken.
        Interrupted: a stop was asked for; all that was acknowledged is kept.
    """
    try:
        server = LabelServer(
            session,
            pool.data.train,
            paths=pool.paths,
            names=pool.names,
            classes=classes,
            news=lambda: news(learner),
            port=learner.config.port,
        )
    except OSError as error:
        got = f"{learner.config.port} ({error.strerror})"
        raise InputError("a free port for --port", got, "pass another, or leave it out") from error
    try:
        ready(server)
        while not server.finished.is_set():
            if stop():
                raise Interrupted
            if session.wants_round():
                _next_round(session, learner)
            session.wait(_TICK)
            tell(session)
    finally:
        server.close()


def announce(config: LabelConfig, server: LabelServer) -> None:
    """Say where the page is, and open it where that is asked for."""
    print(f"label at {server.url}", file=sys.stderr, flush=True)
    if config.browser:
        webbrowser.open(server.url)


def news(learner: Learner) -> dict[str, Any]:
    """What the page shows of the classifier."""
    estimate, gain = learner.estimate, learner.gain
    return {
        "estimate": None if estimate is None else vars(estimate),
        "gain": None if gain is None else gain.high,
    }


def _next_round(session: Session, learner: Learner) -> None:
    chosen, why = learner.choose(session.snapshot())
    if why:
        session.end(why)
        return
    session.begin(chosen, learner.curve[-1] if learner.curve else None)
