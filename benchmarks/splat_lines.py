"""The acceptance lines of splats, for benchmarks/readme.py."""

from __future__ import annotations

import splat_tables as splat
import splat_training_tables as training
from acceptance import Line
from splat_raster_peers import tables as raster

SPLAT_LINES = (
    Line(
        "1",
        "fox60k: loss on photographs held out, against bytes",
        "splat_rate.py run",
        "splats/*/*.json",
        splat.held_out,
        ".sog at most 0.85 MB at -0.15 dB, .sgs at most 0.60 MB at -0.20 dB; CompGS' arithmetic beaten 2x in bytes and "
        "in loss",
        together=True,
    ),
    Line(
        "1",
        "bytes of .sgs at the PSNR of other programs",
        "splat_rate.py run",
        "splats/*/*.json",
        splat.beside_peers,
        "biker and guitar: at most 0.8x the best peer's at its PSNR, 0.6x at 45 dB",
        together=True,
    ),
    Line(
        "2",
        "encoding, decoding and memory",
        "splat_cost.py",
        "splat-cost.json",
        splat.costs,
        "fox60k under 5 CPU s, 542,104 with harmonics under 40, 1 M under 60 s wall; at least 2 M a second; at most 4x "
        "the .ply",
    ),
    Line(
        "3",
        "training on 43 photographs of a fox, 270 x 480, held out",
        "splat_training.py run",
        "splat-training/*.json",
        training.quality,
        "at least 25.5 dB within 300 CPU s, spread under 0.5 dB",
        together=True,
    ),
    Line(
        "3",
        "a file's rounding learnt in training, against plain training and against rounding afterwards",
        "splat_training.py run",
        "splat-training/*.json",
        training.files,
        "one size within 0.15 dB and 0.7 dB over; at most 600 kB",
        together=True,
    ),
    Line(
        "3",
        "price on opacity and removal of Gaussians",
        "splat_training.py run",
        "splat-training/*.json",
        training.halved,
        "half of them within 0.2 dB",
        together=True,
    ),
    Line(
        "4",
        "rasteriser forward and backward, degree 3, one thread, CPU time; how many times as long others take",
        "splat_raster.py peers",
        "splat-raster/peers.json",
        raster.peers,
        "at most 150 ms at 800 x 800 and 75 at 256 x 256; OpenSplat at least 4.5x, tiled torch 34x",
    ),
    Line(
        "4",
        "the same by the Gaussian and by the pixel",
        "splat_raster.py scaling",
        "splat-raster/scaling.json",
        raster.scaling,
        "linear to 1 M Gaussians and 4 megapixels",
    ),
    Line(
        "4",
        "the same on two threads, wall time",
        "splat_raster.py threads",
        "splat-raster/threads.json",
        raster.threads,
        "at least 1.75x one thread",
    ),
    Line(
        "4",
        "L1 + SSIM with gradient at 270 x 480 beside torch's conv2d",
        "splat_raster.py loss",
        "splat-raster/loss.json",
        raster.loss,
        "-",
    ),
)
