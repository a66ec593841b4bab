"""Which process of the program this is, as torchrun, Slurm or nobody told it."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from funcnet.errors import require

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Ports that Linux gives to nobody by itself, of which a job takes one by its number.
_PORTS = range(61440, 65536)


class Place(NamedTuple):
    """This process among those of the program, and where they meet."""

    rank: int
    world: int
    local_rank: int
    """Its number on its machine."""

    host: str = ""
    """Of the store in which the ranks find each other."""

    port: int = 0

    run: str = ""
    """The name of the run, the same on all ranks."""

    has_agent: bool = False
    """Whether torchrun's agent holds the store, which outlives a rank; else rank 0 does."""


def place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place; one process, if nothing tells of others.

    Raises: ValueError: variables are missing, or are not what they should be.

    >>> place({})
    Place(rank=0, world=1, local_rank=0, host='', port=0, run='', has_agent=False)
    >>> place({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234"})
    Traceback (most recent call last):
    ...
    ValueError: initialize: RANK must be from 0 to 1, since WORLD_SIZE is 2; got 2
    """
    if "WORLD_SIZE" in env or "RANK" in env:
        return _of_torchrun(env)
    # A batch script, and a shell of salloc, have variables of the job too, but are no step of it.
    if "SLURM_STEP_NODELIST" in env and env.get("SLURM_NTASKS", "1") != "1":
        return _of_slurm(env)
    for name in _MPI:
        require(
            env.get(name, "1") == "1",
            f"initialize: {name} says that MPI has started several processes; start them by "
            f"torchrun, or set {', '.join(_TORCHRUN)} and LOCAL_RANK for each",
        )
    return Place(0, 1, int(env.get("LOCAL_RANK", "0")))


def _of_torchrun(env: Mapping[str, str]) -> Place:
    if env.get("WORLD_SIZE") == "1":
        return Place(0, 1, _number(env, "LOCAL_RANK", "0"))
    missing = [name for name in _TORCHRUN if not env.get(name)]
    require(
        not missing,
        f"initialize: expects {', '.join(_TORCHRUN)} and LOCAL_RANK, as torchrun sets them, or "
        f"none of them for one process; {', '.join(missing)} is missing",
    )
    return _checked(
        Place(
            rank=_number(env, "RANK"),
            world=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK", env["RANK"]),
            host=env["MASTER_ADDR"],
            port=_number(env, "MASTER_PORT"),
            run=env.get("TORCHELASTIC_RUN_ID", ""),
            has_agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        ),
        ("RANK", "WORLD_SIZE", "MASTER_PORT"),
    )


def _of_slurm(env: Mapping[str, str]) -> Place:
    missing = [name for name in _SLURM if not env.get(name)]
    require(
        not missing,
        f"initialize: expects {', '.join(_SLURM)} and SLURM_LOCALID, as srun sets them; "
        f"{', '.join(missing)} is missing",
    )
    job = env["SLURM_JOB_ID"]
    port = _PORTS[_number(env, "SLURM_JOB_ID") % len(_PORTS)]
    return _checked(
        Place(
            rank=_number(env, "SLURM_PROCID"),
            world=_number(env, "SLURM_NTASKS"),
            local_rank=_number(env, "SLURM_LOCALID", "0"),
            host=env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
            port=_number(env, "MASTER_PORT", str(port)),
            run=f"{job}.{env.get('SLURM_STEP_ID', '0')}",
        ),
        ("SLURM_PROCID", "SLURM_NTASKS", "MASTER_PORT"),
    )


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it.

    >>> first_host("gpu[07-09,12],login1"), first_host("a,b")
    ('gpu07', 'a')
    """
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    inside, _, after = rest.partition("]")
    number = inside.partition(",")[0].partition("-")[0]
    return name + number + after.partition(",")[0]


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    found = env.get(name) or default
    require(
        found.isascii() and found.isdigit(),
        f"initialize: {name} must be a number, got {found!r}",
    )
    return int(found)


def _checked(found: Place, names: tuple[str, str, str]) -> Place:
    rank, world, port = names
    require(found.world >= 1, f"initialize: {world} must be at least 1, got {found.world}")
    require(
        found.rank < found.world,
        f"initialize: {rank} must be from 0 to {found.world - 1}, since {world} is {found.world}; "
        f"got {found.rank}",
    )
    require(
        0 < found.port < 2**16,
        f"initialize: {port} must be from 1 to 65535, got {found.port}",
    )
    return found
