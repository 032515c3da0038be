"""What a person can ask of `scrimp distill`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scrimp.jobs.pretrain_config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(EncoderConfig):
    """Teach a small network what frozen large ones see, without labels: its weights, the receipt, a report."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders (any folder with --unlabelled), or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    teacher: tuple[str, ...] = ()
    """Teachers: run folders, .safetensors files, folders of transformers models, timm names. Several teach at once."""
    teacher_pretrained: bool = False
    """Take timm's pretrained weights for teachers that are timm names."""
    teacher_model: str | None = None
    """Architecture of teachers' weights files that do not say it."""
    model: Annotated[str | None, tyro.conf.arg(aliases=("--student", "--arch"))] = None
    """The student: `small-resnet18[-WIDTH]` or `small-vit[-WIDTH]` (for images of 28 to 64 pixels), `convnet[-WIDTH]`
    or any timm model name; by default small-resnet18-16, or resnet18 for images above 64 pixels."""
    method: Literal["regression", "logits", "scratch"] = "regression"
    """regression: onto the teachers' features. logits: onto those of a linear classifier on them. scratch: the student
    alone, trained on labels."""
    head_layers: int = 4
    """regression: linear layers of the throw-away head between student and teacher; 1 is a linear map, 0 none."""
    labelled: float = 1.0
    """logits, scratch: share of the training images whose label may be used."""
    temperature: float = 4.0
    """logits: of the softmax on either side."""
    view: Literal["weak", "strong"] = "weak"
    """The one view that teacher and student see: crop and mirror, for strong also colour, grey and blur."""
    cache: Literal["disk", "ram", "none"] = "disk"
    """Where the teachers' features of a few views of every image are kept. none: a new view and a forward pass of the
    teachers for every step."""
    cache_views: int = 4
    """Views of every image that are kept, used in turn, one a pass; never more than the run has passes."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Type of the numbers kept."""
    cache_folder: Path | None = None
    """Folder of features on disk that several runs use, one at a time until they are finished; by default the run's
    own, deleted at its end."""

    def ranges(self) -> dict[str, tuple[bool, str]]:
        return super().ranges() | {
            "head_layers": (self.head_layers >= 0, "at least 0"),
            "labelled": (0 < self.labelled <= 1, "in (0, 1]"),
            "temperature": (self.temperature > 0, "above 0"),
            "cache_views": (self.cache_views >= 1, "at least 1"),
            "cache_folder": (self.cache_folder is None or self.cache == "disk", "with --cache disk"),
            "unlabelled": (not self.unlabelled or not self.uses_labels, "with --method regression"),
        }

    @property
    def uses_labels(self) -> bool:
        """Whether any label goes into the training."""
        return self.method != "regression"
