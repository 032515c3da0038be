"""kNN and linear probes beside lightly's and scikit-learn's own, on the same features.

    python benchmarks/probe_agreement.py      # a few minutes on two cores; needs the extra `bench`

Features: the built-in images through the built-in convnet with random weights (576 numbers), and a random projection of
them (128 numbers). One test image is 0.05 points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from common import RECEIPTS, built_in_network, keep
from scrimp.data import ImageData, load_images
from scrimp.jobs.encoders import encode
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import require
from scrimp.receipts import Receipt
from scrimp.represent import knn_accuracies, linear_accuracy
from scrimp.represent.knn import unit_rows

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Agreement:
    """The largest difference of any accuracy, in points."""

    threads: int = 2
    out: Path = RECEIPTS / "probe-agreement.json"


def features(data: ImageData) -> dict[str, tuple[Tensor, Tensor]]:
    """Training and test features, by name."""
    model = built_in_network(data, seed=0).eval()
    model.head = torch.nn.Identity()
    whole = tuple(
        encode(model, part, mean=data.mean, std=data.std, device=torch.device("cpu"))
        for part in (data.train, data.test)
    )
    mix = torch.randn(whole[0].shape[1], 128, generator=generator_for(5))
    return {"convnet": whole, "projected": (whole[0] @ mix, whole[1] @ mix)}


def ours(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    everything = (train, labels, test, test_labels)
    votes = knn_accuracies(*everything, ks=(1, 20, 200))
    weighted = knn_accuracies(*everything, ks=(20, 200), temperatures=dict.fromkeys((20, 200), TEMPERATURE))
    found = {f"{k} neighbours": value for k, value in votes.items()}
    found |= {f"{k} neighbours, weighted": value for k, value in weighted.items()}
    return found | {"linear": linear_accuracy(*everything)}


def theirs(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """scikit-learn's votes and linear classifier, lightly's weighted votes."""
    from lightly.utils.benchmarking.knn import knn_predict
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    bank, shown = unit_rows(train), unit_rows(test)
    found = {}
    for k in (1, 20, 200):
        model = KNeighborsClassifier(k, algorithm="brute").fit(bank.numpy(), labels.numpy())
        found[f"{k} neighbours"] = float(model.score(shown.numpy(), test_labels.numpy()))
    for k in (20, 200):
        ranked = knn_predict(shown, bank.T.contiguous(), labels, int(labels.max()) + 1, knn_k=k, knn_t=TEMPERATURE)
        found[f"{k} neighbours, weighted"] = float((ranked[:, 0] == test_labels).double().mean())
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-12)
    model = LogisticRegression(C=1.0, max_iter=20_000, tol=1e-7)
    model.fit(((bank - mean) / std).double().numpy(), labels.numpy())
    found["linear"] = float(model.score(((shown - mean) / std).double().numpy(), test_labels.numpy()))
    return found


def main() -> None:
    order = tyro.cli(Agreement)
    for package in ("lightly", "sklearn"):
        require(package, "bench")
    torch.set_num_threads(order.threads)
    data, rows = load_images("builtin"), {}
    for name, (train, test) in features(data).items():
        labelled = (train, data.train.labels, test, data.test.labels)
        first, second = ours(*labelled), theirs(*labelled)
        rows |= {f"{name}, {what}": (100 * first[what], 100 * second[what]) for what in first}
    worst = max(abs(one - other) for one, other in rows.values())
    receipt = Receipt(
        kind="benchmark",
        name="probe-agreement",
        way="ours",
        quality={"largest_difference_in_points": worst},
        notes={"accuracies, ours and theirs": rows, "test images": len(data.test)},
    )
    keep(receipt, order.out)


if __name__ == "__main__":
    main()
