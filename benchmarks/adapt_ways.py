"""Ways of adapting a frozen model, for the adapter benchmark: peft's tuners, scrimp's NOLA, and what is usual."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapt_tasks import Batch, Task, bfloat16
from pretrained.fetch import needed

BASELINE = "lora-4"
HEAD_RATE = 3e-3
WARM_UP = 0.1  # of the steps
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Way:
    """One way at one size.

    Attributes:
        about: in the table.
        attach: (model, task, seed) -> what ``store`` is given; afterwards the adapter's numbers, and they alone beside
            the head, require a gradient.
        store: (what ``attach`` gave, folder) -> the one file that the way's own tool writes into that folder.
        rates: learning rate of the adapter by task, chosen on held-out data; the task it does not name it cannot do.
        of: the way whose training this one stores in another form.
        reload: where the stored form is not exact: (fresh model, task, file) puts it back, to be judged again.
        settings: for the receipt.
    """

    about: str
    attach: Callable[[nn.Module, Task, int], Any]
    store: Callable[[Any, Path], Path | None]
    rates: Rates
    of: str | None = None
    reload: Callable[[nn.Module, Task, Path], Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def peft_way(about: str, kind: str, rates: Rates, **settings: Any) -> Way:
    """A tuner of peft, all its settings but those given at their defaults."""

    def attach(model: nn.Module, task: Task, seed: int) -> Any:
        peft = needed("peft", "peft")
        named = {**settings, "target_modules": task.targets}
        if kind == "IA3Config":
            named["feedforward_modules"] = task.feedforward
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, getattr(peft, kind)(**named))

    return Way(about, attach, saved_by_peft, rates, settings={"peft": kind, **settings})


def saved_by_peft(model: Any, folder: Path, **changed: Any) -> Path:
    """What ``save_pretrained`` writes, with these settings changed for the while."""
    config = model.peft_config["default"]
    before = {name: getattr(config, name) for name in changed}
    set_all(config, changed)
    # RandLoRA looks at its setting when it is built only: its bases are buffers that are saved or not.
    bases = [module for name, module in model.named_modules() if name.endswith(("randlora_A", "randlora_B"))]
    unsaved = [module._non_persistent_buffers_set for module in bases]
    try:
        if changed.get("save_projection") is False:
            for module in bases:
                module._non_persistent_buffers_set = set(module._buffers)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        set_all(config, before)
        for module, names in zip(bases, unsaved, strict=True):
            module._non_persistent_buffers_set = names
    return folder / "adapter_model.safetensors"


def set_all(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def smaller(of: str, way: Way, **changed: Any) -> Way:
    """The same training in the smallest file that peft offers."""
    said = ", ".join(f"{name}={value}" for name, value in changed.items())

    def store(model: Any, folder: Path) -> Path:
        return saved_by_peft(model, folder, **changed)

    return replace(way, about=f"{way.about}, {said}", store=store, of=of, settings={**way.settings, **changed})


def nola_way(bases: int, rates: Rates, *, rank: int = 4, bits: int | None = None, **settings: Any) -> Way:
    """scrimp's NOLA with ``bases`` numbers a factor; with ``bits`` trained at that precision."""

    def attach(model: nn.Module, task: Task, seed: int) -> Any:
        from scrimp import adapt

        method = adapt.nola(rank, bases, seed, bits=bits, **settings)
        adapt.attach_(model, method, where=f"^{task.targets}$")
        return model

    trained = "" if bits is None else f", trained at {bits} bits"
    chosen = {"rank": rank, "bases": bases, "bits": bits, **settings}
    about = f"NOLA, {bases} bases for {'all matrices' if settings.get('shared') else 'a factor'}{trained}"
    return Way(about, attach, saved_by_scrimp(bits), rates, settings=chosen)


def saved_by_scrimp(bits: int | None) -> Callable[[Any, Path], Path]:
    def store(model: Any, folder: Path) -> Path:
        from scrimp import adapt

        path = folder / "adapter.safetensors"
        adapt.save_adapter(model, path, bits=bits)
        return path

    return store


def rounded(of: str, way: Way, bits: int) -> Way:
    """The same training with its coefficients rounded to ``bits`` when stored."""

    def reload(model: nn.Module, task: Task, path: Path) -> None:
        from scrimp import adapt

        adapt.load_adapter_(model, path)

    about, settings = f"{way.about}, stored at {bits} bits", {**way.settings, "stored bits": bits}
    return replace(way, about=about, store=saved_by_scrimp(bits), of=of, reload=reload, settings=settings)


def own_parameters(about: str, wanted: Callable[[str], bool], rates: Rates) -> Way:
    """Some of the model's own parameters trained, and stored as they are."""

    def chosen(model: nn.Module, task: Task) -> dict[str, nn.Parameter]:
        head = f"{task.head}."
        return {name: value for name, value in model.named_parameters() if wanted(name) and not name.startswith(head)}

    def attach(model: nn.Module, task: Task, seed: int) -> Any:
        found = chosen(model, task)
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    return Way(about, attach, stored_tensors, rates)


def stored_tensors(found: Mapping[str, torch.Tensor], folder: Path) -> Path | None:
    """One safetensors file; none where there is nothing to store."""
    if not found:
        return None
    from safetensors.torch import save_file

    path = folder / "weights.safetensors"
    save_file({name: value.detach().contiguous() for name, value in found.items()}, path)
    return path


def trained(model: nn.Module, head: str | None) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters that require a gradient: the adapter's, and the head's."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    mine = {name: value for name, value in found.items() if head is not None and name.startswith(f"{head}.")}
    return {name: value for name, value in found.items() if name not in mine}, mine


class Training:
    """One way on one task: the model, and its optimiser with the schedule.

    Args:
        rate: of the adapter; the head has `HEAD_RATE`.
    """

    def __init__(self, task: Task, way: Way, *, seed: int, rate: float) -> None:
        self.task, self.model = task, task.fresh(seed)
        self.model.requires_grad_(False)
        self.handle = way.attach(self.model, task, seed)
        if task.head is not None:
            self.model.get_submodule(task.head).requires_grad_(True)
        self.adapter, self.head = trained(self.model, task.head)
        groups = [
            {"params": list(some.values()), "lr": at}
            for some, at in ((self.adapter, rate), (self.head, HEAD_RATE))
            if some
        ]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
        if self.optimiser is not None:
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._share)
        self.model.train()

    def step(self, batch: Batch) -> float:
        """One step; the loss in nats."""
        assert self.optimiser is not None
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.forward(batch)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return float(loss.detach())

    def forward(self, batch: Batch) -> torch.Tensor:
        with bfloat16():
            return self.task.loss(self.model, batch)

    def run(self, seed: int) -> float | None:
        """Every step there is; the mean loss of the last tenth, ``None`` where nothing is trained."""
        if self.optimiser is None:
            return None
        with torch.random.fork_rng([]):  # some of peft's tuners draw in their forward pass
            torch.manual_seed(seed)
            losses = [self.step(batch) for batch in self.task.batches(seed)]
        return statistics.fmean(losses[-max(1, len(losses) // 10) :])

    def numbers(self) -> int:
        return sum(value.numel() for value in self.adapter.values())

    def _share(self, step: int) -> float:
        warm = max(1, round(WARM_UP * self.task.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm) / (self.task.steps - warm)))


LIKE = {
    "nola-16": "nola-64",
    "nola-64-trained-4bit": "nola-64",
    "nola-shared-64": "nola-shared-512",
    "unilora-1024": "unilora-256",
    "unilora-16384": "unilora-4096",
}
"""Whose rate a way takes that has not been tuned itself."""


# What `adapters.py tune` finds best of rates a factor of 3 apart, on held-out data and a seed that no figure is of, for
# the ways with receipts under TASK/rates; other ways' are starting points, to be tuned before they are run. Solar cells
# take CIFAR-10's.
def at(vision: float, text: float | None) -> Rates:
    return {"cifar10": vision, "elpv": vision} | ({} if text is None else {"shakespeare": text})


def table() -> dict[str, Way]:
    """All ways by name, in the order of the table; those with ``of`` right after the training they share."""
    ways = {**plain_ways(), **peft_ways(), **nola_ways()}
    order = list(ways)
    return {name: ways[name] for name in sorted(order, key=lambda name: order.index(ways[name].of or name))}


def plain_ways() -> dict[str, Way]:
    return {
        "full": own_parameters("every weight", lambda name: True, at(1e-4, 1e-4)),
        "linear": own_parameters("the head alone", lambda name: False, at(0.0, 0.0)),
        "bias": own_parameters("biases", lambda name: name.endswith("bias"), at(3e-3, None)),
    }


def peft_ways() -> dict[str, Way]:
    ways = {
        "lora-4": peft_way("LoRA, rank 4", "LoraConfig", at(3e-3, 3e-3), r=4, lora_alpha=4),
        "lora-1": peft_way("LoRA, rank 1", "LoraConfig", at(3e-3, 3e-3), r=1, lora_alpha=1),
        "vera": peft_way("VeRA, rank 64", "VeraConfig", at(1e-2, 1e-2), r=64),
        "randlora": peft_way("RandLoRA, rank 32", "RandLoraConfig", at(1e-3, 1e-3), r=32),
        "vblora": peft_way("VB-LoRA", "VBLoRAConfig", at(1e-2, 1e-2), r=4, num_vectors=90, vector_length=64),
        "tinylora": peft_way("TinyLoRA, 64 a matrix", "TinyLoraConfig", at(1e-2, 1e-2), u=64),
        "lokr": peft_way("LoKr, rank 4", "LoKrConfig", at(3e-3, 3e-3), r=4, alpha=4),
        "ia3": peft_way("IA3", "IA3Config", at(1e-2, 1e-2)),
        "fourierft": peft_way("FourierFT, 128 a matrix", "FourierFTConfig", at(1e-2, 1e-2), n_frequency=128),
    }
    for length, rate in ((256, 9e-2), (1024, 9e-2), (4096, 3e-2), (16384, 3e-2)):
        said = f"UniLoRA, {length:,} in all"
        ways[f"unilora-{length}"] = peft_way(said, "UniLoraConfig", at(rate, 3e-2), r=4, theta_d_length=length)
    for name in ("vera", "randlora", "tinylora"):
        ways[f"{name}-small"] = smaller(name, ways[name], save_projection=False)
    ways["vblora-small"] = smaller("vblora", ways["vblora"], save_only_topk_weights=True)
    return ways


NOLA_LINE = ("nola-shared-64", "nola-shared-512", "nola-16", "nola-64", "nola-256", "nola-1024")
"""From small to large: a picture's line."""


def nola_ways() -> dict[str, Way]:
    ways = {
        "nola-shared-64": nola_way(64, at(3e-3, 1e-2), shared=True),
        "nola-shared-512": nola_way(512, at(3e-3, 1e-2), shared=True),
        "nola-16": nola_way(16, at(3e-3, 1e-2)),
        "nola-64": nola_way(64, at(3e-3, 1e-2)),
        "nola-256": nola_way(256, at(3e-3, 1e-2)),
        "nola-1024": nola_way(1024, at(3e-3, 3e-3)),
        "nola-64-trained-4bit": nola_way(64, at(3e-3, 1e-2), bits=4),
    }
    for name in NOLA_LINE:
        for bits in (8, 4, 3, 2) if name in ("nola-64", "nola-1024") else (4, 2):
            ways[f"{name}-{bits}bit"] = rounded(name, ways[name], bits)
    return ways


WAYS = table()
