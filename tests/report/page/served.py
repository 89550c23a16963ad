"""A page that is served while a test runs, and requests to it."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpq_plugins.report.page.answers import Answers
from mpq_plugins.report.page.document import PageDocument
from mpq_plugins.report.page.server import PageServer
from mpq_plugins.report.page.writer import page_html
from tests.helpers.synthetic_tables import synthetic_table
from tests.report.page.nets import bare

TABLE = synthetic_table([("a", (8, 8)), ("b[0]", (16, 8)), ("c", (8, 16))], by_channel=True)
BUDGET = {"allocator": "budget", "budget": 4.0, "counted": "codes", "sensitivity": "mse", "pins": [], "parts": False}


@contextmanager
def serving(answers: Answers, page: PageDocument | None = None) -> Iterator[PageServer]:
    shown = page or bare(answers.table)
    served = {"evaluates": answers.evaluated is not None, "parts": answers.by_channel}
    with PageServer(0, answers, lambda base: page_html(shown, {"base": base, **served})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: PageServer, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """The status, and what was answered; headers: instead of a browser's own, "" leaving one out."""
    usual = {"Host": server.host} | ({"Content-Type": "application/json"} if body is not None else {})
    given = {name: value for name, value in (usual | (headers or {})).items() if value}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for name, value in (given | ({"Content-Length": str(len(content))} if body is not None else {})).items():
        connection.putheader(name, value)
    connection.endheaders(None if body is None else content)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    kind = answer.getheader("Content-Type", "")
    return answer.status, json.loads(text) if kind == "application/json" else text.decode()
