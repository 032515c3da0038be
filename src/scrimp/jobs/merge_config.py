"""What a person can ask of `scrimp merge`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from scrimp.jobs.config import JobConfig


@dataclass(frozen=True, kw_only=True)
class MergeConfig(JobConfig):
    """Add an adapter's change to the weights of its model: one ordinary model, as fast as before.

    Checks on a batch that the merged model answers as the adapted one, and says the largest difference. ``resume`` is
    taken and changes nothing.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The model that was adapted, named as for `scrimp adapt`."""
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """Run folder of `scrimp adapt`, or the adapter.safetensors in it."""
    out: Path | None = None
    """A .safetensors file for an image model, a folder for a transformers model; by default `merged.safetensors` or
    `merged` beside the adapter."""
    pretrained: bool = False
    """MODEL is a timm name: its pretrained weights."""
    weights: Path | None = None
    """MODEL is a timm name: these weights (.safetensors)."""
