"""A job's prompt template: Jinja in a sandbox, over a row's columns, with limits on what one row may cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.template_sandbox import MAX_TEXT, LimitedSandbox, TemplateLimit

_FAULTS = (RecursionError, MemoryError, SyntaxError, ValueError, jinja2.TemplateError)
"""What else a template can fail with that does not compile; Python's own compiler has limits of its own."""


class TemplateProblem(ValueError):  # noqa: N818 - named for what it says
    """A row that the template does not render; the text never holds a value of the row."""


class PromptTemplate:
    """A compiled template. Renders one row at a time; not for use by several threads at once."""

    def __init__(self, text: str) -> None:
        self._environment = LimitedSandbox(
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
        except _FAULTS as error:
            raise ConfigError(
                f"the template does not compile ({type(error).__name__})", key="prompt.template"
            ) from None
        self._text = text

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row, of at most MAX_TEXT characters. Raises TemplateProblem."""
        self._environment.begin()
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(row):
                length += len(piece)
                if length > MAX_TEXT:
                    raise TemplateLimit(f"a text grows beyond {MAX_TEXT} characters")  # noqa: TRY301 - as any other
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()
        except TemplateLimit as limit:
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
