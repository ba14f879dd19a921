"""Chat templates: the Jinja program that comes with a model, run in a sandbox with limits.

Every loop, call, filter, operator and piece of output passes a check of time and size, so that a hostile template ends
with TemplateError without a process or thread of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from time import monotonic
from types import CodeType
from typing import Any, TypeVar

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from chandra.errors import TemplateError
from chandra.text.fallbacks import fallback_template
from chandra.text.tokenizer import Tokenizer

MAX_TEMPLATE = 256 << 10  # characters
MAX_VALUE = 4 << 20  # characters of the output or of any value on the way
MAX_MADE = 16 * MAX_VALUE  # characters of all strings made on the way
MAX_SECONDS = 2.0
MAX_BITS = 4096  # of an integer

_GROWING = {"replace", "join", "indent", "center", "ljust", "rjust", "zfill", "expandtabs", "tojson", "batch", "slice"}
_GROWING |= {"*", "round"}  # round computes 10 ** precision
_DROPPED = {"format", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"}
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)")  # a field width that could fill the memory


class ChatTemplate:
    """A compiled template. Safe to use from several threads.

    `quote` is applied to every string of the messages and tools (see `Tokenizer.quote`). TemplateError when the
    source is too long or no Jinja.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", quote: Callable[[str], str] | None = None
    ) -> None:
        self.source = source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._quote = quote
        if len(source) > MAX_TEMPLATE:
            raise TemplateError(f"the chat template has more than {MAX_TEMPLATE} characters", _HINT)
        self._code = _run(lambda: _compile(source))

    @classmethod
    def of(cls, tokenizer: Tokenizer, arch: str) -> ChatTemplate:
        """The model's own template or, where it has none, one that suits its tokens."""
        names = [tokenizer.token(id) if id is not None else "" for id in (tokenizer.bos_id, tokenizer.eos_id)]
        source = tokenizer.chat_template or fallback_template(tokenizer, arch)
        return cls(source, bos_token=names[0], eos_token=names[1], quote=tokenizer.quote)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text, for `Tokenizer.encode_chat`. `variables` are the template's own (`enable_thinking`, ...).
        TemplateError when the template fails, refuses the messages or passes a limit."""
        given = self._plain({**variables, "messages": list(messages), "tools": list(tools) if tools else None})
        values = {**self._variables, **given, "add_generation_prompt": add_generation_prompt}

        def run() -> str:
            sandbox = _Sandbox()
            return Template.from_code(sandbox, self._code, sandbox.globals).render(values)

        return _run(run)

    def _plain(self, value: Any) -> Any:
        """The value as JSON would hold it, its strings quoted: objects have methods the sandbox does not know."""
        if isinstance(value, str):
            return self._quote(str(value)) if self._quote else str(value)
        if isinstance(value, Mapping):
            return {str(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TemplateError(f"a chat message holds a {type(value).__name__}", "Give strings, numbers, lists and dicts.")


Value = TypeVar("Value")
_HINT = "Use another file of this model, or give a chat template of your own."


def _run(action: Callable[[], Value]) -> Value:
    try:
        return action()
    except TemplateError:
        raise
    except Exception as error:  # a template can raise anything
        raise TemplateError(f"the chat template fails: {str(error)[:500] or type(error).__name__}", _HINT) from error


def _compile(source: str) -> CodeType:
    sandbox = _Sandbox()
    tree = sandbox.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = _through("each", loop.iter)
    for assignment in tree.find_all(nodes.Assign):
        assignment.node = _through("checked", assignment.node)
    for concat in tree.find_all(nodes.Concat):
        concat.nodes = [_through("join", nodes.List(concat.nodes, lineno=concat.lineno))]
    return sandbox.compile(tree)


def _through(name: str, node: nodes.Node) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, for training. Here it only holds its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering and what it has used so far."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants would be computed while compiling, past the checks
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self.checked,
        )
        self._deadline = monotonic() + MAX_SECONDS
        self._made = 0
        self.concat = self._concat  # type: ignore[method-assign]
        filters = {name: filter for name, filter in self.filters.items() if name not in _DROPPED} | {"tojson": _tojson}
        self.filters = {name: self._guarded(name, filter) for name, filter in filters.items()}
        self.filters |= {"each": self.each, "checked": self.checked}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}

    def checked(self, *values: Any) -> Any:
        """The first value, once the time and the size of all have been found within the limits."""
        if monotonic() > self._deadline:
            raise TemplateError(f"the chat template runs longer than {MAX_SECONDS:g} s", _HINT)
        _weigh(values)
        return values[0] if values else None

    def made(self, value: Value) -> Value:
        """A new value, counted."""
        size = _weigh(value)
        self._made += size if isinstance(value, str) else 1
        if self._made > MAX_MADE:
            raise TemplateError(f"the chat template makes more than {MAX_MADE} characters", _HINT)
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        self.checked(items)
        for item in items:
            self.checked()
            yield item

    def _concat(self, parts: Iterable[str]) -> str:
        kept, size = [], 0
        for part in parts:
            kept.append(self.checked(part))
            size += len(part)
            if size > MAX_VALUE:
                raise TemplateError(f"the chat template writes more than {MAX_VALUE} characters", _HINT)
        return self.made("".join(kept))

    def _guarded(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(filter)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.checked(args, kwargs)
            _bound_growth(name, (*args[args[0] is self or isinstance(args[0], EvalContext) :], *kwargs.values()))
            return self.made(filter(*args, **kwargs))

        return run

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.checked(args, kwargs)
        if isinstance(obj, LoopContext):  # a recursive loop
            args = (self.each(args[0]), *args[1:])
        elif isinstance(owner := getattr(obj, "__self__", None), str):
            _bound_growth(obj.__name__, (owner, *args, *kwargs.values()))
        return self.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.checked(left, right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateError("the chat template computes an integer without bounds", _HINT)
        elif operator == "*":
            _bound_growth("*", (right, left) if isinstance(left, int) else (left, right))
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError(f"the format {left[:80]!r}")
        return self.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes) or (isinstance(obj, str) and attr == "encode"):
            return False  # their methods make bytes, whose sizes are not checked
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(value.__self__, str):
            raise SecurityError("str.format is not offered")
        return None


def _weigh(value: Any) -> int:
    """About the bytes a value has when written out; TemplateError when there are more than MAX_VALUE."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        total += 8  # a pointer
        if isinstance(item, Namespace):
            item = item._Namespace__attrs
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, Collection) and not isinstance(item, range):
            left += item
        if total + 8 * len(left) > MAX_VALUE:
            raise TemplateError(f"the chat template makes a value of more than {MAX_VALUE} characters", _HINT)
    return total


def _bound_growth(name: str, values: Sequence[Any]) -> None:
    """Refuse an operation whose result could be as long as the product of its first and another operand."""
    if name in _GROWING:
        counts = (abs(value) if isinstance(value, int) else _weigh(value) for value in values[1:])
        if _weigh(values[0]) * max(counts, default=1) > MAX_MADE:
            raise TemplateError(f"the chat template makes too long a text with {name!r}", _HINT)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(f"the chat template refuses: {message}", "Change the messages as it asks.")


def _strftime_now(format: str) -> str:
    if len(format) > 200 or _WIDE.search(format):
        raise SecurityError(f"the format {format[:80]!r}")
    return datetime.now().strftime(format)
