"""A fuzzer of `fn.load`: changed, cut and forged files: ``python -m tests.fuzz_checkpoint``.

A file that is loaded must give a tree, or a ValueError that begins with "load:"; it must run no
code, take no more memory than a file of its size can need, and not end the process. Case K of a
seed depends on nothing else: ``--seed 0 --case K`` runs it alone. Cases run in a child process,
whose memory is limited, so that after a crash the parent knows which it was.
"""

import argparse
import json
import os
import pickle
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import funcnet as fn

Files = dict[str, bytes]
"""The files of a folder, of which `NAME`, or its index, is loaded."""

NAME = "t.safetensors"
INDEX = f"{NAME}.index.json"
MEMORY = 2**31
SLOW = 10.0
"""Seconds of the processor."""

TREE = {
    "params": {"0": {"weight": torch.arange(32.0).view(2, 16), "bias": torch.ones(3)}, "1": {}},
    "moments": (torch.zeros(4, dtype=torch.complex128), None, [1.5, True, "text"]),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.ones(0, 3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
}


class Trap:
    """What a pickle may do: run a command, of which the folder has a trace then."""

    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


def folder_of(save: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, NAME))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap()))


SEEDS: dict[str, Files] = {
    "one": folder_of(lambda path: fn.save(path, TREE)),
    "checksum": folder_of(lambda path: fn.save(path, TREE, checksum=True)),
    "shards": folder_of(lambda path: fn.save(path, TREE, max_shard_bytes=70)),
    "checked shards": folder_of(lambda path: fn.save(path, TREE, max_shard_bytes=1, checksum=True)),
    "other": folder_of(lambda path: save_file({"a.b": torch.ones(2), "c": torch.ones(3)}, path)),
    "pickle": folder_of(lambda path: path.write_bytes(pickle.dumps(Trap()))),
    "torch": folder_of(lambda path: torch.save(TREE, path)),
    "zip": folder_of(zipped),
    "nothing": {NAME: b""},
}

NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.5]
WORDS = ["", "..", "../t.safetensors", "/etc/passwd", NAME, "F32", "F4", "BOOL", "dtype", "a.b.c"]
WORDS += ["\0", "list", "tuple", "none", "complex128", "NaN", "é", "a." * 300, "0", "__metadata__"]
VALUES = [*NUMBERS, *WORDS, None, True, [], {}, [[]], {"a": {}}, [0] * 70, float("nan")]

TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"\xff", b"null", b"1e999"]


def change_bytes(moments: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or exchange some bytes, mostly at the beginning."""
    changed = bytearray(data)
    for _ in range(moments.choice([1, 1, 2, 8])):
        end = min(len(changed), moments.choice([9, 100, 700, 2**30]))
        begin, size = moments.randint(0, end), moments.choice([1, 1, 2, 8, 64, 1000])
        match moments.randrange(6):
            case 0 if begin < len(changed):
                changed[begin] ^= 1 << moments.randrange(8)
            case 1:
                del changed[begin : begin + size]
            case 2:
                changed[begin:begin] = changed[begin : begin + size]
            case 3:
                changed[begin : begin + size] = moments.randbytes(size)
            case 4:
                del changed[begin:]
            case 5:
                changed[begin:begin] = moments.choice(TOKENS) * moments.choice([1, 1, 2, 2000])
    return bytes(changed)


def change_data(moments: random.Random, data: bytes) -> bytes:
    """Flip a bit of the tensors."""
    changed = bytearray(data)
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin < len(data):
        changed[moments.randrange(begin, len(data))] ^= 1 << moments.randrange(8)
    return bytes(changed)


def change_json(moments: random.Random, value: Any) -> Any:
    """Change, remove, rename or add something in a JSON value."""
    if isinstance(value, str) and value.startswith("{") and moments.random() < 0.8:
        return json.dumps(change_json(moments, json.loads(value)))
    if isinstance(value, (dict, list)) and value and moments.random() < 0.85:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = moments.choice(keys)
        changed: Any = value.copy()
        match moments.randrange(8):
            case 0:
                del changed[key]
            case 1 if isinstance(value, dict):
                changed[moments.choice([*WORDS, moments.choice(keys)])] = changed.pop(key)
            case 2 if isinstance(value, dict):
                changed[moments.choice(WORDS)] = moments.choice([changed[key], *VALUES])
            case 3 if isinstance(value, list):
                changed.insert(key, moments.choice(VALUES))
            case 4:
                changed[key] = changed[moments.choice(keys)]
            case _:
                changed[key] = change_json(moments, changed[key])
        return changed
    if isinstance(value, int) and moments.random() < 0.5:
        return value + moments.choice([-64, -8, -1, 1, 8, 64])
    return moments.choice(VALUES)


def change_header(moments: random.Random, data: bytes) -> bytes:
    """Change a header, whose length is correct then."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(moments.choice([1, 1, 2, 4])):
        header = change_json(moments, header)
    text = json.dumps(header).encode()
    if moments.random() < 0.1:  # a name that is there twice
        text = text[:-1] + b"," + text[1:]
    if moments.random() < 0.02:
        bomb = moments.choice([b"[" * 10**6, b'{"a":' * 10**6, b"[" + b"[]," * 10**6 + b"0]"])
        text = b'{"a":' + bomb + b"}"
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def forged(moments: random.Random) -> Files:
    """A folder of which something was changed."""
    files = dict(SEEDS[moments.choice([*SEEDS, "one", "one", "shards", "shards", "checksum"])])
    name = moments.choice([*files, *files, INDEX if INDEX in files else NAME])
    data = files[name]
    regular = int.from_bytes(data[:8], "little") < len(data)
    match moments.randrange(9):
        case 0 | 1:
            files[name] = change_bytes(moments, data)
        case 8 if regular and name != INDEX:
            files[name] = change_data(moments, data)
        case 2:
            other = moments.choice([*SEEDS.values()])
            files[name] = other[moments.choice([*other])]
        case 3 if len(files) > 1:
            del files[name]
        case _ if name == INDEX:
            files[name] = json.dumps(change_json(moments, json.loads(data))).encode()
        case _ if regular and name != INDEX:
            files[name] = change_header(moments, data)
        case _:
            files[name] = change_bytes(moments, data)
    return files


def check(seed: int, number: int, folder: Path) -> str:
    """Run a case in a folder of its own, and say what came of it.

    Raises: AssertionError.
    """
    moments = random.Random(f"{seed} {number}")
    files = forged(moments)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    options = moments.choice([{}, {}, {"like": TREE}, {"at": "params"}, {"at": "moments.2"}])
    path = folder / moments.choice([NAME, NAME, NAME, INDEX])
    begin = time.process_time()
    try:
        tree = fn.load(path, **options)
        outcome = "loaded"
    except FileNotFoundError:
        outcome = "refused"
    except ValueError as error:
        if not str(error).startswith("load:"):
            raise
        outcome = "refused"
    if outcome == "loaded":
        for leaf in fn.tree.leaves(tree):
            if isinstance(leaf, torch.Tensor):
                leaf.clone().zero_()
    seconds = time.process_time() - begin
    assert seconds < SLOW, f"it took {seconds:.0f} s"
    trapped = [place for place in (folder, Path()) if (place / "trapped").exists()]
    assert not trapped, "a pickle was run"
    return outcome


def work(seed: int, first: int, deadline: float, last: int | None, log: Any) -> None:
    """Run cases in this process until the deadline, and write what came of each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    number = first
    while time.time() < deadline and (last is None or number <= last):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(number, check(seed, number, Path(folder)), file=log, flush=True)
            except BaseException as error:
                print(number, f"wrong {error!r}", file=log, flush=True)
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.time() + 60 * options.minutes
    outcomes: Counter[str] = Counter()
    number = options.case or 0
    while time.time() < deadline:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writer, "w") as log:
                work(options.seed, number, deadline, options.case, log)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as log:
            for line in log:
                case, outcome, *what = line.split(maxsplit=2)
                outcomes[outcome] += 1
                number = int(case) + 1
                if outcome == "wrong":
                    print(f"case {case}: {what[0].strip()}")
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print(f"case {number}: the process died of signal {os.WTERMSIG(status)}")
            outcomes["wrong"] += 1
            number += 1
        if options.case is not None:
            break
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"seed {options.seed}, {outcomes.total()} cases: {counts}")
    sys.exit(outcomes["wrong"] > 0)


if __name__ == "__main__":
    main()
