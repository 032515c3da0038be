"""The old library, in one or two builds side by side: pytorch-fast-transformers 0.4.0, wherever it was built.

pip download --no-deps --no-build-isolation --no-binary :all: pytorch-fast-transformers==0.4.0
tar xzf pytorch-fast-transformers-0.4.0.tar.gz
# without nvcc on PATH; needs torch, setuptools and wheel installed
pip install --no-deps --no-build-isolation --target peer/pypi ./pytorch-fast-transformers-0.4.0
rm -rf pytorch-fast-transformers-0.4.0/build
CFLAGS=-march=native pip install --no-deps --no-build-isolation --target peer/native ./pytorch-fast-transformers-0.4.0
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from scrimp.primitives.errors import InputError

PACKAGE = "fast_transformers"
MODULES = ("attention", "attention.clustered_attention", "attention.improved_clustered_attention", "masking")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One build of the old library: its attentions, on tensors [batch, tokens, heads, dim]."""

    modules: dict[str, ModuleType]

    def causal_linear(self, *, tokens: int, dim: int) -> Attention:
        layer = self.modules["attention"].CausalLinearAttention(dim)
        return self._call(layer, self.modules["masking"].TriangularCausalMask(tokens), tokens)

    def clustered(self, *, tokens: int, clusters: int) -> Attention:
        layer = self.modules["attention.clustered_attention"].ClusteredAttention(
            clusters, iterations=10, bits=63, attention_dropout=0.0
        )
        return self._call(layer, self.modules["masking"].FullMask(tokens), tokens)

    def improved_clustered(self, *, tokens: int, clusters: int, topk: int) -> Attention:
        layer = self.modules["attention.improved_clustered_attention"].ImprovedClusteredAttention(
            clusters, iterations=10, bits=63, topk=topk, attention_dropout=0.0
        )
        return self._call(layer, self.modules["masking"].FullMask(tokens), tokens)

    def _call(self, layer: Any, mask: Any, tokens: int) -> Attention:
        import torch

        lengths = self.modules["masking"].LengthMask(torch.tensor([tokens]))
        return lambda query, key, value: layer(query, key, value, mask, lengths, lengths)


def load_peer(folder: Path) -> Peer:
    """The build that was installed to ``folder``; several can be loaded, each keeps its own modules.

    Raises:
        InputError: there is none.
    """
    if not (folder / PACKAGE).is_dir():
        raise InputError(f"a build of pytorch-fast-transformers in {folder}", "none", "see benchmarks/peers.py")
    _forget()
    sys.path.insert(0, str(folder))
    try:
        return Peer({name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(folder))
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
