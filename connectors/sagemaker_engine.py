"""The engine of an Amazon SageMaker endpoint that is asked through InvokeEndpoint, by AWS's own client.

The container behind the endpoint (vLLM, or one that speaks like it) takes OpenAI-style bodies; what is particular is
how they get there: signed by boto3 with whatever credentials its chain finds, with the name of the prefix that a
request shares with its neighbours, by which the endpoint can send them to the instance that holds it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Any

import pyarrow as pa

from bidbeam import __version__
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.http_engine import DEFAULT_CONCURRENCY, HttpEngine, _Job
from bidbeam.connectors.http_transport import CONNECT_S, endpoint, failure, is_loopback
from bidbeam.connectors.http_wire import Outcome, read_answer
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.profiles import ErrorClass

PREFIX_HEADER = "X-Amzn-SageMaker-Prefix-Aware-Id"

_OURS: dict[str, tuple[ErrorClass, str]] = {
    "ConnectTimeoutError": ("timeout", "the endpoint does not take connections"),
    "ReadTimeoutError": ("timeout", "no answer in time"),
    "EndpointConnectionError": ("server", "cannot connect"),
    "ProxyConnectionError": ("server", "cannot connect to the proxy"),
    "SSLError": ("server", "TLS failed"),
    "IncompleteReadError": ("bad_output", "the answer broke off"),
    "ResponseStreamingError": ("bad_output", "the answer broke off"),
    "ResponseParserError": ("bad_output", "the endpoint does not answer as SageMaker does"),
    "HTTPClientError": ("server", "the connection was lost before the answer came"),
    "ParamValidationError": ("caller", "AWS's client refuses to send this request"),
    # All that is left of what AWS's client raises by itself: keys that are missing, expired or not to be refreshed.
    "BotoCoreError": ("auth_funds", "no usable AWS credentials"),
}
"""What an exception of AWS's client amounts to, by the name of the nearest of its classes; its text is left out."""
MOST_ERROR_BYTES = 2**20
"""Of an error AWS's client reads all that comes, before anybody can ask how much that is."""
_UNCONNECTED = frozenset({"ConnectTimeoutError", "EndpointConnectionError", "ProxyConnectionError"})


class SagemakerEngine(HttpEngine):
    """Implements ``Engine`` as ``HttpEngine`` does, with AWS's client as its transport: a thread for each request that
    is under way, no retries. ``options`` of the pool: ``region``, ``endpoint`` and, if there are several models behind
    it, ``inference_component``. An address of the pool's own (``base_url``) replaces that of the region.

    Raises ConfigError on construction: options, address, no AWS credentials, boto3 not installed.
    """

    wants: frozenset[str] = HttpEngine.wants | {"prefix_id"}

    def __init__(self, spec: PoolSpec, model: str, **keys: Any) -> None:
        self._client = runtime_client(spec)
        self._target = {"EndpointName": str(spec.options["endpoint"])}
        if component := spec.options.get("inference_component"):
            self._target["InferenceComponentName"] = str(component)
        self._name_prefix = _prefix_namer(self._client)
        self._prefixes: dict[int, str] = {}  # by tag, until the request is begun
        super().__init__(dataclasses.replace(spec, base_url=self._client.meta.endpoint_url), model, **keys)

    async def _open(self, *_: Any) -> Any:
        return _Closing(self._client)

    def _rows(self, requests: pa.RecordBatch) -> list[dict[str, Any]]:
        rows = super()._rows(requests)
        if "prefix_id" in requests.schema.names:
            for row, name in zip(rows, requests.column("prefix_id").to_pylist(), strict=True):
                row["prefix_id"] = name
        return rows

    def _job(self, row: dict[str, Any], started_at: datetime) -> _Job | Outcome:
        made = super()._job(row, started_at)
        if isinstance(made, _Job) and row.get("prefix_id") is not None:
            self._prefixes[made.tag] = row["prefix_id"]
        return made

    def _drop_queue(self, tags: Collection[int] | None = None) -> None:
        for job in self._queue:
            if tags is None or job.tag in tags:
                self._prefixes.pop(job.tag, None)
        super()._drop_queue(tags)

    async def _ask(self, job: _Job) -> Outcome:
        prefix_id = self._prefixes.pop(job.tag, None)
        try:
            # AWS's client waits so long for each piece; an answer that drips has to end too.
            async with asyncio.timeout(self._timeout_s):
                outcome, connected = await _in_thread(lambda: self._invoke(job, prefix_id))
        except TimeoutError:
            return failure("timeout", f"no answer within {self._timeout_s:g} s")
        if not connected:
            self._unconnected += 1
        return outcome

    def _invoke(self, job: _Job, prefix_id: str | None) -> tuple[Outcome, bool]:
        """One call, waited for: how it ended, and whether there was a connection. Runs on a thread of its own."""
        from botocore.exceptions import BotoCoreError, ClientError

        call = {
            **self._target,
            **self._name_prefix(prefix_id),
            "ContentType": "application/json",
            "Accept": "application/json",
            "InferenceId": job.attempt,
        }
        try:
            answer = self._client.invoke_endpoint(**call, Body=job.body)
            body = answer["Body"].read(self._max_answer_bytes + 1)
        except ClientError as error:
            answer, body = error.response, _error_body(error.response)
        except BotoCoreError as error:
            return self._no_aws_answer(error)
        said = answer["ResponseMetadata"]
        status = int(said["HTTPStatusCode"])
        if len(body) > self._max_answer_bytes:
            return failure("bad_output", f"the answer is larger than {self._max_answer_bytes} bytes", status), True
        outcome = read_answer(
            self._endpoint.profile,
            status,
            {name.lower(): value for name, value in said.get("HTTPHeaders", {}).items()},
            body,
            chat=job.chat,
            n=job.n,
            prompt_text=job.prompt_text,
            secrets=self._credentials.secrets,
            now=self._now,
            echo=self._echo,
        )
        return outcome, True

    def _no_aws_answer(self, error: Exception) -> tuple[Outcome, bool]:
        name = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _OURS)
        error_class, message = _OURS[name]
        if name == "BotoCoreError":
            message += f" ({type(error).__name__})"
        return failure(error_class, message), name not in _UNCONNECTED


def runtime_client(spec: PoolSpec) -> Any:
    """boto3's ``sagemaker-runtime`` client for a pool: its region, its address, no retries. Raises ConfigError."""
    checked = endpoint(spec)
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ConfigError(
            f"profile {checked.profile.name} needs boto3",
            key=f"pools.{spec.name}.profile",
            expected="pip install 'bidbeam[aws]'",
        ) from None
    config = Config(
        # A retry here would be paid for without anybody knowing: the round owns the retries.
        retries={"total_max_attempts": 1},
        connect_timeout=min(CONNECT_S, spec.timeout_s),
        read_timeout=spec.timeout_s,
        max_pool_connections=spec.capacity.concurrency or DEFAULT_CONCURRENCY,
        user_agent_extra=f"bidbeam/{__version__}",
        **({"proxies": {}} if is_loopback(checked.host.rpartition(":")[0].strip("[]")) else {}),
    )
    try:
        session = boto3.Session(region_name=spec.options["region"], profile_name=spec.options.get("aws_profile"))
        if session.get_credentials() is None:
            raise ConfigError(
                "there are no AWS credentials",
                key=f"pools.{spec.name}.profile",
                expected="them where boto3 looks: AWS_* variables, ~/.aws, or the machine's role",
            )
        return _bounded(session.client("sagemaker-runtime", endpoint_url=spec.base_url, config=config))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"AWS's client cannot be set up ({type(error).__name__})",
            key=f"pools.{spec.name}.options",
            expected="a region and credentials that boto3 takes",
        ) from None


def _bounded(client: Any) -> Any:
    """The client, which now reads no more than so much of an error."""
    session = client._endpoint.http_session

    def send(request: Any, **_: Any) -> Any:
        response = session.send(request)
        if response.status_code >= 300:
            response.raw = _Bounded(response.raw)
        return response

    client.meta.events.register("before-send.sagemaker-runtime.InvokeEndpoint", send)
    return client


class _Bounded:
    """What comes in of an error, as AWS's client reads it."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def stream(self) -> Iterator[bytes]:
        left = MOST_ERROR_BYTES
        for piece in self._raw.stream():
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                self._raw.close()
                return


def _prefix_namer(client: Any) -> Callable[[str | None], dict[str, str]]:
    """What adds the prefix's name to a call: as a parameter, or for a client that does not know it yet as a header."""
    if "PrefixAwareId" in client.meta.service_model.operation_model("InvokeEndpoint").input_shape.members:
        return lambda prefix_id: {"PrefixAwareId": prefix_id} if prefix_id else {}
    told = threading.local()

    def add(params: dict[str, Any], **_: Any) -> None:
        if told.prefix_id:
            params["headers"][PREFIX_HEADER] = told.prefix_id

    def tell(prefix_id: str | None) -> dict[str, str]:
        told.prefix_id = prefix_id
        return {}

    client.meta.events.register("before-call.sagemaker-runtime.InvokeEndpoint", add)
    return tell


def _error_body(response: dict[str, Any]) -> bytes:
    """An error as SageMaker sent it, from what AWS's client made of it."""
    told = response.get("Error", {})
    names = ("OriginalStatusCode", "OriginalMessage", "LogStreamArn")
    body = {name: response[name] for name in names if name in response}
    return json.dumps({"__type": told.get("Code"), "Message": told.get("Message"), **body}).encode()


class _Closing:
    """AWS's client, as a session that the loop closes."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def close(self) -> None:
        self._client.close()


async def _in_thread(work: Callable[[], tuple[Outcome, bool]]) -> tuple[Outcome, bool]:
    """The result of ``work``, done on a daemon thread: one that hangs must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Outcome, bool]] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            loop.call_soon_threadsafe(_settle, done, None, error)
        else:
            loop.call_soon_threadsafe(_settle, done, result, None)

    threading.Thread(target=run, name="bidbeam-sagemaker", daemon=True).start()
    return await done


def _settle(
    done: asyncio.Future[tuple[Outcome, bool]], result: tuple[Outcome, bool] | None, error: Exception | None
) -> None:
    if done.done():  # given up meanwhile
        return
    if error is not None:
        done.set_exception(error)
    elif result is not None:
        done.set_result(result)
