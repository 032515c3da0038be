"""Ways in which attention sampling might be wrong, and the finding that must say so."""

from __future__ import annotations

import torch

from scrimp.select import Locations, expected_features, sample_locations, top_locations


def parts(attention, selection):
    """Drawn attentions and what each step drew from, [batch, budget]."""
    drawn = attention.gather(1, selection.indices)
    return drawn, 1 - (drawn.cumsum(1) - drawn)


def steps(attention, selection, features):
    """Each step's estimate without replacement, [batch, budget, dim]."""
    drawn, left = (item.unsqueeze(2) for item in parts(attention, selection))
    return (drawn * features).cumsum(1) - drawn * features + left * features


def published(attention, selection, features, *, control):
    """The old library's gradient: it adds earlier features where it should add later ones."""
    if selection.replacement:
        return expected_features(attention, selection, features, control=control)
    drawn, left = (item.unsqueeze(2).detach() for item in parts(attention, selection))
    count = torch.arange(features.shape[1]).view(1, -1, 1)
    slope = steps(attention, selection, features).detach() * left / drawn
    slope = (slope + features.detach().cumsum(1) - features.detach() * (count + 1)) / features.shape[1]
    moved = attention.gather(1, selection.indices).unsqueeze(2) - drawn
    return expected_features(attention.detach(), selection, features) + (slope * moved).sum(1)


def own_mass_forgotten(attention, selection, features, *, control):
    """A port's fault: towards the features, a step's own location is taken to be gone already."""
    exact = expected_features(attention, selection, features.detach(), control=control)
    drawn, left = (item.unsqueeze(2).detach() for item in parts(attention, selection))
    after = torch.arange(features.shape[1] - 1, -1, -1).view(1, -1, 1)
    other = ((left - drawn + after * drawn) / features.shape[1] * features).sum(1)
    return exact + other - other.detach()


def plain_mean(attention, selection, features, *, control):
    return features.mean(1) + 0 * attention.sum()


def own_estimate_as_baseline(attention, selection, features, *, control):
    """Takes the whole estimate off, each step's own part of it included."""
    if not control:
        return expected_features(attention, selection, features, control=False)
    whole = expected_features(attention.detach(), selection, features.detach())
    return expected_features(attention, selection, features - whole.unsqueeze(1), control=False) + whole


def never_controlled(attention, selection, features, *, control):
    return expected_features(attention, selection, features, control=False)


def full_score(attention, selection, features, *, control):
    """Unbiased too, by the probability of the whole sample, and no better than drawing with replacement."""
    if selection.replacement:
        return expected_features(attention, selection, features, control=control)
    drawn, left = parts(attention, selection)
    chances = (drawn / left).log().sum(1, keepdim=True)
    estimate = steps(attention, selection, features).mean(1)
    return estimate + estimate.detach() * (chances - chances.detach())


def always_again(attention, budget, *, replacement, generator):
    return sample_locations(attention, budget, replacement=True, generator=generator)


def never_again(attention, budget, *, replacement, generator):
    return sample_locations(attention, budget, replacement=False, generator=generator)


def the_largest(attention, budget, *, replacement, generator):
    return top_locations(attention, budget)


def sorted_draws(attention, budget, *, replacement, generator):
    """The right sets in the wrong order."""
    chosen = sample_locations(attention, budget, replacement=replacement, generator=generator)
    return Locations(chosen.indices.sort(1).values, chosen.weights, replacement)


NAME = "attention-sampling"
BROKEN_SAMPLING = [
    (NAME, {"estimate": published}, "without replacement: gradient of attention"),
    (NAME, {"estimate": published}, "without replacement, control variate: gradient of attention"),
    (NAME, {"estimate": own_mass_forgotten}, "without replacement: gradient of features"),
    (NAME, {"estimate": own_mass_forgotten}, "with replacement: gradient of features"),
    (NAME, {"estimate": plain_mean}, "without replacement: value"),
    (NAME, {"estimate": plain_mean}, "with replacement: gradient of attention"),
    (NAME, {"estimate": own_estimate_as_baseline}, "without replacement, control variate: gradient of attention"),
    (NAME, {"estimate": own_estimate_as_baseline}, "with replacement, control variate: gradient of attention"),
    (NAME, {"estimate": never_controlled}, "variance that the control variate leaves"),
    (NAME, {"estimate": full_score}, "variance without replacement over that with"),
    (NAME, {"estimate": full_score}, "the same with the control variate"),
    (NAME, {"sample": always_again}, "without replacement: frequencies"),
    (NAME, {"sample": never_again}, "with replacement: frequencies"),
    (NAME, {"sample": the_largest}, "without replacement: frequencies"),
    (NAME, {"sample": sorted_draws}, "without replacement: frequencies"),
]
