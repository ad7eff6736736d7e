# Sourced by the other scripts: puts the official SGLang install and this package first on PATH, in a virtual environment that is made
# when it is missing, and brought up to date when what is installed or built has changed.
#   LLAMA4_KERNELS_VENV: its folder (.venv)
set -eu
cd "$(dirname "$0")/.."
venv="${LLAMA4_KERNELS_VENV:-.venv}"
wanted=$(cat pyproject.toml setup.py CMakeLists.txt $(find csrc -type f | sort) | sha256sum)
if [ "$(cat "$venv/llama4_kernels.sha256" 2>/dev/null || true)" != "$wanted" ]; then
    python="$venv/bin/python"
    "$python" -m pip --version > /dev/null 2>&1 || python=python3
    "$python" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit(f"SGLang needs Python 3.11 or later, {sys.executable} is Python {sys.version.split()[0]}")'
    echo "installing SGLang and llama4_kernels into $venv: a download of some 10 GB the first time, about 5 minutes"
    [ "$python" != python3 ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check -q --progress-bar on --no-compile -e ".[sglang,test]"
    echo "$wanted" > "$venv/llama4_kernels.sha256"
fi
unset PYTHONDONTWRITEBYTECODE # without bytecode kept, every process that imports SGLang compiles it anew, which takes as long as the import itself
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
