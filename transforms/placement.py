"""Where a prompt may go: a job's and a row's constraint against the labels that a pool declares.

Three-valued, and closed in doubt: a label that a pool does not declare (absent or null) never passes a constraint
that restricts it. A constraint that is absent or null restricts nothing.

    constraint                        label                  passes where the pool declares
    jurisdictions [..]                jurisdiction           a country, or a zone whose every member is listed
    jurisdictions_deny [..]           jurisdiction           one that has no country in common with them
    operators [..]                    operator               one of them: own, cloud, datacenter, community
    operator_jurisdictions [..]       operator_jurisdiction  as for jurisdictions
    operator_jurisdictions_deny [..]  operator_jurisdiction  as for jurisdictions_deny
    data_zones [..]                   data_zone              a zone or country that lies within them
    zdr true                          zdr                    true
    training false                    training               false
    max_retention_days n              max_retention_days     n or fewer
    tee cpu, gpu, cpu+gpu or a list   tee                    one that protects at least what one of them does
    tee true                          tee                    any but none

``jurisdiction`` is where prompts are processed, ``operator_jurisdiction`` where whoever runs the pool has its legal
seat, ``data_zone`` what data never leaves. A place is an ISO 3166-1 country, EU or EEA; a pool may also declare
``global``, which is anywhere. ``zdr: false``, ``training: true``, ``tee: false``, ``tee: none`` and an empty list of
what is denied ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.near import near

_COUNTRIES = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ
CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO
FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE
JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO
MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW
PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM
TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
"""
COUNTRIES = frozenset(_COUNTRIES.split())
"""ISO 3166-1 alpha-2."""

_EU_MEMBERS = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
_EU = frozenset(_EU_MEMBERS.split())
ZONES: Mapping[str, frozenset[str]] = {"EEA": _EU | {"IS", "LI", "NO"}, "EU": _EU}
"""Zones that stand for their member countries; the larger first, which makes the canonical form unique."""

ANYWHERE = "GLOBAL"
"""The place that a pool declares which may work in any country."""

OPERATORS = ("own", "cloud", "datacenter", "community")
"""Who runs a pool: we, a cloud, a company with its own machines, or anybody."""

TEES = ("none", "cpu", "gpu", "cpu+gpu")
"""What a pool's trusted execution environment protects. A label may also be true: some of it, nobody says which."""

LABELS = (
    "jurisdiction", "operator", "operator_jurisdiction", "zdr", "data_zone", "training", "max_retention_days", "tee",
)  # fmt: skip
"""What a pool may declare."""

PLACEMENT_PREFIX = "placement:"
UNDECLARED = " (undeclared)"


def _places(value: Any, key: str) -> list[str]:
    """Countries and zones, expanded, sorted, then written with the largest zones they fill."""
    named = [name.upper() for name in _names(value, key)]
    for name in named:
        if name not in COUNTRIES and name not in ZONES:
            raise ConfigError(
                f"{name[:16]!r} is neither a country nor a zone",
                key=f"placement.{key}",
                expected="ISO 3166-1 alpha-2 codes, EEA or EU",
                nearest="GB" if name == "UK" else near(name, (*COUNTRIES, *ZONES)),
            )
    return _compress(_expand(named))


def _expand(names: list[str]) -> frozenset[str]:
    return frozenset().union(*(ZONES.get(name, frozenset((name,))) for name in names))


def _compress(countries: frozenset[str]) -> list[str]:
    for zone, members in ZONES.items():
        if members <= countries:
            return [zone, *sorted(countries - members)]
    return sorted(countries)


def _names(value: Any, key: str) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) and name for name in listed):
        raise ConfigError("is not a list of names", key=f"placement.{key}", expected="a list of text")
    return sorted(set(listed))


def _operators(value: Any, key: str) -> list[str]:
    return _known_names(value, key, OPERATORS)


def _known_names(value: Any, key: str, known: tuple[str, ...]) -> list[str]:
    names = _names(value, key)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name[:16]!r} is none that there is",
                key=f"placement.{key}",
                expected=", ".join(known),
                nearest=near(name, known),
            )
    return names


_PROTECTS: Mapping[str, frozenset[str]] = {
    "cpu": frozenset({"cpu", "cpu+gpu"}),
    "gpu": frozenset({"gpu", "cpu+gpu"}),
    "cpu+gpu": frozenset({"cpu+gpu"}),
}
"""What is asked for -> the labels that give it."""


def _tee(value: Any, key: str) -> bool | list[str]:
    """True: any; False: nothing is asked for; else the labels that pass."""
    if isinstance(value, bool):
        return value
    names = _known_names(value, key, TEES)
    if "none" in names:
        return False
    return sorted(frozenset().union(*(_PROTECTS[name] for name in names)))


def _meet_tee(one: bool | list[str], other: bool | list[str]) -> bool | list[str]:
    if isinstance(one, bool) or isinstance(other, bool):
        return other if isinstance(one, bool) else one
    return _meet_names(one, other)


def _protected(asked: bool | list[str], declared: Any) -> bool:
    if isinstance(asked, bool):
        return declared is True or declared in TEES[1:]
    return declared in asked


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError("is not a yes or no", key=f"placement.{key}", expected="true or false")
    return value


def _days(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError("is not a number of days", key=f"placement.{key}", expected="a whole number from 0")
    return value


def _countries(declared: Any) -> frozenset[str] | None:
    """The countries that a label may mean, or None where it is no place."""
    if not isinstance(declared, str):
        return None
    place = declared.upper()
    found = COUNTRIES if place == ANYWHERE else _expand([place])
    return found if found <= COUNTRIES else None


def countries_of(declared: Any) -> frozenset[str] | None:
    """The countries that a pool is in by its label; None where it declares none, or may be anywhere."""
    countries = _countries(declared)
    return None if countries == COUNTRIES else countries


def _within(allowed: list[str], declared: Any) -> bool:
    countries = _countries(declared)
    return countries is not None and countries <= _expand(allowed)


def _outside(denied: list[str], declared: Any) -> bool:
    countries = _countries(declared)
    return countries is not None and countries.isdisjoint(_expand(denied))


def _meet_places(one: list[str], other: list[str]) -> list[str]:
    return _compress(_expand(one) & _expand(other))


def _join_places(one: list[str], other: list[str]) -> list[str]:
    return _compress(_expand(one) | _expand(other))


def _meet_names(one: list[str], other: list[str]) -> list[str]:
    return sorted(set(one) & set(other))


class _Rule:
    """One constraint: how it is read, which value asks for nothing, how two of it meet, and what passes it."""

    __slots__ = ("idle", "label", "meet", "passes", "read")

    def __init__(
        self,
        label: str,
        read: Callable[[Any, str], Any],
        meet: Callable[[Any, Any], Any],
        passes: Callable[[Any, Any], bool],
        idle: Any = None,
    ) -> None:
        self.label, self.read, self.meet, self.passes, self.idle = label, read, meet, passes, idle


def _only(wanted: bool) -> Callable[[Any, Any], bool]:
    return lambda _asked, declared: declared is wanted


def _at_most(asked: Any, declared: Any) -> bool:
    return isinstance(declared, int) and not isinstance(declared, bool) and 0 <= declared <= asked


_RULES: dict[str, _Rule] = {
    "jurisdictions": _Rule("jurisdiction", _places, _meet_places, _within),
    "jurisdictions_deny": _Rule("jurisdiction", _places, _join_places, _outside, idle=[]),
    "operators": _Rule("operator", _operators, _meet_names, lambda asked, declared: declared in asked),
    "operator_jurisdictions": _Rule("operator_jurisdiction", _places, _meet_places, _within),
    "operator_jurisdictions_deny": _Rule("operator_jurisdiction", _places, _join_places, _outside, idle=[]),
    "zdr": _Rule("zdr", _flag, lambda _one, _other: True, _only(True), idle=False),
    "data_zones": _Rule("data_zone", _places, _meet_places, _within),
    "training": _Rule("training", _flag, lambda _one, _other: False, _only(False), idle=True),
    "max_retention_days": _Rule("max_retention_days", _days, min, _at_most),
    "tee": _Rule("tee", _tee, _meet_tee, _protected, idle=False),
}

CONSTRAINTS = tuple(_RULES)
"""The keys of a job's ``placement`` block and of a row's ``placement`` column."""


def normalise(constraint: Mapping[str, Any] | None) -> dict[str, Any]:
    """The constraint in canonical form: known keys, checked values, nothing that asks for nothing.

    Raises ConfigError, its ``key`` beginning with ``placement``, for an unknown key or a wrong value.
    """
    canonical: dict[str, Any] = {}
    for key, value in (constraint or {}).items():
        rule = _RULES.get(key)
        if rule is None:
            raise ConfigError(
                f"unknown constraint {str(key)[:32]!r}",
                key="placement",
                expected="one of " + ", ".join(CONSTRAINTS),
                nearest=near(str(key), CONSTRAINTS),
            )
        if value is None:
            continue
        read = rule.read(value, key)
        if rule.idle is None or read != rule.idle:
            canonical[key] = read
    return canonical


def combine(job: Mapping[str, Any] | None, row: Mapping[str, Any] | str | None) -> str | None:
    """The canonical JSON of what both ask for, or None where neither restricts anything.

    ``row`` is a mapping (a struct column), JSON text, or null. It can only tighten: lists meet, the shorter retention
    counts, and a requirement of either stands. A meeting may be empty; then no pool passes. Raises ConfigError for a
    constraint that cannot be read.
    """
    ours, theirs = normalise(job), normalise(_read_row(row))
    met = dict(ours)
    for key, value in theirs.items():
        met[key] = _RULES[key].meet(ours[key], value) if key in ours else value
    return json.dumps(met, sort_keys=True, separators=(",", ":")) if met else None


def _read_row(row: Mapping[str, Any] | str | None) -> Mapping[str, Any] | None:
    if row is None or isinstance(row, Mapping):
        return row
    try:
        value = json.loads(row) if row.strip() else None
    except (ValueError, RecursionError):
        raise ConfigError("is not JSON", key="placement", expected="a JSON object of constraints") from None
    if value is not None and not isinstance(value, dict):
        raise ConfigError("is not an object", key="placement", expected="a JSON object of constraints")
    return value


def broken_label(labels: Mapping[str, Any], country: str) -> str | None:
    """What the labels declare of where prompts are processed, where that leaves ``country`` out; None where it does
    not, or nothing is declared."""
    for name in ("jurisdiction", "data_zone"):
        countries = _countries(labels.get(name))
        if countries is not None and country not in countries:
            return str(labels[name])
    return None


def eligible(constraint: Mapping[str, Any] | None, labels: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a pool with these labels may serve, and if not, which label says no.

    The reason reads ``placement:<label>``, followed by `` (undeclared)`` where the pool says nothing. Raises
    ConfigError for a constraint that cannot be read; a label of a wrong type does not pass.
    """
    for key, asked in normalise(constraint).items():
        rule = _RULES[key]
        declared = labels.get(rule.label)
        if declared is None:
            return False, PLACEMENT_PREFIX + rule.label + UNDECLARED
        if not rule.passes(asked, declared):
            return False, PLACEMENT_PREFIX + rule.label
    return True, None
