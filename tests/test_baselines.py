"""Baselines: savings counted from actual tokens at dated list prices or the job's own figures, at no fixed share."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.connectors.list_prices import NotListed, list_price
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.quote import quote_job
from bidbeam.pipelines.run import run
from tests.small_jobs import DAY, LATIN, make_job, prompts, remote, written

OWN = {"name": "own-list", "input": "2.00", "cached_input": "0.50", "output": "8.00", "per": "1M tokens"}
VERTEX = {"name": "vertex", "model": "deepseek-v3.2"}
AUTUMN = date(2026, 11, 23)


def job_of(home: Path, baseline: Any, *pools: Mapping[str, Any], **keys: Any) -> Job:
    return make_job(home, keys.pop("rows", prompts(4)), pools or [remote("far")], baseline=baseline, **keys)


def refusal(home: Path, baseline: Any, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job_of(home, baseline, **keys)
    assert caught.value.line is not None
    return str(caught.value)


def rows(job: Job, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query_ledger(job.ledger, sql).to_pylist()
    return found


@pytest.mark.parametrize(
    ("provider", "model", "expected"),
    [
        ("vertex", "deepseek-v3.2", ("5.6e-7", "1.68e-6", "5.6e-8")),
        ("vertex", "deepseek-ai/deepseek-v3.2-maas", ("5.6e-7", "1.68e-6", "5.6e-8")),
        ("azure", "deepseek-ai/DeepSeek-V3.2", ("5.8e-7", "1.68e-6", None)),
        ("google", "gemini-2.5-flash", ("3e-7", "2.5e-6", "3e-8")),
        ("azure", "gpt-4o", ("2.5e-6", "1e-5", "1.25e-6")),
    ],
)
def test_a_published_list_is_read_exactly(provider: str, model: str, expected: tuple[str, str, str | None]) -> None:
    """Dollars per million become the price of one token; names are found as providers and hubs write them."""
    found = list_price(provider, [model], AUTUMN)
    input_, output, cached = expected
    assert found.unit_prices["uncached_input"] == Decimal(input_)
    assert found.unit_prices["output"] == Decimal(output)
    assert found.unit_prices.get("cached_input") == (None if cached is None else Decimal(cached))
    assert found.source


def test_a_list_is_read_as_of_a_day() -> None:
    """A price that changed has its own figures before and after, and says since when."""
    from genai_prices.data_snapshot import get_snapshot

    dated = None
    for provider in get_snapshot().providers:
        for model in provider.models:
            if isinstance(model.prices, list) and len(model.prices) > 1:
                start = getattr(model.prices[-1].constraint, "start_date", None)
                if start is not None and provider.find_model(model.id) is model:
                    dated = dated or (provider.id, model.id, start)
    assert dated is not None
    provider_id, name, start = dated
    now = list_price(provider_id, [name], start)
    assert now.valid_from == datetime.combine(start, datetime.min.time(), UTC)
    before = list_price(provider_id, [name], date(2020, 1, 1))
    assert before.valid_from is None or before.valid_from < now.valid_from


def test_another_clouds_list_is_followed_only_where_one_name_is_sold_at_one_price() -> None:
    """An open model on a cloud costs what that cloud says, not what its maker asks: unknown is not a guess."""
    with pytest.raises(NotListed, match="azure lists no price of 'gpt-oss-120b'; it is listed by"):
        list_price("azure", ["gpt-oss-120b"], AUTUMN)
    assert "by openai's list" in list_price("azure", ["gpt-4o"], AUTUMN).source


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("vertex", "vertex lists no price of 'tiny' (expected a model that it has, to compare with"),
        ("vertx", "there is no price list by the name 'vertx'"),
        ("vertx", "did you mean 'vertex'?"),
        ({"name": "azure", "model": "deepseek-v3"}, "did you mean 'deepseek-v3.2'?"),
        ("sagemaker", "paid by the instance hour, and no list says how many tokens your model does in one"),
        ({"name": "sagemaker", "accelerator_hour": "1.41"}, "baseline.tokens_per_second: is missing"),
        ({"name": "s", "accelerator_hour": "1", "tokens_per_second": 0}, "tokens_per_second: is '0'"),
        (
            {"name": "s", "accelerator_hour": "1", "tokens_per_second": 9, "input": "1"},
            "stands beside accelerator_hour",
        ),
        ({**OWN, "model": "deepseek-v3.2"}, "baseline.model: stands beside figures of your own"),
        ([OWN, OWN], "the name 'own-list' is there twice"),
        ([], "is an empty list"),
        ({"input": "1", "output": "1", "per": "1M tokens"}, "baseline.name: is missing"),
    ],
)
def test_a_baseline_that_cannot_be_had_is_refused_with_what_to_write(
    tmp_path: Path, baseline: Any, message: str
) -> None:
    """No list, no model, no figures: an error at its line, never a percentage out of the air."""
    assert message in refusal(tmp_path, baseline)


def test_each_request_is_counted_against_each_baseline_from_its_own_tokens(tmp_path: Path) -> None:
    """Three baselines: a row for each in ``savings``, with where their prices are from in ``baselines``."""
    hourly = {"name": "sagemaker", "accelerator_hour": "1.44", "tokens_per_second": 1000, "source": "our endpoint"}
    with EndpointDouble(["tiny"]) as double:
        job = job_of(tmp_path, [VERTEX, OWN, hourly], remote("far", double.base_url))
        summary = run(job)
    found = written(job)
    tokens = {row["request_id"]: row for row in found.attempts}
    counted = rows(job, "SELECT * FROM savings ORDER BY request_id, baseline")
    assert len(counted) == 4 * 3
    for row in counted:
        used = tokens[row["request_id"]]
        cached = used["cached_tokens"] or 0
        fresh, output = used["input_tokens"] - cached, used["output_tokens"]
        expected = {
            "vertex": fresh * Decimal("5.6e-7") + cached * Decimal("5.6e-8") + output * Decimal("1.68e-6"),
            "own-list": fresh * Decimal("2e-6") + cached * Decimal("5e-7") + output * Decimal("8e-6"),
            "sagemaker": (fresh + output) * Decimal("4e-7"),
        }[row["baseline"]]
        assert row["baseline_cost"] == expected
        assert row["saving"] == expected - row["cost"]
    first = sum(row["baseline_cost"] for row in counted if row["baseline"] == "vertex")
    assert summary.baseline_cost == first == sum(row["baseline_cost"] or 0 for row in found.rows("charges"))
    sources = {row["baseline"]: row["source"] for row in found.rows("baselines")}
    assert sources["own-list"] == "job file"
    assert sources["vertex"].startswith("litellm ")
    assert sources["sagemaker"] == "our endpoint: 1.44 USD an hour at 1000 tokens a second"


def test_each_model_is_counted_at_its_own_list_price(tmp_path: Path) -> None:
    """A list by name prices every model that it has; a request of one that it has not is not counted at all."""
    ids = ["a", "b", "c"]
    table = pa.table(
        {
            "id": ids,
            "prompt": [f"{LATIN} {name}" for name in ids],
            "model": ["gemini-2.5-flash", "gemini-2.5-pro", "house-model"],
        }
    )
    models = {"gemini-2.5-flash": {}, "gemini-2.5-pro": {}, "house-model": {}}
    with EndpointDouble(list(models)) as double:
        pool = remote("far", double.base_url, models=list(models))
        job = job_of(tmp_path, "vertex", pool, rows=table, model="gemini-2.5-flash", models=models)
        summary = run(job)
    found = written(job)
    tokens = {row["request_id"]: row for row in found.attempts}
    costs = {row["request_id"]: row["baseline_cost"] for row in rows(job, "SELECT * FROM savings")}
    for name, input_, cached_input, output in (("a", "3e-7", "3e-8", "2.5e-6"), ("b", "1.25e-6", "1.25e-7", "1e-5")):
        used = tokens[name]
        cached = used["cached_tokens"] or 0
        assert costs[name] == (
            (used["input_tokens"] - cached) * Decimal(input_)
            + cached * Decimal(cached_input)
            + used["output_tokens"] * Decimal(output)
        )
    assert costs["c"] is None
    charged = {row["request_id"]: row["baseline_cost"] for row in found.rows("charges") if row["baseline_cost"]}
    assert charged == {name: costs[name] for name in ("a", "b")}
    assert summary.baseline_cost is None, "a sum that does not know all of its parts is no baseline"


def test_a_baseline_by_the_request_counts_requests(tmp_path: Path) -> None:
    """A list price may have no token in it."""
    with EndpointDouble(["tiny"]) as double:
        job = job_of(tmp_path, {"name": "flat", "request": "0.002"}, remote("far", double.base_url))
        assert run(job).baseline_cost == Decimal("0.008")
    assert {row["baseline_cost"] for row in rows(job, "SELECT * FROM savings")} == {Decimal("0.002")}


def test_a_quote_counts_against_the_first_baseline(tmp_path: Path) -> None:
    """From the tokens that the awards are expected to use."""
    quoted = quote_job(job_of(tmp_path, [VERTEX, OWN]))
    assert quoted.baseline_cost is not None
    assert quoted.baseline_cost > 0
    other = quote_job(job_of(tmp_path, [OWN, VERTEX]))
    assert other.baseline_cost is not None
    assert other.baseline_cost > quoted.baseline_cost


def test_a_baseline_is_a_term(tmp_path: Path) -> None:
    """Another one makes the same run."""
    assert job_of(tmp_path, VERTEX).run_id == job_of(tmp_path, None).run_id
    assert job_of(tmp_path, VERTEX).run_date == DAY
