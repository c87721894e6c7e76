"""What the errors of each provider mean, as rules: status and words to class. The first rule that matches wins."""

from __future__ import annotations

from bidbeam.connectors.profile_record import ErrorRule

CODES = ("/error/code", "/error/type", "/error/message")
DETAIL = ("/detail", "/detail/message", "/error", "/error/message")
"""Where FastAPI and services like it put what went wrong."""
AWS = ("x-amzn-errortype", "/__type", "/code", "/ErrorCode", "/message", "/Message")

OPENAI: tuple[ErrorRule, ...] = (
    ErrorRule("auth_funds", (429,), "insufficient_quota"),
    ErrorRule("policy", (400, 403), "content_policy"),
    ErrorRule("policy", (400, 403), "content_filter"),
    ErrorRule("policy", (403,), "moderation"),
    ErrorRule("policy", (403,), "flagged"),
    ErrorRule("auth_funds", (401, 402, 403)),
    # A wrong model name or path, or an address that has moved: nothing this pool is sent can be served.
    ErrorRule("auth_funds", (301, 302, 303, 307, 308, 404, 405, 410)),
    ErrorRule("timeout", (408,)),
    ErrorRule("rate", (429,), "rate_limit"),
    ErrorRule("rate", (429,)),
    ErrorRule("capacity", (503, 529), "overloaded"),
    ErrorRule("capacity", (503, 529)),
    ErrorRule("server", (409, 424, 425)),
)

# A 429 of Chutes says that no instance is free, unless it speaks of requests: then it is us.
CHUTES: tuple[ErrorRule, ...] = (
    ErrorRule("rate", (429,), "too many requests", DETAIL),
    ErrorRule("rate", (429,), "rate limit", DETAIL),
    ErrorRule("capacity", (429,), "infra_overload", DETAIL),
    ErrorRule("capacity", (429,), "no_targets", DETAIL),
    ErrorRule("capacity", (429,), "maximum capacity", DETAIL),
    ErrorRule("capacity", (429,)),
    *OPENAI,
)

# A router's 429 may be its provider's; its 402 may be a limit that passes, and then says when.
OPENROUTER: tuple[ErrorRule, ...] = (
    ErrorRule("rate", (402,), waits=True),
    ErrorRule("capacity", (429,), "upstream", ("/error/message", "/error/metadata/raw")),
    *OPENAI,
)

PRIME: tuple[ErrorRule, ...] = (
    ErrorRule("auth_funds", (402, 429), "insufficient_funds"),
    ErrorRule("auth_funds", (402, 429), "insufficient_quota"),
    *OPENAI,
)

AZURE: tuple[ErrorRule, ...] = (
    # A gateway before the endpoint says so of a quota that is used up: no wait of ours will help.
    ErrorRule("auth_funds", (403,), "quota"),
    ErrorRule("policy", (400,), "responsibleaipolicyviolation", (*CODES, "/error/innererror/code")),
    ErrorRule("capacity", (429,), "system is experiencing high demand"),
    ErrorRule("capacity", (429,), "nocapacity"),
    *OPENAI,
)

# Google's 429 is more often a shared machine that is full than a quota of ours, unless it names the quota.
VERTEX: tuple[ErrorRule, ...] = (
    ErrorRule("rate", (429,), "quota exceeded"),
    ErrorRule("capacity", (429,), "resource_exhausted", ("/error/status", "/error/code")),
    ErrorRule("capacity", (429,)),
    ErrorRule("auth_funds", (400, 403), "billing", ("/error/message",)),
    ErrorRule("auth_funds", (400,), "failed_precondition", ("/error/status",)),
    ErrorRule("timeout", (504,)),
    *OPENAI,
)

SAGEMAKER: tuple[ErrorRule, ...] = (
    ErrorRule("capacity", (429,), "modelnotready", AWS),
    ErrorRule("rate", (400, 429), "throttl", AWS),
    ErrorRule("auth_funds", (400, 403), "expiredtoken", AWS),
    ErrorRule("auth_funds", (400, 403), "accessdenied", AWS),
    ErrorRule("auth_funds", (400, 403), "unrecognizedclient", AWS),
    # Its way to say that there is no such endpoint.
    ErrorRule("auth_funds", (400,), "of account", ("/message", "/Message")),
    ErrorRule("server", (530,)),
    # What the container said is quoted as text, whatever it was.
    ErrorRule("policy", (400, 403), "content_policy", ("/OriginalMessage",)),
    ErrorRule("policy", (400, 403), "content_filter", ("/OriginalMessage",)),
    *OPENAI,
)
