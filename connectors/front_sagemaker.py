"""A front of SageMaker's runtime, for tests: real signatures, paths, headers and errors before an OpenAI-style server.

    with EndpointDouble(["tiny"]) as container, SagemakerFront(container.base_url) as front:
        pool = ...  # base_url: front.url, options: {region: eu-central-1, endpoint: front.endpoint}

What comes to ``/endpoints/{name}/invocations`` is checked as AWS checks it and handed to the container, whose errors
come back as ``ModelError``.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.front_server import Call, FrontServer, forwarded

ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLEEXAMPLE00", "a-secret-of-tests-only"
ACCOUNT = "111122223333"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(\S+?)/(\d{8})/([a-z0-9-]+)/sagemaker/aws4_request, "
    r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})"
)


class SagemakerFront(FrontServer):
    """Serves ``endpoint`` by the OpenAI-compatible server at ``upstream`` (``/v1`` included).

    ``faults`` are replies to the first calls instead, None among them for a true answer; make them with
    ``sagemaker_error`` or ``model_error``. ``token``: the session token that temporary credentials must show.
    """

    def __init__(
        self,
        upstream: str,
        faults: Iterable[Reply | None] = (),
        *,
        endpoint: str = "chat-endpoint",
        token: str | None = None,
    ) -> None:
        super().__init__()
        self.endpoint = endpoint
        self._upstream, self._faults, self._token = upstream, list(faults), token
        self._numbers = itertools.count()

    def answer(self, call: Call) -> Reply:
        refused = self._refused(call)
        if refused is not None:
            return refused
        number = next(self._numbers)
        fault = self._faults[number] if number < len(self._faults) else None
        if fault is not None:
            return fault
        path = "chat/completions" if "messages" in call.body else "completions"
        attempt = call.headers.get("x-amzn-sagemaker-inference-id", "")
        status, body = forwarded(self._upstream, path, call.raw, {"X-Request-Id": attempt})
        if status >= 400:
            return model_error(status, body.decode("utf-8", "replace"))
        return Reply(status, body, {**_request_id(), "x-Amzn-Invoked-Production-Variant": "AllTraffic"})

    def _refused(self, call: Call) -> Reply | None:
        match = _AUTHORIZATION.fullmatch(call.headers.get("authorization", ""))
        if match is None:
            return sagemaker_error(403, "MissingAuthenticationTokenException", "Missing Authentication Token")
        access, day, region, signed, signature = match.groups()
        if access != ACCESS_KEY or call.headers.get("x-amz-security-token") != self._token:
            return sagemaker_error(
                403, "UnrecognizedClientException", "The security token included in the request is invalid."
            )
        if not hmac.compare_digest(signature, _signature(call, day, region, signed.split(";"))):
            return sagemaker_error(
                403, "InvalidSignatureException", "The request signature we calculated does not match."
            )
        name = re.fullmatch(r"/endpoints/([^/]+)/invocations", call.path)
        if name is None or call.method != "POST":
            return sagemaker_error(404, "UnknownOperationException", "")
        if name[1] != self.endpoint:
            return sagemaker_error(400, "ValidationError", f"Endpoint {name[1]} of account {ACCOUNT} not found.")
        return None


def sagemaker_error(
    status: int, kind: str, message: str, *, headers: Mapping[str, str] | None = None, **members: Any
) -> Reply:
    """An error as the runtime sends it: its kind in a header, its members in the body."""
    body = json.dumps({"Message": message, **members}).encode()
    kinds = {"x-amzn-ErrorType": f"{kind}:http://internal.amazon.com/coral/com.amazon.sagemaker.runtime/"}
    return Reply(status, body, {**kinds, **_request_id(), **(headers or {})})


def model_error(status: int, body: str) -> Reply:
    """What the container answered, as the runtime wraps it."""
    side = "client" if status < 500 else "server"
    log = f"arn:aws:logs:eu-central-1:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/chat-endpoint"
    return sagemaker_error(
        424,
        "ModelError",
        f'Received {side} error ({status}) from primary with message "{body}".',
        ErrorCode=f"{side.upper()}_ERROR_FROM_MODEL",
        LogStreamArn=log,
        OriginalMessage=body,
        OriginalStatusCode=status,
    )


def _request_id() -> dict[str, str]:
    return {"x-amzn-RequestId": str(uuid.uuid4())}


def _signature(call: Call, day: str, region: str, signed: list[str]) -> str:
    """Signature Version 4 of a request, as the receiver computes it."""
    headers = "".join(f"{name}:{' '.join(call.headers.get(name, '').split())}\n" for name in signed)
    query = "&".join(f"{quote(k, '-_.~')}={quote(v, '-_.~')}" for k, v in sorted(call.query.items()))
    digest = hashlib.sha256(call.raw).hexdigest()
    canonical = "\n".join([call.method, quote(call.path, "/-_.~"), query, headers, ";".join(signed), digest])
    scope = f"{day}/{region}/sagemaker/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    told = f"AWS4-HMAC-SHA256\n{call.headers.get('x-amz-date', '')}\n{scope}\n{hashed}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (day, region, "sagemaker", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.new(key, told.encode(), hashlib.sha256).hexdigest()
