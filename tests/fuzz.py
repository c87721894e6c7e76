"""Fuzzes everything that reads what others wrote, target by target, and says how many cases ran and what they found.

    python tests/fuzz.py                              every target, a minute each
    python tests/fuzz.py answer jsonl --seconds 600   these, ten minutes each
    python tests/fuzz.py --case FILE job              one case again

Coverage-guided where atheris is installed (``pip install atheris``, on x86-64 Linux; no part of ``make setup``), else
random changes to valid cases. What is found is kept below ``--keep``, one file a finding: each is the case, beside it
what it raised. Exits with 1 where there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONGEST_S = 20
"""A case that takes longer is a finding."""


def main() -> int:
    """Runs each target in a process of its own, for a case may end it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where findings are kept")
    parser.add_argument("--case", type=Path, help="run this case of one target, and nothing else")
    parser.add_argument("--random", action="store_true", help="without atheris, even where it is installed")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE))
    guided = not asked.random and importlib.util.find_spec("atheris") is not None
    if asked.inside:
        (fuzz_guided if guided else fuzz_random)(asked.targets[0], asked.seconds, asked.keep)
        return 0
    from fuzz_targets import TARGETS

    if asked.case:
        TARGETS[asked.targets[0]].run(asked.case.read_bytes())
        return 0
    print("coverage-guided, by atheris" if guided else "random changes to valid cases; atheris is not installed")
    found = sum(_outside(name, asked.seconds, asked.keep, guided) for name in asked.targets or TARGETS)
    return 1 if found else 0


def _outside(name: str, seconds: float, keep: Path, guided: bool) -> int:
    place = keep / name
    place.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in place.glob("*.case")}
    (place / "books.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--inside", name, "--seconds", str(seconds), "--keep", str(keep)]
    ended = subprocess.run(
        command if guided else [*command, "--random"], check=False, capture_output=True, timeout=seconds + 300
    )
    books = {"cases": 0}
    with contextlib.suppress(OSError, ValueError):
        books = json.loads((place / "books.json").read_text())
    for path in (*Path.cwd().glob("crash-*"), *Path.cwd().glob("timeout-*"), *Path.cwd().glob("oom-*")):
        path.rename(place / f"{path.name}.case")  # what ended the process, as libFuzzer writes it down
    new = {path.name for path in place.glob("*.case")} - before
    died = "" if ended.returncode in (0, 77) else f"; the process ended with {ended.returncode}"
    if died and ended.stderr:
        (place / "stderr.txt").write_bytes(ended.stderr[-20_000:])
    print(f"{name:12} {books['cases']:>9,} cases  {len(new)} new findings{died}", flush=True)
    return len(new) + bool(died)


class Books:
    """Counts cases, and keeps one case of each kind of failure."""

    def __init__(self, name: str, keep: Path) -> None:
        from fuzz_targets import TARGETS

        self.target, self.place = TARGETS[name], (keep / name).resolve()
        self.cases = 0

    def run(self, data: bytes) -> None:
        """One case; what it raises is written down and goes no further."""
        self.cases += 1
        began = time.monotonic()
        try:
            self.target.run(data)
            if time.monotonic() - began > LONGEST_S:
                raise TimeoutError(f"{time.monotonic() - began:.0f} s")  # noqa: TRY301 - written down as any other
        except Exception as error:
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            ours = [frame for frame in frames if "bidbeam" in frame or "fuzz_targets" in frame][-2:]
            digest = hashlib.sha256(repr((type(error).__name__, ours)).encode()).hexdigest()[:12]
            if not (self.place / f"{digest}.case").exists():
                (self.place / f"{digest}.case").write_bytes(data)
                (self.place / f"{digest}.txt").write_text("".join(traceback.format_exception(error)))
        if self.cases % 500 == 0:
            self.write()

    def write(self) -> None:
        """So that whoever started us knows, however we end."""
        (self.place / "books.json").write_text(json.dumps({"cases": self.cases}))


def fuzz_random(name: str, seconds: float, keep: Path) -> None:
    """Random changes to valid cases, other ones at each start."""
    from fuzz_targets import mutated

    books, until, seed = Books(name, keep), time.monotonic() + seconds, random.SystemRandom().getrandbits(60)
    while time.monotonic() < until:
        books.run(mutated(books.target.seeds, seed))
        seed += 1
    books.write()


def fuzz_guided(name: str, seconds: float, keep: Path) -> None:
    """What covers more of our code is changed further."""
    import atexit

    import atheris

    with atheris.instrument_imports(include=["bidbeam"]):
        books = Books(name, keep)
    from fuzz_targets import TOKENS, mutated

    atexit.register(books.write)
    corpus = Path(tempfile.mkdtemp())
    for place, seed in enumerate(books.target.seeds):
        (corpus / f"seed-{place}").write_bytes(seed)
    words = corpus.with_suffix(".dict")
    words.write_text(
        "".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in TOKENS if len(token) < 64)
    )

    def change(data: bytes, most: int, seed: int) -> bytes:
        if seed % 4 == 0:
            return mutated([data, *books.target.seeds], seed)[:most]
        return bytes(atheris.Mutate(data, most))

    options = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={LONGEST_S}",
        "-max_len=8192",
        f"-dict={words}",
        "-rss_limit_mb=3000",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], books.run, custom_mutator=change)
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
