"""Price feeds: what the providers' own lists of models say a token costs, read exactly and believed only within reason.

Each feed has its shape here and its unit in its provider's profile: one means dollars per token, the next dollars per
million, and none says which. A figure in the wrong unit is a million times too dear or too cheap, so whatever cannot
be the price of a token is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from bidbeam.connectors.fetch import FeedError, bare, fetch_json
from bidbeam.connectors.pools import Meter, PoolSpec
from bidbeam.connectors.profiles import PROFILES, PriceUnit, profile
from bidbeam.connectors.secrets import known_secrets, mask

PLACES = Decimal("1e-15")
DEAREST_TOKEN_USD = Decimal("0.01")
"""A token dearer than this is a price in the wrong unit."""
CHEAPEST_TOKEN_USD = Decimal("1e-12")
"""So is a token cheaper than this, a millionth of a dollar for a million, that is not free."""
DEAREST_HOUR_USD = Decimal(1000)
"""An accelerator's hour dearer than this is a price in another unit."""
DEAREST_REQUEST_USD = Decimal(100)
"""And so is a request dearer than this."""
MOST_INPUT_TO_OUTPUT = 100
"""So is input that costs more than this many times the output: nobody sells it so."""
MOST_CHANGE = 100
"""A feed that is off what the pools file expects by more than this, either way, is not believed."""

_WIDE = Context(prec=100)
_POWERS: Mapping[PriceUnit, int] = {"usd/token": 0, "usd/mtok": 6}
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
_MOST_DIGITS = 40
_MOST_TEXT = 200
"""Characters of a name or a figure that a feed may tell."""

_Pointers = Mapping[Meter, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a feed's figures stand: RFC 6901 pointers into an entry of ``/data``, the first that is there counts."""

    prices: _Pointers
    """In US dollars, in the profile's unit."""
    native: Mapping[str, _Pointers] = field(default_factory=dict)
    """In other currencies, in the same unit."""
    conditional: str = ""
    """Where prices that hold only for some requests or hours stand; each is shaped like the entry's own."""
    endpoints: str = ""
    """The path of a model's own list, one entry for each who serves it; ``{model}`` is its name there."""


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "chutes": Shape(
            prices={
                "uncached_input": ("/price/input/usd", "/pricing/prompt"),
                "output": ("/price/output/usd", "/pricing/completion"),
                "cached_input": ("/price/input_cache_read/usd", "/pricing/input_cache_read"),
            },
            native={
                "TAO": {
                    "uncached_input": ("/price/input/tao",),
                    "output": ("/price/output/tao",),
                    "cached_input": ("/price/input_cache_read/tao",),
                }
            },
        ),
        "prime": Shape(
            prices={
                "uncached_input": ("/pricing/input_usd_per_mtok",),
                "output": ("/pricing/output_usd_per_mtok",),
                "cached_input": ("/pricing/cache_read_usd_per_mtok",),
                "cache_write": ("/pricing/cache_write_usd_per_mtok",),
            },
        ),
        "openrouter": Shape(
            prices={
                "uncached_input": ("/pricing/prompt",),
                "output": ("/pricing/completion",),
                "cached_input": ("/pricing/input_cache_read",),
                "cache_write": ("/pricing/input_cache_write",),
                "request": ("/pricing/request",),
            },
            conditional="/pricing/overrides",
            endpoints="models/{model}/endpoints",
        ),
    }
)  # fmt: skip
"""By profile."""


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a feed says of one model: prices per single token or request, and where it says so."""

    unit_prices: Mapping[Meter, Decimal]
    source: str
    tag: str | None = None
    """The one of a router's providers that these are the prices of, as requests name it."""


def has_feed(name: str | None) -> bool:
    """Whether there is a feed of prices for this profile; None is the default one."""
    chosen = profile(name)
    return chosen.name in SHAPES and chosen.price_unit is not None


def feed_names() -> tuple[str, ...]:
    """The profiles that have a feed."""
    return tuple(name for name in SHAPES if name in PROFILES and has_feed(name))


def fetch_prices(
    spec: PoolSpec,
    *,
    feed: str | None = None,
    url: str | None = None,
    served_by: str | None = None,
    currency: str = "USD",
    timeout_s: float = 15.0,
) -> Quoted:
    """What the feed of a pool's provider says of the pool's models, in ``currency``.

    ``feed`` names the profile whose shape and unit it has, where that is not the pool's own; ``url`` another address;
    ``served_by`` the one of a router's providers that is bought from. Raises FeedError where the feed does not answer,
    does not name a model, or names different prices for two models of the pool.
    """
    name = profile(feed if feed is not None else spec.profile).name
    shape, unit = SHAPES.get(name), profile(name).price_unit
    if shape is None or unit is None:
        known = ", ".join(feed_names())
        raise FeedError(f"profile {name} has no price feed; write the prices down, or name one of these feeds: {known}")
    found: dict[str, Quoted] = {}
    tag: str | None = None
    documents: dict[str, object] = {}
    for model in spec.models.values():
        address = url or _address(spec, shape, model, served_by)
        if address not in documents:
            documents[address] = fetch_json(address, headers=_key_header(spec, address), timeout_s=timeout_s)
        prices, said = read_prices(documents[address], shape, unit, model, currency=currency, served_by=served_by)
        found[model] = Quoted(prices, f"{bare(address)} {model}{said}")
        if served_by is not None:
            tag = _tag(documents[address], model, served_by, tag)
    quotes = list(found.values())
    for model, each in found.items():
        if each.unit_prices != quotes[0].unit_prices:
            first = next(iter(found))
            raise FeedError(f"{first!r} and {model!r} have different prices there; make a pool for each")
    return Quoted(quotes[0].unit_prices, ", ".join(q.source for q in quotes), tag)


def read_prices(
    document: object,
    shape: Shape,
    unit: PriceUnit,
    model: str,
    *,
    currency: str = "USD",
    served_by: str | None = None,
) -> tuple[dict[Meter, Decimal], str]:
    """The prices of one model in a feed's document, per single token or request, and what is to be said of them.

    Prices finer than 15 places are rounded half-even; of conditional ones the dearest counts, so that no bill exceeds
    it. A cached price of 0 beside a dear input is how feeds write "none". Raises FeedError for what is missing or no
    price.
    """
    pointers = shape.prices if currency == "USD" else shape.native.get(currency)
    if pointers is None:
        have = ", ".join(("USD", *shape.native))
        raise FeedError(f"the feed has no prices in {currency}; it has {have}")
    entry = _entry(document, model, served_by)
    power = _POWERS[unit]
    prices, said = _figures(entry, pointers, power, model)
    for extra in _conditional(entry, shape):
        dearer, more = _figures(extra, pointers, power, model)
        prices = {m: max(p for p in (prices.get(m), dearer.get(m)) if p is not None) for m in {**prices, **dearer}}
        said = ", the dearest of its conditional prices" + (more or said).replace(", the dearest", "")
    for needed in ("uncached_input", "output"):
        if needed not in prices:
            raise FeedError(f"the feed names no {needed.replace('_', ' ')} price for {model!r}")
    if not prices.get("request", Decimal(1)):
        del prices["request"]
    if prices["uncached_input"] and not prices.get("cached_input", Decimal(1)):
        del prices["cached_input"]
    return prices, said


def check_plausible(
    unit_prices: Mapping[Meter, Decimal], usd: Decimal, expected: Mapping[Meter, Decimal] | None = None
) -> None:
    """Raises FeedError for unit prices that cannot be right. ``usd`` is what a unit of their currency is worth, and
    ``expected`` what the pools file takes them to be, per single token or request.
    """
    for meter, price in unit_prices.items():
        said = implausible(meter, price, usd)
        if said is not None:
            raise FeedError(f"the price of {said}, which cannot be: it is in another unit than this feed is known for")
    input_, output = unit_prices.get("uncached_input"), unit_prices.get("output")
    if input_ is not None and output is not None and input_ > MOST_INPUT_TO_OUTPUT * output > 0:
        raise FeedError(f"input costs more than {MOST_INPUT_TO_OUTPUT} times the output, which cannot be")
    derived: tuple[Meter, ...] = ("cached_input", "cache_write")
    for meter in derived:
        also = unit_prices.get(meter)
        limit = 1 if meter == "cached_input" else MOST_INPUT_TO_OUTPUT
        if also is not None and input_ is not None and also > limit * input_:
            raise FeedError(f"{meter.replace('_', ' ')} is dearer than an uncached token can explain")
    for meter, price in (expected or {}).items():
        told = unit_prices.get(meter)
        if told is None or told == price:
            continue
        if not (price <= told * MOST_CHANGE and told <= price * MOST_CHANGE):
            raise FeedError(
                f"the price of {meter.replace('_', ' ')} is {told.normalize():f}, more than {MOST_CHANGE} times off "
                f"the {price.normalize():f} that the pools file expects"
            )


def implausible(meter: Meter, price: Decimal, usd: Decimal) -> str | None:
    """What a unit price comes to, where that can be no price of such a unit; None where it can."""
    value, name = _WIDE.multiply(price, usd), meter.replace("_", " ")
    if meter == "request":
        return f"a request comes to {value.normalize():f} USD" if value > DEAREST_REQUEST_USD else None
    if meter in ("accelerator_second", "accelerator_idle_second", "setup"):
        hour = _WIDE.multiply(value, Decimal(3600)).quantize(Decimal("0.01"), ROUND_HALF_EVEN, _WIDE)
        return f"an accelerator comes to {hour.normalize():f} USD an hour" if hour > DEAREST_HOUR_USD else None
    if value > DEAREST_TOKEN_USD or 0 < value < CHEAPEST_TOKEN_USD:
        return f"{name} comes to {value.normalize():f} USD for a single token"
    return None


def money_of(value: object) -> Decimal | None:
    """A figure of a feed, exactly: a decimal string or a JSON number; None where it is neither or is absurd."""
    if isinstance(value, str) and len(value) <= _MOST_TEXT and _NUMBER.fullmatch(value.strip()):
        value = Decimal(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    try:
        number = Decimal(value)
    except (ValueError, ArithmeticError):
        return None
    if not number.is_finite() or (number and abs(number.adjusted()) > _MOST_DIGITS):
        return None
    # Exact, so that a figure of a million digits would be one in every message and sum.
    return number if len(number.as_tuple().digits) <= 2 * _MOST_DIGITS else None


def shown(value: object) -> str:
    """What a feed says, as far as it may be repeated: short, without a key that it was shown, and of lists and objects
    only that they are.
    """
    if not isinstance(value, str | int | Decimal):
        return type(value).__name__
    text = value[:_MOST_TEXT] if isinstance(value, str) else str(value)
    return repr(mask(text, known_secrets(environment=False))[:40])


def _figures(entry: object, pointers: _Pointers, power: int, model: str) -> tuple[dict[Meter, Decimal], str]:
    from bidbeam.connectors.wire_json import pointer

    prices: dict[Meter, Decimal] = {}
    said = ""
    for meter, places in pointers.items():
        raw = next((found for place in places if (found := pointer(entry, place)) is not None), None)
        if raw is None:
            continue
        figure = money_of(raw)
        if figure is None or figure < 0:
            raise FeedError(f"the feed's {meter.replace('_', ' ')} price of {model!r} is no price: {shown(raw)}")
        each = figure.scaleb(-(0 if meter == "request" else power), _WIDE)
        if each.adjusted() >= 5:
            raise FeedError(f"the feed's {meter.replace('_', ' ')} price of {model!r} is {figure:f}, which cannot be")
        prices[meter] = each.quantize(PLACES, ROUND_HALF_EVEN, _WIDE)
        if prices[meter] != each:
            said = ", rounded at 15 places"
        if each and not prices[meter]:
            raise FeedError(f"the feed's {meter.replace('_', ' ')} price of {model!r} is too small to be one")
    return prices, said


def _conditional(entry: object, shape: Shape) -> Iterator[object]:
    from bidbeam.connectors.wire_json import pointer

    listed = pointer(entry, shape.conditional) if shape.conditional else None
    for each in listed if isinstance(listed, list) else ():
        yield {"pricing": each}


def _entry(document: object, model: str, served_by: str | None) -> object:
    """The feed's entry of a model; with ``served_by``, that of the one who serves it."""
    from bidbeam.connectors.wire_json import pointer

    if served_by is not None:
        listed = pointer(document, "/data/endpoints")
        entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        for each in entries:
            names = (each.get("tag"), each.get("provider_name"), each.get("name"))
            if served_by.casefold() in {name.casefold() for name in names if isinstance(name, str)}:
                return each
        tags = [name for each in entries if isinstance(name := each.get("tag") or each.get("provider_name"), str)]
        raise FeedError(f"{served_by!r} does not serve {model!r} there{_near(served_by, tags)}")
    data: Any = document.get("data") if isinstance(document, dict) else document
    if not isinstance(data, list):
        raise FeedError("the feed holds no list of models")
    known: list[str] = []
    for each in data:
        name = each.get("id") if isinstance(each, dict) else None
        if name == model:
            return each
        if isinstance(name, str):
            known.append(name)
    raise FeedError(f"the feed does not name the model {model!r}{_near(model, known)}")


def _tag(document: object, model: str, served_by: str, before: str | None) -> str:
    """How requests name the provider whose prices were read; the same for every model of a pool."""
    from bidbeam.connectors.wire_json import pointer

    tag = pointer(_entry(document, model, served_by), "/tag")
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise FeedError(f"the feed does not tell how requests name {served_by!r}")
    if before not in (None, tag):
        raise FeedError(f"{served_by!r} serves as {before!r} and as {tag!r}; make a pool for each model")
    return tag


def _near(wrong: str, names: list[str]) -> str:
    known = {name.casefold(): name for name in names[:10_000] if len(name) <= _MOST_TEXT}
    found = difflib.get_close_matches(wrong.casefold(), known, n=1, cutoff=0.55)
    return f"; did you mean {mask(known[found[0]], known_secrets(environment=False))!r}?" if found else ""


def _address(spec: PoolSpec, shape: Shape, model: str, served_by: str | None) -> str:
    from bidbeam.connectors.http_transport import endpoint

    where = endpoint(spec)
    if served_by is None:
        return where.url("models")
    if not shape.endpoints:
        raise FeedError(f"the feed of {spec.name!r} does not tell who serves a model; leave served_by out")
    return where.url(shape.endpoints.replace("{model}", quote(model, safe="/")))


def _key_header(spec: PoolSpec, address: str) -> Mapping[str, str]:
    """The pool's key, where it is to be had, for the pool's own provider alone: a feed elsewhere never sees it."""
    from urllib.parse import urlsplit

    from bidbeam.connectors.credentials import credentials_for
    from bidbeam.connectors.errors import ConfigError
    from bidbeam.connectors.http_transport import endpoint

    where = endpoint(spec)
    here, there = urlsplit(where.base_url), urlsplit(address)
    if (here.scheme, here.netloc) != (there.scheme, there.netloc):
        return {}
    try:
        return credentials_for(spec, where.profile.auth).current() or {}
    except ConfigError:
        return {}  # most feeds are public; one that is not says so
