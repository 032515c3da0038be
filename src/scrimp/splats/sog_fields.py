"""What a .sog of PlayCanvas, version 2, holds (developer.playcanvas.com, "The SOG Format"), from and to `Splats`.

A Gaussian takes 19 bytes before compression: positions in 16 bits of sign(x) log(1 + |x|) between the scene's ends,
rotations in the smallest-three form of 8 bits, scales and colours as codes of two codebooks of 256 numbers, opacities
in steps of 1 / 255, and harmonics as one of up to 65 536 entries of a palette, whose numbers are codes again.

`quantise` and `dequantise` lead from a scene to `SogFields` and back, `pack_sog` and `read_sog` from there to files. A
codec that chooses codebooks of its own makes `SogFields` of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.canonical import canonical
from scrimp.splats.checks import refuse_bad, refuse_loss
from scrimp.splats.codebooks import kmeans
from scrimp.splats.levels import CODES, nearest_codes, number_codebook, opacity_levels, opacity_logits
from scrimp.splats.morton import morton_order
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.smallest_three import pack, unpack

MOST_ENTRIES = 1 << 16
_FINEST = 65535
_SMALLEST_PALETTE, _LARGEST_PALETTE = 64, 4096
_AN_ENTRY = 64  # Gaussians that share one, where nobody says how many entries there are to be


@dataclass(frozen=True, eq=False)
class Palette:
    """Harmonics that many Gaussians share.

    Attributes:
        centroids: [entries, k, 3], float.
        labels: [n], int64, an entry for each Gaussian.
    """

    centroids: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class SogFields:
    """A scene as the whole numbers of a .sog and the numbers they stand for, on the CPU.

    Attributes:
        means: [n, 3] int32, 0 to 65535.
        lowest, highest: [3] float64, the sign(x) log(1 + |x|) that 0 and 65535 stand for.
        largest: [n] uint8, the component left out of a quaternion: 0 to 3 for w, x, y, z.
        rotations: [n, 3] uint8, the others.
        scales: [n, 3] uint8, codes of ``scale_codebook`` [256] float32.
        colors: [n, 3] uint8, codes of ``color_codebook`` [256] float32.
        opacities: [n] uint8.
        palette: [entries, k, 3] uint8, codes of ``palette_codebook`` [256] float32; [0, 0, 3] without harmonics.
        labels: [n] int32, an entry for each Gaussian; 0 without harmonics.
        antialiased: as `Splats` has it.
    """

    means: Tensor
    lowest: Tensor
    highest: Tensor
    largest: Tensor
    rotations: Tensor
    scales: Tensor
    scale_codebook: Tensor
    colors: Tensor
    color_codebook: Tensor
    opacities: Tensor
    palette: Tensor
    palette_codebook: Tensor
    labels: Tensor
    antialiased: bool = False

    def __len__(self) -> int:
        return len(self.means)


@torch.no_grad()
def quantise(
    splats: Splats,
    *,
    palette: Palette | None = None,
    palette_size: int | None = None,
    seed: int = 0,
    keep_order: bool = False,
    lossy: bool = False,
) -> SogFields:
    """Round a scene to what a .sog can hold. No Gaussian is dropped.

    Rotations and scales are those of `canonical`: the same Gaussians, described so that they compress better.

    Args:
        splats: without NaN.
        palette: of the harmonics. If not given, one is made by k-means.
        palette_size: entries of the one that is made, at most 65536; by default a power of two near n / 64, 64 to 4096.
        seed: of k-means.
        keep_order: leave the Gaussians in their order instead of that of `morton_order`, which compresses far better.
        lossy: leave out extra numbers and harmonics above degree 3.

    Raises:
        InputError: numbers that are not finite, what there is no place for unless ``lossy``, or a palette that does not
            fit the scene.
    """
    refuse_bad(splats, "a .sog")
    refuse_loss(splats, "a .sog", degree=3, lossy=lossy)
    scene = replace(splats, extra={}).of_degree(min(3, splats.degree)).to("cpu", torch.float32)
    if scene.harmonics.shape[1]:
        palette = _made(scene, palette_size, seed) if palette is None else _checked(palette, scene)
    if not keep_order:
        order = morton_order(scene.means)
        scene = scene.take(order)
        palette = None if palette is None else replace(palette, labels=palette.labels.cpu()[order])
    scene = canonical(scene)
    weights = _importance(scene)[:, None].expand_as(scene.scales)
    books = [number_codebook(values, weights=weights) for values in (scene.scales, scene.colors)]
    return fields_of(scene, (books[0], books[1]), _quantise_palette(scene, palette))


def fields_of(scene: Splats, books: tuple[Tensor, Tensor], palette: tuple[Tensor, Tensor, Tensor]) -> SogFields:
    """The fields of a canonical scene, in its order, with codebooks that were chosen before.

    Args:
        books: [256] each, of the scales and of the colours.
        palette: codes, their codebook and labels, as `SogFields` has them.
    """
    means, lowest, highest = _quantise_means(scene.means)
    largest, rotations = pack(scene.quaternions, 8)
    return SogFields(
        means=means,
        lowest=lowest,
        highest=highest,
        largest=largest.to(torch.uint8),
        rotations=rotations.to(torch.uint8),
        scales=nearest_codes(scene.scales, books[0]),
        scale_codebook=books[0],
        colors=nearest_codes(scene.colors, books[1]),
        color_codebook=books[1],
        opacities=opacity_levels(scene.opacities),
        palette=palette[0],
        palette_codebook=palette[1],
        labels=palette[2],
        antialiased=scene.antialiased,
    )


def dequantise(fields: SogFields) -> Splats:
    """The scene that a .sog shows, float32, in the file's order."""
    share = fields.means.double() / _FINEST
    bent = fields.lowest + share * (fields.highest - fields.lowest)
    entries = fields.palette_codebook[fields.palette.long()]
    harmonics = entries[fields.labels.long()] if len(entries) else entries.new_zeros(len(fields), 0, 3)
    return Splats(
        means=(bent.sign() * bent.abs().expm1()).float(),
        quaternions=unpack(fields.largest.long(), fields.rotations, 8),
        scales=fields.scale_codebook[fields.scales.long()],
        opacities=opacity_logits(fields.opacities),
        colors=fields.color_codebook[fields.colors.long()],
        harmonics=harmonics,
        antialiased=fields.antialiased,
    )


def _quantise_means(means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = means.double()
    bent = exact.sign() * exact.abs().log1p()
    if not len(bent):
        return bent.int(), bent.new_zeros(3), bent.new_zeros(3)
    lowest, highest = bent.amin(0), bent.amax(0)
    width = torch.where(highest > lowest, highest - lowest, 1)
    return ((bent - lowest) / width * _FINEST).round().int(), lowest, highest


def _quantise_palette(scene: Splats, palette: Palette | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their codebook, and labels; entries that no Gaussian uses are left out, the rest sorted by use."""
    if palette is None or not scene.harmonics.shape[1]:
        empty = torch.zeros(0, 0, 3, dtype=torch.uint8)
        return empty, torch.zeros(CODES), torch.zeros(len(scene), dtype=torch.int32)
    used = torch.bincount(palette.labels, minlength=len(palette.centroids))
    order = used.argsort(descending=True, stable=True)[: max(1, int((used > 0).sum()))]
    place = torch.zeros_like(used)
    place[order] = torch.arange(len(order))
    entries = palette.centroids.detach().cpu().float()[order]
    codebook = number_codebook(entries, weights=used[order, None, None].expand_as(entries))
    return nearest_codes(entries, codebook), codebook, place[palette.labels].int()


def _made(scene: Splats, size: int | None, seed: int) -> Palette:
    harmonics = scene.harmonics
    if size is None:
        near = 2 ** max(0, (len(harmonics) // _AN_ENTRY - 1).bit_length())
        size = min(_LARGEST_PALETTE, max(_SMALLEST_PALETTE, near))
    if not 1 <= size <= MOST_ENTRIES:
        raise InputError(f"a palette of 1 to {MOST_ENTRIES} entries", f"{size}", "pass another palette_size")
    if not len(harmonics):
        return Palette(harmonics.new_zeros(1, *harmonics.shape[1:]), torch.zeros(0, dtype=torch.int64))
    values, weights = harmonics.flatten(1), _importance(scene)
    centres, labels = kmeans(values, min(size, len(values)), weights=weights, seed=seed)
    return Palette(centres.unflatten(1, harmonics.shape[1:]), labels)


def _importance(scene: Splats) -> Tensor:
    """[n], of an error in colour: opacity times width. On a real scene it is worth 0.9 dB over equal weights."""
    width = scene.scales.sort(dim=1).values[:, 1:].mean(1)
    return scene.opacities.sigmoid() * (width - width.amax()).exp() + 1e-6 if len(scene) else width


def _checked(palette: Palette, splats: Splats) -> Palette:
    entries, labels = palette.centroids, palette.labels.cpu()
    wanted = (splats.harmonics.shape[1], 3)
    good = entries.ndim == 3 and entries.shape[1:] == wanted and 1 <= len(entries) <= MOST_ENTRIES
    if not good or labels.shape != (len(splats),) or not bool(entries.isfinite().all()):
        got = f"{list(entries.shape)} and {list(labels.shape)}"
        raise InputError(
            f"finite centroids [1 to {MOST_ENTRIES}, {wanted[0]}, 3] and labels [{len(splats)}]", got, "pass these"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(entries):
        raise InputError(f"labels below {len(entries)}", f"{int(labels.min())} to {int(labels.max())}", "correct them")
    return replace(palette, labels=labels)


def bands_of(fields: SogFields) -> int:
    """Degree of the harmonics, 0 to 3."""
    return COUNTS.index(fields.palette.shape[1])
