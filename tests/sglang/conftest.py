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
    """checkpoint.make, remembering what it has made."""

    @functools.cache
    def make_in(like: str = "scout", **options):
        return checkpoint.make(tmp_path_factory.mktemp("checkpoints") / "checkpoint", like, **options)

    return lambda like="scout", **options: make_in(like, **{name: _hashable(value) for name, value in options.items()})


@pytest.fixture(scope="session")
def oracle():
    return functools.cache(Oracle)


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value
