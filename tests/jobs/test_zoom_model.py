"""The parts of `scrimp zoom`: where patches lie, what the models compute, what is asked for and no more."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from scrimp.jobs.zoom_labels import Target, average_precision, find_target
from scrimp.jobs.zoom_model import AbmilNet, Scenes, WholeNet, ZoomNet
from scrimp.jobs.zoom_networks import PooledAttention, local_contrast, make_attention, make_features, width_of
from scrimp.jobs.zoom_places import around, location_boxes, mirrored, tiles
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

pytestmark = pytest.mark.touches_global_rng  # fresh layers draw from it; the fixture puts it back


@pytest.fixture(autouse=True)
def own_generator():
    """The same fresh layers in every run, and torch's global generator as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def scenes_of(images: torch.Tensor, view: int, asked: list | None = None) -> Scenes:
    """Whole images [batch, C, h, w] of floats as scenes; what is read is noted in ``asked``."""
    views = nn.functional.interpolate(images, (view, view), mode="bilinear", antialias=True)
    sizes = torch.tensor([images.shape[:1:-1]] * len(images))

    def read(row: int, boxes: torch.Tensor) -> torch.Tensor:
        if asked is not None:
            asked.append((row, boxes.clone()))
        side = int(boxes[0, 2])
        wide = nn.functional.pad(images[row], (2 * side,) * 4)
        parts = [wide[:, 2 * side + y :, 2 * side + x :][:, :h, :w] for x, y, w, h in boxes.tolist()]
        return torch.stack(parts)

    return Scenes(views, sizes, read)


def small_net(**settings) -> ZoomNet:
    usual = {"patch": (5,), "budget": 3, "smooth": 0.0}
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ZoomNet(nn.Conv2d(1, 1, 3, padding=1), features, nn.Linear(4, 2), **{**usual, **settings}).double()


def draws_of(seed: int, rows: int, first: int = 0):
    return lambda number: [generator_for(seed, row, number) for row in range(first, first + rows)]


@pytest.mark.parametrize(
    ("size", "view", "grid", "patch"), [((97, 61), (13, 21), (5, 7), 10), ((8, 9), (9, 8), (9, 8), 3)]
)
def test_places_follow_the_published_map(size, view, grid, patch):
    every = torch.arange(grid[0] * grid[1])
    boxes = location_boxes(every[None], grid, view, torch.tensor([size]), patch=patch)[0]
    for place, (left, top, width, height) in zip(every.tolist(), boxes.tolist(), strict=True):
        row, column = divmod(place, grid[1])
        for start, index, count, low, full in (
            (left, column, grid[1], view[1], size[0]),
            (top, row, grid[0], view[0], size[1]),
        ):
            step = Fraction(low) * Fraction(full, low) / count
            assert start == math.floor(index * step + step / 2 - Fraction(patch, 2) + Fraction(1, 2))
        assert (width, height) == (patch, patch)


def test_a_patch_lies_where_its_location_looks():
    network = PooledAttention(1, 1).double()
    view = torch.zeros(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    logits = network(view)
    assert logits.shape == (1, 1, 4, 4)
    for place in (0, 6, 15):
        (field,) = torch.autograd.grad(logits.flatten()[place], view, retain_graph=True)
        rows, columns = field[0, 0].nonzero(as_tuple=True)
        box = location_boxes(torch.tensor([[place]]), (4, 4), (40, 40), torch.tensor([[400, 400]]), patch=20, trim=4)
        centre = box[0, 0, :2] + 10
        # Equal logits: pooling took the first of eight, half a cell less half a pixel before the cell's centre.
        for axis, seen in ((0, columns), (1, rows)):
            assert float(centre[axis]) / 10 - (float(seen.double().mean()) + 0.5) == pytest.approx(3.5)


@pytest.mark.parametrize("size", [(10, 10), (11, 7), (1, 1), (3, 20)])
def test_tiles_cover_every_pixel_once(size):
    boxes, (rows, columns) = tiles(size, 4)
    count = torch.zeros(rows * 4, columns * 4)
    for left, top, width, height in boxes.tolist():
        count[top : top + height, left : left + width] += 1
    assert bool((count == 1).all())
    assert rows * 4 - size[1] in range(4)
    assert columns * 4 - size[0] in range(4)
    assert len(boxes) == rows * columns


def test_boxes_around_and_mirrored():
    boxes = torch.tensor([[10, 20, 5, 5], [-3, 0, 5, 5]])
    assert around(boxes, 9).tolist() == [[8, 18, 9, 9], [-5, -2, 9, 9]]
    assert mirrored(boxes, 50).tolist() == [[35, 20, 5, 5], [48, 0, 5, 5]]
    assert torch.equal(mirrored(mirrored(boxes, 50), 50), boxes)


@pytest.mark.parametrize(("replacement", "control"), [(False, True), (True, True), (False, False)])
def test_draws_estimate_the_expectation_and_its_gradient(replacement, control):
    """Linear classifier: the mean over draws is the exact output, and so is the gradient of every weight."""
    net = small_net(replacement=replacement, control=control)
    scenes = scenes_of(torch.rand(1, 1, 9, 9, dtype=torch.float64, generator=generator_for(1)), 3)
    weights = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    exact = net.exact(scenes)
    parameters = list(net.parameters())
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad((exact * weights).sum(), parameters)])
    outputs, gradients = [], []
    for seed in range(800):
        found, _ = net(scenes, draws_of(seed, 1))
        outputs.append(found.detach())
        parts = torch.autograd.grad((found * weights).sum(), parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    for drawn, truth in ((torch.cat(outputs), exact[0].detach()), (torch.stack(gradients), wanted)):
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert bool(((drawn.mean(0) - truth).abs() <= 5 * error + 1e-9).all())
    assert float(torch.stack(gradients).std(0)[:9].max()) > 1e-4  # the attention's: draws do differ


def test_inference_takes_the_places_of_most_attention():
    net = small_net(budget=2)
    images = torch.rand(3, 1, 12, 8, dtype=torch.float64, generator=generator_for(2))
    scenes = scenes_of(images, 4)
    look = net.look(scenes)
    for row in range(3):
        attention = net.maps(scenes.views)[row, 0].flatten()
        first, second = attention.argsort(descending=True)[:2].tolist()
        total = attention[first] + attention[second]
        pooled = 0
        for place in (first, second):
            y, x = (
                math.floor((index + 0.5) * side / 4 - 2) for index, side in zip(divmod(place, 4), (12, 8), strict=True)
            )
            patch = torch.zeros(5, 5, dtype=torch.float64)
            for i in range(5):
                for j in range(5):
                    if 0 <= y + i < 12 and 0 <= x + j < 8:
                        patch[i, j] = images[row, 0, y + i, x + j]
            feature = net.features(patch[None, None])[0]
            pooled = pooled + attention[place] / total * feature / feature.norm() * math.sqrt(4)
        assert torch.allclose(look.outputs[row], net.classifier(pooled))
        plogp = -(attention * attention.log()).sum()
        assert torch.allclose(look.entropy[row], plogp)


@pytest.mark.parametrize(("maps", "patch"), [(1, (5,)), (2, (5, 9, 15)), (3, (4, 7))])
def test_only_what_is_drawn_is_read(maps, patch):
    asked: list = []
    features = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = ZoomNet(nn.Conv2d(1, maps, 1), features, nn.Linear(4 * maps * len(patch), 2), patch=patch, budget=2).double()
    images = torch.rand(3, 1, 20, 20, dtype=torch.float64, generator=generator_for(3))

    def read(row, boxes):
        asked.append((row, boxes))
        return torch.rand(len(boxes), 1, patch[0], patch[0], dtype=torch.float64, generator=generator_for(4))

    scenes = scenes_of(images, 5)
    look = net.look(Scenes(scenes.views, scenes.sizes, read), draws_of(0, 3))
    assert sum(len(boxes) for _, boxes in asked) == 3 * maps * len(patch) * 2
    assert [row for row, _ in asked] == [0, 1, 2] * maps * len(patch)
    assert sorted({int(boxes[0, 2]) for _, boxes in asked}) == sorted(patch)
    assert [len(boxes) for boxes in look.boxes] == [2 * maps] * 3
    assert [tuple(one.shape) for one in look.attention] == [(maps, 5, 5)] * 3
    centres = {side: [b[:, :2] + b[:, 2:] // 2 for _, b in asked if int(b[0, 2]) == side] for side in patch}
    for side in patch[1:]:  # all sizes around the same places, up to the half pixel that odd and even sides differ by
        for one, other in zip(centres[patch[0]], centres[side], strict=True):
            assert int((one - other).abs().max()) <= 1


def test_the_draws_of_an_image_do_not_depend_on_its_batch():
    net = small_net()
    images = torch.rand(4, 1, 12, 12, dtype=torch.float64, generator=generator_for(5))
    whole, _ = net(scenes_of(images, 6), draws_of(7, 4))
    halves = [net(scenes_of(images[i : i + 2], 6), draws_of(7, 2, i))[0] for i in (0, 2)]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-12)
    other, _ = net(scenes_of(images, 6), draws_of(8, 4))
    assert not torch.allclose(whole, other)


def test_maps_are_distributions_that_leave_nothing_out():
    net = small_net(smooth=0.2)
    net.attention.bias.data.fill_(1e4)
    maps = net.maps(100 * torch.rand(2, 1, 4, 6, dtype=torch.float64, generator=generator_for(1)))
    assert torch.allclose(maps.flatten(1).sum(1), torch.ones(2, dtype=torch.float64))
    assert float(maps.detach().min()) >= 0.2 / 24 - 1e-12


def test_more_patches_than_places_is_an_error():
    net = small_net(budget=10)
    with pytest.raises(InputError, match=r"--patches of at most 9.*3 x 3"):
        net(scenes_of(torch.rand(1, 1, 9, 9, dtype=torch.float64, generator=generator_for(1)), 3))


def test_pooling_over_all_patches_against_a_loop():
    features = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = AbmilNet(features, nn.Linear(4, 3), dim=4, patch=4, shown=2).double()
    images = torch.rand(2, 1, 8, 6, dtype=torch.float64, generator=generator_for(6))
    asked: list = []
    look = net.look(scenes_of(images, 2, asked))
    assert sum(len(boxes) for _, boxes in asked) == 2 * 4
    for row in range(2):
        padded = torch.zeros(8, 8, dtype=torch.float64)
        padded[:, :6] = images[row, 0]
        found = [features(padded[None, None, y : y + 4, x : x + 4])[0] for y in (0, 4) for x in (0, 4)]
        scores = [net.score(torch.tanh(net.value(f)) * torch.sigmoid(net.gate(f))).detach() for f in found]
        total = sum(float(score.exp()) for score in scores)
        shares = [float(score.exp()) / total for score in scores]
        pooled = sum(share * one for share, one in zip(shares, found, strict=True))
        assert torch.allclose(look.outputs[row], net.classifier(pooled))
        assert look.attention[row].flatten().tolist() == pytest.approx(shares)
        best = max(range(4), key=lambda place: shares[place])
        assert look.boxes[row][0].tolist() == [4 * (best % 2), 4 * (best // 2), 4, 4]
        assert len(look.boxes[row]) == 2


def test_few_patches_at_a_time_without_gradients_change_nothing(monkeypatch):
    net = small_net(budget=5)
    scenes = scenes_of(torch.rand(2, 1, 12, 12, dtype=torch.float64, generator=generator_for(5)), 6)
    with_gradient, _ = net(scenes)
    monkeypatch.setattr("scrimp.jobs.zoom_model._AT_ONCE", 2)
    with torch.no_grad():
        without, _ = net(scenes)
    assert torch.allclose(with_gradient, without, atol=1e-12)


def test_the_whole_image():
    net = WholeNet(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(1, 2)).double()
    scenes = scenes_of(torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=generator_for(1)), 4)
    outputs, spread = net(scenes)
    assert torch.allclose(outputs, net.classifier(scenes.views.mean((2, 3))))
    assert spread.tolist() == [0, 0]
    assert net.look(scenes).boxes == []


@pytest.mark.parametrize(
    "name",
    [
        "convnet",
        "convnet-4",
        "convnet-4-mean",
        "plain-8",
        "plain-8-mean",
        "preact-8",
        "small-resnet18-4",
        "test_resnet",
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_feature_networks(name, channels):
    network = make_features(name, channels, 24)
    width = width_of(network, channels, 24)
    patches = torch.rand(2, channels, 24, 24, generator=generator_for(0))
    network.eval()
    assert network(patches).shape == (2, width)
    assert torch.allclose(network(patches)[:1], network(patches[:1]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("contrast", (6, 10)),
        ("contrast-2", (12, 20)),
        ("contrast-10", (3, 4)),
        ("small", (24, 40)),
        ("pooled", (2, 4)),
        ("test_resnet", (1, 2)),
    ],
)
def test_attention_networks(name, grid):
    network = make_attention(name, 1, 2).eval()
    assert network(torch.zeros(1, 1, 24, 40)).shape == (1, 2, *grid)


def test_the_largest_and_the_mean_value_of_a_patch():
    patches = torch.rand(2, 1, 24, 24, generator=generator_for(0))
    for name in ("convnet-4", "plain-4"):
        largest, mean = make_features(name, 1, 24), make_features(f"{name}-mean", 1, 24)
        mean.load_state_dict(largest.state_dict())
        maps = largest.layers(patches)
        assert torch.equal(largest(patches), maps.amax((2, 3)))
        assert torch.equal(mean(patches), maps.mean((2, 3)))


def test_local_contrast_against_a_loop():
    views = torch.rand(2, 3, 8, 12, dtype=torch.float64, generator=generator_for(1))
    grey = views.mean(1)
    blocks = grey.unfold(1, 2, 2).unfold(2, 2, 2)  # [2, 4, 6, 2, 2]
    wanted = torch.zeros(2, 4, 6, dtype=torch.float64)
    for image, row, column in np.ndindex(2, 4, 6):
        near = blocks[image, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        wanted[image, row, column] = near.std(correction=0)
    wanted = (wanted - wanted.mean((1, 2), keepdim=True)) / wanted.std((1, 2), correction=0, keepdim=True)
    assert torch.allclose(local_contrast(views, (4, 6))[:, 0], wanted, atol=1e-12)
    assert not local_contrast(torch.full((1, 1, 8, 8), 7.0), (4, 4)).any()


def test_contrast_is_where_attention_begins():
    view = torch.zeros(1, 1, 40, 40)
    view[0, 0, 20:24, 28:32] = torch.rand(4, 4, generator=generator_for(2)) * 5
    network = make_attention("contrast-2", 1, 1)
    with torch.no_grad():
        network.head.weight.zero_()
        attention = network(view)[0, 0].flatten().softmax(0).view(20, 20)
    assert attention[8:14, 12:18].sum() > 0.9
    network(view).square().sum().backward()
    assert network.weight.grad is not None


def test_a_location_is_the_best_of_its_places():
    fine, coarse = make_attention("contrast-2", 1, 1), make_attention("contrast-4", 1, 1)
    coarse.load_state_dict(fine.state_dict())
    view = torch.rand(1, 1, 24, 24, generator=generator_for(4))
    best = fine(view).unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    assert torch.equal(coarse(view), best)


def test_contrast_moves_with_the_view():
    network = make_attention("contrast-2", 1, 1).double().eval()
    with torch.no_grad():
        network.weight.zero_()  # its mean and spread are of the whole view
        view = torch.rand(1, 1, 32, 32, dtype=torch.float64, generator=generator_for(3))
        one, moved = network(view), network(view.roll(2, 3))
        flipped = network(view.flip(3))
    assert torch.allclose(moved[..., 4:-4, 5:-4], one[..., 4:-4, 4:-5])
    assert flipped.shape == one.shape


def test_a_finer_map_of_a_timm_network():
    assert make_attention("test_resnet", 1, 1, level=1).eval()(torch.zeros(1, 1, 32, 32)).shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: make_features("resnet181", 1, 24), "timm model name"),
        (lambda: make_attention("resnet181", 1, 1), "timm model name"),
        (lambda: make_attention("test_resnet", 1, 1, level=9), "maps of features"),
        (lambda: width_of(make_features("plain", 1, 8), 1, 8), "8 x 8"),
        (lambda: make_features("plain-8", 1, 24, pretrained=True), "timm model name"),
        (lambda: make_attention("contrast-3", 1, 1), "an even number"),
    ],
)
def test_unusable_networks_say_so(make, word):
    with pytest.raises(InputError, match=word):
        make()


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_against_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    chance = np.random.default_rng(seed)
    scores = chance.integers(0, 7, 30) / 7 if seed % 2 else chance.normal(size=30)  # with ties, without
    labels = chance.integers(0, 2, 30)
    found = average_precision(torch.tensor(scores), torch.tensor(labels))
    assert found == pytest.approx(metrics.average_precision_score(labels, scores))
    assert average_precision(torch.tensor(scores), torch.zeros(30)) is None


def test_texts_become_targets():
    target = find_target(["b", "a", "b"], "auto")
    assert (target.task, target.classes) == ("classes", ("a", "b"))
    assert target.encode(["b", "a"]).tolist() == [1, 0]
    target = find_target(["b; a", "", "c"], "auto")
    assert (target.task, target.classes) == ("labels", ("a", "b", "c"))
    assert target.encode(["", "c;a"]).tolist() == [[0, 0, 0], [1, 0, 1]]
    assert find_target(["x;y", "z"], "auto", sorted_folders=True).classes == ("x;y", "z")
    target = find_target(["1", "2.5", "7"], "regression")
    assert target.encode(["1", "2.5", "7"]).mean().item() == pytest.approx(0, abs=1e-6)
    assert target.answers(target.encode(["2.5"])[:, None])[0] == ["2.5"]


@pytest.mark.parametrize(
    ("texts", "task", "word"),
    [
        (["a", "a"], "auto", "two classes"),
        (["a", ""], "auto", "an empty one"),
        (["1", "one"], "regression", "'one'"),
        (["1", "nan"], "regression", "'nan'"),
        (["", ""], "labels", "two classes"),
    ],
)
def test_unusable_labels_say_so(texts, task, word):
    with pytest.raises(InputError, match=word):
        find_target(texts, task)


def test_qualities_against_loops():
    generator = generator_for(3)
    outputs = torch.randn(20, 3, generator=generator)
    labels = torch.randint(0, 3, (20,), generator=generator)
    found = Target("classes", ("a", "b", "c")).quality(outputs, labels)
    right = sum(int(row.argmax()) == label for row, label in zip(outputs, labels.tolist(), strict=True))
    nats = [-math.log(float(row.double().softmax(0)[label])) for row, label in zip(outputs, labels, strict=True)]
    assert found == {"accuracy": pytest.approx(right / 20), "loss": pytest.approx(sum(nats) / 20)}
    several = (torch.rand(20, 3, generator=generator) < 0.4).float()
    several[:, 2] = 0  # never occurs
    found = Target("labels", ("a", "b", "c")).quality(outputs, several)
    exact = sum(
        all((o > 0) == (t > 0) for o, t in zip(*pair, strict=True)) for pair in zip(outputs, several, strict=True)
    )
    assert found["accuracy"] == pytest.approx(exact / 20)
    both = [average_precision(outputs[:, k], several[:, k]) for k in (0, 1)]
    assert found["mean_average_precision"] == pytest.approx(sum(both) / 2)
    found = Target("regression", shift=5, scale=2).quality(outputs[:, :1], outputs[:, 0] + 3)
    assert found == {"loss": pytest.approx(9), "mean_error": pytest.approx(6)}
