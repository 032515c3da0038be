"""What a step of distillation is given: a view of each image, and what the teachers made of that very view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from scrimp.jobs.distill_views import FixedViews, LiveViews
from scrimp.jobs.teacher_cache import TeacherCache


@dataclass(frozen=True, eq=False)
class Lesson:
    """Part of a batch.

    Attributes:
        views: float32 [n, C, H, W] in 0 to 1.
        targets: each teacher's features of these views, [n, dim]; ``None`` where the teachers are still to be asked.
    """

    views: Tensor
    targets: list[Tensor] | None = None

    def parts(self, count: int) -> list[Lesson]:
        """The same in ``count`` equal parts."""
        views = self.views.chunk(count)
        if self.targets is None:
            return [Lesson(view) for view in views]
        targets = zip(*(target.chunk(count) for target in self.targets), strict=True)
        return [Lesson(view, list(target)) for view, target in zip(views, targets, strict=True)]


Lessons = Callable[[Tensor, Tensor, int, slice], Lesson]
"""``(images uint8 [n, C, H, W] on the device, their rows in the set, number of the batch, rows of it these are)``."""


def live_lessons(views: LiveViews) -> Lessons:
    """A new view each time."""
    return lambda images, rows, number, place: Lesson(views.made(images, number, place))


def kept_lessons(views: FixedViews, caches: Sequence[TeacherCache], *, used: int, batches: int) -> Lessons:
    """In pass e the view e modulo ``used``, with the features kept of it; a pass has so many ``batches``."""

    def lesson(images: Tensor, rows: Tensor, number: int, place: slice) -> Lesson:
        view = number // batches % used
        targets = [cache.read(view, rows, device=images.device) for cache in caches]
        return Lesson(views.made(images, rows, view), targets)

    return lesson
