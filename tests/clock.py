"""A clock that tests set, for what counts the last minute."""

import pytest


class Clock:
    """A clock that stands until it is set, in place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1_200_030.0  # in the middle of a minute

    def time(self) -> float:
        return self.now


def set_clock(patch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("limits.storage.memory", "fundament.limits"):
        patch.setattr(f"{module}.time", clock)
    return clock
