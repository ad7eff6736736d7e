"""Checkpoints and oracles of the engine tests, made once each per process."""

import functools
import pathlib

import pytest

from llama4_kernels.cli import checkpoint
from llama4_kernels.cli.oracle import Oracle


HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("sglang")


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """checkpoint.make into a folder of its own, remembering what it has made."""
    made = {}

    def make_once(like="scout", **options):
        key = repr((like, options))
        if key not in made:
            made[key] = checkpoint.make(tmp_path_factory.mktemp("checkpoints") / "checkpoint", like, **options)
        return made[key]

    return make_once


@pytest.fixture(scope="session")
def oracle():
    return functools.cache(Oracle)
