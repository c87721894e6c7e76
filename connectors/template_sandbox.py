"""The Jinja sandbox of job templates and of models' chat templates: what a template reaches, and what one row may cost.

Jinja's own sandbox keeps a template from Python; it does not keep it from filling the memory or from never ending.
Here every loop, call, filter and operation is counted, and every text is measured before it is made.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2.sandbox
from jinja2 import nodes
from jinja2.utils import Namespace

MAX_TEXT = 4 * 1024 * 1024
"""Characters that one rendered prompt, or any text made on the way to it, may have."""
MAX_STEPS = 100_000
"""Loop iterations, calls and filters that one row may take, all together."""
_MAX_WORK = 16
"""How often the longest text may be gone through for one row, in all."""
_ITEM = 8
"""What a list's item weighs beside itself, in characters."""
_MANY = (str, bytes, list, tuple)
_MAX_BITS = 1 << 16
_MAX_PLACES = 100
_MAX_EXTRA = 1_000
"""Characters that may be put around each link or before each line of JSON."""


class TemplateLimit(Exception):  # noqa: N818 - a limit that was met, not a fault of ours
    """A row takes more than a template may; the text never holds a value of the row."""


_WIDE = re.compile(r"%[-+ #0]*(\d{5,}|\*)|%[^a-zA-Z%]*\.(\d{5,}|\*)|\{[^{}]*:[^{}]*(\d{5,}|\{)")
"""A format that pads to 10,000 or more characters, or to a width that only its arguments tell."""
_SIZED_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes"})
_REFUSED_METHODS = frozenset({"from_bytes"})
_SCANNING_METHODS = frozenset({"count", "find", "index", "rfind", "rindex"})
"""They go through a text, and give back nothing that would tell by its size how far; so do those named ``is...``."""


class LimitedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits. ``begin`` each row with ``begin()``. Not for use by several threads at once."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(
        self,
        *,
        max_text: int = MAX_TEXT,
        max_steps: int = MAX_STEPS,
        finalize: Callable[[Any], Any] = lambda value: value,
        **options: Any,
    ) -> None:
        super().__init__(finalize=lambda value: self._weighed(finalize(value)), **options)
        self._max_text, self._max_steps = max_text, max_steps
        self._steps = self._work = 0
        del self.globals["lipsum"]
        self.globals["range"] = self._range
        self.concat = self._concat  # type: ignore[method-assign]  # compiled templates take it from here
        # Jinja's types of these two differ, and say less than is so.
        for functions in (self.filters, self.tests):
            named: Any = functions
            named.update({name: self.limited(function) for name, function in named.items()})
        self.filters["bidbeam_counted"] = self._counted
        self.filters["bidbeam_joined"] = self._joined
        self.filters["bidbeam_weighed"] = self._weighed

    def begin(self) -> None:
        """Whatever is counted is counted from here."""
        self._steps = self._work = 0

    def limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that is counted and measured, what goes in and what comes out."""
        name = getattr(function, "__name__", "").removeprefix("sync_").removeprefix("do_").lstrip("_")
        skipped = int(hasattr(function, "jinja_pass_arg"))  # the context or environment comes first

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            own, given = args[:skipped], list(args[skipped:])
            self._step()
            if given and name in _DRAINED and isinstance(given[0], Iterator):
                given[0] = self._drained(given[0])
            self._weigh((given, kwargs))
            if name in _GROWING and given:
                _GROWING[name](self, *given, **kwargs)
            return self._weighed(function(*own, *given, **kwargs))

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as the base has it
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        __self._step()
        if isinstance(owner, str | bytes | int):
            if name in _REFUSED_METHODS:
                raise TemplateLimit(f"{name} is not for templates")
            if name == "join" and args and isinstance(args[0], Iterator):
                args = (__self._drained(args[0]), *args[1:])
            __self._weigh((args, kwargs))
            __self._check_method(owner, name, args, kwargs)
        else:
            __self._weigh((args, kwargs))
        return __self._weighed(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``format_map``, measured as any other call that makes text."""
        made = super().wrap_str_format(value)
        if made is None:
            return None

        @functools.wraps(made)
        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (args, kwargs))
            return made(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for each, times in ((left, right), (right, left)):
                if isinstance(each, _MANY) and isinstance(times, int):
                    self._check_size(len(each) * times)
            if isinstance(left, int) and isinstance(right, int):
                self._check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(abs(right) * left.bit_length())
        elif operator == "%" and isinstance(left, str | bytes):
            self._check_format(left if isinstance(left, str) else left.decode("latin-1"), right)
        elif operator == "+" and isinstance(left, _MANY) and isinstance(right, _MANY):
            self._check_size(len(left) + len(right))
        self._step()
        return self._weighed(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "bidbeam_counted")
        for compare in tree.find_all(nodes.Compare):
            compare.expr = _filtered(compare.expr, "bidbeam_weighed")
            for operand in compare.ops:
                operand.expr = _filtered(operand.expr, "bidbeam_weighed")
        for pair in tree.find_all(nodes.Pair):
            pair.key = _filtered(pair.key, "bidbeam_weighed")
        for holder in tree.find_all(nodes.Node):
            for field, value in holder.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(holder, field, _joined(value))
                elif isinstance(value, list):
                    value[:] = [_joined(each) if isinstance(each, nodes.Concat) else each for each in value]
        return tree

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._weigh(argument)
        return super().getitem(obj, argument)

    # What is counted and measured.

    def _step(self) -> None:
        self._steps += 1
        if self._steps > self._max_steps:
            raise TemplateLimit(f"the template takes more than {self._max_steps} steps")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _drained(self, values: Iterable[Any]) -> list[Any]:
        found: list[Any] = []
        for value in values:
            found.append(value)
            self._check_size(len(found))
        return found

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        if len(made) > self._max_steps:
            raise TemplateLimit(f"a range is longer than {self._max_steps}")
        return made

    def _joined(self, values: list[Any]) -> str:
        return self._concat(str(self._weighed(value)) for value in values)

    def _concat(self, pieces: Iterable[str]) -> str:
        found, length = [], 0
        for piece in pieces:
            length += len(piece)
            self._check_size(length)
            found.append(piece)
        self._worked(length)
        return "".join(found)

    def _weighed(self, value: Any) -> Any:
        self._weigh(value)
        return value

    def _weigh(self, value: Any) -> None:
        """Goes through a value as printing, comparing or hashing it would, and stops where that takes too much."""
        weight, left = 0, [value]
        while left:
            each = left.pop()
            if isinstance(each, str | bytes):
                weight += len(each)
            elif isinstance(each, Mapping):
                weight += _ITEM * len(each)
                self._check_size(weight)
                left += (*each.keys(), *each.values())
            elif isinstance(each, list | tuple | set | frozenset):
                weight += _ITEM * len(each)
                self._check_size(weight)
                left += each
            elif isinstance(each, Namespace):
                left.append(each._Namespace__attrs)  # printed with all it holds
            elif isinstance(each, int):
                self._check_bits(each.bit_length())
            self._check_size(weight)
        self._worked(weight)

    def _worked(self, weight: int) -> None:
        self._work += weight
        if self._work > _MAX_WORK * self._max_text:
            raise TemplateLimit("the template goes through too much text")

    def _check_size(self, size: int) -> None:
        if size > self._max_text:
            raise TemplateLimit(f"a text grows beyond {self._max_text} characters")

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            raise TemplateLimit("a number is too large")

    def _check_format(self, pattern: str, values: Any) -> None:
        if _WIDE.search(pattern):
            raise TemplateLimit("a width in a format is too large")
        self._weigh(values)
        marks = pattern.count("%") + pattern.count("{")
        widths = sum(int(width) for width in re.findall(r"\d{1,4}", pattern)) if marks else 0
        self._check_size(len(pattern) + widths + marks * _longest(values))

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Methods of texts and numbers that make much of little, or go through much for little."""
        if isinstance(owner, str | bytes) and (name in _SCANNING_METHODS or name.startswith("is")):
            self._worked(len(owner))
        if name in _SIZED_METHODS:
            for value in (*args, *kwargs.values()):
                if isinstance(value, int):
                    self._check_size(value * (len(owner) if name == "expandtabs" else 1))
        elif name == "replace" and len(args) > 1:
            _check_replace(self, owner, *args)
        elif name == "join" and args:
            _check_join(self, args[0], owner)
        elif name == "translate" and args and isinstance(args[0], Mapping):
            longest = max((len(each) for each in args[0].values() if isinstance(each, str)), default=1)
            self._check_size(len(owner) * max(longest, 1))


def _filtered(value: Any, name: str) -> Any:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _joined(concat: nodes.Concat) -> Any:
    return _filtered(nodes.List(concat.nodes, lineno=concat.lineno), "bidbeam_joined")


def _longest(values: Any) -> int:
    """The most characters that printing any one of these values may take."""
    if isinstance(values, str | bytes):
        return 6 * len(values)
    if isinstance(values, Mapping):
        return sum(map(_longest, values.values())) + sum(map(_longest, values.keys())) + 4 * len(values)
    if isinstance(values, list | tuple):
        return sum(map(_longest, values)) + 4 * len(values)
    return 400


def _check_replace(box: LimitedSandbox, value: Any, old: Any, new: Any, count: Any = None) -> None:
    if not isinstance(value, bytes):
        value, old, new = str(value), str(old), str(new)
    found = value.count(old)
    if isinstance(count, int) and 0 <= count < found:
        found = count
    box._check_size(len(value) + found * (len(new) - len(old)))


def _check_join(box: LimitedSandbox, values: Any, d: Any = "", *_: Any, **__: Any) -> None:
    box._check_size(len(values) * len(str(d)) if hasattr(values, "__len__") else 0)


def _check_indent(box: LimitedSandbox, s: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    each = width if isinstance(width, int) else len(str(width))
    text = str(s)
    box._check_size(len(text) + (text.count("\n") + 1) * each)


def _check_wrap(box: LimitedSandbox, s: Any, width: Any = 79, *more: Any, **named: Any) -> None:
    # What Jinja hands the text to goes through the rest of a line for each line it makes.
    text, each = str(s), max(width, 1) if isinstance(width, int) else 1
    mark = named.get("wrapstring", more[1] if len(more) > 1 else None) or "\n"
    lines = len(text) // each + text.count("\n") + text.count(" ") + 1
    box._check_size(len(text) + lines * len(str(mark)))
    longest = max(map(len, text.splitlines()), default=0)
    box._worked(len(text) * (longest // (64 * each)))


def _check_number(box: LimitedSandbox, _: Any, number: Any = 0, *__: Any, **named: Any) -> None:
    for each in (number, *named.values()):
        if isinstance(each, int):
            box._check_size(each)
            box._worked(max(each, 0))


def _check_places(_: LimitedSandbox, __: Any, precision: Any = 0, *___: Any, **____: Any) -> None:
    if isinstance(precision, int) and abs(precision) > _MAX_PLACES:
        raise TemplateLimit("a number is to be rounded to too many places")


def _check_extra(_: LimitedSandbox, __: Any, *given: Any, **named: Any) -> None:
    for each in (*given, *named.values()):
        if (each if isinstance(each, int) else len(each) if isinstance(each, str) else 0) > _MAX_EXTRA:
            raise TemplateLimit("what is to stand around each piece of a text is too long")


def _check_printf(box: LimitedSandbox, value: Any, *given: Any, **named: Any) -> None:
    box._check_format(str(value), (given, named))


def _check_sum(_: LimitedSandbox, __: Any, attribute: Any = None, start: Any = 0) -> None:  # noqa: ARG001
    if not isinstance(start, int | float):
        raise TemplateLimit("only numbers are summed")


_GROWING: Mapping[str, Callable[..., None]] = {
    "replace": _check_replace, "join": _check_join, "indent": _check_indent, "center": _check_number,
    "wordwrap": _check_wrap, "batch": _check_number, "slice": _check_number, "round": _check_places,
    "tojson": _check_extra, "urlize": _check_extra, "format": _check_printf, "sum": _check_sum,
}  # fmt: skip
"""By a filter's name: what would make much of little, measured before it does."""
_DRAINED = frozenset({"join", "sum", "list", "batch", "slice", "sort", "unique", "reverse", "tojson", "string"})
