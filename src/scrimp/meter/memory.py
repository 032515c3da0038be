"""Memory of tensors during a call: what it keeps for the backward pass, and its peak. The same on every run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scrimp.meter.cost import Reading
from scrimp.meter.device import cuda_in_use
from scrimp.meter.eager import eager, take_apart
from scrimp.meter.ops import is_metadata

Call = Callable[[], Any]


def saved_bytes(fn: Call) -> Reading:
    """Run ``fn()`` once and give the most bytes autograd kept at any one time for the backward pass.

    A storage shared by several saved tensors counts once; parameters (``nn.Parameter``, frozen ones included) do not
    count, inputs do. What a checkpoint drops and recomputes does not count. Compiled code is run eagerly.

    Raises:
        RuntimeError: ``fn`` differentiates by ``torch.func``, which refuses such hooks (as torch says it).
    """
    ledger = _Ledger()
    with eager(), _Watch(ledger), saved_tensors_hooks(ledger.pack, _unpack):
        fn()
    return ledger.saved_reading()


def peak_bytes(fn: Call) -> Reading:
    """Run ``fn()`` once and give the most bytes of tensors alive at once, above those alive at its start.

    On CUDA in use, the allocator's own figure, summed over devices. On the CPU, the storages that operators called by
    ``fn`` returned, from their making to their freeing: scratch space inside a kernel is not in it, and tensors older
    than the call are neither added nor, when freed, subtracted, so that the figure is the same whatever ran before.
    Compiled code is run eagerly on the CPU.
    """
    cuda = cuda_in_use()
    if cuda is not None:
        return _cuda_peak(fn, cuda)
    ledger = _Ledger()
    with eager(), _Watch(ledger):
        fn()
    return ledger.peak_reading()


def peak_and_saved(fn: Call) -> tuple[Reading, Reading]:
    """`peak_bytes` and `saved_bytes`, each ``None`` where it cannot be had; runs ``fn()`` twice."""
    peak = peak_bytes(fn)
    try:
        return peak, saved_bytes(fn)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return peak, Reading(None, "not measured: torch.func refuses hooks on saved tensors")


class _Storage:
    """What the ledger knows of one storage; never the storage itself, which must be free to go."""

    __slots__ = ("made", "nbytes", "parameter", "reference", "saved_as", "uses")

    def __init__(self, *, made: bool) -> None:
        self.made = made  # by the call
        self.nbytes = 0  # counted as alive now
        self.saved_as = 0  # bytes when it was saved
        self.uses = 0  # saved tensors that share it
        self.parameter = False
        self.reference: weakref.ref[Any] | None = None


class _Ledger:
    """Storages by identity, from the first operator that meets them to their end."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.missed: set[str] = set()
        self._known: dict[int, _Storage] = {}
        # Saving may precede the operator that shows a tensor to be a parameter, so the sum is left for the end.
        self._saves: list[tuple[_Storage, int]] = []

    def meet(self, tensor: torch.Tensor, *, made: bool) -> None:
        """Enter a tensor: made by the call if an operator returned it before any took it."""
        storage = self._storage(tensor)
        if storage is None:
            return
        entry = self._known.get(storage._cdata) or self._enter(storage, made=made)
        entry.parameter |= isinstance(tensor, torch.nn.Parameter)
        if entry.made and tensor.device.type == "cpu":
            self._grow(entry, storage.nbytes())

    def pack(self, tensor: torch.Tensor) -> _Saved:
        storage = self._storage(tensor)
        if storage is None:
            return _Saved(tensor.detach(), None)
        entry = self._known.get(storage._cdata) or self._enter(storage, made=False)
        if entry.uses == 0:
            entry.saved_as = storage.nbytes()
            self._saves.append((entry, entry.saved_as))
        entry.uses += 1
        # Detached: a node that saves its own output would otherwise hold itself alive.
        return _Saved(tensor.detach(), lambda: self._release(entry))

    def peak_reading(self) -> Reading:
        return Reading(self.peak, "tensors made by the call and alive at once, CPU", tuple(sorted(self.missed)))

    def saved_reading(self) -> Reading:
        live = peak = 0
        for entry, change in self._saves:
            live += 0 if entry.parameter else change
            peak = max(peak, live)
        how = "kept for backward at any one time, storages once, parameters excluded"
        return Reading(peak, how, tuple(sorted(self.missed)))

    def _storage(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        if tensor.layout != torch.strided:
            self.missed.add(f"{str(tensor.layout).removeprefix('torch.')} tensors")
            return None
        return None if tensor.is_meta else tensor.untyped_storage()

    def _enter(self, storage: torch.UntypedStorage, *, made: bool) -> _Storage:
        entry = _Storage(made=made)
        key = storage._cdata
        self._known[key] = entry
        entry.reference = weakref.ref(storage, lambda _: self._forget(key))
        return entry

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key).nbytes

    def _grow(self, entry: _Storage, nbytes: int) -> None:
        self.live += nbytes - entry.nbytes
        entry.nbytes = nbytes
        self.peak = max(self.peak, self.live)

    def _release(self, entry: _Storage) -> None:
        entry.uses -= 1
        if entry.uses == 0:
            self._saves.append((entry, -entry.saved_as))


class _Saved:
    """What autograd holds in a saved tensor's place; its end is the end of the saving."""

    __slots__ = ("release", "tensor")

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None] | None) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operator's tensors to a ledger."""

    supports_higher_order_operators = True

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            return func(*args, **kwargs)
        out = take_apart(self, func, types, args, kwargs)
        if out is not NotImplemented:
            return out
        # torch.tensor(...) hands its fresh tensor over as an argument.
        fresh = func is torch.ops.aten.lift_fresh.default
        self._meet((args, kwargs), made=fresh)
        out = func(*args, **kwargs)
        self._meet(out, made=True)
        return out

    def _meet(self, tree: Any, *, made: bool) -> None:
        for leaf in tree_iter(tree):
            if isinstance(leaf, torch.Tensor):
                self._ledger.meet(leaf, made=made)


def _cuda_peak(fn: Call, cuda: Any) -> Reading:
    devices = range(cuda.device_count())
    for device in devices:
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
    start = [cuda.memory_allocated(device) for device in devices]
    fn()
    for device in devices:
        cuda.synchronize(device)
    peak = sum(cuda.max_memory_allocated(device) - start[device] for device in devices)
    return Reading(peak, "torch.cuda.max_memory_allocated above the start, summed over devices")
