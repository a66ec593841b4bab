"""Locks: one block at a time, and nothing left behind."""

import threading

import pytest

from funcnet.file_locks import CAN_LOCK, locked

pytestmark = pytest.mark.skipif(not CAN_LOCK, reason="there are no locks on Windows")


def test_blocks_that_wait_run_one_after_another(tmp_path):
    mark, inside, together = tmp_path / "mark", [], []

    def run():
        for _ in range(200):
            with locked(mark, wait=True):
                inside.append(None)
                together.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 800
    assert not mark.exists()


def test_one_that_does_not_wait_is_refused(tmp_path):
    with locked(tmp_path / "mark"), pytest.raises(BlockingIOError), locked(tmp_path / "mark"):
        pass
    assert not [*tmp_path.iterdir()]


def test_the_lock_goes_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "mark"):
        raise KeyError
    with locked(tmp_path / "mark"):
        assert [*tmp_path.iterdir()] == [tmp_path / "mark"]
