"""What a prompt may be at worst where its tokens are not counted but estimated, at a token per four bytes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

WORST_ESTIMATE = 4
"""At worst every byte is a token."""
WORST_TEMPLATE_TOKENS = 64
"""The pool's own chat template adds at most so many to each request."""


def worst_input(tokens: pa.Array | pa.ChunkedArray, exact: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The most input tokens (int64[n]) that each request may be: our own count where it is ``exact`` (bool[n])."""
    counted = tokens.cast(pa.int64())
    return pc.if_else(exact, counted, pc.add(pc.multiply(counted, WORST_ESTIMATE), WORST_TEMPLATE_TOKENS))
