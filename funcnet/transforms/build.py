"""Compiling C++ to a shared library, once a text and machine: the results are kept on disk."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-tree-loop-vectorize",
    "-w",
    "-DNDEBUG",
    "-DSTANDALONE_TORCH_HEADER",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
)


class NoCompilerError(RuntimeError):
    """This machine has no C++ compiler."""


def compiler() -> str:
    """The C++ compiler: what ``CXX`` names, or the first of g++, clang++ and c++ that is there."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise NoCompilerError(
        f"jit needs a C++ compiler and found no {' or '.join(candidates)}: install g++ (Debian, "
        "Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or "
        "name one in the environment variable CXX. Without one, call the function itself: it "
        "gives the same result eagerly"
    )


def cache_dir() -> Path:
    """Where compiled programs are kept: ``FUNCNET_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("FUNCNET_CACHE_DIR"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "funcnet"


def fingerprint(*parts: str) -> str:
    """A name for what is compiled from these texts on this machine by this code."""
    sources = sorted(_HERE.glob("*.py")) + sorted(_HERE.glob("*.h"))
    own = [path.read_text() for path in sources]
    machine = [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    text = "\0".join([*parts, *own, *machine, _processor()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(name: str, write: Callable[[], str]) -> Path:
    """The shared library of a C++ program, written and compiled unless it is on disk."""
    library = cache_dir() / f"{name}.so"
    if library.exists():
        return library
    text = write()
    root = Path(torch.__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    command = [compiler(), *_FLAGS, f"-I{root / 'include'}", f"-I{_HERE}"]
    if capability in ("AVX2", "AVX512"):
        command.append(f"-DCPU_CAPABILITY_{capability}")
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, made = Path(folder) / "program.cpp", Path(folder) / "program.so"
        source.write_text(text)
        result = subprocess.run(
            [*command, str(source), "-o", str(made), *libraries],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"jit: the C++ compiler failed:\n{result.stderr[-4000:]}")
        # Another process may compile the same program: both leave a whole file.
        os.replace(made, library)
    return library


def load(name: str, write: Callable[[], str]) -> ctypes.CDLL:
    """The functions of a program; see `build`."""
    library = build(name, write)
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError:
        # The file is not whole: a disk that was full, say.
        library.unlink()
        loaded = ctypes.CDLL(str(build(name, write)))
    loaded.funcnet_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.funcnet_error.restype = ctypes.c_char_p
    return loaded
