"""A page served to this machine alone: on 127.0.0.1, under a path that only who started it knows."""

import errno
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ...common.text import printable, what_it_said
from ...errors import MPQError, SettingError
from .answers import Answers

ADDRESS = "127.0.0.1"
LARGEST = 1 << 20  # bytes of a request
SAME_SITE = (None, "same-origin", "none")  # of Sec-Fetch-Site: none is what a person typed
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # stricter ones hide the origin of the page's own requests
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class PageServer(ThreadingHTTPServer):
    """Serves one page and answers it. The token is new with every start, and no other origin gets an answer.

    Attributes:
        token: What the path begins with.
        base: The path of the page, `/TOKEN/`.
        url: Where the page is.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, port: int, answers: Answers, page: Callable[[str], str]) -> None:
        """Listen on a port.

        Args:
            port: 0 for any that is free.
            answers: What the page may ask.
            page: Makes the page's text from the path that it is served under.

        Raises:
            SettingError: The port cannot be had.
        """
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is in use" if taken else f"cannot be had ({error.strerror})"
            raise SettingError(f"port: {port} {why}; name another, or leave --port out for any that is free") from error
        except OverflowError as error:
            raise SettingError(f"port: {port} is not allowed; 0 to 65535") from error
        self.token = secrets.token_urlsafe(24)
        self.base = f"/{self.token}/"
        self.host = f"{ADDRESS}:{self.server_address[1]}"
        self.url = f"http://{self.host}{self.base}"
        self.answers = answers
        self.page = page(self.base).encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "mpq"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, or how far work is."""
        path = self._asked()
        if path == "":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "progress":
            self._answer(HTTPStatus.OK, self.server.answers.work.document())
        elif path is not None:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """A plan, or an evaluation."""
        path = self._asked()
        if path is None:
            return
        answers = self.server.answers
        job = {"plan": answers.plan, "evaluate": answers.evaluate}.get(path)
        if job is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        if self.headers.get("Content-Type") != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
            return
        asked = self._body()
        if asked is None:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        with _alone(answers) as free:
            if not free:
                self._answer(HTTPStatus.CONFLICT, {"error": "another plan is being worked on; wait for it"})
                return
            try:
                found = job(asked)
            except MPQError as error:
                self._answer(HTTPStatus.BAD_REQUEST, {"error": printable(" ".join(str(error).split()))})
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the page says it, and the server goes on
                said = f"internal error: {what_it_said(error)}; please report this"
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": printable(said)})
            else:
                self._answer(HTTPStatus.OK, found)

    def _asked(self) -> str | None:
        """What of the page is asked, the token taken away; None where that was refused."""
        origin = self.headers.get("Origin")
        ours = self.headers.get_all("Host") == [self.server.host] and origin in (None, f"http://{self.server.host}")
        if not ours or self.headers.get("Sec-Fetch-Site") not in SAME_SITE:
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        token, _, path = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return path

    def _body(self) -> dict[str, Any] | None:
        """What a request says; None for what is no JSON object, or too long."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST:
            return None
        try:
            said = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return said if isinstance(said, dict) else None

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status, f"{status.phrase}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, document: Any) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | HEADERS).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for results."""


@contextmanager
def _alone(answers: Answers) -> Iterator[bool]:
    """Whether nothing else is being worked on; until the end nothing else is."""
    free = answers.work.lock.acquire(blocking=False)
    try:
        if free:
            answers.work("", 0, 0)
        yield free
    finally:
        if free:
            answers.work("", 0, 0)
            answers.work.lock.release()
