"""Token merging in the self-attention of diffusers' denoisers (Bolya and Hoffman 2023, arXiv:2303.17604).

Before a self-attention the tokens most like another one are merged into it (their mean), and after it they get its
answer. One token of each 2 x 2 window is a destination, the others look for theirs among all destinations by cosine
similarity, and of these the most similar ones are merged.

The match costs about 0.2 N^2 C multiply-adds for N tokens of C channels, attention 2 N^2 C and its projections 4 N C^2:
of some use from about a thousand tokens on, of none at a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.denoise.around import Around, owners
from scrimp.primitives.errors import InputError, require

OWNER = "token merging"
MOST = 0.75


def merge_tokens(
    model: nn.Module, share: float, *, least: int = 16, generator: torch.Generator | None = None
) -> Merging:
    """Merges a share of the tokens before each self-attention of a denoiser, and parts them after it.

    Attach it before `reuse`, which may leave whole attentions out.

    Args:
        model: a diffusers model with self-attention of class ``Attention``: UNet2DModel, UNet2DConditionModel, DiT,
            PixArt. Its weights stay as they are.
        share: of the tokens, from 0 (nothing changes, bit for bit) to 0.75.
        least: attentions over fewer tokens are left as they are.
        generator: draws which token of a window is the destination, anew at each call; None: the first one always.

    Returns:
        The attached merging, also a context manager.

    Raises:
        InputError: a share out of range, or no self-attention that merging could be right for. Attention under a mask
            or with rotary positions is found out when the model is called.
    """
    if not 0 <= share <= MOST:
        raise InputError(f"a share from 0 to {MOST}", repr(share), "0.5 merges every second token")
    kind = require("diffusers.models.attention_processor", "diffusers").Attention
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    refused = {name: why for name, module in attentions if (why := _why_not(module))}
    chosen = [module for name, module in attentions if name not in refused]
    if not chosen:
        reasons = ", ".join(sorted(set(refused.values()))) or "no diffusers Attention module at all"
        raise InputError(
            "a model with softmax self-attention over image tokens alone (diffusers' Attention)",
            f"{type(model).__name__} with {reasons}",
            "run this model without merging",
        )
    taken = sorted({owner for module in chosen for owner in owners(module)})
    if taken:
        raise InputError("attentions that nothing is around yet", ", ".join(taken), "attach token merging first")
    return Merging(chosen, share, least=least, generator=generator)


class Merging:
    """Token merging attached to a model by `merge_tokens`.

    Attributes:
        tokens: of the last call of each attention that merged, by its place: (before, after) merging.
    """

    def __init__(
        self, attentions: list[nn.Module], share: float, *, least: int, generator: torch.Generator | None
    ) -> None:
        self.tokens: dict[int, tuple[int, int]] = {}
        self._share, self._least, self._generator = share, least, generator
        self._around = Around(OWNER)
        for place, attention in enumerate(attentions):
            self._around.put(attention, self._through(attention, place))

    def remove(self) -> None:
        """Gives the model its own calls back. Further removals do nothing.

        Raises:
            InputError: something attached later is still there.
        """
        self._around.remove()

    def __enter__(self) -> Merging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _through(self, attention: Any, place: int) -> Callable[..., Any]:
        def call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            text = others.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
            count = tokens.shape[1]
            merged = math.floor(self._share * count)
            if text is not None or count < self._least or not merged:
                return own(*args, **kwargs)
            _check(others, args)
            match = Match(tokens, merged, size=_size(hidden), generator=self._generator)
            self.tokens[place] = (count, count - match.merged)
            few = match.merge(tokens)
            answer = own(few, *args[1:], **others)
            if not attention.residual_connection:
                return (
                    match.part(answer).reshape(hidden.shape) if hidden.ndim == 3 else _image(match.part(answer), hidden)
                )
            # The residual was that of merged tokens; each token keeps its own.
            factor = attention.rescale_output_factor
            whole = (tokens + match.part(answer * factor - few)) / factor
            return whole if hidden.ndim == 3 else _image(whole, hidden)

        return call


class Match:
    """Which tokens are merged into which.

    Args:
        tokens: [batch, tokens, channels], to be matched.
        merged: how many to merge; at most those that are no destinations.
        size: (height, width) of the tokens' grid; windows are of 4 tokens in a row where a side is odd.
        generator: as for `merge_tokens`.
    """

    def __init__(
        self, tokens: Tensor, merged: int, *, size: tuple[int, int], generator: torch.Generator | None = None
    ) -> None:
        ends = _destinations(size, generator).to(tokens.device)
        starts = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        starts[ends] = False
        self._ends, self._starts = ends, starts.nonzero().flatten()
        self.merged = min(merged, len(self._starts))
        unit = nn.functional.normalize(tokens.float(), dim=-1)
        nearness, nearest = (unit[:, self._starts] @ unit[:, self._ends].transpose(1, 2)).max(-1)
        order = nearness.argsort(dim=-1, descending=True, stable=True)
        self._gone, self._kept = order[:, : self.merged], order[:, self.merged :]
        self._into = nearest.gather(1, self._gone)
        self._count = tokens.shape[1]

    def merge(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, channels] to [batch, tokens - merged, channels]: those kept, then the destinations."""
        starts, ends = tokens[:, self._starts], tokens[:, self._ends]
        kept, gone = starts.gather(1, _wide(self._kept, tokens)), starts.gather(1, _wide(self._gone, tokens))
        # The mean of a destination and all that are merged into it.
        ends = ends.scatter_reduce(1, _wide(self._into, tokens), gone, "mean", include_self=True)
        return torch.cat([kept, ends], 1)

    def part(self, few: Tensor) -> Tensor:
        """[batch, tokens - merged, channels] to [batch, tokens, channels]: merged tokens get their destination's."""
        kept, ends = few[:, : self._kept.shape[1]], few[:, self._kept.shape[1] :]
        whole = few.new_empty(len(few), self._count, few.shape[2])
        whole[:, self._ends] = ends
        whole.scatter_(1, _wide(self._starts[self._kept], few), kept)
        gone = ends.gather(1, _wide(self._into, few))
        return whole.scatter_(1, _wide(self._starts[self._gone], few), gone)


def _destinations(size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    height, width = size
    grid = torch.arange(height * width)
    if height % 2 or width % 2:
        windows = grid[: len(grid) // 4 * 4].view(-1, 4)
    else:
        windows = grid.view(height // 2, 2, width // 2, 2).transpose(1, 2).reshape(-1, 4)
    if generator is None:
        return windows[:, 0]
    where = torch.randint(4, (len(windows), 1), generator=generator, device=generator.device).cpu()
    return windows.gather(1, where).flatten()


def _size(hidden: Tensor) -> tuple[int, int]:
    if hidden.ndim == 4:
        return hidden.shape[2], hidden.shape[3]
    side = math.isqrt(hidden.shape[1])
    return (side, side) if side * side == hidden.shape[1] else (1, hidden.shape[1])


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, like.shape[2])


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


def _why_not(attention: Any) -> str | None:
    """Why an attention module is never merged; None: it is."""
    if attention.is_cross_attention:
        return "attention to text"
    if getattr(attention, "added_kv_proj_dim", None) is not None:
        return "joint attention of image and text"
    if "Linear" in type(attention.processor).__name__:
        return "linear attention, which merging does not make cheaper"
    # Its map of means and scales has a place for every token.
    return "a spatial norm" if getattr(attention, "spatial_norm", None) is not None else None


def _check(others: dict[str, Any], args: tuple[Any, ...]) -> None:
    if others.get("attention_mask") is not None or (len(args) > 2 and args[2] is not None):
        raise InputError("self-attention without a mask", "a mask", "run this model without merging")
    if others.get("image_rotary_emb") is not None:
        raise InputError(
            "self-attention without rotary positions", "image_rotary_emb", "run this model without merging"
        )
