"""Fine-tuning with few numbers: a frozen model -> the same model with few trainable ones.

`attach_` puts a method on a model: `nola` (combinations of frozen random bases), `lora` (baseline), `bias`, `linear`,
`full`. `merge_`, `detach_` and `use_` are the ways back and across; `save_adapter`, `load_adapter_` keep adapters in
files of kilobytes, `to_lora` writes one that peft, diffusers and vLLM read. `scrimp.adapt.peft_bridge` makes nola a
method of peft.
"""

from scrimp.adapt.attach import adapters, attach_, detach_, merge_, use_
from scrimp.adapt.basis import basis
from scrimp.adapt.combine import independent, orthogonal
from scrimp.adapt.export import to_lora
from scrimp.adapt.file import load_adapter_, save_adapter
from scrimp.adapt.lora import lora
from scrimp.adapt.methods import bias, full, linear
from scrimp.adapt.nola import nola
from scrimp.adapt.size import lora_of, lora_of_bytes, nola_of, nola_of_bytes

__all__ = [
    "adapters",
    "attach_",
    "basis",
    "bias",
    "detach_",
    "full",
    "independent",
    "linear",
    "load_adapter_",
    "lora",
    "lora_of",
    "lora_of_bytes",
    "merge_",
    "nola",
    "nola_of",
    "nola_of_bytes",
    "orthogonal",
    "save_adapter",
    "to_lora",
    "use_",
]
