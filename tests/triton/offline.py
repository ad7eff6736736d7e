"""Every Triton kernel that ships: the calls of the ops that shipped_*.py list at the shapes of the real models, on meta tensors.

python tests/triton/offline.py [list ...]     rewrites baseline_<list>.json, by default of every shipped_<list>.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from llama4_kernels.triton.offline import ARCHITECTURES, SHARED_KIB, recorded
from llama4_kernels.triton.offline import measure as measure_kernels

__all__ = ["ARCHITECTURES", "LISTS", "SHARED_KIB", "baseline", "measure", "module"]

HERE = Path(__file__).parent
LISTS = sorted(path.stem.removeprefix("shipped_") for path in HERE.glob("shipped_*.py"))


def module(shipped_list: str):
    """shipped_<list>.py: calls(architecture), and the names of kernels that use WGMMA on sm_90."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"shipped_{shipped_list}")


def baseline(shipped_list: str) -> Path:
    return HERE / f"baseline_{shipped_list}.json"


def measure(architecture: str, shipped_list: str) -> dict[str, dict[str, int]]:
    """Name -> what llama4_kernels.triton.offline.measure says of every kernel of a list."""
    return measure_kernels(recorded(module(shipped_list).calls(architecture), architecture), architecture)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile Triton's kernels without a GPU and rewrite their baseline_<list>.json.")
    parser.add_argument("lists", nargs="*", choices=LISTS, metavar="list", help=f"one of {', '.join(LISTS)}; all of them if not given")
    for name in parser.parse_args(arguments).lists or LISTS:
        measured = {"triton": triton.__version__} | {architecture: measure(architecture, name) for architecture in ARCHITECTURES}
        baseline(name).write_text(json.dumps(measured, indent=1) + "\n")
        print(f"{sum(len(measured[a]) for a in ARCHITECTURES)} kernels written to {baseline(name)}")


if __name__ == "__main__":
    main()
