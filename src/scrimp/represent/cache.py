"""The last embedding of every image of a data set, in RAM or in a file: what an epoch leaves to the next."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.represent.byol import unit
from scrimp.represent.checks import check_rows


class EmbeddingCache:
    """One unit vector an image, read by the next epoch as "another view of the same image".

    It lies beside the network, not in it: neither on the GPU nor in the weights. 1.28 million images of 512 numbers
    take 1.3 GB in float16, as RAM or as a memory-mapped file that the system keeps as much of as fits.

    Args:
        images: how many there are.
        dim: numbers of an embedding.
        path: file to keep them in; made, or taken up where it is of the right length. RAM where omitted.
        dtype: float16 (off by about 5e-4) or float32.

    Raises:
        InputError: sizes below 1, another type, or a file of another length.
    """

    def __init__(
        self, images: int, dim: int, *, path: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        if images < 1 or dim < 1 or dtype not in (torch.float16, torch.float32):
            raise InputError("images and dim from 1, float16 or float32", f"{images}, {dim}, {dtype}", "correct them")
        self.vectors = torch.zeros(images, dim, dtype=dtype) if path is None else _mapped(path, images, dim, dtype)

    def read(self, indices: Tensor, *, device: torch.device | str | None = None) -> Tensor:
        """The embeddings last written for these images, float32 [n, dim]; zeros where there is none yet."""
        return self.vectors[indices.to("cpu")].to(device, torch.float32)

    def write_(self, indices: Tensor, embeddings: Tensor) -> None:
        """Keep these embeddings [n, dim], normalised, for the images ``indices`` (int64 [n]).

        Raises:
            InputError: embeddings of another shape, or not one index a row.
        """
        expected = [len(indices), self.vectors.shape[1]]
        if list(embeddings.shape) != expected or not embeddings.is_floating_point():
            got = f"{str(embeddings.dtype).removeprefix('torch.')} {list(embeddings.shape)}"
            raise InputError(f"floating embeddings {expected}", got, "make the cache as wide as the projector")
        check_rows("indices", indices, len(embeddings))
        self.vectors[indices.to("cpu")] = unit(embeddings.detach()).to("cpu", self.vectors.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The embeddings, for a loop's checkpoint where they are in RAM."""
        return {"vectors": self.vectors}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            InputError: embeddings of another shape.
        """
        if state["vectors"].shape != self.vectors.shape:
            got = f"{list(state['vectors'].shape)}"
            raise InputError(f"a cache of {list(self.vectors.shape)}", got, "make it as large as the saved one")
        self.vectors.copy_(state["vectors"])


def _mapped(path: str | os.PathLike[str], images: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A file of zeros, or the one that is there, as a tensor that writes through."""
    length = images * dim * dtype.itemsize
    if os.path.exists(path) and os.path.getsize(path) != length:
        raise InputError(f"a cache file of {length:,} bytes", f"{path} of {os.path.getsize(path):,}", "delete it")
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.truncate(length)  # sparse where the file system can
    return torch.from_file(os.fspath(path), shared=True, size=images * dim, dtype=dtype).view(images, dim)
