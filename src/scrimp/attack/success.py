"""How far an attack went: the share of the saving it undid, other models it carries over to, batches it poisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.attack.patch import Patch
from scrimp.attack.perturbation import Perturbation
from scrimp.attack.victim import Victim, costs_of, frozen
from scrimp.primitives.errors import InputError


def attack_success(attacked: Tensor, clean: Tensor, full: float) -> float:
    """The share of the saving that an attack undid: (mean attacked - mean clean) / (full - mean clean).

    As Navaneet et al. 2024 (SlowFormer), on means of the FLOPs of each image rather than the FLOPs of a mean token
    count, which are fewer. Not clipped: below 0 the attack made images cheaper; above 1 they cost more than ``full``,
    which is possible where deciding costs something. Exactly 0 for a model whose cost does not depend on the image, and
    0 by definition where nothing is saved to begin with (mean clean >= full).

    Args:
        attacked: costs of the attacked images, [n], n >= 1.
        clean: costs of clean images, [m], m >= 1; not always the same ones.
        full: the dense cost, or the highest that the policy can reach (``victim.full``, ``victim.ceiling``).

    Raises:
        InputError: no costs, or such as are not numbers.
    """
    for name, costs in (("attacked", attacked), ("clean", clean)):
        if costs.ndim != 1 or not len(costs) or not bool(costs.isfinite().all()):
            raise InputError(f"{name} costs [n], n >= 1, finite", str(list(costs.shape)), "measure some images")
    before, after = float(clean.double().mean()), float(attacked.double().mean())
    return 0.0 if before >= full else (after - before) / (full - before)


def transfer(
    attack: Patch | Perturbation,
    victims: Sequence[Victim],
    images: Tensor,
    *,
    generator: torch.Generator | None = None,
    batch: int = 64,
) -> tuple[float, ...]:
    """What an attack does to models that it may not have been made for: `attack_success` against each one's dense cost.

    Args:
        attack: of `universal_patch`, `perturb` or a control.
        victims: to try it on.
        images: [n, channels, height, width], from 0 to 1, n >= 1.
        generator: for a patch without a place; all victims see the same images.
        batch: images at a time.
    """
    attacked = attack.on(images, generator=generator) if isinstance(attack, Patch) else attack.on(images)
    found = []
    for victim in victims:
        with frozen(victim.model):
            after, before = (costs_of(victim.cost, shown, batch=batch) for shown in (attacked, images))
        found.append(attack_success(after, before, victim.full))
    return tuple(found)


@dataclass(frozen=True)
class Poisoning:
    """What one attacked image does to a batch that is padded to its dearest image.

    Attributes:
        own: mean cost of clean images, each by itself.
        clean: expected cost of an image in a clean batch.
        poisoned: the same with one attacked image in the batch.
    """

    own: float
    clean: float
    poisoned: float

    @property
    def factor(self) -> float:
        """By how much one attacked image makes every image of its batch dearer."""
        return self.poisoned / self.clean

    @property
    def padding(self) -> float:
        """By how much padding alone does."""
        return self.clean / self.own


def batch_poisoning(clean: Tensor, attacked: Tensor, batch: int) -> Poisoning:
    """Expected cost of padded batches, with and without one attacked image; over all batches, so nothing is drawn.

    In a batch padded to its longest every image costs what the dearest one does. The expected maximum of ``batch``
    images out of n is a sum over their order: the k-th cheapest is the dearest with probability C(k - 1, batch - 1) /
    C(n, batch).

    Args:
        clean: costs of clean images, [n]; or [n, parts], such as blocks, each of which is padded by itself.
        attacked: of attacked ones, [m] or [m, parts], m >= 1; the result is the mean over which of them is in.
        batch: images of a batch, from 1 to n.

    Raises:
        InputError: costs of other shapes, above 0 not throughout in the mean, or a batch out of range.
    """
    if clean.ndim not in (1, 2) or clean.shape[1:] != attacked.shape[1:] or not len(attacked):
        got = f"{list(clean.shape)} and {list(attacked.shape)}"
        raise InputError("clean and attacked costs [n] and [m], or [n, parts] and [m, parts]", got, "correct them")
    if not 1 <= batch <= len(clean):
        raise InputError(f"a batch from 1 to the {len(clean)} clean images", str(batch), "correct it")
    if not float(clean.double().sum()) > 0:
        raise InputError("clean costs above 0", "none", "measure the model")
    before, after = (costs.double().cpu().reshape(len(costs), -1) for costs in (clean, attacked))
    ranked = before.sort(0).values
    columns = zip(ranked.T.contiguous(), after.T.contiguous(), strict=True)
    parts = [_with_one(known, new, batch) for known, new in columns]
    least = ranked[0]  # what rounds are differences only, so that equal costs give a factor of exactly 1
    whole = float(least.sum() + (_dearest(len(ranked), batch)[:, None] * (ranked - least)).sum())
    return Poisoning(float(before.sum(1).mean()), whole, sum(parts))


def _dearest(count: int, batch: int) -> Tensor:
    """Probability that the k-th cheapest of ``count`` is the dearest of ``batch`` drawn from them, [count]."""
    rank = torch.arange(batch, count + 1, dtype=torch.float64)
    size = torch.tensor(float(batch), dtype=torch.float64)
    logs = torch.lgamma(rank) - torch.lgamma(rank - size + 1)
    return torch.cat([torch.zeros(batch - 1, dtype=torch.float64), logs.softmax(0)])


def _with_one(ranked: Tensor, attacked: Tensor, batch: int) -> float:
    """Expected maximum of an attacked image and ``batch`` - 1 of the ranked clean ones."""
    if batch == 1:
        return float(attacked.mean())
    least = torch.minimum(ranked[0], attacked.min())
    ranked, attacked = ranked - least, attacked - least
    chance = _dearest(len(ranked), batch - 1)
    below = torch.searchsorted(ranked, attacked, right=True)
    under = torch.cat([chance.new_zeros(1), chance.cumsum(0)])
    over = (chance * ranked).flip(0).cumsum(0).flip(0)
    over = torch.cat([over, chance.new_zeros(1)])
    return float(least + (attacked * under[below] + over[below]).mean())
