"""Leased nodes: Targon's inventory, Render's nodes, and a lease that is given back however a run ends."""

from __future__ import annotations

from decimal import Decimal

import pytest

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.front_targon import TargonFront, machine
from bidbeam.connectors.targon import Offer, targon_offers

# -- Targon's inventory --


def test_targons_inventory_becomes_offers_with_exact_prices() -> None:
    machines = [
        machine("h200-small", "NVIDIA-H200", 1, 2.4, 3),
        machine("cpu-large", "", 0, 0.2, 9),
        machine("h200-large", "NVIDIA-H200", 8, 19.2, 0, "vm"),
    ]
    with TargonFront(machines) as front:
        offers = targon_offers(front.url, "tgn-key")
    assert offers == [
        Offer("h200-small", "NVIDIA-H200", 1, Decimal("2.4"), 3, "rental"),
        Offer("h200-large", "NVIDIA-H200", 8, Decimal("19.2"), 0, "vm"),
    ]
    assert front.calls[0].headers["authorization"] == "Bearer tgn-key"


def test_an_entry_that_is_not_whole_is_no_offer() -> None:
    whole = machine("a", "H100", 1, 1.5, 2)
    broken = [
        {**whole, "name": "b", "cost_per_hour": 0},
        {**whole, "name": "c", "cost_per_hour": -1},
        {**whole, "name": "d", "cost_per_hour": "nan"},
        {**whole, "name": "e", "spec": None},
        {**whole, "name": "f", "cost_per_hour": "1.75", "available": "many"},
    ]
    with TargonFront([whole, *broken]) as front:
        offers = targon_offers(front.url, None)
    assert [(offer.name, offer.price_per_hour, offer.available) for offer in offers] == [
        ("a", Decimal("1.5"), 2),
        ("f", Decimal("1.75"), None),
    ]


@pytest.mark.parametrize(
    "failing",
    [
        Reply(410, b""),
        Reply.garbage(),
        Reply(200, b"{}"),
        Reply.error(401, "bad key tgn-secret-key-123"),
        Reply(302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}),
        Reply(cut="reset"),
    ],
    ids=["gone", "garbage", "no list", "key refused", "moved", "reset"],
)
def test_a_feed_that_does_not_answer_as_it_should_is_down_and_leaks_no_key(failing: Reply) -> None:
    with TargonFront([], failing) as front, pytest.raises(PoolDown) as caught:
        targon_offers(front.url, "tgn-secret-key-123")
    assert "secret" not in str(caught.value)
