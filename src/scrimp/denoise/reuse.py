"""Reuse of deep features between denoising steps, for the diffusers models that diffusers' own caches do not reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.denoise.around import Around, owners
from scrimp.denoise.reuse_memory import Memory
from scrimp.denoise.reuse_rules import Plan, Rule, Step, relative_change, relative_error
from scrimp.denoise.reuse_transformer import is_transformer, transformer_plan
from scrimp.denoise.reuse_unet import is_unet, unet_plan
from scrimp.primitives.errors import InputError

OWNER = "reuse"
ALIKE = 1e-3  # relative change up to which features of two calls may be those of the same images by other kernels
# Extra features of control networks change at every step by design; the deep part keeps those of the last refresh.
FRESH = ("timestep", "return_dict", "controlnet_block_samples", "block_controlnet_hidden_states")


def reuse(model: nn.Module, rule: Rule, *, depth: int = 1, order: int = 0) -> Reuse:
    """Lets the deep part of a denoiser answer with what it gave at an earlier step, where a rule allows.

    The first modules run at every step. What the deep ones make of it changes slowly from step to step, so at a reused
    step they are left out and those that follow go on from the features of the last refresh, or (``order`` 1) from the
    line through those of the last two, by timestep (TaylorSeer, Liu et al. 2025, arXiv:2503.06923, at its first order).
    A refresh comes by itself at the first step, when the timestep rises or is the first one anew (another trajectory),
    and when the images' shape or the conditioning changes. Guided batches (conditional and not, side by side) work as
    they are; called one after the other, with conditioning that differs, they refresh each time.

    With ``every(1)`` outputs are the plain model's, bit for bit. Batches, not samples, are refreshed: by `below` when
    any sample needs it.

    Args:
        model: a diffusers UNet2DModel or UNet2DConditionModel (see `scrimp.denoise.reuse_unet` for ``depth``), or a
            transformer such as DiT, SD3, Sana or PixArt (`scrimp.denoise.reuse_transformer`). Its weights and its code
            stay as they are; calls go through until `Reuse.remove`.
        rule: `every` or `below`.
        depth: how much runs always; 1 saves the most, and more gives smaller errors and a better estimate of them.
        order: 0 reuses features as they were; 1 extrapolates them, once there are two refreshes.

    Returns:
        The attached reuse, also a context manager.

    Raises:
        InputError: a model not built in one of these ways, a depth or order there is not, or reuse attached already.
    """
    if order not in (0, 1):
        raise InputError("order 0 or 1", repr(order), "0 reuses features as they were, 1 extrapolates them")
    if is_unet(model):
        plan = unet_plan(model, depth)
    elif is_transformer(model):
        plan = transformer_plan(model, depth)
    else:
        raise InputError(
            "a diffusers UNet (conv_in, down_blocks, mid_block, up_blocks) or transformer (transformer_blocks)",
            type(model).__name__,
            "pass the denoiser itself, such as pipeline.unet or pipeline.transformer",
        )
    return Reuse(model, rule, plan, order=order)


class Reuse:
    """Reuse attached to a model by `reuse`.

    Attributes:
        rule: may be exchanged between trajectories.
        steps: what happened at each call since the last `reset`.
        measured: fills where ``shadow`` is set: (timestep, estimate [batch], measured relative error [batch]) of every
            reused call. Each is then computed in full as well, which costs more than it saves; see `calibrate`.
    """

    def __init__(self, model: nn.Module, rule: Rule, plan: Plan, *, order: int = 0) -> None:
        self.rule = rule
        self.plan = plan
        self.steps: list[Step] = []
        self.shadow = False
        self.measured: list[tuple[float | None, Tensor, Tensor]] = []
        self._model = model
        self._memory = Memory(order)
        self._signature = inspect.signature(model.forward)
        self._around = Around(OWNER)
        self._mode = "through"
        self._attach()
        self.reset()

    @property
    def batch(self) -> int:
        """Rows of the last call's batch, guided ones counted as they come; 0 before any call."""
        return int(self._shape[0][0]) if self._shape else 0

    def reset(self) -> None:
        """Forgets features and steps: the next call refreshes. Call it before each batch of images."""
        self.steps.clear()
        self._forget()

    def remove(self) -> None:
        """Gives the model its own calls back. Further removals do nothing.

        Raises:
            InputError: something attached later is still there.
        """
        self._around.remove()
        self._forget()

    def __enter__(self) -> Reuse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _attach(self) -> None:
        if OWNER in owners(self._model):
            raise InputError("a model without reuse", "one that has it already", "call remove() of the other first")
        self._around.put(self._model, self._whole)
        for module in self.plan.skipped:
            self._around.put(module, self._part(module))

    def _forget(self) -> None:
        self._answers: dict[nn.Module, Any] = {}
        self._memory.forget()
        self._entered: Tensor | None = None
        self._conditions: dict[str, Any] = {}
        self._shape: tuple[Any, ...] = ()
        self._timestep: float | None = None
        self._begin: float | None = None
        self._estimate: Tensor | None = None
        self._since = 0

    def _whole(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        if given.get("down_intrablock_additional_residuals") is not None:
            raise InputError("a UNet without adapter residuals", "some", "run this model without reuse")
        timestep = _number(given.get("timestep"))
        self._prepare(given, timestep)
        self._since += 1
        self._mode, self._estimate, self._ended = "undecided", None, False
        try:
            output = own(*args, **kwargs)
            self._check_ran()
            reused = self._mode == "reusing"
            if reused and self.shadow:
                self._measure(output, lambda: own(*args, **kwargs))
        except BaseException:
            # Half a refresh must not be reused.
            self._forget()
            raise
        finally:
            self._mode, self._entered = "through", None
        self.steps.append(Step(not reused, self._estimate))
        if not reused:
            self._since = 0
        return output

    def _prepare(self, given: dict[str, Any], timestep: float | None) -> None:
        images = next(iter(given.values()))
        shape = (tuple(images.shape), images.dtype, images.device)
        name = next(iter(given))
        conditions = {key: value for key, value in given.items() if key not in (name, *FRESH) and "residual" not in key}
        rises = timestep is not None and self._timestep is not None and timestep > self._timestep
        if rises or shape != self._shape or not _same(conditions, self._conditions):
            self._forget()
        self._shape, self._conditions, self._timestep = shape, conditions, timestep
        if self._memory.last is None:
            self._begin = timestep

    def _decide(self, shallow: Tensor) -> None:
        """Called with what enters the first module that may be left out."""
        # Other images at the timestep a trajectory began with begin another one, of a single step perhaps.
        last = self._memory.last
        again = last is not None and self._timestep is not None and self._timestep == self._begin
        if last is not None and again and not float(relative_change(shallow, last.shallow).max()) <= ALIKE:
            self._memory.forget()
        if self._memory.last is None:
            self._mode = "refreshing"
        else:
            if self.rule.measures or self.shadow:
                change = relative_change(shallow, self._memory.shallow(self._timestep))
                self._estimate = change * self.rule.factor(self._timestep)
            self._mode = "reusing" if self.rule.reuses(self._since, self._estimate) else "refreshing"
        if self._mode == "refreshing":
            self._memory.refresh(self._timestep, shallow.detach())
        self._entered = shallow.detach()

    def _part(self, module: nn.Module) -> Callable[..., Any]:
        first, last = module is self.plan.skipped[0], module is self.plan.skipped[-1]

        def call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._mode == "through":
                return own(*args, **kwargs)
            if first:
                self._decide(args[0] if args else kwargs["hidden_states"])
            self._ended |= last
            if self._mode == "reusing":
                return self._answer_again(module, last)
            output = own(*args, **kwargs)
            self._answers[module] = _hollow(output)
            if last:
                self._memory.keep(self._deep(output))
            return output

        return call

    def _answer_again(self, module: nn.Module, last: bool) -> Any:
        if not last:
            return self._answers[module]
        kept, entered = self._memory.deep(self._timestep), self._entered
        if kept is not None and self.plan.residual and entered is not None:
            kept = entered + kept
        answer = self._answers[module]
        if isinstance(answer, tuple):
            return tuple(kept if place == self.plan.hidden else part for place, part in enumerate(answer))
        return kept

    def _deep(self, output: Any) -> Tensor:
        """What is kept of the last module's output."""
        hidden = output[self.plan.hidden] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or (
            self.plan.residual and self._entered is not None and hidden.shape != self._entered.shape
        ):
            raise InputError(
                "blocks that return image tokens of the shape they are given",
                f"{type(self.plan.skipped[-1]).__name__} that returns something else",
                "run this model without reuse",
            )
        hidden, entered = hidden.detach(), self._entered
        return hidden - entered if self.plan.residual and entered is not None else hidden

    def _check_ran(self) -> None:
        if self._mode == "undecided" or not self._ended:
            raise InputError(
                "a call that runs every block of the model",
                "one that left out the first or last of those that may be reused (skip_layers?)",
                "call the model without layer skipping, or without reuse",
            )

    def _measure(self, output: Any, again: Callable[[], Any]) -> None:
        self._mode = "through"
        with torch.no_grad():
            full = again()
        estimate = self._estimate
        if estimate is not None:
            self.measured.append((self._timestep, estimate, relative_error(_sample(output), _sample(full))))


def _sample(output: Any) -> Tensor:
    sample: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return sample


def _number(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        return float(timestep.max()) if timestep.numel() else None
    return None if timestep is None else float(timestep)


def _hollow(output: Any) -> Any:
    """Zeros in the shapes of an output, without memory: what left-out modules hand on to left-out modules."""
    if isinstance(output, Tensor):
        return output.new_zeros(()).expand(output.shape)
    return tuple(_hollow(part) for part in output) if isinstance(output, tuple | list) else output


def _same(one: Any, other: Any) -> bool:
    """Whether two conditionings are equal, tensors by value."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.device == other.device and bool(torch.equal(one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
