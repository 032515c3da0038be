"""Folded names: what goes in comes out, in few bytes; and hostile text is refused at once."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.adapt.names import Named, fold, unfold
from scrimp.primitives.errors import InputError

VIT = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
LLM = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def layers(before: str, count: int, weights: dict[str, tuple[int, ...]]) -> list[Named]:
    return [(f"{before}.{layer}.{name}", shape) for layer in range(count) for name, shape in weights.items()]


def test_a_vit_is_one_item() -> None:
    names = layers("blocks", 12, VIT)
    text = fold(names)
    assert text == "blocks.{0-11}.(attn.qkv:576x192,attn.proj:192x192,mlp.fc1:768x192,mlp.fc2:192x768)"
    assert unfold(text) == names


def test_a_language_model_of_210_weights_takes_less_than_350_bytes() -> None:
    names = layers("model.layers", 30, LLM)
    text = fold(names)
    assert len(names) == 210
    assert len(text) < 350
    assert unfold(text) == names


@pytest.mark.parametrize(
    "names",
    [
        [],
        [("", ())],
        [("a", ()), ("a", ())],
        [("a.0", (1,)), ("a.1", (1,)), ("a.1", (1,)), ("a.2", (1,))],
        [("a.1", (3, 4)), ("a.0", (3, 4))],
        [("a.9", (0,)), ("a.10", (0,)), ("a.11", (0,))],
        [("a.09", (5,)), ("a.10", (5,)), ("a.11", (5,))],
        [("999999998", ()), ("999999999", ()), ("1000000000", ())],
        [("(", (1,)), (")", (1,)), ("{0-3}", (1,)), ("%28,:x", (1,)), ("z%", (1,))],
        [("über.0", (2,)), ("über.1", (2,)), ("ü\n.2", (2,))],
        [("x.٣", (2,)), ("x.٤", (2,))],
        [*layers("layer1", 2, {"conv1": (64, 64, 3, 3), "conv2": (64, 64, 3, 3)}), ("layer2.0.conv1", (128, 64, 3, 3))],
        [("a.0.b.0", (1,)), ("a.0.b.1", (1,)), ("a.1.b.0", (1,)), ("a.1.b.1", (2,)), ("a.2.b.0", (1,))],
    ],
)
def test_odd_names_come_back(names: list[Named]) -> None:
    assert unfold(fold(names)) == names


shapes = st.lists(st.integers(0, 3) | st.integers(0, 10**18 - 1), max_size=3).map(tuple)
numbered = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "a.", "%", "%2", "b{"]),
    st.integers(0, 12),
    st.sampled_from(["", ".c", "0", ")"]),
)


@settings(max_examples=100)
@given(st.lists(st.tuples(numbered | st.text(max_size=6), st.sampled_from([(), (2,)]) | shapes), max_size=40))
def test_any_names_come_back(names: list[Named]) -> None:
    assert unfold(fold(names)) == names


@settings(max_examples=100)
@given(st.text(alphabet="a0129{}(),:-x%.", max_size=30))
def test_garbled_text_is_refused_or_read(text: str) -> None:
    try:
        names = unfold(text)
    except InputError:
        return
    assert unfold(fold(names)) == names


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a:1,",
        ",a:1",
        "a:1x",
        "a:-1",
        "a:1;b:1",
        "a:1)",
        "a%:1",
        "a%4:1",
        "a%zz:1",
        "{0-1}",
        "{0-1}()",
        "{0-1}(a:1",
        "{0-1}(a:1,)",
        "{1-0}(a:1)",
        "{00-1}(a:1)",
        "{-1}(a:1)",
        "{0-1}{0-1}(a:1)",
        "{0-1}({0-1}(a:1))",
        "a:" + "9" * 19,
        "{0-999999999}(a:1)",
        "{0-99999999999999999999}(a:1)",
        "{0-60000}(a:1,b:1)",
        ",".join(["{0-60000}(:)"] * 2),
        "a" * 300 + "{0-99999}(:)",
        "{0-99999}" + "a" * 300 + "(:)",
        "{0-999}(" + "a" * 30_000 + ":)",
        ",".join(["{0-9999}(:)"] * 11),
        "{0-1}(" * 50_000,
        "a" * 1_000_000,
    ],
    ids=lambda text: text[:20],
)
def test_hostile_text_is_refused_before_it_takes_memory(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            unfold(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_what_cannot_be_read_is_not_written() -> None:
    with pytest.raises(InputError, match="100000 names"):
        fold([("a", ())] * 100_001)
    with pytest.raises(InputError, match="characters"):
        fold([("a" * 300_000, ())] * 100)
    for size in (-1, 10**18):
        with pytest.raises(InputError, match="sizes"):
            fold([("a", (2, size))])


def test_as_many_as_may_be_come_back() -> None:
    names: list[Named] = [(f"layers.{number}", (1, 2)) for number in range(100_000)]
    text = fold(names)
    assert text == "layers.{0-99999}(:1x2)"
    assert unfold(text) == names
