"""Training steps beside PyTorch's, torch.compile's and JAX's: time, first call, peak memory.

    python tests/benchmarks/compare.py --output FOLDER

Each peer trains each workload in a process of its own, on the same cores with as many threads. A
workload's peers take turns, never two at once, round by round; a time is the median over the
rounds. Tables go to stdout, and with --output to results.md and results.json. JAX may live in
another environment: --jax-python names its interpreter. With --device cuda all compute on a GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.worker import Workload

WIDE = (1024,) * 9
STEPS = 200
WORKLOADS = [
    *[
        Workload(
            f"{label} step, disk net, batch {batch}",
            batch=batch,
            optimizer=optimizer,
            repeat_first=batch == 100,
        )
        for label, optimizer in (("SGD", "sgd"), ("Adam", "adam"))
        for batch in (4, 100, 1000)
    ],
    Workload(f"scan of {STEPS} SGD steps, disk net, batch 4", batch=4, scan=STEPS),
    Workload(f"scan of {STEPS} SGD steps, disk net, batch 100", scan=STEPS, repeat_first=True),
    Workload("SGD step, 64-256-256-10, batch 128", sizes=(64, 256, 256, 10), batch=128),
    *[
        Workload(
            f"SGD step, 8 x 1024, batch 4096{also}",
            sizes=WIDE,
            batch=4096,
            threads=2,
            memory=True,
            remat=bool(also),
        )
        for also in ("", ", remat")
    ],
    *[
        Workload(
            f"{net}, batch {batch}",
            net,
            batch=batch,
            optimizer="adamw",
            threads=2,
            memory=True,
            repeat_first=True,
        )
        for net, batch in (
            ("cnn", 64),
            ("vgg", 32),
            ("resnet", 32),
            ("blocks", 4),
            ("mixer", 64),
            ("tabular", 256),
            ("resnet18", 32),
            ("unet", 8),
        )
    ],
    Workload(
        "LSTM step, 2 layers of 256, batch 32 x 64 steps, Adam",
        "lstm",
        batch=32,
        optimizer="adam",
        threads=2,
    ),
    *[
        Workload(
            f"GPT of {layers}, batch 4 x 128",
            net,
            batch=4,
            optimizer="adamw",
            threads=2,
            memory=net == "gpt",
            repeat_first=True,
        )
        for net, layers in (
            ("gpt", "4 layers"),
            ("gpt_loop", "4 layers, a loop"),
            ("gpt24", "24 layers, a loop"),
        )
    ],
    Workload("a million uniform draws", draws=10**6),
    Workload("population of 10, disk net, batch 100", threads=2, members=10),
    Workload("population of 100, disk net, batch 5", batch=5, threads=2, members=100),
    Workload("population of 100, disk net, batch 100", threads=2, members=100),
    Workload("population of 1000, disk net, batch 100", threads=2, members=1000),
    Workload("population of 100, digits CNN, batch 32", "digits", batch=32, threads=2, members=100),
]
# Each peer's program and mode.
PEERS = {
    "funcnet eager": ("funcnet", "eager"),
    "funcnet jit": ("funcnet", "jit"),
    "torch eager": ("torch", "eager"),
    "torch eager, one by one": ("torch", "one by one"),
    "torch.compile": ("torch", "compile"),
    "torch.compile, CUDA graphs": ("torch", "graphs"),
    "JAX jit": ("jax", "jit"),
}
COMPILED = ("funcnet jit", "torch.compile", "torch.compile, CUDA graphs", "JAX jit")
OURS = "funcnet jit"
ON_GPU = ("torch.compile, CUDA graphs",)
# By task: glibc keeps large blocks in a heap that fragments, or maps and unmaps them.
MALLOCS = {"memory": "default", "mapped": "large blocks mapped"}
NOTES = f"""\
A time is the median over the rounds, of a step: in a scan one of {STEPS}, in a population that of
all members. The last columns are {OURS} over the peer. The disk net is 2-25-25-25-2; nets given
by their sizes have ReLU and the loss MSE, those with a name are in peers/*_nets.py and train with
cross entropy and AdamW, fused where PyTorch is eager; a population of them with SGD. JAX has the
images' channels last. States are donated where a peer can. torch.compile is the compiled model and
loss, and the compiled optimizer step. Torch loops over the steps of a scan, and trains a population
by torch.func.vmap, or one by one: its models in turn. Remat is in blocks of two layers. Memory is
data, state and all else"""
ON_CPU_NOTE = """\
, twice: with glibc's default malloc, in whose heap freed
blocks leave gaps, and with blocks of 1 MiB and more mapped, which is what is in use."""
ON_GPU_NOTE = """\
, as the library's allocator on the GPU counts it.
A time ends when the GPU is done. CUDA graphs are torch.compile's mode "reduce-overhead"."""


class WorkerError(Exception):
    """A worker has no answer; the text says why."""


Ask = Callable[[str], dict[str, Any]]


@contextlib.contextmanager
def working(
    peer: str, task: str, workload: Workload, cache: str, options: argparse.Namespace
) -> Iterator[Ask]:
    """A process that runs a peer's workload; ``ask(line)`` gives its next answer."""
    library, mode = PEERS[peer]
    program = Path(__file__).parent / "peers" / f"{library}_peer.py"
    python = options.jax_python if library == "jax" else sys.executable
    arguments = [mode, task, json.dumps(asdict(workload)), str(options.seconds)]
    cores = sorted(os.sched_getaffinity(0))[-workload.threads :]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [python, str(program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env=os.environ | settings(workload, cache, task),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as process,
    ):

        def ask(line: str = "") -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
            if not select.select([process.stdout], [], [], options.limit)[0]:
                raise WorkerError(f"no answer in {options.limit:.0f} s")
            answer = process.stdout.readline()
            if not answer:
                code = process.wait()
                errors.seek(0)
                answer = [f"ended with code {code}", *errors.read().strip().splitlines()][-1]
            found = json.loads(answer) if answer.startswith("{") else {"error": answer}
            if "error" not in found:
                return found
            missing = re.search(r"No module named '([\w.]+)'", found["error"])
            raise WorkerError(f"{missing[1]} is missing" if missing else found["error"])

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def settings(workload: Workload, cache: str, task: str) -> dict[str, str]:
    """The environment of a worker: its threads, and where it keeps what it compiles."""
    threads = workload.threads
    found = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": workload.device.partition(":")[0],
        # JAX would take most of the GPU's memory for its own, which the peers need too.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "FUNCNET_CACHE_DIR": f"{cache}/funcnet",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
    }
    if threads == 1:
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if task == "first":
        # JAX keeps nothing by default, so it is timed without.
        found["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/jax"
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        found["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    if task == "mapped":
        found["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    return found


@dataclass
class Row:
    """What was found of a workload, by peer; lists have an entry for each round or process."""

    workload: Workload
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first_empty: dict[str, list[float]] = field(default_factory=dict)
    first_warm: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)
    mapped: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, what: str, peer: str) -> float | None:
        """The median of a measure, if it was taken."""
        found = getattr(self, what).get(peer)
        return statistics.median(found) if found else None


def measure(workload: Workload, options: argparse.Namespace, versions: dict[str, str]) -> Row:
    """Everything about a workload; a peer that fails is out, and the others go on."""
    row = Row(workload)
    peers = [peer for peer in options.peers if workload.members or not peer.endswith("one by one")]

    def standing(among: Iterable[str]) -> Iterator[str]:
        return (peer for peer in among if peer not in row.failures)

    @contextlib.contextmanager
    def attempt(peer: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            row.failures[peer] = str(error)
            print(f"  {peer}: {error}", file=sys.stderr)

    asks: dict[str, Ask] = {}
    with contextlib.ExitStack() as stack:
        for peer in peers:
            with attempt(peer):
                cache = stack.enter_context(tempfile.TemporaryDirectory())
                ask = stack.enter_context(working(peer, "time", workload, cache, options))
                ready = ask()
                versions[PEERS[peer][0]] = ready["version"]
                row.first_empty[peer] = [ready["first"]]
                ask("warm up\n")
                asks[peer] = ask
        for _ in range(options.rounds):
            for peer in standing(asks):
                with attempt(peer):
                    seconds = asks[peer]("go\n")["seconds"]
                    row.seconds.setdefault(peer, []).append(seconds)
    for _ in range(options.repeats if workload.repeat_first else 0):
        for peer in standing(each for each in COMPILED if each in peers):
            with attempt(peer), tempfile.TemporaryDirectory() as cache:
                for found in (row.first_empty, row.first_warm):
                    with working(peer, "first", workload, cache, options) as ask:
                        found.setdefault(peer, []).append(ask()["first"])
    with tempfile.TemporaryDirectory() as cache:
        for task in [*mallocs(workload)] * (options.repeats if workload.memory else 0):
            for peer in standing(peers):
                with attempt(peer), working(peer, task, workload, cache, options) as ask:
                    getattr(row, task).setdefault(peer, []).append(ask()["memory"])
    return row


def mallocs(workload: Workload) -> dict[str, str]:
    """The tasks that measure memory, with what stands for the allocator in the table."""
    return MALLOCS if workload.device == "cpu" else {"memory": "the GPU's"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns that are empty."""
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line[place] for place in kept) + " |" for line in lines)


def text(value: float | None) -> str:
    """A number to three digits, and at least to its units."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def ratio(value: float | None, other: float | None) -> str:
    """A ratio as text, if both are there."""
    return text(value / other) if value and other else ""


def cell(row: Row, what: str, peer: str, scale: float = 1.0) -> str:
    """A measure, or why there is none."""
    value = row.median(what, peer)
    if value is not None:
        return text(value * scale)
    failure = " ".join(row.failures.get(peer, "").replace("|", "/").split())
    return failure if len(failure) <= 60 else f"{failure[:60]}..."


def times(rows: Sequence[Row]) -> str:
    """The table of steps."""
    others = [peer for peer in PEERS if not peer.startswith("funcnet")]
    lines = []
    for row in rows:
        medians = {peer: row.median("seconds", peer) for peer in PEERS}
        slow = min([each for each in medians.values() if each], default=0.0) >= 1e-3
        lines.append(
            [row.workload.name, str(row.workload.threads), "ms" if slow else "µs"]
            + [cell(row, "seconds", peer, 1e3 if slow else 1e6) for peer in PEERS]
            + [ratio(medians[OURS], medians[peer]) for peer in others]
        )
    return table(["workload", "threads", "unit", *PEERS, *[f"/ {peer}" for peer in others]], lines)


def first_calls(rows: Sequence[Row]) -> str:
    """The table of first calls."""
    columns = [(peer, cache) for peer in COMPILED for cache in ("empty", "warm")]
    lines = [
        [row.workload.name, *[cell(row, f"first_{cache}", peer) for peer, cache in columns]]
        for row in rows
    ]
    return table(["workload", *[f"{peer}, {cache} cache" for peer, cache in columns]], lines)


def memory(rows: Sequence[Row]) -> str:
    """The table of peak memory; rematerialised rows are held to the plain step as well."""
    plain = {row.workload.name: row for row in rows}
    lines = []
    for row in rows:
        kept = plain.get(row.workload.name.removesuffix(", remat"))
        peers = [(row, "torch eager"), (row, "JAX jit"), (kept, "torch eager")]
        for task, malloc in mallocs(row.workload).items():
            ours = row.median(task, OURS)
            lines.append(
                [row.workload.name, malloc, *[cell(row, task, peer) for peer in PEERS]]
                + [ratio(ours, each and each.median(task, peer)) for each, peer in peers]
            )
    ratios = ["/ torch eager", "/ JAX jit", "/ torch eager without remat"]
    return table(["workload", "malloc", *PEERS, *ratios], lines)


def report(rows: Sequence[Row], machine: str) -> str:
    """All tables, as Markdown."""
    sections = [
        ("Steps", times, [row for row in rows if not row.workload.members]),
        ("Populations", times, [row for row in rows if row.workload.members]),
        ("First call, seconds", first_calls, rows),
        (
            "Peak memory, MiB, above the process before the workload was built",
            memory,
            [row for row in rows if row.workload.memory],
        ),
    ]
    tables = [f"### {title}\n\n{make(chosen)}" for title, make, chosen in sections if chosen]
    on_cpu = all(row.workload.device == "cpu" for row in rows)
    notes = NOTES + (ON_CPU_NOTE if on_cpu else ON_GPU_NOTE)
    return "\n\n".join([machine, notes, *tables]) + "\n"


def processor() -> str:
    """The name of the processor, and how many cores there are to use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{[*names, platform.machine()][0]}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--jax-python", default=sys.executable, help="an interpreter that has JAX")
    add("--rounds", type=int, default=15, help="rounds of a workload (default 15)")
    add("--seconds", type=float, default=0.3, help="how long a round takes (default 0.3)")
    add("--repeats", type=int, default=3, help="of first calls and peak memory (default 3)")
    add("--limit", type=float, default=600, help="seconds for an answer (default 600)")
    add("--only", nargs="+", default=[""], metavar="SUBSTRING", help="workloads with one of these")
    add("--peers", nargs="+", choices=PEERS, metavar="PEER", help="only these")
    add("--device", default="cpu", help="cpu, or a CUDA device such as cuda (default cpu)")
    add("--quick", action="store_true", help="2 rounds of 0.05 s, 1 repeat: to see that it runs")
    add("--output", type=Path, metavar="FOLDER", help="where results.md and results.json go")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.repeats = 2, 0.05, 1
    name = processor()
    if options.device != "cpu":
        # The workers import torch; the driver of those on the CPU can do without.
        from devices import gpu, missing

        problem = missing(options.device)
        if problem is None and not options.device.startswith("cuda"):
            problem = "only the CPU and CUDA devices are measured"
        if problem is not None:
            parser.error(f"--device {options.device}: {problem}")
        name = f"{gpu(options.device)}; {name}"
    possible = [each for each in PEERS if options.device != "cpu" or each not in ON_GPU]
    options.peers = options.peers or possible
    if impossible := [each for each in options.peers if each not in possible]:
        parser.error(f"--peers: {impossible[0]} needs --device cuda")
    if not shutil.which(options.jax_python):
        parser.error(f"--jax-python: {options.jax_python} is no program")
    chosen = [each for each in WORKLOADS if any(part in each.name for part in options.only)]
    if not chosen:
        parser.error(f"no workload has {' or '.join(options.only)} in its name")
    rows, versions = [], {}
    for workload in [replace(each, device=options.device) for each in chosen]:
        print(workload.name, file=sys.stderr)
        rows.append(measure(workload, options, versions))
        machine = f"{name}; {', '.join(versions.values())}; {options.rounds} rounds."
        found = report(rows, machine)
        # After every workload, so that a run that is stopped leaves what it has.
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "results.md").write_text(found)
            results = {"machine": machine, "workloads": [asdict(row) for row in rows]}
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(found, end="")


if __name__ == "__main__":
    main()
