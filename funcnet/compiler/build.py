"""Compiling C++ to a shared library, once for each text and machine."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from funcnet.compiler import cache, prefix
from funcnet.compiler.errors import BuildError, NoCompilerError
from funcnet.compiler.progress import BUILDS, stage

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
_FLAGS_OF_GCC = ("-fno-tree-loop-vectorize",)
# Without OpenMP's library: only its pragmas for vector lanes, and an omp.h that knows one thread.
_SERIAL = ("-fopenmp-simd", f"-I{_HERE / 'headers' / 'serial'}")
_DAY = 24 * 60 * 60
# A text of this length compiles as long as its headers do; more sources than this share too little.
_TEXT = 30_000
_MOST = 4
_INCLUDES_OF_KERNELS = ("<torch/csrc/inductor/cpp_prefix.h>", '"headers/failure.h"')
# The modules that neither record graphs nor make C++ of them.
_NO_WRITERS = frozenset(
    [
        *("__init__.py", "__main__.py", "build.py", "cache.py", "compiled.py", "dispatch.py"),
        *("errors.py", "escaped.py", "methods.py", "prefix.py", "progress.py", "reads.py"),
        *("recycling.py", "signature.py", "staged.py", "tracebacks.py", "user_code.py"),
    ]
)


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


def text_key(*parts: str) -> str:
    """A name for the C++ text that is made of these on this machine.

    Anything from which it is made counts: the code of the stages from graph to text, PyTorch's
    version, as Inductor writes the kernels, and the compiler and processor, for which it does.
    """
    return _digest([*parts, *_writers(), *_machine()])


def library_key(text: str, threads: int) -> str:
    """A name for the library that is compiled of a C++ text on this machine.

    Beside the text, that depends on the headers, the compiler, its flags, and PyTorch's version,
    whose headers and library it uses.
    """
    flags = [*_FLAGS, *_FLAGS_OF_GCC, *_SERIAL, str(threads == 1)]
    return _digest([text, *_headers(), *flags, *_machine()])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _headers() -> list[str]:
    return _contents(sorted(_HERE.glob("**/*.h")))


def _writers() -> list[str]:
    files = sorted(_HERE.glob("**/*.py"))
    return _contents([file for file in files if file.name not in _NO_WRITERS])


def _contents(files: Sequence[Path]) -> list[str]:
    return [part for file in files for part in (file.name, file.read_text())]


def _machine() -> list[str]:
    command = compiler()
    program = os.stat(command[0])
    made_by = [*command, str(program.st_size), str(program.st_mtime_ns)]
    version = torch.version.git_version or ""
    capability = torch.backends.cpu.get_cpu_capability()
    return [*made_by, torch.__version__, version, platform.machine(), capability, _processor()]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def load(text: str, threads: int) -> ctypes.CDLL:
    """The functions of a program: from disk, or compiled.

    Raises:
        BuildError: the compiler is not able to, or what it makes cannot be loaded.
    """
    name = f"{library_key(text, threads)}.so"
    # A process gets the first library of a name that it opened again: let it be the right one.
    if (kept := cache.find(name)) and b"funcnet_run" in kept.read_bytes():
        with contextlib.suppress(OSError, AttributeError):
            return _open(kept)
    with _folder() as folder:
        made = _compile(text, folder, threads)
        kept = cache.keep(name, made.read_bytes())
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
    loaded.funcnet_clear.restype = None
    return loaded


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder to compile in, which goes when the compilation ends, or this process, however."""
    prefix = f"funcnet-{platform.node()}-"
    try:
        _sweep(Path(tempfile.gettempdir()), prefix)
        with (
            tempfile.TemporaryDirectory(
                prefix=f"{prefix}{os.getpid()}-", ignore_cleanup_errors=True
            ) as folder,
            _removed_if_killed(folder),
        ):
            yield Path(folder)
    except OSError as error:
        raise BuildError(f"there is no folder to compile in: {error}") from error


@contextlib.contextmanager
def _removed_if_killed(folder: str) -> Iterator[None]:
    """Have another process remove a folder as soon as this one is gone.

    It waits for the end of a pipe that only this process writes to. The compiler, which may still
    be running then, can make `rm` fail a few times.
    """
    shell = shutil.which("sh")
    if shell is None:
        yield
        return
    script = 'cat; while [ -e "$0" ] && ! rm -rf "$0"; do sleep 0.1; done'
    with subprocess.Popen(
        [shell, "-c", script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def _sweep(where: Path, prefix: str) -> None:
    """Remove what processes left behind that were killed together with their watchers."""
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
    command = compiler()
    sources = _sources(text, _processors())
    stage(f"{Path(command[0]).name} compiles {len(text) / 1000:.0f} kB {BUILDS}")
    failure = ""
    for parallel in _ways(threads, tuple(command)):
        flags = _flags(command, parallel)
        header = _header(command, flags)
        loaded = prefix.flags(header)
        if loaded and not _built(command, [*flags, *loaded], sources, folder):
            return folder / "program.so"
        failure = _built(command, flags, sources, folder)
        if not failure:
            if loaded:
                prefix.refuse(header)
            elif header:
                prefix.make_later(header, [*command, *flags])
            return folder / "program.so"
    # What fails with OpenMP and then without it too fails for another reason.
    raise BuildError(f"{shlex.join(command)} failed:\n{failure}")


def _header(command: Sequence[str], flags: Sequence[str]) -> str:
    """The name under which `prefix` keeps the header for these flags; empty if not for g++."""
    return "" if _is_clang(tuple(command)) else f"prefix-{_digest([*_machine(), *flags])}"


def make_headers() -> list[Path]:
    """Make what `prefix` keeps, for programs of one thread and of more."""
    command = compiler()
    made = []
    for parallel in _ways(2, tuple(command)):
        flags = _flags(command, parallel)
        if name := _header(command, flags):
            made.append(prefix.make(name, [*command, *flags]))
    return made


def _built(command: list[str], flags: list[str], sources: list[str], folder: Path) -> str:
    """Compile sources side by side to one library; what the compiler says if it fails."""
    library, root = folder / "program.so", Path(torch.__file__).parent / "lib"
    libraries = [f"-L{root}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}"]
    files = [folder / f"program{index or ''}.cpp" for index in range(len(sources))]
    for file, source in zip(files, sources, strict=True):
        file.write_text(source)
    if len(files) == 1:
        return _ran([[*command, *flags, str(files[0]), "-o", str(library), *libraries]], folder)
    objects = [str(file.with_suffix(".o")) for file in files]
    steps = [
        [*command, *flags, "-c", str(file), "-o", made]
        for file, made in zip(files, objects, strict=True)
    ]
    linking = [*command, *flags, *objects, "-o", str(library), *libraries]
    return _ran(steps, folder) or _ran([linking], folder)


def _ran(commands: list[list[str]], folder: Path) -> str:
    """Run commands side by side; what those say that fail."""
    failures = []
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"TMPDIR": str(folder)},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        for process, command in zip(running, commands, strict=True):
            _, said = process.communicate()
            made = Path(command[command.index("-o") + 1])
            if process.returncode or not made.exists():
                code = f"it wrote no file, with code {process.returncode}"
                failures.append(said.strip()[-2000:] or code)
    return "\n".join(failures)


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sources(text: str, processors: int) -> list[str]:
    """A program as texts that compile side by side, if that takes long enough.

    Each kernel goes to one of them; the others know it by its first lines.
    """
    head, *kernels, run = text.split("\n\n")
    count = min(processors, 1 + sum(map(len, kernels)) // _TEXT, _MOST)
    if count == 1:
        return [text]
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [len(run), *[0] * (count - 1)]
    for index in sorted(range(len(kernels)), key=lambda index: -len(kernels[index])):
        share = loads.index(min(loads))
        shares[share].append(index)
        loads[share] += len(kernels[index])
    local = '[[gnu::visibility("hidden")]]'
    kernels = [kernel.replace("static", local, 1) for kernel in kernels]
    known = [kernel[: kernel.index("{")].strip() + ";" for kernel in kernels]
    first = "\n".join([head, *known, *[kernels[index] for index in shares[0]], run])
    includes = [f"#include {header}" for header in _INCLUDES_OF_KERNELS]
    return [first] + [
        "\n".join([*includes, *[kernels[index] for index in share]]) for share in shares[1:]
    ]


def _ways(threads: int, command: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Flags to try one after the other: with OpenMP if there are threads, and without it.

    Without it parallel loops run on one thread and give the same.
    """
    return [_SERIAL] if threads == 1 else [_openmp(command), _SERIAL]


def _openmp(command: tuple[str, ...]) -> tuple[str, ...]:
    if sys.platform != "darwin":
        return ("-fopenmp",)
    # Apple's compiler knows OpenMP only by other flags, and its library is where brew put it.
    from torch._inductor.cpp_builder import _get_openmp_args

    flags, ldflags, includes, folders, names, _ = _get_openmp_args(command[0])
    found = [*[f"-{flag}" for flag in flags], *[f"-{flag}" for flag in ldflags]]
    found += [f"-I{each}" for each in includes]
    return *found, *[f"-L{each}" for each in folders], *[f"-l{each}" for each in names]


def _flags(command: Sequence[str], parallel: Sequence[str]) -> list[str]:
    """The flags for a compiler of this kind on this kind of machine."""
    flags = [*_FLAGS, "-shared", "-fPIC"]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    else:
        # Compilers for these two processors have no -march=native.
        others = {"ppc64le": "-mcpu=native", "riscv64": "-march=rv64gc"}
        flags.append(others.get(platform.machine(), "-march=native"))
    if not _is_clang(tuple(command)):
        flags += _FLAGS_OF_GCC
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        flags.append(f"-DCPU_CAPABILITY_{capability}")
    return [*flags, *parallel, f"-I{Path(torch.__file__).parent / 'include'}", f"-I{_HERE}"]


@functools.cache
def _is_clang(command: tuple[str, ...]) -> bool:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return "clang" in version.stdout
