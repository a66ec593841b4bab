"""What a dead or a late rank is to the others: an error that names it.

Torch's own errors name no rank. So every rank has a thread that answers, through the store in which
the ranks found each other, whether it lives and what it does. The first rank of which a collective
fails asks all of them, and its findings are in the errors of all.

A collective of different shapes or kinds on two ranks may do worse than fail: gloo ends the
process, or gives wrong numbers. So before the first one of its kind, shape and dtype the ranks
compare what each is about to do.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from funcnet.collectives import Collective, Group

GRACE = 5.0
"""The seconds, at most, in which a rank that lives answers."""

_FOREVER = timedelta(days=300)
_OWN = (str(Path(__file__).parent.parent), str(Path(dist.__file__).parent.parent), os.__file__[:-5])

T = TypeVar("T")

Named = Callable[[int], str]
"""What errors call a rank, by its number in the world."""


class PeerError(RuntimeError):
    """A collective failed because of other ranks: they are dead, late, or do something else.

    Torch's own error is its ``__cause__``, if it had one.
    """

    ranks: tuple[int, ...]
    """Those at fault, by their numbers in the world, as far as they are known."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Watch:
    """What this process knows of the other ranks, and tells them of itself.

    Args:
        store: of the attempt.
        holder: the rank that holds the store; None: torchrun's agent, which outlives them.
        timeout: of a collective, in seconds.
        check: compare all collectives over the ranks before they begin, not only new ones.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        holder: int | None,
        timeout: float,
        check: bool,
    ) -> None:
        # Connections of their own, made while all is well: one thread at a time may use one. The
        # given one is kept, since it may be the one that holds the keys.
        self._kept, self.store, answering = store, store.clone(), store.clone()
        self.rank, self.world, self.timeout = rank, world, timeout
        self._holder, self._check = holder, check
        self._doing: Collective | None = None
        self._known: set[Collective] = set()
        self._counts: Counter[str] = Counter()
        self._told: tuple[str, list[int]] | None = None
        self.ending = False
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(
            target=self._answer, args=(answering,), name="funcnet-watch", daemon=True
        )
        self._thread.start()

    def enters(self, name: Named, group: Group, collective: Collective, begins: bool) -> None:
        """Called before a collective; it is compared with those of the others if it is new."""
        self._doing = collective
        if not begins:
            return
        self._counts[collective.key] += 1
        if self._check or collective not in self._known:
            _within(self.timeout + GRACE, lambda: self._compare(collective, group, name))
            self._known.add(collective)

    def leaves(self) -> None:
        """Called when a collective is done, or has failed."""
        self._doing = None

    def _compare(self, collective: Collective, group: Group, name: Named) -> None:
        """Raise PeerError on all ranks of a group if they are about to do different things."""
        number, first = self._counts[collective.key], min(group.ranks)
        place = f"{collective.key}/{first}/{number}"
        store = self.store
        store.append(f"{place}/said", f"{self.rank} {collective}\n")
        if store.add(f"{place}/count", 1) == len(group.ranks):
            said = store.get(f"{place}/said").decode().splitlines()
            by_rank = dict(sorted([(int(r), text) for r, _, text in map(_words, said)]))
            same = len({*by_rank.values()}) == 1
            store.set(f"{place}/go", "" if same else json.dumps(by_rank))
            if number > 1:
                before = f"{collective.key}/{first}/{number - 1}"
                for part in ("said", "count", "go"):
                    store.delete_key(f"{before}/{part}")
        store.wait([f"{place}/go"], timedelta(seconds=self.timeout))
        told = store.get(f"{place}/go").decode()
        if told:
            found = {int(rank): text for rank, text in json.loads(told).items()}
            raise PeerError(_different(found, name), _minority(found))

    def failed(self, name: Named, what: str, error: Exception) -> Exception:
        """The error to raise where a collective failed."""
        if isinstance(error, PeerError):
            return error
        try:
            told, ranks = self._told or _within(2 * GRACE, lambda: self._verdict(name))
        except (RuntimeError, TimeoutError):
            holder = "torchrun's agent" if self._holder is None else name(self._holder)
            ranks = [] if self._holder is None else [self._holder]
            told = f"{holder}, which holds the store, {_DEAD}"
        return PeerError(f"{what} failed: {told}", ranks)

    def _verdict(self, name: Named) -> tuple[str, list[int]]:
        """What is wrong, and who is at fault: found by the first that asks, read by the others."""
        store = self.store
        if store.add("asked", 1) == 1:
            found = self._roll_call(name, store)
            store.set("verdict", json.dumps(found))
        until(lambda: store.check(["verdict"]), time.monotonic() + 2 * GRACE)
        return self._verdict_of(store) or ("nobody knows why", [])

    @staticmethod
    def _verdict_of(store: Any) -> tuple[str, list[int]] | None:
        if not store.check(["verdict"]):
            return None
        told, ranks = json.loads(store.get("verdict"))
        return told, ranks

    def _roll_call(self, name: Named, store: Any) -> tuple[str, list[int]]:
        others = [rank for rank in range(self.world) if rank != self.rank]
        for rank in others:
            store.set(f"call/{rank}", "?")
        deadline = time.monotonic() + min(GRACE, max(1.0, self.timeout))
        until(lambda: store.check([f"answer/{rank}" for rank in others]), deadline)
        answers = {self.rank: self._status()}
        for rank in others:
            if store.check([f"answer/{rank}"]):
                answers[rank] = json.loads(store.get(f"answer/{rank}"))
        return judged(answers, self.world, name)

    def _status(self) -> dict[str, Any]:
        """What this rank does, for the others."""
        doing = self._doing
        if self.ending:
            return _ENDED
        if doing is not None:
            return {"doing": str(doing), "number": self._counts[doing.key], "key": doing.key}
        return {"at": _line(self._main)}

    def _answer(self, store: Any) -> None:
        try:
            store.wait([f"call/{self.rank}"], _FOREVER)
            if store.get(f"call/{self.rank}") != b"?":
                return
            store.set(f"answer/{self.rank}", json.dumps(self._status()))
            # This rank may come to it long after the others have ended.
            deadline = time.monotonic() + 2 * GRACE
            if until(lambda: self.ending or store.check(["verdict"]), deadline):
                self._told = self._verdict_of(store)
        except RuntimeError:
            # The store is gone: who needs it finds that out.
            return

    def close(self) -> None:
        """Say that this rank ends, and how; the one that holds the store stays until all have."""
        with suppress(RuntimeError, TimeoutError):
            _within(GRACE, self._close)

    def _close(self) -> None:
        store = self.store
        store.set(f"answer/{self.rank}", json.dumps(_ENDED))
        store.set(f"call/{self.rank}", "end")
        self._thread.join(1.0)
        store.add("ended", 1)
        if self._holder == self.rank:
            deadline = time.monotonic() + GRACE / 2
            until(lambda: store.add("ended", 0) >= self.world, deadline)


_ENDED = {"ended": True}
_DEAD = "is dead, or does not answer"


def judged(answers: dict[int, dict[str, Any]], world: int, name: Named) -> tuple[str, list[int]]:
    """What the answers of the ranks mean, and which of them are at fault."""
    silent = [rank for rank in range(world) if rank not in answers]
    if silent:
        return f"{_listed(silent, name)} {_are(silent, _DEAD)}", silent
    ended = [rank for rank, answer in answers.items() if "ended" in answer]
    if ended:
        return f"{_listed(ended, name)} {_are(ended, 'has ended')}", ended
    late = [rank for rank, answer in answers.items() if "at" in answer]
    if late:
        told = [f"{name(rank)} did not come, it is at {answers[rank]['at']}" for rank in late]
        return "; ".join(told), late
    doing = {rank: f"{each['doing']}, number {each['number']}" for rank, each in answers.items()}
    if len({*doing.values()}) > 1:
        return _different(doing, name), _minority(doing)
    return "all ranks are there, but the connections between them are not", []


def _different(doing: dict[int, str], name: Named) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in doing.items():
        by_text.setdefault(text, []).append(rank)
    told = [f"{_listed(ranks, name)}: {text}" for text, ranks in by_text.items()]
    return f"the ranks do not do the same: {'; '.join(told)}"


def _minority(doing: dict[int, str]) -> list[int]:
    """The ranks that do not what most do, if there is such a most."""
    (most, count), *others = Counter(doing.values()).most_common()
    if others and others[0][1] == count:
        return []
    return [rank for rank, text in doing.items() if text != most]


def _listed(ranks: list[int], name: Named) -> str:
    shown = ", ".join([name(rank) for rank in ranks[:8]])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _are(ranks: list[int], text: str) -> str:
    if len(ranks) == 1:
        return text
    return text.replace("is dead", "are dead").replace("does", "do").replace("has", "have")


def _words(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


def _line(thread: int) -> str:
    """The line of the user's code where a thread is."""
    frames = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    theirs = [each for each in frames if not each.f_code.co_filename.startswith(_OWN)]
    if not frames:
        return "an unknown line"
    found = (theirs or frames)[0]
    return f"{found.f_code.co_filename}:{found.f_lineno}, in {found.f_code.co_name}"


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What a function gives, as a store may block without end.

    Raises: TimeoutError: it took longer; else what the function raises.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"the store did not answer within {seconds:.0f} s")
    return results[0]


def until(found: Callable[[], T | None], deadline: float) -> T | None:
    """What a function gives as soon as it is true; None after the deadline."""
    pause = 0.002
    while True:
        value = found()
        if value:
            return value
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)
