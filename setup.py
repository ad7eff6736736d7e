"""Builds llama4_kernels.cuda._C with nvcc through CMake, or leaves it out and says why.

LLAMA4_KERNELS_CUDA=auto builds it where an nvcc that is new enough and the build tools are found; on makes their absence an error; off
leaves it out.
nvcc is $CUDACXX, else $CUDA_HOME/bin/nvcc, else $CUDA_PATH/bin/nvcc, else the first on PATH.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ENVIRONMENT_VARIABLE = "LLAMA4_KERNELS_CUDA"
MODES = ("auto", "on", "off")
REASON_FILE = "not_built.txt"
OLDEST_CUDA = (12, 5)  # the first with cudaGetDriverEntryPointByVersion; the kernels' PTX, 8.1, came with 12.1


def cuda_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get(ENVIRONMENT_VARIABLE, "auto")
    if mode not in MODES:
        raise SystemExit(f"{ENVIRONMENT_VARIABLE} is {mode!r}, needs one of {', '.join(MODES)}")
    return mode


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    candidates = [environ["CUDACXX"]] if environ.get("CUDACXX") else []
    candidates += [f"{environ[home]}/bin/nvcc" for home in ("CUDA_HOME", "CUDA_PATH") if environ.get(home)]
    for candidate in [*candidates, "nvcc"]:
        if nvcc := shutil.which(candidate, path=environ.get("PATH", "")):
            return nvcc
    return None


def cuda_release(nvcc: str) -> tuple[int, int] | None:
    """The CUDA release that an nvcc is of, or None where it does not say."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else None


def missing_nvcc(environ: Mapping[str, str]) -> list[str]:
    nvcc, needed = find_nvcc(environ), f"nvcc of CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or later"
    if nvcc is None:
        return [f"{needed} (the CUDA toolkit; put it on PATH or set CUDA_HOME)"]
    release = cuda_release(nvcc)
    if release is None:
        return [f"{needed} ({nvcc} does not say its release)"]
    return [] if release >= OLDEST_CUDA else [f"{needed} ({nvcc} is of CUDA {release[0]}.{release[1]})"]


def missing_tools(environ: Mapping[str, str]) -> list[str]:
    missing = missing_nvcc(environ)
    missing += [tool for tool in ("cmake", "ninja") if not shutil.which(tool, path=environ.get("PATH", ""))]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return missing


def why_not_built(environ: Mapping[str, str]) -> str:
    """Why to leave the CUDA extension out, or "" to build it. SystemExit where it is asked for and cannot be built."""
    mode = cuda_mode(environ)
    if mode == "off":
        return f"it was installed with {ENVIRONMENT_VARIABLE}=off"
    missing = missing_tools(environ)
    if missing and mode == "on":
        raise SystemExit(f"{ENVIRONMENT_VARIABLE}=on, but these are missing: {', '.join(missing)}")
    return f"these were missing at installation: {', '.join(missing)}" if missing else ""


class FreshBuild(build):
    """Keeps modules of an earlier build, since deleted or renamed, out of the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildCuda(build_ext):
    """Writes either the extension or the reason for its absence into llama4_kernels/cuda."""

    def run(self) -> None:
        extension = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        reason_file = extension.parent / REASON_FILE
        extension.parent.mkdir(parents=True, exist_ok=True)
        extension.unlink(missing_ok=True)
        reason_file.unlink(missing_ok=True)
        reason = why_not_built(os.environ)
        if reason:
            say(f"Triton-only installation without the CUDA extension: {reason}")
            reason_file.write_text(reason + "\n")
        else:
            self.build_with_cmake(extension)

    def build_with_cmake(self, extension: Path) -> None:
        import pybind11

        nvcc = find_nvcc(os.environ)
        say(f"building the CUDA extension with {nvcc} (LLAMA4_KERNELS_CUDA=off leaves it out)")
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(Path(__file__).parent.resolve()), "-B", str(build)),
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLLAMA4_KERNELS_OUTPUT={extension}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        say(f"built {extension.name}")

    def get_outputs(self) -> list[str]:
        extension = Path(self.get_ext_fullpath(self.extensions[0].name))
        return [str(path) for path in (extension, extension.parent / REASON_FILE) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def say(message: str) -> None:
    print(f"llama4_kernels: {message}", flush=True)


if __name__ == "__main__":
    setup(ext_modules=[Extension("llama4_kernels.cuda._C", sources=[])], cmdclass={"build": FreshBuild, "build_ext": BuildCuda})
