"""A Bot API on loopback: it keeps what it is sent, and answers as a script says."""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qsl

Answer = Callable[["_Handler"], None]


def reply(status: int, body: bytes) -> Answer:
    """Answer with a status and a body."""

    def answer(handler: "_Handler"):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def error(status: int, description: str, **more) -> Answer:
    """Refuse as the Bot API does."""
    return reply(status, json.dumps({"ok": False, "error_code": status, "description": description, **more}).encode())


taken = reply(200, b'{"ok": true, "result": {"first_name": "Lab Bot", "username": "lab_bot"}}')


def reset(handler: "_Handler"):
    """Begin an answer and break the connection."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def hang(handler: "_Handler"):
    """Say nothing for longer than the tests wait."""
    time.sleep(1)


class BotApi:
    """A server at `url`, as a context manager, with the `requests` that came; `script` answers the next ones."""

    def __init__(self):
        self.requests: list[SimpleNamespace] = []
        self.script: list[Answer] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.api = self
        self._server.handle_error = lambda *args: None  # a client that went away
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def messages(self) -> list[SimpleNamespace]:
        """The requests that send something, and do not only ask whose the token is."""
        return [request for request in self.requests if request.method != "getMe"]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        api, body = self.server.api, self.rfile.read(int(self.headers["Content-Length"]))
        (_, bot, method), fields = self.path.split("/"), dict(parse_qsl(body.decode()))
        request = SimpleNamespace(body=body, token=bot.removeprefix("bot"), method=method, at=time.monotonic())
        request.chat, request.text = fields["chat_id"], fields.get("text", "")
        api.requests.append(request)
        (api.script.pop(0) if api.script else taken)(self)

    def log_message(self, *args):
        pass


def closed_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken_and_left:
        taken_and_left.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken_and_left.getsockname()[1]}"
