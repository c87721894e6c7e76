"""A front of Vertex AI's batch prediction, for tests: jobs that read rows from a directory and leave answers in one.

    with VertexBatchFront(server.base_url) as front:
        pool = ...  # kind: batch, profile: vertex, base_url: front.base_url, options: {staging: a directory, ...}

The rows are run as ``BatchFront`` runs them; what differs is how jobs are asked for, and where files are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.front_batch import BatchFront, Fate, Submitted

_PLACE = "projects/shop/locations/europe-west4"
_STATES = {
    "validating": "JOB_STATE_PENDING",
    "in_progress": "JOB_STATE_RUNNING",
    "finalizing": "JOB_STATE_RUNNING",
    "completed": "JOB_STATE_SUCCEEDED",
    "failed": "JOB_STATE_FAILED",
    "expired": "JOB_STATE_EXPIRED",
    "cancelling": "JOB_STATE_CANCELLING",
    "cancelled": "JOB_STATE_CANCELLED",
}


class VertexBatchFront(BatchFront):
    """``batchPredictionJobs`` of one project and location; everything else is as in ``BatchFront``."""

    @property
    def base_url(self) -> str:
        """Where completions would be."""
        return f"http://{self.host}/v1/{_PLACE}/endpoints/openapi"

    def _route(
        self, method: str, name: str, query: Mapping[str, list[str]], headers: Mapping[str, str], body: bytes
    ) -> Reply:
        if "authorization" not in headers:
            return Reply.error(401, "Request is missing required authentication credential.", 401)
        found = re.fullmatch(rf"{_PLACE}/batchPredictionJobs(?:/(\d+)(:cancel)?)?", name)
        if found is None:
            return Reply.error(404, "Not Found", 404)
        number, cancel = found.groups()
        if number is None:
            return self._make(json.loads(body)) if method == "POST" else self._found(query)
        batch = next((each for each in self.batches if each.id == number), None)
        if batch is None:
            return Reply.error(404, "Not Found", 404)
        if cancel:
            return self._cancel(batch)
        return Reply(200, json.dumps(self._job(batch, looking=True)).encode())

    def _make(self, asked: Mapping[str, Any]) -> Reply:
        (source,) = asked["inputConfig"]["gcsSource"]["uris"]
        target = asked["outputConfig"]["gcsDestination"]["outputUriPrefix"]
        if asked["inputConfig"]["instancesFormat"] != "jsonl" or not asked["model"].startswith("publishers/"):
            return Reply.error(400, "The job is not what it should be.", 400)
        model = "/".join(asked["model"].split("/")[1::2])
        rows = tuple(json.loads(line) for line in Path(source).read_bytes().splitlines())
        # The job's model counts, whatever the rows say.
        rows = tuple({**row, "body": {**row["body"], "model": model}} for row in rows)
        with self._lock:
            number = len(self.batches)
            fate = self._fates[number] if number < len(self._fates) else Fate()
            shown = {"displayName": asked["displayName"], "target": target}
            batch = Submitted(str(7_000 + number), source, "/v1/chat/completions", shown, rows, 0, fate)
            self.batches.append(batch)
        self._workers.submit(self._run, batch)
        return Reply(200, json.dumps(self._job(batch)).encode())

    def _found(self, query: Mapping[str, list[str]]) -> Reply:
        wanted = re.fullmatch(r'displayName="(.*)"', unquote(query.get("filter", [""])[0]))
        jobs = [self._job(batch) for batch in self.batches if wanted and batch.metadata["displayName"] == wanted[1]]
        return Reply(200, json.dumps({"batchPredictionJobs": jobs} if jobs else {}).encode())

    def _job(self, batch: Submitted, *, looking: bool = False) -> dict[str, Any]:
        state = _STATES[self._document(batch, looking=looking)["status"]]
        job = {
            "name": f"{_PLACE}/batchPredictionJobs/{batch.id}",
            "displayName": batch.metadata["displayName"],
            "state": state,
        }
        if state == "JOB_STATE_FAILED":
            return {**job, "error": {"code": 8, "message": "Quota exceeded."}}
        return job

    def _write(self, batch: Submitted, kind: str, lines: list[bytes]) -> str:
        """Answers as Vertex leaves them: each row with its answer beside it."""
        directory = Path(batch.metadata["target"]) / f"prediction-{batch.id}"
        directory.mkdir(parents=True, exist_ok=True)
        asked = {row["custom_id"]: row for row in batch.rows}
        whole = []
        for line in lines:
            try:
                answer = json.loads(line)
                answer = {**asked[answer["custom_id"]], "response": answer["response"], "error": answer["error"]}
                whole.append(json.dumps(answer).encode())
            except (ValueError, KeyError, TypeError):
                whole.append(line)
        name = "predictions.jsonl" if kind == "out" else "errors.jsonl"
        (directory / name).write_bytes(b"".join(line + b"\n" for line in whole))
        return name
