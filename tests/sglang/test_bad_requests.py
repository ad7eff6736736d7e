"""What should not be asked is refused, and the server lives on."""

import json
import pickle

import requests
from engine import ask, assert_agrees, begin, llama4_server, prompt

from llama4_kernels.cli.checkpoint import VOCABULARY

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "A", "parameters": {}}}

# What SGLang would sample from NaN for, and what the answer says of it. Of equal probabilities top_k takes tokens that end no answer.
SAMPLED_FROM_NAN = (
    ({"top_p": 0.9, "logit_bias": {"5": 1e39}}, "logit_bias"),
    ({"top_p": 0.9, "logit_bias": {"5": 3e38}, "temperature": 0.5}, "logit_bias"),
    ({"top_p": 0.9, "logit_bias": {str(token): -1e39 for token in range(VOCABULARY)}}, "logit_bias"),
    ({"top_p": 0.9, "repetition_penalty": 1e-42}, "repetition_penalty"),
    ({"top_p": 0.9, "min_new_tokens": 4, "stop_token_ids": list(range(VOCABULARY))}, "min_new_tokens is 4, needs a token"),
    ({"top_k": 2, "min_new_tokens": 4, "regex": "a"}, "min_new_tokens is 4, needs a grammar"),
    ({"top_k": 2, "min_new_tokens": 1, "ebnf": 'root ::= ""'}, "min_new_tokens is 1, needs a grammar"),
    ({"temperature": 0, "min_new_tokens": 4, "regex": "a"}, "min_new_tokens is 4, needs a grammar"),
)

# What xgrammar's stack does not last for.
GROUPS = {"type": "string", "pattern": "(" * 30000 + "a" + ")" * 30000}
REFERENCES = {f"a{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(10000)} | {"a10000": {}}


def tokens(count, **params):
    """`count` prompts of four tokens, or one that is in no list."""
    return {"input_ids": [prompt(4)] * count or prompt(4), **params}


# What SGLang answers with status 500: fields of another type or length than it takes them to have.
MISREAD = (
    *(("generate", tokens(0, sampling_params=params)) for params in ({"n": None}, {"n": 0}, {"n": 10**12}, [], [{}, {}], {"choice": ["a"]})),
    *(("generate", tokens(2, sampling_params=params)) for params in ({"n": 0}, {"n": -1}, {"n": 16385}, [{}])),
    *(("generate", tokens(2, return_logprob=True) | short) for short in (
        {"return_logprob": [True]}, {"top_logprobs_num": [1]}, {"logprob_start_len": [0]}, {"token_ids_logprob": [[1]]})),
    *(("generate", tokens(0, rid=rid)) for rid in (["a"], [])),
    ("generate", tokens(0, session_params={"unknown": 1})),
    ("generate", {"text": ["a", "b"], "sampling_params": {"choice": ["a"]}}),
    ("generate", tokens(0, sampling_params={"custom_params": json.loads('{"a": ' * 500 + "1" + "}" * 500)})),
    ("generate", {"input_embeds": []}),
    ("generate", {"input_embeds": [[]]}),
    *(("v1/chat/completions", body) for body in ([], "a", 5)),
    *(("v1/chat/completions", {"model": "tiny", "messages": HELLO, **field}) for field in (
        {"response_format": "json"}, {"response_format": {"type": "json_schema", "schema": "x"}}, {"rid": ["a"]}, {"rid": ["a", "b"]},
        *({"chat_template_kwargs": {name: 5}} for name in ("messages", "tokenize", "add_generation_prompt")))),
    ("classify", {"input_ids": []}),
    ("encode", {"input_ids": []}),
    ("encode", {"text": ["a"], "rid": "x"}),
    ("encode", {"text": "a", "sampling_params": []}),
    ("detokenize", {"tokens": [-1]}),
    ("detokenize", {"tokens": [[1], [VOCABULARY]]}),
    ("parse_function_call", {"text": "a", "tools": [], "tool_call_parser": "unknown"}),
    ("separate_reasoning", {"text": "a", "reasoning_parser": "unknown"}),
    ("remove_external_corpus", [1]),
    ("api/chat", {"model": "tiny", "messages": [], "stream": False}),
    ("api/generate", {"model": "tiny", "prompt": "a", "stream": False, "options": {"temperature": -1}}),
    ("api/generate", {"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 4, "temperature": "x"}}),
    ("api/generate", {"model": "tiny", "prompt": "a" * 3000, "stream": False}),
)  # fmt: skip


def ollama(**options):
    return "api/generate", {"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 4, **options}}


def vertex(**parameters):
    return "vertex_generate", {"instances": [{"text": "a"}], "parameters": parameters}


# What only /generate looks at the types of; elsewhere SGLang's scheduler or detokenizer ends at most of them.
MISTYPED = (
    *(ollama(**options) for options in ({"num_predict": 4.5}, {"num_predict": 1e15}, {"top_k": 1e30}, {"stop": [["a"]]})),
    *(vertex(**parameters) for parameters in (
        {"rid": [5]}, {"received_time": "x"}, {"custom_labels": [1]}, {"unknown": 1}, {"image_data": "a.png"},
        *({"sampling_params": params} for params in ({"skip_special_tokens": "x"}, {"is_normalized": True, "temperature": 0})))),
    ("vertex_generate", {"instances": [{"text": [5]}]}),
    ("v1/chat/completions", {"model": "tiny", "messages": HELLO, "chat_template_kwargs": {"spaces_between_special_tokens": []}}),
)  # fmt: skip

# A template, which might have no end, and arguments that Python does not copy.
TEMPLATE = {"chat_template_kwargs": {"chat_template": "a"}}
DEEP = {"id": "a", "type": "function", "function": {"name": "A", "arguments": '{"a": ' * 600 + "1" + "}" * 600}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
TOO_LONG = "needs at most 29696, 29 for each of the 1024 tokens"  # as long as <|reserved_special_token_10|>


def anthropic(*blocks):
    return {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, *blocks]}]}


# What SGLang would compute for hours, or leave out, and what the answer says of it.
UNSERVED = (
    ("v1/responses", {"input": "a", **TEMPLATE}, "chat_template_kwargs has chat_template"),
    ("v1/decisions", {"input": "a", "questions": [{"id": "a", "type": "yes_no", "question": "a"}], **TEMPLATE},
     "chat_template_kwargs has chat_template"),
    ("v1/systemone", {"model": "tiny", "state": "a", "questions": {"a": {"type": "noul", "instructions": "a"}}, **TEMPLATE},
     "chat_template_kwargs has chat_template"),
    ("v1/responses", {"input": "a", "tool_choice": {"type": "function", "function": "A"}}, "tool_choice has function 'A'"),
    ("parse_function_call", {"text": "a", "tools": [TOOL], "tool_call_parser": "deepseekv3"},
     "tool_call_parser is deepseekv3, needs pythonic"),
    ("separate_reasoning", {"text": "a", "reasoning_parser": "GPT-OSS"}, "reasoning_parser is GPT-OSS"),
    ("v1/score", {"model": "tiny", "query": "a", "items": [[5]], "label_token_ids": [1]}, "query is a text and items has tokens"),
    ("v1/completions", {"model": "tiny", "prompt": "a", "session_params": {"id": "a"}},
     "session_params is given, needs the route /generate"),
    ("v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, "suffix is given"),
    ("v1/completions", {"model": "tiny", "prompt": "a", "best_of": 2}, "best_of is 2, needs at most n, which is 1"),
    *((route, {"model": "tiny", "messages": HELLO, "session_params": {"id": "a"}}, "session_params is given, needs the route /generate")
      for route in ("v1/chat/completions", "invocations")),
    *((route, anthropic(block), "an image has no source that is read")
      for route in ("v1/messages", "v1/messages/count_tokens")
      for block in (IMAGE, {"type": "image", "source": "a.png"}, {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]})),
    ("v1/chat/completions", {"model": "tiny", "messages": [*HELLO, {"role": "assistant", "tool_calls": [DEEP]}, *HELLO]}, "RecursionError"),
    *((f"api/{route}", {"model": "tiny", "format": "json", **question}, "format is given")
      for route, question in (("generate", {"prompt": "a"}), ("chat", {"messages": HELLO}))),
    *((route, {"model": "tiny", **body}, TOO_LONG) for route, body in (
        ("generate", {"text": "a" * 30000}),
        ("generate", {"text": ["a", "a" * 30000]}),
        ("v1/completions", {"prompt": "a" * 30000}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 30000}]}),
        ("v1/responses", {"input": "a" * 30000}),
        ("api/chat", {"messages": [{"role": "user", "content": "a" * 30000}]}),
        ("api/generate", {"prompt": "a" * 30000}))),
)  # fmt: skip

# What SGLang finds at fault after it has sent a status.
STREAMED = (
    ("api/generate", {"model": "tiny", "prompt": "a", "options": {"num_predict": 4, "temperature": -1}}),
    ("api/chat", {"model": "tiny", "messages": HELLO, "options": {"num_predict": 4, "temperature": -1}}),
)

# What SGLang's server ends at, or would compute otherwise than it is asked.
REFUSED = (
    {"input_ids": prompt(2000)},
    {"input_ids": [5, VOCABULARY]},
    {"input_ids": [prompt(4), [-1]]},
    {"text": ""},
    {"text": 7},
    {"input_ids": prompt(4), "sampling_params": {"temperature": -1}},
    {"input_ids": prompt(4), "sampling_params": {"stop_regex": "("}},
    {"input_ids": prompt(4), "sampling_params": {"min_new_tokens": 2, "stop_token_ids": [10000]}},
    {"input_ids": [prompt(4)] * 2, "sampling_params": [{}, {"min_new_tokens": 2, "stop_token_ids": [-1]}]},
    {"input_embeds": [[0.5] * 256] * 4},
    {"input_embeds": [[[0.5] * 256] * 4] * 2},
    {"input_ids": []},
    {"input_ids": [], "session_params": {"id": "of no session"}},
    {"input_ids": prompt(4), "return_logprob": True, "logprob_start_len": -7},
    {"input_ids": prompt(4), "return_logprob": True, "top_logprobs_num": 10000},
    {"input_ids": [prompt(4)] * 2, "return_logprob": [True, False], "top_logprobs_num": [1, 10000]},
    {"input_ids": prompt(4), "sampling_params": {"top_k": 2**31}},
    {"input_ids": prompt(4), "token_indices_to_pool": [3], "sampling_params": {"max_new_tokens": 0}},
    {"input_ids": prompt(4), "session_params": {"id": ["of no session"]}},
    {"input_ids": prompt(4), "lora_id": ["a"]},
    {"input_ids": prompt(4), "return_routed_experts": True},
    *({"text": "a", f"{medium}_data": ["a"]} for medium in ("image", "video", "audio")),
    {"input_ids": prompt(4), "return_hidden_states": []},
    {"input_ids": prompt(4), "return_hidden_states": [False]},
    {"input_ids": prompt(4), "token_ids_logprob": [1] * (VOCABULARY + 1)},
    {"input_ids": prompt(500), "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 320, "sampling_params": {"n": 100}},
    {"input_ids": prompt(4), "sampling_params": {"beam_width": 2}},
    *({"input_ids": prompt(4), "session_params": {"id": "a", name: "x"}} for name in ("replace", "drop_previous_output")),
    {"input_ids": prompt(4), "rid": "HEALTH_CHECK_"},
    *({"input_ids": prompt(4), "custom_logit_processor": processor} for processor in (
        "x", "[]", '{"callable": "00"}', json.dumps({"callable": pickle.dumps(5).hex()}))),
    *({"input_ids": prompt(4), "sampling_params": grammar} for grammar in (
        {"json_schema": json.dumps(GROUPS)},
        {"json_schema": json.dumps({"$ref": "#/$defs/a0", "$defs": REFERENCES})},
        {"json_schema": '{"items": ' * 300 + "{}" + "}" * 300},
        {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": GROUPS}})},
        {"stop_regex": "(" * 500 + "a" + ")" * 500},
    )),
    {},
)  # fmt: skip
REFUSED_QUESTIONS = (
    ("chat/completions", {"messages": [{"role": "user", "content": "a" * 3000}]}),
    ("chat/completions", {"messages": HELLO, "regex": "a", "min_tokens": 10, "max_tokens": 20, "top_k": 2}),
    ("completions", {"prompt": prompt(4), "min_tokens": 2, "stop_token_ids": [10000]}),
    ("chat/completions", {"messages": HELLO, "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": GROUPS}}}),
)  # fmt: skip

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def test_bad_requests_are_refused(make, oracle, tmp_path):
    """And good ones answered after them."""
    path = make("scout")
    # Without the first SGLang refuses input_embeds, without the second it tokenizes the texts of a batch one by one; the third reads prompts too.
    flags = ("--disable-radix-cache", "--enable-tokenizer-batch-encode", "--log-requests", "--enable-custom-logit-processor")
    flags += ("--served-model-name=tiny",)  # which /v1/responses asks for
    with llama4_server(path, *flags, log=tmp_path / "log") as server:
        check_refusals(server)
        check_searches(server)
        answer = ask(server, prompt(70))
        assert_agrees(answer, oracle(path))
        check_other_routes(server, answer)
        check_sessions(server, answer)
        check_aborts(server)
        assert requests.get(f"{server.url}/health_generate", timeout=60).status_code == 200


def check_refusals(server):
    for body in REFUSED:
        assert 400 <= requests.post(f"{server.url}/generate", json=body, timeout=60).status_code < 500, body
    for params, message in SAMPLED_FROM_NAN:
        body = {"input_ids": prompt(4), "sampling_params": {"max_new_tokens": 20} | params}
        refused = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert refused.status_code == 400 and message in refused.text
    for route, question in REFUSED_QUESTIONS:
        assert 400 <= requests.post(f"{server.url}/v1/{route}", json=question | {"model": "tiny"}, timeout=60).status_code < 500
    for route, body in MISREAD + MISTYPED + STREAMED:
        assert requests.post(f"{server.url}/{route}", json=body, timeout=60).status_code == 400, (route, body)
    for route, body, message in UNSERVED:
        refused = requests.post(f"{server.url}/{route}", json=body, timeout=60)
        assert refused.status_code == 400 and message in refused.text, (route, message, refused.text)
    seeded = requests.post(f"{server.url}/api/generate", json={"model": "tiny", "prompt": "a", "options": {"seed": 5}}, timeout=60)
    assert seeded.status_code == 400 and "seed is given" in seeded.text


def check_searches(server):
    """Of stop_regex in an answer, and of tool calls in a text, which Python's own engine would not come to the end of."""
    # The answer is an "a" over and over, of which a search tries all ways to cut it into one or two.
    slow = {"regex": "a{60}", "max_new_tokens": 60, "stop_regex": "(a|aa)+[^a]"}
    refused = requests.post(f"{server.url}/generate", json={"input_ids": prompt(4), "sampling_params": slow}, timeout=60)
    assert refused.status_code == 400 and "a search takes longer than 0.2 s" in refused.text, refused.text
    stopped = {"regex": "a{60}", "max_new_tokens": 60, "stop_regex": "a{7}"}
    assert server.post("/generate", {"input_ids": prompt(4), "sampling_params": stopped})["text"] == "aaaaaaa"
    # Here too, and no call is found.
    calls = {"text": "[A(A=" + "\t)A(A=,\t" * 14, "tools": [TOOL], "tool_call_parser": "pythonic"}
    assert server.post("/parse_function_call", calls)["calls"] == []
    calls |= {"text": 'Now: [A(A="b", C=[1, 2])]'}
    assert json.loads(server.post("/parse_function_call", calls)["calls"][0]["parameters"]) == {"A": "b", "C": [1, 2]}


def check_other_routes(server, answer):
    """answer: greedy, to prompt(70)."""
    assert server.post("/detokenize", {"tokens": [64, 65]})["text"] == "ab"
    predicted = {"instances": [{"input_ids": prompt(70)}], "parameters": {"sampling_params": GREEDY}}
    assert server.post("/vertex_generate", predicted)["predictions"][0]["output_ids"] == answer.generated[:4]
    whole = server.post("/v1/responses", {"model": "tiny", "input": "a", "temperature": 0, "max_output_tokens": 3})
    assert whole["usage"]["output_tokens"] == whole["max_output_tokens"] == 3
    for route, question in (("generate", {"prompt": "a"}), ("chat", {"messages": HELLO})):
        for count in (1, 4.0):
            check_ollama_stream(server, route, {"model": "tiny", "options": {"num_predict": count, "temperature": 0}} | question)


def check_ollama_stream(server, route, body):
    """That it has one last chunk, and the text of an answer in one piece."""
    streamed = requests.post(f"{server.url}/api/{route}", json=body, timeout=60)
    assert streamed.status_code == 200
    chunks = [json.loads(line) for line in streamed.content.splitlines()]
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    whole, *texts = (chunk.get("response") or chunk.get("message", {}).get("content", "") for chunk in (
        server.post(f"/api/{route}", body | {"stream": False}), *chunks))  # fmt: skip
    assert whole and "".join(texts) == whole


def check_sessions(server, answer):
    """A turn without tokens of its own, turns of one rid, and one that replaces them. answer: greedy, to prompt(70)."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000})
    greedy = {"sampling_params": GREEDY}
    first = server.post("/generate", {"input_ids": prompt(70), "session_params": {"id": session}, **greedy})
    turn = {"id": session, "rid": first["meta_info"]["id"]}
    second = server.post("/generate", {"input_ids": [], "session_params": turn, **greedy})
    assert first["output_ids"] + second["output_ids"] == answer.generated[:8]
    for again in (turn["rid"], "a", "a"):
        server.post("/generate", {"input_ids": [5], "rid": again, "session_params": turn, **greedy})
    for replaced in ("a", None):
        turn = {"id": session, "rid": replaced, "replace": True}
        anew = server.post("/generate", {"input_ids": prompt(70), "session_params": turn, **greedy})
    assert anew["output_ids"] == first["output_ids"]


def check_aborts(server):
    """That one ends the request that it names, and none whose rid only begins with that name."""
    params = {"max_new_tokens": 400, "ignore_eos": True}
    answers = [begin(server, {"input_ids": prompt(4), "rid": rid, "sampling_params": params}) for rid in ("job-1", "job-10")]
    assert requests.post(f"{server.url}/abort_request", json={"rid": "job-1"}, timeout=60).status_code == 200
    assert [list(answer)[-1]["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort", "length"]
