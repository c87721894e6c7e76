"""A double of an endpoint that fails, for tests: every failure that endpoints have, on a seeded schedule.

    with ChaosDouble(["tiny"], {"reset": 0.02, "rate": 0.05, "html": 0.01}, seed=7, prices=PRICES) as chaos:
        pool = ...  # base_url: chaos.base_url
        ...
        assert ledger_cost == chaos.books().cost

What becomes of a request is drawn from the seed, the prompt and how often that prompt has come, so the same run meets
the same failures whatever order its requests come in. ``python -m bidbeam.connectors.chaos --help`` serves it from a
process of its own; the books are then at ``/books``, as JSON, and at ``/count`` how many requests have come.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from types import MappingProxyType
from typing import Any

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen, Served

_MILLION = Decimal(1_000_000)
_FOREVER_S = 24 * 3600.0
_CHUNK = b'{"choices":[' + b" " * 2**20

GOOD = frozenset({"slow", "no_usage", "no_cached", "over_report", "many_choices"})
"""Kinds that are odd, but answers."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in seconds, and how large an answer can be."""

    slow_s: float = 0.2
    wait_s: float = 1.0
    """What ``Retry-After`` asks for."""
    huge_mib: int = 64


KINDS: Mapping[str, Callable[[Timing], Reply]] = MappingProxyType(
    {
        "reset": lambda _: Reply(cut="reset"),
        "truncated": lambda _: Reply(cut="truncate"),
        "slow": lambda t: Reply.slow(t.slow_s),
        "hang": lambda _: Reply.slow(_FOREVER_S),
        "rate": lambda _: Reply.error(429, "Too many requests."),
        "rate_seconds": lambda t: Reply.error(429, "Too many requests.", headers={"Retry-After": f"{t.wait_s:g}"}),
        "rate_date": lambda t: Reply.error(429, "Too many requests.", headers={"Retry-After": _date_in(t.wait_s)}),
        "rate_ms": lambda t: Reply.error(
            429, "Too many requests.", headers={"Retry-After-Ms": f"{t.wait_s * 1000:.0f}"}
        ),
        "unavailable": lambda _: Reply.error(503, "There is no capacity."),
        "server_error": lambda _: Reply.error(500, "Internal error."),
        "failed_dependency": lambda _: Reply.error(424, "What is behind this endpoint failed."),
        "error_inside": lambda _: Reply.error_inside(502, "The provider went away."),
        "html": lambda _: Reply.garbage(),
        "garbage": lambda _: Reply.garbage(b'{"choices": [{"mess', "application/json"),
        "empty": lambda _: Reply(body=b""),
        "blank": lambda _: Reply(),
        "no_usage": lambda _: Reply(drop=("usage",)),
        "no_cached": lambda _: Reply(),
        "over_report": lambda _: Reply(),
        "filtered": lambda _: Reply(),
        "other_model": lambda _: Reply(merge={"model": "another-model"}),
        "few_choices": lambda _: Reply(),
        "many_choices": lambda _: Reply(),
        "huge": lambda t: Reply(body=_CHUNK, times=t.huge_mib),
        "refused": lambda _: Reply.error(400, "The request is not valid."),
        "no_key": lambda _: Reply.error(401, "Incorrect API key provided."),
        "no_funds": lambda _: Reply.error(402, "Insufficient funds."),
        "forbidden": lambda _: Reply.error(403, "Forbidden."),
    }
)
"""Every kind of failure that a schedule may name, and the reply that it makes of the true one."""


@dataclass(frozen=True, slots=True)
class Spell:
    """For a while every request fails in one way: the ``requests`` that come after the first ``after``."""

    kind: str
    after: int
    requests: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One request in the double's books. ``request`` is its X-Request-Id, ``text`` a digest of its prompt.

    ``outcome``: ``served``, an answer went out; ``failed``, an error did; ``dropped``, it was begun and no whole answer
    went out. Tokens are those that it is billed for, as reported; ``counted`` is the true output where the report says
    more. None: nothing was generated, or it is not billed. ``reported``: whether the answer told its usage.
    """

    number: int
    request: str
    text: str
    kind: str | None
    outcome: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    counted: int | None = None
    reported: bool = True
    cost: Decimal = Decimal(0)
    cache_write_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Books:
    """What the double did, in the order of its requests, and what it bills for it."""

    entries: tuple[Entry, ...] = ()

    @property
    def cost(self) -> Decimal:
        return sum((entry.cost for entry in self.entries), Decimal(0))

    @property
    def billed(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.prompt_tokens is not None)

    def by_outcome(self) -> Counter[str]:
        return Counter(entry.outcome for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """What ``/books`` tells."""
        totals = {
            name: sum(getattr(entry, name) or 0 for entry in self.entries)
            for name in ("prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens")
        }
        entries = [{**asdict(entry), "cost": f"{entry.cost:f}"} for entry in self.entries]
        return {**self.by_outcome(), **totals, "cost": f"{self.cost:f}", "entries": entries}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Books:
        """Reads what ``/books`` tells."""
        return cls(tuple(Entry(**{**entry, "cost": Decimal(entry["cost"])}) for entry in document["entries"]))


@dataclass(slots=True)
class _Drawn:
    """What was decided on a request when its reply was made."""

    kind: str | None
    tokens: Served | None = None
    counted: int | None = None
    cached_told: bool = True


class ChaosDouble(EndpointDouble):
    """An ``EndpointDouble`` that fails on schedule.

    ``rates``: share of requests by kind (``KINDS``); what they leave answers truly. ``script``: the kind of each of the
    first requests (None: the true answer), before anything is drawn. ``spells``: see ``Spell``. ``poison``: a text and
    the kind that every request with it gets. ``prices``: US dollars for a million tokens: ``input``, ``output`` and,
    where cached ones and those written to its cache cost otherwise, ``cached_input`` and ``cache_write`` (with
    ``report_written``, for what it does not report it does not bill). ``dies_after`` so many requests it takes no more
    connections, and drops those it has, until ``revives_after_s`` or ``revive()``.

    It bills what it reports, an answer without a report as counted, and nothing that it did not deliver whole. Raises
    ValueError for a kind that there is not, and for rates that exceed 1.
    """

    def __init__(
        self,
        models: Sequence[str],
        rates: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        script: Sequence[str | None] = (),
        spells: Sequence[Spell] = (),
        poison: Mapping[str, str] | None = None,
        prices: Mapping[str, str] | None = None,
        timing: Timing | None = None,
        dies_after: int | None = None,
        revives_after_s: float | None = None,
        answers_after_s: float = 0.0,
        port: int = 0,
        **double: Any,
    ) -> None:
        self._rates = dict(rates or {})
        self._poison = dict(poison or {})
        named = {*self._rates, *self._poison.values(), *(k for k in script if k), *(spell.kind for spell in spells)}
        if unknown := named - KINDS.keys():
            raise ValueError(f"no kind of failure: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
        if sum(self._rates.values()) > 1:
            raise ValueError("the rates of failures add up to more than 1")
        self._seed, self._script, self._spells = seed, tuple(script), tuple(spells)
        self._prices = {name: Decimal(value) / _MILLION for name, value in (prices or {}).items()}
        self._timing = timing or Timing()
        self._dies_after, self._revives_after_s = dies_after, revives_after_s
        self._answers_after_s = answers_after_s
        self._times: Counter[str] = Counter()
        self._drawn: dict[int, _Drawn] = {}
        self._entries: list[Entry] = []
        self.dead = threading.Event()
        self._sending = threading.Condition()
        self._under_way = 0
        super().__init__(models, port=port, **double)

    def books(self) -> Books:
        """What it did so far."""
        with self._lock:
            return Books(tuple(sorted(self._entries, key=lambda entry: entry.number)))

    def die(self) -> None:
        """Takes no more connections and drops those it has."""
        if self.dead.is_set() or self._stopping.is_set():
            return
        with self._sending:
            self.dead.set()
            # What is booked goes out whole; what is not is dropped.
            self._sending.wait_for(lambda: not self._under_way, timeout=1)
        self._stop_listening()
        if self._revives_after_s is not None:
            timer = threading.Timer(self._revives_after_s, self.revive)
            timer.daemon = True
            timer.start()

    def revive(self) -> None:
        """Takes connections again, where it died."""
        if self.dead.is_set() and not self._stopping.is_set():
            self._listen_again()
            self.dead.clear()

    # What follows is called by the handler's threads.

    def _page(self, path: str) -> Reply:
        if path == "/books":
            return Reply(body=json.dumps(self.books().to_json()).encode())
        if path == "/count":
            return Reply(body=str(len(self.requests)).encode())
        return super()._page(path)

    def _scripted(self, seen: Seen) -> Reply:
        text = seen.prompt
        with self._lock:
            drawn = self._drawn.setdefault(seen.number, _Drawn(self._draw(seen.number, text)))
        reply = Reply() if drawn.kind is None else KINDS[drawn.kind](self._timing)
        return replace(reply, delay_s=reply.delay_s + self._answers_after_s) if self._answers_after_s else reply

    def _draw(self, number: int, text: str) -> str | None:
        for marker, kind in self._poison.items():
            if marker in text:
                return kind
        if number < len(self._script):
            return self._script[number]
        for spell in self._spells:
            if spell.after <= number < spell.after + spell.requests:
                return spell.kind
        digest = _digest(text)
        times = self._times[digest]
        self._times[digest] += 1
        at = random.Random(f"{self._seed}|{digest}|{times}").random()  # noqa: S311 # a schedule, no secret
        for kind, share in self._rates.items():
            if at < share:
                return kind
            at -= share
        return None

    def _answer(self, seen: Seen) -> tuple[dict[str, Any], Served | None]:
        document, served = super()._answer(seen)
        drawn = self._drawn.get(seen.number)
        if served is None or drawn is None:
            return document, served
        usage, choices = document["usage"], document["choices"]
        if drawn.kind == "over_report":
            drawn.counted = served.completion_tokens
            served = replace(served, completion_tokens=2 * served.completion_tokens + 1)
            usage |= {
                "completion_tokens": served.completion_tokens,
                "total_tokens": served.prompt_tokens + served.completion_tokens,
            }
        elif drawn.kind == "no_cached":
            del usage["prompt_tokens_details"]
            drawn.cached_told = False
        elif drawn.kind == "blank":
            text = {"message": {"role": "assistant", "content": ""}} if "message" in choices[0] else {"text": ""}
            document["choices"] = [{**choice, **text} for choice in choices]
        elif drawn.kind == "few_choices":
            choices.pop()
        elif drawn.kind == "many_choices":
            choices.append({**choices[-1], "index": len(choices)})
        elif drawn.kind == "filtered":
            said = {"message": {"role": "assistant", "content": None}} if "message" in choices[0] else {"text": None}
            document["choices"] = [{**choices[0], "finish_reason": "content_filter", **said}]
        drawn.tokens = served
        return document, served

    def _hold(self, seconds: float, connection: socket.socket) -> bool:
        return super()._hold(seconds, connection) and not self.dead.is_set()

    def _book(self, seen: Seen, reply: Reply, served: Served | None, awaited: bool) -> bool:
        with self._sending:
            awaited = super()._book(seen, reply, served if awaited else None, awaited and not self.dead.is_set())
            self._under_way += awaited
        drawn = self._drawn.pop(seen.number, _Drawn(None))
        whole = awaited and reply.cut is None and reply.times == 1
        outcome = "dropped" if not whole else "served" if reply.status == 200 and served else "failed"
        entry = Entry(
            seen.number, seen.headers.get("x-request-id", ""), _digest(seen.prompt), drawn.kind, outcome
        )  # fmt: skip
        if outcome == "served" and drawn.tokens is not None:
            tokens = drawn.tokens
            entry = replace(
                entry,
                prompt_tokens=tokens.prompt_tokens,
                cached_tokens=tokens.cached_tokens if drawn.cached_told else None,
                cache_write_tokens=tokens.cache_write_tokens if drawn.cached_told and self._report_written else None,
                completion_tokens=tokens.completion_tokens,
                counted=drawn.counted,
                reported=drawn.kind != "no_usage",
            )
            entry = replace(entry, cost=self._bill(entry))
        with self._lock:
            self._entries.append(entry)
            dies = self._dies_after is not None and len(self._entries) >= self._dies_after
            if dies:
                self._dies_after = None
        if dies:
            threading.Thread(target=self.die, daemon=True).start()
        return awaited

    def _sent(self) -> None:
        with self._sending:
            self._under_way -= 1
            self._sending.notify_all()

    def _bill(self, entry: Entry) -> Decimal:
        zero = Decimal(0)
        input_, output = self._prices.get("input", zero), self._prices.get("output", zero)
        cached, written = entry.cached_tokens or 0, entry.cache_write_tokens or 0
        bill = ((entry.prompt_tokens or 0) - cached - written) * input_ + (entry.completion_tokens or 0) * output
        bill += written * self._prices.get("cache_write", input_)
        return bill + cached * self._prices.get("cached_input", input_)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _date_in(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, or until the pipe that its standard input may be is closed: with whoever began it.

    The first line it prints is its address.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bidbeam.connectors.chaos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--models", default="tiny", help="names, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=json.loads, default={}, help='JSON, such as {"reset": 0.02, "rate": 0.05}')
    parser.add_argument("--poison", type=json.loads, default={}, help='JSON, such as {"a text": "refused"}')
    parser.add_argument("--prices", type=json.loads, default={}, help='JSON, such as {"input": "0.1", "output": "0.4"}')
    parser.add_argument("--dies-after", type=int, help="requests after which it takes no more connections")
    parser.add_argument("--revives-after", type=float, help="seconds after which it takes some again")
    parser.add_argument("--answers-after", type=float, default=0.0, help="seconds that every answer takes")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds that Retry-After asks for")
    parser.add_argument("--slow", type=float, default=0.2, help="seconds that a slow answer takes")
    args = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with ChaosDouble(
        args.models.split(","),
        args.rates,
        seed=args.seed,
        poison=args.poison,
        prices=args.prices,
        timing=Timing(slow_s=args.slow, wait_s=args.wait),
        dies_after=args.dies_after,
        revives_after_s=args.revives_after,
        answers_after_s=args.answers_after,
        port=args.port,
    ) as double:
        print(double.base_url, flush=True)
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=_until_end_of_input, args=(ended,), daemon=True).start()
        ended.wait()


def _until_end_of_input(ended: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    ended.set()


if __name__ == "__main__":
    main()
