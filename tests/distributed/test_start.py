"""The start of a program: by torchrun, again after a rank has died, by Slurm, and alone."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch

import funcnet as fn
from distributed import restarts
from distributed.ranks import free_port
from funcnet.distributed import PeerError
from funcnet.distributed.processes import environment
from funcnet.distributed.processes.rendezvous import store_of

pytestmark = pytest.mark.cpu_only

PROGRAM = """
import torch, funcnet as fn
device = fn.distributed.initialize(device="cpu")
data = fn.distributed.axis_of(fn.distributed.mesh(), "data")
print(f"{data.index} of {data.size}: {data.sum(torch.ones(2)).tolist()}")
"""


def test_a_run_whose_ranks_are_killed_goes_on_bit_for_bit(two_ranks, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    two_ranks(restarts.train, alone, False)
    assert restarts.compare(alone, killed, 2, False, random.Random(0)) == 21


def run(command, **more):
    env = {name: value for name, value in os.environ.items() if name not in more} | more
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_plain_python_is_one_process(program):
    found = run([sys.executable, program])
    assert found.stdout == "0 of 1: [1.0, 1.0]\n"
    assert found.stderr == ""


def test_by_a_rendezvous_as_on_many_machines(program):
    """Two agents of one process each, which meet at an address."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", program]
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(command))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.stdout for each in found) == [f"{i} of 2: [2.0, 2.0]\n" for i in range(2)]
    assert [each.stderr for each in found] == ["", ""]


def test_by_srun(program):
    """With the variables that srun sets, and an address, since the machine's is not Slurm's."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "17"}
    slurm |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = [None, None]

    def start(rank):
        more = slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
        found[rank] = run([sys.executable, program], **more)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.stdout for each in found] == [f"{i} of 2: [2.0, 2.0]\n" for i in range(2)]
    assert [each.stderr for each in found] == ["", ""]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "2",
}


def test_the_place_of_a_process():
    assert environment.place({}) == (0, 1, 0, "", 0, "", False)
    assert environment.place(TORCHRUN | {"LOCAL_RANK": "0"}) == (1, 2, 0, "a", 29500, "", False)
    assert environment.place({"WORLD_SIZE": "1", "RANK": "0"}).world == 1
    found = environment.place(SLURM)
    assert found == (3, 4, 1, "gpu07", 61441, "4097.2", False)
    assert environment.place(SLURM | {"MASTER_ADDR": "b"}).host == "b"
    # A batch script has the variables of the job, but it is one process.
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert environment.place(batch).world == 1


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT is missing"),
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is missing"),
        (TORCHRUN | {"RANK": "2"}, "RANK must be from 0 to 1, since WORLD_SIZE is 2; got 2"),
        (TORCHRUN | {"RANK": "one"}, "RANK must be a number, got 'one'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, got 70000"),
        (SLURM | {"SLURM_PROCID": "9"}, "SLURM_PROCID must be from 0 to 3"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is missing"),
    ],
)
def test_wrong_variables_are_errors(env, expected):
    with pytest.raises(ValueError, match="initialize: ") as caught:
        environment.place(env)
    assert str(caught.value).endswith(expected) or expected in str(caught.value)


def test_ranks_that_do_not_come_are_named():
    port = free_port()
    places = [environment.Place(rank, 3, 0, "127.0.0.1", port) for rank in range(2)]
    found = {}

    def start(place):
        try:
            store_of(place, 1.0)
        except PeerError as error:
            found[place.rank] = str(error)

    threads = [threading.Thread(target=start, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == "initialize: rank 2 of 3 did not come in time"
    assert found[1] == found[0]


def test_an_attempt_does_not_meet_the_one_before(monkeypatch):
    """Ranks of the attempt before have left keys in the store, which stays."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *_, **__: store)
    names = []
    for _ in range(2):
        found = {}

        def start(place, found=found):
            mine = store_of(place, 20.0)
            mine.set(f"from{place.rank}", str(place.rank))
            found[place.rank] = mine.get(f"from{1 - place.rank}")

        places = [environment.Place(rank, 2, 0, "127.0.0.1", 1, "run", True) for rank in (1, 0)]
        threads = [threading.Thread(target=start, args=(place,)) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {0: b"1", 1: b"0"}
        names.append(store.get("run/leader"))
    assert names[0] != names[1]


def sizes():
    def message(**given):
        with pytest.raises(ValueError, match="mesh: ") as caught:
            fn.distributed.mesh(**given)
        return str(caught.value)

    return message(data=4), message(model=3), message(data=0)


def traced():
    mesh = fn.distributed.mesh()
    return fn.jit(lambda x: fn.distributed.axis_of(mesh, "data").sum(x))(torch.ones(2)).tolist()


def test_an_axis_may_be_asked_for_within_a_compiled_function(two_ranks):
    assert two_ranks(traced) == [[2.0, 2.0]] * 2


def test_a_mesh_that_is_not_of_the_world(two_ranks):
    for larger, undivided, none in two_ranks(sizes):
        assert larger == "mesh: expects a mesh of 2 ranks, got 4: pipe=1 x data=4 x model=1"
        assert undivided == "mesh: model=3 times pipe=1 does not divide 2 ranks"
        assert none == "mesh: data must be an integer of at least 1, got 0"
