"""What `scrimp probe` prints: every way features were judged, and the cost, one under the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrimp.receipts import Receipt
from scrimp.report import units

if TYPE_CHECKING:
    from rich.table import Table

_TITLES = {
    "knn1_accuracy": "1 nearest neighbour",
    "knn20_accuracy": "20 nearest neighbours",
    "knn200_accuracy": "200 nearest neighbours, weighted",
    "linear_accuracy": "linear classifier, all labels",
    "linear_10pct_accuracy": "linear classifier, 10 % of the labels",
    "linear_1pct_accuracy": "linear classifier, 1 % of the labels",
}


def probe_table(receipt: Receipt) -> Table:
    """A `rich` table of two columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{receipt.way} on {receipt.notes['data']}"), box=box.SIMPLE_HEAD)
    table.add_column("test images classified by")
    table.add_column("accuracy", justify="right")
    for name, title in _TITLES.items():
        if name in receipt.quality:
            table.add_row(title, units.percent(receipt.quality[name]))
    cost = receipt.cost
    spent = f"{units.flops(cost.flops.value)}, {units.seconds(cost.cpu_seconds.value)} of CPU time"
    table.caption = Text(f"{spent}; details in the report")
    return table
