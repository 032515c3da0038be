"""Pictures of what an encoder has learned: neighbours in their order and colours, and the map of embeddings."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from scrimp.data import ImageData, TensorImages
from scrimp.jobs.embedding_map import affinities, embedding_map, gradient, kept_neighbours, principal_components
from scrimp.jobs.encoder_pictures import (
    BORDER,
    GAP,
    MARGIN,
    OTHER,
    QUERY_GAP,
    SAME,
    embedding_section,
    neighbour_picture,
)
from scrimp.primitives.errors import InputError

GREEN, RED = ImageColor.getrgb(SAME), ImageColor.getrgb(OTHER)
WHITE = (255, 255, 255)


def plain(count: int, *, channels: int = 1, height: int = 28, width: int = 28, start: int = 0) -> Tensor:
    """Images of one tone each, told apart by it: ``start``, ``start + 1``, ..."""
    tones = torch.arange(start, start + count, dtype=torch.uint8)
    return tones.view(-1, 1, 1, 1).expand(-1, channels, height, width).contiguous()


def angles(degrees: list[float]) -> Tensor:
    """Features in a plane at these angles, of different lengths: only the cosine is to count."""
    at = torch.tensor(degrees).deg2rad()
    return torch.stack([at.cos(), at.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def opened(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.mode == "RGB"
    return picture


def corner(row: int, column: int, *, width: int = 84, height: int = 84) -> tuple[int, int]:
    """Where the image of a cell begins; column 0 is the query."""
    x = MARGIN + BORDER + column * (width + 2 * BORDER + GAP) + (QUERY_GAP - GAP if column else 0)
    return x, MARGIN + BORDER + row * (height + 2 * BORDER + GAP)


def tones(picture: Image.Image, row: int, columns: range, **size: int) -> list[int]:
    return [picture.getpixel(tuple(edge + 9 for edge in corner(row, column, **size)))[0] for column in columns]


def test_neighbours_stand_in_the_order_of_the_cosine() -> None:
    bank = TensorImages(plain(6, start=100), torch.zeros(6, dtype=torch.int64))
    query = TensorImages(plain(1, start=7), torch.zeros(1, dtype=torch.int64))
    features = angles([80, 10, 179, -30, 41, -95])
    png = neighbour_picture(query, bank, query_features=angles([0]), bank_features=features, k=6)
    assert tones(opened(png), 0, range(7)) == [7, 101, 103, 104, 100, 105, 102]


def test_borders_tell_classes_apart_to_the_pixel() -> None:
    bank = TensorImages(plain(3, start=100), torch.tensor([1, 0, 1]))
    query = TensorImages(plain(1, start=7), torch.tensor([1]))
    png = neighbour_picture(query, bank, query_features=angles([0]), bank_features=angles([5, 10, 15]), k=3)
    picture = opened(png)
    for column, colour in ((0, WHITE), (1, GREEN), (2, RED), (3, GREEN)):
        (x, y), inside = corner(0, column), (7 if column == 0 else 99 + column,) * 3
        for place in (x - BORDER, x - 1, x + 84, x + 84 + BORDER - 1):
            assert picture.getpixel((place, y + 40)) == colour
        for place in (y - BORDER, y - 1, y + 84, y + 84 + BORDER - 1):
            assert picture.getpixel((x + 40, place)) == colour
        assert picture.getpixel((x - BORDER - 1, y + 40)) == WHITE
        assert picture.getpixel((x + 84 + BORDER, y + 40)) == WHITE
        assert {picture.getpixel((x + a, y + b)) for a in (0, 83) for b in (0, 83)} == {inside}


def test_without_labels_there_are_no_borders() -> None:
    queries, bank = (TensorImages(plain(9, start=start), torch.arange(9)) for start in (100, 200))
    features = torch.eye(9)
    png = neighbour_picture(queries, bank, query_features=features, bank_features=features, count=4, labels=False)
    colours = {colour for _, colour in opened(png).getcolors(1 << 16)}
    assert {GREEN, RED} & colours == set()
    assert tones(opened(png), 3, range(2))[0] + 100 == tones(opened(png), 3, range(2))[1]


@pytest.mark.parametrize(
    ("height", "width", "drawn"),
    [
        (28, 28, (84, 84)),
        (32, 32, (96, 96)),
        (1, 1, (96, 96)),
        (64, 64, (64, 64)),
        (96, 96, (96, 96)),
        (97, 97, (96, 96)),
        (224, 224, (96, 96)),
        (20, 45, (90, 40)),
        (300, 150, (48, 96)),
        (1, 500, (96, 1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_are_readable(height: int, width: int, drawn: tuple[int, int], channels: int) -> None:
    images = TensorImages(plain(3, channels=channels, height=height, width=width, start=60), torch.tensor([0, 0, 1]))
    features = torch.eye(3)
    png = neighbour_picture(images, images, query_features=features, bank_features=features, count=2, k=2)
    across = 3 * (drawn[0] + 2 * BORDER) + QUERY_GAP + GAP + 2 * MARGIN
    down = 2 * (drawn[1] + 2 * BORDER) + GAP + 2 * MARGIN
    assert opened(png).size == (across, down)


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_smoothly() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (1, 3, 28, 28), generator=generator, dtype=torch.uint8)
    one = torch.ones(1, 2)
    label = torch.zeros(1, dtype=torch.int64)
    png = neighbour_picture(
        TensorImages(small, label), TensorImages(small, label), query_features=one, bank_features=one, k=1
    )
    x, y = corner(0, 0)
    cut = opened(png).crop((x, y, x + 84, y + 84))
    want = small[0].repeat_interleave(3, 1).repeat_interleave(3, 2).permute(1, 2, 0)
    assert cut.tobytes() == want.contiguous().numpy().tobytes()
    checks = (torch.arange(192)[:, None] + torch.arange(192)).remainder(2).mul(255).to(torch.uint8)
    fine = TensorImages(checks[None, None], label)
    shown = opened(neighbour_picture(fine, fine, query_features=one, bank_features=one, k=1)).convert("L")
    x, y = corner(0, 0, width=96, height=96)
    # Every other pixel alone would be all black or all white; in truth the mean is grey.
    low, high = shown.crop((x + 5, y + 5, x + 90, y + 90)).getextrema()
    assert 110 < low <= high < 145


def test_queries_are_spread_over_the_classes_and_in_their_order() -> None:
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 3 + [4] * 2)
    queries = TensorImages(plain(100), labels)
    features = torch.ones(100, 3)
    bank = TensorImages(plain(1, start=200), torch.tensor([0]))

    def shown(count: int, seed: int = 0) -> list[int]:
        png = neighbour_picture(
            queries, bank, query_features=features, bank_features=torch.ones(1, 3), count=count, k=1, seed=seed
        )
        picture = opened(png)
        rows = (picture.height - 2 * MARGIN + GAP) // (84 + 2 * BORDER + GAP)
        return [tones(picture, row, range(1))[0] for row in range(rows)]

    for seed in range(3):
        assert labels[shown(8, seed)].tolist() == [0, 0, 1, 1, 2, 2, 4, 4]
    assert sorted(set(labels[shown(3)].tolist())) == labels[shown(3)].tolist()
    assert shown(8) == shown(8)
    assert shown(8) != shown(8, seed=1)
    assert sorted(shown(1000)) == list(range(100))


def test_features_of_other_types_are_taken_and_none_is_changed() -> None:
    images = TensorImages(plain(5, start=50), torch.arange(5))
    features = angles([0, 20, 50, 90, 140]).to(torch.bfloat16).requires_grad_()
    before = features.detach().clone()
    png = neighbour_picture(images, images, query_features=features.double(), bank_features=features, count=5, k=2)
    assert tones(opened(png), 0, range(3)) == [50, 50, 51]
    assert tones(opened(png), 4, range(3)) == [54, 54, 53]
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "1 to 4 neighbours"),
        ({"k": 0}, "1 to 4 neighbours"),
        ({"count": 0}, "one query or more"),
        ({"query_features": torch.ones(4, 2)}, r"query_features as floats \[3, dim\]; got float32 \[4, 2\]"),
        ({"bank_features": torch.ones(4, 2, dtype=torch.int64)}, "got int64"),
        ({"bank_features": torch.full((4, 2), torch.nan)}, "finite bank_features"),
        ({"bank_features": torch.ones(4, 3)}, "queries .* and keys"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    queries, bank = (TensorImages(plain(count), torch.zeros(count, dtype=torch.int64)) for count in (3, 4))
    given = {"query_features": torch.ones(3, 2), "bank_features": torch.ones(4, 2), "k": 2} | change
    with pytest.raises(InputError, match=message):
        neighbour_picture(queries, bank, **given)


@pytest.mark.parametrize("other", [plain(4, channels=3), plain(4, height=29), plain(4, channels=2)])
def test_images_of_two_shapes_are_refused(other: Tensor) -> None:
    queries = TensorImages(plain(3, channels=other.shape[1] if other.shape[1] == 2 else 1), torch.arange(3))
    with pytest.raises(InputError, match="one shape"):
        neighbour_picture(
            queries,
            TensorImages(other, torch.arange(4)),
            query_features=torch.ones(3, 2),
            bank_features=torch.ones(4, 2),
        )


def test_no_queries_are_refused() -> None:
    none, bank = (TensorImages(plain(count), torch.zeros(count, dtype=torch.int64)) for count in (0, 4))
    with pytest.raises(InputError, match="one query or more"):
        neighbour_picture(none, bank, query_features=torch.ones(0, 2), bank_features=torch.ones(4, 2), k=1)


# The map.


def clusters(count: int, *, dim: int = 40, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian clouds about three directions, and which is whose."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, dim, generator=generator)
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels


def agreement(place: Tensor, labels: Tensor) -> float:
    """Share of points whose nearest other point is of their class."""
    apart = torch.tensor([[math.dist(a, b) for b in place.tolist()] for a in place.tolist()]).fill_diagonal_(math.inf)
    return float((labels[apart.argmin(1)] == labels).double().mean())


@pytest.mark.parametrize("count", [15, 60, 151])
def test_the_map_keeps_clusters_apart(count: int) -> None:
    features, labels = clusters(count)
    place = embedding_map(features)
    assert place.shape == (count, 2)
    assert agreement(place, labels) == 1
    if count > 100:
        within = torch.stack([place[labels == own].std(0).norm() for own in range(3)]).mean()
        centres = torch.stack([place[labels == own].mean(0) for own in range(3)])
        assert torch.pdist(centres).min() > 3 * within


def test_clusters_hidden_from_the_first_two_components_are_found() -> None:
    features, labels = clusters(150, noise=0.05)
    loud = torch.randn(150, 2, generator=torch.Generator().manual_seed(1)) * 3
    features = torch.cat([features / features.norm(dim=1, keepdim=True), loud], 1)
    rows = torch.nn.functional.normalize(features, dim=1)
    assert agreement(embedding_map(features), labels) > agreement(principal_components(rows, 2), labels) + 0.2


def test_the_map_repeats_and_leaves_its_input_alone() -> None:
    features, _ = clusters(40)
    features.requires_grad_()
    before = features.detach().clone()
    first = embedding_map(features)
    assert torch.equal(first, embedding_map(features))
    assert torch.equal(features, before)
    assert not first.requires_grad
    assert torch.allclose(first.mean(0), torch.zeros(2), atol=1e-3)
    across, between, down = (first.T @ first).flatten()[[0, 1, 3]]
    assert across >= down
    assert abs(between) < 1e-4 * down


def test_lengths_of_features_do_not_matter() -> None:
    features, _ = clusters(30)
    features = features.double()
    scaled = features * torch.arange(1, 31)[:, None]
    apart = (embedding_map(scaled, iterations=50) - embedding_map(features, iterations=50)).abs().max()
    assert apart < 1e-6
    assert embedding_map(features, iterations=1).dtype == torch.float64
    assert embedding_map(features.bfloat16(), iterations=1).dtype == torch.float32


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_points_are_placed_by_their_components(count: int) -> None:
    rows = torch.nn.functional.normalize(clusters(count, dim=7)[0], dim=1)
    place = embedding_map(rows)
    assert place.shape == (count, 2)
    if count <= 3:  # three points lie in a plane: nothing is lost
        assert torch.allclose(torch.cdist(place, place), torch.cdist(rows, rows), atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 40])
@pytest.mark.parametrize("dim", [1, 2, 50])
def test_degenerate_features_give_finite_maps(count: int, dim: int) -> None:
    half = torch.ones(count, dim)
    half[: count // 2] *= -1
    for features in (torch.ones(count, dim), torch.zeros(count, dim), half, half * 1e-30):
        place = embedding_map(features)
        assert place.shape == (count, 2)
        assert torch.isfinite(place).all()


def test_duplicates_of_a_point_beyond_the_perplexity_stay_together() -> None:
    features, labels = clusters(100, noise=0.3)
    features[:50] = features[0]
    place = embedding_map(features)
    assert torch.isfinite(place).all()
    assert place[:50].std(0).max() < 0.2 * place.std(0).max()
    assert agreement(place[50:], labels[50:]) == 1


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 4), torch.ones(4, 0), torch.full((9, 2), torch.inf)])
def test_features_that_make_no_map_are_refused(bad: Tensor) -> None:
    with pytest.raises(InputError):
        embedding_map(bad)


@pytest.mark.parametrize(("count", "dim"), [(20, 5), (9, 30), (2, 4)])
def test_principal_components_are_those_of_the_singular_value_decomposition(count: int, dim: int) -> None:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = principal_components(rows, 3)
    want = (left * values)[:, : found.shape[1]]
    assert found.shape == (count, min(3, count, dim))
    # The one beyond the rank is the root of rounding, and nothing.
    assert torch.allclose(found.abs(), want.abs(), atol=1e-6)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) >= 0).all()


def test_affinities_are_those_of_a_loop_and_have_the_perplexity() -> None:
    points = clusters(17, dim=3)[0].double()
    found = affinities(points, 4.0)
    conditional = torch.zeros(17, 17, dtype=torch.float64)
    for i in range(17):
        apart = [float((points[i] - points[j]).square().sum()) for j in range(17)]
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            weights = [math.exp(-beta * apart[j]) if j != i else 0.0 for j in range(17)]
            shares = [weight / max(sum(weights), 1e-300) for weight in weights]
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            low, high = (beta, high) if math.exp(entropy) > 4 else (low, beta)
        conditional[i] = torch.tensor(shares)
    assert torch.allclose(found, (conditional + conditional.T) / 34, atol=1e-8)
    assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_is_that_of_the_divergence(dtype: torch.dtype) -> None:
    affinity = affinities(clusters(23, dim=4)[0].double(), 5.0)
    place = torch.randn(23, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        kernel = 1 / (1 + (place[:, None] - place).square().sum(2))
        off = ~torch.eye(23, dtype=torch.bool)
        drawn = kernel / kernel[off].sum()
        divergence = (affinity[off] * (affinity[off] / drawn[off]).log()).sum()
    (want,) = torch.autograd.grad(divergence, place)
    space = torch.full((2, 23, 23), torch.nan, dtype=dtype)
    for given in (None, space):
        found = gradient(affinity.to(dtype), place.detach().to(dtype), space=given)
        assert torch.allclose(found.double(), want, atol=1e-12 if dtype == torch.float64 else 1e-6)


def test_kept_neighbours_are_counted() -> None:
    line = angles([0, 10, 25, 45, 70])
    straight = torch.tensor([[0.0, 0], [10, 0], [25, 0], [45, 0], [70, 0]])
    assert kept_neighbours(line, straight, k=2) == 1
    assert kept_neighbours(line, straight[[0, 4, 1, 3, 2]], k=4) == 1
    # Nearest on the circle: 1 0 1 2 3. With 0 and 1 changed for one another: 1 0 0 2 3.
    assert kept_neighbours(line, straight[[1, 0, 2, 3, 4]], k=1) == pytest.approx(4 / 5)


# The section of the report.


def test_the_section_has_a_trace_a_class_and_says_how_it_was_made(shapes: ImageData) -> None:
    features = shapes.test.batch(torch.arange(96)).flatten(1).float()
    section = embedding_section(features, shapes.test.labels, shapes.classes)
    assert [trace.name for trace in section.content.data] == ["bar", "cross", "ring"]
    assert [len(trace.x) for trace in section.content.data] == [32, 32, 32]
    place = embedding_map(features)
    for number, trace in enumerate(section.content.data):
        drawn = torch.tensor([trace.x, trace.y]).T
        assert torch.allclose(drawn, place[shapes.test.labels == number], rtol=1e-3)
    kept = f"{100 * kept_neighbours(features, place):.0f} %"
    assert "(96 images)" in section.text
    assert f"10 nearest by cosine, {kept} are" in section.text
    assert "means little" in section.text


def test_more_points_than_the_limit_are_drawn_from() -> None:
    features, labels = clusters(60)
    names = ("a", "b", "c")
    one, same, other = (embedding_section(features, labels, names, limit=25, seed=seed) for seed in (0, 0, 1))
    assert sum(len(trace.x) for trace in one.content.data) == 25
    assert "25 of 60 images, drawn at random" in one.text
    assert one.content.to_json() == same.content.to_json() != other.content.to_json()


def test_unlabelled_points_have_one_colour_and_no_legend() -> None:
    section = embedding_section(clusters(12)[0], None, ("unused",))
    (trace,) = section.content.data
    assert (len(trace.x), section.content.layout.showlegend, trace.hoverinfo) == (12, False, "skip")
    assert "class" not in section.text.replace("without looking at classes", "")


@pytest.mark.parametrize("count", [1, 3])
def test_a_map_of_few_points_says_that_no_neighbours_were_embedded(count: int) -> None:
    section = embedding_section(torch.randn(count, 5, generator=torch.Generator()), torch.arange(count), tuple("abc"))
    assert "t-SNE" not in section.text
    assert len(section.content.data) == count


@pytest.mark.parametrize(
    ("features", "labels", "limit", "message"),
    [
        (torch.ones(4, 2), torch.tensor([0, 1, 2, 3]), 9, "labels from 0 to 2; got 0 to 3"),
        (torch.ones(4, 2), torch.tensor([0, 1, -1, 1]), 9, "got -1 to 1"),
        (torch.ones(4, 2), torch.tensor([0, 1, 1]), 9, r"labels as int64 \[4\]"),
        (torch.ones(4, 2), torch.ones(4), 9, "got float32"),
        (torch.ones(4, 2), None, 0, "at least 1 point"),
        (torch.ones(4), None, 9, "embeddings as floats"),
        (torch.ones(0, 2), torch.ones(0, dtype=torch.int64), 9, "one image or more"),
    ],
)
def test_a_section_of_what_does_not_fit_is_refused(
    features: Tensor, labels: Tensor | None, limit: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        embedding_section(features, labels, ("a", "b", "c"), limit=limit)


def test_importing_pictures_loads_no_plotly() -> None:
    code = "import sys, scrimp.jobs.encoder_pictures; print({'plotly', 'timm', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"
