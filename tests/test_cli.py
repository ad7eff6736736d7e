"""The commands: options, doctor's verdicts, and a server that is always stopped. Where the real sglang is not the point, a fake stands in."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from llama4_kernels import cuda
from llama4_kernels.cli import doctor, server
from llama4_kernels.cli.main import app
from llama4_kernels.tables import PLAIN_WIDTH, new_table

has_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
has_server_needs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("psutil", "requests")), reason="psutil and requests come with sglang"
)
has_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")

FAKE_SERVER = '''
"""A stand-in for sglang.launch_server. FAKE says what it does: serve, die, hang (never healthy), cling (ignore SIGTERM and SIGINT) or be slow."""
import http.server, os, pathlib, signal, subprocess, sys, time
port = int(next(a for a in sys.argv if a.startswith("--port=")).split("=")[1])
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
pathlib.Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
print(os.environ.get("FAKE_LOG", "llama4_kernels: serving Llama4ForCausalLM\\n"
      "[2026-01-01 TP0] llama4_kernels: route_top1 -> reference (cuda: not built; triton: cpu (no GPU))"), flush=True)
what = os.environ["FAKE"]
if what == "die":
    sys.exit("out of luck")
if what == "cling":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(3 if what == "slow" else 0)
        self.send_response(503 if what == "hang" else 200); self.end_headers()
    def do_POST(self):
        self.send_response(400); self.end_headers(); self.wfile.write(b"no such prompt")
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def fake_sglang(tmp_path, monkeypatch):
    """An sglang whose server is FAKE_SERVER; call it with what the server shall do. Returns the file of process ids."""
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(FAKE_SERVER)
    pids = tmp_path / "pids"

    def use(what, log=None):
        monkeypatch.setattr(server, "STOP_SECONDS", 1)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setenv("FAKE", what)
        monkeypatch.setenv("FAKE_PIDS", str(pids))
        if log is not None:
            monkeypatch.setenv("FAKE_LOG", log)
        return pids

    return use


def invoke(*arguments):
    return CliRunner().invoke(app, arguments)


def are_gone(pids: Path) -> bool:
    import psutil

    numbers = [int(number) for number in pids.read_text().split()]
    _, left = psutil.wait_procs([psutil.Process(number) for number in numbers if psutil.pid_exists(number)], timeout=5)
    return not left


def test_help_names_the_commands_and_loads_no_engine():
    code = "import sys; from llama4_kernels.cli import main; print([name for name in ('sglang', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    output = invoke("--help").output
    assert "demo" in output and "doctor" in output


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--like", "behemoth"], "--like"),
        (["--tp", "3"], "--tp"),
        (["--port", "0"], "--port"),
        (["--keep", __file__], "--keep"),
        (["--fp9"], "--fp9"),
    ],
)
def test_demo_names_a_wrong_option(arguments, names):
    result = invoke("demo", *arguments)
    assert result.exit_code == 2 and names in unboxed(result.output)


def unboxed(output: str) -> str:
    """The words of an error without the frame around it, whose line breaks depend on the length of a path."""
    return " ".join(output.replace("│", " ").split())


def test_demo_keeps_nothing_in_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "model.safetensors").touch()
    result = invoke("demo", "--keep", str(tmp_path))
    assert result.exit_code == 2 and "is not empty" in unboxed(result.output)


@pytest.mark.parametrize("command", ["demo", "guide"])
def test_a_folder_that_cannot_be_made_is_said(command):
    result = invoke(command, "--keep", "/proc/nowhere")
    assert result.exit_code == 1 and "FAIL: [Errno 2] No such file or directory: '/proc/nowhere" in unboxed(result.output)


OF_EXTRAS = (
    *("sglang", "safetensors", "transformers", "tokenizers", "openai", "requests", "psutil", "matplotlib", "lm_eval"),
    *("triton", "jsonschema_rs", "jinja2", "numpy", "plotly", "pytest_benchmark", "scipy"),
)
RESULTS = next((Path(__file__).parents[1] / "bench" / "results" / "cpu").glob("*.json"))


def without(packages, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """A command where these packages are not there; torch, which warns without NumPy, has it."""
    code = f"import sys, torch; sys.modules.update(dict.fromkeys({packages})); from llama4_kernels.cli.main import app; app()"
    return subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    "arguments",
    [
        "demo",
        "guide",
        "eval --tiny scout --needle",
        "eval --url http://127.0.0.1:1 --needle",
        f"bench --measured {RESULTS} --compare {RESULTS}",
        f"report {RESULTS} --out site",
        "profile fused_moe fp8/tiny/tp1/t4 --backend triton",
        "tune",
    ],
    ids=lambda text: text.split()[0],
)
def test_a_package_that_came_alone_says_what_is_missing(arguments, tmp_path):
    """`pip install .` brings torch, typer and rich."""
    ran = without(OF_EXTRAS, arguments, tmp_path)
    assert ran.returncode == 1
    assert "is not installed: pip install" in ran.stderr and len(ran.stderr.splitlines()) == 1, ran.stderr


@pytest.mark.parametrize("package", ["jsonschema_rs", "jinja2", "plotly"])
def test_what_is_missing_is_named_as_pip_knows_it(package, tmp_path):
    ran = without((package,), f"report {RESULTS} --out site", tmp_path)
    assert (ran.returncode, ran.stderr) == (1, f'report: {package} is not installed: pip install "llama4_kernels[bench]"\n')


def test_bench_measures_without_any_extra(tmp_path):
    ran = without(OF_EXTRAS, "bench --workload quantize_per_token/fp8/tiny/tp1/t4 --backend reference --rounds 2 --out out.json", tmp_path)
    assert ran.returncode == 0 and "1 record added to out.json" in ran.stdout, ran.stderr


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.strip() == importlib.metadata.version("llama4_kernels")


def test_demo_without_sglang_says_how_to_install_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sglang" else find_spec(name, *rest))
    result = invoke("demo")
    assert result.exit_code == 1 and "sglang is not installed" in result.output


@has_server_needs
@has_transformers
@pytest.mark.parametrize(
    "what, log, says",
    [("die", None, "out of luck"), ("serve", "stock model", "no start-up table of llama4_kernels"), ("serve", None, "no such prompt")],
    ids=["dead server", "stock model", "refused request"],
)
def test_demo_fails_where_the_server_does_not_serve_ours(fake_sglang, what, log, says):
    pids = fake_sglang(what, log)
    result = invoke("demo")
    assert result.exit_code == 1 and says in result.output
    assert are_gone(pids)


def test_demo_judges_every_request():
    from rich.console import Console

    from llama4_kernels.cli.demo import Comparison, Reference, _judge

    def judge(difference, greedy=2):
        good = Comparison("tokens", 64, torch.tensor([1e-6, 1e-6]), None, 2, 2)
        other = Comparison("tokens", 65, torch.tensor(difference), None, greedy, 2)
        return _judge(Console(quiet=True), [good, other], Reference(None, None))

    assert judge([1e-6, 9e-5]) == []
    assert len(judge([1e-6, 2e-4])) == 1
    assert len(judge([1e-6, float("nan")])) == 1
    assert judge([1e-6, 1e-6], greedy=1) == ["tokens of 65 tokens: 1 of 2 greedy tokens agree"]


def test_demo_judges_fp8_by_the_mean_of_all_tokens():
    from rich.console import Console

    from llama4_kernels.cli.demo import Comparison, Reference, _judge

    def judge(*differences):
        reference = Reference(SimpleNamespace(rounding_sites=lambda: 8), SimpleNamespace())
        whole = torch.tensor([0.5, 1.5])
        return _judge(Console(quiet=True), [Comparison("tokens", 64, torch.tensor(each), whole, 0, 2) for each in differences], reference)

    assert judge([0.4, 0.1], [0.3, 0.1]) == []
    assert judge([0.4, 0.3], [0.3, 0.2]) == ["mean |Δlogprob| 3.0e-01 is over 2.5e-01"]
    assert len(judge([0.1, float("nan")])) == 1


def test_demo_compares_each_token_with_its_own():
    from llama4_kernels.cli.demo import Reference

    def oracle(shift):
        return SimpleNamespace(logprobs=lambda ids: (torch.tensor([-1.0, -2.0, -3.0, -4.0]) + shift, torch.tensor([2, 3, 4, 9])))

    compare = functools.partial(Reference(oracle(0.0), oracle(-0.5)).compare, "chat", [1, 2, 3], [4, 5])
    answer, whole = compare([-3.0, -4.25]), compare([-1.0, -2.0, -3.5, -4.0])
    assert answer.difference.tolist() == [0, 0.25] and whole.difference.tolist() == [0, 0, 0.5, 0]
    assert answer.whole_error.tolist() == [0.5] * 2 and whole.whole_error.tolist() == [0.5] * 4
    assert (answer.length, answer.greedy, answer.generated) == (whole.length, whole.greedy, whole.generated) == (3, 1, 2)
    for logprobs in ([-1.0] * 3, []):
        with pytest.raises(server.ServerError, match=f"{len(logprobs)} logprobs came back for 3 tokens of prompt and 2 of answer"):
            compare(logprobs)


@has_server_needs
@pytest.mark.parametrize("what", ["serve", "cling"])
def test_server_starts_reads_the_table_and_stops_every_process(fake_sglang, tmp_path, what):
    pids = fake_sglang(what)
    with pytest.raises(KeyboardInterrupt):
        with server.serve("model", log=tmp_path / "log", timeout=30) as running:
            assert running.serving() == "Llama4ForCausalLM"
            assert running.backends() == {"route_top1": ("reference", "cuda: not built; triton: cpu (no GPU)")}
            assert running.refusals() == []
            with pytest.raises(server.ServerError, match="/generate answered 400: no such prompt"):
                running.post("/generate", {})
            raise KeyboardInterrupt
    assert are_gone(pids)


def test_what_computed_is_said_with_what_went_elsewhere_since(tmp_path, capsys):
    """Once where every rank says it."""
    from llama4_kernels.cli.demo import print_backends
    from llama4_kernels.tables import new_console

    table = "llama4_kernels: fused_moe -> triton (cuda: the activations' dtype is float32)\nllama4_kernels: rope_qk_norm -> cuda (first)\n"
    refusal = "llama4_kernels: rope_qk_norm is not computed by cuda where head_dim is 512, above 256\n"
    (tmp_path / "log").write_text(f"[TP0] {table}[TP1] {table}[TP0] {refusal}[TP1] {refusal}")
    print_backends(new_console(), server.Server("", tmp_path / "log", None))
    assert capsys.readouterr().out.splitlines() == [
        "fused_moe -> triton (cuda: the activations' dtype is float32)",
        "rope_qk_norm -> cuda (first)",
        "rope_qk_norm is not computed by cuda where head_dim is 512, above 256",
    ]


@has_server_needs
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no PYTHONSAFEPATH; SGLang needs 3.11")
def test_a_server_imports_nothing_of_the_folder_it_is_started_in(fake_sglang, tmp_path, monkeypatch):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    fake_sglang("serve")
    with server.serve("model", log=tmp_path / "log", timeout=30) as running:
        assert running.process.poll() is None


@has_server_needs
def test_a_server_whose_health_check_takes_seconds(fake_sglang, tmp_path):
    """As one of Triton's interpreter does, which computes a token for it."""
    fake_sglang("slow")
    with server.serve("model", log=tmp_path / "log", timeout=30) as running:
        assert running.process.poll() is None


def test_a_server_s_port_is_none_that_the_kernel_gives_to_others():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert {server._free_port() for _ in range(20)} <= set(range(1024, lowest))


@has_server_needs
@pytest.mark.parametrize("what, says", [("die", "ended with exit code 1"), ("hang", "not healthy after 3 s")])
def test_server_that_does_not_start_shows_its_log(fake_sglang, tmp_path, what, says):
    pids, lines = fake_sglang(what), []
    with pytest.raises(server.ServerError, match=says) as caught:
        with server.serve("model", log=tmp_path / "log", timeout=3, progress=lambda seconds, line: lines.append(line)):
            pytest.fail("it served")
    assert "route_top1" in str(caught.value) and str(tmp_path / "log") in str(caught.value)
    assert what == "die" or any("route_top1" in line for line in lines)
    assert are_gone(pids)


@has_server_needs
def test_server_does_not_outlive_a_terminated_parent(fake_sglang, tmp_path):
    pids = fake_sglang("serve")
    code = """
import sys, time
from llama4_kernels.cli import server
server.STOP_SECONDS = 1
with server.serve("model", log=sys.argv[1], timeout=30):
    print("up", flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 128 + signal.SIGTERM
    assert are_gone(pids)


@pytest.fixture
def without_plugin_rows(monkeypatch):
    monkeypatch.setattr(doctor, "plugin", lambda: iter(()))


def test_doctor_reports_every_op_as_json(without_plugin_rows, monkeypatch):
    from llama4_kernels.ops.backend import OPS

    monkeypatch.setenv("LLAMA4_KERNELS_BACKEND", "reference")
    result = invoke("doctor", "--json")
    report = json.loads(result.stdout)
    rows = {row["what"]: row for row in report["rows"]}
    assert result.exit_code == 0 and report["ok"]
    for op in OPS:
        assert rows[f"op {op}"]["found"] == "reference (asked for by LLAMA4_KERNELS_BACKEND)"
    assert torch.__version__.startswith(rows["torch"]["found"].split("+")[0])


def test_doctor_warns_of_a_gpu_without_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device in (0, torch.device("cuda", 0)) else (9, 0))
    first, second = [row for row in doctor.machine() if row.what.startswith("GPU ")]
    assert (first.status, second.status) == ("WARN", "OK") and "bf16 KV cache" in first.advice


@pytest.mark.parametrize(
    "not_built, gpu, status, found",
    [
        ("", None, "OK", "built; there is no GPU here"),
        ("no nvcc that day", None, "WARN", "not built: no nvcc that day"),
        ("no nvcc that day", (9, 0), "WARN", "not built: no nvcc that day"),
        ("", (9, 0), "OK", "built, and made for this GPU"),
        ("", (8, 0), "WARN", "built, but the GPU of a test is not a Hopper GPU (compute capability 9.0)"),
    ],
)
def test_doctor_says_whether_the_cuda_extension_is_built(monkeypatch, not_built, gpu, status, found):
    monkeypatch.setattr(cuda, "why_not_built", lambda: not_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU of a test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    (row,) = [row for row in doctor.machine() if row.what == "CUDA extension"]
    assert (row.status, row.found) == (status, found)


@pytest.mark.parametrize("columns", [40, 80])
def test_doctor_cuts_nothing_off_on_a_narrow_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    found, advice = (f"{word} /{'/'.join(word * 20)}" for word in ("abc", "xyz"))
    doctor._print([doctor.Row("first", "OK", found), doctor.Row("second", "WARN", "", advice)], [])
    shown = "".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert found.replace(" ", "") in shown and advice.replace(" ", "") in shown


@pytest.mark.parametrize("width", range(12, 120, 9))
def test_tables_cut_nothing_off(width):
    titles = ("workload", "by", "µs", "")
    cells = ("route_top1/fp8/maverick/tp8/t8192", "peer sglang", "0.0000123456", "wrong: /a/long/path.json")
    table = new_table(*titles, right=["µs"], title="now / before")
    table.add_row(*cells)
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    assert sorted("".join(console.file.getvalue().split())) == sorted("".join(("now/before", *titles, *cells)).replace(" ", ""))


@has_sglang
@pytest.mark.parametrize(
    "arguments, module, function, console",
    [
        ("demo", "demo", "_demo", 0),
        ("guide --line maverick", "guide", "_run_line", 0),
        ("plan --model scout", "plan.report", "show", 1),
        ("eval --tiny scout --needle", "eval.needle", "run", 0),
    ],
    ids=["demo", "guide", "plan", "eval"],
)
def test_what_is_piped_is_wide_enough_and_has_no_markup(arguments, module, function, console, monkeypatch, tmp_path):
    """In 80 columns a table breaks numbers; `[/]` in an answer or a path is no markup."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    module, seen = importlib.import_module(f"llama4_kernels.cli.{module}"), []

    def print_a_row(*given, **named):
        table = new_table("path", "number")
        table.add_row("[/]" + 100 * "x", "1.2345e-06")
        given[console].print(table)
        seen.append(given[console].width)
        return []

    monkeypatch.setattr(module, function, print_a_row)
    output = invoke(*arguments.split()).output
    assert seen == [PLAIN_WIDTH] and "[/]" + 100 * "x" + "  1.2345e-06" in output


def test_doctor_fails_for_a_backend_that_does_not_exist(without_plugin_rows, monkeypatch):
    monkeypatch.setenv("LLAMA4_KERNELS_BACKEND", "fortran")
    result = invoke("doctor")
    assert result.exit_code == 1 and "fortran" in result.output and "unset LLAMA4_KERNELS_BACKEND" in result.output


def only_failure() -> doctor.Row:
    failures = [row for row in doctor.plugin() if row.status == "FAIL"]
    assert len(failures) == 1
    return failures[0]


def test_doctor_fails_without_sglang(monkeypatch):
    version = importlib.metadata.version

    def without_sglang(package):
        if package == "sglang":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_sglang)
    failure = only_failure()
    assert (failure.what, failure.advice) == ("sglang", 'pip install "llama4_kernels[sglang]"')
    result = invoke("doctor")
    assert result.exit_code == 1 and "FAIL: sglang: not installed" in result.output


@has_sglang
def test_doctor_fails_where_another_plugin_is_asked_for(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    result = invoke("doctor")
    assert result.exit_code == 1 and "SGLANG_PLUGINS=other leaves llama4_kernels out" in result.output


@has_sglang
def test_doctor_fails_without_the_entry_point(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    assert only_failure().what == "entry point"


@has_sglang
def test_doctor_warns_of_an_untested_sglang(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "0.4.0")
    monkeypatch.setattr(doctor, "_picked_up", lambda: doctor.Row("picked up", "OK", ""))
    row = next(doctor.plugin())
    assert (row.what, row.status) == ("sglang", "WARN") and "0.4.0" in row.found


@has_sglang
@pytest.mark.sglang
def test_doctor_is_content_where_sglang_picks_the_plugin_up():
    assert doctor._picked_up().status == "OK"


@has_sglang
@pytest.mark.sglang
@pytest.mark.parametrize(
    "sabotage, cause",
    [
        ("import sys; sys.modules['llama4_kernels.sglang.plugin'] = None", "ModuleNotFoundError"),
        ("import sglang.srt.plugins as p; p.load_plugins = lambda: None", "register() was not called"),
        ("from sglang.srt.plugins.hook_registry import HookRegistry as r; r.register = lambda *arguments, **more: None", "could not hook sglang."),
        ("from sglang.srt.managers.scheduler import Scheduler as s; del s.init_model_config", "could not hook sglang.srt.managers.scheduler"),
        ("from sglang.srt.managers.tokenizer_manager import TokenizerManager as t; del t._init_req_state", "TokenizerManager._init_req_state"),
    ],
    ids=["plugin does not import", "plugins are not loaded", "hooks are lost", "a target is gone", "a target of requests is gone"],
)
def test_doctor_notices_a_plugin_that_sglang_drops(monkeypatch, sabotage, cause):
    monkeypatch.setattr(doctor, "PROBE", sabotage + doctor.PROBE)
    row = doctor._picked_up()
    assert row.status == "FAIL" and cause in row.found
