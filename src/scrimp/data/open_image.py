"""One door to images of any size: `open_image` looks at what a file is and picks its reader."""

from __future__ import annotations

import os

from scrimp.data.decode import ImageError
from scrimp.data.large_array import ArrayImage
from scrimp.data.large_cache import PixelCache
from scrimp.data.large_file import OrdinaryImage
from scrimp.data.large_image import LargeImage, Reader, damaged, thumbnail_size
from scrimp.data.large_slide import SlideImage
from scrimp.data.large_tiff import TiffImage
from scrimp.data.large_zarr import ZarrImage

__all__ = ["LargeImage", "PixelCache", "open_image", "thumbnail_size"]

SLIDES = frozenset({".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svslide", ".vms", ".vmu"})
"""Suffixes of scanners' formats that are OpenSlide's. ``.svs`` is plain TIFF."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NUMPY = b"\x93NUMPY"
_ZARR = ("zarr.json", ".zarray", ".zgroup")


def open_image(path: str | os.PathLike[str], *, cache: PixelCache | None = None) -> LargeImage:
    """Open an image that need not fit into memory, to take a thumbnail and parts of it at full resolution.

    | kind | read | package |
    |---|---|---|
    | TIFF, BigTIFF, ``.svs`` | the tiles or strips touched; pyramids | tifffile, extra ``zoom`` |
    | zarr folder, format 2 or 3, also OME-Zarr | the chunks touched; multiscales | zarr, extra ``zoom`` |
    | ``.npy`` | the pages of memory touched | none |
    | scanners' slides (`SLIDES`) | what OpenSlide reads; pyramids | openslide, extra ``slides`` |
    | JPEG, PNG, WebP, ... | whole, once while the cache has room | none |

    The kind is told by the first bytes, slides by their suffix. Every reader gives 8-bit grey or RGB: 16 bits are
    scaled as round(value / 257), opacity is laid on white, the EXIF orientation of ordinary files is applied. The
    image may be pickled, or used after a fork (a DataLoader's worker): each process opens the file for itself.

    Args:
        path: a file, or a folder for zarr and some slides.
        cache: where decoded pixels are kept, and so the limit of memory; without one, all images of the process share
            128 MB (`scrimp.data.large_cache`).

    Returns:
        The opened image, also a context manager.

    Raises:
        ImageError: (an InputError) the file is missing, empty, damaged, truncated, or of no kind known.
        MissingExtraError: the package that reads this kind is not installed.
    """
    return _reader(os.fspath(path))(path, cache=cache)


def _reader(path: str) -> type[Reader]:
    if not os.path.exists(path):
        raise ImageError("an image file", f"{path!r}, which is not there", "check the path")
    if os.path.splitext(path)[1].lower() in SLIDES:
        return SlideImage
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in _ZARR):
            return ZarrImage
        raise ImageError("an image file or a zarr folder", f"the folder {path!r}", "name an image inside it")
    head = _head(path)
    if head.startswith(_TIFF):
        return TiffImage
    return ArrayImage if head.startswith(_NUMPY) else OrdinaryImage


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as error:
        raise damaged(path, error.strerror or error) from error
