"""What `mpq explore` answers where something is odd: values, evaluations, scores, a server that is gone."""

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

import mpq_plugins as mpq
from mpq_plugins.report.page.answers import Answers
from mpq_plugins.report.page.server import PageServer
from tests.conftest import Ran
from tests.report.page.opened import Opened
from tests.report.page.served import BUDGET, TABLE, ask, serving


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with serving(Answers(TABLE, "t.mpqt", "mse", ())) as made:
        yield made


def test_two_hosts_are_none(server: PageServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest("GET", server.base, skip_host=True)
    for host in (server.host, "evil.example"):
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"counted": ["codes"]}, "counted"),
        ({"allocator": "mixquant", "qem": 2.0, "metric": ["mse"]}, "metric"),
        ({"allocator": []}, "allocator"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(
    server: PageServer, asked: dict[str, object], named: str
) -> None:
    status, answer = ask(server, f"{server.base}plan", BUDGET | asked)
    assert (status, answer["error"].split(":")[0]) == (400, named)


def test_an_evaluation_that_interrupts_is_an_answer_and_no_end(capfd: pytest.CaptureFixture[str]) -> None:
    def evaluated(*_: object) -> tuple[mpq.SweepRow, ...]:
        raise KeyboardInterrupt

    with serving(Answers(TABLE, "t.mpqt", "mse", (mpq.Uniform(bits=3)(TABLE),), evaluated)) as own:
        status, answer = ask(own, f"{own.base}evaluate", {"point": 0})
        assert (status, "KeyboardInterrupt" in answer["error"]) == (500, True)
        assert ask(own, f"{own.base}plan", BUDGET)[0] == 200
    assert capfd.readouterr().err == ""


def test_an_infinite_score_is_json_all_the_same() -> None:
    row = mpq.SweepRow("uniform", {}, 3, 3, 1, 1, {}, {"perplexity": float("inf"), "accuracy": 0.5})
    answers = Answers(TABLE, "t.mpqt", "mse", (mpq.Uniform(bits=3)(TABLE),), lambda *_: (row,))
    text = json.dumps(answers.evaluate({"point": 0}), allow_nan=False)
    assert json.loads(text)["scores"] == {"perplexity": "Infinity", "accuracy": 0.5}


@pytest.mark.parametrize("options", [("--table", "other.mpqt"), ("--granularity", "per_tensor"), ("--skip", "a")])
def test_a_table_is_served_as_it_is_and_options_for_measuring_are_refused(
    request: pytest.FixtureRequest, tmp_path: Path, options: tuple[str, str]
) -> None:
    run: Callable[..., Ran] = request.getfixturevalue("mpq")
    TABLE.save(tmp_path / "t.mpqt")
    ran = run("explore", tmp_path / "t.mpqt", *options, "--no-browser")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "already measured" in ran.err


@pytest.mark.slow
def test_a_server_that_is_gone_is_said(browser: webdriver.Chrome) -> None:
    with serving(Answers(TABLE, "t.mpqt", "mse", ())) as own:
        browser.get(own.url)
        shown = Opened(browser)
        shown.js("mpq.page.doc.served.base = '/another/'; document.getElementById('exact').click()")
        WebDriverWait(browser, 20, 0.05).until(lambda _: "404" in shown.text("#served-said"))
        shown.js("mpq.page.doc.served.base = arguments[0]", own.base)
    shown.js("document.getElementById('exact').focus()")

    def said(_: object) -> bool:
        """A connection that the browser opened ahead is still answered, by a thread that outlives the server here."""
        if "start mpq explore" in shown.text("#served-said"):
            return True
        shown.js("document.getElementById('exact').click()")  # which does nothing while one is asked
        return False

    WebDriverWait(browser, 20, 0.1).until(said)
    assert shown.js("return document.activeElement.id") == "exact"
    browser.get("about:blank")
