"""Models, images and methods as adaptive_speed.py times them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scrimp.adaptive import Controller, gating_, keep_tokens_, token_halting_, token_merging_, token_sampling_
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

PATCHES = 196
SHAPES = {
    "deit-s-224": ("deit_small_patch16_224", 224),
    "deit-s-384": ("deit_small_patch16_224", 384),
    "vit-b-224": ("vit_base_patch16_224", 224),
    "vit-b-384": ("vit_base_patch16_224", 384),
}
STATIC = ("merging-8", "merging-13", "merging-16", "keep-0.7")
METHODS = (*STATIC, "sampling-110", "sampling-110-masked", "halting", "gating")


@dataclass(frozen=True)
class Numbers:
    """What a model without a method computes on its images: what halting and gates are set by.

    Attributes:
        mean, deviation: of the first number of all tokens after all blocks.
        sizes: root mean square of what each block is given.
    """

    mean: float
    deviation: float
    sizes: list[float] = field(default_factory=list)


def build(name: str, size: int, *, seed: int) -> nn.Module:
    """A model with fresh weights, in evaluation mode, whose attention is not even."""
    import timm

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name, pretrained=False, img_size=size)
        for block in model.blocks:  # type: ignore[union-attr]
            weight = block.attn.qkv.weight  # type: ignore[union-attr]
            weight[: 2 * weight.shape[1]] *= 4
    return model.eval()


def pictures(count: int, size: int, *, seed: int) -> Tensor:
    """Images [count, 3, size, size]: noise in a corner that is a tenth of the first and the whole of the last."""
    generator = generator_for(seed, count, size)
    noise = torch.randn(count, 3, size, size, generator=generator)
    flat = torch.randn(count, 3, 1, 1, generator=generator)
    share = torch.linspace(0.1, 1, count) if count > 1 else torch.tensor([0.5])
    inside = torch.arange(size) < size * share.sqrt()[:, None]
    return torch.where((inside[:, None] & inside[:, :, None])[:, None], noise + flat, flat)


def numbers_of(model: nn.Module, images: Tensor) -> Numbers:
    given: list[Tensor] = []
    out: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        given.append(args[0])
        out.append(result[..., 0])

    handles = [block.register_forward_hook(see) for block in model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    first = torch.stack(out)
    return Numbers(float(first.mean()), float(first.std()), [float(x.square().mean().sqrt()) for x in given])


def attach(method: str, model: nn.Module, numbers: Numbers, *, seed: int) -> tuple[Controller, str]:
    """Put a method on, set for this model, and say how it is set.

    Raises:
        InputError: no such method.
    """
    kind, _, amount = method.partition("-")
    patches = model.patch_embed.num_patches  # type: ignore[union-attr]
    if kind == "merging":
        r = round(int(amount) * patches / PATCHES)
        return token_merging_(model, r), f"r = {r}"
    if kind == "keep":
        return keep_tokens_(model, float(amount)), f"{amount} at blocks 3, 6, 9"
    if kind == "sampling":
        count, _, masked = amount.partition("-")
        samples = round(int(count) * patches / PATCHES)
        return token_sampling_(model, samples, form="masked" if masked else "ragged"), f"{samples} samples"
    if kind == "halting":
        center = 2 + numbers.mean / numbers.deviation
        return token_halting_(model, gate_scale=1 / numbers.deviation, gate_center=center, form="ragged"), "random"
    if kind == "gating":
        controller = gating_(model, seed=seed, form="ragged")
        open_some(controller, numbers, seed=seed)
        return controller, "random"
    raise InputError(f"a method out of {', '.join(METHODS)}", method, "correct it")


def open_some(controller: Controller, numbers: Numbers, *, seed: int) -> None:
    """Gates at random, about seven of ten open, those of layers and heads about eight."""
    gates = controller.method.gates  # type: ignore[attr-defined]
    generator = generator_for(seed, len(numbers.sizes))
    with torch.no_grad():
        for linears, beyond in ((gates.image, 0.9), (gates.token, 0.5)):
            for linear, size in zip(linears, numbers.sizes[-len(linears) :], strict=True):
                spread = gates.tau / (size * linear.in_features**0.5)
                linear.weight.copy_(spread * torch.randn(linear.weight.shape, generator=generator))
                linear.bias += gates.tau * (beyond - 1)  # new gates are one tau above their threshold


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, not equal ones."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
