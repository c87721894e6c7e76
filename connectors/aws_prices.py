"""AWS's price list: what an hour of a SageMaker hosting instance costs, on demand, through AWS's own client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from bidbeam.connectors.fetch import FeedError, bare
from bidbeam.connectors.price_feeds import money_of
from bidbeam.connectors.wire_json import pointer, read_json

_REGION = "us-east-1"
"""The price list is served from few regions, and lists all."""
_SERVICE = "AmazonSageMaker"
_MOST_PAGES = 20
_TIMEOUT_S = 15
_HOURS = frozenset({"hrs", "hours", "hour", "hr"})


def instance_hour(
    instance: str, region: str, *, url: str | None = None, aws_profile: str | None = None
) -> tuple[Decimal, str]:
    """USD for an hour of one instance (``ml.g5.xlarge``) that hosts an endpoint in a region, and where that is from.

    ``url`` stands in for AWS's own address. Needs boto3 and credentials that may read the price list. Raises FeedError
    where there is no such price, or not only one.
    """
    found: set[Decimal] = set()
    for product in _products(instance, region, url, aws_profile):
        attributes = (
            product.get("product", {}).get("attributes", {}) if isinstance(product.get("product"), dict) else {}
        )
        if "Hosting" in (attributes.get("component"), attributes.get("platoinstancetype")):
            found.update(_hours(product))
    if len(found) != 1:
        what = "no price" if not found else f"{len(found)} prices"
        raise FeedError(f"AWS's price list has {what} of hosting on {instance!r} in {region!r}; write the hour down")
    where = bare(url) if url else f"AWS price list {_SERVICE}"
    return found.pop(), f"{where} {instance} hosting {region}"


def _products(instance: str, region: str, url: str | None, aws_profile: str | None) -> Iterator[Mapping[str, Any]]:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise FeedError("AWS's price list needs boto3; install bidbeam[aws], or write the hour down") from None
    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value}
        for field, value in (("instanceName", instance), ("regionCode", region))
    ]
    limits = Config(connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S, retries={"total_max_attempts": 2})
    try:
        client = boto3.session.Session(profile_name=aws_profile).client(
            "pricing", region_name=_REGION, endpoint_url=url, config=limits
        )
        asked: dict[str, Any] = {"ServiceCode": _SERVICE, "Filters": filters, "FormatVersion": "aws_v1"}
        for _ in range(_MOST_PAGES):
            page = client.get_products(**asked)
            for text in page.get("PriceList", []):
                document = read_json(text.encode()) if isinstance(text, str) else None
                if isinstance(document, dict):
                    yield document
            if not page.get("NextToken"):
                return
            asked["NextToken"] = page["NextToken"]
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "an error"))[:60]
        raise FeedError(
            f"AWS's price list answers {code}; may these credentials read it (pricing:GetProducts)?"
        ) from None
    except BotoCoreError as error:
        # Its text may quote what was sent.
        raise FeedError(f"AWS's price list is not to be had ({type(error).__name__})") from None


def _hours(product: Mapping[str, Any]) -> Iterator[Decimal]:
    """The prices of an hour among a product's terms on demand."""
    terms = pointer(product, "/terms/OnDemand")
    for term in terms.values() if isinstance(terms, dict) else ():
        dimensions = pointer(term, "/priceDimensions")
        for dimension in dimensions.values() if isinstance(dimensions, dict) else ():
            price = money_of(pointer(dimension, "/pricePerUnit/USD"))
            if price is not None and price > 0 and str(pointer(dimension, "/unit")).casefold() in _HOURS:
                yield price.normalize()
