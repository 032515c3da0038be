"""Ways in which a choice of images to label might be wrong, and the finding that must say so."""

from __future__ import annotations

import torch

from scrimp.select import (
    Selection,
    badge,
    coefficient_determinants,
    k_centre,
    margin,
    nearest_to_centres,
    typicality,
)

NONE = torch.zeros(0, dtype=torch.int64)


def blind_to_labels(strategy):
    """Chooses as if nothing had a label."""

    def choose(features, probabilities, labelled, budget, *, generator):
        return strategy(features, probabilities, NONE, budget, generator=generator)

    return choose


def backwards(strategy):
    """Orders by the opposite."""

    def choose(features, probabilities, labelled, budget, *, generator):
        every = strategy(features, probabilities, labelled, len(features), generator=generator).indices.flip(0)
        return Selection(every[:budget], torch.ones(len(every[:budget])))

    return choose


def the_same_one(features, probabilities, labelled, budget, *, generator):
    found = typicality(features, probabilities, labelled, budget, generator=generator)
    return Selection(found.indices[:1].repeat(budget), found.weights)


def first_rows(features, probabilities, labelled, budget, *, generator):
    left = [i for i in range(len(features)) if i not in labelled.tolist()][:budget]
    return Selection(torch.tensor(left, dtype=torch.int64), torch.ones(len(left)))


def nearest_first(features, probabilities, labelled, budget, *, generator):
    """Points side by side, where they should be far apart."""
    gaps = torch.cdist(features, features)
    found = gaps[gaps.amax(1).argmax()].argsort()[:budget]
    return Selection(found, torch.ones(len(found)))


def by_features_alone(features, probabilities, labelled, budget, *, generator):
    """Distances of the features, not of gradients."""
    same = torch.zeros_like(probabilities).index_fill(1, torch.tensor([0]), 0.5)
    same[:, 1] = 0.5
    return badge(features, same, labelled, budget, generator=generator)


# One check of many broken strategies costs as much as of one.
MANY = {
    "centres": typicality,
    "k_centre": blind_to_labels(k_centre),
    "typicality": nearest_to_centres,
    "coverage": k_centre,
    "margin": backwards(margin),
    "entropy": margin,
    "determinants": backwards(coefficient_determinants),
    "badge": by_features_alone,
    "random": first_rows,
}
BROKEN_ACTIVE = [
    *(("active-labels", MANY, f"{name.replace('_', '-')}: c") for name in MANY),
    ("active-labels", {"k_centre": nearest_first}, "k-centre: radius"),
    ("active-labels", {"typicality": the_same_one}, "all: choices"),
]
