"""OpenSplat's code for the CPU, out of a library that is built from its sources; none of them is here (AGPL).

    git clone https://github.com/pierotofy/OpenSplat     # 15b7e80 was measured
    T=$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent)')
    cd OpenSplat
    g++ -O3 -DNDEBUG -std=c++20 -fPIC -shared -w -I. -Irasterizer -I$T/include -I$T/include/torch/csrc/api/include \
        SCRIMP/benchmarks/splat_raster_peers/opensplat.cpp project_gaussians.cpp rasterize_gaussians.cpp \
        spherical_harmonics.cpp rasterizer/gsplat-cpu/gsplat_cpu.cpp \
        -L$T/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$T/lib -o opensplat.so

Its flags: -O3, nothing for a particular machine (CMake's Release). The standard is the one that torch's headers want.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.scene import Splats

FAR = 1000.0


def load_opensplat(path: Path) -> Any:
    """Its operators ``project``, ``harmonics`` and ``rasterize``.

    Raises:
        InputError: no library there, or one that does not load.
    """
    if not path.is_file():
        raise InputError("a built OpenSplat", str(path), "see benchmarks/splat_raster_peers/opensplat.py")
    try:
        torch.ops.load_library(str(path.resolve()))
    except OSError as error:
        raise InputError("a library for this torch", str(error).splitlines()[0], "build it again") from error
    return torch.ops.opensplat


def project(operators: Any, splats: Splats, camera: Camera) -> list[Tensor]:
    """Places, radii, inverse covariances, covariances and depths of all Gaussians.

    The depths come as a strided view, whose memory its rasteriser reads as if it were dense; with today's torch it
    would blend in a wrong order. They are copied here, which costs next to nothing.
    """
    motion = camera.world_to_camera.to(splats.means)
    lens = [*camera.focal, *camera.centre]
    quaternions = splats.quaternions / splats.quaternions.norm(2, -1, keepdim=True)
    full = _perspective(camera).to(motion) @ motion
    size = (camera.height, camera.width)
    *found, depths = operators.project(splats.means, splats.scales.exp(), quaternions, motion, full, lens, *size)
    return [*found, depths.contiguous()]


def shade(operators: Any, splats: Splats, camera: Camera) -> Tensor:
    """Colours [n, 3] towards the camera; no gradient to the directions, as in its own training."""
    away = splats.means.detach() - camera.position.to(splats.means)
    coefficients = torch.cat([splats.colors[:, None], splats.harmonics], 1)
    directions = away / away.norm(2, -1, keepdim=True)
    return (operators.harmonics(directions, coefficients, splats.degree) + 0.5).clamp_min(0)


def blend(operators: Any, seen: list[Tensor], colors: Tensor, opacities: Tensor, camera: Camera) -> Tensor:
    """[h, w, 3] on black."""
    places, radii, conics, covariances, depths = seen
    size, black = (camera.height, camera.width), torch.zeros(3)
    drawn: Tensor = operators.rasterize(places, radii, conics, colors, opacities, covariances, depths, *size, black)
    return drawn


def draw(operators: Any, splats: Splats, camera: Camera) -> Tensor:
    """[h, w, 3] on black: all of what its training draws, in its order."""
    seen = project(operators, splats, camera)
    return blend(operators, seen, shade(operators, splats, camera), splats.opacities.sigmoid()[:, None], camera)


def _perspective(camera: Camera) -> Tensor:
    """OpenGL's matrix; its middle is the picture's, whatever ``camera.centre`` says."""
    near, far = camera.near, FAR
    across, down = 2 * camera.focal[0] / camera.width, 2 * camera.focal[1] / camera.height
    spread, shift = (far + near) / (far - near), -far * near / (far - near)
    return torch.tensor([[across, 0, 0, 0], [0, down, 0, 0], [0, 0, spread, shift], [0, 0, 1, 0]])
