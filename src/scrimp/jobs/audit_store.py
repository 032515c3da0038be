"""Trials of an audit on disk: kept as they finish, so that an interrupted audit goes on to the same report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from scrimp.attack import Case, Patch, Perturbation, Trial
from scrimp.jobs.audit_pictures import patch_picture
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic, write_json
from scrimp.primitives.weights import pack_weights

TRIALS, ATTACKS = "trials", "attacks"
"""Folders of a run: records and receipts of its trials, and what the attacks made."""
_RECORD = "trial.json"


@dataclass(frozen=True, eq=False)
class Store:
    """The trials in a run folder.

    Attributes:
        folder: of the run.
        images: the audited ones, on the 256 levels: perturbations of single images are kept as levels beside them.
        resume: whether finished trials are read back.
    """

    folder: Path
    images: Tensor
    resume: bool

    def remember(self, name: str, make: Callable[[], Trial]) -> Trial:
        """See `scrimp.attack.audit`; the record comes last, so a trial without one is made again."""
        file = self.home(name) / _RECORD
        if self.resume and file.is_file():
            return self._read(name, file)
        trial = make()
        if trial.attack is not None:
            tensor = self._tensor(trial.attack, trial.over)
            write_atomic(self._tensors(name), pack_weights({"attack": tensor.cpu()}, {"trial": name}))
            picture = _picture(trial.attack)
            if picture is not None:
                write_atomic(self._tensors(name).with_suffix(".png"), picture)
        write_json(file, _record(trial))
        return trial

    def home(self, name: str) -> Path:
        """The folder of a trial's record and receipt."""
        return self.folder / TRIALS / slug(name)

    def file(self, name: str) -> str | None:
        """A trial's attack, as seen from the run folder: a picture where there is one, else tensors."""
        file = self._tensors(name)
        found = next((path for path in (file.with_suffix(".png"), file) if path.is_file()), None)
        return None if found is None else f"{ATTACKS}/{found.name}"

    def _tensors(self, name: str) -> Path:
        return self.folder / ATTACKS / f"{slug(name)}.safetensors"

    def _read(self, name: str, file: Path) -> Trial:
        try:
            record = json.loads(file.read_bytes())
            case = {**record["case"], "place": record["case"]["place"] and tuple(record["case"]["place"])}
            attack = record["attack"]
            made = None if attack is None else self._attack(name, attack)
            right, same = (
                None if record[key] is None else torch.tensor(record[key]).bool() for key in ("right", "same")
            )
            costs = torch.tensor(record["costs"], dtype=torch.int64)
            return Trial(Case(**case), costs, right, same, made, record["spent"], record["queries"], record["over"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            got = f"{file.parent.name}/{file.name} ({str(error).splitlines()[0]})"
            raise InputError("a whole record of a trial", got, "remove its folder and resume") from error

    def _attack(self, name: str, about: dict[str, Any]) -> Patch | Perturbation:
        tensor = load(self._tensors(name).read_bytes())["attack"].to(self.images.device)
        if about["kind"] == "patch":
            place = about["place"] and (about["place"][0], about["place"][1])
            return Patch(tensor, place, tuple(about["trace"]))
        return Perturbation(tensor if tensor.is_floating_point() else tensor.to(self.images) / 255, about["epsilon"])

    def _tensor(self, attack: Patch | Perturbation, over: int | None) -> Tensor:
        if isinstance(attack, Patch):
            return attack.pixels
        if len(attack.deltas) != over:
            return attack.deltas
        own = self.images[:over]
        return ((attack.on(own) - own) * 255).round().to(torch.int16)


def slug(name: str) -> str:
    """A trial's name as files have it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _record(trial: Trial) -> dict[str, Any]:
    attack: dict[str, Any] | None = None
    if isinstance(trial.attack, Patch):
        attack = {"kind": "patch", "place": trial.attack.place, "trace": _finite(trial.attack.trace)}
    elif trial.attack is not None:
        attack = {"kind": "perturbation", "epsilon": trial.attack.epsilon}
    return {
        "case": asdict(trial.case),
        "costs": trial.costs.tolist(),
        "right": None if trial.right is None else trial.right.tolist(),
        "same": None if trial.same is None else trial.same.tolist(),
        "spent": trial.spent,
        "queries": trial.queries,
        "over": trial.over,
        "attack": attack,
    }


def _finite(trace: tuple[float, ...]) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in trace]


def _picture(attack: Patch | Perturbation) -> bytes | None:
    """Of a patch, or of the one perturbation that all images share: grey where it changes nothing."""
    pixels = attack.pixels if isinstance(attack, Patch) else None
    if isinstance(attack, Perturbation) and len(attack.deltas) == 1:
        pixels = 0.5 + attack.deltas[0] / (2 * attack.epsilon)
    return None if pixels is None or len(pixels) not in (1, 3) else patch_picture(pixels)
