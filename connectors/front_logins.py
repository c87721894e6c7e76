"""Logins as providers have them, for their fronts: a token endpoint that checks a signed claim, a bearer that is one.

Nothing here is a secret of anyone's: keys are made for a front and gone with it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, quote

from bidbeam.connectors.token_sources import SAGEMAKER_ACTION, SAGEMAKER_HOST, SAGEMAKER_PREFIX

TOKEN_PATH = "/token"  # noqa: S105  # a path


class GoogleLogin:
    """A service account and the endpoint that gives it access tokens for claims it has signed.

    ``lifetime_s``: how long a token holds.
    """

    def __init__(self, lifetime_s: int = 3600) -> None:
        from cryptography.hazmat.primitives.asymmetric import rsa

        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._lifetime_s = lifetime_s
        self._tokens: dict[str, float] = {}
        self.given = 0

    def write_key_file(self, path: Path, host: str) -> Path:
        """The account's key file, for the token endpoint at ``host``."""
        from cryptography.hazmat.primitives import serialization

        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "front",
            "private_key_id": "front-1",
            "private_key": pem.decode(),
            "client_email": "front@front.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"http://{host}{TOKEN_PATH}",
        }
        path.write_text(json.dumps(account))
        return path

    def give(self, form: bytes) -> dict[str, object] | None:
        """An access token for a signed claim; None where the signature is not the account's."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        claim = parse_qs(form.decode("ascii", "replace")).get("assertion", [""])[0]
        signed, _, signature = claim.rpartition(".")
        try:
            self._key.public_key().verify(_unpadded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        except (InvalidSignature, ValueError):
            return None
        token = f"ya29.{secrets.token_urlsafe(24)}"
        self._tokens[token] = time.time() + self._lifetime_s
        self.given += 1
        return {"access_token": token, "expires_in": self._lifetime_s, "token_type": "Bearer"}

    def lets_in(self, token: str) -> bool:
        """Whether ``token`` was given here and still holds."""
        return self._tokens.get(token, 0) > time.time()


class SageMakerLogin:
    """Checks bearers as SageMaker does: a presigned request of ``access_key``, signed with ``secret_key``."""

    def __init__(self, access_key: str, secret_key: str, region: str) -> None:
        self._access_key, self._secret_key, self._region = access_key, secret_key, region

    def __repr__(self) -> str:
        return f"SageMakerLogin({self._access_key!r}, ***, {self._region!r})"

    def lets_in(self, bearer: str) -> bool:
        """Whether the bearer is this account's, for this region and for now."""
        try:
            signed = base64.b64decode(bearer.removeprefix(SAGEMAKER_PREFIX), validate=True).decode("ascii")
        except ValueError:
            return False
        address, _, query = signed.partition("?")
        fields = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        signature = fields.pop("X-Amz-Signature", "")
        if address.rstrip("/") != SAGEMAKER_HOST or fields.pop("Version", "") != "1":
            return False
        if fields.get("Action") != SAGEMAKER_ACTION or not bearer.startswith(SAGEMAKER_PREFIX):
            return False
        try:
            at = datetime.strptime(fields["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            left_s = int(fields["X-Amz-Expires"]) - (datetime.now(UTC) - at).total_seconds()
        except (KeyError, ValueError):
            return False
        scope = f"{at:%Y%m%d}/{self._region}/sagemaker/aws4_request"
        if left_s <= 0 or fields.get("X-Amz-Credential") != f"{self._access_key}/{scope}":
            return False
        return hmac.compare_digest(signature, self._signature(fields, scope))

    def _signature(self, fields: dict[str, str], scope: str) -> str:
        """AWS's Signature Version 4 of a presigned POST without a body."""
        query = "&".join(f"{quote(name, safe='-_.~')}={quote(fields[name], safe='-_.~')}" for name in sorted(fields))
        canonical = f"POST\n/\n{query}\nhost:{SAGEMAKER_HOST}\n\nhost\n{hashlib.sha256(b'').hexdigest()}"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{fields['X-Amz-Date']}\n{scope}\n{digest}"
        key = f"AWS4{self._secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.new(key, to_sign.encode(), "sha256").hexdigest()


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
