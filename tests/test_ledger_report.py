"""The report: one page that tells a ledger's story, fetches nothing, and lets nothing in the ledger become markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_ledger import DAY_A, A, B, attempt, charge, request, run_row, write_run, write_small_ledger

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.ledger_writer import ensure_ledger, write_manifest
from bidbeam.connectors.store import Store
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.report import write_report
from bidbeam.pipelines.report_charts import bar, spread, stacked

NOW = datetime(2026, 11, 23, 7, 30, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"'&<img src=http://evil.example/x onerror=y>{{ 7*191 }}"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store.at(str(tmp_path_factory.mktemp("ledger")))
    write_small_ledger(store)
    return store.url


class Page(HTMLParser):
    """A page taken apart: its tables by caption, the text of its parts, every tag with its attributes."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "rect", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, str] = {}
        self._caption = self._name = ""
        self._text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"h2", "h3", "th", "td", "dt", "dd"}:
            self._text = []
        if tag == "table":
            self.tables.setdefault(self._caption, [])
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        text = "".join(self._text).strip()
        if tag in {"h2", "h3"}:
            self._caption = text
        elif tag in {"th", "td"}:
            self.tables[self._caption][-1].append(text)
        elif tag == "dt":
            self._name = text
        elif tag == "dd":
            self.values[self._name] = f"{self.values.get(self._name, '')} {text}".strip()

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def rows(self, caption: str) -> list[dict[str, str]]:
        heads, *body = self.tables[caption]
        return [dict(zip(heads, row, strict=True)) for row in body]


def page_of(ledger: str, home: Path, **keys: Any) -> tuple[str, Page]:
    written = write_report(ledger, str(home / "report.html"), now=NOW, **keys)
    text = Path(written.output).read_text(encoding="utf-8")
    assert written.size_bytes == len(text.encode())
    return text, Page(text)


def test_the_bill_is_all_there(ledger: str, tmp_path: Path) -> None:
    """Costs by pool, meter, day and tag, to the digits that people read, and the exact ones behind them."""
    text, page = page_of(ledger, tmp_path)
    pools = {row["pool"]: row for row in page.rows("By pool")}
    assert list(pools) == ["own", "chutes", "subnet"]
    assert pools["own"]["idle and other overhead"] == "$0.000099"
    assert pools["subnet"]["in its currency"] == "0.000000015 TAO"
    assert 'title="0.000345138888888500 USD"' in text
    assert {row["meter"] for row in page.rows("By meter")} == {
        "uncached_input", "cached_input", "output", "accelerator_second", "accelerator_idle_second",
    }  # fmt: skip
    assert [row["day"] for row in page.rows("By day (UTC)")] == ["2026-11-22", "2026-11-21"]
    tags = {(row["tag"], row["value"]) for row in page.rows("By tag")}
    assert tags == {("team", "growth"), ("tier", "gold")}
    assert page.values["cost"].startswith("$0.00039")


def test_every_chapter_says_what_the_views_say(ledger: str, tmp_path: Path) -> None:
    """Savings, cache, latency, clearings, failures, reconciliation and prices come out as the ledger has them."""
    _, page = page_of(ledger, tmp_path)
    assert {row["baseline"] for row in page.rows("Against each baseline")} == {"vertex", "plain"}
    cache = {row["pool"]: row for row in page.rows("Cached tokens by pool")}
    assert (cache["chutes"]["from cache"], cache["chutes"]["unreported"], cache["own"]["saved"]) == ("96", "2", "–")  # noqa: RUF001
    (speed,) = page.rows("Latency and throughput by pool")
    assert speed["pool"] == "subnet"
    (clearing,) = page.rows("Clearings")
    assert (clearing["gap"], clearing["regret"], clearing["lots awarded"]) == ("$0.000010", "10.000%", "1 of 1")
    market = {row["pool"]: row for row in page.rows("What each pool bid and won")}
    assert (market["far"]["eligible"], market["far"]["lots won"], market["own"]["lots won"]) == ("0", "0", "1")
    (refused,) = page.rows("Who could not serve, and why")
    assert refused["why it could not serve"] == "jurisdiction US is not in [DE, EEA]"
    dead = {row["reason"]: row["requests"] for row in page.rows("Dead letters by reason")}
    assert dead == {"budget": "1", "invalid": "1"}
    outcomes = {(row["pool"], row["kind"], row["status"], row["error"]) for row in page.rows("Attempts by outcome")}
    assert ("chutes", "primary", "failed", "server") in outcomes
    checked = {row["pool"]: row for row in page.rows("Reported against recounted")}
    assert (checked["chutes"]["input off"], checked["subnet"]["output off"]) == ("+2", "-5")
    assert checked["chutes"]["other model"] == "0"
    prices = {(row["pool"], row["meter"]): row["price"] for row in page.rows("Prices paid")}
    assert prices["chutes", "cached_input"] == "0.01 USD per million"
    assert prices["own", "accelerator_second"] == "0.71 USD per hour"
    (rate,) = page.rows("Exchange rates")
    assert (rate["currency"], rate["dollars for one"]) == ("TAO", "401.5")


def test_the_speed_is_told_of_whole_seconds(ledger: str, tmp_path: Path) -> None:
    """Answers that came within a moment make no peak: no step of the plot is shorter than a second."""
    text, _ = page_of(ledger, tmp_path, run_id=B)
    # One answer that took no time at all, of 1,064 tokens in and 200 out.
    assert "Tokens per second of the answers as they came, in steps of 1.0 s" in text
    assert "at most 1,264 tokens/s" in text


def test_a_report_of_one_run_holds_nothing_of_another(ledger: str, tmp_path: Path) -> None:
    """With a run's id the page is about that run; an unknown id is refused with the nearest."""
    text, page = page_of(ledger, tmp_path, run_id=A)
    assert [row["run"] for row in page.rows("Runs")] == [A]
    assert "subnet" not in text
    assert "TAO" not in text
    assert page.values["answered"].startswith("66.7% 4 of 6 requests")
    assert B not in text
    with pytest.raises(UsageError, match=A):
        write_report(ledger, str(tmp_path / "x.html"), run_id=A[:-1])
    assert not (tmp_path / "x.html").exists()


def test_nothing_is_fetched_and_nothing_runs(ledger: str, tmp_path: Path) -> None:
    """No script, no link but to the page's own chapters, no address at all, and a policy that forbids the rest."""
    text, page = page_of(ledger, tmp_path)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not {"src", "srcset", "xlink:href", "data", "action"} & {name for _, found in page.tags for name in found}
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    ids = {found["id"] for _, found in page.tags if "id" in found}
    links = [found["href"] for tag, found in page.tags if tag == "a"]
    assert {f"#{name}" for name in ids} == set(links)
    policy = [found for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy[0]["content"]).startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_what_the_ledger_says_never_becomes_markup(tmp_path: Path) -> None:
    """Names, tags, errors, hosts and reasons that hold markup, quotes and template syntax are shown as they are."""
    store = Store.at(str(tmp_path / "ledger"))
    tables = {
        "requests": [
            request(A, HOSTILE, 0, attempt_id=b"1" * 16, tenant=HOSTILE, tags=json.dumps({HOSTILE: HOSTILE})),
            request(A, "r2", 1, status="dead", reason=HOSTILE),
        ],
        "attempts": [
            attempt(A, HOSTILE, "a1", HOSTILE, model=HOSTILE, input_tokens=5, output_tokens=5, jurisdiction=HOSTILE,
                    operator=HOSTILE, endpoint_host=HOSTILE),
            attempt(A, HOSTILE, "a2", HOSTILE, status="failed", error_class=HOSTILE, error_message=HOSTILE),
        ],
        "charges": [
            charge(A, DAY_A, HOSTILE, "a1", "p-chutes", "output", "5", pool=HOSTILE, currency=HOSTILE,
                   tags=json.dumps({HOSTILE: HOSTILE}), fx_source=HOSTILE) | {"meter": HOSTILE},
        ],
        "prices": [{"price_id": "p-chutes", "pool": HOSTILE, "meter": HOSTILE, "unit_price": Decimal(1),
                    "currency": HOSTILE, "source": HOSTILE}],
        "bids": [{"run_id": A, "round": 1, "lot_id": "l", "pool": HOSTILE, "eligible": False,
                  "reject_reason": HOSTILE}],
        "baselines": [{"run_id": A, "baseline": HOSTILE, "meter": "output", "unit_price": Decimal("1e-6")}],
    }  # fmt: skip
    write_run(store, run_row(A, DAY_A, HOSTILE, finished_at=NOW, requests=2, served=1, dead=1), tables)
    text, page = page_of(store.url, tmp_path)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert "1337" not in text
    shown = {cell for rows in page.tables.values() for row in rows for cell in row}
    assert HOSTILE in shown
    assert any(found.get("title") == HOSTILE for _, found in page.tags)


def test_a_ledger_with_next_to_nothing_has_a_report(tmp_path: Path) -> None:
    """A run that has only begun gives a page that says so, with dashes for what nobody knows yet."""
    store = Store.at(str(tmp_path / "ledger"))
    with pytest.raises(UsageError, match="is not a ledger"):
        write_report(store.url, str(tmp_path / "x.html"))
    ensure_ledger(store)
    write_manifest(store, run_row(A, DAY_A, "running"), [], 0)
    text, page = page_of(store.url, tmp_path)
    assert page.rows("Runs")[0]["status"] == "running"
    assert "Nothing yet." in text
    assert "No run names a baseline" in text


def test_the_command(ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where the page is, replaces an older one, tells the same as JSON, and refuses a place that is none."""
    target = tmp_path / "page.html"
    target.write_text("older")
    assert invoke(["ledger", "report", ledger, "--output", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert invoke(["ledger", "report", ledger, "-o", str(target), "--run", A, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["runs"]) == (str(target), [A])
    assert told["size_bytes"] == target.stat().st_size
    for place in (tmp_path / "nowhere" / "x.html", tmp_path, "s3://bucket/x.html"):
        assert invoke(["ledger", "report", ledger, "-o", str(place)]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def _shapes(markup: str) -> Iterator[dict[str, str]]:
    for element in ElementTree.fromstring(markup).iter():  # noqa: S314 - our own markup
        yield element.attrib


numbers = st.floats(0, 1e12, allow_nan=False)


@given(numbers, numbers, numbers, st.integers(0, 20))
def test_bars_stay_within_their_room(one: float, two: float, three: float, colour: int) -> None:
    """Whatever the numbers, bars are well-formed and within their axis."""
    low, high, most = sorted((one, two, three))
    for markup in (bar(one, colour), spread(low, high, most, most, colour)):
        for shape in _shapes(markup):
            right = float(shape.get("x", shape.get("x2", 0))) + float(shape.get("width", 0))
            assert 0 <= right <= 101


@given(st.lists(st.lists(numbers, min_size=6, max_size=6), max_size=4))
def test_stacks_touch_the_top_and_no_more(series: list[list[float]]) -> None:
    """Stacked areas lie within the plot, and the highest stack reaches its top."""
    root = list(_shapes(stacked(series)))
    points = [
        float(pair.split(",")[1]) for shape in root for pair in re.findall(r"[-\d.]+,[-\d.]+", shape.get("d", ""))
    ]
    assert all(-0.1 <= y <= 140.1 for y in points)
    if any(map(any, series)) and points:
        assert min(points) < 0.2
