"""What `fit` keeps beside the train state: the history, the bar, the log, and Ctrl-C."""

import contextlib
import importlib
import math
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class History:
    """The values of the metrics at all steps, stacked from time to time."""

    def __init__(self, before: Mapping[str, Tensor] | None = None) -> None:
        self.parts: dict[str, list[Tensor]] = {
            name: [each] for name, each in (before or {}).items()
        }
        self.new: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            column = self.new.get(name)
            if column is None:
                column = self.new[name] = []
            column.append(value)
            if len(column) == 1024:
                self._stack(name)

    def _stack(self, name: str) -> None:
        new = [torch.as_tensor(value).detach() for value in self.new.pop(name)]
        self.parts.setdefault(name, []).append(torch.stack(new))

    def stacked(self) -> dict[str, Tensor]:
        """For each metric a tensor of its values."""
        for name in [*self.new]:
            self._stack(name)
        for name, parts in self.parts.items():
            if len(parts) > 1:
                device = parts[-1].device
                self.parts[name] = [torch.cat([part.to(device) for part in parts])]
        return {name: parts[0] for name, parts in self.parts.items()}


class Bar:
    """A bar of tqdm, if that is installed; it reads the metrics twice a second, not each step."""

    def __init__(self, total: int | None, shown: bool) -> None:
        self.bar: Any = None
        if shown:
            with contextlib.suppress(ImportError):
                make = importlib.import_module("tqdm").tqdm
                self.bar = make(total=total, unit="step", disable=None)  # on a terminal
        self.next = time.perf_counter() if self.bar is not None else math.inf

    def show(self, taken: int, metrics: Mapping[str, Any], *, now: bool = False) -> None:
        if self.bar is None or (time.perf_counter() < self.next and not now):
            return
        # Figures of layers, which have their paths, are too many for a bar.
        short = {name: value for name, value in metrics.items() if "." not in name}
        values = {name: torch.as_tensor(value) for name, value in short.items()}
        numbers = {name: f"{float(v):.4g}" for name, v in values.items() if v.numel() == 1}
        if numbers:
            self.bar.set_postfix(numbers, refresh=False)
        self.bar.update(taken - self.bar.n)
        self.next = time.perf_counter() + 0.5

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Writer:
    """TensorBoard's log of what has one value a step, written now and then."""

    def __init__(self, folder: Any) -> None:
        self.writer: Any = None
        self.waiting: list[tuple[int, Mapping[str, Any]]] = []
        if folder is None:
            return
        try:
            made = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise ImportError(
                "fit: log_dir needs TensorBoard: pip install 'funcnet[fit]', or tensorboard"
            ) from error
        self.writer = made(str(folder))

    def add(self, values: Mapping[str, Any], step: int) -> None:
        if self.writer is None:
            return
        self.waiting.append((step, values))
        if len(self.waiting) >= 256:
            self.write()

    def write(self) -> None:
        """Write what waits: only here are the values read."""
        for step, values in self.waiting:
            for name, value in values.items():
                number = torch.as_tensor(value)
                if number.numel() == 1:
                    self.writer.add_scalar(name, float(number), step)
        self.waiting.clear()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.writer is not None:
            self.write()
            self.writer.close()


class Interrupt:
    """Whether Ctrl-C was pressed; pressed once more, it is a KeyboardInterrupt.

    A step that writes to the memory of its state must not be cut in two.
    """

    asked = False

    def __enter__(self) -> "Interrupt":
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
