"""The cache of embeddings as it was at a checkpoint: beside it, not in it, and never of another step."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights

_NAME = "embeddings-{}.safetensors"


class Snapshots:
    """Files ``embeddings-STEP.safetensors`` in a run folder: written before the checkpoint that needs them.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, state: dict[str, Tensor], step: int) -> None:
        write_atomic(self.folder / _NAME.format(step), pack_weights(state, {"format": "pt", "step": str(step)}))

    def read(self, step: int) -> dict[str, Tensor]:
        """The embeddings of this step.

        Raises:
            InputError: the file is absent or damaged.
        """
        path = self.folder / _NAME.format(step)
        try:
            return load_file(path)
        except Exception as error:  # safetensors' own error class has no stable home
            raise InputError(
                "the checkpoint's embeddings", f"{path} ({error})", "restore it from a copy, or start again"
            ) from error

    def keep_only(self, step: int | None) -> None:
        """Delete those of other steps; all of them for ``None``."""
        for path in self.folder.glob(_NAME.format("*")):
            if step is None or path.name != _NAME.format(step):
                path.unlink()
