"""SageMaker through a real boto3 client, and the prefix groups that its affinity header is made from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.transforms.prefix import common_prefix_bytes
from bidbeam.transforms.prefix_group import SHORTEST, prefix_groups, prefix_ids

# -- prefix groups --

SYSTEM = b"You are a careful clerk. " * 12
MANUALS = [b"Manual %d: " % n + bytes([97 + n]) * 1500 for n in range(4)]

keys_in_order = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.binary(max_size=6)).map(
        lambda row: (b"" if row[0] == 3 else SYSTEM) + (MANUALS[row[1]] if row[0] else b"") + row[2]
    ),
    max_size=25,
).map(sorted)


def ids(keys: list[bytes], seed: int = 7, parts: tuple[str | None, ...] = ("m", None)) -> list[str | None]:
    found: list[str | None] = prefix_ids(pa.array(keys, pa.large_binary()), seed, parts).cast(pa.string()).to_pylist()
    return found


def test_requests_of_one_manual_share_an_id_and_those_of_another_do_not() -> None:
    keys = sorted(SYSTEM + MANUALS[at] + b" question %d" % n for at in range(3) for n in range(5))
    found = ids(keys)
    assert None not in found
    assert [found.count(name) for name in dict.fromkeys(found)] == [5, 5, 5]


def test_a_manual_keeps_its_id_in_another_lot_and_with_other_questions() -> None:
    first = ids(sorted(SYSTEM + MANUALS[1] + b" question %d" % n for n in range(6)))
    second = ids(sorted(SYSTEM + MANUALS[at] + b" detail %d" % n for at in (1, 2) for n in range(9)))
    assert len(set(first)) == 1
    assert second[:9] == [first[0]] * 9


def test_a_lone_request_is_known_by_what_it_shares_with_its_neighbours() -> None:
    lone = SYSTEM + MANUALS[1] + b" only this"
    keys = [SYSTEM + MANUALS[0] + b" a", SYSTEM + MANUALS[0] + b" b", lone, SYSTEM + MANUALS[2] + b" a"]
    found = ids([*keys, SYSTEM + MANUALS[2] + b" b"])
    assert found[0] == found[1] != found[2] is not None
    assert found[3] == found[4] not in (found[0], found[2])


def test_a_beginning_too_short_to_matter_gets_no_id() -> None:
    assert ids([b"Describe item %d" % n for n in range(5)]) == [None] * 5
    assert ids([]) == []
    assert ids([SYSTEM * 9]) == [None]


def test_ids_are_keyed_by_the_runs_seed_the_model_and_the_tenant() -> None:
    keys = [SYSTEM + MANUALS[0] + b" a", SYSTEM + MANUALS[0] + b" b"]
    made = [ids(keys, seed, parts)[0] for seed in (1, 2) for parts in (("m", None), ("k", None), ("m", "t"), ("m", ""))]
    assert len(set(made)) == len(made)
    assert all(name is not None and len(name) == 16 for name in made)


@given(keys_in_order)
def test_whoever_has_one_id_shares_at_least_the_shortest_prefix(keys: list[bytes]) -> None:
    found = ids(keys)
    for name in {name for name in found if name is not None}:
        mine = [key for key, other in zip(keys, found, strict=True) if other == name]
        assert len({key[:SHORTEST] for key in mine}) == 1
        assert all(len(key) >= SHORTEST for key in mine)


@given(keys_in_order)
def test_groups_are_runs_of_neighbours_that_share_what_they_say(keys: list[bytes]) -> None:
    shared = common_prefix_bytes(pa.array(keys, pa.large_binary()))
    group, depth = prefix_groups(shared)
    assert np.all(np.diff(group) >= 0)
    assert np.all(np.diff(group) <= 1)
    for at, length in enumerate(depth.tolist()):
        mine = [keys[place][:length] for place in np.flatnonzero(group == at).tolist()]
        assert len(set(mine)) == 1
        assert length == 0 or (length >= SHORTEST and length & (length - 1) == 0)
