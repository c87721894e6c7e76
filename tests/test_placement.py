"""Placement is a wall: undeclared fails closed, and a row can only tighten what its job asks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.errors import ConfigError
from bidbeam.transforms.placement import (
    CONSTRAINTS,
    COUNTRIES,
    LABELS,
    OPERATORS,
    TEES,
    ZONES,
    combine,
    eligible,
    normalise,
)

_PLACES = ["DE", "FR", "NO", "US", "GB", "EU", "EEA"]
_places = st.lists(st.sampled_from(_PLACES), max_size=4)
_CONSTRAINT_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "jurisdictions": _places,
    "jurisdictions_deny": _places,
    "operators": st.lists(st.sampled_from(OPERATORS), max_size=3),
    "operator_jurisdictions": _places,
    "operator_jurisdictions_deny": _places,
    "zdr": st.booleans(),
    "data_zones": _places,
    "training": st.booleans(),
    "max_retention_days": st.integers(0, 60),
    "tee": st.booleans() | st.sampled_from(TEES) | st.lists(st.sampled_from(TEES), max_size=3),
}
_LABEL_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "jurisdiction": st.sampled_from([*_PLACES, "global"]),
    "operator": st.sampled_from(OPERATORS),
    "operator_jurisdiction": st.sampled_from([*_PLACES, "global"]),
    "zdr": st.booleans(),
    "data_zone": st.sampled_from([*_PLACES, "global"]),
    "training": st.booleans(),
    "max_retention_days": st.integers(0, 60),
    "tee": st.booleans() | st.sampled_from(TEES),
}


def _optional(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: st.none() | value for key, value in values.items()})


constraints = _optional(_CONSTRAINT_VALUES)
labels = _optional(_LABEL_VALUES)


@pytest.mark.parametrize(
    ("constraint", "declared", "reason"),
    [
        ({}, {}, None),
        (None, {"jurisdiction": "US"}, None),
        ({"jurisdictions": ["EEA"]}, {"jurisdiction": "NO"}, None),
        ({"jurisdictions": ["EU"]}, {"jurisdiction": "NO"}, "placement:jurisdiction"),
        ({"jurisdictions": ["EEA"]}, {"jurisdiction": "EU"}, None),
        ({"jurisdictions": ["DE", "FR"]}, {"jurisdiction": "EU"}, "placement:jurisdiction"),
        ({"jurisdictions": ["EEA"]}, {}, "placement:jurisdiction (undeclared)"),
        ({"jurisdictions": ["EEA"]}, {"jurisdiction": None}, "placement:jurisdiction (undeclared)"),
        ({"operators": ["own", "cloud"]}, {"operator": "community"}, "placement:operator"),
        ({"zdr": True}, {"zdr": True}, None),
        ({"zdr": True}, {"zdr": False}, "placement:zdr"),
        ({"zdr": True}, {"zdr": "yes"}, "placement:zdr"),
        ({"zdr": False}, {}, None),
        ({"training": False}, {"training": True}, "placement:training"),
        ({"training": True}, {}, None),
        ({"max_retention_days": 30}, {"max_retention_days": 30}, None),
        ({"max_retention_days": 30}, {"max_retention_days": 31}, "placement:max_retention_days"),
        ({"max_retention_days": 30}, {"max_retention_days": True}, "placement:max_retention_days"),
        ({"tee": True}, {"tee": True}, None),
        ({"data_zones": ["EU"]}, {"data_zone": "DE"}, None),
        ({"jurisdictions": []}, {"jurisdiction": "DE"}, "placement:jurisdiction"),
        ({"jurisdictions": ["DE"]}, {"jurisdiction": "global"}, "placement:jurisdiction"),
        ({"jurisdictions_deny": ["US"]}, {"jurisdiction": "DE"}, None),
        ({"jurisdictions_deny": ["US"]}, {}, "placement:jurisdiction (undeclared)"),
        ({"jurisdictions_deny": ["DE"]}, {"jurisdiction": "EU"}, "placement:jurisdiction"),
        ({"jurisdictions_deny": ["US"]}, {"jurisdiction": "global"}, "placement:jurisdiction"),
        ({"jurisdictions_deny": ["US"]}, {"jurisdiction": "somewhere"}, "placement:jurisdiction"),
        ({"jurisdictions": ["EU"], "jurisdictions_deny": ["HU"]}, {"jurisdiction": "HU"}, "placement:jurisdiction"),
        ({"jurisdictions_deny": []}, {}, None),
        # A machine in Germany whose operator has its seat elsewhere is two facts.
        (
            {"jurisdictions": ["EEA"], "operator_jurisdictions": ["EEA"]},
            {"jurisdiction": "DE", "operator_jurisdiction": "US"},
            "placement:operator_jurisdiction",
        ),
        ({"operator_jurisdictions": ["EEA"]}, {"jurisdiction": "DE"}, "placement:operator_jurisdiction (undeclared)"),
        ({"operator_jurisdictions_deny": ["US"]}, {"operator_jurisdiction": "NO"}, None),
        ({"data_zones": ["EU"]}, {"data_zone": "global"}, "placement:data_zone"),
        ({"tee": True}, {"tee": "gpu"}, None),
        ({"tee": True}, {"tee": "none"}, "placement:tee"),
        ({"tee": "cpu"}, {"tee": "cpu+gpu"}, None),
        ({"tee": "cpu+gpu"}, {"tee": "cpu"}, "placement:tee"),
        ({"tee": ["cpu", "gpu"]}, {"tee": "gpu"}, None),
        # It protects something, but nobody says that it is the GPU.
        ({"tee": "gpu"}, {"tee": True}, "placement:tee"),
        ({"tee": "gpu"}, {}, "placement:tee (undeclared)"),
        ({"tee": "none"}, {}, None),
        ({"tee": []}, {"tee": "cpu+gpu"}, "placement:tee"),
    ],
)
def test_each_constraint(constraint: dict[str, Any], declared: dict[str, Any], reason: str | None) -> None:
    """A pool passes where its declared label satisfies what is asked, and else says which label does not."""
    assert eligible(constraint, declared) == (reason is None, reason)


@given(constraints, constraints, labels)
def test_combining_admits_exactly_what_both_admit(
    job: dict[str, Any], row: dict[str, Any], declared: dict[str, Any]
) -> None:
    """What job and row ask together never admits a pool that either refuses, and refuses none that both admit."""
    both = eligible(job, declared)[0] and eligible(row, declared)[0]
    text = combine(job, row)
    together = eligible(json.loads(text) if text else None, declared)[0]
    assert together == both


@given(constraints, labels)
def test_undeclared_never_passes_a_restriction(constraint: dict[str, Any], declared: dict[str, Any]) -> None:
    """Taking any one label away from a pool never lets it in where it was not."""
    for label in declared:
        less = {key: value for key, value in declared.items() if key != label}
        assert not eligible(constraint, less)[0] or eligible(constraint, declared)[0]
    restricted = set(normalise(constraint))
    assert eligible(constraint, {})[0] == (not restricted)


@given(constraints, constraints, constraints)
def test_combining_is_canonical(one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]) -> None:
    """The order and grouping in which constraints meet does not show in the text, nor does repeating one."""
    assert combine(one, two) == combine(two, one)
    assert combine(combine_(one, two), three) == combine(one, combine(two, three))
    assert combine(one, one) == combine(one, None)


def combine_(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    text = combine(one, two)
    return json.loads(text) if text else {}


def test_zones_are_written_by_their_names() -> None:
    """A zone and a country in it meet in the country; a zone with a member beside it is the zone alone."""
    assert combine({"jurisdictions": ["EEA"]}, '{"jurisdictions": ["de", "US"]}') == '{"jurisdictions":["DE"]}'
    assert combine({"jurisdictions": ["EEA", "DE", "CH"]}, None) == '{"jurisdictions":["EEA","CH"]}'


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("[1]", "object"),
        ("{", "JSON"),
        ({"jurisdiction": ["DE"]}, "'jurisdictions'"),
        ({"jurisdictions": ["UK"]}, "'GB'"),
        ({"jurisdictions": 3}, "list"),
        ({"jurisdictions": ["global"]}, "ISO 3166-1"),
        ({"operators": ["clowd"]}, "'cloud'"),
        ({"tee": "cpu&gpu"}, "cpu\\+gpu"),
        ({"zdr": "yes"}, "true or false"),
        ({"max_retention_days": -1}, "whole number"),
        ({"max_retention_days": 1.5}, "whole number"),
    ],
)
def test_an_unreadable_constraint_is_refused(row: Any, says: str) -> None:
    """A constraint that cannot be read raises, and says what would be right, rather than restrict nothing."""
    with pytest.raises(ConfigError, match=says):
        combine({}, row)


def test_the_countries_are_those_of_iso() -> None:
    """The countries are all of ISO 3166-1, and zones consist of them."""
    pycountry = pytest.importorskip("pycountry")
    assert {country.alpha_2 for country in pycountry.countries} == COUNTRIES
    assert all(members <= COUNTRIES for members in ZONES.values())
    assert (len(ZONES["EU"]), len(ZONES["EEA"])) == (27, 30)


def test_every_label_can_be_asked_for() -> None:
    """No label is declared in vain: each is what some constraint looks at, and no constraint looks at anything else."""
    asked = {
        key: next(value for value in (["DE"], "cpu", True, False, 3, ["own"]) if _restricts(key, value))
        for key in CONSTRAINTS
    }
    reasons = {eligible({key: value}, {})[1] for key, value in asked.items()}
    assert reasons == {f"placement:{label} (undeclared)" for label in LABELS}


def _restricts(key: str, value: Any) -> bool:
    try:
        return bool(normalise({key: value}))
    except ConfigError:
        return False
