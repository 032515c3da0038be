"""Hardening a fine-tuning: patches that raise what images cost are made as it goes, and later batches carry one."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.attack import AdaptiveVictim, Patch, PatchSet, attack_success, costs_of, frozen, victim_of
from scrimp.attack.attached import Seen, Surrogate
from scrimp.data import ImageData
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.thin_config import ThinConfig
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.report import Section, picture, units
from scrimp.report.parts import facts_table

if TYPE_CHECKING:
    from accelerate import Accelerator

PATCHES = "patches.safetensors"
"""File of the patches, ``patch-1`` and on, [channels, side, side] from 0 to 1; beside it a PNG of each."""
_SHOWN, _MAKE, _DEAL, _LOOK = 11, 12, 13, 14  # keys of independent random streams of the seed
_SLACK = 1e-6  # of the budget, so that a step that ends on a boundary counts as there
_COUNTED = 8  # images that a step of making is counted on
_HOW = (
    "making: counted once for an image, forward and backward in the masked form, times the images shown, by every "
    "process alike; on top of the budget, and not in the FLOPs, seconds or samples of the fine-tuning, but within its "
    "joules and peak bytes. Success: (attacked - clean) / (dense - clean) FLOPs of the images it was made on, when made"
)


class Defence:
    """The growing set of patches of one fine-tuning (Navaneet et al. 2024, SlowFormer, section 4), and its costs.

    Patch k of N is made when (k - 1) / N of the budget is spent, the first before the first step, so that each one is
    trained on. All that is drawn is fixed by the seed and the number of the patch or step. Patches are made without
    autocast, and not on the classifier's answers.

    Args:
        config: its ``defend`` settings, seed and batch size.
        data: images that patches are made on; the model takes them by its mean and std.
        model: on its device, unwrapped, with a method attached whose cost depends on the image.
        accelerator: of all processes; each makes every patch, and all take the first one's.
    """

    def __init__(self, config: ThinConfig, data: ImageData, model: nn.Module, accelerator: Accelerator) -> None:
        self.config, self.data, self.accelerator = config, data, accelerator
        self.patches = PatchSet(clean=config.defend_clean)
        self.made: list[dict[str, float | None]] = []
        self.missed: list[str] = []
        self._victim = victim_of(model, mean=data.mean, std=data.std)

    @property
    def side(self) -> int:
        """Of a patch, in pixels."""
        _, height, width = self.data.train.shape
        return min(max(1, round(math.sqrt(self.config.defend_size * height * width))), height, width)

    def due(self, share: float) -> bool:
        """Whether another patch is to be made once this share of the budget is spent."""
        return len(self.made) < self.config.defend and share >= len(self.made) / self.config.defend - _SLACK

    def grow(self, share: float, tell: Callable[[str], None], stop: Callable[[], bool]) -> None:
        """Make a patch on the model as it is; its mode, weights and gradients, and all generators, stay.

        Args:
            share: of the budget that is spent.
            tell: is told what is under way, in words.
            stop: whether to stop, asked before each step.

        Raises:
            Interrupted: so it was; there is no more in the set than before.
        """
        config, number, begin = self.config, len(self.made), time.perf_counter()
        images = self._images()
        price, shown = self._price(images), [0]
        patch = self.patches.grow(
            self._watched(shown, tell, stop),
            images,
            size=self.side,
            generator=generator_for(config.seed, _MAKE, number),
            place=(0, 0) if config.defend_place == "top-left" else None,
            steps=config.defend_steps,
            lr=config.defend_rate,
            batch=config.batch_size,
        )
        self.patches.patches[-1] = patch = self._of_the_first(patch)
        seconds = time.perf_counter() - begin
        spent = None if price.value is None else price.value * shown[0] * self.accelerator.num_processes
        record = {"at": round(share, 6), "flops": spent, "seconds": seconds, **self._success(patch, images, number)}
        self.missed = list(price.missed)
        self.made.append(record)

    def on(self, images: Tensor, step: int) -> Tensor:
        """A batch of normalised images as this step trains on it: a new tensor with one patch, or the batch itself."""
        generator = generator_for(self.config.seed, _DEAL, step)
        return self.patches.on(images, generator=generator, mean=self.data.mean, std=self.data.std)

    def stops(self, stop: Callable[[], bool]) -> bool:
        """Whether to stop; on several processes all do if one is to."""
        wish = torch.tensor(float(stop()), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX)
        return bool(wish)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that `load_state_dict` takes."""
        return {"set": self.patches.state_dict(), "made": self.made, "missed": self.missed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the defence that gave ``state``."""
        self.patches.load_state_dict(state["set"])
        self.made, self.missed = list(state["made"]), list(state["missed"])

    def note(self) -> dict[str, Any]:
        """What a receipt says of it; FLOPs and seconds of making all patches, ``made`` one by one."""
        spent = [record["flops"] for record in self.made]
        return {
            "patches": len(self.made),
            "side": self.side,
            "steps": self.config.defend_steps,
            "clean batches": self.config.defend_clean,
            "place": self.config.defend_place,
            "flops": None if None in spent else sum(value for value in spent if value is not None),
            "seconds": sum(record["seconds"] or 0.0 for record in self.made),
            "how": _HOW,
            "missed": self.missed,
            "made": self.made,
        }

    def save(self, folder: Path) -> None:
        """Write the patches, as numbers and as pictures; call it on one process."""
        pixels = {f"patch-{number}": patch.pixels.cpu() for number, patch in enumerate(self.patches.patches, 1)}
        places = [patch.place for patch in self.patches.patches]
        write_atomic(folder / PATCHES, pack_weights(pixels, {"format": "pt", "places": json.dumps(places)}))
        for name, part in pixels.items():
            if len(part) in (1, 3):
                write_atomic(folder / f"{name}.png", _png(part))

    def _images(self) -> Tensor:
        """Training images from 0 to 1, always the same ones."""
        chosen = torch.randperm(len(self.data.train), generator=generator_for(self.config.seed, _SHOWN))
        images = self.data.train.batch(chosen[: self.config.defend_images]).to(self.accelerator.device)
        return images.float() / 255

    def _price(self, images: Tensor) -> Reading:
        """FLOPs of an image in a step of making."""
        some = images[:_COUNTED].clone().requires_grad_()
        with frozen(self._victim.model):
            counted = count_flops(lambda: torch.autograd.grad(self._victim.policy_loss(some).sum(), some))
        return counted if counted.value is None else replace(counted, value=counted.value / len(some))

    def _watched(self, shown: list[int], tell: Callable[[str], None], stop: Callable[[], bool]) -> AdaptiveVictim:
        """The victim, which counts the images that it is asked about, and stops between two steps."""
        steps, name = self.config.defend_steps, f"patch {len(self.made) + 1} of {self.config.defend}"
        policy, asked = self._surrogate(), [0]

        def watching(seen: Seen) -> Tensor:
            if self.stops(stop):
                raise Interrupted
            asked[0] += 1
            shown[0] += seen.run.stream.images
            tell(f"making {name}, step {min(asked[0], steps)} of {steps}")
            return policy(seen)

        return replace(self._victim, surrogate=watching)

    def _surrogate(self) -> Surrogate:
        assert self._victim.surrogate is not None  # the configuration asks for methods that have one
        return self._victim.surrogate

    def _of_the_first(self, patch: Patch) -> Patch:
        """The first process's, lest kernels that add up in another order give each process its own."""
        if self.accelerator.num_processes == 1:
            return patch
        pixels = patch.pixels.contiguous()
        torch.distributed.broadcast(pixels, 0)
        return replace(patch, pixels=pixels)

    def _success(self, patch: Patch, images: Tensor, number: int) -> dict[str, float | None]:
        attacked = patch.on(images, generator=generator_for(self.config.seed, _LOOK, number))
        rows = self.config.batch_size
        clean, after = (costs_of(self._victim.cost, shown, batch=rows) for shown in (images, attacked))
        return {
            "clean_flops": float(clean.double().mean()),
            "attacked_flops": float(after.double().mean()),
            "dense_flops": float(self._victim.full),
            "success": attack_success(after, clean, self._victim.full),
        }


def defence_section(way: str, note: dict[str, Any], folder: Path) -> Section:
    """The part of a report that tells what a way was hardened with; pictures come from its ``folder``."""
    headings = ("patch", "made at", "FLOPs of making", "an image, clean", "attacked", "success")
    rows = [
        [
            str(number),
            f"{units.percent(one['at'])} of the budget",
            units.si(one["flops"], ""),
            *(units.si(one[name], "") for name in ("clean_flops", "attacked_flops")),
            units.percent(one["success"]),
        ]
        for number, one in enumerate(note["made"], 1)
    ]
    files = [folder / f"patch-{number}.png" for number in range(1, len(rows) + 1)]
    shown = [picture(file.read_bytes(), f"{file.stem} of {way}", caption=file.stem) for file in files if file.is_file()]
    text = (
        f"Patches of {note['side']} pixels a side, made on the model as it was then and carried by later batches, "
        f"{units.percent(note['clean batches'])} of which stayed clean. How far a patch made anew gets on the finished "
        f"model, these figures do not say. {note['how'][0].upper()}{note['how'][1:]}."
    )
    return Section(f"What {way} was hardened with", facts_table("Patches", headings, rows) + "".join(shown), text)


def _png(pixels: Tensor) -> bytes:
    """A patch [1 or 3, side, side] from 0 to 1 as a PNG."""
    from PIL import Image

    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray((levels[..., 0] if levels.shape[2] == 1 else levels).contiguous().numpy()).save(content, "PNG")
    return content.getvalue()
