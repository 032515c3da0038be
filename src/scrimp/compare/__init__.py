"""Every method beside its reference (the same result, computed slowly) and its baseline (what one would use instead).

One explicit list. A method joins by a module with ``check`` and ``sides`` and one row here.
"""

from __future__ import annotations

from scrimp.compare import (
    active,
    adapt,
    adaptive,
    attack,
    attention,
    attention_sampling,
    denoise,
    flops,
    history,
    importance,
    presample,
    prune,
    represent,
    splats,
)
from scrimp.compare.comparison import Comparison, Finding, Sides
from scrimp.primitives.errors import InputError

__all__ = ["COMPARISONS", "Comparison", "Finding", "Sides", "find_comparisons"]

COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        name="importance-sampling",
        method="importance sampling",
        reference="exact per-sample gradients",
        baseline="uniform sampling",
        check=importance.check,
        sides=importance.sides,
    ),
    Comparison(
        name="presample",
        method="presampling, gate shut",
        reference="Algorithm 1 term by term",
        baseline="plain loop",
        check=presample.check,
        sides=presample.sides,
    ),
    Comparison(
        name="history",
        method="history, gate shut",
        reference="counts of budget * p",
        baseline="plain loop",
        check=history.check,
        sides=history.sides,
    ),
    Comparison(
        name="prune",
        method="pruning",
        reference="all outcomes enumerated",
        baseline="plain loop",
        check=prune.check,
        sides=prune.sides,
    ),
    Comparison(
        name="attention-sampling",
        method="attention sampling",
        reference="expectation, all locations",
        baseline="whole image",
        check=attention_sampling.check,
        sides=attention_sampling.sides,
    ),
    Comparison(
        name="linear",
        method="linear attention",
        reference="N x N form",
        baseline="softmax attention",
        check=attention.check_linear,
        sides=attention.sides_linear,
    ),
    Comparison(
        name="recurrent",
        method="linear, token by token",
        reference="parallel form",
        baseline="cached softmax",
        check=attention.check_recurrent,
        sides=attention.sides_recurrent,
    ),
    Comparison(
        name="clustered",
        method="clustered attention",
        reference="query by query",
        baseline="softmax attention",
        check=attention.check_clustered,
        sides=attention.sides_clustered,
    ),
    Comparison(
        name="improved-clustered",
        method="improved clustered",
        reference="query by query",
        baseline="softmax attention",
        check=attention.check_improved,
        sides=attention.sides_improved,
    ),
    Comparison(
        name="mean-shift",
        method="mean shift",
        reference="loop over memory, neighbours",
        baseline="BYOL, symmetric",
        check=represent.check_mean_shift,
        sides=represent.sides_mean_shift,
    ),
    Comparison(
        name="constrained-mean-shift",
        method="constrained mean shift",
        reference="loop over memory, neighbours",
        baseline="BYOL, symmetric",
        check=represent.check_constrained,
        sides=represent.sides_constrained,
    ),
    Comparison(
        name="regression",
        method="regression onto features",
        reference="formula in a loop",
        baseline="logit distillation",
        check=represent.check_regression,
        sides=represent.sides_regression,
    ),
    Comparison(
        name="nola",
        method="NOLA",
        reference="bases one by one",
        baseline="LoRA of the same rank",
        check=adapt.check,
        sides=adapt.sides,
    ),
    Comparison(
        name="token-merging",
        method="token merging",
        reference="edges, groups one by one",
        baseline="same ViT, all tokens",
        check=adaptive.check_merging,
        sides=adaptive.sides_merging,
    ),
    Comparison(
        name="keep-tokens",
        method="keeping tokens",
        reference="sorted lists",
        baseline="same ViT, all tokens",
        check=adaptive.check_keeping,
        sides=adaptive.sides_keeping,
    ),
    Comparison(
        name="token-sampling",
        method="token sampling",
        reference="nearest of all values",
        baseline="same ViT, all tokens",
        check=adaptive.check_sampling,
        sides=adaptive.sides_sampling,
    ),
    Comparison(
        name="token-halting",
        method="token halting",
        reference="scores token by token",
        baseline="same ViT, all tokens",
        check=adaptive.check_halting,
        sides=adaptive.sides_halting,
    ),
    Comparison(
        name="gating",
        method="gating",
        reference="gates times whole layers",
        baseline="same ViT, all tokens",
        check=adaptive.check_gating,
        sides=adaptive.sides_gating,
    ),
    Comparison(
        name="attack",
        method="universal patch",
        reference="finite differences, by hand",
        baseline="random patch",
        check=attack.check,
        sides=attack.sides,
    ),
    Comparison(
        name="active-labels",
        method="images to label",
        reference="all sets of ten points",
        baseline="random labels",
        check=active.check,
        sides=active.sides,
    ),
    Comparison(
        name="denoise",
        method="noise levels and reuse",
        reference="all levels, every step",
        baseline="uniform noise levels",
        check=denoise.check,
        sides=denoise.sides,
    ),
    Comparison(
        name="splat-codec",
        method="splat container",
        reference="stated bounds, all codes",
        baseline="plain .ply",
        check=splats.check,
        sides=splats.sides,
    ),
    Comparison(
        name="flop-counter",
        method="FLOP counter",
        reference="dimensions of ViT-Ti/16",
        baseline="torch's FLOP counter",
        check=flops.check,
        sides=flops.sides,
    ),
)


def find_comparisons(name: str) -> list[Comparison]:
    """The comparison of this name, or all of them for ``"all"``.

    Raises:
        InputError: there is none of this name.
    """
    found = [row for row in COMPARISONS if name in (row.name, "all")]
    if not found:
        names = ", ".join(row.name for row in COMPARISONS)
        raise InputError(f"a comparison out of: {names}, all", name, "see scrimp compare --list")
    return found
