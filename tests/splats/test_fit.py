"""Training: scenes that are known are found again, and what is trained for a format is what its file holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera, look_at
from scrimp.splats.codec import Settings
from scrimp.splats.container import decode
from scrimp.splats.dataset import Dataset, View
from scrimp.splats.distortion import Lens
from scrimp.splats.fit import Fitting, fit
from scrimp.splats.fit_settings import FitSettings, Rates
from scrimp.splats.fit_together import Together
from scrimp.splats.loss import psnr
from scrimp.splats.optimise import Model
from scrimp.splats.quality import evaluate
from scrimp.splats.quantised import ContainerQuantiser, Quantiser
from scrimp.splats.quantised_sog import SogQuantiser
from scrimp.splats.render import rasterize, render
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.sog_read import read_sog
from scrimp.splats.start import first_splats, focus_of
from scrimp.splats.strategy import Classic, Mcmc, Strategy, Turn, shared
from scrimp.splats.thinning import Thinning, prune_unseen, view_weights

UP = torch.tensor([0.0, -1.0, 0.0])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures so small that threads wait for one another longer than they work."""
    chosen = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(chosen)


def scene(count: int, degree: int = 0, *, size: float = -2.0, seed: int = 0) -> Splats:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    harmonics = 0.2 * draw(count, COUNTS[degree], 3)
    return Splats(
        draw(count, 3), draw(count, 4), size + 0.5 * draw(count, 3), 2 + draw(count), draw(count, 3), harmonics
    )


def camera(turn: float, size: int = 48, away: float = 4.0) -> Camera:
    position = away * torch.tensor([math.sin(turn), -0.3, math.cos(turn)])
    return look_at(position, torch.zeros(3), up=UP, width=size, height=size, field_of_view=50.0)


@dataclass(frozen=True, eq=False)
class Drawn(Dataset):
    """Photographs of a scene that is known."""

    pictures: dict[str, Tensor]

    def load(self, view: View) -> Tensor:
        return self.pictures[view.name]

    @classmethod
    def of(cls, splats: Splats, *, views: int = 6, held_out: int = 1, size: int = 48) -> Drawn:
        lens = Lens.__new__(Lens)  # no file is read, so that no lens is asked
        made = [View(str(i), camera(0.25 * i, size), Path(str(i)), None, lens) for i in range(views)]
        shown = {view.name: (render(splats, view.camera).clamp(0, 1) * 255).round().byte() for view in made}
        test = made[2 : 2 + held_out]
        train = tuple(view for view in made if view not in test)
        return cls(train, tuple(test), splats.means[::2], None, (0.0, 0.0, 0.0), shown)


def of_noise(dataset: Drawn, count: int, degree: int = 0) -> Splats:
    return replace(scene(count, degree, seed=9), opacities=torch.full((count,), -1.0))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_known_scene_is_found_from_noise() -> None:
    dataset = Drawn.of(scene(60, seed=1))
    start = of_noise(dataset, 300)
    settings = FitSettings(degree=0, strategy=None, rates=Rates(means=2e-3, colors=2e-2, scales=1e-2))
    before = evaluate(start, dataset)
    seen = []
    found = fit(dataset, steps=120, start=start, settings=settings, on_step=seen.append)
    after = evaluate(found.splats, dataset)
    assert before.psnr < 15
    assert after.psnr > 19.5
    assert after.ssim > before.ssim + 0.2
    assert (after.perceptual, list(after.by_view)) == (None, ["2"])
    assert [item.done for item in seen] == list(range(1, 121))
    assert tuple(seen) == found.history
    assert evaluate(start, dataset).psnr == before.psnr  # the start is not touched
    shown = render(found.splats, dataset.test[0].camera).clamp(0, 1)
    assert after.psnr == pytest.approx(float(psnr(shown, dataset.load(dataset.test[0]).float() / 255)), abs=1e-4)


@pytest.mark.parametrize("quantiser", [None, ContainerQuantiser, partial(SogQuantiser, palette_size=8)])
@pytest.mark.parametrize(
    "strategy", [Mcmc(cap=70, every=4, window=(0.0, 1.0)), Classic(cap=80, every=5, window=(0.0, 1.0), reset=0.4)]
)
def test_resumes_to_the_same_bits(strategy: Strategy, quantiser: Callable[[], Quantiser] | None) -> None:
    dataset = Drawn.of(scene(40, seed=2), size=24)
    settings = FitSettings(degree=1, strategy=strategy, coarse=((0.3, 2),), quantised_from=0.5, requantise=5)

    def fresh(seed: int = 3) -> Fitting:
        made = None if quantiser is None else quantiser()
        return Fitting(dataset, steps=24, start=of_noise(dataset, 50), settings=settings, seed=seed, quantiser=made)

    whole, half = fresh(), fresh()
    for _ in range(24):
        whole.step()
    for _ in range(15):
        half.step()
    state = half.state_dict()
    kept = {name: values.clone() for name, values in state.items()}
    resumed = fresh()
    resumed.load_state_dict(state)
    for _ in range(9):
        half.step()
        resumed.step()
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(whole.state_dict(), half.state_dict())
    assert same(state, kept)
    assert whole.history == resumed.history
    assert whole.encode() == resumed.encode()
    assert bool(whole.splats().finite().all())
    other = fresh(seed=4)
    other.step()
    assert other.history[0] != whole.history[0] or not same(other.state_dict(), whole.state_dict())


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("settings", [Settings(), Settings(harmonics=0.0, levels=1)])
def test_the_container_holds_what_was_trained(settings: Settings, degree: int) -> None:
    splats = scene(61, degree, seed=5)
    splats.opacities[::7] = -8.0  # left out of the file, far away ones among them
    splats.means[7] = 100.0
    kept = splats.opacities.sigmoid() >= 1 / 255
    quantiser = ContainerQuantiser(settings)
    quantiser.refresh(splats, anew=True)
    leaves = {name: values.clone().requires_grad_() for name, values in splats.tensors().items()}
    shown = quantiser.project(Splats(**leaves))
    compare_file(shown, decode(quantiser.encode(splats)), int(kept.sum()))
    sum((values * 3).sum() for values in shown.tensors().values()).backward()
    assert all(bool((leaf.grad == 3).all()) for leaf in leaves.values() if leaf.numel())
    assert not torch.equal(shown.scales[kept], splats.scales[kept])


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_sog_holds_what_was_trained(degree: int) -> None:
    splats = scene(63, degree, seed=6)
    quantiser = SogQuantiser(palette_size=9)
    quantiser.refresh(splats, anew=True)
    moved = replace(splats, harmonics=splats.harmonics * 1.1)
    quantiser.refresh(moved, anew=False)
    leaves = {name: values.clone().requires_grad_() for name, values in moved.tensors().items()}
    shown = quantiser.project(Splats(**leaves))
    compare_file(shown, read_sog(quantiser.encode(moved), "scene.sog"), 63)
    shown.harmonics.sum().backward()
    assert degree == 0 or bool((leaves["harmonics"].grad == 1).all())
    assert degree == 0 or len(shown.harmonics.detach().flatten(1).unique(dim=0)) == 9
    # As near as the steps allow, in the order and by the axes that the scene has.
    torch.testing.assert_close(shown.means, moved.means, atol=1e-3, rtol=0)
    torch.testing.assert_close(shown.quaternions, moved.quaternions, atol=0.06, rtol=0)


def compare_file(shown: Splats, read: Splats, count: int) -> None:
    """The pictures, the gradients' way aside."""
    assert len(read) == count
    view = camera(0.4, 33)
    one, other = render(Splats(**{k: v.detach() for k, v in shown.tensors().items()}), view), render(read, view)
    assert float(one.max()) > 0.2
    assert float((one - other).abs().max()) < 2e-6


def test_training_for_a_format_ends_in_its_file() -> None:
    dataset = Drawn.of(scene(50, 1, seed=7), size=32)
    start = scene(50, 1, seed=7)
    quantisers: list[Quantiser] = [ContainerQuantiser(Settings(color=0.3)), SogQuantiser(palette_size=4)]
    for quantiser in quantisers:
        settings = FitSettings(degree=1, strategy=None, quantised_from=0.0, degree_share=0.0)
        found = fit(dataset, steps=6, start=start, settings=settings, quantiser=quantiser)
        assert found.encoded is not None
        reader = decode if isinstance(quantiser, ContainerQuantiser) else partial(read_sog, name="scene.sog")
        compare_file(found.splats, reader(found.encoded), len(found.splats))
        assert not torch.equal(found.splats.means, start.means)


def test_a_step_of_two_views_takes_their_mean() -> None:
    dataset = Drawn.of(scene(20), views=3, size=16)  # two to train on
    settings = FitSettings(degree=0, strategy=Classic(), opacity_price=0.0, scale_price=0.0, coarse=())

    def fresh(views: int) -> Fitting:
        start = replace(scene(20), opacities=torch.zeros(20))
        return Fitting(dataset, steps=5, start=start, settings=settings, views=views)

    both, one, other = fresh(2), fresh(1), fresh(1)
    other._dealt = lambda turn: one._dealt(turn + 1)  # type: ignore[method-assign]
    losses = [fitting.step().loss for fitting in (both, one, other)]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-6)
    assert losses[1] != losses[2]
    firsts = [fitting.model.first["colors"] for fitting in (both, one, other)]
    torch.testing.assert_close(firsts[0], (firsts[1] + firsts[2]) / 2)
    pulls = [fitting.model.statistics["pull"] for fitting in (both, one, other)]
    torch.testing.assert_close(pulls[0], pulls[1] + pulls[2])


def test_views_are_shared_evenly_or_not_at_all() -> None:
    assert [list(Together(rank, 2).share(4)) for rank in (0, 1)] == [[0, 2], [1, 3]]
    with pytest.raises(InputError, match="share evenly"):
        Fitting(Drawn.of(scene(9), size=16), start=scene(9), views=3, together=Together(0, 2))
    with pytest.raises(InputError, match="rank"):
        Together(2, 2)


def exact_factor(opacity: Fraction, count: int) -> tuple[float, float]:
    """Equation 9 of the paper, in its own double sum, of exact fractions."""
    each = 1 - (1 - float(opacity)) ** (1 / count)
    part, total = Fraction(each), Fraction(0)
    for i in range(1, count + 1):
        for k in range(i):
            total += math.comb(i - 1, k) * (-1) ** k * Fraction(1 / math.sqrt(k + 1)) * part ** (k + 1)
    return each, float(opacity) / float(total)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_relocated_gaussians_look_as_the_one_did(count: int) -> None:
    for opacity in (0.01, 0.5, 0.99):
        wanted = exact_factor(Fraction(opacity), count)
        found = shared(torch.tensor([opacity], dtype=torch.float64), torch.tensor([count]))
        assert [float(part) for part in found] == pytest.approx(list(wanted), rel=1e-6)


def turn(step: int, *, steps: int = 100, cameras: tuple[Camera, ...] = ()) -> Turn:
    return Turn(step, steps, 11, 1e-6, 4.0, cameras)


def test_mcmc_moves_the_dead_and_grows_to_its_cap() -> None:
    splats = scene(40, 1)
    splats.opacities[:10] = -9.0
    model = Model(splats)
    model.first["means"] += 1
    strategy = Mcmc(cap=45, every=10, growth=1.1, window=(0.1, 1.0), noise=0.0)
    assert not strategy.refine_(model, turn(10))
    assert same(model.detached().tensors(), splats.tensors())
    view, before = camera(0.3), render(splats, camera(0.3))
    counts = []
    for step in (19, 29, 39):
        assert strategy.refine_(model, turn(step))
        counts.append(len(model))
    assert counts == [44, 45, 45]
    assert float(model.leaves["opacities"].detach().sigmoid().min()) > 0.005
    assert bool(model.detached().finite().all())
    # The picture stays: exactly at centres, nearly elsewhere.
    assert float(psnr(render(model.detached(), view), before)) > 25
    moved = torch.nonzero((model.first["means"] == 0).all(1))[:, 0]
    assert len(moved) >= 15  # what was moved, added, or shared its place has no moments


def test_noise_moves_what_is_faint_along_its_axes() -> None:
    splats = scene(400)
    flat = replace(
        splats, scales=torch.tensor([0.0, -1.0, -30.0]).repeat(400, 1), quaternions=torch.eye(4)[:1].repeat(400, 1)
    )
    flat.opacities[:200], flat.opacities[200:] = -9.0, 9.0
    model = Model(flat)
    Mcmc(noise=1.0, farthest=9.0).refine_(model, replace(turn(0), rate=1.0))
    moved = model.detached().means - flat.means
    assert not moved[200:].any()
    assert moved[:200].std(0).tolist() == pytest.approx([0.62, 0.62 * math.exp(-2), 0.0], abs=0.08)


def test_classic_clones_the_small_and_splits_the_large() -> None:
    splats = scene(30, size=-6.0)
    splats.scales[10:20] = -1.0
    splats.opacities[25:] = -9.0
    model, strategy = Model(splats), Classic(every=1, window=(0.0, 1.0), reset=1.0)
    model.statistics = {"pull": torch.ones(30), "views": torch.ones(30)}
    model.statistics["pull"][5:10] = 0
    assert strategy.refine_(model, turn(0))
    found = model.detached()
    # 5 + 10 cloned (5 of those faint, with their clones), 10 split in two, 5 quiet.
    assert len(found) == 30 + 15 + 10 - 10
    assert int((found.scales[:, 0] == -1 - math.log(1.6)).sum()) == 20
    assert not model.statistics["pull"].any()
    assert len(model.statistics["pull"]) == len(model)
    reset = Classic(every=1, pull=math.inf, window=(0.0, 1.0), reset=0.5)
    reset.refine_(model, turn(49))
    assert float(model.leaves["opacities"].detach().sigmoid().max()) == pytest.approx(0.01)
    limited = Model(splats)
    limited.statistics = {"pull": torch.ones(30), "views": torch.ones(30)}
    replace(strategy, cap=33, least=0.0).refine_(limited, turn(0))
    assert len(limited) == 33


def test_classic_follows_the_gradient_by_the_place() -> None:
    dataset = Drawn.of(scene(20, seed=3), size=24)
    fitting = Fitting(dataset, steps=10, start=scene(20, seed=4), settings=FitSettings(degree=0, strategy=Classic()))
    fitting.step()
    pull, views = fitting.model.statistics["pull"], fitting.model.statistics["views"]
    assert float(pull.max()) > 0
    assert bool(((pull == 0) | (views == 1)).all())


def test_weights_are_what_pixels_are_made_of() -> None:
    splats, view = scene(15, 1, size=-1.0), camera(0.1, 21)
    splats.means[3] = view.position * 2  # behind
    weights = view_weights(splats, [view, view])
    alpha = rasterize(splats, view).alpha
    assert float(weights.sum()) == pytest.approx(2 * float(alpha.sum()), rel=1e-4)
    assert float(weights[3]) == 0
    assert len(prune_unseen(splats, [view])) == int((weights > 0).sum()) < 15


def test_thinning_halves_and_takes_what_shows_least() -> None:
    splats, views = scene(40, size=-1.5), (camera(0.1, 24), camera(0.6, 24))
    model, thin = Model(splats), Thinning(keep=0.5, times=2, window=(0.2, 0.6))
    assert not thin.refine_(model, turn(20, cameras=views))
    weights = view_weights(splats, views)
    assert thin.refine_(model, turn(39, cameras=views))
    assert len(model) == math.ceil(40 * math.sqrt(0.5))
    first = weights.argsort(descending=True)[: len(model)].sort().values
    assert torch.equal(model.detached().means, splats.means[first])
    assert thin.refine_(model, turn(59, cameras=views))
    assert len(model) == math.ceil(29 * math.sqrt(0.5))
    assert [thin.price_at(step, 100) for step in (19, 20, 59, 60)] == [0.0, 0.01, 0.01, 0.0]


def test_a_price_on_opacity_and_size_lowers_both() -> None:
    dataset = Drawn.of(scene(20), size=16)
    sizes = []
    for price in (0.0, 1.0):
        settings = FitSettings(degree=0, strategy=None, opacity_price=price, scale_price=price)
        found = fit(dataset, steps=20, start=scene(20), settings=settings).splats
        sizes.append((float(found.opacities.mean()), float(found.scales.mean())))
    assert sizes[1] < sizes[0]
    assert sizes[1][1] < sizes[0][1]


def test_points_of_a_textured_wall_are_found_from_photographs() -> None:
    draw = torch.Generator().manual_seed(0)
    wall = torch.cat([6 * torch.rand(4000, 2, generator=draw) - 3, torch.zeros(4000, 1)], 1)
    colors = 1.5 * torch.randn(4000, 3, generator=draw)
    flat = Splats(
        wall,
        torch.eye(4)[:1].repeat(4000, 1),
        torch.full((4000, 3), -2.9),
        torch.full((4000,), 4.0),
        colors,
        torch.zeros(4000, 0, 3),
    )
    lens = Lens.__new__(Lens)
    views = tuple(View(str(i), camera(math.pi + 0.12 * (i - 2), 64), Path(str(i)), None, lens) for i in range(5))
    shown = {view.name: (render(flat, view.camera).clamp(0, 1) * 255).round().byte() for view in views}
    dataset = Drawn(views, (), None, None, (0.0, 0.0, 0.0), shown)
    found = first_splats(dataset, count=101, degree=2, seed=0)
    assert (len(found), found.degree) == (101, 2)
    assert float(found.means[:, 2].abs().median()) < 0.15
    focus, distances = focus_of([view.camera for view in views])
    assert float(focus.abs().max()) < 1e-4
    assert distances.tolist() == pytest.approx([4 * math.sqrt(1.09)] * 5, rel=1e-4)


def test_gaussians_start_as_large_as_their_surroundings_are_sparse() -> None:
    dataset = Drawn.of(scene(9, seed=1), size=8)
    lattice = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
    found = first_splats(replace(dataset, points=lattice), count=1, degree=0, seed=0)
    assert len(found) == 216
    apart = torch.cdist(lattice, lattice).topk(4, largest=False).values[:, 1:].square().mean(1).sqrt()
    # Neighbours are sought in Morton's order, which misses a few.
    assert float((found.scales[:, 0].exp() / apart).median()) == pytest.approx(1, abs=0.05)
    assert float((found.scales[:, 0].exp() / apart).max()) < 2.5
    for count in (1, 2):
        few = first_splats(replace(dataset, points=lattice[:count]), count=1, degree=0, seed=0)
        assert bool(few.finite().all())


def test_one_gaussian_one_view_and_wrong_input() -> None:
    dataset = Drawn.of(scene(5), views=1, held_out=0, size=8)
    found = fit(
        dataset, steps=3, start=scene(1), settings=FitSettings(degree=0, strategy=Mcmc(every=1, window=(0.0, 1.0)))
    )
    assert bool(found.splats.finite().all())
    with pytest.raises(InputError, match="views to compare with"):
        evaluate(found.splats, dataset)
    with pytest.raises(InputError, match="one step at least"):
        fit(dataset, steps=0, start=scene(1))
    with pytest.raises(InputError, match="one Gaussian at least"):
        fit(dataset, steps=1, start=scene(0))
    with pytest.raises(InputError, match="the state of a fit of 2 steps"):
        fit(dataset, steps=2, start=scene(1), state=found.state)
    with pytest.raises(InputError, match="the state of a fit"):
        Model(scene(2)).load_state_dict({"updates": torch.tensor(1)})
    with pytest.raises(InputError, match="without a palette"):
        ContainerQuantiser(Settings(palette=16))
    with pytest.raises(InputError, match="a palette of 1 to 65536"):
        SogQuantiser(palette_size=0)


def test_what_no_view_sees_is_removed_and_noise_stays_in_the_scene() -> None:
    dataset = Drawn.of(scene(20), size=16)
    start = scene(30)
    start.means[:4] = 50 * UP  # above all pictures
    settings = FitSettings(degree=0, strategy=None, unseen=0.5)
    counts = [item.count for item in fit(dataset, steps=4, start=start, settings=settings).history]
    assert counts[0] == 30
    assert counts[1] == counts[3] <= 26
    kept = fit(dataset, steps=4, start=start, settings=replace(settings, unseen=None))
    assert len(kept.splats) == 30
    model = Model(replace(start, scales=start.scales + 9, opacities=start.opacities - 20))
    Mcmc(farthest=0.1).refine_(model, turn(0))
    moved = (model.detached().means - start.means).abs()
    assert 0 < float(moved.max()) <= 0.4 + 1e-5
