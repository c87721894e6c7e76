"""What an error means, by its profile's rules, and how long to wait after it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType

from bidbeam.connectors.profile_record import ErrorClass, ErrorRule, Profile
from bidbeam.connectors.provider_text import MESSAGE_READ
from bidbeam.connectors.wire_json import pointer, whole

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def classify(
    profile: Profile,
    http_status: int,
    document: object = None,
    headers: Mapping[str, str] = _NO_HEADERS,
    *,
    waits: bool = False,
) -> ErrorClass:
    """The class of an error by the profile's rules; where none matches ``server`` from 500 up, else ``caller``.

    ``waits``: whether the answer names a time to wait.
    """
    found = by_rules(profile, http_status, document, headers, waits)
    return found or ("server" if http_status >= 500 else "caller")


def by_rules(
    profile: Profile, http_status: int | None, document: object, headers: Mapping[str, str], waits: bool
) -> ErrorClass | None:
    """The class by the first rule that matches, None where none does. ``http_status`` None: only rules that look for
    words are asked, whatever statuses they are for.
    """
    for rule in profile.error_map:
        if (waits or not rule.waits) and _matches(rule, http_status, document, headers):
            return rule.error_class
    return None


def _matches(rule: ErrorRule, http_status: int | None, document: object, headers: Mapping[str, str]) -> bool:
    if http_status is None and not rule.contains:
        return False
    if rule.statuses and http_status is not None and http_status not in rule.statuses:
        return False
    if not rule.contains:
        return True
    texts = (pointer(document, each) if each.startswith("/") else headers.get(each) for each in rule.pointers)
    return any(isinstance(text, str) and rule.contains in text.lower() for text in texts)


def inner_status(profile: Profile, document: object) -> int | None:
    """The status that an error quotes of what stands behind the provider, as far as it is one of an error."""
    status = None if profile.inner_status is None else whole(pointer(document, profile.inner_status))
    return status if status is not None and 400 <= status < 600 else None


def error_of(document: object) -> object:
    """The error that an answer holds: ``error`` or ``detail`` at its top, or ``error`` of its first choice."""
    if not isinstance(document, dict):
        return None
    found = document.get("error")
    if not found and not document.get("choices"):
        names = ("detail", "OriginalMessage", "message", "Message")
        found = next((document[name] for name in names if document.get(name)), None)
    return found or pointer(document, "/choices/0/error") or None


def status_of(error: object) -> int | None:
    """The HTTP status that an error inside an answer names as its code."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    status = whole(code)
    return status if status is not None and 400 <= status < 600 else None


def retry_after_s(profile: Profile, headers: Mapping[str, str], now: Callable[[], datetime]) -> float | None:
    """Seconds to wait as the endpoint asks, from a number or an HTTP date; None where it does not say."""
    for name in profile.retry_after_headers:
        value = headers.get(name, "").strip()
        if not value:
            continue
        seconds = _seconds(value, now)
        if seconds is not None and math.isfinite(seconds) and seconds >= 0:
            return seconds / 1000 if name.endswith("-ms") else seconds
    return None


def _seconds(value: str, now: Callable[[], datetime]) -> float | None:
    try:
        return float(value)
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now()).total_seconds())


_WAIT = re.compile(r" *(\d{1,6}(?:\.\d{1,6})?) ?(ms|milliseconds?|s|seconds?|m|minutes?|h|hours?)(?![a-z])")
_UNIT_S = {"ms": 0.001, "mi": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def told_wait_s(profile: Profile, error: object) -> float | None:
    """Seconds to wait as an error's message has it: ``Please retry after 6 seconds.``, ``try again in 1m30s``."""
    said = error.get("message") if isinstance(error, dict) else error
    if not isinstance(said, str):
        return None
    text = said[:MESSAGE_READ].lower()
    for phrase in profile.retry_after_phrases:
        at, seconds = text.find(phrase), 0.0
        found = _WAIT.match(text, at + len(phrase)) if at >= 0 else None
        while found:
            unit = "m" if found[2].startswith("minute") else found[2]
            seconds += float(found[1]) * (_UNIT_S.get(unit[:2]) or _UNIT_S[unit[0]])
            found = _WAIT.match(text, found.end())
        if seconds:
            return seconds
    return None
