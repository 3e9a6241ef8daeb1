"""Mathematical equality, with an end to it."""

from __future__ import annotations

import threading

import pytest

from moebound.tasks.equivalence import Checker


@pytest.mark.slow
def test_equal_and_not_and_never_for_ever() -> None:
    checker, hasty = Checker(seconds=60), Checker(seconds=0.5)
    try:
        assert checker.same("$x^2+1$", "$1 + x^2$")[0]
        assert checker.same("$2$", "$3$") == (False, "3")
        assert checker.same("$2$", "no formula here") == (False, None)
        # It takes for ever, so that an answer at all says that it was given up.
        assert hasty.same("$3$", "$10^{10^{10}}$") == (False, None)
        found = []
        thread = threading.Thread(target=lambda: found.append(checker.same("$2$", "$2.0$")[0]))
        thread.start()
        thread.join()
        assert found == [True]  # another process, and not the main thread
    finally:
        checker.close()
        hasty.close()
