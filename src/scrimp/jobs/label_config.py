"""What a person can ask of `scrimp label`. Loads no torch, as all configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Name = Literal[
    "random",
    "centres",
    "multi-round",
    "k-centre",
    "typicality",
    "coverage",
    "herding",
    "margin",
    "entropy",
    "badge",
    "coefficients",
    "determinants",
]
First = Literal["random", "centres", "k-centre", "typicality", "coverage", "herding"]
PIXELS = "pixels"
"""Instead of an encoder: the images themselves, shrunk."""
OWN = "data"
"""The oracle that knows the data set's own labels."""
KEYS = "1234567890abcdefghijklmnopqrtvwxyz"
"""Keys of the classes in their order; s skips and u takes back."""
MOST_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class LabelConfig(JobConfig):
    """Choose the images whose labels teach most, and ask for these: on a local web page, or an oracle.

    Round by round: features of all images (once), a few images chosen, their labels asked for, a linear classifier
    fitted, its accuracy estimated. Leaves labels.csv, a receipt and a report.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, in class folders or not (then with --classes), or builtin, fashion-mnist, mnist, cifar10,
    cifar100."""
    budget: int = 100
    """Labels to spend."""
    encoder: str = PIXELS
    """What sees the images: weights (.safetensors) or run folder of an encoder or a classifier, a timm model name (with
    --pretrained), the folder of a transformers vision model; or pixels, the images themselves shrunk to 16 x 16."""
    model: str | None = None
    """Architecture of weights that do not name it."""
    pretrained: bool = False
    """Load timm's pretrained weights."""
    classes: tuple[str, ...] = ()
    """Names of the classes. The images are then taken as unlabelled, whatever folders they are in."""
    oracle: str | None = None
    """Who gives the labels: data (the data set's own), a folder of class folders, or a CSV with the columns image and
    label. By default a person, on a local web page."""
    strategy: Name = "margin"
    """How images are chosen: by clusters and density (centres, multi-round, typicality, coverage, herding), by
    distance (k-centre), by the classifier's doubt (margin, entropy), by gradients of the head (badge) or of a NOLA
    head's coefficients (coefficients, determinants), or at random."""
    first: First = "centres"
    """Strategy of the first rounds, where --strategy asks a classifier and there are few labels."""
    until: int | None = None
    """Labels from which the classifier is asked; by default ten a class."""
    balance: bool = False
    """Spread the choices evenly over the predicted classes."""
    batch: int | None = None
    """Labels between two fits; by default a tenth of the budget."""
    audit: float | None = None
    """Share of the labels that is drawn at random, on which alone accuracy is estimated, each image by a classifier
    that has not seen it; by default 0.2, and 0 where test images with labels are there."""
    stop: float | None = None
    """Stop before the budget once at most this accuracy (0.01: one point) is left to be gained by labelling all."""
    l2: float = 1.0
    """Penalty of the linear classifier (scikit-learn's 1 / C)."""
    size: int | None = None
    """Side of the images in pixels; by default what the encoder was made for."""
    batch_size: int = 256
    """Images a forward pass."""
    cache_folder: Path | None = None
    """Where features are kept for later runs; by default in the run folder."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    seeds: int = 1
    """With an oracle: repetitions, counted up from --seed."""
    beside: Literal["random", "none"] = "random"
    """With an oracle and test images: also label at random, for the curve beside it."""
    ceiling: bool = True
    """With them: also fit on all labels, to say what share of that accuracy the few reach."""
    export_folders: Literal["none", "copy", "symlink"] = "none"
    """Also leave the labelled images in class folders, as copies or as links to the originals."""
    port: int = 0
    """Port of the page on 127.0.0.1; 0 takes a free one."""
    browser: bool = False
    """Open the page in the default browser."""
    lease_seconds: float = 60.0
    """How long an image waits for the annotator it was given to, before another may get it."""

    def check(self) -> None:
        """Refuse numbers and names that no run can mean.

        Raises:
            InputError: says which.
        """
        for name, (holds, wanted) in self._ranges().items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        check_classes(self.classes)
        if self.oracle is None and self.seeds > 1:
            raise InputError("an oracle for several seeds", "none", "pass --oracle, or leave --seeds out")
        if self.encoder == PIXELS and (self.pretrained or self.model):
            raise InputError("an encoder for --pretrained and --model", PIXELS, "name it by --encoder")
        if self.oracle == OWN and self.classes:
            raise InputError("--classes or --oracle data", "both", "leave one out: the data names its own classes")
        if self.json and self.browser:
            raise InputError("--json or --browser", "both", "leave one out")

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        least_one = ("budget", "until", "batch", "size", "batch_size", "seeds")
        return {
            **{name: (getattr(self, name) is None or getattr(self, name) >= 1, "at least 1") for name in least_one},
            "audit": (self.audit is None or 0 <= self.audit < 1, "in [0, 1)"),
            "stop": (self.stop is None or 0 < self.stop < 1, "between 0 and 1"),
            "l2": (0 < self.l2 < float("inf"), "above 0"),
            "port": (0 <= self.port < 65536, "from 0 to 65535"),
            "lease_seconds": (1 <= self.lease_seconds <= 86400, "from 1 to 86400"),
            "strategy": (self.strategy in get_args(Name), f"of {', '.join(get_args(Name))}"),
            "first": (self.first in get_args(First), f"of {', '.join(get_args(First))}"),
        }


def check_classes(classes: tuple[str, ...]) -> None:
    """Refuse names of classes that could not be told apart, or be read back.

    Raises:
        InputError: one of them, by name.
    """
    if not classes:
        return
    remedy = "correct --classes"
    if len(classes) < 2 or len(classes) > MOST_CLASSES:
        raise InputError(f"2 to {MOST_CLASSES} classes", f"{len(classes)}", remedy)
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise InputError("classes of different names", f"{twice!r} twice", remedy)
    for name in classes:
        if not name or name != name.strip() or not name.isprintable():
            raise InputError("printable names of classes", repr(name), remedy)
