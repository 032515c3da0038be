"""Training for a .sog: its codebooks of 256 numbers and its palette of harmonics, learnt with the scene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats import codec
from scrimp.splats.canonical import canonical
from scrimp.splats.codebooks import kmeans, nearest
from scrimp.splats.levels import CODES, nearest_codes, number_codebook
from scrimp.splats.morton import morton_order
from scrimp.splats.optimise import scene_of
from scrimp.splats.quantised import as_before, through
from scrimp.splats.scene import Splats
from scrimp.splats.sog_fields import MOST_ENTRIES, SogFields, dequantise, fields_of
from scrimp.splats.sog_write import pack_sog

_BOOKS = ("scales", "colors", "entries")


class SogQuantiser:
    """The rounding of a .sog, version 2.

    Numbers take the nearest code in every step; codebooks are made anew, and Gaussians assigned to entries of the
    palette, when `refresh` is told so; in between an entry is the weighted mean of its members.

    Args:
        palette_size: entries of the palette at most.
        iterations: of k-means, for the first palette.
        seed: of k-means.

    Raises:
        InputError: a palette that no .sog can hold.
    """

    def __init__(self, *, palette_size: int = 1024, iterations: int = 10, seed: int = 0) -> None:
        if not 1 <= palette_size <= MOST_ENTRIES:
            raise InputError(f"a palette of 1 to {MOST_ENTRIES} entries", f"{palette_size}", "pass another size")
        self.palette_size, self.iterations, self.seed = palette_size, iterations, seed
        self._kept: dict[str, Tensor] = {}

    @property
    def ready(self) -> bool:
        return bool(self._kept)

    def refresh(self, splats: Splats, *, anew: bool) -> None:
        scene = _storable(splats)
        anew = anew or not self._kept or len(self._kept["labels"]) != len(scene)
        if anew:
            self._kept["weights"] = codec.visibility(scene).float()
            self._kept |= {name: self._book(getattr(scene, name)) for name in ("scales", "colors")}
            self._assign(scene.harmonics.flatten(1))
        self._kept["centres"] = self._means(scene.harmonics.flatten(1))
        if anew:
            used = torch.bincount(self._kept["labels"], minlength=len(self._kept["centres"])).float()
            self._kept["entries"] = number_codebook(
                self._kept["centres"], weights=used[:, None].expand_as(self._kept["centres"])
            )

    def project(self, splats: Splats) -> Splats:
        scene = _storable(splats)
        return through(splats.of_degree(scene.degree), as_before(scene, dequantise(self._fields(scene))))

    def encode(self, splats: Splats) -> bytes:
        scene = _storable(splats)
        fields = self._fields(scene)
        order = morton_order(scene.means)
        rows = ("means", "largest", "rotations", "scales", "colors", "opacities", "labels")
        fields = replace(fields, **{name: getattr(fields, name)[order] for name in rows})
        return pack_sog(_compact(fields))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: values.clone() for name, values in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept = {name: values.cpu().clone() for name, values in state.items()}

    def _book(self, values: Tensor) -> Tensor:
        return number_codebook(values, weights=self._kept["weights"][:, None].expand_as(values))

    def _assign(self, flat: Tensor) -> None:
        size = min(self.palette_size, max(1, len(flat)))
        centres = self._kept.get("centres")
        if not flat.shape[1]:
            self._kept["labels"] = torch.zeros(len(flat), dtype=torch.int64)
            self._kept["centres"] = flat[:0]
        elif centres is None or len(centres) > size:
            found = kmeans(flat, size, weights=self._kept["weights"], seed=self.seed, iterations=self.iterations)
            self._kept["centres"], self._kept["labels"] = found
        else:
            self._kept["labels"], apart = nearest(flat, centres)
            self._kept["centres"] = self._revived(flat, apart)

    def _revived(self, flat: Tensor, apart: Tensor) -> Tensor:
        """Centres; those without members stand for rows served worst, which join them."""
        centres, labels = self._kept["centres"].clone(), self._kept["labels"]
        empty = torch.nonzero(torch.bincount(labels, minlength=len(centres)) == 0)[:, 0]
        worst = (apart * self._kept["weights"]).topk(min(len(empty), len(flat))).indices
        centres[empty[: len(worst)]] = flat[worst]
        labels[worst] = empty[: len(worst)]
        return centres

    def _means(self, flat: Tensor) -> Tensor:
        centres, labels = self._kept["centres"], self._kept["labels"]
        if not flat.shape[1] or not len(flat):
            return centres
        weights = self._kept["weights"].clamp_min(1e-12)
        total = torch.zeros(len(centres)).index_add_(0, labels, weights)
        summed = torch.zeros_like(centres).index_add_(0, labels, flat * weights[:, None])
        return torch.where(total[:, None] > 0, summed / total.clamp_min(1e-30)[:, None], centres)

    def _fields(self, scene: Splats) -> SogFields:
        """In the order given."""
        if not self._kept or len(self._kept["labels"]) != len(scene):
            raise InputError("a quantiser that has seen the scene", "another scene", "call refresh first")
        upright = canonical(scene)
        scales, colors, entries = (self._kept[name] for name in _BOOKS)
        centres = self._kept["centres"].unflatten(1, scene.harmonics.shape[1:])
        codebook = entries if len(centres) else torch.zeros(CODES)
        palette = (nearest_codes(centres, entries), codebook, self._kept["labels"].int())
        return fields_of(upright, (scales, colors), palette)


def _storable(splats: Splats) -> Splats:
    named = {name: values.detach().cpu().float() for name, values in splats.tensors().items()}
    scene = scene_of(named, antialiased=splats.antialiased)
    return scene.of_degree(min(3, scene.degree))


def _compact(fields: SogFields) -> SogFields:
    """Without entries that no Gaussian uses, the rest sorted by use."""
    if not len(fields.palette):
        return fields
    used = torch.bincount(fields.labels.long(), minlength=len(fields.palette))
    order = used.argsort(descending=True, stable=True)[: max(1, int((used > 0).sum()))]
    place = torch.zeros_like(used)
    place[order] = torch.arange(len(order))
    return replace(fields, palette=fields.palette[order], labels=place[fields.labels.long()].int())
