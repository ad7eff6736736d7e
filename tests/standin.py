"""A stand-in for an OpenAI-compatible server, whose answers a test decides."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHARACTERS_PER_TOKEN = 4


@dataclass
class StandIn:
    """answer: text for a prompt, or an int: the status of a refusal; ConnectionResetError in it closes the connection.
    info: its /server_info, None where it has no such route. requests: bodies of what was asked. at_once: most at a time.
    """

    answer: Callable[[str], str | int]
    model: str = "stand-in"
    info: dict[str, Any] | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.requests.append(body)
            self._open += 1
            self.at_once = max(self.at_once, self._open)
        time.sleep(0.01)
        prompt = body["messages"][-1]["content"]
        try:
            answer = self.answer(prompt)
        finally:
            with self._lock:
                self._open -= 1
        if isinstance(answer, int):
            return answer, {"error": {"message": f"refused with {answer}"}}
        message = {"role": "assistant", "content": answer}
        usage = {"prompt_tokens": len(prompt) // CHARACTERS_PER_TOKEN, "completion_tokens": 1, "total_tokens": 1}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {"id": "0", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice], "usage": usage}


class _Server(ThreadingHTTPServer):
    request_queue_size = 512  # a client beyond the default of 5 that connect at once may wait for ever

    def handle_error(self, request, client_address):
        """A client that hangs up is not worth a word."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(answer: Callable[[str], str | int], model: str = "stand-in", info: dict[str, Any] | None = None) -> Iterator[StandIn]:
    """A stand-in that serves within the block."""
    stand_in = StandIn(answer, model, info)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            content = {"/v1/models": {"data": [{"id": stand_in.model}]}, "/server_info": stand_in.info}.get(self.path)
            self._send(404 if content is None else 200, content or {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._send(*stand_in.reply(body))
            except ConnectionResetError:
                self.close_connection = True

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    http = _Server(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
