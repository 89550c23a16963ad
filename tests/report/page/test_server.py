"""`mpq explore`: who gets an answer, and that answers are the library's."""

import http.client
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

import mpq_plugins as mpq
from mpq_plugins.cli.demo.net import digit_net
from mpq_plugins.common.store import Store
from mpq_plugins.errors import SettingError
from mpq_plugins.report.page.answers import Answers, evaluator
from mpq_plugins.report.page.document import page_of_table
from mpq_plugins.report.page.server import PageServer
from tests.conftest import Ran
from tests.report.page.nets import demo_table
from tests.report.page.opened import Opened
from tests.report.page.served import BUDGET, TABLE, ask, serving

Mpq = Callable[..., Ran]


@pytest.fixture
def mpq_cli(request: pytest.FixtureRequest) -> Mpq:
    made: Mpq = request.getfixturevalue("mpq")
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with serving(Answers(TABLE, "t.mpqt", "mse", (mpq.Uniform(bits=3)(TABLE),))) as made:
        yield made


def test_the_page_is_under_its_token_alone(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32
    assert ask(server, server.base)[0] == 200
    for path in (
        "/",
        "/index.html",
        f"/{server.token[:-1]}/",
        f"/{server.token}x/",
        f"{server.base}../",
        "//",
        "/%C3%A9/",
    ):
        status, said = ask(server, path)
        assert status == 404, path
        assert "<" not in str(said)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example"},
        {"Host": "localhost"},
        {"Host": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_nothing_is_reachable_from_another_origin(server: PageServer, headers: dict[str, str]) -> None:
    for path, body in ((server.base, None), (f"{server.base}progress", None), (f"{server.base}plan", BUDGET)):
        assert ask(server, path, body, headers)[0] == 403


def test_no_other_page_may_read_or_frame_it(server: PageServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", server.base, headers={"Host": server.host})
    answer = connection.getresponse()
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert answer.getheader("X-Frame-Options") == "DENY"
    assert answer.getheader("Cache-Control") == "no-store"
    answer.read()
    connection.close()


@pytest.mark.parametrize("parts", [False, True])
def test_budget_is_the_exact_one(server: PageServer, parts: bool) -> None:
    asked = BUDGET | {"parts": parts, "pins": [["b[0]", 6]]}
    status, answer = ask(server, f"{server.base}plan", asked)
    assert status == 200
    plan = mpq.Budget(average_bits=4, parts=parts, pin=(r"re:b\[0\]=6",))(TABLE)
    assert answer["json"] == plan.to_json()
    assert answer["total_bits"] == plan.size().total_bits
    assert "--pin 're:b\\[0\\]=6'" in answer["command"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"allocator": "other"}, "allocator"),
        (BUDGET | {"budget": "x"}, "average_bits"),
        (BUDGET | {"budget": 0.1}, "cannot be reached"),
        (BUDGET | {"sensitivity": "kl"}, "kl"),
        (BUDGET | {"pins": "x"}, "pins"),
        (BUDGET | {"pins": [["nowhere", 4]]}, "nowhere"),
        ({"point": 7}, "point"),
        ({"allocator": "mixquant", "qem": 1.5}, "metric"),
    ],
)
def test_what_cannot_be_is_one_line(server: PageServer, asked: dict[str, Any], named: str) -> None:
    status, answer = ask(server, f"{server.base}plan", asked)
    assert status == 400
    assert named in answer["error"]
    assert "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Length": "99999999999"}, 400),
        (b"{}", {"Content-Length": "-1"}, 400),
    ],
)
def test_a_request_that_is_none(server: PageServer, body: bytes, headers: dict[str, str], status: int) -> None:
    if "Content-Length" not in headers:
        assert ask(server, f"{server.base}plan", body, headers)[0] == status
        return
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(
        "POST",
        f"{server.base}plan",
        body=body,
        headers={"Host": server.host, "Content-Type": "application/json"} | headers,
    )
    assert connection.getresponse().status == status
    connection.close()


def test_without_an_evaluation_it_says_what_to_add(server: PageServer) -> None:
    status, answer = ask(server, f"{server.base}evaluate", {"point": 0})
    assert (status, "--eval" in answer["error"]) == (400, True)


def test_one_thing_at_a_time(server: PageServer) -> None:
    with server.answers.work.lock:
        assert ask(server, f"{server.base}plan", BUDGET)[0] == 409
    assert ask(server, f"{server.base}plan", BUDGET)[0] == 200


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_browser_solves_and_evaluates(browser: webdriver.Chrome, tmp_path: Path) -> None:
    table, net = demo_table(), digit_net()
    said: list[str] = []

    def score(model: Any) -> float:
        said.append("evaluated")
        if len(said) > 2:
            raise RuntimeError("the data are gone")
        return 0.5

    with Store(tmp_path / "kept") as store:
        page = page_of_table(table, "net.mpqt", {}, title="net")
        plans = tuple(point.plan for point in page.points)
        answers = Answers(table, "net.mpqt", "mse", plans, evaluator(net, score, None, None, store))
        with serving(answers, page) as server:
            browser.get_log("browser")  # type: ignore[no-untyped-call]
            browser.get(server.url)
            shown = Opened(browser)

            def until(condition: str) -> None:
                WebDriverWait(browser, 30, 0.05).until(lambda _: shown.js(f"return {condition}"))

            shown.js("mpq.change({budget: 3}); document.getElementById('exact').click()")
            until("mpq.page.plan.json")
            assert shown.js("return mpq.page.plan.json") == mpq.Budget(average_bits=3, parts=False)(table).to_json()
            shown.js("document.getElementById('evaluate').click()")
            until("document.getElementById('tiles').textContent.includes('score')")
            assert "0.5" in shown.text("#tiles")
            assert shown.js("return mpq.page.plan.request.budget") == 3
            shown.js("mpq.choose(0); document.getElementById('evaluate').click()")
            until("document.getElementById('served-said').textContent.includes('gone')")
            entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
            assert [one["message"] for one in entries if "400" not in one["message"]] == []
            browser.get("about:blank")


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_and_the_measurement_is_kept(mpq_cli: Mpq, tmp_path: Path) -> None:
    kept = tmp_path / "kept.mpqt"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = mpq_cli(
            "explore", "mpq_plugins.cli.demo.net:digit_net", "--table", kept, "--port", port, "--no-browser", "-q"
        )
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert str(port) in ran.err
    assert mpq.LayerTable.load(kept).bits == tuple(range(1, 9))
    with pytest.raises(SettingError, match="70000"):
        PageServer(70000, Answers(TABLE, "t", None, ()), lambda base: base)


@pytest.mark.slow
def test_explore_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "t.mpqt")
    command = [sys.executable, "-m", "mpq_plugins", "explore", str(tmp_path / "t.mpqt"), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line
        finally:
            process.terminate()
            _, said = process.communicate(timeout=30)
    assert process.returncode not in (0, 1)
    assert "Traceback" not in said
