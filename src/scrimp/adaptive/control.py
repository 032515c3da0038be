"""`Controller`: a method's place in a model, by hooks around its blocks and a mode that sees torch's calls in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from scrimp.adaptive.calls import SDPA, Call, settled
from scrimp.adaptive.host import ADDS, Host, examine, quiet, refuse_checkpointing
from scrimp.adaptive.ledger import Count, cap_for, flops
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.report import Report
from scrimp.adaptive.stream import all_of
from scrimp.primitives.errors import InputError

Form = Literal["auto", "masked", "ragged"]
_NAME = "_scrimp_adaptive"  # a plain attribute: copies of the model carry theirs, state_dict does not see it


class Controller(Report):
    """What a method does to a model, and what the last forward of this thread cost.

    Attributes:
        form: ``auto``, ``masked`` or ``ragged``; may be changed at any time between forwards.
        method: the method, with its settings.
    """

    def __init__(
        self,
        host: Host,
        method: Method,
        form: Form,
        fused: list[tuple[nn.Module, Any]],
        *,
        max_flops: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(host)
        self.method, self.form, self.fused = method, form, fused
        self.max_flops, self.max_tokens = max_flops, max_tokens
        self._caps: dict[int, int | None] = {}
        self._handles: list[RemovableHandle] = []
        self._check_form()
        if max_flops is not None or max_tokens is not None:
            self._cap(host.tokens)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Numbers to train that the method brings along; none for methods without."""
        return self.method.parameters()

    def install(self) -> None:
        """Put the hooks on."""
        model = self.host.model
        add = self._handles.append
        add(model.register_forward_pre_hook(self._see_images))
        for index, (block, module) in enumerate(zip(self.host.blocks, model.blocks, strict=True)):  # type: ignore[arg-type]
            add(module.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
            add(module.register_forward_hook(partial(self._after, index), always_call=True))
            if block.proj is not None:
                add(block.proj.register_forward_pre_hook(self._project))
            if block.rest is not None:
                add(block.rest.register_forward_pre_hook(self._rest))
        add(model.norm.register_forward_hook(self._fill))  # type: ignore[union-attr, operator]
        pool = getattr(model, "attn_pool", None)
        if isinstance(pool, nn.Module):
            add(pool.register_forward_pre_hook(self._open_pool))
            add(pool.register_forward_hook(self._close_pool, always_call=True))
        if hasattr(model, "forward_intermediates"):
            model.__dict__["forward_intermediates"] = _no_intermediates
        model.__dict__[_NAME] = self

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in (_NAME, "forward_intermediates"):
            self.host.model.__dict__.pop(name, None)

    def _see_images(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not self._now.off:
            self._now.shape = tuple(args[0].shape[1:])

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._now.off:
            return None
        run = self._begin(args[0]) if index == 0 else self._now.run
        name = self.host.blocks[index].name
        if run is None or run.block != index - 1:
            raise InputError("a forward through all blocks in their order", f"a call of {name}", "restore_ the model")
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise InputError("attention of all tokens to all", f"a mask passed to {name}", "pass no mask or padding")
        run.block, run.plan, run.own = index, None, 0
        run.evidence.clear()
        x = self.method.enter(run, args[0])
        if kwargs.get("rope") is not None:
            kwargs = {**kwargs, "rope": run.stream.rope(kwargs["rope"])}
        run.counts.append(Count(run.stream.count(), 0, 0))
        self._now.mode = _Watch(self, run, x)
        return (x, *args[1:]), kwargs

    def _begin(self, x: Tensor) -> Run:
        refuse_checkpointing(self.host.model)
        form = self._check_form()
        training = self.host.model.training
        if self.method.adaptive and form == "ragged" and training:
            raise InputError("the masked form to train", "form='ragged'", "set form='auto', or call model.eval()")
        masked = self.method.adaptive and (form == "masked" or (form == "auto" and training))
        if self.method.adaptive and not masked and torch.compiler.is_exporting():
            raise InputError("a form of fixed shapes to export", "the ragged one", "set form='masked'")
        if self.method.adaptive and not len(x):
            masked = True  # of no image there is nothing to pack
        stream = all_of(x, self.host.prefix, "masked" if masked else "dense")
        self._now.run = run = Run(self.host, stream, x.device, self._cap(stream.tokens))
        return run

    def _check_form(self) -> Form:
        if self.form not in get_args(Form):
            raise InputError(f"a form out of {', '.join(get_args(Form))}", repr(self.form), "correct it")
        return self.form

    def _cap(self, tokens: int) -> int | None:
        """Most patch tokens that may leave a reducing block, so that the budgets hold for any image of this size."""
        if self.max_flops is None and self.max_tokens is None:
            return None
        if tokens not in self._caps:
            self._caps[tokens] = self._find_cap(tokens)
        return self._caps[tokens]

    def _find_cap(self, tokens: int) -> int | None:
        host, patches = self.host, tokens - self.host.prefix
        cap = None if self.max_tokens is None else self.max_tokens - host.prefix
        if cap is not None and (cap < 1 or _last(self.method.schedule(host, patches, cap)) > cap + host.prefix):
            least = _last(self.method.schedule(host, patches, 1))
            raise InputError(f"max_tokens of at least {least}", str(self.max_tokens), "allow more")
        if self.max_flops is None:
            return cap
        outside = self.outside(tokens)
        if outside is None:
            raise InputError("images whose cost is known", f"{tokens} tokens", "call the model itself, not its parts")

        def price(cap: int) -> int:
            return outside + int(flops(host.blocks, self.method.schedule(host, patches, cap), 1))

        return cap_for(price, patches if cap is None else min(cap, patches), self.max_flops)

    def attention(self, run: Run, call: Call) -> Tensor:
        """One call of attention in a block."""
        call, block = call.checked(), self.host.blocks[run.block]
        self.method.look(run, call)
        if block.middle:
            run.plan = self.method.plan(run)
        return self.method.attend(run, call)

    def _project(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        run = self._now.run
        if self._now.off or run is None or run.plan is None:
            return None
        return run.plan.take(args[0]), *args[1:]

    def reduce(self, run: Run, x: Tensor) -> Tensor:
        """After attention: go on with the stream of the plan, then let the method make other tokens of them."""
        queries = run.stream.count()
        if run.plan is not None:
            run.stream = run.plan.stream
            queries = run.stream.count()
            run.plan = None
        run.counts[-1] = run.counts[-1]._replace(queries=queries)
        return self.method.merge(run, x)

    def _rest(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """From here on a block has nothing to see, and every call of torch's takes longer while it is seen."""
        mode = self._now.mode
        if isinstance(mode, _Watch) and mode.summed and args[0].numel():
            mode.close()

    def _after(self, index: int, module: nn.Module, args: Any, out: Any) -> Any:
        mode, self._now.mode = self._now.mode, None
        if mode is None:
            return None
        mode.close()
        if not isinstance(out, Tensor):  # the block has failed
            self._now.run = None
            return None
        run = mode.run
        if not self.host.blocks[index].middle:
            run.plan = self.method.plan(run)
            out = self.reduce(run, out if run.plan is None else run.plan.take(out))
        elif not mode.summed:
            raise InputError(
                "a block that adds its attention to its input", self.host.blocks[index].name, "restore_ the model"
            )
        run.counts[-1] = run.counts[-1]._replace(leaving=run.stream.count())
        run.streams.append(run.stream)
        out = self.method.leave(run, out)
        run.counts[-1] = run.counts[-1]._replace(own=run.own)
        return self._finish(run, out) if index == len(self.host.blocks) - 1 else out

    def _finish(self, run: Run, x: Tensor) -> Tensor:
        x, dead = run.stream.restore(self.method.finish(run, x))
        self._now.run, self._now.dead = None, dead
        run.evidence.clear()
        if not torch.compiler.is_exporting():
            self._now.last = run
        return x

    def _fill(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """Rows without a token become the mean of the image's patch tokens: so every mean and maximum is that of those.

        After the norm, as the mean of normed tokens is not the norm of their mean.
        """
        dead, prefix = self._now.dead, self.host.prefix
        if self._now.off or dead is None:
            return None
        patches, gone = out[:, prefix:], dead[:, prefix:, None]
        kept = (~gone).sum(1, keepdim=True).clamp(min=1)
        mean = patches.masked_fill(gone, 0).sum(1, keepdim=True) / kept
        return torch.cat([out[:, :prefix], torch.where(gone, mean.to(out.dtype), patches)], 1)

    def _open_pool(self, module: nn.Module, args: Any) -> None:
        if not self._now.off and self._now.dead is not None:
            self._now.mode = _Pool(self._now.dead)
            self._now.mode.__enter__()

    def _close_pool(self, module: nn.Module, args: Any, out: Any) -> None:
        mode, self._now.mode = self._now.mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def outside(self, tokens: int) -> int | None:
        """FLOPs an image outside the blocks; None where the images' size is not known."""
        known, shape = self.host.outside, self._now.shape
        if tokens not in known and shape is not None:
            weight = next(self.host.model.parameters())
            self._now.off = True
            try:
                with quiet(self.host.model):
                    host, _ = examine(self.host.model, weight.new_zeros(2, *shape))
            finally:
                self._now.off = False
            known[tokens] = host.outside[host.tokens]
        return known.get(tokens)


class _Watch(TorchFunctionMode):
    """Sees torch's calls while a block runs: attention, and the first addition to what the block was given."""

    def __init__(self, controller: Controller, run: Run, x: Tensor) -> None:
        super().__init__()
        self.controller, self.run, self.x = controller, run, x
        self.middle, self.attended, self.summed = controller.host.blocks[run.block].middle, False, False
        self.open = True
        self.__enter__()

    def close(self) -> None:
        """See no more."""
        if self.open:
            self.open = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.attended = True
            return self.controller.attention(self.run, Call(*args, **kwargs))
        if self.attended and self.middle and not self.summed and func in ADDS and any(a is self.x for a in args[:2]):
            self.summed = True
            if self.run.plan is not None:
                args = [self.run.plan.take(arg) if arg is self.x else arg for arg in args]
            return self.controller.reduce(self.run, func(*args, **kwargs))
        if func in (Tensor.reshape, Tensor.view) and self.run.stream.lengths is not None and not args[0].numel():
            return func(args[0], settled(args[0].shape, args[1:]), **kwargs)
        return func(*args, **kwargs)


class _Pool(TorchFunctionMode):
    """Attention pooling that does not see rows without a token."""

    def __init__(self, dead: Tensor) -> None:
        super().__init__()
        self.dead = dead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        call = Call(*args, **(kwargs or {})).checked()
        dead = self.dead[:, -call.key.shape[2] :]
        bias = torch.zeros_like(dead, dtype=call.query.dtype).masked_fill_(dead, -torch.inf)[:, None, None]
        return call.run(call.query, call.key, call.value, bias if call.attn_mask is None else bias + call.attn_mask)


def find(model: nn.Module) -> Controller | None:
    """What is attached to a model."""
    return model.__dict__.get(_NAME)


def _last(counts: list[Count]) -> int:
    leaving = counts[-1].leaving
    assert isinstance(leaving, int)
    return leaving


def _no_intermediates(*_: Any, **__: Any) -> NoReturn:
    raise InputError("whole forwards", "forward_intermediates, between whose blocks tokens go", "restore_ the model")
