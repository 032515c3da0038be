"""What is learnt of a model before it is attached to: the parts of its blocks, what they cost, what stays outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from scrimp.adaptive.calls import SDPA, Call
from scrimp.primitives.errors import InputError

ADDS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})


@dataclass(frozen=True)
class Block:
    """One block: whether tokens can go between its attention and its MLP, and the FLOPs of its parts.

    Attributes:
        name: of the module.
        middle: whether there is a midpoint; ``proj`` is then the layer after attention.
        before: FLOPs a token of the layers before attention.
        between: of those from attention to the midpoint.
        after: of those after the midpoint.
        pair: FLOPs of attention a query and key.
        score: of these, the part of the logits.
        calls: calls of attention.
        dim: numbers in a key of one head.
        fixed: FLOPs an image, whatever its tokens.
        shared: FLOPs a forward, whatever its images, such as those of a position bias.
        rest: the first layer after the midpoint.
    """

    name: str
    middle: bool
    before: int
    between: int
    after: int
    pair: int
    score: int
    calls: int
    dim: int
    fixed: int = 0
    shared: int = 0
    proj: nn.Module | None = None
    rest: nn.Module | None = None


@dataclass
class Host:
    """A model that can be attached to.

    Attributes:
        model: it.
        blocks: its blocks.
        prefix: class and register tokens.
        by_class: whether the first of them is a class token.
        tokens: tokens of the images that it was probed with.
        outside: FLOPs an image outside the blocks, by number of tokens.
    """

    model: nn.Module
    blocks: list[Block]
    prefix: int
    by_class: bool
    tokens: int
    outside: dict[int, int] = field(default_factory=dict)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model of timm's vision transformers' build.

    Raises:
        InputError: another build, or activation checkpointing.
    """
    blocks, name = getattr(model, "blocks", None), type(model).__name__
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise _refusal(model, f"{name} without a list of 'blocks'")
    if not isinstance(getattr(model, "norm", None), nn.Module) or not hasattr(model, "num_prefix_tokens"):
        raise _refusal(model, f"{name} without 'norm' and 'num_prefix_tokens'")
    refuse_checkpointing(model)
    return list(blocks)


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise InputError where blocks would run a second time in the backward pass."""
    if getattr(model, "grad_checkpointing", False):
        remedy = "call model.set_grad_checkpointing(False)"
        raise InputError("a model without activation checkpointing", type(model).__name__ + " with it", remedy)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def examine(model: nn.Module, example: Tensor) -> tuple[Host, Tensor]:
    """Run the model once, as it is, and learn its build.

    Args:
        model: in evaluation mode.
        example: images.

    Returns:
        The host, and the model's normed tokens for the example, [images, tokens, dim].

    Raises:
        InputError: blocks of a build that tokens cannot be taken from, by name.
    """
    modules, images = modules_of(model), len(example)
    recorders = [_Recorder(module) for module in modules]
    marks, normed = [], []
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels of the CPU have no formula
        counter = stack.enter_context(_Counter())
        for recorder in recorders:
            stack.enter_context(recorder.listening())
        for module, register in ((modules[0], "register_forward_pre_hook"), (modules[-1], "register_forward_hook")):
            stack.callback(getattr(module, register)(lambda *_: marks.append(counter.total)).remove)
        stack.callback(model.norm.register_forward_hook(lambda *_: normed.append(_[2])).remove)  # type: ignore[union-attr, operator]
        model(example)
    if len(marks) != 2 or len(normed) != 1:
        raise _refusal(model, f"{type(model).__name__} that runs its blocks or its norm not once")
    tokens = normed[0].shape[1]
    blocks = [recorder.block(f"blocks.{i}", images, tokens) for i, recorder in enumerate(recorders)]
    inside = marks[1] - marks[0]
    _compare(model, blocks, inside, images, tokens)
    embeds = getattr(model, "embeds", model)
    by_class = getattr(embeds, "cls_token", None) is not None
    outside = {tokens: (counter.total - inside) // images}
    return Host(model, blocks, int(model.num_prefix_tokens), by_class, tokens, outside), normed[0]  # type: ignore[arg-type]


def _compare(model: nn.Module, blocks: list[Block], inside: int, images: int, tokens: int) -> None:
    known = sum(block.shared for block in blocks)
    for block in blocks:
        linear = (block.before + block.between + block.after) * tokens
        known += images * (linear + block.pair * tokens**2 + block.fixed)
    if known != inside:
        saw = f"{type(model).__name__} with other matrix products in its blocks"
        raise _refusal(model, saw, "merge adapters into the weights first")


class _Counter(TorchDispatchMode):
    """FLOPs by torch's own formulas; its own counter stumbles over parameters without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in flop_registry:
            out = func(*args, **kwargs)
            self.total += int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
            return out
        with self:
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


class _Recorder(TorchFunctionMode):
    """What happens in one block, in order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.events, self.runs = module, list[tuple[str, Any]](), 0
        self.shapes: list[torch.Size] = []
        self.given: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.events.append(("attention", Call(*args, **kwargs)))
        elif func is functional.linear:
            self.events.append(("linear", (args[0].shape, (args[1] if len(args) > 1 else kwargs["weight"]).shape)))
        elif func in ADDS and any(arg is self.given for arg in args[:2]):
            self.events.append(("sum", None))
        return func(*args, **kwargs)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the calls of the block, and of the layers in it."""
        with ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(self._open).remove)
            stack.callback(self.module.register_forward_hook(self._close, always_call=True).remove)
            for part in self.module.modules():
                if hasattr(part, "in_features"):
                    stack.callback(part.register_forward_pre_hook(self._layer).remove)
            yield

    def _open(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.given, self.runs = args[0] if args else None, self.runs + 1
        self.shapes.append(getattr(self.given, "shape", torch.Size()))
        self.__enter__()

    def _close(self, module: nn.Module, args: Any, out: Any) -> None:
        self.shapes.append(getattr(out, "shape", torch.Size()))
        self.__exit__(None, None, None)

    def _layer(self, module: nn.Module, args: Any) -> None:
        self.events.append(("layer", module))

    def block(self, name: str, images: int, tokens: int) -> Block:
        """What was seen, as a `Block`."""
        kind = f"{name} ({type(self.module).__name__})"
        calls = [what for event, what in self.events if event == "attention"]
        if not calls:
            raise _refusal(self.module, f"{kind} without a call of torch's scaled_dot_product_attention")
        if self.runs != 1 or self.shapes[0] != self.shapes[1] or self.shapes[0][:2] != (images, tokens):
            raise _refusal(self.module, f"{kind} that changes the shape {[list(shape) for shape in self.shapes]}")
        for call in calls:
            call.checked()
            if call.query.shape[::2] != (images, tokens) or call.key.shape[::2] != (images, tokens):
                raise _refusal(self.module, f"{kind} with attention over {list(call.query.shape)}")
        return self._measured(name, calls, images, tokens)

    def _measured(self, name: str, calls: list[Call], images: int, tokens: int) -> Block:
        score = sum(2 * call.query.shape[1] * call.query.shape[3] for call in calls)
        pair = score + sum(2 * call.value.shape[1] * call.value.shape[3] for call in calls)
        parts, fixed, shared = self._linear(images, tokens)
        proj = self._next("attention", ("layer", "sum"))
        middle = len(calls) == 1 and proj is not None and parts[2] > 0
        dim = calls[0].key.shape[3]
        before, between, after = parts
        ends = (proj, self._next("sum", ("layer",))) if middle else (None, None)
        return Block(name, middle, before, between, after, pair, score, len(calls), dim, fixed, shared, *ends)

    def _linear(self, images: int, tokens: int) -> tuple[list[int], int, int]:
        parts, fixed, shared, part = [0, 0, 0], 0, 0, 0
        for event, what in self.events:
            if event == "attention":
                part = max(part, 1)
            elif event == "sum" and part == 1:
                part = 2
            elif event == "linear":
                shape, weight = what
                work = 2 * shape.numel() * weight[0]
                if shape[:-1] == (images, tokens):
                    parts[part] += 2 * weight[0] * weight[1]
                elif shape[0] == images:
                    fixed += work // images
                else:
                    shared += work
        return parts, fixed, shared

    def _next(self, after: str, kinds: tuple[str, ...]) -> nn.Module | None:
        """The first of these events after attention, or after the first sum that follows it, if that is a layer."""
        rest = iter(self.events)
        for mark in ("attention",) if after == "attention" else ("attention", after):
            any(event == mark for event, _ in rest)
        first = next((what for event, what in rest if event in kinds), None)
        return first if isinstance(first, nn.Module) else None


def _refusal(
    model: nn.Module, saw: str, remedy: str = "use a plain one, such as vit, deit, dinov2, beit"
) -> InputError:
    return InputError("a vision transformer of blocks with attention of all tokens to all", saw, remedy)
