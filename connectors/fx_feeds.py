"""Exchange rates from public tickers: US dollars per unit of a currency, exactly as they are told, and as of when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any
from urllib.parse import urlencode

from bidbeam.connectors.fetch import FeedError, bare, fetch_json
from bidbeam.connectors.price_feeds import money_of, shown
from bidbeam.connectors.provider_text import provider_message

FEEDS = ("kraken", "coingecko")
ADDRESSES = {
    "kraken": "https://api.kraken.com/0/public/Ticker",
    "coingecko": "https://api.coingecko.com/api/v3/simple/price",
}
COINS = {
    "TAO": "bittensor", "RENDER": "render-token", "AKT": "akash-network", "BTC": "bitcoin", "ETH": "ethereum",
    "SOL": "solana", "USDC": "usd-coin", "USDT": "tether",
}  # fmt: skip
"""CoinGecko's names of some currencies; others are given in the pools file."""

_PAIRS = {"BTC": "XBTUSD"}
_PLACES = Decimal("1e-18")
_WIDE = Context(prec=100)
_MOST_SPREAD = 2
_AHEAD = timedelta(minutes=5)
"""How far a feed's clock may be before ours."""


@dataclass(frozen=True, slots=True)
class Rate:
    """``rate`` US dollars per unit, above 0, at most 18 places, as of ``at``."""

    rate: Decimal
    at: datetime
    source: str


def fetch_rate(
    feed: str,
    currency: str,
    now: datetime,
    *,
    symbol: str | None = None,
    url: str | None = None,
    timeout_s: float = 15.0,
) -> Rate:
    """The rate of ``currency`` that ``feed`` (of FEEDS) tells now.

    ``symbol`` is what the feed calls it: Kraken's pair (TAOUSD), CoinGecko's coin (bittensor). ``url`` stands in for
    the feed's address. Raises FeedError where the feed does not answer, or with no rate.
    """
    address = url or ADDRESSES[feed]
    if feed == "kraken":
        name = symbol or _PAIRS.get(currency, f"{currency}USD")
        document = fetch_json(f"{address}?{urlencode({'pair': name})}", timeout_s=timeout_s)
        rate, at = _kraken(document, name), now
    else:
        coin = symbol or COINS.get(currency)
        if coin is None:
            raise FeedError(f"CoinGecko's name of {currency} is not known here; write it down as symbol")
        name = coin
        asked = {"ids": coin, "vs_currencies": "usd", "include_last_updated_at": "true", "precision": "full"}
        rate, at = _coingecko(fetch_json(f"{address}?{urlencode(asked)}", timeout_s=timeout_s), coin, now)
    return Rate(rate, at, f"{feed} {name} {bare(address)}")


def usable_rate(figure: object, name: str) -> Decimal:
    """A feed's figure as a rate, half-even at 18 places. Raises FeedError for one that is none."""
    number = money_of(figure)
    if number is None or number <= 0 or number.adjusted() >= 18:
        raise FeedError(f"what the feed tells of {name} is no rate: {shown(figure)}")
    rate = number.quantize(_PLACES, ROUND_HALF_EVEN, _WIDE)
    if not rate:
        raise FeedError(f"what the feed tells of {name} is too small to be a rate")
    return rate


def _kraken(document: object, pair: str) -> Decimal:
    """The last trade. Kraken's own name of the pair may differ from what was asked for, but there is only one."""
    told: Any = document if isinstance(document, dict) else {}
    errors, result = told.get("error"), told.get("result")
    if errors:
        said = errors[0] if isinstance(errors, list) and isinstance(errors[0], str) else "an error"
        raise FeedError(f"Kraken says of {pair}: {provider_message(said[:80], '', ())}")
    if not isinstance(result, dict) or len(result) != 1:
        raise FeedError(f"Kraken tells no rate of {pair}")
    ticker = next(iter(result.values()))

    def figure(key: str) -> Decimal | None:
        found = ticker.get(key) if isinstance(ticker, dict) else None
        return usable_rate(found[0], pair) if isinstance(found, list) and found else None

    last, ask, bid = figure("c"), figure("a"), figure("b")
    if last is None:
        raise FeedError(f"Kraken tells no last trade of {pair}")
    for other in (ask, bid):
        if other is not None and not (other <= last * _MOST_SPREAD and last <= other * _MOST_SPREAD):
            raise FeedError(f"Kraken's last trade of {pair}, {last.normalize():f}, is far off what is bid for it now")
    return last


def _coingecko(document: object, coin: str, now: datetime) -> tuple[Decimal, datetime]:
    entry = document.get(coin) if isinstance(document, dict) else None
    if not isinstance(entry, dict):
        raise FeedError(f"CoinGecko tells no rate of {coin}")
    seconds = entry.get("last_updated_at")
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 0 < seconds < 10**11:
        raise FeedError(f"CoinGecko does not say of when its rate of {coin} is")
    at = datetime.fromtimestamp(seconds, UTC)
    if at > now + _AHEAD:
        raise FeedError(f"CoinGecko's rate of {coin} is of {at:%Y-%m-%d %H:%M} UTC, which is yet to come")
    return usable_rate(entry.get("usd"), coin), min(at, now)
