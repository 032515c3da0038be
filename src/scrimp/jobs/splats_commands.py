"""The commands `scrimp splats ...`: what each is asked, and how it answers; loads no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from scrimp.jobs.splats_config import (
    SplatsCompareConfig,
    SplatsCompressConfig,
    SplatsDecompressConfig,
    SplatsFitConfig,
    SplatsInfoConfig,
    SplatsRenderConfig,
    SplatsViewConfig,
)
from scrimp.jobs.terminal import console, guard, say, show

PAGE = "view.html"
"""Of the scene, in a run folder."""


def _compress(config: SplatsCompressConfig) -> int:
    from scrimp.jobs.splats_compress import splats_compress

    done = splats_compress(config)
    show(done.receipts, config.json)
    say(f"scene: {done.path}", config.json)
    return 0


def _fit(config: SplatsFitConfig) -> int:
    from scrimp.jobs.splats_fit import splats_fit

    done = guard(lambda: splats_fit(config), "splats fit")
    show(done.receipts, config.json)
    say(f"scene: {done.path}", config.json)
    say(f"page: {done.path.parent / PAGE}", config.json)
    return 0


def _decompress(config: SplatsDecompressConfig) -> int:
    from scrimp.jobs.splats_files import splats_decompress

    done = splats_decompress(config)
    if config.json:
        print(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}, indent=2))
    say(f"{done.gaussians} Gaussians in {done.bytes_after} bytes: {done.path}", config.json)
    return 0


def _info(config: SplatsInfoConfig) -> int:
    from scrimp.jobs.splats_info import info_table, splats_info

    info = splats_info(config)
    if config.json:
        print(json.dumps(dataclasses.asdict(info), indent=2))
    else:
        console().print(info_table(info))
    return 0


def _render(config: SplatsRenderConfig) -> int:
    from scrimp.jobs.splats_render import splats_render

    paths = guard(lambda: splats_render(config), "splats render")
    if config.json:
        print(json.dumps([str(path) for path in paths], indent=2))
    say(f"{len(paths)} pictures: {paths[0].parent}", config.json)
    return 0


def _view(config: SplatsViewConfig) -> int:
    from scrimp.jobs.splats_pages import splats_view

    say(f"page: {splats_view(config)}", quiet=False)
    return 0


def _compare(config: SplatsCompareConfig) -> int:
    from scrimp.jobs.splats_pages import splats_compare

    say(f"page: {splats_compare(config)}", quiet=False)
    return 0


SPLATS: dict[str, type] = {
    "fit": SplatsFitConfig,
    "compress": SplatsCompressConfig,
    "decompress": SplatsDecompressConfig,
    "info": SplatsInfoConfig,
    "render": SplatsRenderConfig,
    "view": SplatsViewConfig,
    "compare": SplatsCompareConfig,
}
"""By the word after ``splats``."""
SPLATS_COMMANDS: dict[type, Callable[[Any], int]] = {
    SplatsFitConfig: _fit,
    SplatsCompressConfig: _compress,
    SplatsDecompressConfig: _decompress,
    SplatsInfoConfig: _info,
    SplatsRenderConfig: _render,
    SplatsViewConfig: _view,
    SplatsCompareConfig: _compare,
}
"""Each returns an exit code."""
