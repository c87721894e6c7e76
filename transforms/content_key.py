"""What a request asks, in 128 bits: the key by which answers are kept, so that no start of a run pays for one twice.

XXH3 with a secret seed of the run: about a fifth of the time of a cryptographic hash, which the data path would feel.
The seed keeps accidental and prepared collisions away, but it is no cryptographic secret: who holds many keys could
work back to it and then test guesses of a prompt. So these keys stand only in the run's journal, beside the prompts
themselves, and never in the ledger.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash


def context_seed(seed: int, *parts: str | None) -> int:
    """64-bit seed for everything that a key covers besides the prompt; parts cannot run into each other."""
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(16, "little"))
    for part in parts:
        data = b"" if part is None else part.encode()
        digest.update(b"%d:" % (-1 if part is None else len(data)))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def content_keys(keys: pa.Array, seeds: int | npt.NDArray[np.uint64]) -> pa.Array:
    """128-bit hashes of a binary array's values, null where null; one seed, or one a row. Gives binary(16)."""
    n = len(keys)
    if n == 0:
        return pa.array([], pa.binary(16))
    width = np.int64 if pa.types.is_large_binary(keys.type) else np.int32
    buffers = keys.buffers()
    offsets = np.frombuffer(buffers[1], width)[keys.offset : keys.offset + n + 1].tolist()
    data = memoryview(buffers[2] or b"")
    digest = xxhash.xxh3_128_digest
    if isinstance(seeds, int):
        hashes = [digest(data[a:b], seeds) for a, b in itertools.pairwise(offsets)]
    else:
        rows = zip(offsets[:-1], offsets[1:], seeds.tolist(), strict=True)
        hashes = [digest(data[a:b], seed) for a, b, seed in rows]
    valid = None
    if keys.null_count:
        valid = pa.array(keys.is_valid().to_numpy(zero_copy_only=False)).buffers()[1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [valid, pa.py_buffer(b"".join(hashes))])
