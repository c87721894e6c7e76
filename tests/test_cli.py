"""The command line: what it prints where, and what it exits with."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bidbeam.connectors.errors import ConfigError, InputError, Interrupted, RunHeld, StoreError
from bidbeam.pipelines.cli import invoke, main
from bidbeam.pipelines.init import write_starter
from bidbeam.pipelines.job import Job, check_keys
from bidbeam.pipelines.progress import NullProgress, ProgressSnapshot
from bidbeam.pipelines.summary import PoolTotal, Quote, QuotePool, RunSummary

SUMMARY = RunSummary(
    run_id="copy-2026-11-22-0123abcd",
    status="complete",
    requests=1200,
    served=1198,
    dead={"failed": 1, "invalid": 1},
    cost=Decimal("0.001230000000000000"),
    baseline_cost=Decimal("0.0041"),
    input_tokens=50_000,
    cached_tokens=30_000,
    ideal_cached_tokens=40_000,
    output_tokens=9_000,
    pools=(PoolTotal("near", 1200, 50_000, None, 9_000, Decimal("0.00123")),),
    elapsed_s=75.2,
    output_url="/data/out",
    ledger_url="/data/ledger",
)
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process; gives its exit code, stdout and stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        code = invoke(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def job(tmp_path: Path) -> str:
    return write_starter(str(tmp_path / "job"))[0]


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    """Puts a module with these names where a command imports it from."""
    replacement = ModuleType(module)
    for name, value in names.items():
        setattr(replacement, name, value)
    monkeypatch.setitem(sys.modules, module, replacement)


def stub_run(monkeypatch: pytest.MonkeyPatch, result: RunSummary | BaseException) -> list[dict[str, Any]]:
    """Stands in for the run; collects its calls."""
    calls: list[dict[str, Any]] = []

    def run_job(job: Job, **options: Any) -> RunSummary:
        calls.append({"job": job, **options})
        options["progress"].update(ProgressSnapshot("generate", total=2, settled=1))
        if isinstance(result, BaseException):
            raise result
        return result

    stub(monkeypatch, "bidbeam.pipelines.run", run_job=run_job)
    return calls


def test_init_writes_what_run_reads(cli: Cli, tmp_path: Path) -> None:
    """The starter job is valid, restricts placement, and needs no key."""
    code, out, _ = cli("init", str(tmp_path / "My first run"))
    home = tmp_path / "My first run"
    job = Job.from_yaml(home / "job.yaml")
    check_keys(job)
    assert code == 0
    assert f"next: bidbeam run {shlex.quote(f'{home}/job.yaml')} --rehearse" in out
    assert (job.name, job.placement["zdr"]) == ("my-first-run", True)
    prompts = pq.read_table(home / "prompts" / "sample.parquet")
    assert {"request_id", "prompt"} == set(prompts.column_names)
    assert prompts.num_rows > 0


def test_what_init_writes_names_every_key(tmp_path: Path) -> None:
    """Whatever a job or pools file may say stands in the one that is written, be it in a comment."""
    from bidbeam.pipelines import baselines, fx, job_file, pools_file, price_sources, prices, terms
    from bidbeam.transforms import placement, sampling

    job = write_starter(str(tmp_path))[0]
    of_job = {
        *job_file.KEYS, *placement.CONSTRAINTS, *sampling.KEYS, *terms.AuctionSpec.__slots__, "id", "column",
        "template", "system", "format", "tenant", "max_cost", "dead",
        *set(baselines._KEYS) - {"cache_write", "request"},
    }  # fmt: skip
    of_pools = {
        *pools_file.SECTIONS, *pools_file._ANY_KEY, *placement.LABELS, *prices.TOKEN_KEYS, *price_sources._KEYS,
        *fx._FETCHED, "source", "trust_remote_code", "answers_as", "tokens_per_second", "workers", "accelerator_hour",
        "currency", "valid_from", "valid_to", "demand", "least", "most", "rate", "at",
    }  # fmt: skip
    words = {name: set(re.findall(r"[a-z_]+", (tmp_path / name).read_text())) for name in ("job.yaml", "pools.yaml")}
    assert of_job <= words["job.yaml"]
    assert of_pools <= words["pools.yaml"]
    assert Job.from_yaml(job).max_cost == 1


def test_what_init_writes_rehearses_at_once(tmp_path: Path) -> None:
    """A new user's first command ends well, in plain text; typed again, it says that nothing is left to do."""
    job = write_starter(str(tmp_path))[0]
    command = [sys.executable, "-m", "bidbeam.pipelines.cli", "run", job, "--rehearse"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (first.returncode, first.stderr.count("Traceback")) == (0, 0), first.stderr
    assert "complete (rehearsal: nothing was sent or spent)" in first.stdout
    assert "\x1b" not in first.stdout + first.stderr
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    told = json.loads(again.stdout)
    assert (again.returncode, told["status"]) == (0, "nothing_to_do")
    assert told["run_id"] == first.stdout.split()[-1]


def test_init_overwrites_nothing(cli: Cli, tmp_path: Path) -> None:
    """A file that is there stays as it is, and the others are not written."""
    (tmp_path / "pools.yaml").write_text("mine")
    code, out, err = cli("init", str(tmp_path))
    assert (code, out) == (2, "")
    assert "pools.yaml: already there, and nothing is overwritten" in err
    assert [path.name for path in tmp_path.iterdir()] == ["pools.yaml"]


def test_run_prints_its_summary_and_run_id_on_stdout(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress goes to stderr, the summary to stdout, the run id last."""
    stub_run(monkeypatch, SUMMARY)
    code, out, err = cli("run", job)
    assert code == 0
    assert out.splitlines()[-1].split() == ["run", "copy-2026-11-22-0123abcd"]
    assert "1,200, of which 1,198 were served" in out
    assert "2: 1 failed, 1 invalid" in out
    assert "75.0% of the ideal 40,000" in out
    assert "$0.0012; $0.0041 at the baseline, 70.0% saved" in out
    assert "1 min 15 s" in out
    assert err == "generate | 1/2 prompts (50%)\n"
    assert "\x1b" not in out + err


def test_run_hands_over_what_was_typed(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Date, overrides, rehearsal and Beam's options arrive; what follows -- is not read by us."""
    calls = stub_run(monkeypatch, SUMMARY)
    beam = ["--direct_running_mode=multi_processing", "--json", "--set", "x"]
    code, out, err = cli(
        "run", job, "--run-date", "2026-01-02", "--set", "budget.max_cost=3", "--rehearse", "-q", "--", *beam
    )  # fmt: skip
    (call,) = calls
    assert (code, err) == (0, "")
    assert not out.startswith("{")
    assert call["beam_options"] == beam
    assert call["rehearse"] is True
    assert isinstance(call["progress"], NullProgress)
    assert (call["job"].run_date, call["job"].max_cost) == (date(2026, 1, 2), Decimal(3))


def test_json_is_one_object_with_exact_costs(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decimals are plain strings, unknown is null."""
    stub_run(monkeypatch, SUMMARY)
    code, out, _ = cli("run", job, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["cost"], told["run_id"]) == ("0.001230000000000000", SUMMARY.run_id)
    assert told["pools"][0]["cached_tokens"] is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("topP", "top_p"), ("max_new_tokens", "max_tokens"),
     ("top_k", None), ("repetition_penalty", None), ("chat_template_kwargs", None), ("of_our_engine", None)],
)  # fmt: skip
def test_a_sampling_key_that_looks_misspelt_is_told_once(
    cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch, key: str, meant: str | None
) -> None:
    """It goes to the engine all the same; keys that are known, or like none that is, go in silence."""
    calls = stub_run(monkeypatch, SUMMARY)
    code, _, err = cli("run", job, "-q", "--set", f"sampling.{key}=1")
    assert (code, calls[0]["job"].sampling[key]) == (0, 1)
    told = "--set: sampling.{}: is no sampling key that is known, and goes to the engine as it is; did you mean {!r}?"
    assert err == ("" if meant is None else f"warning: {told.format(key, meant)}\n")


@pytest.mark.parametrize("exit_code", [0, 3])
def test_the_summary_decides_the_exit_code(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    """3 is done, with more dead letters than tolerated."""
    stub_run(monkeypatch, replace(SUMMARY, exit_code=exit_code))
    assert cli("run", job)[0] == exit_code


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("is wrong", file="job.yaml", line=3, key="input"), 2, "error: job.yaml:3: input: is wrong"),
        (InputError("no file matches"), 2, "error: no file matches"),
        (RunHeld("held by host 7"), 2, "error: held by host 7"),
        (StoreError("not writable"), 1, "error: not writable"),
        (Interrupted("interrupted; the same command resumes"), 4, "resumes"),
        (KeyboardInterrupt(), 4, "interrupted; the same command resumes"),
        (ValueError("odd\nsecond line"), 1, "error: unexpected ValueError: odd (--traceback or BIDBEAM_TRACEBACK=1"),
    ],
)
def test_every_failure_has_its_exit_code(
    cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    """Usage is 2, interruption 4, everything else 1; the message is on stderr, with --json on stdout as well."""
    stub_run(monkeypatch, error)
    told_code, out, err = cli("run", job)
    assert (told_code, out) == (code, "")
    assert text in err
    assert "Traceback" not in err
    json_code, out, _ = cli("run", job, "--json")
    assert json_code == code
    assert json.loads(out)["error"]["exit_code"] == code


def test_a_traceback_is_shown_where_it_is_asked_for(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option, before or after the verb, or by environment."""
    stub_run(monkeypatch, ValueError("odd"))
    assert "Traceback" in cli("run", job, "--traceback")[2]
    assert "Traceback" in cli("--traceback", "run", job)[2]
    monkeypatch.setenv("BIDBEAM_TRACEBACK", "1")
    assert "Traceback" in cli("run", job)[2]


def test_an_unexpected_error_repeats_no_key(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library says is masked before it is printed."""
    stub_run(monkeypatch, ValueError("bad key sk-plantedplantedplanted"))
    code, out, err = cli("run", job, "--json")
    assert code == 1
    assert "planted" not in out + err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["run"], "Missing argument 'JOB'; see bidbeam run --help"),
        (["runn"], "No such command 'runn'"),
        (["run", "{job}", "--rehears"], "No such option"),
        (["run", "{job}", "--run-date", "yesterday"], "--run-date: 'yesterday' is not a date (expected YYYY-MM-DD)"),
        (["run", "{job}", "--set", "budget"], "--set: is not of the form key.path=value"),
        (["run", "{job}", "--set", "nmae=a"], "--set: nmae: unknown key"),
        (["run", "{job}.missing"], "there is no such file"),
        (["quote", "{job}", "--", "--runner=x"], "only run takes options after --"),
        (["ledger", "query", "led", "SELECT 1", "--format", "jsn"], "did you mean 'json'?"),
        (["ledger", "query", "led", "SELECT 1", "--storage", "s3.secret=x"], "credentials do not belong here"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_to_do(cli: Cli, job: str, argv: list[str], text: str) -> None:
    """The message is on stderr; as JSON, on stdout too."""
    typed = [argument.replace("{job}", job) for argument in argv]
    code, out, err = cli(*typed)
    assert (code, out) == (2, "")
    assert text in err
    if "--" not in typed:
        code, out, _ = cli(*typed, "--json")
        assert code == 2
        assert text in json.loads(out)["error"]["message"]


def test_quote_shows_pools_budget_and_baseline(cli: Cli, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bought where, and how it stands against the terms."""
    quote = Quote(
        run_id="copy-2026-11-22-0123abcd",
        requests=1000,
        input_tokens=40_000,
        ideal_cached_tokens=20_000,
        estimated=True,
        dead_invalid=2,
        expected_cost=Decimal("0.5"),
        worst_case_cost=Decimal(2),
        pools=(
            QuotePool("near", "0.71 USD per hour", 3, 1000, Decimal("0.5"), Decimal(2), 3720.0),
            QuotePool("far", "0.10 / 0.40 USD per 1M tokens", 0, 0, Decimal(0), Decimal(0), None, "placement:zdr"),
        ),
        lp_bound=Decimal("0.49"),
        regret=Decimal("0.0204"),
        budget=Decimal(1),
        baseline_cost=Decimal(1),
    )
    stub(monkeypatch, "bidbeam.pipelines.quote", quote_job=lambda _job, **_: quote)
    code, out, _ = cli("quote", job)
    assert code == 0
    for text in (
        "40,000 (estimates: a model's tokenizer is not known), 50.0% from cache at best",
        "$0.50; $1.00 at the baseline, 50.0% saved",
        "$2.00, more than the budget of $1.00",
        "$0.49, regret 2.04%",
        "1 h 02 min",
        "its placement declares a zdr that the job does not allow",
    ):
        assert text in out
    assert json.loads(cli("quote", job, "--json")[1])["worst_case_cost"] == "2"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A ledger that answers every query with the same two rows; collects the calls."""
    calls: list[dict[str, Any]] = []
    table = pa.table(
        {
            "pool": ["near", "far,\n\x1b[31maway"],
            "cost": pa.array([Decimal("0.000000000000000001"), None], pa.decimal128(38, 18)),
            "n": [10, 2],
        }
    )

    def query_ledger(url: str, sql: str, **options: Any) -> pa.Table:
        calls.append({"url": url, "sql": sql, **options})
        return table

    stub(monkeypatch, "bidbeam.connectors.ledger_reader", query_ledger=query_ledger)
    return calls


def test_a_query_prints_a_table(cli: Cli, answers: list[dict[str, Any]]) -> None:
    """Decimals are plain, NULL is NULL, and no cell can move the cursor."""
    code, out, _ = cli("ledger", "query", "led", "SELECT 1", "--rehearsals", "--storage", "s3.anon=true")
    assert code == 0
    assert out.splitlines() == [
        "pool                            cost   n",
        "--------------  --------------------  --",
        "near            0.000000000000000001  10",
        "far,  [31maway                  NULL   2",
        "(2 rows)",
    ]
    assert "\x1b" not in out
    assert answers == [{"url": "led", "sql": "SELECT 1", "rehearsals": True, "storage": {"s3": {"anon": True}}}]


def test_a_query_prints_csv(cli: Cli, answers: list[dict[str, Any]]) -> None:
    """Cells are quoted where they must be, NULL is empty."""
    _, out, _ = cli("ledger", "query", "led", "SELECT 1", "--format", "csv")
    assert out == 'pool,cost,n\nnear,0.000000000000000001,10\n"far,\n\x1b[31maway",,2\n'


def test_a_query_prints_json(cli: Cli, answers: list[dict[str, Any]]) -> None:
    """An array of rows; with --json one object that has the columns as well."""
    rows = json.loads(cli("ledger", "query", "led", "SELECT 1", "--format", "json")[1])
    assert rows[0] == {"pool": "near", "cost": "0.000000000000000001", "n": 10}
    assert rows[1]["cost"] is None
    assert json.loads(cli("ledger", "query", "led", "SELECT 1", "--json")[1]) == {
        "columns": ["pool", "cost", "n"],
        "rows": rows,
    }


def test_explain_hands_over_what_was_typed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledger, request and run arrive; JSON is one object."""
    calls: list[Any] = []

    def explain_request(*typed: Any, **options: Any) -> dict[str, Any]:
        calls.append((typed, options))
        return {"request_id": "r1", "cost": Decimal("0.10")}

    stub(monkeypatch, "bidbeam.pipelines.explain", explain_request=explain_request)
    stub(monkeypatch, "bidbeam.pipelines.explain_text", render_text=lambda told: f"request {told['request_id']}\n")
    assert cli("explain", "led", "r1", "--run", "run-1") == (0, "request r1\n", "")
    assert json.loads(cli("explain", "led", "r1", "--json")[1]) == {"request_id": "r1", "cost": "0.10"}
    assert calls[0] == (("led", "r1"), {"run_id": "run-1", "storage": {}, "rehearsals": False})


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """The installed command ends the process with the code of what happened."""
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("bidbeam ")


def test_help_starts_without_anything_heavy() -> None:
    """No engine, no Beam, no Arrow and no solver is imported before a verb needs it."""
    heavy = ("apache_beam", "pyarrow", "numpy", "duckdb", "scipy", "aiohttp", "tokenizers", "vllm", "torch")
    program = (
        "import sys\nfrom bidbeam.pipelines.cli import invoke\n"
        f"code = invoke(['--help'])\nprint(code, [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
