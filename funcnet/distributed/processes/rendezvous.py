"""How the ranks of one attempt find each other, in a store that may have outlived earlier ones.

torchrun starts all ranks again when one fails, and its agent's store still has what the ranks of
the attempt before wrote there: their addresses, where nobody listens any more. So each attempt has
keys of its own. Its number does not do for that, since on several machines the agents count apart.
Rank 0 makes a name, and the others agree to it:

    rank 0 says      leader = NAME
    rank r reads it, and says  NAME/hello/r = TOKEN
    rank 0 says      NAME/go = all tokens      once all are there
    rank r goes on if its token is among them; a NAME of an attempt before does not have it
"""

import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from funcnet.distributed.processes.environment import Place
from funcnet.distributed.processes.faults import GRACE, PeerError, until


def store_of(place: Place, timeout: float) -> Any:
    """The store of this attempt, once all ranks are there.

    Raises: PeerError: not all came in time, or there is no store.
    """
    deadline = time.monotonic() + timeout
    address = f"{place.host}:{place.port}"
    is_host = place.rank == 0 and not place.has_agent
    try:
        shared = dist.TCPStore(
            place.host,
            place.port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        what = f"initialize: rank {place.rank} of {place.world} "
        if is_host:
            raise PeerError(f"{what}cannot listen at {address}: {error}") from error
        holder = "torchrun's agent" if place.has_agent else "rank 0"
        raise PeerError(f"{what}found no {holder} at {address}: {error}", (0,)) from error
    agree = _lead if place.rank == 0 else _follow
    try:
        name = agree(dist.PrefixStore(place.run, shared), place, deadline)
    except dist.DistError as error:
        raise PeerError(f"initialize: the store at {address} is gone: {error}", (0,)) from error
    return dist.PrefixStore(f"{place.run}/{name}", shared)


def _lead(store: dist.Store, place: Place, deadline: float) -> str:
    name = secrets.token_hex(8)
    store.set("leader", name)
    hellos = [f"{name}/hello/{rank}" for rank in range(1, place.world)]
    if not until(lambda: store.check(hellos), deadline):
        late = tuple([rank for rank, key in enumerate(hellos, 1) if not store.check([key])])
        ranks = "rank" if len(late) == 1 else "ranks"
        listed = ", ".join([str(rank) for rank in late])
        told = f"initialize: {ranks} {listed} of {place.world} did not come in time"
        store.set(f"{name}/go", told)
        # The store may end with this process: the others read it first.
        came = len(hellos) - len(late)
        until(lambda: store.add(f"{name}/read", 0) >= came, time.monotonic() + GRACE)
        raise PeerError(told, late)
    store.set(f"{name}/go", "\n".join([store.get(key).decode() for key in hellos]))
    return name


def _follow(store: dist.Store, place: Place, deadline: float) -> str:
    token, said = secrets.token_hex(8), ""
    # For rank 0 to say who did not come.
    deadline += GRACE

    def agreed() -> str | None:
        nonlocal said
        if not store.check(["leader"]):
            return None
        name = store.get("leader").decode()
        if said != name:
            store.set(f"{name}/hello/{place.rank}", token)
            said = name
        if not store.check([f"{name}/go"]):
            return None
        told = store.get(f"{name}/go").decode()
        return told if told.startswith("initialize") or token in told.split("\n") else None

    told = until(agreed, deadline)
    if told is None:
        raise PeerError(f"initialize: rank 0 of {place.world} did not come in time", (0,))
    if told.startswith("initialize"):
        store.add(f"{said}/read", 1)
        raise PeerError(told)
    return said
