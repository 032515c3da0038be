"""Optimisers and the learning rate, a function of the share of the budget that is spent."""

from __future__ import annotations

import math

import torch
from torch import nn

from scrimp.jobs.config import ModelConfig


def make_optimizer(model: nn.Module, config: ModelConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW or RAdam; no decay on biases and normalisation, the others' decoupled."""
    decayed = [item for item in model.parameters() if item.requires_grad and item.ndim > 1]
    others = [item for item in model.parameters() if item.requires_grad and item.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=peak_rate(config))
    if config.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=peak_rate(config), decoupled_weight_decay=True)
    return torch.optim.SGD(groups, lr=peak_rate(config), momentum=0.9, nesterov=True)


def peak_rate(config: ModelConfig) -> float:
    """The learning rate asked for, or the optimiser's usual one."""
    return config.lr if config.lr is not None else {"sgd": 0.05, "adamw": 1e-3, "radam": 1e-3}[config.optimizer]


def schedule(spent: float, config: ModelConfig) -> float:
    """Learning rate when a share ``spent`` (0 to 1) of the budget is gone: linear warm-up, then cosine to 0."""
    if spent < config.warmup:
        return peak_rate(config) * (spent / config.warmup * 0.99 + 0.01)
    rest = min(1.0, (spent - config.warmup) / max(1e-12, 1 - config.warmup))
    return peak_rate(config) * 0.5 * (1 + math.cos(math.pi * rest))
