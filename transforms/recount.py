"""Counting the tokens of answers ourselves, to check what a provider reports or stand in for what it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AT_ONCE = 4096  # texts encoded together; bounds the encodings held in memory


def recount_results(results: pa.RecordBatch, tokenizer: Tokenizer) -> pa.Array:
    """Tokens of each answer of RESULT_SCHEMA rows, all its samples, as int64[n]; NULL where there is none."""
    samples = results.column("samples")
    alone = recount_outputs(pc.if_else(pc.is_null(samples), results.column("output"), None), tokenizer)
    if samples.null_count == len(samples):
        return alone
    return pc.coalesce(recount_outputs(samples, tokenizer), alone)


def recount_outputs(texts: pa.Array, tokenizer: Tokenizer) -> pa.Array:
    """Tokens of each answer as int64[n], NULL where the answer is.

    ``texts`` is of strings, or of lists of strings (``samples``), whose tokens are added up. Counted is the visible
    text: a provider also counts the end-of-sequence token, so its figure may be higher by one for each sample.
    """
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        samples = texts.flatten()
        counts = recount_outputs(samples, tokenizer).fill_null(0).to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(texts).fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths, dtype=np.int64)
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        totals = running[ends] - running[ends - lengths]
        return pa.array(totals, mask=pc.is_null(texts).to_numpy(zero_copy_only=False))
    totals = np.zeros(len(texts), np.int64)
    for start in range(0, len(texts), _AT_ONCE):
        batch = ["" if text is None else text for text in texts.slice(start, _AT_ONCE).to_pylist()]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        totals[start : start + len(batch)] = [len(encoding) for encoding in encodings]
    return pa.array(totals, pa.int64(), mask=pc.is_null(texts).to_numpy(zero_copy_only=False))
