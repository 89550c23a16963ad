"""The small changes of meaning that a file allows, found in its syntax tree and made in its text."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*"}
OPPOSITES = {
    "min": "max", "minimum": "maximum", "amin": "amax", "argmin": "argmax", "fmin": "fmax",
    "floor": "ceil", "any": "all",
}  # fmt: skip
OPPOSITES |= {value: key for key, value in OPPOSITES.items()}


@dataclass(frozen=True)
class Change:
    """One piece of a file's text, from `start` to `end` in bytes, and what it becomes."""

    file: str
    start: int
    end: int
    new: str

    def made_in(self, text: str) -> str:
        """The whole file, changed."""
        source = text.encode()
        return (source[: self.start] + self.new.encode() + source[self.end :]).decode()

    def described(self, text: str) -> tuple[str, str]:
        """(the line as it is, the line as it becomes); of a statement over several lines the first."""
        source = text.encode() + b"\n"
        begin = source.rfind(b"\n", 0, self.start) + 1
        stop = source.find(b"\n", self.start)
        after = source.find(b"\n", self.end)
        old = source[begin:stop].decode().strip()
        return old, (source[begin : self.start] + self.new.encode() + source[self.end : after]).decode().strip()


def changes(file: str, text: str) -> list[Change]:
    """All of a file, in the order of its text."""
    finder = _Finder(file, text)
    finder.visit(ast.parse(text))
    return sorted(set(finder.changes), key=lambda change: (change.start, change.end, change.new))


class _Finder(ast.NodeVisitor):
    """Walks what runs: no annotations, no texts, nothing that only a type checker reads."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.changes: list[Change] = []
        self._source = text.encode()
        self._lines = [0]
        for line in self._source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> str:
        return self._source[self._start(node) : self._end(node)].decode()

    def _becomes(self, node: ast.expr | ast.stmt, new: str) -> None:
        self.changes.append(Change(self.file, self._start(node), self._end(node), new))

    def _between(self, left: ast.expr, right: ast.expr, new: str) -> None:
        """Put another sign between two operands, whose brackets are outside of them."""
        start, end = self._end(left), self._start(right)
        signs = self._source[start:end].decode()
        bare = signs.strip(" ()\n\\")
        if "#" not in signs and bare:
            self.changes.append(Change(self.file, start, end, signs.replace(bare, new, 1)))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit(node.args)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_keyword(self, node: ast.keyword) -> None:
        """`strict=True` is an assertion of ours: that it never fails is what the tests are for."""
        if node.arg != "strict":
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts are what they say; a test of their every word is none that one wants."""

    def visit_Raise(self, node: ast.Raise) -> None:
        self._becomes(node, "pass")

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self._becomes(node.test, f"not ({self._text(node.test)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._becomes(node.test, f"not ({self._text(node.test)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, sign, right in zip((node.left, *node.comparators), node.ops, node.comparators, strict=False):
            self._between(left, right, COMPARISONS[type(sign)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = (isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
        if type(node.op) in ARITHMETIC and not any(texts):
            self._between(node.left, node.right, ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = "or" if isinstance(node.op, ast.And) else "and"
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._becomes(node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._becomes(node, str(not value))
        elif isinstance(value, int):
            for new in (value + 1, value - 1):
                self._becomes(node, str(new) if new >= 0 else f"({new})")
        elif isinstance(value, float):
            self._becomes(node, repr(2 * value if value else 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func
        if isinstance(name, ast.Name) and name.id in OPPOSITES:
            self._becomes(name, OPPOSITES[name.id])
        elif isinstance(name, ast.Attribute) and name.attr in OPPOSITES:
            self._becomes(name, self._text(name).removesuffix(name.attr) + OPPOSITES[name.attr])
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._becomes(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._becomes(node, "pass")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._becomes(node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self._becomes(node, "continue")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def walk(files: dict[str, str]) -> Iterator[Change]:
    """Every change of every file, by name: {file: text}."""
    for file in sorted(files):
        yield from changes(file, files[file])
