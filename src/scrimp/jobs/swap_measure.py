"""One setting at one size beside the original: agreement over all batches, cost over one of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from scrimp.attend.reroute import attention
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.swap_scores import Scores
from scrimp.jobs.swap_settings import Setting
from scrimp.jobs.swap_subject import Batch, Subject
from scrimp.jobs.timing import timed_cost
from scrimp.meter import Cost, Reading, counting, paired
from scrimp.meter.clock import Paired
from scrimp.primitives.errors import InputError

_KEPT_BYTES = 5e8  # of the original's outputs; beyond that they are computed again for each setting


class Bench:
    """The original at one size: its outputs, its cost, and everything a setting is held against.

    Args:
        batches: costs are taken on the first.
        config: the seed of the attentions' draws, and how often to time.
        device: where the model is.
        stop: whether to stop between two batches.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Batch],
        *,
        config: SwapConfig,
        device: str,
        stop: Callable[[], bool],
    ) -> None:
        self.subject, self.batches, self.seed, self.repeats = subject, batches, config.seed, config.repeats
        self._device, self._stop = device, stop
        self._first = batches[0].to(device)
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def try_out(self, settings: list[Setting], size: int | None) -> None:
        """Run one batch through the model as it is and with each attention, before anything is measured.

        Raises:
            InputError: the model does not take this size, or an attention cannot honour what it asks.
        """
        try:
            self.subject.rows(self.subject.run(self._first), self._first)
        except (RuntimeError, IndexError, AssertionError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"inputs of size {size} that {self.subject.name} takes", reason, "correct --sizes or the data"
            ) from error
        largest = {
            item.attention: item for item in sorted(settings, key=lambda item: (item.clusters or 0, item.topk or 0))
        }
        for setting in largest.values():
            self._route(setting.function(self.seed))

    def scores(self, setting: Setting | None) -> Scores:
        """Original against setting over all batches; ``None`` holds the original against itself.

        Raises:
            Interrupted: a stop was asked for.
        """
        scores = Scores(features=self.subject.gives == "features")
        for number in range(len(self.batches)):
            if self._stop():
                raise Interrupted
            batch = self.batches[number].to(self._device)
            before = after = self._original(number, batch)
            if setting is not None:
                after = self.subject.rows(self.subject.swapped(batch, setting, self.seed), batch)
            scores.add(before, after, self.subject.labels(batch))
        return scores

    def cost_of_original(self) -> Cost:
        """Timed in turn with itself, as every setting is with it."""
        return timed_cost(self._run_original, paired(self._run_original, self._run_original, self.repeats).a, passes=1)

    def cost(self, setting: Setting) -> tuple[Cost, Paired]:
        """The setting's cost of a pass, its times taken in turn with the original's, and the ratios of those."""

        def run() -> Any:
            return self.subject.swapped(self._first, setting, self.seed)

        times = paired(run, self._run_original, self.repeats)
        return timed_cost(run, times.a, passes=1), times

    def attention_flops(self, setting: Setting) -> Reading:
        """FLOPs of the swapped layers' attention alone, in a pass over the first batch."""
        total = 0.0
        missed: set[str] = set()
        fn = setting.function(self.seed)

        def counted(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            nonlocal total
            with counting() as counter:
                out = fn(query, key, value, **keywords)
            reading = counter.reading()
            total += reading.value or 0.0
            missed.update(reading.missed)
            return out

        # What it takes is read from its signature, which is to be the function's own.
        counted.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
        self._route(counted)
        return Reading(total, "counted inside the swapped layers' attention", tuple(sorted(missed)))

    @functools.cached_property
    def original_attention_flops(self) -> Reading:
        """The same for the model's own attention."""
        return self.attention_flops(Setting("softmax"))

    def _route(self, fn: Callable[..., Tensor]) -> None:
        """One pass with every module named, so that a refusal says which."""
        with attention(fn, model=self.subject.model, where=self.subject.layers):
            self.subject.run(self._first)

    def _run_original(self) -> Any:
        return self.subject.run(self._first)

    def _original(self, number: int, batch: Batch) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        rows = self.subject.rows(self.subject.run(batch), batch)
        if self._bytes + rows.nbytes <= _KEPT_BYTES:
            self._kept[number] = rows
            self._bytes += rows.nbytes
        return rows


def ratios(times: Paired) -> dict[str, Any]:
    """Setting over original, pair by pair, as receipts keep them."""
    return {"cpu_seconds": asdict(times.cpu_ratio), "seconds": asdict(times.ratio)}
