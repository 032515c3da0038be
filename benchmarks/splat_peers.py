"""Other programs that write scenes of Gaussians small, run as they come, and the arithmetic of CompGS.

npm install @playcanvas/splat-transform@3.7.0    # --splat-transform node_modules/.bin/splat-transform
pip install --no-deps gsply gaussforge sogpy     # into an environment of their own: --python that/bin/python
pip install numpy numba scipy pillow zstandard   # into the same

A program that is not there is passed over with a note, never silently. What they write is taken back to .ply by
splat-transform, which none of our code has a part in; where it is absent, by our own readers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scrimp.primitives.files import write_json
from scrimp.splats.codebooks import kmeans
from scrimp.splats.files import read, write
from scrimp.splats.scene import Splats

_GSPLY = "import sys, gsply; scene = gsply.plyread(sys.argv[1]); "
_GAUSSFORGE = (
    "import sys, gaussforge; found = gaussforge.GaussForge().convert(open(sys.argv[1], 'rb').read(), 'ply', '{}'); "
    "open(sys.argv[2], 'wb').write(found['data'])"
)
_SOGPY = "import sys; from SogPython.cli import main; sys.argv = ['sogpy', *sys.argv[1:]]; main()"
_SEED_CODES = {"scales": 4096, "quaternions": 4096, "colors": 4096, "harmonics": 512}


@dataclass(frozen=True)
class Tools:
    """Where the others are; "" for nowhere."""

    splat_transform: str = os.environ.get("SPLAT_TRANSFORM", "")
    """The command of npm's package (or $SPLAT_TRANSFORM)."""
    python: str = os.environ.get("SPLAT_PEERS_PYTHON", "")
    """An interpreter that has gsply, gaussforge and sogpy (or $SPLAT_PEERS_PYTHON)."""


@dataclass(frozen=True)
class Peer:
    """One program writing one format.

    Attributes:
        way: name of its receipts.
        tool: what it belongs to.
        ending: of what it writes.
        options: of splat-transform.
        code: for Python, that takes the source and the target as its arguments; "" for splat-transform.
        unit: whether it is given quaternions of length 1, which not every program can do without.
    """

    way: str
    tool: str
    ending: str
    options: tuple[str, ...] = ()
    code: str = ""
    unit: bool = False

    def command(self, tools: Tools, source: Path, target: Path) -> list[str] | None:
        """None where the program is absent."""
        if self.code:
            return [tools.python, "-c", self.code, str(source), str(target)] if tools.python else None
        if not tools.splat_transform:
            return None
        return [tools.splat_transform, "-q", "-w", *self.options, str(source), str(target)]


PEERS = (
    Peer("splat-transform-compressed", "splat-transform", ".compressed.ply"),
    Peer("splat-transform-spz3", "splat-transform", ".spz", ("--spz-version", "3")),
    Peer("splat-transform-spz4", "splat-transform", ".spz", ("--spz-version", "4")),
    Peer("splat-transform-sog", "splat-transform", ".sog", ("-g", "cpu")),
    Peer("gsply-compressed", "gsply", ".compressed.ply", (),
         _GSPLY + "gsply.plywrite(sys.argv[2], scene, compressed=True)"),
    Peer("gsply-spz3", "gsply", ".spz", (), _GSPLY + "gsply.write_spz(sys.argv[2], scene, version=3)"),
    Peer("gsply-spz4", "gsply", ".spz", (), _GSPLY + "gsply.write_spz(sys.argv[2], scene, version=4)"),
    Peer("gaussforge-sog", "gaussforge", ".sog", (), _GAUSSFORGE.format("sog")),
    Peer("gaussforge-sog-unit", "gaussforge", ".sog", (), _GAUSSFORGE.format("sog"), unit=True),
    Peer("gaussforge-spz", "gaussforge", ".spz", (), _GAUSSFORGE.format("spz")),
    Peer("gaussforge-compressed", "gaussforge", ".compressed.ply", (), _GAUSSFORGE.format("compressed.ply")),
    Peer("sogpy-sog", "sogpy", ".sog", (), _SOGPY),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a program did: its file, or why there is none.

    Attributes:
        stored: bytes of the file; None without one.
        cpu_seconds: of the program's process and its children, start and reading included.
        problem: "" where it worked.
    """

    stored: int | None
    cpu_seconds: float
    problem: str = ""


def run_peer(peer: Peer, tools: Tools, source: Path, target: Path, *, limit: float) -> Outcome | None:
    """Let a program write ``target``, unless it did before with this limit; None where it is absent.

    Args:
        source: a .ply.
        limit: CPU seconds after which it is given up.
    """
    command = peer.command(tools, source, target)
    if command is None:
        return None
    kept = target.with_name(f"{target.name}.json")
    if kept.is_file():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    code, seconds, said = timed(command, limit)
    worked = code == 0 and target.is_file()
    problem = "" if worked else said or f"exit code {code}"
    # The kernel stops it within a tick of the limit, which may count as a little less.
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        problem = f"given up after {limit:.0f} CPU seconds"
    outcome = Outcome(target.stat().st_size if worked else None, seconds, problem)
    write_json(kept, asdict(outcome))
    return outcome


def timed(command: list[str], limit: float) -> tuple[int, float, str]:
    """Exit code, CPU seconds and the last line of the errors of a command that may use so many CPU seconds."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(limit), int(limit)))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return process.returncode, usage.ru_utime + usage.ru_stime, lines[-1][:200] if lines else ""


def taken_back(tools: Tools, path: Path) -> tuple[Splats, str]:
    """The scene of a program's file, and whose reader it came through."""
    if not tools.splat_transform:
        return read(path, on_bad="clamp"), "scrimp"
    plain = path.with_name(f"{path.name}.ply")
    if not plain.is_file():
        subprocess.run([tools.splat_transform, "-q", "-w", str(path), str(plain)], check=True, capture_output=True)
    # Alphas of 0 and 1 have no finite logits.
    return read(plain, on_bad="clamp"), "splat-transform"


def unit_quaternions(splats: Splats) -> Splats:
    """The same scene, its quaternions of length 1."""
    return replace(splats, quaternions=torch.nn.functional.normalize(splats.quaternions, dim=1))


def sources(splats: Splats, folder: Path) -> dict[bool, Path]:
    """The scene as .ply for the programs: as it is, and with quaternions of length 1."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        unit: write(unit_quaternions(splats) if unit else splats, folder / f"source{'-unit' * unit}.ply", normals=True)
        for unit in (False, True)
    }


def versions_of(tools: Tools) -> dict[str, str]:
    """Of the programs that are there."""
    found = {}
    if tools.splat_transform:
        done = subprocess.run([tools.splat_transform, "--version"], capture_output=True, text=True, check=False)
        found["splat-transform"] = (done.stdout + done.stderr).strip().removeprefix("splat-transform ")
    for tool in ("gsply", "gaussforge", "sogpy") if tools.python else ():
        ask = f"from importlib.metadata import version; print(version('{tool}'))"
        said = subprocess.run([tools.python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()
        found[tool] = said or "absent"
    return found


def seed_scene(splats: Splats, *, short: bool = False, seed: int = 0) -> tuple[Splats, int, float]:
    """A scene as CompGS stores it after training (arXiv 2311.18159): codebooks by field, all Gaussians alike.

    Its released settings: 4096 codes of scales, of rotations and of colours, 512 of harmonics, ten rounds of k-means.

    Args:
        short: positions of 16 bits and opacities of 8 (its "BitQ") instead of float32.

    Returns:
        The scene, its bytes (counted as the paper does: packed indices, codebooks of float32) and CPU seconds.
    """
    begin = time.process_time()
    bits, codebooks, fields = (3 * 16 + 8 if short else 4 * 32), 0, {}
    for name, codes in _SEED_CODES.items():
        rows = getattr(splats, name).flatten(1)
        if not rows.shape[1]:
            continue
        few = min(codes, len(rows))
        centres, labels = kmeans(rows, few, seed=seed, iterations=10, exact=True)
        fields[name] = centres[labels].reshape(getattr(splats, name).shape)
        bits, codebooks = bits + max(0, few - 1).bit_length(), codebooks + 4 * centres.numel()
    if short:
        fields |= {"means": _stepped(splats.means, 16), "opacities": _stepped(splats.opacities[:, None], 8)[:, 0]}
    size = -(-len(splats) * bits // 8) + codebooks
    return replace(splats, **fields), size, time.process_time() - begin


def _stepped(values: Tensor, bits: int) -> Tensor:
    """Rounded to so many bits between the columns' ends."""
    low, high = values.amin(0), values.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    return low + ((values - low) / step).round() * step
