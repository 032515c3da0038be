"""`attention`: an unmodified model's attention, sent to another function for the length of a ``with`` block."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from scrimp.attend.reroute_calls import Asked, Attention, Refusal, Target, run
from scrimp.attend.reroute_layers import Choice, Layers, Where
from scrimp.primitives.errors import InputError


class Call(NamedTuple):
    """Calls of one kind: the module they came from (``None`` where ``model`` was not given) and their shapes."""

    module: str | None
    query: tuple[int, ...]
    key: tuple[int, ...]


class Routed:
    """What became of the attention calls: ``calls`` went to the function, ``left`` stayed with torch; both counted."""

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()
        self.left: Counter[Call] = Counter()


@contextmanager
def attention(
    fn: Attention | Mapping[str, Attention], *, model: nn.Module | None = None, where: Where | None = None
) -> Iterator[Routed]:
    """Send every ``scaled_dot_product_attention`` of this thread to ``fn`` during the block.

    That is the door timm (fused attention), transformers ("sdpa"), torchvision and ``nn.MultiheadAttention``, and
    diffusers go through; the models stay as they are. A mask is put into the family's words where that is exact:
    all true, ``causal``, keys that end early (``key_lengths``), or both. Anything else is refused, unless ``fn`` has
    a parameter ``attn_mask``; so is dropout without a parameter ``dropout_p``, and a scale other than
    ``dim ** -0.5`` without a parameter ``scale`` (the usual scale is softmax's own and dropped for such functions).

    Blocks may be nested: the inner one decides first, and layers it leaves go on to the outer one. Backward passes
    need no block, but for models with activation checkpointing, which run their forward again. Compiled models run
    as the eager code they were made from, in all threads, while a block is open; a block inside a compiled function
    is refused. Attention written out as matrix products (transformers' "eager", timm without fused attention) cannot
    be seen, and other threads keep torch's.

    Args:
        fn: a member of the family, a ``functools.partial`` of one, or any function of its signature
            ``(query, key, value, *, ...) -> output`` on [batch, heads, tokens, dim]; or a mapping from regular
            expressions to such functions, of which the first that is found in a layer's name serves it.
        model: whose modules name the calls; then only calls from inside it are rerouted.
        where: a regular expression (searched for) or a predicate on module names, such as ``r"blocks\\.[0-5]\\."``;
            layers it does not take keep torch's attention.

    Yields:
        A `Routed` that counts the calls.

    Raises:
        InputError: a call that ``fn`` cannot honour, by module; or, at the end, that nothing was rerouted.
    """
    routed, layers = Routed(), Layers()
    choice = Choice(fn, where, named=model is not None)
    with ExitStack() as stack:
        stack.enter_context(layers.following(model))
        stack.enter_context(_eager)
        stack.enter_context(_Router(choice, layers, routed))
        yield routed
    if not routed.calls:
        raise _nothing(routed)


_state = threading.local()  # .busy: a replacement is at work, whose own calls are its own business


class _Router(TorchFunctionMode):
    def __init__(self, choice: Choice, layers: Layers, routed: Routed) -> None:
        super().__init__()
        self._choice, self._layers, self._routed = choice, layers, routed
        self._multi_head: Callable[..., Any] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and not getattr(_state, "busy", False):
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward and not getattr(_state, "busy", False):
            return self._attend_multi_head(func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        asked, name = Asked(*args, **kwargs), self._layers.current
        call = Call(name, tuple(asked.query.shape), tuple(asked.key.shape))
        target = self._choice(name)
        if target is None:
            self._routed.left[call] += 1
            return _SDPA(*args, **kwargs)
        _state.busy = True
        try:
            out = run(target, asked)
        except Refusal as refusal:
            raise _refused(target, name, refusal) from None
        finally:
            _state.busy = False
        self._routed.calls[call] += 1
        return out

    def _attend_multi_head(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function whose body calls torch's attention, unseen by a mode that has seen the function itself."""
        name = self._layers.current
        target = self._choice(name)
        if target is None:
            query, key = args[:2]
            self._routed.left[Call(name, tuple(query.shape), tuple(key.shape))] += 1
            return func(*args, **kwargs)
        if args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else kwargs.get("need_weights", True):
            weights = Refusal("nn.MultiheadAttention asked for its weights", "call it with need_weights=False")
            raise _refused(target, name, weights)
        if self._multi_head is None:
            self._multi_head = _with_attention(func, self._attend)
        return self._multi_head(*args, **kwargs)


_SDPA: Callable[..., Tensor] = functional.scaled_dot_product_attention
_NEED_WEIGHTS = 15  # its place among the arguments of multi_head_attention_forward


def _with_attention(func: Any, attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """torch's own multi-head function over a name space in which attention is ``attend``; the module stays untouched.

    Exchanging the name in the module instead would reach other threads.
    """
    names = {**func.__globals__, _SDPA.__name__: attend, "has_torch_function": lambda tensors: False}
    return types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


class _Eager:
    """Runs compiled models as the eager code they were made from: their kernels pass no door.

    The switch is one for the process, so that blocks of several threads share it: the last one out turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._switch = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                try:
                    self._switch.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:  # torch refuses to be switched from inside compiled code
                    raise InputError(
                        "attention() outside compiled functions", "a block inside one", "open it around the call"
                    ) from error
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._switch.close()


_eager = _Eager()


def _refused(target: Target, name: str | None, refusal: Refusal) -> InputError:
    place = f"in {name!r}" if name else "in a layer (pass model= to have it named)"
    return InputError(f"attention that {target.name} can take over", f"{refusal.saw} {place}", refusal.remedy)


def _nothing(routed: Routed) -> InputError:
    if routed.left:
        names = sorted({call.module or "calls outside the model" for call in routed.left})
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return InputError(
            "a layer to reroute",
            f"none chosen out of {', '.join(names[:4])}{more}: nothing was rerouted",
            "change where=",
        )
    return InputError(
        "a model that calls torch's scaled_dot_product_attention in this thread",
        "no such call: nothing was rerouted",
        "run it inside the block; transformers: load with attn_implementation='sdpa'; "
        "timm: set_fused_attn(True) before building it, or layer.fused_attn = True",
    )
