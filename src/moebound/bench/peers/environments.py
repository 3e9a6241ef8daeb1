"""Environments for libraries that cannot live beside us, or should not.

    python -m moebound.bench.peers.environments FOLDER [NAME ...]

makes FOLDER/NAME, a virtual environment each, of packages of PyPI in the versions below; all of
them where no name is given. One that is there already is brought up to date.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from moebound.errors import BackendUnavailable

SCRIPT = "python -m moebound.bench.peers.environments"
# Alone and first: a looser request, made together with others, may choose another build.
TORCH = "torch==2.13.0"
PACKAGES = {
    "llmcompressor": (TORCH, "llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "autoround": (TORCH, "auto-round==0.16.1", "transformers==5.24.0"),
    "hqq": (TORCH, "hqq==0.2.8.post1", "safetensors>=0.8"),
    "llamacpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors>=0.8"),
}
"""By environment, what is installed in it, in this order."""
_CMAKE = 'set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)\n'


def python_of(name: str, folder: Path | None, what: str) -> Path:
    """The interpreter of an environment. what: needs it, as the message calls it.

    Raises BackendUnavailable, naming the script to run, where it is not there.
    """
    asked = "FOLDER" if folder is None else str(folder)
    make = f"make it with `{SCRIPT} {asked} {name}`"
    if folder is None:
        raise BackendUnavailable(
            f"{what} runs in an environment of its own: {make}, and give --peer-environments FOLDER"
        )
    python = folder / name / "bin" / "python"
    if not python.exists():
        raise BackendUnavailable(f"{what}: no environment {folder / name}: {make}")
    return python


def make(folder: Path, name: str) -> None:
    """Make one of PACKAGES, or bring it up to date. Raises CalledProcessError if pip fails."""
    place = folder / name
    if not (place / "bin" / "python").exists():
        venv.create(place, with_pip=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install"]
    with tempfile.TemporaryDirectory() as work:
        # What quantizing does not call is half of llama.cpp's compile time.
        without = Path(work) / "llama-cpp.cmake"
        without.write_text(_CMAKE, encoding="utf-8")
        flags = f"-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE={without}"
        environment = os.environ | {"CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} {flags}"}
        for packages in _steps(PACKAGES[name]):
            subprocess.run([*pip, *packages], check=True, env=environment)


def _steps(packages: tuple[str, ...]) -> list[tuple[str, ...]]:
    if packages[0] == TORCH:
        return [packages[:1], packages]  # named again, so that it stays
    return [packages]


def main() -> int:
    parser = argparse.ArgumentParser(prog=SCRIPT, description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in PACKAGES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected of {', '.join(PACKAGES)}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.names or PACKAGES:
        print(f"{asked.folder / name}: {', '.join(PACKAGES[name])}", file=sys.stderr)
        make(asked.folder, name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
