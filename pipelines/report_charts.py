"""A report's plots as inline SVG: pure functions of numbers, which put no text from the ledger into the markup.

Shapes stretch to the room they get; whatever is to be read stands in HTML beside them, so that it keeps its size on a
phone. Colours are the page's variables ``--c0`` to ``--c7``, so that plots follow light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

COLOURS = 8
_BAR_HEIGHT = 8
_AREA = (600.0, 140.0)


def bar(share: float, colour: int = 0) -> Markup:
    """A bar that fills ``share`` (0 to 1) of its width."""
    width = 100 * min(max(share, 0.0), 1.0)
    # Something that is there is seen, however small it is.
    width = max(width, 0.6) if share > 0 else 0.0
    return _svg(
        "bar",
        (100, _BAR_HEIGHT),
        f'<rect class="track" width="100" height="{_BAR_HEIGHT}"/>'
        f'<rect width="{width:.2f}" height="{_BAR_HEIGHT}" style="fill:var(--c{colour % COLOURS})"/>',
    )


def spread(low: float, high: float, most: float, whole: float, colour: int = 0) -> Markup:
    """A range from ``low`` to ``high`` as a bar, with a line on to ``most``, on an axis from 0 to ``whole``."""
    a, b, c = (100 * (value / whole) if whole > 0 else 0.0 for value in (low, high, most))
    return _svg(
        "bar",
        (100, _BAR_HEIGHT),
        f'<rect class="track" width="100" height="{_BAR_HEIGHT}"/>'
        f'<line x1="{b:.2f}" x2="{c:.2f}" y1="4" y2="4" vector-effect="non-scaling-stroke" '
        f'style="stroke:var(--c{colour % COLOURS})"/>'
        f'<rect x="{a:.2f}" width="{max(b - a, 0.8):.2f}" height="{_BAR_HEIGHT}" '
        f'style="fill:var(--c{colour % COLOURS})"/>',
    )


def stacked(series: Sequence[Sequence[float]]) -> Markup:
    """Series of one length each, stacked as areas of steps; the highest stack touches the top."""
    steps = max((len(values) for values in series), default=0)
    top = max((sum(values[at] for values in series) for at in range(steps)), default=0.0)
    if top <= 0:
        return _svg("area", _AREA, "")
    width, height = _AREA
    below = [0.0] * steps
    areas = []
    for number, values in enumerate(series):
        above = [low + value for low, value in zip(below, values, strict=True)]
        up = _steps(above, width / steps, top, height)
        down = _steps(below, width / steps, top, height)
        path = " L".join(f"{x:.1f},{y:.1f}" for x, y in [*up, *reversed(down)])
        areas.append(f'<path d="M{path} Z" style="fill:var(--c{number % COLOURS})"/>')
        below = above
    return _svg("area", _AREA, "".join(areas))


def _svg(kind: str, size: tuple[float, float], shapes: str) -> Markup:
    width, height = size
    return Markup(  # noqa: S704 - made of numbers and of names that stand in this module
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="none" aria-hidden="true">'
        f"{shapes}</svg>"
    )


def _steps(values: Sequence[float], step: float, top: float, height: float) -> list[tuple[float, float]]:
    points = []
    for at, value in enumerate(values):
        y = height * (1 - value / top)
        points += [(at * step, y), ((at + 1) * step, y)]
    return points
