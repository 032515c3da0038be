"""A .sog from its fields: images, meta.json, and the .zip around them."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
from torch import Tensor

from scrimp.splats.scene import Splats
from scrimp.splats.sog_fields import Palette, SogFields, bands_of, quantise
from scrimp.splats.sog_images import encode_image, grid

IN_A_ROW = 64
"""Entries of the palette side by side in its image."""


def write_sog(
    splats: Splats,
    *,
    palette: Palette | None = None,
    palette_size: int | None = None,
    seed: int = 0,
    lossy: bool = False,
) -> bytes:
    """A .sog file, in the order of `morton_order`: `quantise`, whose arguments these are, then `pack_sog`."""
    return pack_sog(quantise(splats, palette=palette, palette_size=palette_size, seed=seed, lossy=lossy))


def pack_sog(fields: SogFields) -> bytes:
    """A .sog file: a .zip of `sog_files`, stored as they are. Equal fields give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sog_files(fields).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def sog_files(fields: SogFields) -> dict[str, bytes]:
    """The files of an unpacked SOG, by name.

    Raises:
        InputError: more Gaussians than an image has pixels.
    """
    size = grid(len(fields))
    means = fields.means.numpy()
    tags = (fields.largest + 252).numpy()[:, None]
    images = {
        "means_l.webp": (means & 255).astype(np.uint8),
        "means_u.webp": (means >> 8).astype(np.uint8),
        "scales.webp": fields.scales.numpy(),
        "quats.webp": np.concatenate([fields.rotations.numpy(), tags], 1),
        "sh0.webp": np.concatenate([fields.colors.numpy(), fields.opacities.numpy()[:, None]], 1),
    }
    if len(fields.palette):
        labels = fields.labels.numpy()
        images["shN_labels.webp"] = np.stack([labels & 255, labels >> 8, labels * 0], 1).astype(np.uint8)
    files = {name: encode_image(values, size) for name, values in images.items()}
    if len(fields.palette):
        entries, bands, _ = fields.palette.shape
        shape = (IN_A_ROW * bands, -(-entries // IN_A_ROW))
        files["shN_centroids.webp"] = encode_image(fields.palette.reshape(-1, 3).numpy(), shape)
    return {"meta.json": json.dumps(_meta(fields), separators=(",", ":")).encode(), **files}


def _meta(fields: SogFields) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "version": 2,
        "asset": {"generator": "scrimp"},
        "count": len(fields),
        "antialias": fields.antialiased,
        "means": {
            "mins": fields.lowest.tolist(),
            "maxs": fields.highest.tolist(),
            "files": ["means_l.webp", "means_u.webp"],
        },
        "scales": {"codebook": _short(fields.scale_codebook), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": _short(fields.color_codebook), "files": ["sh0.webp"]},
    }
    if len(fields.palette):
        meta["shN"] = {
            "count": len(fields.palette),
            "bands": bands_of(fields),
            "codebook": _short(fields.palette_codebook),
            "files": ["shN_centroids.webp", "shN_labels.webp"],
        }
    return meta


def _short(codebook: Tensor) -> list[float]:
    """The shortest numbers that are the same in float32."""
    return [float(str(value)) for value in codebook.numpy()]
