"""Pure. The older versions of an adapter, from the object versions that a bucket keeps.

A bucket with versioning keeps what was overwritten or deleted. Its list of object versions says
when each came. Taken in this order, they show every state that the adapter's folder was in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from shared.adapters.identity import StoredAdapter, has_all_weights, may_be_part
from shared.stores.listing import Entry, group

MAX_OBJECT_VERSIONS = 5_000  # of one adapter that are looked through
MAX_STATE_FILES = 40_000
"""Files of all states together. An adapter of two files has fewer in as many versions. One of 250
shards would have a million, which took 4 s of CPU for each version that somebody asked for.
"""


class ObjectVersion(NamedTuple):
    """One version of one object, or the moment at which it was deleted (no `entry`). `since` is
    in seconds. `version_id` is the store's own name of it; without one, whatever was there was
    deleted.
    """

    since: float
    key: str
    version_id: str
    entry: Entry | None


def states(
    name: str, objects: Iterable[ObjectVersion]
) -> Iterator[tuple[StoredAdapter, dict[str, float]]]:
    """The states that the adapter was in, the newest first. Each comes with the ids of its files
    and since when they are there. The oldest are left out where they are too much to look through.

    `objects` may come in any order, but those of one key in descending order of time, as stores
    list them. Stores count time in whole seconds. Of one second, the first versions of all keys are
    taken together, then the second ones, and so on.
    """
    now: dict[str, ObjectVersion] = {}
    found: deque[list[ObjectVersion]] = deque()
    size = 0
    for _, step in groupby(_in_order(name, objects), key=lambda one: one[0]):
        for _, version in step:
            if version.entry is not None:
                now[version.key] = version
            elif version.version_id in ("", now.get(version.key, version).version_id):
                now.pop(version.key, None)
        found.append(list(now.values()))
        size += len(now)
        while size > MAX_STATE_FILES:
            size -= len(found.popleft())
    for state in reversed(found):
        adapters, _ = group(o.entry for o in state if o.entry is not None)
        for adapter in adapters:
            paths = {f"{name}/{file.path}" for file in adapter.files}
            yield adapter, {o.version_id: o.since for o in state if o.key in paths}


def choose_state(name: str, objects: Iterable[ObjectVersion], version: str) -> StoredAdapter | None:
    """The newest state with this digest, or a digest that begins so. Otherwise one with an object
    version of this id.

    Several states have that object if other files were replaced meanwhile. While an upload is under
    way, the adapter even has the new config with the old weights. So the state is taken whose other
    files came closest in time: those it was uploaded with. A later upload does not change that.
    """
    holders: list[tuple[StoredAdapter, dict[str, float]]] = []
    for adapter, since in states(name, objects):
        if adapter.digest.startswith(version):
            return adapter
        if version in since:
            holders.append((adapter, since))

    def distance(holder: tuple[StoredAdapter, dict[str, float]]) -> tuple[bool, float]:
        adapter, since = holder
        whole = has_all_weights([file.path for file in adapter.files])
        return not whole, sum(abs(at - since[version]) for at in since.values())

    return min(holders, key=distance, default=(None, {}))[0]


def _in_order(
    name: str, objects: Iterable[ObjectVersion]
) -> list[tuple[tuple[float, int], ObjectVersion]]:
    """The versions of the adapter's own files, each with its second and its number in it."""
    own = [o for o in objects if _is_part(name, o.key)]
    counts: Counter[tuple[str, float]] = Counter()
    numbered = []
    for version in reversed(own):
        numbered.append(((version.since, counts[version.key, version.since]), version))
        counts[version.key, version.since] += 1
    return sorted(numbered, key=lambda one: one[0])


def _is_part(name: str, key: str) -> bool:
    folder, _, file = key.rpartition("/")
    return folder == name and may_be_part(file)
