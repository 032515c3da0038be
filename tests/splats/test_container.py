"""The range coder against its twin, the container against its bounds, and damaged bytes."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats import codec, codec_harmonics, container, container_streams, entropy, rate
from scrimp.splats.canonical import canonical
from scrimp.splats.codec import Settings
from scrimp.splats.container import bounds, decode, encode, prepare
from scrimp.splats.scene import COUNTS, Splats


def scene(n: int, degree: int = 3, seed: int = 0) -> Splats:
    """Gaussians of many sizes and opacities, some of them spheres, some in one place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    means, scales = draw(n, 3) * 2, draw(n, 3) * 1.5 - 4
    means[: n // 8] = means[:1] if n else means[:0]
    scales[n // 2 : n // 2 + n // 8] = -3.0
    return Splats(
        means=means,
        quaternions=draw(n, 4) * 3,
        scales=scales,
        opacities=draw(n) * 3,
        colors=draw(n, 3),
        harmonics=draw(n, COUNTS[degree], 3) * 0.1 * (torch.arange(n) % 3 > 0)[:, None, None],
    )


def ordered(splats: Splats, settings: Settings) -> tuple[Splats, Tensor]:
    """The canonical scene in the order the container stores it in, and each one's level."""
    ready = prepare(splats)
    settings = container._as_stored(settings)
    _, _, order = container_streams.write_streams(ready.splats, settings, ready.visible)
    return ready.splats.take(order), codec.levels_of(ready.visible, settings)[order]


def fields(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.3, 3, 40, 3000, 600000.0])
    shifts = torch.randint(0, 4, (n, 5), generator=generator).to(torch.uint8)
    values = (torch.randn(n, 5, generator=generator) * size).int() >> shifts.int()
    return values, shifts, torch.randint(0, 6, (n,), generator=generator).to(torch.uint8)


def points(n: int, levels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.randn(n, 3, generator=generator) * 0.1 + 0.5).clamp(0, 0.999) * 2**levels
    drops = torch.randint(0, levels + 1, (n,), generator=generator).to(torch.uint8)
    cells[: n // 3] = cells[:1] if n else cells[:0]
    drop = drops.long()[:, None]
    found = cells.long() >> drop << drop | torch.where(drop > 0, 1 << (drop - 1).clamp_min(0), 0)
    order = entropy.point_order(found)
    return found[order].int(), drops[order]


def interleaved(point: list[int]) -> int:
    """A Morton code of any length, digit by digit."""
    return sum((point[axis] >> digit & 1) << 3 * digit + 2 - axis for axis in range(3) for digit in range(31))


FINE = replace(rate.settings_at(5), levels=1, thinnest=20)
KINDS = [True, False, True, False, True]


@pytest.mark.parametrize("n", [0, 1, 150])
@pytest.mark.parametrize("counted", [False, True])
def test_fields_come_back_and_the_twin_writes_the_same_bytes(n: int, counted: bool, monkeypatch: object) -> None:
    values, shifts, counts = fields(n, n)
    known = {"shifts": shifts, "predicted": KINDS, "counts": counts if counted else None}
    data = entropy.encode_fields(values, **known)
    wanted = values * (torch.arange(5) < counts[:, None]) if counted else values
    assert torch.equal(entropy.decode_fields(data, **known), wanted)
    monkeypatch.setattr(native, "load", lambda: None)
    assert entropy.encode_fields(values, **known) == data
    assert torch.equal(entropy.decode_fields(data, **known), wanted)


@pytest.mark.parametrize(("n", "levels"), [(0, 0), (1, 31), (2, 3), (40, 5), (300, 21), (90, 31), (7, 0)])
def test_points_come_back_and_the_twin_writes_the_same_bytes(n: int, levels: int, monkeypatch: object) -> None:
    cells, drops = points(n, levels)
    data = entropy.encode_points(cells, drops=drops, levels=levels)
    assert torch.equal(entropy.decode_points(data, drops=drops, levels=levels), cells)
    monkeypatch.setattr(native, "load", lambda: None)
    assert entropy.encode_points(cells, drops=drops, levels=levels) == data
    assert torch.equal(entropy.decode_points(data, drops=drops, levels=levels), cells)


def test_points_of_31_digits_are_in_mortons_order() -> None:
    cells = torch.randint(0, 2**31 - 1, (80, 3), generator=torch.Generator().manual_seed(3)).int()
    cells[:40] >>= 20
    order = entropy.point_order(cells).tolist()
    assert order == sorted(range(80), key=lambda row: interleaved(cells[row].tolist()))


def test_one_shift_for_all_columns_is_that_shift_in_each() -> None:
    values, shifts, _ = fields(60, 2)
    wide = shifts[:, :1].expand(-1, 5)
    data = entropy.encode_fields(values, shifts=shifts[:, :1], predicted=KINDS)
    assert data == entropy.encode_fields(values, shifts=wide, predicted=KINDS)
    assert torch.equal(entropy.decode_fields(data, shifts=shifts[:, :1], predicted=KINDS), values)


def test_harmonics_decoded_and_turned_at_once_are_those_decoded_and_turned(monkeypatch: object) -> None:
    values, shifts, counts = fields(90, 4)
    side, axes = shifts[:, :1], torch.randn(9, 5, generator=torch.Generator().manual_seed(4))
    data = entropy.encode_fields(values, shifts=side, predicted=[False] * 5, counts=counts)
    known = {"shifts": side[:, 0], "counts": counts, "axes": axes, "step": 0.03}
    steps = 0.03 * torch.exp2(side[:, 0].float())
    plain = entropy.decode_fields(data, shifts=side, predicted=[False] * 5, counts=counts)
    found = entropy.decode_rotated(data, **known)
    assert torch.equal(found, codec_harmonics.rotated_from(plain, axes, counts, steps))
    with pytest.raises(InputError, match="whole stream"):
        entropy.decode_rotated(data[:-3], **known)
    monkeypatch.setattr(native, "load", lambda: None)
    torch.testing.assert_close(entropy.decode_rotated(data, **known), found, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("n", [0, 1, 97])
def test_the_twin_decodes_the_same_scene(n: int, monkeypatch: object) -> None:
    data = encode(scene(n, degree=1), settings=rate.settings_at(-1))
    found = decode(data).tensors()
    monkeypatch.setattr(native, "load", lambda: None)
    for name, values in decode(data).tensors().items():
        torch.testing.assert_close(values, found[name], rtol=3e-7, atol=1e-7, msg=name)


def test_numbers_of_damaged_files_overflow_nothing(monkeypatch: object) -> None:
    logs = torch.tensor([[1 << 30, -(1 << 30), 1 << 30, 1 << 30], [3, -2, 5, 7]]).int()
    levels, settings = (
        torch.tensor([15, 1], dtype=torch.uint8),
        replace(Settings(), opacity=9, scale=4096, caps=(15,) * 6),
    )
    found = codec.octaves_of(logs, levels, settings)
    assert found.tolist() == [[204800, -204800, -204800, -204800], [54, -16384, -57344, -114688]]
    monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(codec.octaves_of(logs, levels, settings), found)


def test_every_instruction_set_and_number_of_threads_decodes_the_same_bits() -> None:
    module = native.load()
    if module is None:
        pytest.skip("no native library")
    data, threads, best = encode(scene(9000, degree=1)), torch.get_num_threads(), module.capabilities()["simd"]
    wanted = decode(data).tensors()
    try:
        for name, count in (("generic", 1), ("generic", 3), (best, 2)):
            module.set_simd(name)
            torch.set_num_threads(count)
            found = decode(data).tensors()
            assert all(torch.equal(values, wanted[field]) for field, values in found.items()), (name, count)
    finally:
        module.set_simd(best)
        torch.set_num_threads(threads)


def test_one_far_gaussian_costs_the_others_nothing() -> None:
    splats = replace(scene(400, degree=0), opacities=torch.ones(400))
    far = splats.means.clone()
    far[7] = torch.tensor([4e3, -6e3, 2e3])
    settings = replace(Settings(), levels=1)
    near, wide = (encode(replace(splats, means=means), settings=settings) for means in (splats.means, far))
    assert len(wide) < len(near) + 60
    wanted, _ = ordered(replace(splats, means=far), settings)
    off = (decode(wide).means - wanted.means).double().norm(dim=1)
    cell = 2 ** (settings.position / 256) * wanted.scales[:, 1].double().exp()
    assert bool((off <= 1.1 * cell + 1e-6 * wanted.means.norm(dim=1)).all())


@pytest.mark.parametrize("rung", [-4.0, -1.3, 0.0, 3.0])
def test_no_rung_rounds_sizes_and_alphas_by_octaves(rung: float) -> None:
    settings = rate.settings_at(rung)
    assert settings.opacity << settings.caps[0] <= 4 * codec.OCTAVE
    assert settings.scale << settings.caps[1] <= 3 * codec.OCTAVE


def test_every_rung_takes_more_bytes_than_the_one_below() -> None:
    ready = prepare(scene(300, degree=1))
    rungs = [rate.COARSEST + step / 2 for step in range(round((rate.FINEST - rate.COARSEST) * 2) + 1)]
    sizes = [len(container.encode_prepared(ready, rate.settings_at(rung))) for rung in rungs]
    assert all(low < high for low, high in pairwise(sizes))


def test_fields_need_little_more_than_their_entropy() -> None:
    values = (torch.randn(40000, 1, generator=torch.Generator().manual_seed(0)) * 5).round().int()
    data = entropy.encode_fields(values, shifts=torch.zeros(40000, 1, dtype=torch.uint8), predicted=[False])
    assert 8 * len(data) / 40000 < 1.03 * 0.5 * math.log2(2 * math.pi * math.e * 25)


def test_the_tables_are_far_from_ties() -> None:
    exact = [256 * math.log((p + 0.5) / (4095.5 - p)) + 0.5 for p in range(4096)]
    exact += [65536 / (1 + math.exp(-logit / 256)) + 0.5 for logit in range(-2047, 2048) if logit]
    assert min(abs(value - round(value)) for value in exact) > 1e-7


@pytest.mark.parametrize("cut", [1, 3, 40])
def test_a_stream_that_ends_elsewhere_is_refused(cut: int) -> None:
    values, shifts, _ = fields(100, 1)
    data = entropy.encode_fields(values, shifts=shifts, predicted=KINDS)
    cells, drops = points(100, 12)
    places = entropy.encode_points(cells, drops=drops, levels=12)
    for wrong in (lambda all: all[:-cut], lambda all: all + bytes(cut)):
        with pytest.raises(InputError, match="whole stream"):
            entropy.decode_fields(wrong(data), shifts=shifts, predicted=KINDS)
        with pytest.raises(InputError, match="whole stream"):
            entropy.decode_points(wrong(places), drops=drops, levels=12)


@pytest.mark.parametrize(("n", "used", "width"), [(0, 3, 9), (1, 1, 9), (9000, 5, 45)])
def test_coefficients_turn_back_as_a_product(n: int, used: int, width: int) -> None:
    generator = torch.Generator().manual_seed(n)
    counts = torch.randint(0, used + 1, (n,), generator=generator).to(torch.uint8)
    numbers = torch.randint(-9, 9, (n, used), generator=generator) * (torch.arange(used) < counts[:, None])
    axes, steps = torch.randn(width, used, generator=generator), torch.rand(n, generator=generator)
    wanted = (numbers * steps[:, None].double()) @ axes.double().T
    turned = codec_harmonics.rotated_from(numbers.int(), axes, counts, steps)
    torch.testing.assert_close(turned.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec_harmonics.rotated_from_torch(numbers.int(), axes, steps), turned)


def check_bounds(splats: Splats, settings: Settings) -> None:
    wanted, levels = ordered(splats, settings)
    found = decode(encode(splats, settings=settings))
    assert len(found) == len(wanted)
    limits = [bounds(settings, level) for level in levels.tolist()]

    def limit(name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in limits], dtype=torch.float64)

    alpha = wanted.opacities.double().sigmoid().clamp(2**-16, 1 - 2**-12).log2()
    assert bool(((found.opacities.double().sigmoid().log2() - alpha).abs() <= limit("alpha") + 1e-4).all())
    sizes = wanted.scales.double() / math.log(2)
    sizes = torch.maximum(sizes, sizes[:, :1] - settings.thinnest)
    assert bool(((found.scales.double() / math.log(2) - sizes).abs() <= limit("scale")[:, None] + 1e-4).all())
    extent = float((wanted.means.amax(0) - wanted.means.amin(0)).max()) if len(wanted) else 0.0
    near = torch.maximum(limit("position") * sizes[:, 1].exp2(), limit("position_extent") * extent)
    assert bool(((found.means.double() - wanted.means).abs() <= near[:, None] * 1.0001 + 1e-6).all())
    unequal = found.scales[:, 0] - found.scales[:, 2] >= 3 * math.log(2)
    turned = (found.quaternions - wanted.quaternions).double()[:, 1:].norm(dim=1)
    assert bool((turned <= limit("quaternion") + 1e-6)[unequal].all())
    assert bool(((found.colors - wanted.colors).double().abs() <= limit("color")[:, None] + 1e-5).all())
    lost = (found.harmonics - wanted.harmonics).flatten(1).double().norm(dim=1)
    length = wanted.harmonics.flatten(1).double().norm(dim=1)
    if not settings.palette:
        width = math.sqrt(max(1, 3 * wanted.harmonics.shape[1]))
        assert bool((lost <= limit("harmonics") * width + 0.01 * length + 1e-6).all())


@pytest.mark.parametrize("n", [0, 1, 2, 97, 600])
def test_every_field_stays_within_its_bounds(n: int) -> None:
    check_bounds(scene(n, degree=n % 4), Settings())


@pytest.mark.parametrize(
    "change",
    [
        {"levels": 1},
        {"levels": 16, "adapt": 1.5, "caps": (0, 0, 0, 0, 0, 0)},
        {"opacity": 1, "scale": 1, "position": -3000, "rotation": 1e-4, "color": 1e-3, "harmonics": 1e-3},
        {"thinnest": 1, "position": 0, "rotation": 0.5},
    ],
)
def test_bounds_hold_at_other_settings(change: dict[str, object]) -> None:
    check_bounds(scene(300, degree=1), replace(Settings(), **change))


def test_spheres_need_no_rotation_and_covariances_come_back() -> None:
    found = decode(encode(scene(400), settings=FINE))
    wanted, _ = ordered(scene(400), FINE)
    apart = covariances(found) - covariances(wanted)
    assert float((apart.flatten(1).norm(dim=1) / covariances(wanted).flatten(1).norm(dim=1)).max()) < 0.05


def covariances(splats: Splats) -> Tensor:
    w, x, y, z = (splats.quaternions / splats.quaternions.norm(dim=1, keepdim=True)).double().unbind(1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    axes = torch.stack(rows, 1).reshape(-1, 3, 3) * splats.scales.double().exp()[:, None]
    return axes @ axes.transpose(1, 2)


def test_a_palette_large_enough_loses_only_its_rounding() -> None:
    splats = scene(120, degree=2)
    splats = replace(splats, harmonics=splats.harmonics[torch.arange(120) % 10])
    settings = replace(Settings(), palette=16, harmonics=0.0)
    wanted, _ = ordered(splats, settings)
    found = decode(encode(splats, settings=settings))
    step = float(wanted.harmonics.abs().max()) / 127
    torch.testing.assert_close(found.harmonics, wanted.harmonics, rtol=0, atol=0.51 * step)
    unseen = replace(splats, harmonics=splats.harmonics * 1e-6)
    found = decode(encode(unseen, settings=replace(settings, harmonics=0.01)))
    assert bool((found.harmonics == 0).all())


def test_unseen_gaussians_go_only_when_asked() -> None:
    splats = replace(scene(50), opacities=torch.linspace(-12, 3, 50))
    visible = int((splats.opacities.sigmoid() >= container.UNSEEN).sum())
    assert 0 < visible < 50
    assert len(decode(encode(splats, prune=True))) == visible
    assert len(decode(encode(splats))) == len(decode(rate.encode_at(splats, quality="small"))) == 50


def test_extra_fields_are_kept_to_the_bit_or_dropped() -> None:
    extra = {"nx": torch.randn(60, generator=torch.Generator().manual_seed(1)), "label": torch.arange(60).int()}
    splats = replace(scene(60), extra=extra, opacities=torch.ones(60))
    found = decode(encode(splats))
    order = found.extra["label"].long()
    assert sorted(order.tolist()) == list(range(60))
    assert torch.equal(found.extra["nx"], extra["nx"][order])
    assert decode(encode(splats, extra=False)).extra == {}
    assert decode(encode(splats.take(order[:0]))).extra["nx"].shape == (0,)
    with pytest.raises(InputError, match="extra fields"):
        encode(replace(splats, extra={"h": torch.zeros(60).half()}))


def test_importance_decides_who_is_precise() -> None:
    splats = scene(200, degree=0)
    chosen = torch.arange(200) < 10
    importance = torch.where(chosen, 1.0, 1e-6)
    ready = prepare(splats, importance=importance)
    _, _, order = container_streams.write_streams(ready.splats, Settings(), ready.visible)
    found = decode(encode(splats, importance=importance))
    off = (found.colors - ready.splats.colors[order]).norm(dim=1)
    assert float(off[chosen[order]].max()) < 0.1 * float(off[~chosen[order]].mean())
    with pytest.raises(InputError, match="importance"):
        encode(splats, importance=-importance)


@pytest.mark.parametrize("name", ["means", "quaternions", "scales", "opacities", "colors", "harmonics"])
def test_a_number_that_is_not_finite_is_refused_by_name(name: str) -> None:
    splats = scene(5)
    values = splats.tensors()[name].clone()
    values[2] = float("nan")
    with pytest.raises(InputError, match=name):
        encode(replace(splats, **{name: values}))


def test_the_same_scene_gives_the_same_bytes_and_stays_as_it_was() -> None:
    splats = scene(80)
    before = {name: values.clone() for name, values in splats.tensors().items()}
    data = encode(splats)
    assert encode(splats) == data
    assert all(torch.equal(values, before[name]) for name, values in splats.tensors().items())
    again = decode(data)
    assert torch.equal(canonical(again).scales, again.scales)


def test_sizes_and_qualities() -> None:
    splats = scene(150, degree=0)
    lengths = [len(rate.encode_at(splats, quality=name)) for name in ("small", "medium", "high")]
    assert lengths == sorted(lengths)
    data = rate.encode_at(splats, size=lengths[1])
    assert 0.9 * lengths[1] < len(data) <= lengths[1]
    wanted, _ = ordered(splats, Settings())

    def score(found: Splats) -> float:
        apart = found.scales[:, 0].sort().values - wanted.scales[:, 0].sort().values
        return -20 * math.log10(float(apart.abs().max()))

    found = rate.encode_at(splats, psnr=15.0, score=score)
    assert score(decode(found)) >= 15
    assert len(found) < len(encode(splats, settings=rate.settings_at(rate.FINEST)))
    for wrong in (
        {"size": 10},
        {"quality": "best"},
        {"psnr": 900.0, "score": score},
        {"psnr": 3.0},
        {},
        {"size": 1, "quality": "high"},
    ):
        with pytest.raises(InputError):
            rate.encode_at(splats, **wrong)


@pytest.mark.parametrize(
    "bad", [{"levels": 0}, {"color": 0.0}, {"harmonics": float("nan")}, {"caps": (1,)}, {"opacity": 0}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(Settings(), **bad)


def sealed(data: bytearray) -> bytes:
    data[16:20] = bytes(4)
    data[16:20] = struct.pack("<I", zlib.crc32(data))
    return bytes(data)


def test_any_changed_byte_is_noticed() -> None:
    data = encode(scene(40))
    for place in range(0, len(data), 7):
        spoilt = bytearray(data)
        spoilt[place] ^= 0x40
        with pytest.raises(InputError):
            decode(bytes(spoilt))
    for cut in (0, 5, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(InputError):
            decode(data[:cut])


@pytest.mark.parametrize("palette", [0, 4])
def test_hostile_bytes_with_a_right_checksum_only_raise_input_errors(palette: int) -> None:
    extra = {"t": torch.arange(30.0)}
    data = encode(
        replace(scene(30), extra=extra, opacities=torch.ones(30)), settings=replace(Settings(), palette=palette)
    )
    generator = torch.Generator().manual_seed(palette)
    refused = 0
    for turn in range(60):
        spoilt = bytearray(data)
        places = torch.randint(20 if turn % 2 else 8, len(data), (3,), generator=generator).tolist()
        for place, value in zip(places, torch.randint(0, 256, (3,), generator=generator).tolist(), strict=True):
            spoilt[place] = value
        try:
            decode(sealed(spoilt))
        except InputError:
            refused += 1
    assert refused > 10


def test_a_count_beyond_the_bytes_is_refused_before_it_is_believed() -> None:
    spoilt = bytearray(encode(scene(3)))
    spoilt[12:16] = struct.pack("<I", 2**31)
    with pytest.raises(InputError, match="2147483648 Gaussians"):
        decode(sealed(spoilt))
    alike = scene(1).take(torch.zeros(3000, dtype=torch.int64))
    assert len(decode(encode(alike))) == 3000


def test_a_trained_scene_fits_its_target(shared_data: Path) -> None:
    path = shared_data / "scenes" / "fox60k.ply"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    from scrimp.splats.files import read

    data = encode(read(path), extra=False)
    assert len(data) <= 400_000
    assert len(decode(data)) == 60_000
