"""What lets requests in: keys, and tokens that are fetched once, replaced in time, and shown nowhere."""

from __future__ import annotations

import base64
import pickle
import sys
import threading
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider_fronts import AWS_KEYS, KEY, standing
from test_http_engine import Driver, row

from bidbeam.connectors.credentials import MARGIN, BearerTokens, StaticKey, check_credentials, credentials_for
from bidbeam.connectors.doubles import OK, EndpointDouble, Seen
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.front_logins import GoogleLogin, SageMakerLogin
from bidbeam.connectors.http_engine import HttpEngine
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.profiles import profile
from bidbeam.connectors.token_sources import Token, sagemaker_bearer

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime:
        return self.at


class Source:
    """Tokens that hold an hour, numbered; fails while told to."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.given, self.fails = clock, 0, False

    def __call__(self) -> Token:
        if self.fails:
            raise ConfigError("the login does not answer", key="pools.far")
        self.given += 1
        return Token(f"planted-token-{self.given}", self.clock() + timedelta(hours=1))


def spec(name: str, **more: Any) -> PoolSpec:
    price = PriceSchedule(price_id="p", pool="far", unit_prices={})
    return PoolSpec("far", "openai", {"tiny": "tiny"}, price, profile=name, **more)


def test_a_token_is_fetched_once_and_replaced_before_it_ends() -> None:
    """One fetch serves every request until a margin before the token's end; then there is another."""
    clock = Clock()
    source = Source(clock)
    tokens = BearerTokens(source, now=clock)
    assert tokens.current() is None
    assert tokens.refresh() == {"Authorization": "Bearer planted-token-1"}
    clock.at += timedelta(hours=1) - MARGIN - timedelta(seconds=1)
    assert tokens.current() == tokens.refresh() == {"Authorization": "Bearer planted-token-1"}
    clock.at += timedelta(seconds=1)
    assert tokens.current() is None
    assert tokens.refresh() == {"Authorization": "Bearer planted-token-2"}
    assert tokens.secrets == ("planted-token-2", "planted-token-1")


def test_a_login_that_is_away_for_a_moment_stops_nothing() -> None:
    """Where no new token is to be had, the old one is used while it holds, and not a second longer."""
    clock = Clock()
    source = Source(clock)
    tokens = BearerTokens(source, now=clock)
    tokens.refresh()
    source.fails = True
    clock.at += timedelta(minutes=58)
    assert tokens.refresh() == {"Authorization": "Bearer planted-token-1"}
    clock.at += timedelta(minutes=2)
    with pytest.raises(ConfigError, match="does not answer"):
        tokens.refresh()


def test_many_who_wait_for_a_token_get_the_same() -> None:
    """Requests that find the token gone at the same time cause one fetch."""
    clock = Clock()
    source = Source(clock)
    tokens = BearerTokens(source, now=clock)
    threads = [threading.Thread(target=tokens.refresh) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.given == 1


@given(st.lists(st.integers(1, 4000), max_size=30))
def test_no_request_ever_carries_a_token_that_has_ended(steps: list[int]) -> None:
    """Whatever time passes between requests, what they carry holds, and is fetched no more often than it must be."""
    clock = Clock()
    source = Source(clock)
    tokens = BearerTokens(source, now=clock)
    ends: dict[str, datetime] = {}
    for seconds in steps:
        clock.at += timedelta(seconds=seconds)
        before = source.given
        headers = tokens.current() or tokens.refresh()
        if source.given > before:
            ends[headers["Authorization"]] = clock.at + timedelta(hours=1)
        assert clock.at < ends[headers["Authorization"]]
    assert source.given <= 1 + sum(steps) // (3600 - int(MARGIN.total_seconds()))


def test_secrets_stay_where_they_are() -> None:
    """No pickle and no repr of what holds a secret."""
    tokens = BearerTokens(Source(Clock()))
    tokens.refresh()
    for each in (tokens, StaticKey(profile("chutes").auth, KEY)):
        with pytest.raises(TypeError, match="PoolSpec"):
            pickle.dumps(each)
        assert "planted" not in repr(each)
    assert "planted" not in repr(Token("planted"))


def test_an_engine_replaces_its_token_between_requests() -> None:
    """Requests carry the token of their time; a login that ends takes the pool down, with its reason."""
    clock = Clock()
    source = Source(clock)

    def later(seen: Seen) -> Any:
        clock.at += timedelta(minutes=20)
        source.fails = seen.number >= 5

        return OK

    with EndpointDouble(["tiny"], later) as double:
        one = spec("pai3", base_url=double.base_url)
        engine = HttpEngine(
            PoolSpec(**{**{f: getattr(one, f) for f in one.__slots__}, "capacity": type(one.capacity)(concurrency=1)}),
            "tiny",
            credentials=BearerTokens(source, now=clock),
        )
        driver = Driver(engine)
        with pytest.raises(PoolDown, match="does not answer"):
            driver.run([row(tag) for tag in range(30)])
        engine.close()
        carried = [seen.headers["authorization"][-1] for seen in double.requests]
    assert carried[:6] == ["1", "1", "1", "2", "2", "2"]
    assert "auth_funds" in {each["error_class"] for each in driver.results}
    assert "planted" not in repr(driver.results)


# -- where keys and tokens come from


def test_an_own_key_comes_before_tokens_and_the_usual_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's own key, else the profile's variable, else tokens; each in the provider's own header."""
    monkeypatch.setenv("OURS", KEY)
    monkeypatch.setenv("CHUTES_API_KEY", "of-the-profile")
    auth = profile("chutes").auth
    assert credentials_for(spec("chutes", api_key_env="OURS"), auth).current() == {"Authorization": f"Bearer {KEY}"}
    assert credentials_for(spec("chutes"), auth).current() == {"Authorization": "Bearer of-the-profile"}
    auth = profile("azure").auth
    assert credentials_for(spec("azure", api_key_env="OURS"), auth).current() == {"api-key": KEY}
    assert isinstance(credentials_for(spec("azure"), auth), BearerTokens)
    assert credentials_for(spec("pai3"), profile("pai3").auth).current() == {}


def test_a_login_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each login's package is an extra; without it the message names the extra, and the key that would do instead."""
    for name, package, extra in [
        ("azure", "azure", "azure"),
        ("vertex", "google.auth", "google"),
        ("sagemaker", "botocore.session", "aws"),
    ]:
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
        with pytest.raises(ConfigError, match=rf"pip install 'bidbeam\[{extra}\]', or a key in api_key_env"):
            check_credentials(spec(name))


def test_microsofts_tokens_are_asked_for_by_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entra's token goes as a bearer, and its end is heeded."""
    asked: list[str] = []

    class Identity:
        def get_token(self, scope: str) -> Any:
            asked.append(scope)
            return types.SimpleNamespace(token=KEY, expires_on=(NOON + timedelta(hours=1)).timestamp())

    identity, core = types.ModuleType("azure.identity"), types.ModuleType("azure.core.exceptions")
    identity.DefaultAzureCredential = Identity  # type: ignore[attr-defined]
    core.AzureError = RuntimeError  # type: ignore[attr-defined]
    for name, module in {
        "azure": None,
        "azure.core": None,
        "azure.identity": identity,
        "azure.core.exceptions": core,
    }.items():
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    clock = Clock()
    tokens = credentials_for(spec("azure"), profile("azure").auth, now=clock)
    assert tokens.refresh() == {"Authorization": f"Bearer {KEY}"}
    clock.at += timedelta(minutes=56)
    assert tokens.current() is None
    assert asked == ["https://cognitiveservices.azure.com/.default"]


def test_without_an_identity_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No AWS credentials, no Google login, or a broken key file: a configuration error that quotes nothing of it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("sagemaker", "sagemaker-invoke"):
        with pytest.raises(ConfigError, match="no AWS credentials"):
            check_credentials(spec(name, options={"region": "eu-central-1", "endpoint": "e"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="application default credentials"):
        check_credentials(spec("vertex"))
    file = tmp_path / "key.json"
    file.write_text('{"type": "service_account", "private_key": "planted"}')
    with pytest.raises(ConfigError, match="key file") as raised:
        check_credentials(spec("vertex", api_key_file=str(file)))
    assert "planted" not in str(raised.value)


def test_google_gives_a_token_for_a_signed_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real login exchanges the account's signed claim for a token, once for many requests."""
    with (
        EndpointDouble(["tiny"]) as double,
        standing("vertex", double.base_url, "tiny", tmp_path, monkeypatch) as place,
    ):
        tokens = credentials_for(place.spec(), profile("vertex").auth)
        first = tokens.refresh()
        login = place.front._google
        assert login is not None
        assert login.lets_in(first["Authorization"].removeprefix("Bearer "))
        assert tokens.refresh() == first
        assert login.given == 1


# -- the bearer that AWS credentials sign


class Keys:
    def __init__(self, access_key: str, secret_key: str, token: str | None = None) -> None:
        self.access_key, self.secret_key, self.token = access_key, secret_key, token


@pytest.mark.parametrize("session", [None, "session/token+of=an=assumed/role"])
def test_a_sagemaker_bearer_is_a_presigned_request(session: str | None) -> None:
    """It holds the action, the region and a signature that only the account's secret makes, and ends by itself."""
    bearer = sagemaker_bearer(Keys(*AWS_KEYS, session), "eu-central-1")
    inner = base64.b64decode(bearer.removeprefix("sagemaker-api-key-")).decode()
    assert inner.startswith("sagemaker.amazonaws.com/?Action=CallWithBearerToken&")
    assert inner.endswith("&Version=1")
    assert "X-Amz-Expires=3600" in inner
    assert AWS_KEYS[1] not in inner
    assert SageMakerLogin(*AWS_KEYS, "eu-central-1").lets_in(bearer)
    assert not SageMakerLogin(*AWS_KEYS, "eu-west-1").lets_in(bearer)
    assert not SageMakerLogin(AWS_KEYS[0], "another", "eu-central-1").lets_in(bearer)
    assert not SageMakerLogin(*AWS_KEYS, "eu-central-1").lets_in(bearer[:-8] + "AAAAAAAA")
    gone = sagemaker_bearer(Keys(*AWS_KEYS, session), "eu-central-1", timedelta(0))
    assert not SageMakerLogin(*AWS_KEYS, "eu-central-1").lets_in(gone)


@given(st.text(max_size=60))
def test_no_bearer_crashes_the_door(text: str) -> None:
    """Whatever is sent as a bearer is let in or not, and never an error."""
    login = SageMakerLogin(*AWS_KEYS, "eu-central-1")
    assert not login.lets_in(text)
    assert not login.lets_in("sagemaker-api-key-" + base64.b64encode(text.encode("utf-8", "replace")).decode())


def test_a_login_knows_its_own_tokens_only() -> None:
    """A token of another account's login, or one that has ended, lets nobody in."""
    ended = GoogleLogin(lifetime_s=-1)
    assert not ended.lets_in("ya29.other")
    assert ended.give(b"assertion=a.b.c") is None
