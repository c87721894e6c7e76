"""Runs against endpoints that fail in every way: nothing is lost, and the ledger is the endpoints' own books."""

from __future__ import annotations

import http.client
import json
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_jobs import check_conserved, make_job, prompts, remote, total, written

from bidbeam.connectors import chaos
from bidbeam.connectors.chaos import GOOD, KINDS, Books, ChaosDouble, Entry, Spell, Timing
from bidbeam.pipelines.run import run

pytestmark = pytest.mark.timeout(120)

PRICES = {"near": {"input": "0.10", "cached_input": "0.01", "output": "0.40"},
          "far": {"input": "0.12", "output": "0.44"},
          "frail": {"input": "0.09", "cached_input": "0.01", "output": "0.38"}}  # fmt: skip
FAILING = {
    "reset": 0.04, "truncated": 0.03, "hang": 0.005, "huge": 0.005, "rate": 0.003, "rate_seconds": 0.01,
    "rate_date": 0.01, "rate_ms": 0.02, "unavailable": 0.007, "server_error": 0.05, "failed_dependency": 0.03,
    "error_inside": 0.03, "html": 0.02, "garbage": 0.02, "empty": 0.01, "few_choices": 0.01,
}  # fmt: skip
ODD = dict.fromkeys(sorted(GOOD), 0.02)
ROWS = 600


def ask(double: ChaosDouble, prompt: str, name: str = "r1", timeout: float = 5) -> tuple[int, bytes]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    request = urllib.request.Request(  # noqa: S310
        f"{double.base_url}/chat/completions", json.dumps(body).encode(), {"X-Request-Id": name}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def by_attempt(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["attempt_id"].hex: row for row in rows}


def hold_to_books(found: Any, books: dict[str, Books]) -> tuple[Decimal, Decimal]:
    """Every attempt against the entry of its request: tokens, and cents. Gives what is charged above the bills where a
    bill cannot be known: answers without a report, and requests that were lost."""
    charges: dict[str, Decimal] = {}
    for charge in found.rows("charges"):
        name = charge["attempt_id"].hex
        charges[name] = charges.get(name, Decimal(0)) + charge["cost"]
    attempts = by_attempt(found.attempts)
    entries: dict[str, tuple[str, Entry]] = {
        entry.request: (pool, entry) for pool, book in books.items() for entry in book.entries
    }
    assert len(entries) == sum(len(book.entries) for book in books.values()), "two requests under one name"
    assert entries.keys() <= attempts.keys(), "asked, and not in the ledger"
    unreported = lost = Decimal(0)
    for name, row in attempts.items():
        charged = charges.get(name, Decimal(0))
        if name not in entries:
            assert (row["status"], row["http_status"]) != ("ok", 200)
            lost += charged
            continue
        pool, entry = entries[name]
        assert row["pool"] == pool
        if row["status"] in ("lost", "cancelled"):
            assert charged >= entry.cost
            lost += charged - entry.cost
        elif not entry.reported:
            assert (row["usage_source"], charged >= entry.cost) == ("estimate", True)
            unreported += charged - entry.cost
        else:
            columns = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens")
            theirs = [entry.prompt_tokens, entry.cached_tokens, entry.cache_write_tokens, entry.completion_tokens]
            assert [row[column] for column in columns] == theirs, (row, entry)
            assert charged == entry.cost, (row, entry)
    return unreported, lost


def test_a_third_fails_one_pool_dies_and_nothing_good_is_lost(tmp_path: Path) -> None:
    """30 % of requests fail in all ways, one pool of three dies half-way, 1 % of rows are poison: every good row is
    served, exactly the poison rows are dead letters, each with its history, and the ledger is the endpoints' books."""
    texts = prompts(ROWS).column("prompt").to_pylist()
    ids: list[str] = [f"q{n}" for n in range(ROWS)]
    refused = {f"q{n}": f"{texts[n]} arsenic" for n in (40, 311)} | {"q207": f"{texts[207]} hemlock"}
    rows = pa.table(
        {
            "id": [*ids, "q5", "empty", "null"],
            "prompt": [*(refused.get(name, text) for name, text in zip(ids, texts, strict=True)), "again", "", None],
        }
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shared: dict[str, Any] = {
        "poison": {"arsenic": "refused", "hemlock": "filtered"},
        "timing": Timing(slow_s=0.1, wait_s=0.05, huge_mib=48),
    }
    rates = {**FAILING, **ODD}
    assert sum(FAILING.values()) == pytest.approx(0.3)
    with (
        ChaosDouble(["tiny"], rates, seed=1, prices=PRICES["near"], **shared) as near,
        ChaosDouble(["tiny"], rates, seed=2, prices=PRICES["far"], spells=[Spell("no_key", 150, 2)], **shared) as far,
        ChaosDouble(["tiny"], rates, seed=3, prices=PRICES["frail"], dies_after=ROWS // 8, **shared) as frail,
    ):
        doubles = {"near": near, "far": far, "frail": frail}
        pools = [
            remote(
                name,
                double.base_url,
                price=PRICES[name],
                timeout="1s",
                capacity={"concurrency": 8, "tokens_per_second": 2000},
            )
            for name, double in doubles.items()
        ]
        job = make_job(tmp_path, rows, pools, auction=None, budget={"max_cost": "1.00"}, tolerate={"dead": "1%"})
        summary = run(job)
        books = {name: double.books() for name, double in doubles.items()}
        assert frail.dead.is_set()
    found = written(job)
    check_conserved(found, ROWS + 3)
    dead = {row["request_id"]: row for row in found.dead.to_pylist()}
    assert sorted(dead) == sorted([*refused, "q5", "empty", "null"])
    assert (summary.status, summary.served) == ("complete", ROWS - 3)
    assert dict(summary.dead) == {"invalid": 3, "refused": 3}
    # Their history: every attempt is in the ledger, the last one says why.
    for name in refused:
        history = [row for row in found.attempts if row["request_id"] == name]
        assert len(history) == dead[name]["attempts"] > 0
        last = max(history, key=lambda row: row["attempt_no"])
        assert last["error_class"] == ("policy" if name == "q207" else "caller")
    attempts = Counter(row["status"] for row in found.attempts)
    asked = {kind for book in books.values() for entry in book.entries if (kind := entry.kind)}
    assert asked >= {*rates} - {"hang", "huge", "rate"}, "some kind of failure never came"
    assert attempts["failed"] > ROWS * 0.25

    # Who died is awarded nothing more while others live.
    assert "frail" not in {row["pool"] for row in found.rows("awards") if row["round"] > 1}

    unreported, lost = hold_to_books(found, books)
    assert found.manifest["cost"] == str(total(found.rows("charges")))
    assert summary.cost == sum((book.cost for book in books.values()), Decimal(0)) + unreported + lost
    assert summary.cost <= Decimal("1.00")
    billed = [entry for book in books.values() for entry in book.entries if entry.kind == "few_choices"]
    assert sum((entry.cost for entry in billed), Decimal(0)) > 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 600, f"{grown:.0f} MiB more"


def test_what_is_written_to_a_cache_is_billed_once(tmp_path: Path) -> None:
    """At its own price where the endpoint tells it, by the ledger as by the endpoint's books, failures included."""
    prices = {**PRICES["near"], "cache_write": "0.125"}
    rates = {"truncated": 0.1, "blank": 0.1, "no_cached": 0.2}
    with ChaosDouble(["tiny"], rates, seed=5, prices=prices, report_written=True) as near:
        job = make_job(tmp_path, prompts(40), [remote("near", near.base_url, price=prices)])
        summary = run(job)
        books = near.books()
    found = written(job)
    check_conserved(found, 40)
    unreported, lost = hold_to_books(found, {"near": books})
    assert summary.cost == books.cost + unreported + lost
    assert unreported == 0
    meters = {row["meter"]: row["quantity"] for row in found.rows("charges") if row["quantity"] > 0}
    assert meters.keys() == {"uncached_input", "cached_input", "cache_write", "output"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_injected_and_booked(kind: str) -> None:
    """Each kind comes when it is named, and the books say what became of the request; the next answer is true."""
    timing = Timing(slow_s=0.05, huge_mib=2)
    with ChaosDouble(["tiny"], script=[kind], prices=PRICES["near"], timing=timing) as double:
        try:
            status, body = ask(double, "one two three four five six", timeout=0.2 if kind == "hang" else 5)
        except OSError:
            status, body = 0, b""
        except http.client.IncompleteRead:
            status, body = 0, b""
        assert ask(double, "something else", "r2")[0] == 200
        while len(double.books().entries) < 2:
            time.sleep(0.02)  # until it has noticed that the client of a reply that hangs is gone
        entries = {entry.request: entry for entry in double.books().entries}
    assert entries["r2"].outcome == "served"
    entry = entries["r1"]
    assert entry.kind == kind
    if kind in GOOD | {"blank", "filtered", "few_choices", "other_model"}:
        assert (status, entry.outcome, entry.cost > 0) == (200, "served", True)
        usage = json.loads(body).get("usage")
        assert (usage is None) == (kind == "no_usage") == (not entry.reported)
        if usage is not None:
            assert usage["completion_tokens"] == entry.completion_tokens
    else:
        assert (entry.outcome, entry.cost) == (
            "dropped" if kind in {"hang", "reset", "truncated", "huge"} else "failed",
            0,
        )


def test_the_schedule_is_the_seed_s() -> None:
    """What a prompt meets depends on the seed and on how often it came, not on the order of requests."""

    def kinds(seed: int, texts: list[str]) -> dict[str, list[str | None]]:
        with ChaosDouble(["tiny"], {"server_error": 0.3, "html": 0.3}, seed=seed) as double:
            for text in texts:
                ask(double, text)
            found: dict[str, list[str | None]] = {}
            for entry in double.books().entries:
                found.setdefault(entry.text, []).append(entry.kind)
        return found

    texts = [f"prompt {n % 8}" for n in range(24)]
    first = kinds(4, texts)
    assert first == kinds(4, sorted(texts, reverse=True)) != kinds(5, texts)
    assert {kind for each in first.values() for kind in each} == {"server_error", "html", None}


def test_a_spell_passes_and_a_dead_endpoint_comes_back() -> None:
    """A spell refuses for so many requests; a double that died takes no connection until it is revived."""
    with ChaosDouble(["tiny"], spells=[Spell("no_funds", 1, 2)], dies_after=4) as double:
        assert [ask(double, f"prompt {n}")[0] for n in range(4)] == [200, 402, 402, 200]
        assert double.dead.wait(5)
        with pytest.raises(OSError, match=r"refused|closed|reset"):
            ask(double, "anybody there")
        double.revive()
        assert ask(double, "and now")[0] == 200


def test_rates_and_kinds_are_checked() -> None:
    """A kind that there is not, and rates beyond 1, are said at once."""
    with pytest.raises(ValueError, match="no kind of failure: fire"):
        ChaosDouble(["tiny"], {"fire": 0.1})
    with pytest.raises(ValueError, match="more than 1"):
        ChaosDouble(["tiny"], {"reset": 0.6, "html": 0.6})


def test_it_serves_from_a_process_of_its_own() -> None:
    """Its first line is its address, its books are read over HTTP, and it ends with its standard input."""
    command = [
        sys.executable, "-m", "bidbeam.connectors.chaos", "--seed", "3", "--rates", '{"server_error": 1.0}',
        "--poison", '{"gold": "no_usage"}', "--prices", json.dumps(PRICES["near"]),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "gold and more"}]}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body), timeout=5) as answer:  # noqa: S310
            assert "usage" not in json.loads(answer.read())
        with urllib.request.urlopen(url.removesuffix("/v1") + "/books", timeout=5) as answer:  # noqa: S310
            books = Books.from_json(json.loads(answer.read()))
        process.communicate(timeout=10)
    (entry,) = books.entries
    assert (entry.outcome, entry.reported, entry.cost == books.cost > 0) == ("served", False, True)


def test_without_anybody_at_its_other_end_it_serves_until_a_signal() -> None:
    """In the background of a script its standard input is at its end from the beginning."""
    command = [sys.executable, "-m", "bidbeam.connectors.chaos"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url.removesuffix("/v1") + "/count", timeout=5) as answer:  # noqa: S310
            assert answer.status == 200
        process.terminate()
        assert process.wait(10) == 0


def test_its_example_is_true(tmp_path: Path) -> None:
    """The example of the module's docstring, run as it stands there."""
    lines = (chaos.__doc__ or "").split("\n\n")[1]
    assert "ChaosDouble" in lines

    def ledger_cost(base_url: str) -> Decimal:
        job = make_job(tmp_path, prompts(40), [remote("near", base_url, price=PRICES["near"])])
        return run(job).cost

    code = "\n".join(line[4:] for line in lines.splitlines())
    code = code.replace("    pool = ...  # base_url: chaos.base_url\n", "").replace(
        "    ...\n", "    ledger_cost = ledger_cost_of(chaos.base_url)\n"
    )
    names = {"ChaosDouble": ChaosDouble, "PRICES": PRICES["near"], "ledger_cost_of": ledger_cost}
    exec(compile(code, "example", "exec"), names)  # noqa: S102
