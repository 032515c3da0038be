"""How much to lose: named qualities, and the finest encoding within a size or the smallest that reaches a quality.

All of them lie on one ladder. Down from rung 0 every step of every field doubles from rung to rung, except of Gaussians
that show least: errors of theirs that were harmless grow beyond measure where a step reaches octaves of size or
alpha, or a turn or a colour its whole range. (A step of 6 octaves of size cost 19 dB on a scene of 6,658 Gaussians.)
Up from rung 0 steps of what shows most shrink by less than half, and those of what shows least by more: how much a
Gaussian shows is known but roughly, and the finer all are, the more of the error is from those that show after all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.codec import OCTAVE, Settings
from scrimp.splats.container import Prepared, decode, encode_prepared, prepare
from scrimp.splats.scene import Splats

QUALITIES = {"small": -1.0, "medium": 0.0, "high": 2.5}
"""Rungs by name."""
COARSEST, FINEST = -4.0, 6.0
_PRECISION = 1 / 16  # of a rung: some 1.5 % of the bytes
# Octaves a rung above 0, by the slopes of PSNR over bytes of each field at 60 to 70 dB on scenes of 60 to 150 thousand.
_FINER, _SCALE, _POSITION = 0.6, 0.12, 0.06
_EVENER = 0.08  # of `Settings.adapt`


def settings_at(rung: float) -> Settings:
    """The settings of a rung: 0 is ``medium``; one up or down halves or doubles the steps of the middle Gaussian.

    Raises:
        InputError: beyond `COARSEST` and `FINEST`.
    """
    if not COARSEST <= rung <= FINEST:
        raise InputError(f"a rung from {COARSEST:g} to {FINEST:g}", f"{rung:g}", "choose one between")
    base, up, held = Settings(), max(0.0, rung), min(0, round(rung))
    octaves = min(0.0, rung) + _FINER * up
    finer = 2.0**-octaves
    opacity, scale, position, rotation, color, harmonics = base.caps
    return replace(
        base,
        caps=(opacity + held, scale + held, position, rotation + held, color + held, harmonics),
        opacity=max(1, round(base.opacity * finer)),
        scale=max(1, round(base.scale * finer * 2.0 ** (_SCALE * up))),
        position=min(0, round(base.position - OCTAVE * (octaves + _POSITION * up))),
        rotation=base.rotation * finer,
        color=base.color * finer,
        harmonics=base.harmonics * finer,
        adapt=base.adapt - _EVENER * up,
    )


def encode_at(
    splats: Splats,
    *,
    quality: str | None = None,
    size: int | None = None,
    psnr: float | None = None,
    score: Callable[[Splats], float] | None = None,
    importance: Tensor | None = None,
    prune: bool = False,
    extra: bool = True,
) -> bytes:
    """Encode by a name, within a size, or up to a quality; exactly one of the three.

    Args:
        quality: a key of `QUALITIES`.
        size: bytes; the finest rung that needs no more is taken.
        psnr: dB by ``score``; the coarsest rung that reaches them is taken.
        score: of a decoded scene, such as the PSNR of its pictures against those of ``splats``.
        importance, prune, extra: as for `scrimp.splats.container.encode`.

    Raises:
        InputError: not exactly one target, or one that no rung reaches.
    """
    if sum(target is not None for target in (quality, size, psnr)) != 1:
        raise InputError("one of quality, size and psnr", f"{quality}, {size}, {psnr}", "pass exactly one")
    if quality is not None and quality not in QUALITIES:
        raise InputError(f"a quality out of: {', '.join(QUALITIES)}", quality[:40], "choose one")
    scene = prepare(splats, importance=importance, prune=prune, extra=extra)
    if quality is not None:
        return encode_prepared(scene, settings_at(QUALITIES[quality]))
    if size is not None:
        return _within(scene, size)
    if score is None or psnr is None:
        raise InputError("a score to measure the psnr by", "none", "pass score")
    return _up_to(scene, psnr, score)


def _within(scene: Prepared, size: int) -> bytes:
    best = encode_prepared(scene, settings_at(COARSEST))
    if len(best) > size:
        raise InputError(f"a size of at least {len(best)} bytes", f"{size}", "allow more, or drop Gaussians first")
    low, high = COARSEST, FINEST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        found = encode_prepared(scene, settings_at(middle))
        if len(found) <= size:
            low, best = middle, found
        else:
            high = middle
    return best


def _up_to(scene: Prepared, psnr: float, score: Callable[[Splats], float]) -> bytes:
    best = encode_prepared(scene, settings_at(FINEST))
    reached = score(decode(best))
    if not reached >= psnr:
        raise InputError(f"at most {reached:.2f} dB, what the finest rung reaches", f"{psnr:g}", "ask for less")
    low, high = COARSEST, FINEST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        found = encode_prepared(scene, settings_at(middle))
        if score(decode(found)) >= psnr:
            high, best = middle, found
        else:
            low = middle
    return best
