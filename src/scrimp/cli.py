"""The command line: one verb a job, made from the jobs' dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import operator
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scrimp import __version__
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.audit_config import AuditConfig
from scrimp.jobs.config import CompareConfig, ReportConfig, StudyConfig, TrainConfig
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_sample_config import DenoiseSampleConfig
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.label_config import LabelConfig
from scrimp.jobs.merge_config import MergeConfig
from scrimp.jobs.pixels_config import PixelsSampleConfig, PixelsTrainConfig
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.probe_config import ProbeConfig
from scrimp.jobs.splats_commands import SPLATS, SPLATS_COMMANDS
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.terminal import console, guard, say, show
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.zoom_config import ZoomPredictConfig, ZoomTrainConfig
from scrimp.primitives.errors import InputError, MissingExtraError

_CONFIGS: dict[str, type] = {
    "study": StudyConfig,
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "distill": DistillConfig,
    "probe": ProbeConfig,
    "adapt": AdaptConfig,
    "label": LabelConfig,
    "merge": MergeConfig,
    "zoom train": ZoomTrainConfig,
    "zoom predict": ZoomPredictConfig,
    "swap": SwapConfig,
    "thin": ThinConfig,
    "audit": AuditConfig,
    "pixels train": PixelsTrainConfig,
    "pixels sample": PixelsSampleConfig,
    "denoise train": DenoiseTrainConfig,
    "denoise sample": DenoiseSampleConfig,
    "denoise distill": DenoiseDistillConfig,
    **{f"splats {verb}": config for verb, config in SPLATS.items()},
    "compare": CompareConfig,
    "report": ReportConfig,
}
_GROUPS = {
    "denoise": "Diffusion models of images: train one, sample from it at lower cost, distil it to few steps.",
    "pixels": "Images pixel by pixel: train a model of them, sample from it.",
    "splats": "3-D Gaussian splat scenes: train, make small, convert, draw and show them.",
    "zoom": "Images too large to process whole: train on a few patches of each, predict.",
}


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
        job = next((" ".join(arguments[:words]) for words in (1, 2) if " ".join(arguments[:words]) in _CONFIGS), None)
        if job is None:
            raise InputError(
                f"a job before --config, one of {', '.join(_CONFIGS)}", "none", "write: scrimp study --config FILE"
            )
        defaults[job] = _from_file(_CONFIGS[job], file)
    return tyro.cli(
        _commands(defaults),
        config=(tyro.conf.OmitArgPrefixes,),
        prog="scrimp",
        description="Deep learning on a fraction of the usual compute, with the receipt.",
        args=arguments,
    )


def _commands(defaults: dict[str, Any]) -> Any:
    """All jobs as one type for tyro; those of two words stand under their first one."""
    found: dict[str, Any] = {}
    for name, config in _CONFIGS.items():
        group, _, verb = name.rpartition(" ")
        command = _subcommand(verb, config, defaults.get(name))
        found[group or name] = found[group] | command if group in found else command
    for group, about in _GROUPS.items():
        found[group] = Annotated[found[group], tyro.conf.subcommand(group, description=about)]
    return functools.reduce(operator.or_, found.values())


def _subcommand(name: str, config: type, default: Any) -> Any:
    if default is None:
        return Annotated[config, tyro.conf.subcommand(name, description=inspect.getdoc(config))]
    return Annotated[config, tyro.conf.subcommand(name, description=inspect.getdoc(config), default=default)]


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
    nothing = dataclasses.MISSING
    # What has no default is asked of the flags, not of the file alone.
    asked = {key: tyro.MISSING for key, item in known.items() if item.default is item.default_factory is nothing}
    return config(**asked | {key: _cast(value, str(known[key].type)) for key, value in settings.items()})


def _cast(value: Any, kind: str) -> Any:
    if isinstance(value, list):
        return tuple(Path(item) if "Path" in kind else item for item in value)
    return Path(value) if "Path" in kind and isinstance(value, str) else value


def _study(config: StudyConfig) -> int:
    from scrimp.jobs.folder import REPORT
    from scrimp.jobs.study import study

    folder, receipts = guard(lambda: study(config), "study")
    show(receipts, config.json)
    say(f"report: {folder / REPORT}", config.json)
    return 0


def _train(config: TrainConfig) -> int:
    from scrimp.jobs.train import train

    receipt = guard(lambda: train(config), "train")
    show([receipt], config.json)
    return 0


def _pretrain(config: PretrainConfig) -> int:
    from scrimp.jobs.pretrain import pretrain

    show([guard(lambda: pretrain(config), "pretrain")], config.json)
    return 0


def _distill(config: DistillConfig) -> int:
    from scrimp.jobs.distill import distill

    show([guard(lambda: distill(config), "distill")], config.json)
    return 0


def _probe(config: ProbeConfig) -> int:
    from scrimp.jobs.probe import probe

    receipt = guard(lambda: probe(config), "probe")
    if config.json:
        show([receipt], as_json=True)
        return 0
    from scrimp.jobs.probe_table import probe_table

    console().print(probe_table(receipt))
    return 0


def _adapt(config: AdaptConfig) -> int:
    from scrimp.jobs.adapt import adapt

    show(guard(lambda: adapt(config), "adapt"), config.json)
    return 0


def _label(config: LabelConfig) -> int:
    from scrimp.jobs.folder import REPORT
    from scrimp.jobs.label import label

    done = guard(lambda: label(config), "label")
    show(done.receipts, config.json)
    say(f"labels: {done.labels}", config.json)
    say(f"report: {done.folder / REPORT}", config.json)
    return 0


def _merge(config: MergeConfig) -> int:
    from scrimp.jobs.merge import merge

    done = merge(config)
    if config.json:
        print(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}, indent=2))
        return 0
    say(f"merged {done.weights} weights into {done.path}", quiet=False)
    say(f"largest difference of a batch's outputs: {done.difference:.2g} of {done.largest:.3g}", quiet=False)
    return 0


def _zoom_train(config: ZoomTrainConfig) -> int:
    from scrimp.jobs.zoom import zoom_train

    show([guard(lambda: zoom_train(config), "zoom train")], config.json)
    return 0


def _zoom_predict(config: ZoomPredictConfig) -> int:
    from scrimp.jobs.zoom_predict import zoom_predict

    show([guard(lambda: zoom_predict(config), "zoom predict")], config.json)
    return 0


def _swap(config: SwapConfig) -> int:
    from scrimp.jobs.folder import REPORT
    from scrimp.jobs.swap import swap

    swapped = guard(lambda: swap(config), "swap")
    if config.json:
        show(swapped.receipts, as_json=True)
        return 0
    from scrimp.jobs.swap_table import swap_table

    console().print(swap_table(swapped.receipts, config.tolerance))
    say(f"report: {swapped.folder / REPORT}", config.json)
    return 0


def _thin(config: ThinConfig) -> int:
    from scrimp.jobs.folder import REPORT
    from scrimp.jobs.thin import thin

    done = guard(lambda: thin(config), "thin")
    if config.json or int(os.environ.get("RANK", "0")):
        show(done.receipts, as_json=True)
        return 0
    from scrimp.jobs.thin_table import thin_table

    console().print(thin_table(done.receipts))
    say(f"report: {done.folder / REPORT}", config.json)
    return 0


def _audit(config: AuditConfig) -> int:
    from scrimp.jobs.audit import audit

    done = guard(lambda: audit(config), "audit")
    if config.json:
        show(done.receipts, as_json=True)
        return 0
    from scrimp.jobs.audit_page import PAGE, audit_table

    console().print(audit_table(done.content))
    say(f"report: {done.folder / PAGE}", config.json)
    return 0


def _pixels_train(config: PixelsTrainConfig) -> int:
    from scrimp.jobs.pixels import pixels_train

    show([guard(lambda: pixels_train(config), "pixels train")], config.json)
    return 0


def _pixels_sample(config: PixelsSampleConfig) -> int:
    from scrimp.jobs.pixels_sample import pixels_sample

    show([guard(lambda: pixels_sample(config), "pixels sample")], config.json)
    return 0


def _denoise_train(config: DenoiseTrainConfig) -> int:
    from scrimp.jobs.denoise import denoise_train

    show([guard(lambda: denoise_train(config), "denoise train")], config.json)
    return 0


def _denoise_sample(config: DenoiseSampleConfig) -> int:
    from scrimp.jobs.denoise_sample import denoise_sample

    show([guard(lambda: denoise_sample(config), "denoise sample")], config.json)
    return 0


def _denoise_distill(config: DenoiseDistillConfig) -> int:
    from scrimp.jobs.denoise_distill import denoise_distill

    show([guard(lambda: denoise_distill(config), "denoise distill")], config.json)
    return 0


def _report(config: ReportConfig) -> int:
    from scrimp.jobs.report import report

    path, receipts = report(config)
    show(receipts, config.json)
    say(f"report: {path}", config.json)
    return 0


def _compare(config: CompareConfig) -> int:
    from scrimp.jobs.compare import compare

    return compare(config)


_COMMANDS: dict[type, Callable[[Any], int]] = {
    StudyConfig: _study,
    TrainConfig: _train,
    PretrainConfig: _pretrain,
    DistillConfig: _distill,
    ProbeConfig: _probe,
    AdaptConfig: _adapt,
    LabelConfig: _label,
    MergeConfig: _merge,
    ZoomTrainConfig: _zoom_train,
    ZoomPredictConfig: _zoom_predict,
    SwapConfig: _swap,
    ThinConfig: _thin,
    AuditConfig: _audit,
    PixelsTrainConfig: _pixels_train,
    PixelsSampleConfig: _pixels_sample,
    DenoiseTrainConfig: _denoise_train,
    DenoiseSampleConfig: _denoise_sample,
    DenoiseDistillConfig: _denoise_distill,
    **SPLATS_COMMANDS,
    ReportConfig: _report,
    CompareConfig: _compare,
}
