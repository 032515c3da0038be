"""Make the built-in data set: a stratified sample of Fashion-MNIST, small enough to travel in the wheel.

    python scripts/make_builtin_data.py [--source FOLDER] [--out FILE]

The source is the folder of Debian's package dataset-fashion-mnist. The result is an uncompressed .npz (its zip dates
fixed) inside one .xz stream: raw images under LZMA were smaller than any PNG-style row filter under deflate
(5.3 MB against 5.8 MB) and unpack in about 0.3 s. `xz -d` gives back an ordinary .npz. Needs only numpy.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).resolve().parents[1] / "src/scrimp/data/builtin/fashion-mnist-sample.npz.xz"
LIMIT = 6_000_000  # bytes the file may take in the wheel
SEED = 0
PER_CLASS = {"train": 1200, "test": 200}
PREFIX = {"train": "train", "test": "t10k"}
# Pixels are single bytes with long runs: no alignment bits (pb), as many bits of context as LZMA takes (lc).
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 24}]


def read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of bytes: two zeros, 8 (unsigned byte), the number of axes, their big-endian lengths."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"expected an IDX file of unsigned bytes; got {path}; install dataset-fashion-mnist again")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(shape.tolist()))


def chosen(labels: np.ndarray, per_class: int, salt: str) -> np.ndarray:
    """Rows of the sample, ascending: in each class those whose salted hash is smallest.

    A hash, because numpy does not promise that its generators draw the same numbers in every version.
    """
    rank = [hashlib.sha256(f"{salt}:{row}".encode()).digest() for row in range(len(labels))]
    rows: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        rows += sorted(members, key=rank.__getitem__)[:per_class]
    return np.sort(np.array(rows))


def sample(source: Path = SOURCE) -> bytes:
    """The uncompressed .npz: {train,test}_images uint8 [n, 28, 28] and {train,test}_labels uint8 [n]."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for split, per_class in PER_CLASS.items():
            images = read_idx(source / f"{PREFIX[split]}-images-idx3-ubyte.gz")
            labels = read_idx(source / f"{PREFIX[split]}-labels-idx1-ubyte.gz")
            rows = chosen(labels, per_class, f"{SEED}:{split}")
            _add(archive, f"{split}_images.npy", images[rows])
            _add(archive, f"{split}_labels.npy", labels[rows])
    return buffer.getvalue()


def compress(content: bytes) -> bytes:
    """One .xz stream, with a check sum that betrays damage."""
    return lzma.compress(content, check=lzma.CHECK_CRC64, filters=FILTERS)


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # the same byte whichever system runs this
    archive.writestr(entry, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with the four .gz files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"no folder {arguments.source}: install Debian's dataset-fashion-mnist, or pass --source")
    content = compress(sample(arguments.source))
    if len(content) > LIMIT:
        parser.error(f"the sample takes {len(content)} bytes, more than {LIMIT}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(content)
    print(f"{arguments.out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
