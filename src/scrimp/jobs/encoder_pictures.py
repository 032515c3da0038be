"""What an encoder has learned, to look at: images beside their nearest neighbours, and a map of the embeddings."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.data import Images
from scrimp.jobs.embedding_map import FEWEST, embedding_map, kept_neighbours
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import nearest
from scrimp.report import Section

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SAME, OTHER = "#009e73", "#d7301f"
"""Borders: a bluish green and a red, which are told apart with any of the three colour blindnesses."""
BORDER, GAP, QUERY_GAP, MARGIN = 3, 5, 20, 8
"""Pixels: of a border, between cells, between the queries and their neighbours, around everything."""
TILE = 96
"""The longest side that an image is drawn with, in pixels."""
_QUERIES, _POINTS = 5, 6  # keys of these random streams among those of one seed


def neighbour_picture(
    queries: Images,
    bank: Images,
    *,
    query_features: Tensor,
    bank_features: Tensor,
    count: int = 8,
    k: int = 8,
    labels: bool = True,
    seed: int = 0,
) -> bytes:
    """Images, one a row, each followed by its nearest neighbours by cosine, the nearest first.

    With labels the queries are spread over the classes and stand in their order, and a neighbour's border is green
    where its class is the query's and red where not. Images up to 96 pixels are enlarged by whole factors, pixel by
    pixel; larger ones are reduced to 96.

    Args:
        queries: images to choose from at random, grey or RGB.
        bank: images to find neighbours among, of the same shape.
        query_features: [len(queries), dim], floating point, on any device.
        bank_features: [len(bank), dim].
        count: rows; fewer where there are fewer queries.
        k: neighbours, 1 to ``len(bank)``.
        labels: whether the images' labels mean something.
        seed: of the choice.

    Returns:
        A PNG.

    Raises:
        InputError: features that do not fit the images or are not finite, images that do not fit one another, no
            queries, ``count`` below 1, ``k`` out of its range.
    """
    _check_images(queries, bank, count)
    _check_features(query_features, queries, "query_features")
    _check_features(bank_features, bank, "bank_features")
    rows = _spread(queries.labels if labels else None, len(queries), count, seed)
    found = _neighbours(query_features[rows.to(query_features.device)], bank_features, k)
    same = bank.labels[found] == queries.labels[rows, None] if labels else None
    picture = _grid(queries.batch(rows), bank.batch(found.flatten()).unflatten(0, found.shape), same)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def embedding_section(
    features: Tensor, labels: Tensor | None, classes: tuple[str, ...], *, limit: int = 1500, seed: int = 0
) -> Section:
    """The part of the report that shows embeddings as points in a plane; see `scrimp.jobs.embedding_map`.

    Args:
        features: [n, dim], floating point.
        labels: int64 [n], numbers of ``classes``; ``None`` where unknown, for points of one colour.
        classes: their names.
        limit: points drawn; of more features so many are chosen at random.
        seed: of the choice.

    Raises:
        InputError: shapes or labels that do not fit, features that are not finite, a limit below 1.
    """
    from scrimp.report.scatter import class_scatter

    _check_embeddings(features, labels, classes, limit)
    rows = torch.randperm(len(features), generator=generator_for(seed, _POINTS))[:limit].sort().values
    chosen = features.detach()[rows.to(features.device)]
    place = embedding_map(chosen)
    points = [(_short(x), _short(y)) for x, y in place.tolist()]
    numbers = [0] * len(points) if labels is None else labels.cpu()[rows].tolist()
    names = ("images",) if labels is None else classes
    figure = class_scatter(names, _grouped(points, numbers, len(names)), legend=labels is not None)
    return Section("Map of the embeddings", figure, _about(chosen, place, len(features), labelled=labels is not None))


def _spread(labels: Tensor | None, total: int, count: int, seed: int) -> Tensor:
    """Rows to show, int64 [min(count, total)]: random, one of each class before the second of any, sorted by class."""
    order = torch.randperm(total, generator=generator_for(seed, _QUERIES))
    if labels is None:
        return order[:count]
    ranked, by_class = labels[order].sort(stable=True)
    turn = torch.empty_like(order)
    turn[by_class] = torch.arange(total) - torch.searchsorted(ranked, ranked)
    chosen = order[turn.argsort(stable=True)[:count]]
    return chosen[labels[chosen].argsort(stable=True)]


def _neighbours(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Rows of the bank, int64 [n, k] on the CPU."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)
    ours, theirs = (functional.normalize(part.detach().to(wide), dim=1) for part in (queries, bank))
    return nearest(ours, theirs, k)[1].cpu()


def _grid(queries: Tensor, found: Tensor, same: Tensor | None) -> Picture:
    """Queries [n, C, H, W] at the left, what was found [n, k, C, H, W] beside them, framed by ``same`` [n, k]."""
    from PIL import Image, ImageDraw

    size = _tile(queries.shape[2], queries.shape[3])
    width, height = (
        end + side + BORDER + MARGIN
        for end, side in zip(_corner(found.shape[0], found.shape[1], size), size, strict=True)
    )
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (query, near) in enumerate(zip(queries, found, strict=True)):
        for column, pixels in enumerate((query, *near)):
            x, y = _corner(row + 1, column, size)
            canvas.paste(_drawn(pixels, size), (x, y))
            if same is not None and column:
                frame = (x - BORDER, y - BORDER, x + size[0] + BORDER - 1, y + size[1] + BORDER - 1)
                pen.rectangle(frame, outline=SAME if same[row, column - 1] else OTHER, width=BORDER)
    return canvas


def _tile(height: int, width: int) -> tuple[int, int]:
    """Width and height that an image is drawn with."""
    longest = max(height, width)
    if longest <= TILE:
        return width * (TILE // longest), height * (TILE // longest)
    return max(1, round(width * TILE / longest)), max(1, round(height * TILE / longest))


def _corner(row: int, column: int, size: tuple[int, int]) -> tuple[int, int]:
    """Left and upper edge of an image inside its border; rows count from 1, and so do neighbours: 0 is the query."""
    across, down = size[0] + 2 * BORDER + GAP, size[1] + 2 * BORDER + GAP
    apart = QUERY_GAP - GAP if column else 0
    return MARGIN + BORDER + column * across + apart, MARGIN + BORDER + (row - 1) * down


def _drawn(pixels: Tensor, size: tuple[int, int]) -> Picture:
    """An image, uint8 [C, H, W], at the given width and height."""
    from PIL import Image

    grey = pixels.shape[0] == 1
    picture = Image.fromarray((pixels[0] if grey else pixels.permute(1, 2, 0)).contiguous().numpy())
    larger = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS).convert("RGB")


def _grouped(points: list[tuple[float, float]], numbers: list[int], count: int) -> list[list[tuple[float, float]]]:
    groups: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for point, number in zip(points, numbers, strict=True):
        groups[number].append(point)
    return groups


def _short(value: float) -> float:
    """To four digits: a report need not carry seventeen of each point."""
    return float(f"{value:.4g}")


def _about(features: Tensor, place: Tensor, total: int, *, labelled: bool) -> str:
    """What the map shows, how it was made, and how far to trust it."""
    count = len(features)
    shown = f"{count:,} of {total:,} images, drawn at random" if count < total else f"{count:,} image{'s'[: count > 1]}"
    said = [f"Each point is the embedding of an image ({shown}); images that the encoder finds alike lie together."]
    if labelled:
        said.append("Click on a class to hide it, double-click to see it alone.")
    if count < FEWEST:
        return " ".join([*said, "Made by principal components of the unit embeddings."])
    said.append("Made by t-SNE from 30 principal components of the unit embeddings, without looking at classes.")
    near = min(10, count - 1)
    kept = f"{100 * kept_neighbours(features, place, k=near):.0f} %"
    said.append(f"Of each image's {near} nearest by cosine, {kept} are among its {near} nearest here.")
    said.append("How far apart groups lie, and how wide they are, means little.")
    return " ".join(said)


def _check_images(queries: Images, bank: Images, count: int) -> None:
    if len(queries) == 0 or count < 1:
        raise InputError("one query or more", f"{min(count, len(queries))}", "pass images, and a count from 1")
    if queries.shape != bank.shape or queries.shape[0] not in (1, 3):
        got = f"{list(queries.shape)} and {list(bank.shape)}"
        raise InputError("queries and bank of one shape [1 or 3, H, W]", got, "load both with the same size")


def _check_features(features: Tensor, images: Images, name: str) -> None:
    if features.ndim != 2 or len(features) != len(images) or not features.is_floating_point():
        got = f"{str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        raise InputError(f"{name} as floats [{len(images)}, dim]", got, "pass one embedding an image")
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"finite {name}", "an infinite or NaN one", "check that training did not diverge")


def _check_embeddings(features: Tensor, labels: Tensor | None, classes: tuple[str, ...], limit: int) -> None:
    if limit < 1:
        raise InputError("a limit of at least 1 point", f"{limit}", "draw some")
    if features.ndim != 2 or not features.is_floating_point():
        got = f"{str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        raise InputError("embeddings as floats [n, dim]", got, "pass one row an image")
    if labels is None:
        return
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise InputError(f"labels as int64 [{len(features)}]", got, "pass one class number a row")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError(f"labels from 0 to {len(classes) - 1}", got, "name every class, or pass no labels")
