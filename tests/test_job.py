"""The job file: YAML 1.2, what is asked against what are terms, overrides, secrets, and errors with their place."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidbeam.connectors.errors import ConfigError
from bidbeam.pipelines.job import Job, check_fx, check_keys
from bidbeam.pipelines.yaml_text import MAX_BYTES, parse

DAY = date(2026, 11, 22)
NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)
KEY = "sk-" + "plantedplantedplanted"

JOB = """\
name: copy
input: prompts/{run_date}/*.parquet
output: out/
ledger: ledger/
model: small
prompt: {id: request_id, template: "Describe {{ title }}.", system: Be brief.}
sampling: {max_tokens: 128, temperature: 0.70, seed: 1}
budget: {max_cost: 25.00}
deadline: 6h
placement: {jurisdictions: [NO, DE], operators: [own], zdr: true}
tolerate: {dead: "0.5%"}
tags: {team: growth, version: 1.10}
pools: pools.yaml
"""
POOLS = """\
models: {small: {}, large: {}}
pools:
  - name: far
    kind: openai
    base_url: https://host.example/v1
    api_key_env: FAR_KEY
    models: [small]
    price: {input: "0.10", output: "0.40", per: 1M tokens}
  - name: v1-5
    kind: openai
    base_url: http://127.0.0.1:9/v1
    models: [small]
    price: {input: "0.20", output: "0.80", per: 1M tokens}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "pools.yaml").write_text(POOLS)
    return tmp_path


def read(home: Path, *overrides: str, **options: Any) -> Job:
    options = {"run_date": DAY, "now": NOW, **options}
    return Job.from_yaml(home / "job.yaml", set=overrides, **options)


def refusal(home: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(home, *overrides)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # noqa: S301 - our own bytes
    return str(caught.value).replace(f"{home}/", "")


def test_a_job_is_read_whole(home: Path) -> None:
    """Every key arrives with its type; paths start at the job file; numbers keep their text."""
    job = read(home)
    assert job.input == (f"{home}/prompts/2026-11-22/*.parquet",)
    assert (job.output, job.ledger, job.source_dir) == (f"{home}/out", f"{home}/ledger", str(home))
    assert str(job.max_cost) == "25.00"
    assert str(job.sampling["temperature"]) == "0.70"
    assert job.tags == {"team": "growth", "version": "1.10"}
    assert job.placement["jurisdictions"] == ["DE", "NO"]
    assert (job.prompt.column, job.prompt.template) == (None, "Describe {{ title }}.")
    assert [pool.name for pool in job.pools] == ["far", "v1-5"]
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301 - our own bytes


def test_prices_and_pools_may_stand_in_the_job_itself(home: Path) -> None:
    """An inline list takes the place of the pools file."""
    inline = POOLS.replace("models: {small: {}, large: {}}\n", "")
    (home / "job.yaml").write_text(JOB.replace("pools: pools.yaml\n", inline) + "models: {small: {}}\n")
    assert [pool.name for pool in read(home).pools] == ["far", "v1-5"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: small", "modle: small", "job.yaml:5: modle: unknown key (expected one of name,"),
        ("model: small", "modle: small", "; did you mean 'model'?"),
        (
            "model: small",
            "model: smal",
            "job.yaml:5: model: unknown model 'smal' (expected one of small); did you mean",
        ),
        ("model: small", "model: large", "job.yaml:5: model: no pool serves the model 'large' (expected one of small)"),
        ("name: copy\n", "", "job.yaml:1: name: is missing (expected a name for the run)"),
        ("name: copy", "name: ../up", "job.yaml:1: name: is '../up'"),
        ("output: out/", "output: out/{run_date}", "job.yaml:3: output: holds {run_date}, which is only for input"),
        (
            "{run_date}",
            "{rundate}",
            "job.yaml:2: input: unknown placeholder {rundate} (expected {run_date}); did you mean",
        ),
        ("id: request_id,", "id: request_id, column: prompt,", "job.yaml:6: prompt.template: stands beside column"),
        ("{{ title }}", "{{ title }", "job.yaml:6: prompt.template: line 1 of the template"),
        ("system: Be", "formt: raw, system: Be", "prompt.formt: unknown key"),
        (
            "max_tokens: 128",
            "max_tokens: 0",
            "job.yaml:7: sampling.max_tokens: is '0' (expected a whole number from 1 to 2147483647)",
        ),
        ("25.00", "lots", "job.yaml:8: budget.max_cost: is 'lots' (expected USD such as \"25.00\")"),
        ("25.00", "-1", "budget.max_cost: is negative: '-1'"),
        ("deadline: 6h", "deadline: tomorrow", "job.yaml:9: deadline: is 'tomorrow' (expected a duration such as 6h"),
        ("deadline: 6h", "timezone: Europe/Olso", "job.yaml:9: timezone: is 'Europe/Olso'"),
        ("deadline: 6h", "timezone: Europe/Olso", "did you mean 'Europe/Oslo'?"),
        ("operators: [own]", "operators: [onw]", "job.yaml:10: placement.operators[0]: is 'onw'"),
        ("jurisdictions", "jurisdiction", "did you mean 'jurisdictions'?"),
        ("[NO, DE]", "[UK]", "job.yaml:10: placement.jurisdictions: 'UK' is neither a country nor a zone"),
        ("0.5%", "some", "job.yaml:11: tolerate.dead: is 'some'"),
        ("pools: pools.yaml", "pools: pool.yaml", "job.yaml:13: pools: there is no file"),
        ("tags: {", "auction: {payment: vgc}\ntags: {", "did you mean 'vcg'?"),
        ("tags: {", "baseline: vertex\ntags: {", "job.yaml:12: baseline: vertex lists no price of 'small' (expected"),
        ("tags: {", "storage: {s3: {secret: x}}\ntags: {", "storage.s3.secret: credentials do not belong here"),
        ("name: copy", "name: copy\nname: other", "job.yaml:2: name: is there twice, first on line 1"),
        ("name: copy", "name: !!str copy", "job.yaml:1: name: carries a YAML tag (expected plain data)"),
        ("name: copy", "name: [copy", "not YAML"),
        ("model: small", "model: small\n  indented: wrong", "job.yaml:6: not YAML"),
    ],
)
def test_a_fault_names_file_line_key_and_the_nearest_name(home: Path, old: str, new: str, message: str) -> None:
    """Every wrong line says where it is, what was expected and what was probably meant."""
    (home / "job.yaml").write_text(JOB.replace(old, new, 1))
    assert message in refusal(home)


def test_a_fault_in_the_pools_file_names_that_file(home: Path) -> None:
    """The job is not blamed for its pools."""
    (home / "pools.yaml").write_text(POOLS.replace("kind: openai", "kind: openia", 1))
    assert refusal(home).startswith("pools.yaml:4: pools[0].kind:")


def test_later_faults_find_their_line(home: Path) -> None:
    """What only shows against the input is still reported at the job's line."""
    error = read(home).fault("prompt.tenant.nested", "no such column", nearest="tenant_id")
    assert str(error) == f"{home}/job.yaml:6: prompt.tenant.nested: no such column; did you mean 'tenant_id'?"


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]"])
def test_what_is_no_mapping_is_no_job(home: Path, text: str) -> None:
    """An empty file, a text or a list is refused as such."""
    (home / "job.yaml").write_text(text)
    assert "job.yaml:1: is" in refusal(home)


def test_a_missing_file_and_a_directory_are_named(home: Path) -> None:
    """The message says which path it was."""
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        Job.from_yaml(home / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        Job.from_yaml(home)


def test_yaml_is_version_1_2() -> None:
    """Norway, sexagesimals and yes are text; 1e3 is a number; all keep their text."""
    root = parse("[NO, yes, on, 06:00, 1e3, 0.10, 010, 1_000, 0o17, ~, true, 'true', 2026-11-22]", "f")
    assert [item.text for item in root.items] == [
        "NO", "yes", "on", "06:00", "1e3", "0.10", "010", "1_000", "0o17", "~", "true", "true", "2026-11-22",
    ]  # fmt: skip
    assert [item.type for item in root.items] == [
        "text", "text", "text", "text", "float", "float", "int", "text", "int", "null", "bool", "text", "text",
    ]  # fmt: skip


def test_an_alias_repeats_a_value_where_it_stands() -> None:
    """Anchors work, and an aliased fault is found at the alias."""
    root = parse("a: &x {b: 1}\nc: *x\n", "f")
    assert (root.entries["c"].entries["b"].text, root.entries["c"].entries["b"].key) == ("1", "c.b")
    assert root.entries["c"].line == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(9)), "more than"),
        ("a: &a [*a]", "has no anchor before it"),
        ("[" * 100 + "]" * 100, "is nested deeper"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("? [a, b]\n: 1", "has a key that is not plain text"),
        ("a: \x01", "not YAML"),
        ("\ta: 1", "not YAML"),
        ("a: !!python/object:os.system x", "carries a YAML tag"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(text: str, message: str) -> None:
    """Bombs, cycles, depth, tags, second documents and control characters end in one clear message."""
    with pytest.raises(ConfigError, match=message):
        parse(text, "f")


def test_size_and_encoding_are_checked(home: Path) -> None:
    """A file is at most 1 MiB of UTF-8."""
    (home / "job.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert "is larger than" in refusal(home)
    (home / "job.yaml").write_bytes(b"name: a\nmodel: \xff")
    assert refusal(home) == "job.yaml:2: is not UTF-8 text"


def test_a_set_replaces_a_value_before_it_is_checked(home: Path) -> None:
    """Values are YAML, blocks are made on the way, pools go by name or number."""
    job = read(
        home,
        "budget.max_cost=1e1",
        "auction.rounds=2",
        "placement={zdr: true}",
        "pools.v1-5.price.input=0.30",
        "pools.0.capacity.concurrency=7",
    )
    assert (job.max_cost, job.auction.rounds, job.placement) == (Decimal(10), 2, {"zdr": True})
    assert job.pools[1].price.unit_prices["uncached_input"] == Decimal("3e-7")
    assert job.pools[0].capacity.concurrency == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget", "--set: is not of the form key.path=value"),
        ("budget.max_cot=1", "--set: budget.max_cot: unknown key (expected one of max_cost); did you mean 'max_cost'?"),
        ("budget.max_cost=[", "--set: budget.max_cost: not YAML"),
        (
            "pools.fra.context=1",
            "--set: pools.fra.context: pools holds no 'fra' (expected one of far, v1-5); did you mean",
        ),
        ("name.first=a", "--set: name.first: name is a single value and holds no 'first'"),
    ],
)
def test_a_fault_in_a_set_says_so(home: Path, override: str, message: str) -> None:
    """An override's error names --set in place of a file."""
    assert message in refusal(home, override)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("team: growth", f"team: {KEY}", 12),
        ("output: out/", f"output: s3://user:{KEY}@bucket/out", 3),
        ("output: out/", f"output: https://host.example/out?sig={KEY}", 3),
        ("Be brief.", f"Bearer {KEY}", 6),
    ],
)
def test_a_secret_in_the_job_is_refused_and_not_repeated(home: Path, old: str, new: str, line: int) -> None:
    """The error has the place of the secret and not its text."""
    (home / "job.yaml").write_text(JOB.replace(old, new, 1))
    message = refusal(home)
    assert message.startswith(f"job.yaml:{line}: ")
    assert "looks like a secret" in message
    assert "planted" not in message


@pytest.mark.parametrize("override", [f"tags.team={KEY}", f"pools.far.api_key={KEY}", f"nothing.here={KEY}"])
def test_a_secret_in_a_set_is_refused_and_not_repeated(home: Path, override: str) -> None:
    """Secrets are looked for before anything else could quote them."""
    message = refusal(home, override)
    assert "looks like a secret" in message
    assert "planted" not in message


def test_a_secret_in_the_pools_file_is_refused(home: Path) -> None:
    """A key under api_key is told from a misspelt key."""
    (home / "pools.yaml").write_text(POOLS.replace("api_key_env: FAR_KEY", f"api_key: {KEY}"))
    message = refusal(home)
    assert message.startswith("pools.yaml:6: pools[0].api_key: looks like a secret")
    assert "planted" not in message


def test_an_unset_key_variable_is_a_fault_of_its_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot authenticate stops before it spends."""
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"pools\.yaml:6: pools\[0\]\.api_key_env: .*FAR_KEY is not set"):
        check_keys(read(home))


def test_a_stale_exchange_rate_is_a_fault(home: Path) -> None:
    """A rate older than its max_age charges nothing."""
    fx = 'fx: {TAO: {rate: "350", at: 2026-11-22T19:00:00Z, source: desk, max_age: 2h}}\n'
    (home / "pools.yaml").write_text(
        fx + POOLS.replace('"0.40", per: 1M tokens', '"0.40", per: 1M tokens, currency: TAO')
    )
    job = read(home)
    check_fx(job, NOW)
    with pytest.raises(ConfigError, match=r"pools\.yaml:1: fx\.TAO\.at: .* is stale"):
        check_fx(job, NOW + timedelta(hours=2))


def test_the_ledgers_job_holds_no_prompt_and_no_header(home: Path) -> None:
    """The resolved job is JSON without prompt texts; headers are masked."""
    (home / "pools.yaml").write_text(POOLS.replace("api_key_env: FAR_KEY", "headers: {x-team: planted-team}"))
    text = read(home).resolved_json()
    resolved = json.loads(text)
    assert resolved["max_cost"] == "25.00"
    assert resolved["prompt"]["id"] == "request_id"
    assert [word for word in ("Be brief", "Describe", "planted") if word in text] == []


def test_run_id_has_the_form_of_the_contract(home: Path) -> None:
    """Name, run date and eight hex digits, the same each time."""
    job = read(home)
    name, digest = job.run_id.rsplit("-", 1)
    assert name == "copy-2026-11-22"
    assert len(digest) == 8
    assert int(digest, 16) >= 0
    assert read(home).run_id == job.run_id


def test_the_default_run_date_is_today_in_the_time_zone(home: Path) -> None:
    """Late in the evening UTC it is tomorrow in Tokyo."""
    assert read(home, run_date=None).run_date == DAY
    assert read(home, "timezone=Asia/Tokyo", run_date=None).run_date == DAY + timedelta(days=1)


TERMS = {
    "budget.max_cost": st.sampled_from(["1", "1e2", '"0.5"']),
    "deadline": st.sampled_from(["1h", "06:00", "90m"]),
    "timezone": st.sampled_from(["UTC", "Asia/Tokyo"]),
    "placement": st.sampled_from(["{}", "{jurisdictions: [EEA]}", "{zdr: true}"]),
    "auction.rounds": st.sampled_from(["1", "5"]),
    "baseline": st.sampled_from(["{name: b, input: 1, output: 2, per: 1M tokens}"]),
    "tolerate.dead": st.sampled_from(["3", '"1%"']),
    "tags": st.sampled_from(["{}", "{team: other}"]),
    "ledger": st.sampled_from(["other-ledger"]),
    "storage": st.sampled_from(["{s3: {anon: true}}"]),
    "pools.far.price.input": st.sampled_from(["0", "9"]),
    "pools.far.capacity.concurrency": st.sampled_from(["1", "99"]),
    "pools.far.base_url": st.sampled_from(["https://other.example/v1"]),
    "pools.far.api_key_env": st.sampled_from(["OTHER_KEY"]),
    "pools.far.placement": st.sampled_from(["{jurisdiction: DE}"]),
    "models.large.source": st.sampled_from(["package:other"]),
}
ASKED = {
    "name": "other",
    "input": "other/*.parquet",
    "output": "other",
    "model": "null",
    "models.small.source": "package:other",
    "prompt.id": "other_id",
    "prompt.template": '"Other {{ title }}"',
    "prompt.system": "Be long.",
    "prompt.tenant": "customer",
    "sampling.temperature": "0.71",
    "sampling.max_tokens": "129",
    "sampling.guided_choice": "[a, b]",
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(terms=st.fixed_dictionaries({}, optional=TERMS))
def test_terms_never_change_the_run(home: Path, terms: dict[str, str]) -> None:
    """Pools, prices, keys, budget, deadline, auction, placement, baseline and tags resume the same run."""
    overrides = [f"{key}={value}" for key, value in terms.items()]
    assert read(home, *overrides).run_id == read(home).run_id


@pytest.mark.parametrize(("key", "value"), sorted(ASKED.items()))
def test_what_is_asked_changes_the_run(home: Path, key: str, value: str) -> None:
    """Another name, input, output, model, source, prompt or sampling is another run."""
    assert read(home, f"{key}={value}").run_id != read(home).run_id


def test_another_day_is_another_run(home: Path) -> None:
    """The run date is part of what is asked."""
    assert read(home, run_date=DAY + timedelta(days=1)).run_id != read(home).run_id


def test_equal_numbers_ask_the_same(home: Path) -> None:
    """0.7 and 0.70 are one temperature, and the default of max_tokens is what it is when written down."""
    assert read(home, "sampling.temperature=0.7").run_id == read(home).run_id
    assert read(home, "sampling={}").run_id == read(home, "sampling={max_tokens: 128}").run_id


@pytest.mark.parametrize(
    ("deadline", "zone", "start", "due"),
    [
        ("6h", "UTC", "2026-11-22T20:00:00Z", "2026-11-23T02:00:00Z"),
        ("1h30m", "UTC", "2026-11-22T20:00:00Z", "2026-11-22T21:30:00Z"),
        ("06:00", "UTC", "2026-11-22T20:00:00Z", "2026-11-23T06:00:00Z"),
        ("06:00", "UTC", "2026-11-22T05:59:59Z", "2026-11-22T06:00:00Z"),
        ("06:00", "UTC", "2026-11-22T06:00:00Z", "2026-11-23T06:00:00Z"),
        ("06:00", "Europe/Oslo", "2026-11-22T04:00:00Z", "2026-11-22T05:00:00Z"),
        ("02:30", "Europe/Oslo", "2026-03-28T20:00:00Z", "2026-03-29T01:30:00Z"),  # 02:30 does not exist that night
        ("23:59:30", "Asia/Tokyo", "2026-11-22T20:00:00Z", "2026-11-23T14:59:30Z"),
    ],
)
def test_deadlines_are_durations_or_the_next_clock_time(
    home: Path, deadline: str, zone: str, start: str, due: str
) -> None:
    """A clock deadline is the next such time in the job's zone, over changes of the clock too."""
    job = read(home, f"deadline={deadline}", f"timezone={zone}")
    assert job.deadline_at(datetime.fromisoformat(start)) == datetime.fromisoformat(due)


def test_tolerance_is_a_count_or_a_share(home: Path) -> None:
    """At the limit is still done; one more is not."""
    share, count = read(home).tolerate_dead, read(home, "tolerate.dead=2").tolerate_dead
    assert (share.allows(5, 1000), share.allows(6, 1000)) == (True, False)
    assert (count.allows(2, 2), count.allows(3, 1000)) == (True, False)
