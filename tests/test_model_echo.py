"""The model that an answer names: what is the same under another name, and what is plainly another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.model_echo import Echo, echo_of, names_it, one_family
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.profiles import PROFILES

SAME = [
    ("gpt-4o", "gpt-4o-2024-08-06"),
    ("gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    ("gpt-3.5-turbo", "gpt-3.5-turbo-0125"),
    ("gpt-3.5-turbo", "gpt-35-turbo"),
    ("openai/gpt-3.5-turbo-16k", "gpt-35-turbo-16k-0613"),
    ("gpt-4o-2024-08-06", "gpt-4o-0806"),
    ("openai/gpt-4o", "gpt-4o"),
    ("vendor/Llama-3.3-70B-Instruct", "llama-3.3-70b-instruct"),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/llama-3.1-8b-instruct:free"),
    ("meta/llama-3.3-70b-instruct-maas", "llama-3.3-70b-instruct"),
    ("claude-sonnet-4", "us.anthropic.claude-sonnet-4-20250514-v1:0"),
    ("gemini-2.0-flash", "gemini-2.0-flash-001"),
    ("gemini-2.5-flash", "google/gemini-2.5-flash-preview-09-2025"),
    ("deepseek-ai/DeepSeek-V3.2", "deepseek_v3_2"),
    ("mistralai/mistral-7b-instruct", "Mistral-7B-Instruct-v0.3"),
    ("qwen/qwen3-32b", "Qwen3-32B-AWQ"),
    ("tiny", "/opt/ml/models/tiny/"),
    ("smollm2", "/cache/models--HuggingFaceTB--SmolLM2"),
    ("o1", "o1"),
]
OTHER = [
    ("gpt-4o", "gpt-4o-mini"),
    ("gpt-4o-mini-2024-07-18", "gpt-4o-2024-08-06"),
    ("gpt-4", "gpt-4.1"),
    ("gpt-35-turbo", "gpt-3.5-turbo-16k"),
    ("llama-3.1-8b", "llama-31-8b"),
    ("gpt-4o-2024-08-06", "gpt-4o-2024-11-20"),
    ("llama-3.1-70b-instruct", "llama-3.1-8b-instruct"),
    ("llama-3-8b", "llama-3.1-8b"),
    ("deepseek-v3", "deepseek-v2"),
    ("deepseek-r1", "deepseek-r1-distill-llama-70b"),
    ("claude-sonnet-4", "claude-haiku-4"),
    ("tiny", "another-model"),
]


@pytest.mark.parametrize(("asked", "returned"), SAME)
def test_dated_resolved_and_respelt_names_are_the_same(asked: str, returned: str) -> None:
    """What endpoints make of a name in good faith is no other model, whichever way round."""
    assert one_family(asked, returned)
    assert one_family(returned, asked)


@pytest.mark.parametrize(("asked", "returned"), OTHER)
def test_another_size_version_or_family_is_another_model(asked: str, returned: str) -> None:
    """What is smaller, older or somebody else's is told, whichever way round."""
    assert not one_family(asked, returned)
    assert not one_family(returned, asked)


@given(st.text(), st.text())
def test_any_two_names_compare(one: str, other: str) -> None:
    """Whatever a provider calls a model: no crash, the same either way, and a name is of its own family."""
    assert one_family(one, other) == one_family(other, one)
    assert one_family(one, one)
    assert names_it(one, one)


def test_a_name_that_was_promised_is_held_to() -> None:
    """A promised name may get a date, but not lose or change one; it stands for all that was asked."""
    assert names_it("vendor/gpt-4o", "gpt-4o-2024-08-06")
    assert not names_it("gpt-4o-2024-08-06", "gpt-4o")
    assert not names_it("gpt-4o-2024-08-06", "gpt-4o-2024-11-20")
    promised = Echo(("deployment-7",), "gpt-4o")
    assert [promised.other(name) for name in ("gpt-4o", "deployment-7", None)] == [False, True, None]


def test_what_an_answer_may_be_called_comes_from_pool_and_profile() -> None:
    """Our name and theirs will both do; a profile that is asked for deployments compares only what is promised."""
    price = PriceSchedule("p", "far", {})
    spec = PoolSpec("far", "openai", {"ours": "vendor/theirs", "kept": "d2"}, price, answers_as={"kept": "gpt-4o"})
    silent = ("azure", "sagemaker", "sagemaker-invoke")
    told = {name: echo_of(spec, "ours", PROFILES[name]) for name in ("openai", *silent)}
    assert [told["openai"].other(name) for name in ("theirs-2024-08-06", "ours", "else")] == [False, False, True]
    assert [told[name].other("else") for name in silent] == [None] * 3
    assert echo_of(spec, "kept", PROFILES["azure"]).other("gpt-4o-2024-08-06") is False
