"""Weights loaded into a model that serves, through SGLang's own endpoints."""

import base64
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import engine_standins
import pytest
import requests
import torch
from engine import ask, assert_agrees, llama4_server, prompt
from recorded_graph import REPLAYED
from safetensors.torch import load_file, save_file
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.utils import MultiprocessingSerializer
from torch import nn
from transformers import AutoConfig

from llama4_kernels.cli import checkpoint_files
from llama4_kernels.cli.server import Server
from llama4_kernels.sglang import updates
from llama4_kernels.sglang.checkpoint import CheckpointError
from llama4_kernels.sglang.model import Llama4ForConditionalGeneration

LENGTHS = (5, 70, 130)
NORM = "language_model.model.norm.weight"


def post(server: Server, endpoint: str, **body) -> tuple[int, str]:
    answer = requests.post(f"{server.url}/{endpoint}", json=body, timeout=120)
    return answer.status_code, answer.json()["message"]


def update(server: Server, path, **body) -> tuple[int, str]:
    return post(server, "update_weights_from_disk", model_path=str(path), **body)


def send(server: Server, tensors: list[tuple[str, torch.Tensor]]) -> tuple[int, str]:
    return post(
        server, "update_weights_from_tensor", serialized_named_tensors=[MultiprocessingSerializer.serialize(tensors, output_str=True)]
    )


def changed(path, out, change):
    """A copy of the checkpoint in one file at `path`, its tensors changed."""
    out = shutil.copytree(path, out)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def answers(server: Server) -> list[tuple[list[int], torch.Tensor]]:
    return [(answer.generated, answer.logprobs) for answer in (ask(server, prompt(length)) for length in LENGTHS)]


def assert_same(got, wanted) -> None:
    for (tokens, logprobs), (wanted_tokens, wanted_logprobs) in zip(got, wanted, strict=True):
        assert tokens == wanted_tokens and torch.equal(logprobs, wanted_logprobs)


def test_weights_from_a_disk(make, oracle, tmp_path):
    """Those of another checkpoint are served; where they do not fit, the answer says so and those before them are served on. Files other than
    safetensors are found not to fit when part of them is loaded: what is served then is of no use, which the answer says, until they are
    others."""
    path, other, unlike, fp8 = make("scout"), make("scout", seed=1), make("scout", intermediate_size=128), make("scout", fp8="modelopt")
    lacks = changed(path, tmp_path / "lacks", lambda tensors: tensors.pop(NORM))
    cut = shutil.copytree(path, tmp_path / "cut")
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate(1 << 20)
    pickled = shutil.copytree(path, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(path / "model.safetensors")
    torch.save(tensors | {NORM: tensors[NORM][1:]}, pickled / "pytorch_model.bin")
    with llama4_server(path, log=tmp_path / "log") as server:
        assert update(server, other)[0] == 200
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length)), oracle(other))
        for bad, named in (
            (tmp_path / "nothing", "nothing"),
            (unlike, "config.json implies"),
            (lacks, "checkpoint lacks 1 tensors that config.json implies: norm.weight"),
            (cut, f"checkpoint {cut} cannot be read after tensor (none): "),
            (cut, "(model.safetensors ends within tensor "),
            (fp8, "is float8_e4m3fn, the model holds float32"),
        ):
            status, message = update(server, bad)
            assert status == 400 and named in message and message.endswith(updates.UNTOUCHED)
        status, message = update(server, other, load_format="none")
        assert status == 400 and message.endswith(updates.UNTOUCHED)
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length)), oracle(other))

        status, message = update(server, pickled)
        assert status == 400 and f"checkpoint tensor {NORM} has shape [255], config.json implies [256]" in message
        assert message.endswith(updates.IN_PART) and ask(server, prompt(5)).generated
        assert update(server, other)[0] == 200
        for length in LENGTHS:
            assert_agrees(ask(server, prompt(length)), oracle(other))


def test_fp8_weights_from_a_disk_under_graphs(make, tmp_path):
    """A graph reads weights and scales where they were when it was captured."""
    path, other = (make("scout", fp8="modelopt", seed=seed) for seed in (0, 1))
    with llama4_server(other, log=tmp_path / "log") as server:
        wanted = answers(server)
    flags = ("--attention-backend=triton", "--cuda-graph-backend-decode=full", "--cuda-graph-bs-decode", "1")
    environment = engine_standins.environment(tmp_path / "standins")
    with llama4_server(path, *flags, log=tmp_path / "log", environment=environment) as server:
        assert update(server, other)[0] == 200
        assert_same(answers(server), wanted)
        assert REPLAYED.format(mode="DECODE", requests=1, size=1) in server.log.read_text()


def test_weights_as_tensors(make, tmp_path):
    """In pieces, into a server that has no weights yet, with scales before what they are of. What is no update is answered."""
    path, other = (make("scout", fp8="modelopt", seed=seed) for seed in (0, 1))
    with llama4_server(other, log=tmp_path / "log") as server:
        wanted = answers(server)
    tensors = sorted(checkpoint_files.load_weights(other).items(), key=lambda item: (not item[0].endswith("scale"), item[0]))
    name, tensor = tensors[-1]
    with llama4_server(path, "--load-format=dummy", log=tmp_path / "log") as server:
        assert post(server, "begin_weight_update")[0] == 200
        for bad, named in (
            ([(name, tensor[1:])], f"checkpoint tensor {name} has shape"),
            ([(f"{name}_2", tensor)], f"checkpoint tensor {name}_2 has"),
            ([(name, tensor.to(torch.float8_e4m3fn))], f"checkpoint tensor {name} is float8_e4m3fn, the model holds float32"),
            ([name], "Failed to update weights: "),
        ):
            status, message = send(server, bad)
            assert status == 400 and named in message and message.endswith(updates.IN_PART)
        for payload in ([], [base64.b64encode(b"no pickle").decode()]):
            status, message = post(server, "update_weights_from_tensor", serialized_named_tensors=payload)
            assert status == 400 and message.endswith(updates.UNTOUCHED)
        for start in range(0, len(tensors), 40):
            assert send(server, tensors[start : start + 40])[0] == 200
        assert post(server, "end_weight_update")[0] == 200
        assert_same(answers(server), wanted)
        for bad in ({}, {"load_format": "auto"}):  # the server's own format is dummy
            assert update(server, make("scout"), **bad)[0] == 400
        assert_same(answers(server), wanted)


def test_weights_quantised_at_load_are_not_updated(make, tmp_path):
    path, other = make("scout"), make("scout", seed=1)
    with llama4_server(path, "--quantization=fp8", log=tmp_path / "log") as server:
        before = answers(server)
        status, message = update(server, other)
        assert status == 400 and "quantised the weights at load" in message
        assert post(server, "begin_weight_update")[0] == post(server, "end_weight_update")[0] == 200
        assert_same(answers(server), before)


class Group:
    """A rank's view of its group: beside what it says itself, what others say."""

    def __init__(self, *others):
        self.others = others

    def all_gather_object(self, mine):
        return [mine, *self.others]


@pytest.fixture
def ranks(monkeypatch):
    """Sets what other ranks say."""

    def others(*outcomes):
        monkeypatch.setattr(updates, "get_parallel", lambda: SimpleNamespace(tp_group=Group(*outcomes)))

    others()
    return others


def test_a_failure_on_another_rank(ranks):
    """The rank that answers is not the one that failed."""

    def original(updater, tensors, load_format):
        return True, "Success"

    ranks((True, "Success"), (False, "rank 2 failed"))
    assert updates.update_from_tensors(original, None, [], load_format="direct") == (False, "rank 2 failed")
    ranks((True, "Success"))
    assert updates.update_from_tensors(original, None, [], load_format="direct") == (True, "Success")


def test_tensors_that_cannot_be_read(ranks):
    outcome = updates.update_from_tensors(Mock(side_effect=AssertionError("loaded")), None, ValueError("no pickle"))
    assert outcome == (False, f"Failed to update weights: ValueError: no pickle\n{updates.UNTOUCHED}")


class Model(Llama4ForConditionalGeneration):
    """A model with the final norm only, whose weight's loader raises `error`."""

    def __init__(self, path, error=None):
        nn.Module.__init__(self)
        self.config = AutoConfig.from_pretrained(path)
        self.source, self.expects_all, self.has_vision = str(path), True, False
        self.language_model = nn.Module()
        self.language_model.config = self.config.text_config
        self.language_model.model = nn.ModuleDict({"norm": nn.RMSNorm(256)}).requires_grad_(False)
        if error is not None:
            self.get_parameter(NORM).weight_loader = Mock(side_effect=error)


@pytest.mark.parametrize("error", [ValueError("no room"), AttributeError("no room"), KeyError("no room")], ids=repr)
def test_an_error_of_sglangs_loaders_names_the_tensor(error, make):
    model = Model(make("scout"), error)
    model.post_load_weights()
    with pytest.raises(CheckpointError, match=f"checkpoint tensor {NORM} does not fit this model: .*no room"):
        model.load_weights([(NORM, torch.zeros(256))])


def test_all_weights_are_asked_for_where_a_model_has_none(make):
    with pytest.raises(CheckpointError, match="checkpoint lacks"):
        Model(make("scout")).load_weights([(NORM, torch.ones(256))])


def updater(model, path):
    return SimpleNamespace(get_model=lambda: model, model_config=SimpleNamespace(model_path=str(path)))


@pytest.mark.parametrize("keep, asks", [(None, True), (lambda name: name == NORM, False)], ids=["whole", "filtered"])
def test_a_checkpoint_is_asked_for_all_that_was_not_filtered_out(keep, asks, make, tmp_path, monkeypatch, ranks):
    path = changed(make("scout"), tmp_path / "part", lambda tensors: [tensors.pop(name) for name in list(tensors) if name != NORM])
    file = path / "model.safetensors"
    source = SimpleNamespace(use_safetensors=True, weight_files=[file], hf_folder=path)
    loader = Mock(spec=DefaultModelLoader, resolve_model_weights=lambda *args: (source,))
    monkeypatch.setattr(updates, "get_model_loader", lambda *args: loader)
    model = Model(make("scout"))
    found = updater(model, make("scout"))

    def original(updater, model_path, load_format, weight_name_filter, recapture_cuda_graph):
        model.load_weights(load_file(file).items())
        return True, "Success"

    outcome = updates.update_from_disk(original, found, str(path), "auto", weight_name_filter=keep, recapture_cuda_graph=True)
    assert outcome[0] != asks and ("checkpoint lacks" in outcome[1]) == asks
    assert found.model_config.model_path == str(make("scout") if asks else path)
    assert torch.equal(model.get_parameter(NORM), load_file(file)[NORM]) != asks


def test_a_failed_load_is_not_tried_again(make, monkeypatch, ranks):
    """SGLang's way back is to load the same again: had that gone well, new weights would be served as those before."""
    monkeypatch.setattr(updates, "_check", lambda *args: (True, ""))
    model = Model(make("scout"))
    loads = []

    def original(updater, model_path, *args):
        for _ in range(2):
            try:
                model.load_weights(loads.append(model.source) or iter([]))
            except CheckpointError as error:
                failed = error
        raise failed

    outcome = updates.update_from_disk(original, updater(model, make("scout")), "elsewhere", "auto")
    assert outcome[0] is False and "checkpoint lacks" in outcome[1] and outcome[1].endswith(updates.IN_PART)
    assert "load_weights" not in vars(model) and model.source == str(make("scout")) and not model.expects_all


def test_a_checkpoint_that_the_draft_model_cannot_load(ranks):
    original = Mock(side_effect=AssertionError("shapes"))
    outcome = updates.update_draft_from_disk(original, None, "elsewhere", "auto", recapture_cuda_graph=True)
    assert outcome == (False, f"Failed to update weights: AssertionError: shapes\n{updates.IN_PART}")
    original.assert_called_once_with(None, "elsewhere", "auto", recapture_cuda_graph=True)
