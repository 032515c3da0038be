"""Training that knows how its scene will be stored: pictures are drawn of what a reader of the file will find.

The rounding of a format stands between the scene and its pictures, and gradients pass it as if it were not there (the
straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; for splats Navaneet et al. 2024, arXiv 2311.18159). The
codebooks and steps are those of the file itself, so that nothing is lost when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats import codec, codec_harmonics
from scrimp.splats.canonical import canonical, quaternion_product
from scrimp.splats.codec import Settings
from scrimp.splats.container import UNSEEN, encode
from scrimp.splats.optimise import scene_of
from scrimp.splats.scene import Splats


class Quantiser(Protocol):
    """A format's rounding. What it keeps between steps is a row for each Gaussian, and codebooks."""

    @property
    def ready(self) -> bool:
        """Whether `refresh` has seen a scene."""

    def refresh(self, splats: Splats, *, anew: bool) -> None:
        """Before each step: let centres follow their members, and with ``anew`` assign all again."""

    def project(self, splats: Splats) -> Splats:
        """The scene as a reader of `encode`'s file finds it, in its own order; gradients reach ``splats`` unchanged."""

    def encode(self, splats: Splats) -> bytes:
        """The file."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` returned."""


class ContainerQuantiser:
    """The rounding of `scrimp.splats.container`: each Gaussian as finely as it is seen.

    Args:
        settings: of the file, without a palette.
        importance: of a scene, [n] float64, how much errors in each Gaussian show; held fixed between assignments.

    Raises:
        InputError: settings with a palette, whose entries would have to be sought anew in each step.
    """

    def __init__(
        self, settings: Settings | None = None, *, importance: Callable[[Splats], Tensor] = codec.visibility
    ) -> None:
        settings = settings or Settings()
        if settings.palette:
            got = f"{settings.palette} entries"
            raise InputError("settings without a palette", got, "train for a .sog, or round the harmonics")
        # The header holds these as float32, and the training has to take the same.
        rotation, color, harmonics = torch.tensor([settings.rotation, settings.color, settings.harmonics]).tolist()
        self.settings = replace(settings, rotation=rotation, color=color, harmonics=harmonics)
        self._importance = importance
        self._visible: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self._visible is not None

    def refresh(self, splats: Splats, *, anew: bool) -> None:
        if anew or self._visible is None or len(self._visible) != len(splats):
            self._visible = self._importance(_on_cpu(splats)).detach().cpu().double()

    def project(self, splats: Splats) -> Splats:
        plain = _on_cpu(splats)
        # The file leaves these out, and what is left must not be rounded by a grid that reaches to them.
        kept = torch.nonzero(plain.opacities.sigmoid() >= UNSEEN)[:, 0]
        seen = plain.take(kept)
        found = as_before(seen, _rounded(canonical(seen), self.settings, self._seen()[kept]))
        target = {name: values.clone() for name, values in plain.tensors().items()}
        for name, values in found.tensors().items():
            target[name][kept] = values
        return through(splats, scene_of(target))

    def encode(self, splats: Splats) -> bytes:
        return encode(_on_cpu(splats), settings=self.settings, importance=self._seen(), prune=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._visible is None else {"visible": self._visible.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._visible = state["visible"].cpu().double() if "visible" in state else None

    def _seen(self) -> Tensor:
        if self._visible is None:
            raise InputError("a quantiser that has seen a scene", "a new one", "call refresh first")
        return self._visible


def through(splats: Splats, target: Splats) -> Splats:
    """The target's numbers, exactly, with gradients that go to ``splats`` as if they were its own."""
    found, wanted = splats.tensors(), target.tensors()
    named = {name: _Through.apply(values, wanted[name].to(values)) for name, values in found.items()}
    return scene_of(named, antialiased=splats.antialiased)


def as_before(splats: Splats, rounded: Splats) -> Splats:
    """Undo `canonical`: the rounded canonical Gaussians with the axes, signs and lengths that they had.

    Args:
        splats: before `canonical`.
        rounded: after it, and after rounding.
    """
    sides = canonical(splats)
    length = splats.quaternions.norm(dim=1, keepdim=True)
    back = splats.quaternions.new_tensor([1, -1, -1, -1])
    turn = quaternion_product(splats.quaternions / length * back, sides.quaternions)
    # One of the cube's 24 turns: squares of its components are quarters.
    turn = ((turn.square() * 4).round() / 4).sqrt() * turn.sign()
    order = splats.scales.argsort(dim=1, descending=True, stable=True)
    return replace(
        rounded,
        scales=torch.empty_like(rounded.scales).scatter_(1, order, rounded.scales),
        quaternions=quaternion_product(rounded.quaternions, turn * back) * length,
    )


def _on_cpu(splats: Splats) -> Splats:
    named = {name: values.detach().cpu() for name, values in splats.tensors().items()}
    return scene_of(named, antialiased=splats.antialiased)


def _rounded(splats: Splats, settings: Settings, visible: Tensor) -> Splats:
    """What the container's streams hold of canonical Gaussians, in the order given."""
    levels = codec.levels_of(visible, settings)
    octaves = codec.octaves_of(codec.log_numbers(splats, levels, settings), levels, settings)
    exponents = codec.cell_exponents(octaves, levels, settings)
    grid = codec.grid_for(splats.means, exponents)
    drops = codec.drops_of(exponents, grid)
    points = codec.grid_points(splats.means, drops, grid)
    turns = codec.rotation_shifts(octaves, levels, settings)
    shifts = settings.shifts(4, levels)
    return Splats(
        means=codec.means_from(points, drops, grid),
        quaternions=codec.quaternions_from(
            codec.rotation_numbers(splats.quaternions, turns, settings), turns, settings
        ),
        scales=codec.scales_from(octaves),
        opacities=codec.opacities_from(octaves),
        colors=codec.colors_from(codec.color_numbers(splats.colors, shifts, settings), shifts, settings),
        harmonics=_rounded_harmonics(splats, levels, visible, (settings, codec.point_order(points))),
    )


def _rounded_harmonics(splats: Splats, levels: Tensor, visible: Tensor, rest: tuple[Settings, Tensor]) -> Tensor:
    """Along axes that are sums over all Gaussians, and therefore depend on their order in the last digits."""
    settings, order = rest
    flat = splats.harmonics.flatten(1)[order].float()
    if not flat.numel() or settings.harmonics == 0:
        return torch.zeros_like(splats.harmonics)
    weights = (visible[order] / visible.max().clamp_min(1e-300)).square()
    shifts = settings.shifts(5, levels)[order]
    axes = codec_harmonics.principal_axes(flat, weights)
    numbers = codec_harmonics.rotated_numbers(flat, axes, settings.harmonics, shifts)
    counts = codec_harmonics.used_counts(numbers)
    used, found = int(counts.max()), torch.zeros_like(flat)
    if used:
        steps, directions = settings.harmonics * torch.exp2(shifts.float()), axes[:, :used].float()
        found[order] = codec_harmonics.rotated_from(numbers[:, :used].contiguous(), directions, counts, steps)
    return found.unflatten(1, splats.harmonics.shape[1:])


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, target: Tensor) -> Tensor:
        return target.clone()

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> Any:
        return pull, None
