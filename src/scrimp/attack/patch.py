"""One patch for every image: pasted at one place, made to raise the cost (SlowFormer, CVPR 2024); and a random one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.attack.attached import Victims
from scrimp.attack.objective import Goal, Objective, PolicyLoss, objective_for
from scrimp.attack.pixels import check_images, crops, paste, quantise
from scrimp.attack.victim import frozen
from scrimp.primitives.errors import InputError

Place = tuple[int, int]
"""Top and left, in pixels."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch, and where it goes.

    Attributes:
        pixels: [channels, h, w], from 0 to 1, on the 256 levels.
        place: top and left; None: anywhere, drawn for each image.
        trace: the mean loss before each step of its making (of a query attack: the mean cost after each query).
    """

    pixels: Tensor
    place: Place | None = (0, 0)
    trace: tuple[float, ...] = ()

    def on(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """The images with the patch on them, a new tensor.

        Args:
            images: [n, channels, height, width], from 0 to 1; or normalised already by ``mean`` and ``std``.
            generator: for a patch without a place.
            mean: of the channels, if the images are normalised: then so is the patch.
            std: likewise.

        Raises:
            InputError: images that the patch does not fit into, or a place to draw without a generator.
        """
        pixels = self.pixels
        if not images.is_floating_point():
            saw = str(images.dtype).removeprefix("torch.")
            raise InputError("floating images, from 0 to 1 or normalised", saw, "convert them: images.float() / 255")
        if (mean is None) != (std is None):
            raise InputError("both mean and std, or neither", "one of them", "pass the other too")
        if mean is not None and std is not None:
            shift, scale = (pixels.new_tensor(tuple(numbers)).view(-1, 1, 1) for numbers in (mean, std))
            pixels = (pixels - shift) / scale
        return paste(images, pixels, places_for(images, pixels.shape, self.place, generator))


def universal_patch(
    victim: Victims,
    images: Tensor,
    *,
    size: int | tuple[int, int],
    generator: torch.Generator,
    place: Place | None = (0, 0),
    steps: int = 500,
    lr: float = 0.2,
    batch: int | None = None,
    goal: Goal = "ignore",
    labels: Tensor | None = None,
    task_weight: float = 1.0,
    policy_loss: PolicyLoss | None = None,
) -> Patch:
    """Make one patch that, on any image, raises what a model spends.

    Navaneet et al. 2024 (SlowFormer, arXiv 2310.02544): AdamW without decay on the pixels, the model as it is. The
    model sees the patch on the 256 levels; what is optimised is a copy between them, clipped to [0, 1], which gets the
    gradient straight through. So rounding never adds up, as it does where each step starts from the rounded pixels.

    Args:
        victim: or several: then the mean of their losses is minimised. Weights, gradients and mode are left as found.
        images: to learn from, [n, channels, height, width], from 0 to 1, n >= 1; not written to.
        size: side of the patch in pixels, or height and width.
        generator: on the CPU; draws the first patch, uniform, then batches and places.
        place: top and left; None: drawn anew for each image and step.
        steps: of the optimizer, from 0.
        lr: its learning rate, of pixels from 0 to 1.
        batch: images a step, drawn without replacement; None: all. With all of them at one place the pixels kept are
            those of the lowest loss, else the last.
        goal: ``ignore`` the answers, ``preserve`` or ``destroy`` them, or only ``accuracy``: the control that lowers
            accuracy by cross-entropy alone.
        labels: [n], what answers are held against; None: the victim's own to the clean images.
        task_weight: of their cross-entropy, beside the policy loss.
        policy_loss: in place of the victim's own.

    Raises:
        InputError: arguments out of range, or a patch that does not fit.
    """
    task = objective_for(victim, images, goal=goal, labels=labels, task_weight=task_weight, policy_loss=policy_loss)
    if not len(images) or steps < 0 or not lr > 0 or (batch is not None and batch < 1):
        saw = f"{len(images)} images, steps={steps}, lr={lr}, batch={batch}"
        raise InputError("1 image or more, steps from 0, lr above 0, batch from 1", saw, "correct them")
    first = random_patch(images, size=size, generator=generator, place=place)
    places_for(images[:1], first.pixels.shape, place, generator if place is None else None)
    with frozen(*(one.model for one in task.victims)):
        return _optimise(task, images.detach(), first, steps=steps, lr=lr, batch=batch, generator=generator)


def random_patch(
    images: Tensor, *, size: int | tuple[int, int], generator: torch.Generator, place: Place | None = (0, 0)
) -> Patch:
    """A patch of random pixels, uniform on the 256 levels: the control, and what `universal_patch` starts from.

    Args:
        images: [n, channels, height, width], for their channels, dtype and device.
        size: side in pixels, or height and width.
        generator: on the CPU.
        place: top and left; None: anywhere.

    Raises:
        InputError: images out of range, or a size below 1.
    """
    check_images(images[:1])
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError("a patch of at least 1 pixel", f"{height} x {width}", "correct its size")
    levels = torch.randint(256, (images.shape[1], height, width), generator=generator)
    return Patch(quantise(levels.double() / 255).to(images), place)


def places_for(
    images: Tensor, shape: torch.Size, place: Place | None, generator: torch.Generator | None = None
) -> Tensor:
    """Where a patch of ``shape`` goes on each image, [n, 2].

    Raises:
        InputError: it does not fit, or there is nothing to draw with.
    """
    room = [whole - part for whole, part in zip(images.shape[2:], shape[1:], strict=False)]
    inside = place is None or all(0 <= at <= most for at, most in zip(place, room, strict=True))
    if images.ndim != 4 or images.shape[1] != shape[0] or min(room) < 0 or not inside:
        saw = f"images {list(images.shape)}, a patch {list(shape)} at {place}"
        raise InputError("images [n, channels, height, width] that the patch is inside of", saw, "move or shrink it")
    if place is not None:
        return torch.tensor(place).expand(len(images), 2)
    if generator is None:
        raise InputError("a generator for a patch that may be anywhere", "none", "pass generator=")
    return torch.stack([torch.randint(most + 1, (len(images),), generator=generator) for most in room], 1)


def _optimise(
    task: Objective,
    images: Tensor,
    first: Patch,
    *,
    steps: int,
    lr: float,
    batch: int | None,
    generator: torch.Generator,
) -> Patch:
    pixels = first.pixels.to(torch.promote_types(images.dtype, torch.float32)).clone().requires_grad_()
    optimizer = torch.optim.AdamW([pixels], lr=lr, weight_decay=0)
    comparable = first.place is not None and (batch is None or batch >= len(images))
    best, trace = (float("inf"), first.pixels), []
    for step in range(steps + comparable):
        shown = quantise(pixels.detach()).to(images)
        rows = torch.arange(len(images)) if comparable else _rows(len(images), batch, generator)
        part = images[rows.to(images.device)]
        places = places_for(part, shown.shape, first.place, generator)
        losses, slope = task.gradient(paste(part, shown, places), rows)
        loss = _mean(losses)
        if loss < best[0]:
            best = (loss, shown)
        if step == steps:
            break
        trace.append(loss)
        pixels.grad = crops(slope, shown.shape, places).to(pixels.dtype).mean(0)
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    last = best[1] if comparable else quantise(pixels.detach()).to(images)
    return Patch(last, first.place, tuple(trace))


def _rows(count: int, batch: int | None, generator: torch.Generator) -> Tensor:
    if batch is None or batch >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:batch]


def _mean(losses: Tensor) -> float:
    """Of the losses that are numbers; infinite without any."""
    sound = losses[losses.isfinite()]
    return float(sound.double().mean()) if len(sound) else float("inf")
