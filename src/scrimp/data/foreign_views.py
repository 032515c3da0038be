"""Two views of an image as other libraries make them: their batches, and their transforms of one image at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.data.view_ops import check_images, check_rows, described
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


def two_views(batch: Any) -> tuple[Tensor, Tensor]:
    """The first two views in what a loader gives.

    Args:
        batch: views [n, C, H, W] in a tuple or list; or a tuple or list that starts with one, as lightly's data sets
            give it: (views, target, file name).

    Raises:
        InputError: anything else.
    """
    views = batch
    if isinstance(views, (tuple, list)) and views and isinstance(views[0], (tuple, list)):
        views = views[0]
    if isinstance(views, (tuple, list)) and len(views) >= 2:
        first, second = views[:2]
        images = all(isinstance(part, Tensor) and part.ndim == 4 for part in (first, second))
        if images and first.shape[:2] == second.shape[:2]:
            return first, second
    raise InputError("two views [n, C, H, W] of the same images", described(batch), "see two_views for the forms")


def per_image(transform: Callable[[Any], Any], *, seed: int, pil: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
    """Let a transform that takes one image make two views of a whole batch.

    Such transforms draw from the global generators of torch (CPU), numpy and Python. These are seeded for every image
    while it is at work and put back as they were afterwards, also after an error.

    Args:
        transform: gives two views or more (lightly's), of which the first two are taken, or one (torchvision's), and
            is called twice. A view is a tensor [C, h, w], bytes or floats, or a PIL image; what gives bytes ends up in
            0 to 1, floats stay as the transform leaves them.
        seed: of the views, together with the generator.
        pil: whether the transform is given PIL images, or uint8 tensors [C, H, W].

    Returns:
        ``views(images, generator, *, rows=None, total=None)``: two views, float32 [n, C, h, w] on the images' device,
        of uint8 images [n, C, H, W]; ``rows`` and ``total`` as for `view_of`.
    """

    def views(
        images: Tensor, generator: torch.Generator, *, rows: slice | None = None, total: int | None = None
    ) -> tuple[Tensor, Tensor]:
        check_images(images, bytes_only=True)
        total = len(images) if total is None else total
        rows = slice(None) if rows is None else rows
        check_rows(rows, total, len(images), generator)
        key = int(torch.randint(2**62, (1,), generator=generator))
        batch = zip(images.cpu(), range(total)[rows], strict=True)
        with _global_generators():
            pairs = [_pair(transform, image, (seed, key, place), pil) for image, place in batch]
        return _stacked(pairs, 0, images.device), _stacked(pairs, 1, images.device)

    return views


@contextmanager
def _global_generators() -> Iterator[None]:
    """Put the global generators back as they were."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _pair(transform: Callable[[Any], Any], image: Tensor, keys: tuple[int, int, int], pil: bool) -> list[Tensor]:
    """Two views of one image, the global generators seeded from the keys."""
    seed = generator_for(*keys).initial_seed()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for other devices too
    random.seed(seed)
    np.random.seed(seed % 2**32)
    given = _picture(image) if pil else image
    made = transform(given)
    if not isinstance(made, (tuple, list)):
        made = made, transform(given)
    if len(made) < 2:
        raise InputError("a transform that gives one view or two", "a list of one", "give the view itself")
    return [_floats(view) for view in made[:2]]


def _stacked(pairs: list[list[Tensor]], side: int, device: torch.device) -> Tensor:
    views = [pair[side] for pair in pairs]
    shapes = {tuple(view.shape) for view in views}
    if len(shapes) != 1:
        raise InputError("views of one shape", f"{sorted(shapes)}", "let the transform bring them to one size")
    return torch.stack(views).to(device)


def _picture(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def _floats(view: Any) -> Tensor:
    """A transform's view as float32 [C, h, w]."""
    if hasattr(view, "getbands"):
        pixels = torch.from_numpy(np.array(view))
        view = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if not isinstance(view, Tensor) or view.ndim != 3 or not (view.dtype == torch.uint8 or view.is_floating_point()):
        raise InputError("views [C, h, w] of bytes or floats, or PIL images", described(view), "convert them last")
    plain = view.as_subclass(Tensor).float()  # torchvision wraps its tensors
    return plain / 255 if view.dtype == torch.uint8 else plain
