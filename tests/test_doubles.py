"""The endpoint double: true to the wire, deterministic, and able to fail in every way that endpoints fail."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from bidbeam.connectors.doubles import NO_USAGE, OK, RESET, TRUNCATED, EndpointDouble, Reply, Seen

PROMPT = "one two three four five six seven eight nine ten"


def post(
    double: EndpointDouble, body: dict[str, Any], path: str = "/v1/completions", **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(double.host, timeout=5)
    try:
        connection.request("POST", path, json.dumps(body), {"X-Request-Id": "r1", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def ask(double: EndpointDouble, prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    status, document = post(double, {"model": "tiny", "prompt": prompt, "max_tokens": 8, **more})
    assert status == 200
    assert isinstance(document, dict)
    return document


def test_answers_the_same_prompt_alike() -> None:
    """Text follows from the prompt, stays within max_tokens, and usage counts it in words."""
    with EndpointDouble(["tiny"]) as double:
        first, second, other = ask(double), ask(double), ask(double, "something else")
    text = first["choices"][0]["text"]
    assert text == second["choices"][0]["text"] != other["choices"][0]["text"]
    assert first["usage"]["prompt_tokens"] == 10
    assert first["usage"]["completion_tokens"] == len(text.split()) <= 8


def test_chat_and_samples() -> None:
    """Chat answers with n messages, and usage counts the tokens of all."""
    with EndpointDouble(["tiny"]) as double:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "n": 3}
        _, document = post(double, asked, "/v1/chat/completions")
    texts = [choice["message"]["content"] for choice in document["choices"]]
    assert len(texts) == 3
    assert document["usage"]["completion_tokens"] == sum(len(text.split()) for text in texts)


def test_prefix_cache_hits_whole_blocks_per_salt() -> None:
    """The second of two prompts hits the shared blocks but never its last token; another salt hits nothing."""
    with EndpointDouble(["tiny"]) as double:
        cached = [
            ask(double, prompt, **salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
            for prompt, salt in [
                (PROMPT, {}),
                (PROMPT, {}),
                ("one two three four five SIX", {}),
                ("one two three four", {}),
                (PROMPT, {"cache_salt": "tenant"}),
            ]
        ]
        assert cached == [0, 8, 4, 0, 0]
        assert [each.cached_tokens for each in double.served] == cached


def test_books_what_it_served_and_nothing_else() -> None:
    """Its books hold true answers only: no errors, no scripted bodies, no answers cut off."""
    script = [Reply.error(500), TRUNCATED, RESET, Reply.garbage(), OK]
    with EndpointDouble(["tiny"], script) as double:
        for reply in script:
            if reply.cut:
                with pytest.raises((http.client.HTTPException, ConnectionError)):
                    ask(double)
            elif reply is OK:
                ask(double)
            else:
                with pytest.raises((AssertionError, ValueError)):
                    ask(double)
        assert [each.request for each in double.served] == ["r1"]
        assert len(double.requests) == len(script)


def test_refuses_what_a_server_refuses() -> None:
    """Unknown model and path are 404, nonsense is 400, a wrong key is 401."""
    with EndpointDouble(["tiny"], api_key="k3y") as double:
        good, key = {"model": "tiny", "prompt": PROMPT}, {"Authorization": "Bearer k3y"}
        assert post(double, good)[0] == 401
        assert post(double, good, **key)[0] == 200
        assert post(double, {**good, "model": "huge"}, **key)[0] == 404
        assert post(double, good, "/v2/completions", **key)[0] == 404
        assert post(double, {**good, "max_tokens": 0}, **key)[0] == 400


def test_choice_by_request() -> None:
    """A behaviour may look at the request; usage can be left out or merged over."""

    def behave(seen: Seen) -> Reply:
        return NO_USAGE if seen.number == 0 else Reply(merge={"usage": {"prompt_tokens": seen.number}})

    with EndpointDouble(["tiny"], behave) as double:
        assert "usage" not in ask(double)
        assert ask(double)["usage"] == {"prompt_tokens": 1}
