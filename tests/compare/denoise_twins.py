"""Ways in which training and sampling of diffusion might be wrong, and the finding that must say so."""

from __future__ import annotations

from dataclasses import replace

import torch

from scrimp.denoise import Draw, ImportanceLevels, Process, every, gradient_bound, min_snr, process_of, reuse


class Weightless(ImportanceLevels):
    def draw(self, count, *, generator):
        index = super().draw(count, generator=generator).index
        return Draw(index, torch.ones(count))


class Repeating(ImportanceLevels):
    """A batch is its least noisy level over and over; the weights are that level's."""

    def draw(self, count, *, generator):
        drawn = super().draw(count, generator=generator)
        first = drawn.index.min()
        weight = 1 / (self.levels * self.probabilities()[first])
        return Draw(torch.full_like(drawn.index, int(first)), torch.full_like(drawn.weight, float(weight)))


class Boastful(ImportanceLevels):
    """Promises what squared scores would bring."""

    def variance_ratio(self):
        ratio = super().variance_ratio()
        return None if ratio is None else ratio**2


class Mixed(Process):
    """Variance in the place of its root."""

    def noisy(self, clean, noise, index):
        return super().noisy(clean, noise * self.sigma[index][:, None], index)


def mixed(scheduler):
    own = process_of(scheduler)
    return Mixed(own.prediction, own.signal, own.sigma, own.given)


class Turned(Process):
    """v with its signs turned."""

    def target(self, clean, noise, index):
        wanted = super().target(clean, noise, index)
        return -wanted if self.prediction == "v" else wanted


def turned(scheduler):
    own = process_of(scheduler)
    return Turned(own.prediction, own.signal, own.sigma, own.given)


def backwards(losses):
    """The easier a sample, the larger its score."""
    return 1 / gradient_bound(losses)


def of_noise_alone(snr, prediction):
    """The weights of one prediction for all of them."""
    return min_snr(snr, "epsilon")


def late(model, rule, *, depth):
    """Refreshes one step later than it was told."""
    return reuse(model, every(rule.steps + 1), depth=depth)


def answers_kept(model, rule, *, depth):
    """Keeps what the deep blocks gave, not what they added."""
    handle = reuse(model, rule, depth=depth)
    handle.plan = replace(handle.plan, residual=False)
    return handle


def deeper(model, rule, *, depth):
    """Runs one block more at each step than it was told."""
    return reuse(model, rule, depth=depth + 1)


BROKEN_DENOISE = [
    ("denoise", {"sampler": Weightless}, "against all levels"),
    ("denoise", {"sampler": Repeating}, "standard errors off"),
    ("denoise", {"bound": backwards}, "gradient noise"),
    ("denoise", {"sampler": Boastful}, "variance ratio"),
    ("denoise", {"process": mixed}, "betas step by step"),
    ("denoise", {"process": turned}, "perfect output"),
    ("denoise", {"weigh": of_noise_alone}, "one wrong image"),
    ("denoise", {"attach": late}, "refresh at every step"),
    ("denoise", {"attach": answers_kept}, "kept by hand"),
    ("denoise", {"attach": deeper}, "FLOPs of reused"),
]
