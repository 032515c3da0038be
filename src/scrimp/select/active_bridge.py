"""Any query strategy of scikit-activeml as a strategy of this family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError, require
from scrimp.select.active_pool import Pool, Strategy, chosen, pool, predictions
from scrimp.select.selection import Selection


def bridge(strategy: Any, *, labels: Tensor | None = None, arguments: Mapping[str, Any] | None = None) -> Strategy:
    """A pool-based query strategy of scikit-activeml, for one annotator, asked in this family's way.

    Each call asks a fresh copy of ``strategy`` for the whole budget at once, its ``random_state`` drawn from the
    generator. Where its ``query`` takes a classifier it gets one that repeats ``probabilities`` and is not fitted
    again. Its own memory and time apply; it is handed float64 features on the CPU.

    Args:
        strategy: such as ``skactiveml.pool.TypiClust()``.
        labels: classes [n], read at labelled images only; the predicted classes where omitted.
        arguments: further ones of ``query``, by name.

    Returns:
        A strategy; it needs probabilities where the other one asks for a classifier.

    Raises:
        MissingExtraError: scikit-activeml is not installed.
        InputError: ``strategy`` is no query strategy of that kind, or chooses what it was not offered.
    """
    base = require("skactiveml.base", "label")
    if not isinstance(strategy, base.SingleAnnotatorPoolQueryStrategy):
        kind = type(strategy).__name__
        raise InputError(
            "a pool-based query strategy of scikit-activeml", kind, "pass an instance, such as TypiClust()"
        )

    def asked(
        features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
    ) -> Selection:
        known = pool(features, labelled, budget)
        fresh = _fresh(strategy, generator)
        takes = inspect.signature(fresh.query).parameters
        values = None
        model = next((name for name in ("clf", "estimator") if name in takes), None)
        if model is not None or probabilities is not None:
            values = predictions(probabilities, len(features)).to("cpu", torch.float64)
        if known.budget == 0:
            return chosen(known, [], generator=generator)
        rows = known.features.to("cpu", torch.float64).numpy()
        given: dict[str, Any] = {"X": rows, "y": _targets(known, values, labels), "batch_size": known.budget}
        if "candidates" in takes:
            given["candidates"] = known.left.cpu().numpy()
        if values is not None and model is not None:
            given[model] = _frozen(base.SkactivemlClassifier, rows, values)
            given |= {f"fit_{model}": False} if f"fit_{model}" in takes else {}
        found = torch.as_tensor(fresh.query(**{**given, **(arguments or {})})).reshape(-1).to(known.left)
        if len(found.unique()) < len(found) or not bool(torch.isin(found, known.left).all()):
            kind = type(strategy).__name__
            raise InputError("distinct unlabelled images", f"others, from {kind}", "use another strategy")
        return chosen(known, found, generator=generator)

    return asked


def _fresh(strategy: Any, generator: torch.Generator) -> Any:
    """A copy as constructed, so that no call sees what an earlier one left, with randomness from the generator."""
    settings = strategy.get_params(deep=False)
    if "random_state" in settings:
        settings["random_state"] = int(torch.randint(2**31 - 1, (1,), generator=generator))
    return type(strategy)(**settings)


def _targets(known: Pool, values: Tensor | None, labels: Tensor | None) -> Any:
    """Classes as float64 [n], NaN where there is no label; class 0 where nothing is known of a labelled image's."""
    found = torch.full((len(known.features),), torch.nan, dtype=torch.float64)
    rows = known.labelled.cpu()
    if labels is not None:
        if labels.shape != found.shape:
            raise InputError(f"labels [{len(found)}]", f"{list(labels.shape)}", "pass one class an image")
        found[rows] = labels.cpu().to(torch.float64)[rows]
    else:
        found[rows] = 0.0 if values is None else values.argmax(1).to(torch.float64)[rows]
    return found.numpy()


def _frozen(base: Any, rows: Any, values: Tensor) -> Any:
    """A classifier whose predictions are looked up by the features' bytes: equal rows share those of the last."""
    table = values.numpy()
    places = {hash(row.tobytes()): place for place, row in enumerate(rows)}

    class Frozen(base):  # type: ignore[misc]  # the base is known at run time only
        def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
            return self

        def predict_proba(self, X: Any) -> Any:
            found = [places.get(hash(row.tobytes()), -1) for row in X]
            if -1 in found:
                got = "changed ones, from the strategy"
                raise InputError("predictions asked for rows of the features", got, "pass one that perturbs nothing")
            return table[found]

        def predict(self, X: Any) -> Any:
            return self.predict_proba(X).argmax(1)

    frozen = Frozen(classes=list(range(table.shape[1])))
    frozen.classes_ = torch.arange(table.shape[1]).numpy()
    return frozen
