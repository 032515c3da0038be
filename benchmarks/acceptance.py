"""The acceptance lines: what is claimed, what measures it, what its receipts say; for benchmarks/readme.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapt_tables as adapt
import attention_tables as attention
import represent_tables as represent
import zoom_tables as zoom
from scrimp.receipts import Receipt

HERE = Path(__file__).resolve().parent
UNWRITTEN = "-"


@dataclass(frozen=True)
class Line:
    """One acceptance line: its number and claim, what measures it, what it found, what was wanted.

    ``figure`` takes one receipt, or the list of them where they only say something ``together``.
    """

    number: str
    what: str
    script: str
    receipt: str
    figure: Callable[[Any], str]
    target: str
    together: bool = False

    @property
    def command(self) -> str:
        """What measures it; "-" while there is no such script."""
        return f"`python benchmarks/{self.script}`" if (HERE / self.script.split()[0]).is_file() else UNWRITTEN


def study_time(receipt: Receipt) -> str:
    seconds, cpu = receipt.cost.seconds.value, receipt.cost.cpu_seconds.value
    runs, cores = receipt.notes["runs"], receipt.notes["cores"]
    return f"{number(seconds, '.0f')} s wall, {number(cpu, '.0f')} s CPU, {cores} cores, {runs} runs"


def mean_gradient(receipt: Receipt) -> str:
    quality, notes = receipt.quality, receipt.notes
    return (
        f"{percent(quality['mean_gradient_error'])} with {notes['images a draw']:,} images a draw "
        f"(its noise: {percent(quality['mean_gradient_noise'])}; by uniform draws "
        f"{percent(quality['mean_gradient_noise_uniform'])}); with {notes['images a draw, one batch']} images a draw "
        f"{percent(quality['mean_gradient_error_one_batch'])} "
        f"(noise {percent(quality['mean_gradient_noise_one_batch'])})"
    )


def correlation(receipt: Receipt) -> str:
    seen, unseen = (receipt.quality[f"spearman_{part}_images"] for part in ("training", "test"))
    return f"{number(seen, '.3f')} on training images, {number(unseen, '.3f')} on test images"


def overhead(receipt: Receipt) -> str:
    own, ratios = receipt.notes["own work"], receipt.notes["ratios"]
    alone = ", ".join(
        f"{name} {percent(item['share'])} ({microseconds(item['cpu_seconds'])} a step)" for name, item in own.items()
    )
    spreads = {name: item["cpu_seconds"] for name, item in ratios.items()}
    whole = ", ".join(
        f"{name} {change(item['median'])} ({change(item['low'])} to {change(item['high'])})"
        for name, item in spreads.items()
    )
    pairs = next(iter(spreads.values()))["count"]
    return f"own work: {alone}; paired, median and quartiles of {pairs} pairs: {whole}"


def flop_error(receipt: Receipt) -> str:
    quality = receipt.quality
    return (
        f"forward {percent(quality['forward_error'], 3)}, with backward {percent(quality['training_error'], 3)} off; "
        f"torch's own counter {percent(1 - (quality['share_counted_by_torch'] or math.nan), 1)} short"
    )


LINES = (
    Line(
        "1",
        "`scrimp study` from nothing to table and report",
        "study_time.py",
        "study-time.json",
        study_time,
        "under 240 s wall on 2 cores",
    ),
    Line(
        "3",
        "mean of the weighted gradient over 2,000 draws, against the full batch's",
        "unbiased.py",
        "unbiased.json",
        mean_gradient,
        "within 1 %",
    ),
    Line(
        "3",
        "Spearman of the bound and exact per-sample gradient norms, trained network",
        "unbiased.py",
        "unbiased.json",
        correlation,
        "above 0.9",
    ),
    Line(
        "4",
        "CPU time that a policy with its gate shut adds",
        "overhead.py",
        "overhead.json",
        overhead,
        "under 1 %",
    ),
    Line(
        "4",
        "FLOP counter on ViT-Ti/16, CPU",
        "flop_counter.py",
        "flop-counter.json",
        flop_error,
        "within 0.1 %",
    ),
)
ATTENTION_LINES = (
    Line(
        "1",
        "causal linear attention, batch 1, 8 heads, dim 64",
        "attention_speed.py causal",
        "attention/causal.json",
        attention.causal,
        "at 16,384 tokens 4x (PyPI build), 2x (native build), 35x (SDPA); at 1,024 2x (SDPA); within 4x of the limit; "
        "memory at most 1.5x",
    ),
    Line(
        "2",
        "generation from the recurrent form against softmax with a key-value cache",
        "generation.py",
        "generation.json",
        attention.generation,
        "last tenth within 1.1x of the first; 20x images a second at 784 tokens, 60x at 3,072; 2x at batch 1; "
        "1,000x without a cache",
    ),
    Line(
        "3",
        "clustered attention, 100 clusters, top 32, batch 1, 8 heads, dim 64",
        "attention_speed.py clustered",
        "attention/clustered.json",
        attention.clustered,
        "above 1x forward from 2,048 tokens, with backward from 1,024; at 16,384 forward 12x SDPA and 1.8x the old "
        "library",
    ),
    Line(
        "4",
        "improved clustered attention in pretrained models, at least 1,024 tokens",
        "pretrained_attention.py run",
        "pretrained-attention/*.json",
        attention.pretrained,
        "99 % of the metric at half the attention FLOPs",
    ),
)
REPRESENT_LINES = (
    Line(
        "1",
        "a step of pretraining, counted: ResNet-18, 32 pixels",
        "represent_cost.py",
        "represent-cost.json",
        represent.cost,
        "mean shift at most 0.52x BYOL's FLOPs and 0.55x its saved activations; constrained at most 1.03x mean shift; "
        "search under 3 % of the step",
    ),
    Line(
        "2",
        "constrained mean shift beside SimSiam, BYOL, DINO and SimCLR of lightly 1.6",
        "representations.py run",
        "representations/*/*.json",
        represent.representations,
        "20-NN at least 2 points over the best of them at equal FLOPs, never under SimSiam at equal epochs",
        together=True,
    ),
    Line(
        "3",
        "regression onto a frozen teacher",
        "distillation.py run",
        "distillation/*/*.json",
        represent.distillation,
        "4-layer head at least 1 point 1-NN over a linear one and better than training on 1 % of the labels; cached "
        "features at most 0.6x the live FLOPs at no loss beyond 0.3 points; two teachers better than one",
        together=True,
    ),
    Line(
        "4",
        "pretraining with pseudo-labels beside training on the same few labels",
        "few_labels.py run",
        "few-labels/*.json",
        represent.few_labels,
        "at least 5 points of accuracy at 1 % and at 10 % of the labels",
        together=True,
    ),
    Line(
        "6",
        "nearest neighbours and linear probes beside scikit-learn's and lightly's, on the same features",
        "probe_agreement.py",
        "probe-agreement.json",
        represent.agreement,
        "within 0.1 point",
    ),
)
ADAPT_LINES = (
    Line(
        "1",
        "NOLA's best file of at most a tenth of LoRA r4's bytes, against LoRA r4",
        "adapters.py run",
        "adapters/*/*.json",
        adapt.beside_lora,
        "within 0.5 points, or 1 % of perplexity",
        together=True,
    ),
    Line(
        "1",
        "NOLA's numbers stored at 4 bits, against the same at 32",
        "adapters.py run",
        "adapters/*/*.json",
        adapt.rounding,
        "no measurable loss",
        together=True,
    ),
    Line(
        "1",
        "CPU time of a training step over LoRA r4's, in turns",
        "adapters.py step-time",
        "adapters/*/step-time/*.json",
        adapt.step_times,
        "at most 1.2x",
        together=True,
    ),
    Line(
        "2",
        "accuracy against bytes from 1 to 100 KB: NOLA's files beside others at least as large",
        "adapters.py run",
        "adapters/*/*.json",
        adapt.curve_above,
        "above every tuner of peft",
        together=True,
    ),
    Line(
        "4",
        "peak memory of training, bases made anew in every pass; switching among 1,000 adapters on a ViT-Ti",
        "adapter_memory.py",
        "adapter-memory.json",
        adapt.memory,
        "at most 1.05x LoRA's; under 5 ms, nothing lost",
    ),
)
ZOOM_LINES = (
    Line(
        "1",
        "Megapixel MNIST, 1,500 pixels, 10 patches of 50: accuracy at equal FLOPs, and what the whole image costs",
        "zoom_runs.py run",
        "zoom/*/*.json",
        zoom.megapixel,
        "error under 10 %, at most a third of 210 passes at chance, 3 seeds; at most 1/10 of the FLOPs and 1/5 of the "
        "peak memory of the whole image's network",
        together=True,
    ),
    Line(
        "2",
        "prediction on growing images from tiled files",
        "zoom_sizes.py",
        "zoom-sizes.json",
        zoom.sizes,
        "memory at most 1.1x, time at most 1.3x from 1,500 to 6,000 pixels",
    ),
    Line(
        "3",
        "road signs in photographs and solar modules: accuracy at equal FLOPs, patches on the object against chance",
        "zoom_runs.py run",
        "zoom/*/*.json",
        zoom.objects,
        "beside the whole image and attention pooling over all patches; above chance",
        together=True,
    ),
    Line(
        "4",
        "gradient of attention sampling towards the attention: 1,000 places, 10 draws without replacement",
        "attention_gradient.py",
        "attention-gradient.json",
        zoom.gradient,
        "bias at most 1e-9; variance at most 0.65x; cosine at least 0.999",
    ),
)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.0f} µs"


def change(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.2f} %"
