"""The command line: one verb a job, made from the jobs' dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scrimp import __version__
from scrimp.jobs.config import CompareConfig, ReportConfig, StudyConfig, TrainConfig
from scrimp.primitives.errors import InputError, MissingExtraError

_CONFIGS = {"study": StudyConfig, "train": TrainConfig, "compare": CompareConfig, "report": ReportConfig}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 a check failed, 2 unusable input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given in (["--version"], ["-V"]):
            print(f"scrimp {__version__}")
            return 0
        config = parse(given)
        return _COMMANDS[type(config)](config)
    except (InputError, MissingExtraError) as error:
        print(f"scrimp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scrimp: interrupted", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> Any:
    """The job's configuration: defaults, then ``--config FILE`` if given, then the flags.

    Raises:
        InputError: the file does not fit the job.
        SystemExit: the flags do not fit (code 2), or help was asked for (code 0).
    """
    arguments, file = _take_config_file(arguments)
    defaults: dict[str, Any] = {}
    if file is not None:
        if not arguments or arguments[0] not in _CONFIGS:
            raise InputError(
                f"a job before --config, one of {', '.join(_CONFIGS)}", "none", "write: scrimp study --config FILE"
            )
        defaults[arguments[0]] = _from_file(_CONFIGS[arguments[0]], file)
    commands: Any = functools.reduce(
        operator.or_, (_subcommand(name, config, defaults.get(name)) for name, config in _CONFIGS.items())
    )
    return tyro.cli(
        commands,
        config=(tyro.conf.OmitArgPrefixes,),
        prog="scrimp",
        description="Deep learning on a fraction of the usual compute, with the receipt.",
        args=arguments,
    )


def _subcommand(name: str, config: type, default: Any) -> Any:
    if default is None:
        return Annotated[config, tyro.conf.subcommand(name, description=config.__doc__)]
    return Annotated[config, tyro.conf.subcommand(name, description=config.__doc__, default=default)]


def _take_config_file(arguments: list[str]) -> tuple[list[str], Path | None]:
    for place, word in enumerate(arguments):
        if word.startswith("--config="):
            return arguments[:place] + arguments[place + 1 :], Path(word.partition("=")[2])
        if word == "--config":
            if place + 1 == len(arguments):
                raise InputError("a file after --config", "none", "write: --config FILE")
            return arguments[:place] + arguments[place + 2 :], Path(arguments[place + 1])
    return arguments, None


def _from_file(config: type, file: Path) -> Any:
    """A configuration from YAML: a mapping of settings, or the config.yaml of a run folder."""
    from scrimp.jobs.folder import read_yaml

    content = read_yaml(file)
    settings = content.get("config", content)
    known = {item.name: item for item in dataclasses.fields(config)}
    strangers = sorted(set(settings) - set(known))
    if strangers:
        raise InputError(f"settings of {config.__name__}", f"{strangers[0]} in {file}", "see scrimp JOB --help")
    return config(**{key: _cast(value, str(known[key].type)) for key, value in settings.items()})


def _cast(value: Any, kind: str) -> Any:
    if isinstance(value, list):
        return tuple(Path(item) if "Path" in kind else item for item in value)
    return Path(value) if "Path" in kind and isinstance(value, str) else value


def _study(config: StudyConfig) -> int:
    from scrimp.jobs.folder import REPORT
    from scrimp.jobs.study import study

    folder, receipts = _guard(lambda: study(config), "study")
    _show(receipts, config.json)
    _say(f"report: {folder / REPORT}", config.json)
    return 0


def _train(config: TrainConfig) -> int:
    from scrimp.jobs.train import train

    receipt = _guard(lambda: train(config), "train")
    _show([receipt], config.json)
    return 0


def _report(config: ReportConfig) -> int:
    from scrimp.jobs.report import report

    path, receipts = report(config)
    _show(receipts, config.json)
    _say(f"report: {path}", config.json)
    return 0


def _compare(config: CompareConfig) -> int:
    from scrimp.jobs.compare import compare

    return compare(config)


def _guard(job: Callable[[], Any], name: str) -> Any:
    from scrimp.jobs.interrupt import Interrupted

    try:
        return job()
    except Interrupted as error:
        _say("stopped; the checkpoint is written. Go on with the same command and --resume", False)
        raise KeyboardInterrupt from error


def _show(receipts: list[Any], as_json: bool) -> None:
    """The table, or the receipts as JSON; from the first process only."""
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        print(json.dumps([receipt.to_dict() for receipt in receipts], indent=2))
        return
    from rich.console import Console

    from scrimp.report import render_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a pipe or a file has no width to fit
    console.print(render_table(receipts, width=console.width))


def _say(line: str, quiet: bool) -> None:
    if not quiet and not int(os.environ.get("RANK", "0")):
        print(line, file=sys.stderr)


_COMMANDS: dict[type, Callable[[Any], int]] = {
    StudyConfig: _study,
    TrainConfig: _train,
    ReportConfig: _report,
    CompareConfig: _compare,
}
