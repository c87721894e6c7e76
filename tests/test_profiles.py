"""Profiles with a pool's options in them: addresses, headers, labels, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_jobs import make_job, prompts, remote

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.http_transport import endpoint
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.profiles import PROFILES, needed_options, profile, resolved
from bidbeam.pipelines.pools_file import read_pools
from bidbeam.pipelines.yaml_text import parse
from bidbeam.transforms.placement import COUNTRIES, LABELS, ZONES, eligible

VERTEX = {"project": "my-project", "location": "europe-west4"}
HTTP = [name for name, each in PROFILES.items() if each.transport == "http" and each.base_url]


def spec(name: str | None, base_url: str | None = None, **options: Any) -> PoolSpec:
    price = PriceSchedule(price_id="p", pool="far", unit_prices={})
    return PoolSpec("far", "openai", {"m": "m"}, price, profile=name, base_url=base_url, options=options)


@pytest.mark.parametrize(
    ("name", "options", "address"),
    [
        ("openai", {}, "https://api.openai.com/v1"),
        ("openrouter", {}, "https://openrouter.ai/api/v1"),
        ("openrouter", {"region": "eu"}, "https://eu.openrouter.ai/api/v1"),
        ("chutes", {}, "https://llm.chutes.ai/v1"),
        ("prime", {"team_id": "t"}, "https://api.pinference.ai/api/v1"),
        ("azure", {"resource": "ours"}, "https://ours.services.ai.azure.com/openai/v1"),
        (
            "vertex",
            VERTEX,
            "https://europe-west4-aiplatform.googleapis.com/v1/projects/my-project/locations/europe-west4/endpoints/openapi",
        ),
        (
            "vertex",
            {**VERTEX, "location": "global"},
            "https://aiplatform.googleapis.com/v1/projects/my-project/locations/global/endpoints/openapi",
        ),
        (
            "sagemaker",
            {"region": "eu-central-1", "endpoint": "chat"},
            "https://runtime.sagemaker.eu-central-1.amazonaws.com/endpoints/chat/openai/v1",
        ),
    ],
)
def test_addresses_are_made_from_options(name: str, options: dict[str, str], address: str) -> None:
    """Each provider's own address, filled from the pool's options."""
    assert endpoint(spec(name, **options)).base_url == address


@pytest.mark.parametrize(
    ("name", "options", "labels"),
    [
        ("vertex", VERTEX, {"jurisdiction": "NL", "data_zone": "NL"}),
        ("vertex", {**VERTEX, "location": "global"}, {}),
        ("vertex", {**VERTEX, "location": "mars-west1"}, {}),
        ("sagemaker", {"region": "eu-central-1", "endpoint": "e"}, {"jurisdiction": "DE", "data_zone": "DE"}),
        ("azure", {"resource": "r"}, {}),
        ("azure", {"resource": "r", "region": "swedencentral"}, {}),
        ("azure", {"resource": "r", "region": "swedencentral", "deployment": "GlobalStandard"}, {}),
        (
            "azure",
            {"resource": "r", "region": "swedencentral", "deployment": "DataZoneStandard"},
            {"jurisdiction": "EU", "data_zone": "EU"},
        ),
        (
            "azure",
            {"resource": "r", "region": "eastus2", "deployment": "DataZoneBatch"},
            {"jurisdiction": "US", "data_zone": "US"},
        ),
        ("azure", {"resource": "r", "region": "uksouth", "deployment": "DataZoneStandard"}, {}),
        (
            "azure",
            {"resource": "r", "region": "uksouth", "deployment": "Standard"},
            {"jurisdiction": "GB", "data_zone": "GB"},
        ),
        ("openrouter", {}, {}),
        ("openrouter", {"region": "eu"}, {"jurisdiction": "EU", "data_zone": "EU"}),
        ("chutes", {}, {}),
        ("prime", {}, {}),
    ],
)
def test_residency_follows_from_the_address(name: str, options: dict[str, str], labels: dict[str, str]) -> None:
    """A region says where prompts are processed, as far as the provider promises it; what is global says nothing."""
    found = resolved(name, options).labels
    assert {key: value for key, value in found.items() if key in ("jurisdiction", "data_zone")} == labels
    allowed, _ = eligible({"jurisdictions": ["EEA"]}, found)
    assert allowed == (labels.get("jurisdiction") in ("NL", "DE", "EU"))


def test_an_address_of_the_pools_own_declares_nothing() -> None:
    """Whose address it is, only the pools file knows: not even the region stands for it."""
    assert resolved("vertex", VERTEX).labels["operator"] == "cloud"
    assert resolved("vertex", VERTEX, "https://proxy.example/v1").labels == {}


def test_privacy_is_asked_for_where_it_is_declared() -> None:
    """A router's labels stand only beside the body that asks its providers to keep them."""
    for privacy, labels in [("no-training", {"training": False}), ("zdr", {"training": False, "zdr": True})]:
        found = resolved("openrouter", {"privacy": privacy})
        assert found.labels == labels
        assert found.body["provider"]["data_collection"] == "deny"
        assert found.body["provider"].get("zdr") == labels.get("zdr")
    assert resolved("openrouter", {}).body == {}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_whole(name: str) -> None:
    """Every option that is needed or chosen among is described, every label known, every price feed has its unit."""
    each = PROFILES[name]
    assert set(needed_options(each, None)) <= set(each.options)
    assert set(each.choices) <= set(each.options)
    told = [each.labels, *(variant.labels for variant in each.variants)]
    assert {key for labels in told for key in labels} <= set(LABELS)
    assert {place for rule in each.residency for place in rule.places.values()} <= COUNTRIES | set(ZONES)
    for rule in each.error_map:
        assert rule.contains == rule.contains.lower()
    for option in (rule.option for rule in each.residency):
        assert option in each.options


@given(st.sampled_from(HTTP), st.data())
def test_no_option_leads_to_another_host(name: str, data: st.DataObject) -> None:
    """Whatever text an option holds, the request goes to a host under the provider's own domain, or nowhere."""
    domains = {
        "openai": "api.openai.com", "openrouter": "openrouter.ai", "chutes": "llm.chutes.ai",
        "prime": "api.pinference.ai", "azure": ".services.ai.azure.com", "vertex": "aiplatform.googleapis.com",
        "sagemaker": ".amazonaws.com",
    }  # fmt: skip
    if name not in domains:
        return
    options = {
        key: data.draw(st.text(max_size=20) | st.sampled_from(["a.b/", "x@y", "#", "a:1"]))
        for key in PROFILES[name].options
    }
    try:
        found = endpoint(spec(name, **options))
    except ConfigError:
        return
    assert found.host.endswith(domains[name])
    assert found.base_url.startswith("https://")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("profile: vertex, options: {project: p}", "profile vertex needs options.location"),
        (
            "profile: vertex, options: {project: p, location: a/b}",
            "pools.yaml:1: pools[0].options.location: does not fit",
        ),
        ("profile: vertex, options: {project: p, locaton: a}", "did you mean 'location'?"),
        ("profile: azure, options: {resource: r, deployment: DataZoneStandrd}", "did you mean 'DataZoneStandard'?"),
        ("profile: sagemaker, base_url: https://a.example/v1", "profile sagemaker needs options.region"),
        ("profile: openrouter, options: {privacy: none}", "(expected one of no-training, zdr)"),
        ("profile: prime, options: {team_id: 'a b'}", "does not fit into a header"),
        ("profile: openrouter, options: {provider: 'a b'}", "options.provider: is no name"),
        ("profile: pai3", "(expected the endpoint's address"),
        ("profile: chuts", "did you mean 'chutes'?"),
    ],
)
def test_a_wrong_option_is_refused_at_its_line(lines: str, message: str) -> None:
    """The pools file's faults name line, key, and what would be right."""
    with pytest.raises(ConfigError) as raised:
        read(lines)
    assert message in str(raised.value)


def read(lines: str) -> PoolSpec:
    text = (
        "pools: [{name: far, kind: openai, models: [m], price: {input: 1, output: 1, per: 1M tokens}, " + lines + "}]"
    )
    return read_pools(parse(text, "pools.yaml").entries["pools"], None, None, ".").pools[0]


def test_the_pools_file_takes_labels_and_options_from_the_profile() -> None:
    """What a profile declares is the pool's, unless the file says otherwise."""
    found = read("profile: vertex, options: {project: p-1, location: europe-west9}")
    assert (found.placement["jurisdiction"], found.options["project"]) == ("FR", "p-1")
    found = read("profile: vertex, options: {project: p-1, location: europe-west9}, placement: {jurisdiction: null}")
    assert found.placement["jurisdiction"] is None
    assert read("profile: azure, base_url: https://r.openai.azure.com/openai/v1").options == {}


def test_an_option_that_is_a_secret_is_refused_and_not_repeated() -> None:
    """Keys live in the environment, also for those who build pools in Python."""
    with pytest.raises(ConfigError, match="looks like a secret") as raised:
        endpoint(spec("prime", team_id="sk-planted0123456789"))
    assert "planted" not in str(raised.value)


def test_names_the_nearest_profile() -> None:
    """A misspelt profile is answered with the right one."""
    with pytest.raises(ConfigError, match="did you mean 'sagemaker"):
        profile("sagemakr")


def test_a_raw_job_is_refused_where_a_pool_takes_chats_only(tmp_path: Path) -> None:
    """Known before anything is sent, at the pool's line; an engine or endpoint that takes both is fine."""
    pool = remote("far", "https://proxy.example/v1", profile="vertex")
    raw = {"id": "id", "column": "prompt", "format": "raw"}
    with pytest.raises(ConfigError, match=r"pools\[0\].profile: profile vertex takes chats only") as raised:
        make_job(tmp_path, prompts(1), [pool], prompt=raw)
    assert raised.value.line is not None
    make_job(tmp_path, prompts(1), [pool])
    make_job(tmp_path, prompts(1), [{**pool, "profile": "chutes"}], prompt=raw)
