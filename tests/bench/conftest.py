"""These tests need the extra `bench`, which a GPU host without network may lack; what needs a GPU stands in tests/test_bench_gpu.py."""

import importlib.util

NEEDED = ("jsonschema_rs", "jinja2", "plotly", "rich", "scipy", "typer")

collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in NEEDED) else ["test_*.py"]
