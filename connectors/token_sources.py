"""Where short-lived tokens come from: Google's login, Microsoft's, and AWS credentials that sign one on this machine.

Each is a function that gives a source. The packages that do the work are imported when a token is first asked for.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from bidbeam.connectors.errors import ConfigError

SAGEMAKER_PREFIX = "sagemaker-api-key-"
SAGEMAKER_HOST = "sagemaker.amazonaws.com"
SAGEMAKER_ACTION = "CallWithBearerToken"
_LOGIN_S = 20.0
"""Google's own patience is two minutes, for which no run should hang when it is told to end."""
_SIGNED_FOR = timedelta(hours=1)
_USED_FOR = timedelta(minutes=15)
"""A token is no better than the credentials that signed it, which may end first: sign often, it costs nothing."""


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token; ``expires_at`` None: it does not say."""

    value: str = field(repr=False)
    expires_at: datetime | None = None


TokenSource = Callable[[], Token]
"""Fetches or signs a token. Raises ConfigError where there is nothing to do it with."""


def _missing(package: str, extra: str, where: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed", key=where, expected=f"pip install 'bidbeam[{extra}]', or a key in api_key_env"
    )


def google_tokens(scope: str, where: str, key_file: str | None = None) -> TokenSource:
    """Access tokens of a service account's key file, or of the application default credentials without one."""
    held: list[Any] = []

    def fetch() -> Token:
        try:
            import google.auth
            from google.auth.exceptions import GoogleAuthError
            from google.auth.transport.requests import Request
            from google.oauth2.service_account import Credentials
        except ImportError:
            raise _missing("google-auth", "google", where) from None
        try:
            if not held:
                held.append(
                    Credentials.from_service_account_file(key_file, scopes=[scope])  # type: ignore[no-untyped-call]
                    if key_file
                    else google.auth.default(scopes=[scope])[0]
                )
            held[0].refresh(partial(Request(), timeout=_LOGIN_S))
        except (GoogleAuthError, OSError, ValueError) as error:
            source = f"the key file {key_file}" if key_file else "the application default credentials"
            expected = "a service account's key file" if key_file else "gcloud auth application-default login"
            # Google's own text may quote the answer of the token endpoint.
            problem = f"no access token from {source}: {type(error).__name__}"
            raise ConfigError(problem, key=where, expected=expected) from None
        expiry = held[0].expiry
        return Token(held[0].token, None if expiry is None else expiry.replace(tzinfo=UTC))

    return fetch


def entra_tokens(scope: str, where: str) -> TokenSource:
    """Tokens of Microsoft Entra, by whatever identity this machine has."""
    held: list[Any] = []

    def fetch() -> Token:
        try:
            from azure.core.exceptions import AzureError
            from azure.identity import DefaultAzureCredential
        except ImportError:
            raise _missing("azure-identity", "azure", where) from None
        try:
            if not held:
                held.append(DefaultAzureCredential())
            found = held[0].get_token(scope)
        except (AzureError, OSError, ValueError) as error:
            problem = f"no token from Microsoft Entra: {type(error).__name__}"
            raise ConfigError(problem, key=where, expected="az login, an identity, or a key in api_key_env") from None
        return Token(found.token, datetime.fromtimestamp(found.expires_on, UTC))

    return fetch


def sagemaker_tokens(region: str, where: str, aws_profile: str | None = None) -> TokenSource:
    """Bearer tokens for SageMaker's OpenAI path: a presigned request that AWS credentials sign on this machine."""
    held: list[Any] = []

    def fetch() -> Token:
        try:
            from botocore.exceptions import BotoCoreError, ClientError
            from botocore.session import Session
        except ImportError:
            raise _missing("boto3", "aws", where) from None
        try:
            if not held:
                held.append(Session(profile=aws_profile))
            credentials = held[0].get_credentials()
            frozen = None if credentials is None else credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError, OSError, ValueError) as error:
            problem = f"no AWS credentials: {type(error).__name__}"
            raise ConfigError(problem, key=where, expected="credentials where AWS's tools look for them") from None
        if frozen is None:
            raise ConfigError("no AWS credentials", key=where, expected="credentials where AWS's tools look for them")
        return Token(sagemaker_bearer(frozen, region), datetime.now(UTC) + _USED_FOR)

    return fetch


def sagemaker_bearer(credentials: Any, region: str, signed_for: timedelta = _SIGNED_FOR) -> str:
    """The bearer that ``credentials`` (access_key, secret_key, token) sign for a region; needs no network."""
    from botocore.auth import SigV4QueryAuth
    from botocore.awsrequest import AWSRequest

    request = AWSRequest(
        "POST",
        f"https://{SAGEMAKER_HOST}/",
        headers={"host": SAGEMAKER_HOST},
        params={"Action": SAGEMAKER_ACTION},
    )
    SigV4QueryAuth(credentials, "sagemaker", region, expires=int(signed_for.total_seconds())).add_auth(request)
    signed = f"{request.url.removeprefix('https://')}&Version=1"
    return SAGEMAKER_PREFIX + base64.b64encode(signed.encode()).decode()
