"""Which member gets which shard. What members do with it: tests/simulation."""

from collections import Counter

import pytest

from silbo.brokers.redis.members import Beat, Membership, Release, Stop, Take, assign


@pytest.mark.parametrize("members", [1, 2, 3, 5, 12, 16, 20])
def test_shards_are_shared_out_evenly(members: int) -> None:
    """No member gets two more than another, and no shard is left over."""
    assigned = assign([f"m{number}" for number in range(members)], 16)
    counts = Counter(assigned.values())
    assert set(assigned) == set(range(16))
    assert max(counts.values()) - min(counts[f"m{number}"] for number in range(members)) <= 1


def test_everybody_computes_the_same_assignment() -> None:
    """Also in a later version: two members of different versions must not disagree."""
    assert assign(["c", "a", "b", "a"], 6) == assign(["a", "b", "c"], 6)
    assert assign(["a", "b", "c"], 6) == {0: "c", 1: "c", 2: "a", 3: "a", 4: "b", 5: "b"}
    assert assign([], 6) == {}


def test_a_member_that_comes_moves_few_shards() -> None:
    moved = []
    for members in range(1, 12):
        names = [f"m{number}" for number in range(members)]
        before, after = assign(names, 16), assign([*names, "new"], 16)
        moved.append(sum(before[shard] != after[shard] for shard in before))
    assert sum(moved) <= 2 * sum(16 // (members + 1) for members in range(1, 12)), moved
    assert moved[0] == 8


def test_a_shard_that_does_not_drain_is_given_away_at_last() -> None:
    """A listener that hangs holds a shard back for `drain` seconds, and its lease is renewed meanwhile."""
    member = Membership("a", 1, lease=3.0, drain=10.0)
    assert member.step(0.0) == [Beat()]
    member.note_beat(Beat(), {"a": 0.0}, 0.0)
    assert member.step(0.0) == [Take(0)]
    member.note_taken(Take(0), 7, 0.0, 0.0)
    member.leave()
    assert Stop(0, 7) in member.step(0.5)
    now = 0.5
    while Release(0, 7) not in (commands := member.step(now)):
        for command in commands:
            member.note_lost(command, now)
        now = member.wake_at(now)
    assert now == 10.5


def test_a_member_that_joins_does_not_count_the_dead() -> None:
    """It shares the shards out as the others do, which have buried the dead one already."""
    member = Membership("a", 2, lease=3.0, drain=10.0)
    member.step(0.0)
    member.note_beat(Beat(), {"a": 0.0, "dead": 5.0}, 0.0)
    assert member.step(0.0) == [Take(0), Take(1)]


def test_a_member_whose_beats_failed_gives_the_others_time() -> None:
    """After Redis was away all but the first to return look silent."""
    member = Membership("a", 2, lease=3.0, drain=10.0)
    member.step(0.0)
    member.note_beat(Beat(), {"a": 0.0, "b": 0.2}, 0.0)
    (take,) = [command for command in member.step(0.0) if isinstance(command, Take)]
    member.note_taken(take, 7, 0.0, 0.0)
    member.step(0.4)
    member.note_lost(Beat(), 4.0)
    member.step(4.1)
    member.note_beat(Beat(), {"a": 0.0, "b": 4.3}, 4.1)
    assert not [command for command in member.step(4.1) if isinstance(command, Take)]
    member.step(4.5)
    member.note_beat(Beat(), {"a": 0.0, "b": 4.7}, 5.7)
    assert [command for command in member.step(5.7) if isinstance(command, Take)]
