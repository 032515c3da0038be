"""The attention sampling benchmarks' rows, made from their receipts; for benchmarks/readme.py."""

from __future__ import annotations

from scrimp.receipts import Receipt

MAPS = {"90_on_15": "90 % on 15", "99_on_10": "99 % on 10", "90_on_5": "90 % on 5"}


def gradient(receipt: Receipt) -> str:
    """Line 4: exact biases and ratios of a small problem, cosines of a large one."""
    quality = receipt.quality
    cosines = ", ".join(
        f"{about}: {quality[f'cosine_{name}_ours']:.5f} (published formula {quality[f'cosine_{name}_published']:+.2f})"
        for name, about in MAPS.items()
    )
    return (
        f"bias over every ordered sample at most {quality['enumerated_bias']:.0e}; variance without over with "
        f"replacement {quality['enumerated_variance_ratio']:.2f}x, with the control variate "
        f"{quality['enumerated_variance_ratio_control']:.2f}x; cosine with the exact gradient, "
        f"{receipt.config['draws']:,} samples, attention of which {cosines}"
    )
