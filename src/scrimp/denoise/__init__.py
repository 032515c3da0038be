"""Diffusion at lower cost: what to train on, how to weigh it, how to sample with fewer and cheaper steps.

Built on diffusers' models and schedulers; only what they lack is here.
"""

from __future__ import annotations

from scrimp.denoise.calibration import Calibration, Coverage, calibrate, coverage
from scrimp.denoise.flow_map import (
    Velocity,
    as_velocity,
    consistency_loss,
    flow_map_loss,
    on_line,
    pseudo_huber,
    straight_loss,
    u_shaped,
    walk,
)
from scrimp.denoise.merging import Merging, merge_tokens
from scrimp.denoise.partial import TokenDrop, cut
from scrimp.denoise.process import PREDICTIONS, Process, denoising_loss, new_scheduler, process_of
from scrimp.denoise.quality import frechet_distance, paired_error, precision_recall
from scrimp.denoise.reuse import Reuse, reuse
from scrimp.denoise.reuse_rules import Rule, Step, below, every
from scrimp.denoise.solvers import SOLVERS, Solver, baseline, calls, integrate, prediction_of, prepare_, solver_for
from scrimp.denoise.timesteps import (
    Draw,
    ImportanceLevels,
    LevelSampler,
    LogitNormalLevels,
    UniformLevels,
    gradient_bound,
)
from scrimp.denoise.weighting import WEIGHTINGS, Weighting, constant, min_snr, p2

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "WEIGHTINGS",
    "Calibration",
    "Coverage",
    "Draw",
    "ImportanceLevels",
    "LevelSampler",
    "LogitNormalLevels",
    "Merging",
    "Process",
    "Reuse",
    "Rule",
    "Solver",
    "Step",
    "TokenDrop",
    "UniformLevels",
    "Velocity",
    "Weighting",
    "as_velocity",
    "baseline",
    "below",
    "calibrate",
    "calls",
    "consistency_loss",
    "constant",
    "coverage",
    "cut",
    "denoising_loss",
    "every",
    "flow_map_loss",
    "frechet_distance",
    "gradient_bound",
    "integrate",
    "merge_tokens",
    "min_snr",
    "new_scheduler",
    "on_line",
    "p2",
    "paired_error",
    "precision_recall",
    "prediction_of",
    "prepare_",
    "process_of",
    "pseudo_huber",
    "reuse",
    "solver_for",
    "straight_loss",
    "u_shaped",
    "walk",
]
