"""A job's prompt template: Jinja in a sandbox, over a row's columns, with limits on what one row may cost."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import meta, nodes

from bidbeam.connectors.errors import ConfigError

MAX_TEXT = 4 * 1024 * 1024
"""Characters that one rendered prompt, or any text made on the way to it, may have."""
MAX_STEPS = 100_000
"""Loop iterations that one row may take, all its loops together."""


class TemplateProblem(ValueError):  # noqa: N818 - named for what it says
    """A row that the template does not render; the text never holds a value of the row."""


class PromptTemplate:
    """A compiled template. Renders one row at a time; not for use by several threads at once."""

    def __init__(self, text: str) -> None:
        self._environment = _Environment(
            undefined=jinja2.StrictUndefined, finalize=_no_null, autoescape=False, auto_reload=False
        )
        try:
            tree = self._environment.parse(text)
            self.names = frozenset(meta.find_undeclared_variables(tree))
            """Every name the template looks up; a column of that name gives its value."""
            self.columns = self.names - {*self._environment.globals}
            """The names that only a column can give."""
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"line {error.lineno} of the template: {error.message}",
                key="prompt.template",
                expected="a Jinja template over the input's columns",
            ) from None
        except (RecursionError, jinja2.TemplateError) as error:
            raise ConfigError(
                f"the template does not compile ({type(error).__name__})", key="prompt.template"
            ) from None
        self._text = text

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row, of at most MAX_TEXT characters. Raises TemplateProblem."""
        self._environment.steps = 0
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(row):
                length += len(piece)
                _check_size(length)
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()
        except _Limit as limit:
            raise TemplateProblem(str(limit)) from None
        except Exception as error:  # a template can raise anything that an expression can
            raise TemplateProblem(self._explain(error, row)) from None
        return text

    def _explain(self, error: Exception, row: Mapping[str, Any]) -> str:
        line = _line(error)
        where = f" on line {line}" if line else ""
        said = ""
        if isinstance(error, jinja2.UndefinedError) and error.message:
            # Names that stand in the template are safe to repeat; a name made from a value is not.
            names = re.findall(r"'([^']*)'", error.message)
            if all(name in self._text or name.endswith(" object") for name in names):
                said = f": {error.message}"
        if isinstance(error, _NullError):
            said = ": a value is null"
        nulls = sorted(name for name in self.names if name in row and row[name] is None)
        said += f" (null: {', '.join(nulls)})" if nulls else ""
        return f"{'null value' if isinstance(error, _NullError) else type(error).__name__}{where}{said}"


def compile_template(text: str) -> PromptTemplate:
    """Checks and compiles a template. Raises ConfigError that names the line of the template."""
    return PromptTemplate(text)


class _Limit(Exception):  # noqa: N818 - a limit that was met, not a fault of ours
    pass


class _NullError(Exception):
    pass


def _no_null(value: Any) -> Any:
    # "None" inside a prompt is never what was meant.
    if value is None:
        raise _NullError
    return value


def _line(error: BaseException) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


_WIDE = re.compile(r"%[-+ #0]*(\d{5,}|\*)|\{[^{}]*:[^{}]*(\d{5,}|\{)")
"""A format that pads to 10,000 or more characters, or to a width that only its arguments tell."""
_SIZED_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes"})


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with loops counted and operations that make much of little refused."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        del self.globals["lipsum"]
        self.globals["range"] = self._range
        self.filters["bidbeam_counted"] = self._counted
        for name in ("center", "indent", "format"):
            self.filters[name] = _sized(self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "bidbeam_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise _Limit(f"the template's loops take more than {MAX_STEPS} steps")
            yield value

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        if len(made) > MAX_STEPS:
            raise _Limit(f"a range is longer than {MAX_STEPS}")
        return made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
                    _check_size(len(many) * times)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and abs(right) * left.bit_length() > 4096:
                raise _Limit("a power is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _check_size(len(left) + len(right))
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() + right.bit_length())
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as the base has it
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if name in _SIZED_METHODS:
            for value in (*args, *kwargs.values()):
                if isinstance(value, int):
                    _check_size(value * (len(owner) if name == "expandtabs" and isinstance(owner, str) else 1))
        elif name in {"format", "format_map"} and isinstance(owner, str):
            _check_format(owner)
        return super().call(__context, __obj, *args, **kwargs)


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise _Limit(f"a text grows beyond {MAX_TEXT} characters")


def _check_format(pattern: str) -> None:
    if _WIDE.search(pattern):
        raise _Limit("a width in a format is too large")


def _sized(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing numbers and formats that could make something huge of little."""

    @functools.wraps(function)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, int):
                _check_size(argument)
        if function.__name__ == "do_format" and isinstance(value, str):
            _check_format(value)
        return function(value, *args, **kwargs)

    return checked
