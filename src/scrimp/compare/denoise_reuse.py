"""Deep features reused between denoising steps, beside every step in full and beside features kept by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.compare.comparison import Finding, at_most
from scrimp.denoise import every, reuse
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for

Attach = Callable[..., Any]
_STEPS, _EVERY, _DEPTH = 7, 3, 2
_BLOCKS, _TOKENS, _WIDTH = 5, 9, 16


def findings(attach: Attach = reuse, *, seed: int = 0) -> list[Finding]:
    """Hold reuse against the plain model, on the images of seven steps."""
    model, images = _Denoiser(seed), _images(seed)
    with torch.no_grad():
        plain, by_hand = _run(model, images), _kept_by_hand(model, images)
        fresh, _ = _attached(model, images, attach, 1)
        kept, flops = _attached(model, images, attach, _EVERY)
        whole, block = count_flops(lambda: _run(model, images)).value, count_flops(lambda: _one_block(model)).value
    left_out = (_STEPS - len(range(0, _STEPS, _EVERY))) * (_BLOCKS - _DEPTH)
    counted = None if None in (whole, block, flops) else (whole or 0) - left_out * (block or 0)
    return [
        at_most("refresh at every step against the plain model", float((fresh - plain).abs().max()), 0),
        at_most("reused steps beside features kept by hand", float((kept - by_hand).abs().max()), 1e-12),
        at_most(
            "FLOPs of reused steps beside the blocks that are left, relative",
            float("nan") if counted is None or flops is None else abs(flops / counted - 1),
            0,
        ),
    ]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.wide, self.narrow = (
            nn.Linear(*sides) for sides in ((_TOKENS, _TOKENS), (_WIDTH, 2 * _WIDTH), (2 * _WIDTH, _WIDTH))
        )

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        mixed = hidden_states + self.mix(hidden_states.mT).mT
        return mixed + self.narrow(torch.tanh(self.wide(mixed) * (1 + timestep / _STEPS)))


class _Denoiser(nn.Module):
    """Built as diffusers builds its transformers, float64: images are tokens [batch, 9, 16] already."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which are replaced
            self.transformer_blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS)).double()
            self.proj_out = nn.Linear(_WIDTH, _WIDTH).double()
        generator = generator_for(seed, 7)
        with torch.no_grad():
            for part in self.parameters():
                part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype) / part[0].numel() ** 0.5)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep)
        return (self.proj_out(hidden_states),)


def _images(seed: int) -> Tensor:
    """[steps, 2, 9, 16]: two images on their way."""
    start, end = torch.randn(2, 2, _TOKENS, _WIDTH, generator=generator_for(seed, 8), dtype=torch.float64)
    way = torch.linspace(0, 1, _STEPS, dtype=torch.float64)[:, None, None, None]
    return (1 - way) * start + way * end


def _timestep(step: int) -> Tensor:
    return torch.tensor(_STEPS - step, dtype=torch.float64)


def _run(model: nn.Module, images: Tensor) -> Tensor:
    return torch.stack([model(at, timestep=_timestep(step))[0] for step, at in enumerate(images)])


def _attached(model: nn.Module, images: Tensor, attach: Attach, refresh: int) -> tuple[Tensor, float | None]:
    handle = attach(model, every(refresh), depth=_DEPTH)
    try:
        outputs = _run(model, images)
        handle.reset()
        return outputs, count_flops(lambda: _run(model, images)).value
    finally:
        handle.remove()


def _one_block(model: _Denoiser) -> None:
    model.transformer_blocks[0](_images(0)[0], _timestep(0))


def _kept_by_hand(model: _Denoiser, images: Tensor) -> Tensor:
    """What the deep blocks added at the last refresh is added to what enters them now."""
    outputs, added = [], torch.zeros(())
    for step, at in enumerate(images):
        states = at
        for block in model.transformer_blocks[:_DEPTH]:
            states = block(states, _timestep(step))
        entered = states
        if step % _EVERY == 0:
            for block in model.transformer_blocks[_DEPTH:]:
                states = block(states, _timestep(step))
            added = states - entered
        outputs.append(model.proj_out(entered + added))
    return torch.stack(outputs)
