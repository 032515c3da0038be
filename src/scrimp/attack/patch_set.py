"""The trained defence: a growing set of patches, one of which is on the images of each training step (SlowFormer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scrimp.attack.attached import Victims
from scrimp.attack.objective import Goal
from scrimp.attack.patch import Patch, Place, universal_patch
from scrimp.primitives.errors import InputError


class PatchSet:
    """Patches to train with. The victim's own losses are minimised on images that carry one of them.

    Navaneet et al. 2024, section 4: each step draws one patch evenly; after every fifth of an epoch `grow` attacks the
    model as it has become, by 500 steps at a rate of 0.8, and adds what it finds. How the model then does on clean
    images, and against an attack made anew on it, is to be measured beside.

    Args:
        patches: to begin with.
        clean: share of the batches that stay as they are; 0 as published.

    Raises:
        InputError: a share that is not from 0 to 1.
    """

    def __init__(self, patches: Iterable[Patch] = (), *, clean: float = 0.0) -> None:
        if not 0 <= clean <= 1:
            raise InputError("a clean share from 0 to 1", str(clean), "correct it")
        self.patches, self.clean = list(patches), clean

    def __len__(self) -> int:
        return len(self.patches)

    def draw(self, generator: torch.Generator) -> Patch | None:
        """One of the patches, each as likely; None for a clean batch, or when there is none yet."""
        kept = float(torch.rand((), generator=generator, dtype=torch.float64)) < self.clean
        if kept or not self.patches:
            return None
        return self.patches[int(torch.randint(len(self.patches), (), generator=generator))]

    def on(
        self,
        images: Tensor,
        *,
        generator: torch.Generator,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """A batch for a step of training: one patch on all its images, see `Patch.on`; the batch itself if none."""
        patch = self.draw(generator)
        return images if patch is None else patch.on(images, generator=generator, mean=mean, std=std)

    def grow(
        self,
        victim: Victims,
        images: Tensor,
        *,
        size: int | tuple[int, int],
        generator: torch.Generator,
        place: Place | None = (0, 0),
        steps: int = 500,
        lr: float = 0.8,
        batch: int | None = None,
        goal: Goal = "ignore",
        labels: Tensor | None = None,
    ) -> Patch:
        """Attack the model as it is now, by `universal_patch`, and add the patch. Its mode and weights stay."""
        options: dict[str, Any] = {"goal": goal, "labels": labels, "batch": batch, "place": place}
        patch = universal_patch(victim, images, size=size, generator=generator, steps=steps, lr=lr, **options)
        self.patches.append(patch)
        return patch

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` takes."""
        return {"patches": [{"pixels": one.pixels, "place": one.place} for one in self.patches], "clean": self.clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the set that gave ``state``; traces are not kept."""
        self.clean = float(state["clean"])
        self.patches = [Patch(one["pixels"], one["place"] and tuple(one["place"])) for one in state["patches"]]
