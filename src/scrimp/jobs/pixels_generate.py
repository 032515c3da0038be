"""Images from a trained pixel transformer, and the picture that shows them side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scrimp.jobs.pixels_model import PixelTransformer, as_images
from scrimp.jobs.pixels_output import DRAWS
from scrimp.jobs.pixels_step import Decoder, make_decoder
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.files import write_atomic

SAMPLES = "samples.png"
_DRAW = 3  # key of these random streams among those of one seed


def generate(
    decoder: Decoder,
    uniforms: Tensor,
    *,
    known: Tensor | None = None,
    temperature: float = 1.0,
    each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Write a batch of images to their end with a fresh decoder; uint8 [batch, channels, height, width].

    Args:
        decoder: see `make_decoder`.
        uniforms: [batch, tokens, DRAWS], see `draws`.
        known: the first pixels of each image, [batch, n], taken as they are.
        temperature: below 1 draws likelier pixels.
        each: called after every pixel.
    """
    model = decoder.model
    with torch.inference_mode():
        pixels = torch.empty(len(uniforms), model.tokens, dtype=torch.int64, device=uniforms.device)
        given = 0 if known is None else known.shape[1]
        last = decoder.start()
        if known is not None and given:
            pixels[:, :given] = known
            decoder.prefill_(pixels[:, :given])
            last = pixels[:, given - 1]
        for place in range(given, model.tokens):
            last = model.output.draw(decoder.step_(last), uniforms[:, place], temperature)
            pixels[:, place] = last
            each()
    return as_images(pixels, model.shape)


def draws(images: Sequence[int], tokens: int, *, seed: int) -> Tensor:
    """Uniform numbers [images, tokens, DRAWS]: an image's depend on its number and the seed, not on its batch."""
    return torch.stack([torch.rand(tokens, DRAWS, generator=generator_for(seed, _DRAW, number)) for number in images])


def new_images(model: PixelTransformer, count: int, *, seed: int, each: Callable[[], None] = lambda: None) -> Tensor:
    """``count`` images in one batch, uint8 on the CPU."""
    device = model.head.weight.device
    uniforms = draws(range(count), model.tokens, seed=seed).to(device)
    return generate(make_decoder(model.eval(), count), uniforms, each=each).cpu()


def save_grid(images: Tensor, path: Path, *, columns: int | None = None) -> None:
    """Write images, uint8 [count, channels, height, width], as one PNG; nearly square where no columns are given."""
    from PIL import Image
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=128)
    content = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(content, "PNG")
    write_atomic(path, content.getvalue())


def steps_flops(decoder: Decoder, *, given: int = 0) -> Reading:
    """FLOPs of all steps of a batch from place ``given`` on; moves the decoder. Both attentions' grow evenly."""
    counts = []
    with torch.inference_mode():
        for place in (given, decoder.model.tokens - 1):
            decoder.place = place
            counts.append(count_flops(lambda: decoder.step_(decoder.start())))
    first, last = counts
    if first.value is None or last.value is None:
        return Reading()
    total = (first.value + last.value) / 2 * (decoder.model.tokens - given)
    return Reading(total, "counted for the first and the last step, which the others lie evenly between", last.missed)
