"""`attach_` and `restore_`: a method on a model whose code and modules stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adaptive.control import Controller, Form, find
from scrimp.adaptive.host import Host, examine, modules_of, quiet
from scrimp.adaptive.ledger import Count, flops
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import Plan
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


def attach_(
    model: nn.Module,
    method: Method,
    *,
    form: Form = "auto",
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Put a method on a model in place. Its parameters, their names and its code stay as they are.

    The model runs three times on two images of noise, in evaluation mode: to learn its build, and to see that it gives
    the same whatever the order of its tokens.

    Args:
        model: of timm's vision transformers, or of their build.
        method: what it is to do.
        form: ``masked`` (all rows stay, those that are gone are ignored: to train), ``ragged`` (rows really go), or
            ``auto``: masked while ``model.training``. One and the same for methods whose images lose equally much.
        max_flops: most FLOPs that any image may cost.
        max_tokens: most tokens of any image, prefix included, that may leave the last block.
        example: images [batch, channels, height, width] to probe with, for models that do not tell their size.

    Raises:
        InputError: a model of another build, attached already, or a budget that cannot be kept.
    """
    if find(model) is not None:
        raise InputError("a model that nothing is attached to", f"{type(model).__name__} with a method", "restore_ it")
    modules_of(model)
    with quiet(model):
        fused = _fuse(model)
        try:
            images = _noise(model) if example is None else example
            host, plain = examine(model, images)
            method.check(host)
            _probe(host, method, images, plain)
            controller = Controller(host, method, form, fused, max_flops=max_flops, max_tokens=max_tokens)
        except BaseException:
            _unfuse(fused)
            raise
    controller.install()
    return controller


def restore_(model: nn.Module) -> None:
    """Take the method off: the model is bit for bit what it was.

    Raises:
        InputError: nothing is attached.
    """
    controller = controller_of(model)
    controller.remove()
    _unfuse(controller.fused)


def controller_of(model: nn.Module) -> Controller:
    """What `attach_` gave for this model.

    Raises:
        InputError: nothing is attached.
    """
    controller = find(model)
    if controller is None:
        raise InputError("a model with a method attached", f"{type(model).__name__} without", "attach one first")
    return controller


def image_costs(model: nn.Module, images: Tensor) -> Tensor:
    """FLOPs of each image, [images], int64: the model is run on them in evaluation mode, without gradients.

    1 multiply-add = 2 FLOPs; the matrix products of linear layers, convolutions, attention, and of the method itself.

    Raises:
        InputError: nothing is attached.
    """
    controller = controller_of(model)
    with quiet(model):
        model(images)
    costs = controller.costs
    assert costs is not None
    return costs


def cost_bounds(model: nn.Module, tokens: int | None = None) -> tuple[int, int | None]:
    """FLOPs of an image with nothing left out, and the most that any image may cost as the model is attached to.

    Args:
        model: with a method attached; its budgets are kept.
        tokens: of an image, prefix included; None: as many as the images had that it was attached with.

    Returns:
        The dense cost, and the bound; None for a method that does not know its highest cost.

    Raises:
        InputError: nothing is attached, or images of this size have not been seen.
    """
    controller = controller_of(model)
    host, method = controller.host, controller.method
    tokens = host.tokens if tokens is None else tokens
    outside = controller.outside(tokens)
    if outside is None:
        raise InputError("images whose cost is known", f"{tokens} tokens", "run the model on one first")
    dense = int(flops(host.blocks, [Count(tokens, tokens, tokens)] * len(host.blocks), 1)) + outside
    if type(method).schedule is Method.schedule:
        return dense, None
    counts = method.schedule(host, tokens - host.prefix, controller._cap(tokens))
    return dense, int(flops(host.blocks, counts, 1)) + outside


def _fuse(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Have the model's attention call torch's: written out it cannot be seen."""
    parts = [module for module in model.modules() if "fused_attn" in vars(module)]
    before = [(module, module.fused_attn) for module in parts]
    for module in parts:
        vars(module)["fused_attn"] = True
    return before


def _unfuse(before: list[tuple[nn.Module, Any]]) -> None:
    for module, value in before:
        vars(module)["fused_attn"] = value


def _noise(model: nn.Module) -> Tensor:
    embed, config = getattr(model, "patch_embed", None), getattr(model, "pretrained_cfg", None) or {}
    size, proj = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    channels = getattr(proj, "in_channels", None)
    if size is None or channels is None:
        channels, *size = config.get("input_size", (None,))
    if not size or channels is None:
        raise InputError("a model that tells the size of its images", type(model).__name__, "pass example=")
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    noise = torch.randn(2, channels, *size, generator=generator_for(0))
    return noise.to(weight.device, weight.dtype)


class _Shuffle(Method):
    """Nothing goes, but tokens change places in the first block: a model that is attached to rightly cannot tell."""

    def __init__(self, adaptive: bool) -> None:
        self.adaptive = adaptive

    def plan(self, run: Run) -> Plan:
        stream = run.stream
        order = torch.arange(stream.tokens)
        if run.block == 0:
            patches = torch.randperm(stream.tokens - stream.prefix, generator=generator_for(1))
            order[stream.prefix :] = patches + stream.prefix
        rows = order.expand(stream.images, -1)
        if not self.adaptive:
            return stream.choose(rows.to(run.device))
        flat = (rows + torch.arange(stream.images)[:, None] * stream.tokens).flatten()
        return stream.pick(flat.to(run.device), (stream.tokens,) * stream.images)


def _probe(host: Host, method: Method, images: Tensor, plain: Tensor) -> None:
    """Whether the attached model, nothing taken from it, gives what it gave."""
    controller = Controller(host, _Shuffle(method.adaptive), "ragged", [])
    normed: list[Tensor] = []
    controller.install()
    handle = host.model.norm.register_forward_hook(lambda *_: normed.append(_[2]))  # type: ignore[union-attr, operator]
    try:
        host.model(images)
    finally:
        handle.remove()
        controller.remove()
    far = (normed[0] - plain).abs().max() / plain.abs().max()
    if not float(far) <= 4 * torch.finfo(plain.dtype).eps ** 0.5:
        saw = f"{type(host.model).__name__} whose blocks tell by other ways (relative difference {float(far):.1e})"
        raise InputError("a model that knows a token's place only by embeddings and biases", saw, "use another model")
