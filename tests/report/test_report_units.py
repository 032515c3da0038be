"""Figures in words: prefixes, rounding across a prefix, spreads, unknowns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.report import units
from scrimp.report.student import t_central, t_quantile


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.flops(1.234e12), "1.23 TFLOP"),
        (units.flops(9.0e11), "900 GFLOP"),
        (units.flops(999.9e9), "1.00 TFLOP"),
        (units.flops(0.0), "0 FLOP"),
        (units.size(12_300_000), "12.3 MB"),
        (units.size(999), "999 B"),
        (units.size(1e30), "1.00e+12 EB"),
        (units.seconds(58.23), "58.2 s"),
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(999.96), "16.7 min"),
        (units.seconds(86_400), "24.0 h"),
        (units.joules(1234.0), "1.23 kJ"),
        (units.count(384_000.0), "384,000"),
        (units.count(12.84e6), "12.8 M"),
        (units.count(1.5), "1.5"),
        (units.percent(0.873, 0.004), "87.3 ± 0.4 %"),
        (units.percent(0.87345, 0.00034), "87.34 ± 0.03 %"),
        (units.percent(0.873), "87.3 %"),
        (units.percent(0.873, 0.0), "87.3 ± 0.0 %"),
        (units.number(0.3123, 0.0063), "0.312 ± 0.006"),
        (units.number(0.3123), "0.312"),
        (units.number(2.0, 0.0), "2.00 ± 0"),
        (units.number(3e-6, 1e-7), "3.00e-06 ± 1e-07"),
        (units.quality("knn_accuracy", 0.5), "50.0 %"),
        (units.quality("accuracy", 0.5), "50.0 %"),
        (units.quality("train_loss", 0.5), "0.500"),
        (units.quality("worst_psnr", 28.681, 0.052), "28.68 ± 0.05 dB"),
        (units.quality("psnr", None), "-"),
        (units.difference("test_accuracy", 0.0082), "+0.82"),
        (units.difference("train_loss", -0.0221), "-0.022"),
    ],
)
def test_figures_print_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_the_unknown_is_a_dash_and_never_a_zero(missing: float | None) -> None:
    forms = [printed for _, printed in units.COSTS.values()]
    assert {form(missing) for form in [*forms, units.percent, units.number]} == {"-"}
    assert units.difference("test_accuracy", missing) == "-"


def test_an_interval_has_one_number_of_decimals() -> None:
    assert units.differences("test_accuracy", -0.0006, None, 0.0033) == ["-0.06", "-", "+0.33"]


@given(st.floats(1e-8, 1e20))
def test_a_prefix_loses_no_more_than_the_fourth_digit(value: float) -> None:
    figure, _, unit = units.si(value, "X").partition(" ")
    powers = {"nX": -9, "µX": -6, "mX": -3, "X": 0, "kX": 3, "MX": 6, "GX": 9, "TX": 12, "PX": 15, "EX": 18}
    assert float(figure) * 10.0 ** powers[unit] == pytest.approx(value, rel=0.00501)
    assert float(figure) < 1000


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_agree_with_the_printed_table(freedom: int, expected: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-4)


def test_t_quantiles_of_other_levels() -> None:
    assert t_quantile(0.99, 4) == pytest.approx(4.604, abs=5e-4)
    assert t_quantile(0.90, 7) == pytest.approx(1.895, abs=5e-4)


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_the_quantile_inverts_the_distribution(confidence: float, freedom: int) -> None:
    assert t_central(t_quantile(confidence, freedom), freedom) == pytest.approx(confidence, abs=1e-9)


def test_no_degree_of_freedom_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 degree"):
        t_central(1.0, 0)
