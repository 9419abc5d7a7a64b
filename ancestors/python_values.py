"""What a Python file sets, without running it: the values of its plain assignments.

Other programs keep their settings in Python files. Their syntax tree is walked; literals, arithmetic, choices by index
or key, conditions and a few harmless functions are understood, and everything else is `UNKNOWN`.
"""

from __future__ import annotations

import ast
import math
import operator
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from config import count_values
from errors import UserError

MOST_BYTES = 1_000_000
MOST_ITEMS = 10_000  # of a text or list that is put together, with all that it holds
MOST_WORK = 10_000_000  # items of all values that are put together on the way
MOST_DIGITS = 1e18

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: lambda a, b: a is b or a == b, ast.IsNot: lambda a, b: not (a is b or a == b),
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dict": dict, "list": list, "tuple": tuple, "int": int, "float": float, "bool": bool, "str": str, "len": len,
    "min": min, "max": max, "abs": abs, "round": round, "math.sqrt": math.sqrt, "math.ceil": math.ceil,
    "os.path.join": posixpath.join, "os.path.expanduser": lambda path: path,
}  # fmt: skip
METHODS = ("join", "split", "lower", "upper", "strip", "get", "copy")


class _Unknown(Exception):
    """Only running the file would tell."""


class _UnknownValue:
    def __repr__(self) -> str:
        return "what only running the file would tell"


UNKNOWN = _UnknownValue()


def read_python(path: Path) -> dict[str, Any]:
    """{name: value or UNKNOWN} of the assignments of a file; those of a class `Config`, where there is one, instead.

    Raises:
        UserError: the file cannot be read, or is no Python.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file of settings, nor any file")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{path} is no file of settings: it has more than {MOST_BYTES} bytes")
        tree = ast.parse(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except SyntaxError as error:
        raise UserError(f"{path} is no Python file, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise UserError(f"{path} is no Python file that can be read") from None
    reading = _Reading()
    try:
        reading.block(tree.body)
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    own = {name.removeprefix("self."): value for name, value in reading.names.items() if name.startswith("self.")}
    values = own or reading.names
    if count_values(values, 10 * MOST_ITEMS) > 10 * MOST_ITEMS:
        raise UserError(f"{path} is no file of settings: it makes more than {10 * MOST_ITEMS} values of them")
    return values


class _Reading:
    """The names of a file as its statements set them, one after the other."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.work = 0

    # --- statements

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if node.value is not None:
                value = self.maybe(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, value)
        elif isinstance(node, ast.AugAssign):
            self.assign(node.target, self.maybe(ast.BinOp(node.target, node.op, node.value)))
        elif isinstance(node, ast.If):
            self.condition(node)
        elif isinstance(node, ast.ClassDef):
            if "config" in node.name.lower():
                self.settings_class(node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.forget(node)

    def settings_class(self, node: ast.ClassDef) -> None:
        """What the class and its `__init__` set count as `self.…`."""
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                self.block(each.body)
            elif isinstance(each, ast.Assign):
                value = self.maybe(each.value)
                for name in (target.id for target in each.targets if isinstance(target, ast.Name)):
                    self.names[name] = self.names[f"self.{name}"] = value

    def condition(self, node: ast.If) -> None:
        try:
            self.block(node.body if self.value(node.test) else node.orelse)
        except _Unknown:
            self.forget(node)

    def assign(self, target: ast.expr, value: Any) -> None:
        name = dotted(target)
        if name:
            self.names[name] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            count = len(target.elts)
            values = value if isinstance(value, (tuple, list)) and len(value) == count else [UNKNOWN] * count
            for each, item in zip(target.elts, values, strict=True):
                self.assign(each, item)
        elif isinstance(target, ast.Subscript):
            self.change(target, value)

    def change(self, target: ast.Subscript, value: Any) -> None:
        """`names[key] = value`; with an unknown key all of it is unknown."""
        try:
            container, key = self.value(target.value), self.value(target.slice)
            container[key] = value
        except (_Unknown, TypeError, LookupError):
            self.forget(ast.Expr(target))

    def forget(self, node: ast.stmt) -> None:
        """What a statement that is not followed may set."""
        for name in changed_names(node):
            self.names[name] = UNKNOWN

    # --- expressions

    def maybe(self, node: ast.expr) -> Any:
        """The value of an expression, or UNKNOWN."""
        try:
            return self.value(node)
        except _Unknown:
            return UNKNOWN

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; raises `_Unknown`. In containers unknown items stand as UNKNOWN."""
        handler = getattr(self, f"of_{type(node).__name__.lower()}", None)
        if handler is None:
            raise _Unknown
        try:
            value = handler(node)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            raise _Unknown from None
        count = len(value) if isinstance(value, str) else count_values(value, MOST_ITEMS)
        self.work += count  # lists of lists may hold the same ones again and again
        if (
            value is UNKNOWN
            or count > MOST_ITEMS
            or self.work > MOST_WORK
            or (isinstance(value, int) and abs(value) > MOST_DIGITS)
        ):
            raise _Unknown
        return value

    def of_constant(self, node: ast.Constant) -> Any:
        return node.value

    def of_name(self, node: ast.Name) -> Any:
        return self.names[node.id]

    def of_attribute(self, node: ast.Attribute) -> Any:
        return self.names[dotted(node)]

    def of_list(self, node: ast.List) -> list:
        return [self.maybe(item) for item in node.elts]

    def of_tuple(self, node: ast.Tuple) -> tuple:
        return tuple(self.maybe(item) for item in node.elts)

    def of_dict(self, node: ast.Dict) -> dict:
        result: dict = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if key is None:
                result.update(self.value(item))
            else:
                result[self.value(key)] = self.maybe(item)
        return result

    def of_subscript(self, node: ast.Subscript) -> Any:
        return self.value(node.value)[self.value(node.slice)]

    def of_slice(self, node: ast.Slice) -> slice:
        return slice(*(None if part is None else self.value(part) for part in (node.lower, node.upper, node.step)))

    def of_unaryop(self, node: ast.UnaryOp) -> Any:
        return SIGNS[type(node.op)](self.value(node.operand))

    def of_binop(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(left, str) and isinstance(node.op, ast.Mod):
            raise _Unknown  # a format can be as wide as it likes
        if isinstance(node.op, ast.Mult):
            sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
            times = [side for side in (left, right) if isinstance(side, int)]
            if sizes and times and sizes[0] * times[0] > MOST_ITEMS:
                raise _Unknown
        return OPERATORS[type(node.op)](left, right)

    def of_boolop(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)
        for part in node.values:
            value = self.value(part)
            if bool(value) == stops:
                break
        return value

    def of_compare(self, node: ast.Compare) -> bool:
        values = [self.value(part) for part in (node.left, *node.comparators)]
        pairs = zip(node.ops, values[:-1], values[1:], strict=True)
        return all(OPERATORS[type(sign)](left, right) for sign, left, right in pairs)

    def of_ifexp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def of_call(self, node: ast.Call) -> Any:
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value) if keyword.arg is None else {keyword.arg: self.maybe(keyword.value)}
            named.update(value)
        name = dotted(node.func)
        if name in FUNCTIONS:
            return FUNCTIONS[name](*(self.value(each) for each in node.args), **named)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            return getattr(self.value(node.func.value), node.func.attr)(*(self.value(each) for each in node.args))
        raise _Unknown


def dotted(node: ast.expr) -> str:
    """`self.size` of the node that says so; empty for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def changed_names(node: ast.AST) -> Iterator[str]:
    """The names that a statement, or any within it, sets or changes."""
    for each in ast.walk(node):
        target: Any = each
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, (ast.Name, ast.Attribute)) and isinstance(getattr(each, "ctx", None), ast.Store):
            yield dotted(target)
