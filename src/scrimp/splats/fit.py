"""Fit a scene to photographs with poses: 3DGS training (Kerbl et al. 2023, arXiv 2308.04079) on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.dataset import Dataset
from scrimp.splats.fit_settings import FitSettings, Fitted, Progress
from scrimp.splats.fit_together import Together
from scrimp.splats.loss import image_loss
from scrimp.splats.optimise import Model, scene_of
from scrimp.splats.quality import mask_of, photograph
from scrimp.splats.quantised import Quantiser
from scrimp.splats.render import Rendered, rasterize
from scrimp.splats.scene import Splats
from scrimp.splats.start import first_splats, focus_of
from scrimp.splats.strategy import Turn
from scrimp.splats.thinning import view_weights

_VIEWS, _STRATEGY, _BACKGROUND = 1, 2, 3  # streams of random numbers


class Fitting:
    """A training under way: `step` by step, to be stopped and resumed to the same bits anywhere.

    Args:
        dataset: photographs, kept in memory in 8 bits at the size of their cameras.
        steps: of the whole training.
        start: scene to go on from; by default `first_splats`.
        settings: of training.
        seed: of all that is drawn.
        quantiser: format whose rounding training shall learn to live with.
        device: where to train.
        views: that each step looks at; the mean of their gradients is taken.
        together: the processes that share a step's views. All are given the other arguments alike, and hold the same
            bits after every step.

    Raises:
        InputError: fewer than one step, a scene without Gaussians, or views that the processes cannot share.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        steps: int = 3000,
        start: Splats | None = None,
        settings: FitSettings | None = None,
        seed: int = 0,
        quantiser: Quantiser | None = None,
        device: torch.device | str = "cpu",
        views: int = 1,
        together: Together | None = None,
    ) -> None:
        self.dataset, self.steps, self.seed = dataset, steps, seed
        self.settings, self.quantiser = settings or FitSettings(), quantiser
        self.views, self.together = views, together or Together()
        self.together.share(views)
        if steps < 1:
            raise InputError("one step at least", f"{steps}", "raise steps")
        if start is None:
            start = first_splats(dataset, count=self.settings.count, degree=self.settings.degree, seed=seed)
        if not len(start):
            raise InputError("a scene of one Gaussian at least", "an empty one", "pass another start")
        start = start.of_degree(self.settings.degree).to(device, torch.float32)
        dimmed = start.antialiased if self.settings.antialias is None else self.settings.antialias
        self.model = Model(replace(start, antialiased=dimmed))
        self.history: list[Progress] = []
        self.extent = dataset.scene_scale or 1.1 * float(focus_of([view.camera for view in dataset.train])[1].max())
        self._pictures: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.history)

    def step(self) -> Progress:
        """Look at the step's views, update the scene, refine it."""
        step, model = self.done, self.model
        mine = self.together.share(self.views)
        before = {name: values.clone() for name, values in model.statistics.items()} if self.together.world > 1 else {}
        scene = self._projected(step)
        seen = [self._look(scene, step * self.views + turn, step) for turn in mine]
        loss = torch.stack([each.loss for each in seen]).sum() / self.views
        (loss + self._prices(step) * (len(seen) / self.views)).backward()  # type: ignore[no-untyped-call]
        if self.settings.strategy is not None:
            for each in seen:
                pulls = None if each.offsets is None else each.offsets.grad
                # Each view's own gradient, not its part of the mean.
                pulls = None if pulls is None else pulls * self.views
                self.settings.strategy.observe_(model, each.rendered, pulls, each.camera)
        whole = self.together.add_up_(model, before, loss.detach())
        rates = self.settings.rates.at(step / self.steps, self.extent)
        model.update_(rates)
        self._refine(step, rates["means"])
        self.history.append(Progress(step + 1, float(whole), len(model)))
        return self.history[-1]

    def splats(self) -> Splats:
        """The scene as it stands; where a quantiser is at work, as its format stores it."""
        quantiser = self.quantiser
        named = {name: leaf.detach().clone() for name, leaf in self.model.leaves.items()}
        scene = scene_of(named, antialiased=self.model.antialiased)
        return scene if quantiser is None or not quantiser.ready else quantiser.project(scene)

    def encode(self) -> bytes | None:
        """The scene as a file in the quantiser's format; None without one."""
        if self.quantiser is None:
            return None
        if not self.quantiser.ready:
            self.quantiser.refresh(self.model.detached(), anew=True)
        return self.quantiser.encode(self.model.detached())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone, copied; with equal arguments of the class they go on to the same bits."""
        history = torch.tensor([[item.loss, item.count] for item in self.history], dtype=torch.float64)
        found = {"history": history.reshape(-1, 2)}
        found |= {f"model.{name}": values for name, values in self.model.state_dict().items()}
        quantised = {} if self.quantiser is None else self.quantiser.state_dict()
        return found | {f"quantiser.{name}": values for name, values in quantised.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            InputError: another kind of state, or more steps than there are to be.
        """
        if "history" not in state or len(state["history"]) > self.steps:
            raise InputError(f"the state of a fit of {self.steps} steps", f"{sorted(state)[:3]}", "pass the fit's own")
        self.model.load_state_dict(_below(state, "model."))
        if self.quantiser is not None:
            self.quantiser.load_state_dict(_below(state, "quantiser."))
        rows = state["history"].tolist()
        self.history = [Progress(done, loss, int(count)) for done, (loss, count) in enumerate(rows, 1)]

    def _look(self, scene: Splats, turn: int, step: int) -> _Seen:
        """Draw the view whose turn it is, and compare."""
        settings, place = self.settings, self._dealt(turn)
        target, mask = self._picture(place, step)
        camera = self.dataset.train[place].camera.scaled(target.shape[1], target.shape[0])
        offsets = None
        if settings.strategy is not None and settings.strategy.places:
            offsets = torch.zeros(len(scene), 2, device=target.device, requires_grad=True)
        rendered = rasterize(
            scene,
            camera,
            background=self._background(step),
            degree=self._degree(step),
            offsets=offsets,
        )
        loss = image_loss(rendered.color, target, ssim_weight=settings.ssim_weight, mask=mask)
        return _Seen(camera, rendered, offsets, loss)

    def _dealt(self, turn: int) -> int:
        """Which view: all in a new order, again and again."""
        views = len(self.dataset.train)
        order = torch.randperm(views, generator=generator_for(self.seed, _VIEWS, turn // views))
        return int(order[turn % views])

    def _picture(self, place: int, step: int) -> tuple[Tensor, Tensor | None]:
        """A photograph and its mask as they are compared in this step."""
        factors = [factor for until, factor in self.settings.coarse if step < until * self.steps]
        factor = max([1, *factors])
        if (place, factor) not in self._pictures:
            view = self.dataset.train[place]
            picture, mask = photograph(self.dataset, view), mask_of(self.dataset, view)
            kept = _reduced(picture, factor), None if mask is None else _reduced(mask[..., None], factor)[..., 0]
            self._pictures[place, factor] = kept
        device = self.model.leaves["means"].device
        picture, mask = self._pictures[place, factor]
        return picture.to(device).float() / 255, None if mask is None else mask.to(device).float() / 255

    def _projected(self, step: int) -> Splats:
        scene, quantiser = self.model.splats(), self.quantiser
        if quantiser is None or step < self.settings.quantised_from * self.steps:
            return scene
        first = not quantiser.ready
        quantiser.refresh(self.model.detached(), anew=first or step % self.settings.requantise == 0)
        return quantiser.project(scene)

    def _degree(self, step: int) -> int:
        share = self.settings.degree_share
        return self.settings.degree if share <= 0 else min(self.settings.degree, int(step / self.steps / share))

    def _background(self, step: int) -> tuple[float, float, float]:
        if not self.settings.random_background:
            return self.dataset.background
        red, green, blue = torch.rand(3, generator=generator_for(self.seed, _BACKGROUND, step)).tolist()
        return red, green, blue

    def _prices(self, step: int) -> Tensor:
        settings, leaves = self.settings, self.model.leaves
        opacity = settings.opacity_price
        if settings.thinning is not None:
            opacity += settings.thinning.price_at(step, self.steps)
        total = leaves["means"].new_zeros(())
        if opacity:
            total = total + opacity * leaves["opacities"].sigmoid().mean()
        if settings.scale_price:
            total = total + settings.scale_price * leaves["scales"].exp().mean()
        return total

    def _refine(self, step: int, rate: float) -> None:
        seed = int(torch.randint(2**62, (1,), generator=generator_for(self.seed, _STRATEGY, step)))
        cameras = tuple(view.camera for view in self.dataset.train)
        turn = Turn(step, self.steps, seed, rate, self.extent, cameras)
        changed = False
        for refiner in (self.settings.strategy, self.settings.thinning):
            changed |= refiner is not None and refiner.refine_(self.model, turn)
        changed |= self._drop_unseen(step, cameras)
        if changed and self.quantiser is not None and self.quantiser.ready:
            self.quantiser.refresh(self.model.detached(), anew=True)

    def _drop_unseen(self, step: int, cameras: tuple[Camera, ...]) -> bool:
        part = self.settings.unseen
        if part is None or step + 1 != max(1, round(part * self.steps)):
            return False
        kept = view_weights(self.model.detached(), cameras) > 0
        if bool(kept.all()) or not bool(kept.any()):
            return False
        self.model.take_(kept)
        return True


@dataclass(frozen=True, eq=False)
class _Seen:
    """One view of a step, until its gradients are there."""

    camera: Camera
    rendered: Rendered
    offsets: Tensor | None
    loss: Tensor


def fit(
    dataset: Dataset,
    *,
    steps: int = 3000,
    start: Splats | None = None,
    settings: FitSettings | None = None,
    seed: int = 0,
    on_step: Callable[[Progress], object] | None = None,
    state: Mapping[str, Tensor] | None = None,
    quantiser: Quantiser | None = None,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Train a scene to the end; see `Fitting`, whose arguments these are.

    Args:
        on_step: called after each step.
        state: to resume from, of a `Fitting` or a `Fitted` with the same other arguments.

    Raises:
        InputError: see `Fitting`.
    """
    options = {"steps": steps, "start": start, "settings": settings, "seed": seed}
    fitting = Fitting(dataset, **options, quantiser=quantiser, device=device)  # type: ignore[arg-type]
    if state is not None:
        fitting.load_state_dict(state)
    while fitting.done < steps:
        progress = fitting.step()
        if on_step is not None:
            on_step(progress)
    encoded = fitting.encode()
    return Fitted(fitting.splats(), encoded, tuple(fitting.history), fitting.state_dict())


def _reduced(picture: Tensor, factor: int) -> Tensor:
    """uint8 [h, w, c] of a picture from 0 to 1, its sides a part as long."""
    if factor > 1:
        size = [max(1, side // factor) for side in picture.shape[:2]]
        planes = torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], size, mode="area")
        picture = planes[0].permute(1, 2, 0)
    return (picture * 255).round().to(torch.uint8).contiguous()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): values for key, values in state.items() if key.startswith(prefix)}
