"""Ways in which an attack might be wrong, and the finding that must say so."""

from __future__ import annotations

from dataclasses import replace

import torch

from scrimp.attack import AdaptiveVictim, Patch, random_patch, universal_patch, victim_of
from scrimp.attack.pixels import paste


def flooring(victim, images, *, size, generator, steps, lr, batch=None):
    """Every step starts from pixels that were rounded down, as in the published code."""
    first = random_patch(images, size=size, generator=generator)
    places = torch.zeros(len(images), 2, dtype=torch.int64)
    pixels, trace = first.pixels.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([pixels], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        shown = images + 0 * pixels.sum() + (paste(images, pixels, places) - images)
        loss = victim.policy_loss(shown).mean()
        trace.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pixels.copy_((pixels.clamp(0, 1) * 255).floor() / 255)
    return Patch(pixels.detach(), (0, 0), tuple(trace))


def forgetful(victim, images, **options):
    """Does not keep what it made, nor the levels."""
    made = universal_patch(victim, images, **options)
    first = random_patch(images, size=options["size"], generator=torch.Generator().manual_seed(0))
    return replace(made, pixels=first.pixels + 0.3 / 255)


def careless(patch, images, *, mean=None, std=None):
    """Writes on the caller's images, and takes them for images from 0 to 1."""
    images.copy_(patch.on(images))
    return images


def summed(model, **options):
    """Losses of an image that hold those of others."""
    victim = victim_of(model, **options)
    policy = victim.surrogate
    return replace(victim, surrogate=lambda seen: policy(seen) + policy(seen).mean())


class Lazy(AdaptiveVictim):
    """Does not look which tokens are gone where their rows are still there."""

    def cost(self, images):
        costs = super().cost(images)
        return costs if self.controller.form == "ragged" else torch.full_like(costs, self.full)


def lazy(model, **options):
    victim = victim_of(model, **options)
    return Lazy(victim.model, victim.controller, victim.ready, victim.surrogate)


BROKEN_ATTACK = [
    ("attack", {"make": flooring}, "AdamW"),
    ("attack", {"make": flooring}, "mean drift"),
    ("attack", {"make": forgetful}, "off the 256"),
    ("attack", {"make": forgetful}, "above the lowest"),
    ("attack", {"show": careless}, "one pixel after"),
    ("attack", {"show": careless}, "the caller's"),
    ("attack", {"target": summed}, "halting, scores"),
    ("attack", {"target": summed}, "sampling, significance"),
    ("attack", {"target": summed}, "gates counted"),
    ("attack", {"target": lazy}, "masked beside ragged"),
]
