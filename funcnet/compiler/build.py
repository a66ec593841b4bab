"""Compiling C++ to a shared library, once a text and machine."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from funcnet.compiler import cache

_HERE = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
    "-DNDEBUG",
    "-DSTANDALONE_TORCH_HEADER",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
)
# Without OpenMP's library: its loops over lanes only, and an omp.h that knows one thread.
_SERIAL = ("-fopenmp-simd", f"-I{_HERE / 'serial'}")
_DAY = 24 * 60 * 60


class NoCompilerError(RuntimeError):
    """This machine has no C++ compiler."""


class BuildError(RuntimeError):
    """A program could not be compiled or loaded, and why."""


def compiler() -> list[str]:
    """The C++ compiler's command: what ``CXX`` says, or the first of g++, clang++ and c++."""
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(candidate[0]):
            return [found, *candidate[1:]]
    wanted = named[0] if named else "g++ or clang++ or c++"
    raise NoCompilerError(
        f"jit needs a C++ compiler and found no {wanted}: install g++ (Debian, "
        "Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or "
        "name one in the environment variable CXX. Without one, call the function itself: it "
        "gives the same result eagerly"
    )


def fingerprint(*parts: str) -> str:
    """A name for what is compiled from these texts on this machine by this code."""
    sources = sorted(_HERE.glob("*.py")) + sorted(_HERE.glob("**/*.h"))
    own = [path.read_text() for path in sources]
    command = compiler()
    program = os.stat(command[0])
    made_by = [*command, str(program.st_size), str(program.st_mtime_ns)]
    version = torch.version.git_version or ""
    capability = torch.backends.cpu.get_cpu_capability()
    machine = [torch.__version__, version, platform.machine(), capability, _processor()]
    text = "\0".join([*parts, *own, *made_by, *machine])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def load(name: str, threads: int, write: Callable[[], str]) -> ctypes.CDLL:
    """The functions of a program: from disk, or written by ``write`` and compiled.

    Raises:
        BuildError: the compiler is not able to, or what it makes cannot be loaded.
    """
    # A process gets the first library of a name that it opened again: let it be the right one.
    if (kept := cache.find(f"{name}.so")) and b"funcnet_run" in kept.read_bytes():
        with contextlib.suppress(OSError, AttributeError):
            return _open(kept)
    text = write()
    with _folder() as folder:
        made = _compile(text, folder, threads)
        kept = cache.keep(f"{name}.so", made.read_bytes())
        for library in [kept, made] if kept else [made]:
            try:
                return _open(library)
            except (OSError, AttributeError) as error:
                failure = error
    raise BuildError(f"the compiled program cannot be loaded: {failure}")


def _open(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.funcnet_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.funcnet_error.restype = ctypes.c_char_p
    return loaded


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder to compile in. Those that killed processes left behind are removed."""
    prefix = f"funcnet-{platform.node()}-"
    try:
        _sweep(Path(tempfile.gettempdir()), prefix)
        with tempfile.TemporaryDirectory(
            prefix=f"{prefix}{os.getpid()}-", ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise BuildError(f"there is no folder to compile in: {error}") from error


def _sweep(where: Path, prefix: str) -> None:
    for folder in where.glob("funcnet-*-*-*"):
        with contextlib.suppress(OSError, ValueError):
            found = folder.stat()
            if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
                continue
            old = time.time() - found.st_mtime > _DAY
            if old or (folder.name.startswith(prefix) and _is_dead(folder.name)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead(name: str) -> bool:
    try:
        os.kill(int(name.split("-")[-2]), 0)
    except ProcessLookupError:
        return True
    return False


def _compile(text: str, folder: Path, threads: int) -> Path:
    """The shared library of a C++ text."""
    source, made = folder / "program.cpp", folder / "program.so"
    source.write_text(text)
    command = compiler()
    root = Path(torch.__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    includes = [f"-I{root / 'include'}", f"-I{_HERE}"]
    if capability in ("AVX2", "AVX512"):
        includes.append(f"-DCPU_CAPABILITY_{capability}")
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    failure = ""
    for parallel in _ways(threads, tuple(command)):
        result = subprocess.run(
            [*command, *_flags(tuple(command)), *parallel, *includes]
            + [str(source), "-o", str(made), *libraries],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        if not result.returncode and made.exists():
            return made
        # What fails with OpenMP and then without it too fails for another reason.
        failure = (
            result.stderr.strip()[-2000:] or f"it wrote no file, with code {result.returncode}"
        )
    raise BuildError(f"{shlex.join(command)} failed:\n{failure}")


def _ways(threads: int, command: tuple[str, ...]) -> list[tuple[str, ...]]:
    """How the loops that threads share may be compiled: with OpenMP if there is need, or without.

    Without it they run on one thread and give the same.
    """
    return [_SERIAL] if threads == 1 else [_openmp(command), _SERIAL]


def _openmp(command: tuple[str, ...]) -> tuple[str, ...]:
    if sys.platform != "darwin":
        return ("-fopenmp",)
    # Apple's compiler knows OpenMP only by other flags, and its library lies where brew put it.
    from torch._inductor.cpp_builder import _get_openmp_args

    flags, ldflags, includes, folders, names, _ = _get_openmp_args(command[0])
    found = [*[f"-{flag}" for flag in flags], *[f"-{flag}" for flag in ldflags]]
    found += [f"-I{each}" for each in includes]
    return *found, *[f"-L{each}" for each in folders], *[f"-l{each}" for each in names]


@functools.cache
def _flags(command: tuple[str, ...]) -> tuple[str, ...]:
    """The flags for a compiler of this kind on this kind of machine."""
    from torch._inductor.cpp_builder import _get_cpu_arch_cflags, _get_shared_cflags

    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    native = [*_get_cpu_arch_cflags(command[0]), *_get_shared_cflags(True)]
    flags = [part for flag in native for part in shlex.split(f"-{flag}")]
    if "clang" not in version.stdout:
        flags.append("-fno-tree-loop-vectorize")
    return *_FLAGS, *flags
