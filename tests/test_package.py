"""The build's decisions, what an import pulls in, and what the built extension links and compiles to."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama4_kernels
from llama4_kernels import cuda
from llama4_kernels.cli import doctor

ROOT = Path(__file__).parents[1]
NOT_BUILT = cuda.why_not_built()
SETUPTOOLS = int(importlib.metadata.version("setuptools").partition(".")[0]) if importlib.util.find_spec("setuptools") else 0
built = pytest.mark.skipif(bool(NOT_BUILT), reason=NOT_BUILT or "-")


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("llama4_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with cmake, ninja and nvcc, the last of which says that it is of CUDA 13.0."""
    for name in ("cmake", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    write_nvcc(tmp_path, "13.0")
    return tmp_path


def write_nvcc(folder: Path, release: str) -> None:
    (folder / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    (folder / "nvcc").chmod(0o755)


def test_off_leaves_the_extension_out_even_with_nvcc(setup, tools):
    assert setup.why_not_built({"LLAMA4_KERNELS_CUDA": "off", "PATH": str(tools)}) == "it was installed with LLAMA4_KERNELS_CUDA=off"


@pytest.mark.parametrize("mode", [{}, {"LLAMA4_KERNELS_CUDA": "auto"}, {"LLAMA4_KERNELS_CUDA": "on"}])
def test_the_extension_is_built_where_all_tools_are(setup, tools, mode):
    assert setup.why_not_built(mode | {"PATH": str(tools)}) == ""


def test_auto_without_nvcc_leaves_the_extension_out_and_says_why(setup, tools):
    (tools / "nvcc").unlink()
    assert "missing at installation: nvcc" in setup.why_not_built({"PATH": str(tools)})


def test_on_without_tools_is_an_error_that_names_them(setup, tools):
    (tools / "nvcc").unlink()
    (tools / "ninja").unlink()
    with pytest.raises(SystemExit, match=r"LLAMA4_KERNELS_CUDA=on, but these are missing: nvcc .*, ninja"):
        setup.why_not_built({"LLAMA4_KERNELS_CUDA": "on", "PATH": str(tools)})


@pytest.mark.parametrize("release", ["11.8", "12.4", "9.2"])
def test_an_nvcc_that_is_too_old_is_as_good_as_none(setup, tools, release):
    write_nvcc(tools, release)
    named = rf"nvcc of CUDA 12\.5 or later \({tools}/nvcc is of CUDA {release}\)"
    assert re.search(f"missing at installation: {named}", setup.why_not_built({"PATH": str(tools)}))
    with pytest.raises(SystemExit, match=f"LLAMA4_KERNELS_CUDA=on, but these are missing: {named}"):
        setup.why_not_built({"LLAMA4_KERNELS_CUDA": "on", "PATH": str(tools)})


@pytest.mark.parametrize("release", ["12.5", "12.10", "13.0", "14.1"])
def test_an_nvcc_that_is_new_enough_is_taken(setup, tools, release):
    write_nvcc(tools, release)
    assert setup.why_not_built({"PATH": str(tools)}) == ""


@pytest.mark.parametrize("program", ["", "#!/bin/sh\nexit 1\n"])
def test_an_nvcc_that_does_not_say_its_release_is_not_taken(setup, tools, program):
    (tools / "nvcc").write_text(program)
    assert f"nvcc of CUDA 12.5 or later ({tools}/nvcc does not say its release)" in setup.why_not_built({"PATH": str(tools)})


def test_another_mode_is_an_error_that_names_the_modes(setup):
    with pytest.raises(SystemExit, match="LLAMA4_KERNELS_CUDA is 'yes', needs one of auto, on, off"):
        setup.why_not_built({"LLAMA4_KERNELS_CUDA": "yes"})


def test_nvcc_of_cuda_home_comes_before_that_on_path(setup, tools, tmp_path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    assert setup.find_nvcc({"CUDA_HOME": str(home), "PATH": str(tools)}) == str(home / "bin" / "nvcc")
    assert setup.find_nvcc({"CUDACXX": str(tools / "nvcc"), "CUDA_HOME": str(home), "PATH": ""}) == str(tools / "nvcc")


def test_why_not_gives_the_reason_that_the_build_recorded(tmp_path, monkeypatch):
    (tmp_path / "not_built.txt").write_text("no compiler that day\n")
    monkeypatch.setattr(cuda, "_REASON_FILE", tmp_path / "not_built.txt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no compiler that day" in llama4_kernels.cuda.why_not_built()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of another installed llama4_kernels, and the only one."""
    site = tmp_path / "site"
    for file, text in (("llama4_kernels/__init__.py", ""), ("llama4_kernels-0.dist-info/METADATA", "Name: llama4_kernels\nVersion: 0\n")):
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text(text)
    others = [folder for folder in sys.path if not (Path(folder) / "llama4_kernels").exists()]
    monkeypatch.setattr(sys, "path", [str(site), *others])
    return site / "llama4_kernels"


def test_sources_that_come_before_the_installed_package_are_named(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(cuda, "_REASON_FILE", tmp_path / "none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"{Path(cuda.__file__).parents[1]} holds sources alone" in cuda.why_not_built() and "PYTHONSAFEPATH=1" in cuda.why_not_built()
    shutil.rmtree(installed)
    assert cuda.why_not_built().endswith("has neither the extension nor a note of why not: install the package again (pip install .)")


def test_doctor_warns_in_a_folder_whose_package_comes_before_the_installed_one(monkeypatch, installed):
    monkeypatch.chdir(ROOT)
    [row] = [row for row in doctor.installed() if row.what == "this folder"]
    assert row.status == "WARN" and f"imports {ROOT / 'llama4_kernels'} if it starts in this folder" in row.found
    monkeypatch.chdir(installed.parent)
    assert not [row for row in doctor.installed() if row.what == "this folder"]


PYTHON = """#!/bin/sh
echo "$0 $@" >> "$LOG"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pip" ;;
    "-m pip "*) [ -e "$(dirname "$0")/../pip" ] ;;
esac
"""


TOO_OLD = f"""#!/bin/sh
echo "$0 $@" >> "$LOG"
[ "$1" = -c ] && exec {sys.executable} -c 'import sys; sys.version_info, sys.version = (3, 10, 13), "3.10.13 (main)"; exec(sys.argv[1])' "$2"
"""


def copy_environment_script(folder: Path, python: str) -> dict[str, str]:
    """scripts/environment.sh and what it reads, in `folder`, with `python` as python3; the environment variables to run it with."""
    for file in ("scripts/environment.sh", "pyproject.toml", "setup.py", "CMakeLists.txt", "csrc/bindings.cpp"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    stand_in = folder / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text(python)
    stand_in.chmod(0o755)
    return {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "LOG": str(folder / "log")}


def test_a_python_too_old_for_sglang_is_said_before_an_environment_is_made(tmp_path):
    environ = copy_environment_script(tmp_path, TOO_OLD)
    ran = subprocess.run(
        ["sh", "-c", ". scripts/environment.sh", "scripts/test.sh"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert ran.returncode == 1 and re.search(r"SGLang needs Python 3\.11 or later, \S+ is Python 3\.10\.13", ran.stderr), ran
    assert "-m venv" not in (tmp_path / "log").read_text() and "-m pip install" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("left", ["nothing", "no pip", "oldest alone", "whole"])
def test_environment_is_made_where_it_is_missing_or_was_left_unfinished(tmp_path, left):
    """scripts/environment.sh with a stand-in for Python; `left`: what an earlier start has left of .venv."""
    environ = copy_environment_script(tmp_path, PYTHON)
    stand_in, venv = tmp_path / "bin" / "python3", tmp_path / ".venv"
    if left in ("no pip", "whole"):
        (venv / "bin").mkdir(parents=True)
        shutil.copy(stand_in, venv / "bin" / "python")
    if left == "whole":
        (venv / "pip").touch()
    if left == "oldest alone":
        (venv / "oldest").mkdir(parents=True)
    command = ["sh", "-c", ". scripts/environment.sh && command -v python", "scripts/test.sh"]
    ran = [subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True) for _ in range(2)]
    assert all(each.returncode == 0 and each.stdout.endswith(f"{venv}/bin/python\n") for each in ran), ran
    calls = (tmp_path / "log").read_text().splitlines()
    assert sum("-m venv .venv" in call for call in calls) == (left != "whole")
    assert sum("-m pip install" in call for call in calls) == 1, "the second start finds everything"


def test_the_gpu_check_refuses_a_step_that_it_does_not_have(tmp_path):
    script, environ = ROOT / "scripts" / "gpu_check.sh", os.environ | {"STEPS": "build benchmark", "PYTHON": "/bin/false"}
    ran = subprocess.run([script, tmp_path / "out"], env=environ, capture_output=True, text=True)
    assert ran.returncode == 2 and not (tmp_path / "out").exists(), ran
    assert ran.stderr.startswith("STEPS names benchmark, needs some of: build install package tests ")


def check_without_a_gpu(out: Path, steps: str, **environ: str) -> list[list[str]]:
    """The table of a check whose interpreter fails at once, so that nothing is built."""
    asked = os.environ | {"STEPS": steps, "PYTHON": "/bin/false", "LLAMA4_KERNELS_COMMIT": "0123abc"} | environ
    subprocess.run([ROOT / "scripts" / "gpu_check.sh", out], env=asked, capture_output=True)
    return [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]


def test_the_gpu_check_begins_nothing_after_its_time(tmp_path):
    rows = check_without_a_gpu(tmp_path, "package", TOTAL_SECONDS="0")
    assert ["package", "failed", "0", "not begun: TOTAL_SECONDS are over"] in rows


def test_a_second_gpu_check_keeps_what_the_first_found(tmp_path):
    check_without_a_gpu(tmp_path, "package")
    rows = check_without_a_gpu(tmp_path, "build")
    statuses = [row[1] for row in rows if row[0] == "package"]
    assert statuses == ["failed"], rows


# A Python on a Hopper host with nvcc, whose build fails where FAILS says so, and whose tests do nothing; where PLAIN is set without plugins
# of pytest.
GPU_HOST = r"""#!/bin/bash
case "$*" in
    *torch.cuda.get_device_capability* | *setup.missing_tools*) echo "a warning" >&2 ;;
    "-m pip"*) [ "$LLAMA4_KERNELS_CUDA" != "$FAILS" ] && mkdir -p "${PYTHONPATH%%:*}" ;;
    *-v*--collect-only*) echo "<Function test_a>" ;;
    *--collect-only*) printf 'llama4_kernels: %s\ntests/test_a.py::test_a\n' "${PYTHONPATH%%:*}/llama4_kernels" ;;
    *pytest_timeout*) [ -z "$PLAIN" ] ;;
    "- "*) exec python3 "$@" ;;
    *) echo "ran" ;;
esac
"""


@pytest.mark.parametrize("fails, plain", [("", ""), ("on", ""), ("", "1")], ids=["built", "not built", "without plugins of pytest"])
def test_the_gpu_check_begins_with_what_says_most_and_tests_triton_without_a_build(fails, plain, tmp_path):
    """CUDA's tests and races before Triton's, whose compiler takes most of the time; a build that fails leaves Triton's kernels to test."""
    python = tmp_path / "python"
    python.write_text(GPU_HOST)
    python.chmod(0o755)
    statuses = {row[0]: row[1] for row in check_without_a_gpu(tmp_path / "out", "build tests trials", PYTHON=str(python), FAILS=fails, PLAIN=plain)}
    steps = [name for name, status in statuses.items() if status != "skipped"]
    build = ["build", "build-without-cuda"] if fails else ["build"]
    tests = [f"tests-{kind}{end}" for kind in ("cuda", "triton") for end in (("-list", "-test_a") if plain else ("",))]
    assert steps == [*build, *tests, "trials-as-they-are", "trials-PDL-0", "trials-PREFETCH-1"]
    assert [name for name in steps if statuses[name] == "failed"] == (["build"] if fails else [])


@pytest.mark.parametrize("first_test", ["tests/test_package.py", "bench/bench_moe.py"])
def test_pytest_imports_the_package_of_the_path_before_that_of_the_clone(tmp_path, first_test):
    """As scripts/gpu_check.sh installs it: the clone's has no extension."""
    shutil.copytree(ROOT / "llama4_kernels", tmp_path / "llama4_kernels", ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
    plugin = "def pytest_collection_finish():\n    import llama4_kernels\n    print(llama4_kernels.__file__)\n"
    (tmp_path / "say_package.py").write_text(plugin)
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--collect-only",
        "-p",
        "say_package",
        first_test,
    ]
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0 and str(tmp_path / "llama4_kernels/__init__.py") in ran.stdout, ran.stdout + ran.stderr


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(SETUPTOOLS < 77, reason=f"setuptools is of release {SETUPTOOLS}, needs 77")
def test_a_source_distribution_holds_all_sources_tests_and_docs_and_nothing_built(tmp_path):
    clone = tmp_path / "clone"
    for folder in ("llama4_kernels", "csrc", "tests", "bench", "docs", "scripts"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.so", "not_built.txt"))
    for file in ("README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, clone)
    sources = files_in(clone)
    for built in ("llama4_kernels/cuda/_C.so", "llama4_kernels/cuda/not_built.txt", "tests/__pycache__/a.pyc", "csrc/__pycache__/a.txt"):
        (clone / built).parent.mkdir(exist_ok=True)
        (clone / built).touch()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=clone, check=True, capture_output=True)
    [archive] = (clone / "dist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    made = {file for file in files_in(unpacked) if file in ("PKG-INFO", "setup.cfg") or file.startswith("llama4_kernels.egg-info/")}
    assert files_in(unpacked) - made == sources


def in_subprocess(code: str) -> dict:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return json.loads(subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True).stdout)


def test_import_needs_neither_sglang_nor_triton_nor_the_extension():
    code = """
import json, sys, torch
before = set(sys.modules)
import llama4_kernels
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(dict(tops=sorted(tops), cuda="llama4_kernels.cuda._C" in sys.modules, initialized=torch.cuda.is_initialized())))
"""
    seen = in_subprocess(code)
    assert not {"sglang", "triton", "transformers", "typer", "rich"} & set(seen["tops"])
    assert not seen["cuda"] and not seen["initialized"]


def test_import_of_sources_that_are_not_installed_says_how_to_install_them():
    code = """
import importlib.metadata, json
found = importlib.metadata.version
def version(name):
    if name == "llama4_kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
try:
    import llama4_kernels
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    assert in_subprocess(code) == ["ImportError", f"llama4_kernels is not installed in this Python: pip install {ROOT}"]


def test_import_costs_about_what_torch_costs():
    code = """
import json, time
start = time.process_time()
import torch
middle = time.process_time()
import llama4_kernels
print(json.dumps(dict(torch=middle - start, ours=time.process_time() - middle)))
"""
    seen = in_subprocess(code)
    assert seen["ours"] < 0.25 * seen["torch"], seen


def extension() -> Path:
    return Path(importlib.util.find_spec("llama4_kernels.cuda._C").origin)


@built
def test_extension_leaves_the_wheel_below_20_mb():
    assert extension().stat().st_size < 20e6


@built
def test_extension_imports_without_torch_and_without_a_driver():
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("llama4_kernels.cuda._C", {str(extension())!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(json.dumps(dict(torch="torch" in sys.modules, libcuda="libcuda.so" in open("/proc/self/maps").read())))
"""
    assert in_subprocess(code) == {"torch": False, "libcuda": False}


@built
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_extension_links_neither_torch_nor_cuda_libraries():
    dynamic = subprocess.run(["readelf", "-d", extension()], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libc.") for name in needed)
    assert not [name for name in needed if name.startswith(("libtorch", "libc10", "libcuda", "libcudart", "libpython"))]


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.machinery.PathFinder.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@built
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither on PATH nor in triton")
def test_kernels_are_sm_90a_and_use_no_local_memory():
    def dump(*options: str) -> str:
        return subprocess.run([cuobjdump(), *options, extension()], check=True, capture_output=True, text=True).stdout

    usage = [line.split() for line in dump("--dump-resource-usage").splitlines() if "STACK:" in line]
    assert usage and all({"STACK:0", "LOCAL:0"} <= set(fields) for fields in usage)
    assert {line.split(".")[-2] for line in dump("--list-elf").splitlines() if line.startswith("ELF file")} == {"sm_90a"}
