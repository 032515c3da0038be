"""The CPU rasteriser forward and backward beside what else there is, in one process and in turn.

    python benchmarks/splat_raster.py peers --opensplat OpenSplat/opensplat.so
    python benchmarks/splat_raster.py scaling
    python benchmarks/splat_raster.py loss
    python benchmarks/splat_raster.py threads       # wall time: on a quiet machine

Harmonics of degree 3, gradients to all fields, float32. Times are process CPU time on one thread (`threads`: wall), the
sides take turns round by round, and ratios are medians of those of the rounds. Before anything is timed all have drawn
the same picture: the receipt has the PSNR between theirs and ours. `splat_raster_peers/opensplat.py` says how to build
OpenSplat; without it its columns stay empty. The fox is measured where the scenes are (`$SCRIMP_DATA`), the rooms are
made up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from torch import Tensor

from attention_speed import in_turn
from common import RECEIPTS, keep
from scrimp import native
from scrimp.meter import Cost, Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt
from scrimp.splats.camera import Camera
from scrimp.splats.loss import image_loss, image_loss_twin, psnr
from scrimp.splats.render import rasterize
from scrimp.splats.scene import Splats
from splat_raster_peers import opensplat, tiled
from splat_raster_peers.scenes import Sight, fox, room
from splat_raster_peers.tables import FORWARD, FOX, ONE, OURS, PART, TORCH, TWO, WHOLE

NAME = "splat-raster"
SIZES = (256, 800)
Side = Callable[[Splats, Camera], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Peers:
    """One thread beside OpenSplat's CPU code and tiled torch, 100,000 Gaussians and the fox."""

    opensplat: Path | None = None
    """The library that was built of it."""
    fox: bool = True
    """Whether to measure the fox, too."""
    gaussians: int = 100_000
    rounds: int = 7
    seed: int = 0
    out: Path = RECEIPTS / NAME / "peers.json"


@dataclass(frozen=True)
class Scaling:
    """One thread: time by the Gaussian and by the pixel."""

    gaussians: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000)
    """In a picture of 800 x 800."""
    sizes: tuple[int, ...] = (256, 512, 800, 1000, 2000)
    """Sides of pictures of ``usual`` Gaussians."""
    usual: int = 100_000
    rounds: int = 7
    seed: int = 0
    out: Path = RECEIPTS / NAME / "scaling.json"


@dataclass(frozen=True)
class Threads:
    """Wall time of two threads beside one."""

    gaussians: int = 100_000
    rounds: int = 31
    seed: int = 0
    out: Path = RECEIPTS / NAME / "threads.json"


@dataclass(frozen=True)
class Loss:
    """L1 and SSIM with the gradient, one thread, beside torch's conv2d."""

    width: int = 270
    height: int = 480
    rounds: int = 15
    seed: int = 0
    out: Path = RECEIPTS / NAME / "loss.json"


Order = Peers | Scaling | Threads | Loss


def rooms(order: Peers | Threads) -> dict[str, Sight]:
    return {f"{order.gaussians:,} at {size} x {size}": room(order.gaussians, size, seed=order.seed) for size in SIZES}


def run_peers(order: Peers) -> Receipt:
    operators = None if order.opensplat is None else opensplat.load_opensplat(order.opensplat)
    sights = rooms(order) | ({FOX: fox(270, 480)} if order.fox else {})
    found = {name: beside(sight, operators, order.rounds) for name, sight in sights.items()}
    largest = list(found.values())[len(SIZES) - 1]
    return receipt_of(order, largest["times"][OURS]["cpu_seconds"]["median"], "of 800 x 800", {"scenes": found})


def run_scaling(order: Scaling) -> Receipt:
    views = {f"{count:,} Gaussians": room(count, 800, seed=order.seed) for count in order.gaussians}
    views |= {f"{size} x {size}": room(order.usual, size, seed=order.seed) for size in order.sizes}
    times = in_turn({name: call_of(draw_ours, sight) for name, sight in views.items()}, order.rounds)
    found = {
        name: {
            "gaussians": len(sight.splats),
            "pixels": sight.camera.width * sight.camera.height,
            "cpu_seconds": times[name]["cpu_seconds"],
        }
        for name, sight in views.items()
    }
    longest = max(each["cpu_seconds"]["median"] for each in found.values())
    return receipt_of(order, longest, "of the slowest", {"views": found})


def run_threads(order: Threads) -> Receipt:
    found = {}
    for name, sight in rooms(order).items():
        call = call_of(draw_ours, sight)
        found[name] = in_turn({TWO: partial(on_threads, 2, call), ONE: partial(on_threads, 1, call)}, order.rounds)
    cpu = list(found.values())[-1][TWO]["cpu_seconds"]["median"]
    return receipt_of(order, cpu, "of 800 x 800 on two threads", {"scenes": found})


def run_loss(order: Loss) -> Receipt:
    generator = generator_for(order.seed, 0)
    rendered, target = (torch.rand(order.height, order.width, 3, generator=generator) for _ in range(2))
    leaf = rendered.requires_grad_()
    sides = {
        OURS: image_loss,
        "torch, conv2d by rows and columns": image_loss_twin,
        "torch, grouped conv2d by rows and columns": partial(tiled.image_loss, separable=True),
        "torch, grouped conv2d of 11 x 11": tiled.image_loss,
    }
    grads = {name: torch.autograd.grad(side(leaf, target), leaf)[0] for name, side in sides.items()}
    apart = {name: float((grad - grads[OURS]).norm() / grads[OURS].norm()) for name, grad in grads.items()}
    calls = {name: partial(slope, side, leaf, target) for name, side in sides.items()}
    times = in_turn(calls, order.rounds)
    return receipt_of(
        order, times[OURS]["cpu_seconds"]["median"], "of one", {"times": times, "gradients apart, relative": apart}
    )


def beside(sight: Sight, operators: Any, rounds: int) -> dict[str, Any]:
    """Times of every side at one scene, and how near their pictures are to ours."""
    sides: dict[str, Side] = {OURS: draw_ours, TORCH: draw_tiled}
    if operators is not None:
        sides |= {WHOLE: partial(draw_opensplat, operators), PART: part_of_opensplat(operators, sight)}
    calls = {name: call_of(side, sight) for name, side in sides.items()}
    likeness = {name: likeness_of(side, sight) for name, side in sides.items() if name != OURS}
    calls[FORWARD] = partial(forward_alone, sight)
    seen = int((rasterize(sight.splats, sight.camera).radii > 0).sum())
    counts = {"gaussians": len(sight.splats), "in sight": seen, "psnr to ours": likeness}
    return {**counts, "times": in_turn(calls, rounds)}


def likeness_of(side: Side, sight: Sight) -> float:
    """PSNR of a side's picture to ours in dB, both held within 0 to 1; of colours without harmonics for tiled torch.

    Raises:
        InputError: below 35 dB: it does not draw the same.
    """
    theirs, _ = side(sight.splats, sight.camera)
    ours = rasterize(sight.splats, sight.camera, degree=0 if side is draw_tiled else None).color
    found = float(psnr(theirs.detach().clamp(0, 1), ours.clamp(0, 1)))
    if not found > 35:
        raise InputError("the same picture, 35 dB or more", f"{found:.1f} dB", "check the peer's build")
    return found


def call_of(side: Side, sight: Sight) -> Callable[[], Any]:
    """Forward and backward with a random gradient of the picture, which is the same for all sides."""
    camera = sight.camera
    pull = torch.randn(camera.height, camera.width, 3, generator=generator_for(1, camera.height))
    leaves = replace(sight.splats, **{name: v.detach().requires_grad_() for name, v in sight.splats.tensors().items()})

    def call() -> None:
        image, wanted = side(leaves, camera)
        torch.autograd.grad(image, wanted, pull)

    return call


def draw_ours(splats: Splats, camera: Camera) -> tuple[Tensor, list[Tensor]]:
    return rasterize(splats, camera).color, list(splats.tensors().values())


def draw_tiled(splats: Splats, camera: Camera) -> tuple[Tensor, list[Tensor]]:
    wanted = [values for name, values in splats.tensors().items() if name != "harmonics"]
    return tiled.draw(splats, camera), wanted


def draw_opensplat(operators: Any, splats: Splats, camera: Camera) -> tuple[Tensor, list[Tensor]]:
    return opensplat.draw(operators, splats, camera), list(splats.tensors().values())


def part_of_opensplat(operators: Any, sight: Sight) -> Side:
    """Its projection and rasteriser alone, as the published figures have it: colours and opacities are given."""
    with torch.no_grad():
        colors = opensplat.shade(operators, sight.splats, sight.camera)
        opacities = sight.splats.opacities.sigmoid()[:, None]

    def draw(splats: Splats, camera: Camera) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            places, radii, conics, covariances, depths = opensplat.project(operators, splats, camera)
        wanted = [values.detach().requires_grad_() for values in (places, conics, colors, opacities)]
        seen = [wanted[0], radii, wanted[1], covariances, depths]
        return opensplat.blend(operators, seen, wanted[2], wanted[3], camera), wanted

    return draw


def forward_alone(sight: Sight) -> None:
    with torch.no_grad():
        rasterize(sight.splats, sight.camera)


def on_threads(count: int, call: Callable[[], Any]) -> None:
    torch.set_num_threads(count)
    call()


def slope(loss: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, target: Tensor) -> None:
    torch.autograd.grad(loss(leaf, target), leaf)


def receipt_of(order: Order, cpu: float, what: str, notes: dict[str, Any]) -> Receipt:
    config = {name: value.name if isinstance(value, Path) else value for name, value in asdict(order).items()}
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/{type(order).__name__.lower()}",
        way=OURS,
        seed=order.seed,
        cost=Cost(cpu_seconds=Reading(cpu, f"process CPU, median, forward and backward {what}")),
        config={name: value for name, value in config.items() if name != "out"},
        notes={**notes, "simd": (native.capabilities() or {}).get("simd")},
    )


def main() -> None:
    orders = [Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in (Peers, Scaling, Threads, Loss)]
    order = tyro.cli(Union[tuple(orders)])  # type: ignore[arg-type]  # noqa: UP007
    torch.set_num_threads(1)
    runs = {Peers: run_peers, Scaling: run_scaling, Threads: run_threads, Loss: run_loss}
    keep(runs[type(order)](order), order.out)


if __name__ == "__main__":
    main()
