"""The Jinja environment chat templates run in: what transformers offers them, bounded in time and size.

Owns the sandbox. Templates come with model files and are not trusted: no attribute that starts with an underscore, no
method that changes what it is called on, no file, no import; every loop turn and macro call looks at the clock, every
string that grows is measured. Knows nothing of messages. Invariant: rendering ends, within the seconds it was given.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 16 * 2**20  # of a rendered prompt, and of any string on the way there; a list holds a 16th of that
DEADLINE = "deadline!"  # a context key that no template can name
_ITEM = 16  # what a member of a list weighs beside a character: a pointer, twice while the list grows
_MAX_NUMBER = 10**6  # for a width or a count
_SIZED = frozenset({"batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap"})  # filters that take one
_WIDE = re.compile(r"[%{][^}]*?(\d{7,}|\*)")  # a width in a format string, or one that comes with the arguments


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """A namespace without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names start with a letter")


class _Guards(NodeTransformer):
    """Writes a tick into every loop and macro, and a measure around everything that joins strings."""

    def _tick(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("measured"), [node], [], None, None).set_lineno(node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "measured", [], [], None, None, lineno=node.lineno)
        return node


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders with the filters, globals and extensions that chat templates are written for."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters["measured"] = self.measured = measured
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _Namespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guards().visit(tree)
        tree.set_environment(self)
        return tree

    @pass_context
    def tick(self, context: Context) -> None:
        """Raise once the time is over."""
        if time.monotonic() > context.parent[DEADLINE]:
            raise jinja2.TemplateRuntimeError("it takes too long")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call a template makes. (A template may pass keywords named self and context.)"""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, method.__name__, (*args, *kwargs.values()))
        return measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, refused where the result would be huge."""
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise SecurityError("an exponent over 64 is refused")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(times, int):
                    _check_size(len(sequence) * times)
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a field as wide as this is refused")
        return measured(super().call_binop(context, operator, left, right))


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is refused what would make it huge."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if name in _SIZED:
            _check_numbers((*given[1:], *kwargs.values()))
        elif name == "replace":
            _check_replace(str(given[0]), *given[1:3])
        elif name == "join":
            _check_join(*given[:2])
        elif name == "format" and _WIDE.search(str(given[0])):
            raise SecurityError("a field as wide as this is refused")
        return measured(function(*args, **kwargs))

    guarded.__dict__.update(
        getattr(function, "__dict__", {})
    )  # how Jinja knows which filters take a context or an environment
    return guarded


def _check_method(text: str, name: str, values: Sequence[object]) -> None:
    if name in ("format", "format_map") and _WIDE.search(text):
        raise SecurityError("a field as wide as this is refused")
    if name == "replace":
        _check_replace(text, *values[:2])
    elif name == "join" and values:
        _check_join(values[0], text)
    _check_numbers(values)


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise SecurityError(f"the argument {value} is refused: here numbers end at {_MAX_NUMBER:,}")


def _check_replace(text: str, old: object = "", new: object = "", *_: object) -> None:
    _check_size(len(text) + text.count(str(old)) * len(str(new)))


def _check_join(values: object, between: object = "", *_: object) -> None:
    if isinstance(values, (list, tuple)):
        _check_size(sum(len(value) if isinstance(value, str) else 1 for value in values))
        _check_size(len(values) * len(str(between)))


def measured(value: Any) -> Any:
    """The value, unless it is too long."""
    if isinstance(value, str):
        _check_size(len(value))
    elif isinstance(value, (list, tuple, dict)):
        _check_size(len(value) * _ITEM)
    return value


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"a value of size {size:,} is refused: the limit is {MAX_CHARACTERS:,}")
