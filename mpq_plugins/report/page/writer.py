"""The page as one file: its document, style and scripts inline, and a policy under which nothing else runs or loads."""

import base64
import hashlib
import html
import json
import re
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from ...common.text import printable
from ...errors import SettingError
from .document import PageDocument

ENTRY = "main.js"
LIBRARIES = ("d3-7.9.2.min.js", "plot-0.6.17.min.js")  # the second uses the first
LICENCES = "Charts by Observable Plot and D3, under the ISC licence."
# As in a script element no sequence of these can end it, nor begin a comment; the last two end lines in old scripts.
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
HALVES = re.compile("[\ud800-\udfff]")  # of characters, which UTF-8 has not
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z_]+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ", re.MULTILINE)


def page_html(page: PageDocument, served: dict[str, Any] | None = None) -> str:
    """Write a page as one HTML file.

    It loads nothing. Its policy names its style and scripts by their hashes, so that nothing that a layer is called can
    run. The same document gives the same bytes.

    Args:
        page: What it says.
        served: Of a page that a local server has: where the server is, and what it does; the policy then allows
            requests to it, and to nothing else.

    Returns:
        The file's text.

    Raises:
        SettingError: Something on it is called what no file can hold.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.report.page.document import page_of_plans
        >>> plan = mpq.Uniform()(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8))))
        >>> page_html(page_of_plans({"a.json": plan}, "net")).startswith("<!DOCTYPE html>")
        True
    """
    document = page.document() | ({"served": served} if served is not None else {})
    style = _asset("page.css")
    scripts = [*(_asset(f"vendor/{name}") for name in LIBRARIES), script()]
    filled = {
        "policy": _policy(style, scripts, served is not None),
        "title": html.escape(printable(page.title)),
        "facts": html.escape(_facts(page)),
        "style": style,
        "footer": html.escape(f"Written by mpq-plugins {version('mpq-plugins')}. {LICENCES}"),
        "licences": html.escape(_asset("vendor/LICENSES.txt")),  # which every copy has to have
        "data": embedded(document),
        "scripts": "\n".join(f"<script>{one}</script>" for one in scripts),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _asset("page.html"))
    broken = HALVES.search(text)
    if broken is not None:
        raise SettingError(
            f"page: cannot hold {broken[0]!r}, which is no character; rename the file or layer that has it"
        )
    return text


def embedded(document: Any) -> str:
    r"""JSON that an HTML parser takes for one text, whatever names are in it.

    Examples:
        >>> embedded({"name": "</script>"})
        '{"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: ESCAPED[found[0]], text)


@cache
def script() -> str:
    """The page's modules as one script: those that a module imports before it, and none of their names public."""
    found: dict[str, str] = {}
    graph: dict[str, list[str]] = {}
    open_ = [ENTRY]
    while open_:
        name = open_.pop()
        if name not in found:
            found[name] = _asset(name)
            graph[name] = IMPORT.findall(found[name])
            open_ += graph[name]
    ordered = TopologicalSorter({name: sorted(needs) for name, needs in graph.items()}).static_order()
    bodies = (EXPORT.sub("", IMPORT.sub("", found[name])) for name in ordered)
    return '(() => {\n"use strict";\n' + "\n".join(bodies) + "})();\n"


def _policy(style: str, scripts: list[str], served: bool) -> str:
    """Only this style and these scripts; images that scripts draw; requests to the page's own server, or to none."""
    directives = {
        "default-src": ["'none'"],
        "script-src": [_hash(one) for one in scripts],
        "style-src": [_hash(style)],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        **({"connect-src": ["'self'"]} if served else {}),
    }
    return "; ".join(f"{name} {' '.join(values)}" for name, values in directives.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _facts(page: PageDocument) -> str:
    """What is under the title."""
    layers = len(page.layers)
    said = [f"{layers:,} layer{'s' * (layers > 1)}", f"{sum(map(_numel, page.layers)):,} weights"]
    if page.measured is not None:
        said += [printable(page.measured.file), page.measured.quantizer]
    return "; ".join(said)


def _numel(layer: Any) -> int:
    count = 1
    for side in layer["shape"]:
        count *= side
    return count


@cache
def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
