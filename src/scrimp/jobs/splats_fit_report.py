"""What `scrimp splats fit` says of a trained scene: its receipts, the report's pictures, and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scrimp.jobs.folder import plain
from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_fit_file import Stored, perceptual
from scrimp.jobs.splats_fit_plan import measured_views
from scrimp.jobs.splats_fit_run import Trained
from scrimp.jobs.splats_pages import as_sog, start_of
from scrimp.jobs.splats_pictures import Looks, difference, png
from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt
from scrimp.report import Section, picture, units
from scrimp.report.splats_page import scene_page
from scrimp.splats.dataset import Dataset, View
from scrimp.splats.orbit import up_of_cameras
from scrimp.splats.quality import Quality, evaluate, photograph
from scrimp.splats.render import render
from scrimp.splats.scene import Splats
from scrimp.splats.start import focus_of

_HOW = "training steps and writing the file, measuring left out"


@dataclass(frozen=True, eq=False)
class Way:
    """One way to a file.

    Attributes:
        name, baseline: as in `Receipt`.
        splats: as a reader of the file finds them.
        stored: its bytes.
        trained, cpu_seconds: the training, and what it took on all processes.
        notes: further facts.
        spent: CPU and wall seconds that writing the file took.
    """

    name: str
    splats: Splats
    stored: int
    trained: Trained
    cpu_seconds: float
    notes: Mapping[str, Any]
    baseline: bool = False
    spent: tuple[float, float] = (0.0, 0.0)


@dataclass
class Judge:
    """Compares scenes with the photographs held out; each scene once."""

    config: SplatsFitConfig
    dataset: Dataset
    device: torch.device
    _found: dict[int, tuple[Splats, Quality]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.views = list(measured_views(self.dataset))
        self._perceptual = perceptual()

    def quality(self, splats: Splats) -> Quality:
        """On all views that are measured."""
        if id(splats) not in self._found:
            scene = splats.to(self.device, torch.float32)
            found = evaluate(scene, self.dataset, views=self.views, perceptual=self._perceptual)
            self._found[id(splats)] = splats, found
        return self._found[id(splats)][1]

    def shown(self, splats: Splats, view: View) -> torch.Tensor:
        """What the scene shows of a view, [h, w, 3] from 0 to 1, on the CPU."""
        with torch.no_grad():
            scene = splats.to(self.device, torch.float32)
            return render(scene, view.camera, background=self.dataset.background).clamp(0, 1).cpu()


def receipt_of(way: Way, judge: Judge, facts: dict[str, Any]) -> Receipt:
    """Of one way; ``facts`` hold for all of them."""
    config, found, spent = judge.config, judge.quality(way.splats), way.trained.spent
    quality: dict[str, float | None] = {
        "psnr": found.psnr,
        "worst_psnr": min(found.by_view.values()),
        "ssim": found.ssim,
    }
    if found.perceptual is not None:
        quality["lpips"] = found.perceptual
    whole = {key: value for key, value in facts.items() if key != "name"}
    return Receipt(
        kind="run",
        name=f"splats {facts['name']}",
        way=way.name,
        seed=config.seed,
        baseline=way.baseline,
        quality=quality,
        cost=_cost(way),
        curve=spent.curve,
        config=plain(config),
        notes={
            **whole,
            "Gaussians": len(way.splats),
            "bytes a Gaussian": way.stored / max(1, len(way.splats)),
            "PSNR by view": {name: round(value, 3) for name, value in found.by_view.items()},
            "unit of train_loss": "0.8 L1 + 0.2 (1 - SSIM)",
            "resumed": spent.resumes,
            **{key: value for key, value in way.notes.items() if value is not None},
        },
    )


def fit_sections(splats: Splats, judge: Judge) -> list[Section]:
    """The view in the middle and the one that is worst: photograph, what the file shows, and the difference."""
    scores = judge.quality(splats).by_view
    ranked = sorted(judge.views, key=lambda view: scores[view.name])
    chosen = {"the worst of all": ranked[0], "the middle one": ranked[len(ranked) // 2]}
    chosen = chosen if len(ranked) > 1 else {"the only one": ranked[0]}
    return [_beside(splats, view, judge, f"{told}, {scores[view.name]:.2f} dB") for told, view in chosen.items()][::-1]


def page_of(stored: Stored, splats: Splats, config: SplatsFitConfig, judge: Judge) -> str:
    """HTML that shows the scene in any browser, from where the first measured photograph was taken."""
    view, cameras = judge.views[0], [each.camera for each in judge.dataset.train]
    looks = Looks([view.name], [view.camera], focus_of(cameras)[0], up_of_cameras(cameras), "photographs")
    data = stored.data if config.format == "sog" else as_sog(splats)
    drawn = "" if config.format == "sog" else f"; drawn from a .sog, the file is a .{config.format}"
    text = f"{units.size(len(stored.data))}, {judge.quality(splats).psnr:.2f} dB on photographs held out{drawn}"
    text = text if judge.dataset.test else text.replace("held out", "trained on")
    still = png(judge.shown(splats, view))
    return scene_page(
        data,
        title=config.images.resolve().stem,
        camera=start_of(looks),
        text=text,
        count=len(splats),
        picture=still,
        antialiased=splats.antialiased,
    )


def _beside(splats: Splats, view: View, judge: Judge, told: str) -> Section:
    taken, shown = photograph(judge.dataset, view), judge.shown(splats, view)
    pictures = {
        "Photograph": taken,
        "What the file shows": shown,
        "Difference, eight times as strong": difference(shown, taken),
    }
    figures = "".join(picture(png(image), f"{said}, {view.name}", caption=said) for said, image in pictures.items())
    kind = "held out" if judge.dataset.test else "trained on"
    title = f"Photograph {kind}: {told}"
    return Section(title, f'<div class="pair">{figures}</div>', view.name, first=True)


def _cost(way: Way) -> Cost:
    spent, trained = way.trained.spent, way.trained
    samples = float(trained.fitting.done * trained.fitting.views)
    return Cost(
        seconds=Reading(spent.seconds + way.spent[1], f"wall clock: {_HOW}"),
        cpu_seconds=Reading(way.cpu_seconds + way.spent[0], f"process CPU time, all processes: {_HOW}"),
        peak_bytes=trained.peak,
        joules=trained.joules,
        stored_bytes=Reading(float(way.stored), "size of the file"),
        samples=Reading(samples, "photographs through forward and backward"),
        labels=Reading(0.0, "none is used"),
    )
