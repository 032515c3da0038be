"""What a person can ask of `scrimp denoise sample`; loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

AUTO = "auto"
NONE = "none"
_EVERY = re.compile(r"every:([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class DenoiseSampleConfig(JobConfig):
    """Sample from a diffusion model: solver, steps and reuse between steps as asked, or the cheapest that are as good.

    What is left on auto is tried out on the first images: the cheapest setting is taken whose images are as near the
    model's own 100-step samples, from the same noise, as those of 50 plain steps.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of scrimp denoise train or distill, folder of a diffusers pipeline, or (online) its hub id."""
    count: int = 64
    """Images to generate."""
    batch: int = 64
    """Images generated side by side."""
    steps: int | None = None
    """Steps of the solver; by default they are tried out."""
    solver: str = AUTO
    """auto, or ddim, ddpm, dpm++, unipc, deis, heun; for flow-matching models euler, heun, dpm++, unipc."""
    cache: str = AUTO
    """Reuse deep features between steps: none; every:N computes them at every N-th step; a number, such as 0.1,
    computes them anew where the estimated relative error passes it; auto tries these out."""
    depth: int = 1
    """How much of the network runs at every step where deep features are reused; 1 saves the most."""
    extrapolate: bool = True
    """Reuse deep features as the line through the last two computed ones gives them, not as they were: nearer to the
    full network at the same cost."""
    tolerance: float | None = None
    """Largest paired error to the reference samples a setting tried out may have; by default that of the baseline."""
    seconds: float | None = None
    """Time for all images: takes the setting nearest to the reference samples among those that fit."""
    merge: float = 0.0
    """Share of the tokens merged before each self-attention."""
    attention: Literal["softmax", "linear", "clustered"] | None = None
    """Attention inside the network, by default the one it was trained with; another one shows as paired error."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes to generate in turn, by name or number; by default all."""
    guidance: float | None = None
    """Strength of classifier-free guidance: 1 is none; each step then calls the network on twice the images."""
    adapter: Path | None = None
    """Adapter file of scrimp denoise train, attached to the model."""
    prompt: str | None = None
    """Text, for pipelines that take one."""
    like: Path | None = None
    """Run folder of an earlier scrimp denoise sample of this model: its setting and calibration, nothing tried out."""
    pilot: int = 16
    """Images on which settings are tried and compared with the baseline and the reference; 0: no comparison."""
    calibrate: int = 20
    """Images on which the error estimate of an error-controlled cache is calibrated (at least 19); 0: it is not."""
    baseline_steps: int = 50
    """Steps of the baseline, plain DDIM (Euler for flow-matching models)."""
    reference_steps: int = 100
    """Steps of the reference samples."""
    save: bool = False
    """Also write each image as a PNG, into the folder images."""

    # What starting a job asks of every configuration and what is no choice here.
    precision: ClassVar[str] = "fp32"
    trackers: ClassVar[tuple[str, ...]] = ()

    @property
    def searches(self) -> bool:
        """Whether settings have to be tried out."""
        return self.like is None and (self.solver == AUTO or self.cache == AUTO or self.steps is None)

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range, or settings that exclude each other.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "count": (self.count >= 1, "of at least 1"),
            "batch": (self.batch >= 1, "of at least 1"),
            "steps": (self.steps is None or self.steps >= 1, "of at least 1"),
            "depth": (self.depth >= 1, "of at least 1"),
            "tolerance": (self.tolerance is None or self.tolerance > 0, "above 0"),
            "seconds": (self.seconds is None or self.seconds > 0, "above 0"),
            "merge": (0 <= self.merge < 1, "in [0, 1)"),
            "guidance": (self.guidance is None or self.guidance >= 0, "of at least 0"),
            "pilot": (self.pilot >= 0, "of at least 0"),
            "calibrate": (self.calibrate == 0 or self.calibrate >= 19, "of at least 19, or 0"),
            "baseline_steps": (self.baseline_steps >= 1, "of at least 1"),
            "reference_steps": (self.reference_steps > self.baseline_steps, "above --baseline-steps"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        parse_cache(self.cache)
        self._check_pilot()

    def _check_pilot(self) -> None:
        if self.like is not None and (self.solver != AUTO or self.cache != AUTO or self.steps is not None):
            raise InputError("--like alone", "--like with --solver, --steps or --cache", "drop one of the two")
        given = next((name for name in ("tolerance", "seconds") if getattr(self, name) is not None), None)
        if given is not None and not self.searches:
            raise InputError(
                f"something for --{given} to choose from", "solver, steps and cache all given", f"drop --{given} or one"
            )
        if self.searches and self.pilot == 0:
            raise InputError(
                "--pilot of at least 1 to try settings out", "0", "or give --solver, --steps and --cache all three"
            )


def parse_cache(text: str) -> str | int | float:
    """``auto``, ``none``, N of ``every:N``, or a tolerance.

    Raises:
        InputError: none of these.
    """
    if text in (AUTO, NONE):
        return text
    if found := _EVERY.fullmatch(text):
        return int(found[1])
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = -1.0
    if not 0 < tolerance < float("inf"):
        raise InputError("--cache none, auto, every:N or a tolerance above 0", repr(text), "such as --cache 0.1")
    return tolerance
