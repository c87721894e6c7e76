"""Providers' fronts with what a pool needs to buy there: keys and logins made for the test, the pool as written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bidbeam.connectors.front_logins import GoogleLogin, SageMakerLogin
from bidbeam.connectors.fronts import ProviderFront
from bidbeam.connectors.pools import Capacity, PoolSpec, PriceSchedule

KEY = "cpk_planted0123456789abcdefghij"
AWS_KEYS = ("AKIAPLANTEDPLANTED00", "planted/secret/of/aws+0123456789abcdefgh")
THEIRS = "vendor/tiny-it"
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "prime": {"team_id": "team-1"},
    "azure": {"deployment": "DataZoneStandard", "region": "swedencentral"},
    "vertex": {"project": "front", "location": "europe-west4"},
    "sagemaker": {"region": "eu-central-1", "endpoint": "tiny-endpoint"},
}
PROVIDERS = ("openai", "openrouter", "chutes", "prime", "pai3", "azure", "vertex", "sagemaker")
PRICES = {"input": Decimal("0.10"), "cached_input": Decimal("0.01"), "output": Decimal("0.40")}


@dataclass(frozen=True)
class Standing:
    """A front that is up, and the pool that buys there: a mapping of the pools file."""

    front: ProviderFront
    pool: dict[str, Any]

    def spec(self, **more: Any) -> PoolSpec:
        """The pool as its engine gets it."""
        known = {name: self.pool[name] for name in ("profile", "base_url", "options") if name in self.pool}
        keys = {name: self.pool[name] for name in ("api_key_env", "api_key_file") if name in self.pool}
        price = PriceSchedule(price_id="p", pool="far", unit_prices={})
        more = {"capacity": Capacity(concurrency=4), "timeout_s": 10.0, **known, **keys, **more}
        return PoolSpec(name="far", kind="openai", models={"tiny": THEIRS}, price=price, **more)


@contextlib.contextmanager
def standing(
    profile: str,
    upstream: str,
    model: str,
    home: Path,
    patch: pytest.MonkeyPatch,
    *,
    wrong: bool | str = False,
    **more: Any,
) -> Iterator[Standing]:
    """The front of ``profile`` before ``upstream``'s ``model``. ``wrong``: what the pool shows is another's;
    ``claim``: so is what it asks for a token with.
    """
    options = OPTIONS.get(profile, {})
    pool: dict[str, Any] = {"profile": profile, "models": {"tiny": THEIRS}}
    login: dict[str, Any] = {"key": KEY}
    if profile == "vertex":
        login = {"google": GoogleLogin()}
        pool |= {"api_key_env": "FAR_KEY"} if wrong is True else {"api_key_file": str(home / "account.json")}
        patch.setenv("FAR_KEY", KEY)
    elif profile == "sagemaker":
        login = {"sagemaker": SageMakerLogin(*AWS_KEYS, options["region"])}
        patch.setenv("AWS_ACCESS_KEY_ID", AWS_KEYS[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", AWS_KEYS[1][::-1] if wrong else AWS_KEYS[1])
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
    else:
        pool["api_key_env"] = "FAR_KEY"
        patch.setenv("FAR_KEY", KEY[::-1] if wrong else KEY)
    front = ProviderFront(profile, upstream, {THEIRS: model}, **login, options=options, prices={THEIRS: PRICES}, **more)
    if profile == "vertex":
        (GoogleLogin() if wrong == "claim" else login["google"]).write_key_file(home / "account.json", front.host)
    with front:
        pool |= {"base_url": front.base_url} | ({"options": dict(options)} if options else {})
        yield Standing(front, pool)
