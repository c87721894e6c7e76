"""The README: everything that it says to type is typed, and prints what it says.

``BIDBEAM_UPDATE_README=1`` writes what the commands print into it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_jobs import prompts, remote, write_job

from bidbeam.connectors.pools import PoolSpec
from bidbeam.pipelines.job import Job

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
POOLS = ROOT / "connectors/README.md"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIDBEAM = Path(sys.executable).parent / "bidbeam"


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str


def blocks(language: str) -> list[Block]:
    found = [
        Block(lang, title.strip(), text) for lang, title, text in BLOCK.findall(README.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language == language]


def masked(text: str, home: Path) -> str:
    """The output with what differs from run to run made the same."""
    text = text.replace(str(home.resolve()), "/home/me").replace(str(home), "/home/me")
    text = re.sub(r"\d{4}-\d\d-\d\d(?: \d\d:\d\d:\d\d)?", "2026-11-22", text)
    text = re.sub(r"(2026-11-22)-[0-9a-f]{8}\b", r"\1-5e0c1d2f", text)
    text = re.sub(r"\b\d\.\d{3} s\b", "0.000 s", text)
    text = re.sub(r"(?m)^(elapsed +).*$", r"\g<1>3.1 s", text)
    return re.sub(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "f3e986f6-f5a0-b3fb-894c-9223f846a1d4", text)


def typed(block: Block, home: Path) -> str:
    """The block as a terminal would show it: each command, and what it printed."""
    shown = ""
    for line in block.text.splitlines():
        if not line.startswith("$ "):
            continue
        program, *words = shlex.split(line[2:])
        assert program == "bidbeam", line
        ended = subprocess.run([BIDBEAM, *words], cwd=home, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]
        shown += f"{line}\n{masked(ended.stdout, home)}"
    return shown


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """The directory where all console blocks were typed one after another; each block's text, and what came."""
    home = tmp_path_factory.mktemp("me")
    return home, [(block.text, typed(block, home)) for block in blocks("console")]


def test_commands_print_what_the_readme_shows(terminal: tuple[Path, list[tuple[str, str]]]) -> None:
    """Typed from the top in an empty directory, the console blocks print exactly what stands there."""
    _, came = terminal
    assert len(came) >= 3
    if os.environ.get("BIDBEAM_UPDATE_README"):
        text = README.read_text(encoding="utf-8")
        for said, printed in came:
            text = text.replace(said, printed)
        README.write_text(text, encoding="utf-8")
        return
    for said, printed in came:
        assert printed == said


def test_job_and_pools_of_the_readme_are_valid(tmp_path: Path) -> None:
    """The YAML blocks together make a job with an engine of our own and an endpoint."""
    for block in blocks("yaml"):
        (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    job = Job.from_yaml(tmp_path / "job.yaml")
    kinds: list[PoolSpec] = list(job.pools)
    assert [pool.kind for pool in kinds] == ["vllm", "openai"]


def test_pools_of_every_kind_are_valid(tmp_path: Path) -> None:
    """The pools file beside the connectors reads without a fault, and shows several kinds and profiles."""
    [text] = [text for _, title, text in BLOCK.findall(POOLS.read_text(encoding="utf-8")) if title == " pools.yaml"]
    job = write_job(tmp_path, prompts(1), [remote("any")], model="qwen3-32b")
    (tmp_path / "pools.yaml").write_text(text, encoding="utf-8")
    pools = Job.from_yaml(job).pools
    assert {pool.kind for pool in pools} == {"openai", "batch"}
    assert len({pool.profile for pool in pools}) == len(pools) == 4


def test_python_of_the_readme_runs(
    terminal: tuple[Path, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python block runs where the console blocks were typed, and finds their run done."""
    home, _ = terminal
    monkeypatch.chdir(home)
    [block] = [each for each in blocks("python") if not each.title]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block.text, "README.md", "exec"), {})  # noqa: S102 - our own README
    status, served, cost = out.getvalue().split()
    assert (status, served) == ("nothing_to_do", "8")
    assert float(cost) > 0


def test_composed_pipeline_is_that_of_the_example() -> None:
    """The lines that compose the transforms stand in the example that the tests run, word for word."""
    [block] = [each for each in blocks("python") if each.title == "compose"]
    example = (ROOT / "examples/compose/pipeline.py").read_text(encoding="utf-8")
    indented = "".join(f"            {line}\n" for line in block.text.splitlines())
    assert indented in example


def test_make_targets_of_the_readme_exist() -> None:
    """Every ``make`` command that is named is a target of the Makefile."""
    named = set(re.findall(r"make ([a-z]+)", README.read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    assert named - {"and"} <= targets


def test_views_of_the_readme_are_in_the_ledger(terminal: tuple[Path, list[tuple[str, str]]]) -> None:
    """Every table and view that is named can be queried."""
    from bidbeam.connectors.ledger_reader import query_ledger

    home, _ = terminal
    section = README.read_text(encoding="utf-8").partition("## The ledger")[2].partition("```")[0]
    names = re.findall(r"`([a-z_]+)`", section)
    assert len(names) >= 18
    for name in names:
        query_ledger(str(home / "first/ledger"), f"FROM {name} LIMIT 1", rehearsals=True)


def test_links_of_the_readme_lead_somewhere() -> None:
    """Every relative link names a file of the repository."""
    for page in (README, POOLS):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert links
        for link in links:
            assert (page.parent / link).exists(), link


def test_readme_fits_on_four_screens() -> None:
    """Short enough to be read: at most 260 lines, outputs included."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 260
