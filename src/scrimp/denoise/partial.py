"""Training on part of an image: some of a transformer's tokens, or a square cut out for a UNet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError, require

_HOSTS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")


class TokenDrop:
    """Sends only a random share of an image's tokens through a diffusion transformer (MaskDiT, Zheng et al. 2024).

    The tokens are gathered behind the position embedding, so that every layer after it costs less, and go back to
    their places behind the last projection, where the dropped ones are zeros. Nothing else is trained (no mask token,
    no reconstruction). By hooks: the model's own forward runs, and without `dropping` it runs as ever.

    Args:
        model: a DiT, PixArt or SD3 transformer of diffusers, not wrapped.
        keep: share of tokens that go through, above 0 and at most 1; at least one token does.

    Raises:
        InputError: another model, or a share out of range.
    """

    def __init__(self, model: nn.Module, keep: float) -> None:
        diffusers = require("diffusers", "diffusers")
        if not isinstance(model, tuple(getattr(diffusers, name) for name in _HOSTS)):
            raise InputError(
                f"a transformer of images whose tokens can be left out: {', '.join(_HOSTS)}",
                type(model).__name__,
                "train this model on cut-out squares instead (scrimp.denoise.cut), or unwrap it",
            )
        if not 0 < keep <= 1:
            raise InputError("a share of tokens above 0 and at most 1", f"{keep}", "keep 0.5, say")
        host: Any = model
        self.model, self.keep, self.patch = model, keep, int(host.config.patch_size)
        self.side = int(host.config.sample_size) // self.patch
        self._kept: Tensor | None = None
        self._batch: int | None = None
        last = host.proj_out_2 if hasattr(host, "proj_out_2") else host.proj_out
        self._hooks = [
            host.pos_embed.register_forward_hook(self._gather),
            last.register_forward_hook(self._scatter),
        ]

    @property
    def tokens(self) -> int:
        """Tokens of a whole image."""
        return self.side**2

    @property
    def kept(self) -> int:
        """Tokens of an image that go through."""
        return max(1, round(self.keep * self.tokens))

    @contextmanager
    def dropping(self, batch_size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
        """Within it, the model's calls leave tokens out, each image others, the same in every call.

        Args:
            batch_size: images a call.
            generator: on the CPU.

        Yields:
            The pixels kept, [batch, 1, height, width] bool, on the model's device.
        """
        if self._batch is not None:
            raise InputError("one choice of tokens at a time", "dropping within dropping", "leave the first one before")
        if not self._hooks:
            raise InputError("a TokenDrop that is attached", "one removed", "make a new one")
        device = next(self.model.parameters()).device
        places = torch.rand(batch_size, self.tokens, generator=generator).argsort(1)[:, : self.kept]
        places = places.to(device)
        mask = torch.zeros(batch_size, self.tokens, dtype=torch.bool, device=device).scatter_(1, places, True)
        mask = mask.view(batch_size, 1, self.side, self.side)
        # All kept: nothing is moved, so that the arithmetic is the plain model's to the bit.
        self._kept, self._batch = (places if self.kept < self.tokens else None), batch_size
        try:
            yield mask.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        finally:
            self._kept, self._batch = None, None

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _gather(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._batch is not None and output.shape[:2] != (self._batch, self.tokens):
            raise InputError(
                f"{self._batch} images of {self.tokens} tokens, as the model's sample_size says",
                f"{len(output)} images of {output.shape[1]}",
                "call dropping with the batch's size; image sides must be the model's",
            )
        if self._kept is None:
            return None
        return output.gather(1, self._kept[:, :, None].expand(-1, -1, output.shape[2]))

    def _scatter(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._kept is None:
            return None
        places = self._kept[:, :, None].expand(-1, -1, output.shape[2])
        return output.new_zeros(len(output), self.tokens, output.shape[2]).scatter(1, places, output)


def cut(images: Tensor, side: int, *, generator: torch.Generator) -> Tensor:
    """One random square of each image, for networks without a fixed size.

    Args:
        images: [batch, channels, height, width].
        side: of the square in pixels, at most the shorter of height and width.
        generator: on the CPU.

    Returns:
        [batch, channels, side, side], a copy.
    """
    if images.ndim != 4:
        raise InputError(
            "images [batch, channels, height, width]", f"shape {list(images.shape)}", "add what is missing"
        )
    batch, _, height, width = images.shape
    if not 1 <= side <= min(height, width):
        raise InputError(f"a side from 1 to {min(height, width)}", f"{side}", "cut no more than the image")
    rows, columns = (
        (torch.randint(size - side + 1, (batch, 1), generator=generator) + torch.arange(side)).to(images.device)
        for size in (height, width)
    )
    places = torch.arange(batch, device=images.device)
    # Indexed dimensions come first where a slice parts them.
    return images[places[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
