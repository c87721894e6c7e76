"""Fronts of the HTTP providers, for tests: each true to its provider's wire, with an endpoint of ours behind it.

    with ProviderFront("chutes", server.base_url, {"vendor/tiny": "tiny"}, key=KEY) as front:
        pool = ...  # profile: chutes, base_url: front.base_url
        ...
        assert front.served[0].prompt_tokens == 12

A front checks path, headers and key as the provider does, speaks its errors, lists its models and prices in its own
shape and unit, and hands completions on to ``upstream``, an OpenAI-compatible endpoint such as a real vLLM server. It
keeps books of what it served. On loopback, plain http.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from bidbeam.connectors.doubles import OK, Behaviour, Reply, Seen
from bidbeam.connectors.front_errors import ERRORS, Case
from bidbeam.connectors.front_kinds import KINDS, Prices
from bidbeam.connectors.front_logins import TOKEN_PATH, GoogleLogin, SageMakerLogin
from bidbeam.connectors.loopback import Handler, Loopback

_MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Booked:
    """One answer that went out: its id, the model by the provider's name, tokens, and US dollars where it is priced."""

    answer_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    cost: Decimal | None


class _Handler(Handler):
    def serve(self) -> None:
        front: ProviderFront = self.server.owner
        if self.command == "GET":
            self.send(front._get(self.path, self.lower_headers()))
        else:
            self.send(front._post(self.path, self.lower_headers(), self.read_body()))


class ProviderFront(Loopback):
    """A context manager that stands in for one provider on a free port.

    ``models``: the provider's names, and what each is called at ``upstream``. ``key``: what must come, else its 401;
    ``google`` and ``sagemaker`` check tokens instead. ``options``: the pool's, as far as they stand in the address.
    ``prices``: US dollars for a million tokens, for the list of models and the cost that some tell.
    ``report_cached``: whether usage tells cached tokens. ``behaviour``: as of ``EndpointDouble``; what its replies
    leave open is upstream's answer.
    """

    handler = _Handler

    def __init__(
        self,
        profile: str,
        upstream: str,
        models: Mapping[str, str],
        *,
        key: str | None = None,
        google: GoogleLogin | None = None,
        sagemaker: SageMakerLogin | None = None,
        options: Mapping[str, str] | None = None,
        prices: Mapping[str, Prices] | None = None,
        report_cached: bool = True,
        behaviour: Behaviour = OK,
    ) -> None:
        self.profile, self.kind, self.models = profile, KINDS[profile], dict(models)
        self.requests: list[Seen] = []
        self.served: list[Booked] = []
        self.refused = 0
        self._upstream = urlsplit(upstream)
        self._key, self._google, self._sagemaker = key, google, sagemaker
        self._path = self.kind.path.format(**(options or {}))
        self._prices = prices or {}
        self._report_cached = report_cached
        self._behaviour = behaviour
        self._concurrent = 0
        self._lock = threading.Lock()
        super().__init__()

    @property
    def base_url(self) -> str:
        """Where it serves, with the provider's own path."""
        return f"http://{self.host}{self._path}"

    def error(self, case: Case) -> Reply:
        """What the provider sends in this case."""
        return ERRORS[self.profile][case]

    # What follows is called by the handler's threads.

    def _get(self, path: str, headers: Mapping[str, str]) -> Reply:
        if path != f"{self._path}/models":
            return self.error("wrong_model")
        if not self.kind.public_feed and not self._lets_in(headers):
            return self._refuse()
        feed = self.kind.feed({model: self._prices.get(model) for model in self.models})
        return self.error("wrong_model") if feed is None else Reply(body=json.dumps(feed).encode())

    def _post(self, path: str, headers: Mapping[str, str], raw: bytes) -> Reply:
        if path == TOKEN_PATH and self._google is not None:
            given = self._google.give(raw)
            document = given or {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
            return Reply(200 if given else 400, json.dumps(document).encode())
        with self._lock:
            self._concurrent += 1
            seen = Seen(len(self.requests), path, headers, _object(raw), raw, 0, self._concurrent)
            self.requests.append(seen)
        try:
            return self._answer(seen)
        finally:
            with self._lock:
                self._concurrent -= 1

    def _answer(self, seen: Seen) -> Reply:
        route = seen.path.removeprefix(self._path)
        if route == seen.path or route not in ("/chat/completions", "/completions"):
            return self.error("wrong_model")
        if route == "/completions" and not self.kind.takes_raw:
            return self.error("wrong_model")
        if not self._lets_in(seen.headers):
            return self._refuse()
        scripted = self._scripted(seen)
        self._stopping.wait(scripted.delay_s)
        if scripted.body is not None:
            return scripted
        asked = str(seen.body.get("model", ""))
        model = asked if self.kind.names_model else next(iter(self.models), "")
        if model not in self.models or (asked and not self.kind.names_model):
            return self.error("wrong_model")
        status, body = self._forward(route, {**seen.body, "model": self.models[model]})
        document = _object(body)
        if status != 200 or "usage" not in document:
            return Reply(status, body)
        return self._own(document, model, scripted)

    def _own(self, document: dict[str, Any], model: str, scripted: Reply) -> Reply:
        """Upstream's answer as the provider gives it, and books it."""
        usage = dict(document["usage"])
        if not self._report_cached:
            usage.pop("prompt_tokens_details", None)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        booked = Booked(
            str(document["id"]),
            model,
            usage["prompt_tokens"],
            cached,
            usage["completion_tokens"],
            self._cost(model, usage["prompt_tokens"], cached or 0, usage["completion_tokens"]),
        )
        if self.kind.tells_cost and booked.cost is not None:
            usage["cost"] = float(booked.cost)
        document = {**document, "model": model, "usage": usage}
        document = {name: value for name, value in document.items() if name not in scripted.drop}
        with self._lock:
            self.served.append(booked)
        headers = dict(scripted.headers)
        if self.kind.id_header is not None:
            headers[self.kind.id_header] = booked.answer_id
        return Reply(scripted.status, json.dumps({**document, **scripted.merge}).encode(), headers)

    def _cost(self, model: str, prompt: int, cached: int, output: int) -> Decimal | None:
        prices = self._prices.get(model)
        if prices is None:
            return None
        read = prices.get("cached_input", prices["input"])
        return ((prompt - cached) * prices["input"] + cached * read + output * prices["output"]) / _MILLION

    def _scripted(self, seen: Seen) -> Reply:
        if isinstance(self._behaviour, Reply):
            return self._behaviour
        if callable(self._behaviour):
            return self._behaviour(seen)
        return self._behaviour[seen.number] if seen.number < len(self._behaviour) else OK

    def _lets_in(self, headers: Mapping[str, str]) -> bool:
        sent = headers.get(self.kind.key_header, "")
        if not sent.startswith(self.kind.key_prefix):
            return False
        token = sent.removeprefix(self.kind.key_prefix)
        if self._google is not None:
            return self._google.lets_in(token)
        if self._sagemaker is not None:
            return self._sagemaker.lets_in(token)
        return self._key is None or token == self._key

    def _refuse(self) -> Reply:
        with self._lock:
            self.refused += 1
        return self.error("wrong_key")

    def _forward(self, route: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._upstream.netloc, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{self._upstream.path}{route}", json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
