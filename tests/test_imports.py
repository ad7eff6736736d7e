"""Imports within the package run one way: sglang/ and cli/ → ops/ → the backends, and no backend imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama4_kernels

PACKAGE = Path(llama4_kernels.__file__).parent

# What everyone may import, and what imports nothing of the package but its like
LEAVES = {"counters", "switches", "tables"}

# Folder -> the others that it may import from. ops/ finds backends by name when an op is called: an import would load them all.
MAY_IMPORT = {
    "ops": set(),
    "reference": {"ops"},
    "triton": {"ops"},
    "cuda": {"ops"},
    "bench": {"ops", "reference", "triton"},  # it measures against the oracle, and tunes and compiles Triton's kernels
    "cli": {"ops", "bench"},
    "sglang": {"ops"},
}

# A module -> the folder beyond these that it may import from
EXCEPTIONS = {"cli/doctor.py": "cuda"}  # which says whether the extension was built


def imported(source: str) -> Iterator[str]:
    """Dotted names below llama4_kernels that a module imports, at its top or within a function; "" is the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.split(".")[0] == "llama4_kernels")


def wrong_imports(package: Path) -> list[str]:
    """ "module: folder" for each folder that a module must not import from."""
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    wrong = []
    for path in sorted(package.glob("**/*.py")):
        module = path.relative_to(package)
        own = module.parts[0] if len(module.parts) > 1 else ""
        if not own and module.stem not in LEAVES:
            continue  # the package's __init__.py
        allowed = {own, *MAY_IMPORT.get(own, ()), EXCEPTIONS.get(str(module))}
        for name in imported(path.read_text()):
            folder = name.split(".")[0]
            if folder in folders and folder not in allowed:
                wrong.append(f"{module}: {folder}")
    return wrong


def test_every_folder_has_its_rule():
    assert set(MAY_IMPORT) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert LEAVES == {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def test_imports_run_one_way():
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "source", "folder"),
    [
        ("sglang/model.py", "from llama4_kernels.triton import config", "triton"),
        ("sglang/model.py", "def late():\n    from llama4_kernels import cuda", "cuda"),
        ("bench/tune.py", "import llama4_kernels.cli.main", "cli"),
        ("triton/moe.py", "from llama4_kernels.reference.moe import fused_moe", "reference"),
        ("switches.py", "from llama4_kernels import ops", "ops"),
    ],
)
def test_an_import_against_the_rule_is_found(tmp_path, module, source, folder):
    for name in MAY_IMPORT:
        (tmp_path / name).mkdir()
    (tmp_path / module).write_text(f"from llama4_kernels.switches import is_on\n{source}\n")
    assert wrong_imports(tmp_path) == [f"{module}: {folder}"]
