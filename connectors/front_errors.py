"""What each provider sends when a request fails, status, headers and body, for its front (see ``fronts``) to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from bidbeam.connectors.doubles import Reply

Case = Literal[
    "wrong_key", "no_funds", "rate", "rate_with_wait", "no_capacity", "error_inside", "wrong_model", "refused_content",
    "server",
]  # fmt: skip
"""What went wrong: the key, the account, our speed (the provider names a time to wait, or not), the provider's room,
an error inside a 200, a model that it does not know, content that it does not take, the provider itself.
"""


def _reply(status: int, document: object, **headers: str) -> Reply:
    return Reply(
        status, json.dumps(document).encode(), {name.replace("_", "-"): text for name, text in headers.items()}
    )


def _openai(status: int, message: str, kind: str, code: object = None, **headers: str) -> Reply:
    return _reply(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, **headers)


def _router(status: int, message: str, metadata: Mapping[str, Any] | None = None, **headers: str) -> Reply:
    error: dict[str, Any] = {"message": message, "code": status}
    return _reply(status, {"error": error | ({"metadata": metadata} if metadata else {})}, **headers)


def _detail(status: int, detail: object, **headers: str) -> Reply:
    return _reply(status, {"detail": detail}, **headers)


def _azure(status: int, code: str, message: str, **headers: str) -> Reply:
    return _reply(status, {"error": {"code": code, "message": message}}, **headers)


def _google(status: int, state: str, message: str, **headers: str) -> Reply:
    return _reply(status, [{"error": {"code": status, "message": message, "status": state}}], **headers)


def _aws(status: int, kind: str, message: str, **headers: str) -> Reply:
    return _reply(status, {"message": message}, x_amzn_errortype=kind, **headers)


def _vllm(status: int, message: str, kind: str, **headers: str) -> Reply:
    return _reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}}, **headers)


_OPENAI: Mapping[Case, Reply] = {
    "wrong_key": _openai(401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    "no_funds": _openai(429, "The quota of this account is used up.", "insufficient_quota", "insufficient_quota"),
    "rate": _openai(429, "Rate limit reached for requests.", "requests", "rate_limit_exceeded"),
    "rate_with_wait": _openai(
        429, "Rate limit reached. Please try again in 250ms.", "tokens", "rate_limit_exceeded", x_request_id="req-1"
    ),
    "no_capacity": _openai(503, "The engine is currently overloaded.", "server_error"),
    "error_inside": Reply.error_inside(503, "The engine is currently overloaded."),
    "wrong_model": _openai(404, "The model does not exist.", "invalid_request_error", "model_not_found"),
    "refused_content": _openai(
        400, "Refused by the content policy.", "invalid_request_error", "content_policy_violation"
    ),
    "server": _openai(500, "The server had an error.", "server_error"),
}

_BALANCE = {
    "message": "Account balance is $0.0, please pay with fiat or send tao to an address of yours",
    "quota_reset_timestamp": "2026-12-01T00:00:00Z",
}

ERRORS: Mapping[str, Mapping[Case, Reply]] = MappingProxyType(
    {
        "openai": _OPENAI,
        "openrouter": {
            "wrong_key": _router(401, "No auth credentials found"),
            "no_funds": _router(402, "Insufficient credits", {"limit_source": "openrouter_credits"}),
            "rate": _router(429, "Rate limit exceeded: requests per minute"),
            "rate_with_wait": _router(
                402, "In-flight budget used", {"limit_source": "openrouter_in_flight_budget"}, retry_after="3"
            ),
            "no_capacity": _router(
                429,
                "Provider returned error",
                {"raw": "the model is temporarily rate-limited upstream", "provider_name": "one"},
            ),
            "error_inside": _reply(
                200,
                {
                    "id": "gen-1",
                    "choices": [
                        {"error": {"code": 502, "message": "The provider went away"}, "finish_reason": "error"}
                    ],
                },
            ),
            "wrong_model": _router(404, "No endpoints found for this model"),
            "refused_content": _router(403, "The input was flagged", {"reasons": ["violence"], "flagged_input": "..."}),
            "server": _router(502, "The provider's answer was not valid"),
        },
        "chutes": {
            "wrong_key": _detail(401, "Authentication failed"),
            "no_funds": _detail(402, _BALANCE),
            "rate": _detail(429, "Too many requests"),
            "rate_with_wait": _detail(429, "Too many requests", retry_after="3"),
            "no_capacity": _detail(429, "Infrastructure is at maximum capacity, try again later"),
            "error_inside": _reply(200, {"error": "infra_overload", "detail": "no_targets"}),
            "wrong_model": _detail(404, "model not found"),
            "refused_content": _detail(400, "bad_request"),
            "server": _detail(500, "internal error"),
        },
        "prime": {
            "wrong_key": _openai(401, "Invalid API key.", "authentication_error", "invalid_api_key"),
            "no_funds": _openai(402, "Insufficient balance.", "insufficient_quota", "insufficient_funds"),
            "rate": _openai(429, "Rate limit exceeded.", "rate_limit_error", "rate_limit_exceeded"),
            "rate_with_wait": _openai(
                429, "Rate limit exceeded.", "rate_limit_error", "rate_limit_exceeded", retry_after="3"
            ),
            "no_capacity": _openai(503, "No capacity for this model.", "server_error"),
            "error_inside": Reply.error_inside(503, "No capacity for this model."),
            "wrong_model": _openai(404, "The model does not exist.", "invalid_request_error", "model_not_found"),
            "refused_content": _openai(400, "Refused.", "invalid_request_error", "content_policy_violation"),
            "server": _openai(500, "Internal error.", "server_error"),
        },
        "pai3": {
            "wrong_key": _reply(401, {"error": "Unauthorized"}),
            "no_funds": _vllm(402, "No compute minutes are left.", "PaymentRequired"),
            "rate": _vllm(429, "Too many requests.", "TooManyRequests"),
            "rate_with_wait": _vllm(429, "Too many requests.", "TooManyRequests", retry_after="3"),
            "no_capacity": _vllm(503, "The server is overloaded.", "ServiceUnavailable"),
            "error_inside": Reply.error_inside(503, "The server is overloaded."),
            "wrong_model": _vllm(404, "The model does not exist.", "NotFoundError"),
            "refused_content": _vllm(403, "Refused by moderation.", "Forbidden"),
            "server": _vllm(500, "Internal server error.", "InternalServerError"),
        },
        "azure": {
            "wrong_key": _azure(401, "401", "Access denied due to invalid subscription key or wrong API endpoint."),
            "no_funds": _reply(403, {"statusCode": 403, "message": "Out of call volume quota."}),
            "rate": _azure(429, "429", "The token rate limit of this deployment is reached."),
            "rate_with_wait": _azure(
                429,
                "429",
                "The token rate limit is reached. Please retry after 6 seconds.",
                x_ratelimit_remaining_tokens="0",
            ),
            "no_capacity": _azure(429, "NoCapacity", "The system is experiencing high demand."),
            "error_inside": Reply.error_inside("503", "The service is not available."),
            "wrong_model": _azure(404, "DeploymentNotFound", "The deployment for this resource does not exist."),
            "refused_content": _reply(
                400,
                {
                    "error": {
                        "code": "content_filter",
                        "message": "The response was filtered.",
                        "innererror": {"code": "ResponsibleAIPolicyViolation"},
                    }
                },
            ),
            "server": _azure(500, "InternalServerError", "The service had an error."),
        },
        "vertex": {
            "wrong_key": _google(401, "UNAUTHENTICATED", "Request had invalid authentication credentials."),
            "no_funds": _google(403, "PERMISSION_DENIED", "This API method requires billing to be enabled."),
            "rate": _google(
                429, "RESOURCE_EXHAUSTED", "Quota exceeded for aiplatform.googleapis.com/online_prediction_requests."
            ),
            "rate_with_wait": _google(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", retry_after="3"),
            "no_capacity": _google(429, "RESOURCE_EXHAUSTED", "Resource exhausted. Please try again later."),
            "error_inside": _reply(
                200, [{"error": {"code": 503, "message": "Not available.", "status": "UNAVAILABLE"}}]
            ),
            "wrong_model": _google(404, "NOT_FOUND", "Publisher Model was not found."),
            "refused_content": _reply(
                200, {"choices": [{"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant"}}]}
            ),
            "server": _google(500, "INTERNAL", "Internal error encountered."),
        },
        "sagemaker": {
            "wrong_key": _aws(
                403, "UnrecognizedClientException", "The security token included in the request is invalid."
            ),
            # AWS bills later; what stops is the permission.
            "no_funds": _aws(
                403, "AccessDeniedException", "User is not authorized to perform: sagemaker:InvokeEndpoint"
            ),
            "rate": _aws(400, "ThrottlingException", "Rate exceeded"),
            "rate_with_wait": _aws(429, "ThrottlingException", "Rate exceeded", retry_after="3"),
            "no_capacity": _aws(429, "ModelNotReadyException", "The model is not ready to serve yet."),
            "error_inside": Reply.error_inside(503, "The container is overloaded."),
            "wrong_model": _aws(400, "ValidationError", "Endpoint other of account 000000000000 not found."),
            "refused_content": _vllm(400, "Refused by the content_filter.", "BadRequestError"),
            "server": _reply(
                424,
                {
                    "ErrorCode": "MODEL_ERROR",
                    "OriginalStatusCode": 500,
                    "OriginalMessage": "CUDA error",
                    "Message": "Received server error (500) from primary.",
                },
                x_amzn_errortype="ModelError",
            ),
        },
    }
)
"""By profile and case. Wording is ours where the provider's is not what is looked for."""
