"""An S3-speaking server on loopback for tests: ``from s3_server import s3`` makes the fixture known to a module.

Requests that write are served one at a time: this server checks a condition and stores in two steps, a real one in one.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class S3Server:
    """``options`` go to ``Store.at``; ``requests`` records (method, path, has If-None-Match) of what was served."""

    endpoint_url: str
    requests: list[tuple[str, str, bool]] = field(default_factory=list)
    ignore_conditions: bool = False
    """Serve conditional writes as if they were plain: what some S3 look-alikes do."""

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        return {"s3": {"endpoint_url": self.endpoint_url}}

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        import boto3

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        boto3.client("s3", endpoint_url=self.endpoint_url).create_bucket(Bucket=name)
        return name


class _Gate:
    """WSGI middleware: records each request, lets one write through at a time, forgets conditions when told to."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.server: S3Server | None = None
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if self.server is not None:
            self.server.requests.append((method, environ["PATH_INFO"], "HTTP_IF_NONE_MATCH" in environ))
            if self.server.ignore_conditions:
                environ.pop("HTTP_IF_NONE_MATCH", None)
        if method not in {"PUT", "POST", "DELETE"}:
            return self.application(environ, start_response)
        with self._lock:
            return [b"".join(self.application(environ, start_response))]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server for the session; credentials for it are in the environment, as a user's would be."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    previous = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    gate = _Gate(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server = S3Server(f"http://127.0.0.1:{http.server_port}")
    gate.server = server
    yield server
    http.shutdown()
    thread.join()
    for name, value in previous.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
