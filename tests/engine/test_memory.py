"""Which models stay in memory."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundament.engine.memory import Memory, Use, to_evict
from fundament.errors import UnavailableError

uses = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(Use, n_bytes=st.integers(1, 50), n_leases=st.integers(0, 2), last_used=st.floats(0, 100)),
)


@given(uses, st.integers(0, 100), st.integers(0, 200))
def test_eviction_makes_room_takes_no_more_than_needed_and_spares_what_is_in_use(
    loaded: dict[str, Use], needed: int, budget: int
) -> None:
    evicted = to_evict(loaded, needed, budget)
    busy = sum(use.n_bytes for use in loaded.values() if use.n_leases)
    assert (evicted is None) == (busy + needed > budget)
    if evicted is not None:
        assert all(loaded[model].n_leases == 0 for model in evicted)
        left = sum(use.n_bytes for model, use in loaded.items() if model not in evicted)
        assert left + needed <= budget
        if evicted:
            assert left + loaded[evicted[-1]].n_bytes + needed > budget
        idle = sorted((model for model in loaded if not loaded[model].n_leases), key=lambda m: loaded[m].last_used)
        assert evicted == idle[: len(evicted)]


@pytest.fixture
def sought(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time that room is sought, for how many bytes; who finds none waits from then on."""
    sizes: list[int] = []

    def noted(uses: Mapping[str, Use], needed_bytes: int, budget_bytes: int) -> list[str] | None:
        sizes.append(needed_bytes)
        return to_evict(uses, needed_bytes, budget_bytes)

    monkeypatch.setattr("fundament.engine.memory.to_evict", noted)
    return sizes


class Resident:
    def __init__(self, name: str, log: list[str], closing: threading.Event, n_bytes: int) -> None:
        self.name, self.log, self.n_bytes, self.closing = name, log, n_bytes, closing

    def close(self, seconds: float | None = None) -> None:
        assert self.closing.wait(10)
        self.log.append(f"-{self.name}")


class World:
    """A memory for two models of ten bytes each, and what happens in it."""

    def __init__(self, budget: int = 20, idle_seconds: float | None = None) -> None:
        self.log: list[str] = []
        self.measured: list[str] = []
        self.fails = False
        self.loading = asyncio.Event()
        self.opening = asyncio.Event()  # models load once it is set
        self.opening.set()
        self.sizes: dict[str, int] = {}
        self.real_sizes: dict[str, int] = {}  # where they are not what was measured
        self.closing = threading.Event()  # models close once it is set
        self.closing.set()
        self.memory: Memory[Resident] = Memory(
            budget_bytes=budget, idle_seconds=idle_seconds, measure=self.measure, load=self.load
        )

    def measure(self, name: str) -> int:
        self.measured.append(name)
        return self.sizes.get(name, 10)

    async def load(self, name: str) -> Resident:
        self.loading.set()
        await asyncio.sleep(0)
        await self.opening.wait()
        if self.fails:
            raise OSError("disk")
        self.log.append(f"+{name}")
        return Resident(name, self.log, self.closing, self.real_sizes.get(name, self.sizes.get(name, 10)))

    async def use(self, name: str, until: asyncio.Event | None = None) -> None:
        async with self.memory.lease(name) as resident:
            assert resident.name == name
            assert f"-{name}" not in self.log[-1:]
            if until:
                await until.wait()
            await asyncio.sleep(0)


def run(runner: asyncio.Runner, scenario: Callable[[], object]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario()  # type: ignore[misc]

    runner.run(limited())


def test_a_model_is_loaded_once_however_many_wait_for_it(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World()
        await asyncio.gather(*(world.use("a") for _ in range(10)))
        assert world.log == ["+a"]

    run(runner, scenario)


def test_the_least_recently_used_goes(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World()
        for name in "abac":
            await world.use(name)
        assert world.log == ["+a", "+b", "-b", "+c"]

    run(runner, scenario)


def test_a_model_in_use_is_never_evicted_and_the_next_waits_for_it(runner: asyncio.Runner, sought: list[int]) -> None:
    async def scenario() -> None:
        world, release = World(budget=10), asyncio.Event()
        first = asyncio.ensure_future(world.use("a", release))
        while not world.log:
            await asyncio.sleep(0)
        second = asyncio.ensure_future(world.use("b"))
        while len(sought) < 2:
            await asyncio.sleep(0)
        assert set(world.memory.loaded) == {"a"}
        release.set()
        await asyncio.gather(first, second)
        assert world.log == ["+a", "-a", "+b"]

    run(runner, scenario)


def test_a_model_that_still_loads_is_not_evicted_though_its_caller_left(
    runner: asyncio.Runner, sought: list[int]
) -> None:
    async def scenario() -> None:
        world = World(budget=10)
        world.opening.clear()
        leaver = asyncio.ensure_future(world.use("a"))
        await world.loading.wait()
        leaver.cancel()
        await asyncio.wait([leaver])
        next_one = asyncio.ensure_future(world.use("b"))
        while len(sought) < 2:
            await asyncio.sleep(0)
        world.opening.set()
        await next_one
        assert world.log == ["+a", "-a", "+b"]

    run(runner, scenario)


def test_a_model_that_goes_is_out_of_memory_before_the_next_loads(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world, made = World(budget=10), list[weakref.ref[Resident]]()

        async def load(name: str) -> Resident:
            while any(resident() is not None for resident in made):
                await asyncio.sleep(0)
            resident = await world.load(name)
            made.append(weakref.ref(resident))
            return resident

        world.memory = Memory(budget_bytes=10, idle_seconds=None, measure=world.measure, load=load)
        for name in "abc":
            await world.use(name)
        assert world.log == ["+a", "-a", "+b", "-b", "+c"]

    run(runner, scenario)


@pytest.mark.parametrize(("measured", "real"), [(10, 20), (20, 10)])
def test_a_model_counts_as_what_was_measured_or_what_it_takes_the_larger(
    runner: asyncio.Runner, measured: int, real: int
) -> None:
    async def scenario() -> None:
        world = World(budget=30)
        world.sizes["a"], world.real_sizes["a"] = measured, real
        for name in "abc":
            await world.use(name)
        assert world.log == ["+a", "+b", "-a", "+c"]

    run(runner, scenario)


def test_a_model_under_steady_use_does_not_starve_another(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world, done = World(budget=10), asyncio.Event()

        async def steadily() -> None:
            while not done.is_set():
                await world.use("a")

        crowd = [asyncio.ensure_future(steadily()) for _ in range(3)]
        while not world.log:
            await asyncio.sleep(0)
        await world.use("b")
        done.set()
        await asyncio.gather(*crowd)
        assert "+b" in world.log

    run(runner, scenario)


def test_who_waits_for_room_holds_up_only_the_models_that_must_go(runner: asyncio.Runner, sought: list[int]) -> None:
    async def scenario() -> None:
        world, release = World(budget=30), asyncio.Event()
        busy = [asyncio.ensure_future(world.use(name, release)) for name in ("first", "second")]
        while world.log != ["+first", "+second"]:
            await asyncio.sleep(0)
        await world.use("other")
        world.sizes["large"] = 20
        waiting = asyncio.ensure_future(world.use("large"))
        while 20 not in sought:
            await asyncio.sleep(0)
        held = [asyncio.ensure_future(world.use(name)) for name in ("first", "other")]
        await world.use("second")
        assert not any(task.done() for task in (waiting, *held))
        release.set()
        await asyncio.gather(*busy, waiting, *held)

    run(runner, scenario)


def test_two_models_under_steady_use_do_not_starve_a_third(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world, done, n_uses = World(), asyncio.Event(), 0

        async def steadily(name: str) -> None:
            nonlocal n_uses
            while not done.is_set():
                async with world.memory.lease(name):
                    await asyncio.sleep(0.001)
                n_uses += 1

        crowd = [asyncio.ensure_future(steadily(name)) for name in "ab" * 20]
        while n_uses < 100:
            await asyncio.sleep(0)
        before = n_uses
        await world.use("c")
        done.set()
        await asyncio.gather(*crowd)
        assert n_uses < before + 2_000

    run(runner, scenario)


def test_a_crowd_cycling_through_more_models_than_fit_is_served(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World()
        await asyncio.gather(*(world.use("abcd"[n % 4]) for n in range(40)))
        held = 0
        for event in world.log:
            held += 1 if event[0] == "+" else -1
            assert held <= 2

    run(runner, scenario)


def test_a_model_larger_than_the_budget_is_refused_in_words(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        with pytest.raises(UnavailableError, match="memory"):
            await World(budget=5).use("a")

    run(runner, scenario)


def test_the_event_loop_runs_on_while_a_model_is_measured(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world, reached, release = World(), threading.Event(), threading.Event()

        def measure(_: str) -> int:
            reached.set()
            assert release.wait(10)
            return 10

        world.memory = Memory(budget_bytes=20, idle_seconds=None, measure=measure, load=world.load)
        using = asyncio.ensure_future(world.use("a"))
        while not reached.is_set():
            await asyncio.sleep(0)
        release.set()
        await using
        assert world.log == ["+a"]

    run(runner, scenario)


def test_a_failed_load_is_tried_again_by_the_next_caller(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World()
        world.fails = True
        with pytest.raises(OSError, match="disk"):
            await world.use("a")
        world.fails = False
        await world.use("a")
        assert world.log == ["+a"]

    run(runner, scenario)


def test_a_caller_who_leaves_does_not_end_the_load_of_others(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World()
        leaver, stayer = asyncio.ensure_future(world.use("a")), asyncio.ensure_future(world.use("a"))
        await world.loading.wait()
        leaver.cancel()
        await stayer
        assert world.log == ["+a"]

    run(runner, scenario)


def test_an_idle_model_is_let_go(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World(idle_seconds=0.02)
        reaper = asyncio.ensure_future(world.memory.expire())
        await world.use("a")
        while world.log[-1] != "-a":
            await asyncio.sleep(0.005)
        assert not world.memory.loaded
        assert world.log == ["+a", "-a"]
        reaper.cancel()

    run(runner, scenario)


def test_an_idle_model_has_its_room_until_its_memory_is_free(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        world = World(idle_seconds=0.02)
        for name in "ab":
            await world.use(name)
        world.closing.clear()
        reaper = asyncio.ensure_future(world.memory.expire())
        while set(world.memory.loaded) != {"b"}:  # `a` is closing
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(world.use(name)) for name in "acd"]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert world.log == ["+a", "+b"]
        world.closing.set()
        await asyncio.gather(*others)
        while world.memory.loaded:
            await asyncio.sleep(0.005)
        assert not reaper.done()
        reaper.cancel()

    run(runner, scenario)


def test_nothing_is_loaded_after_the_end(runner: asyncio.Runner, sought: list[int]) -> None:
    async def scenario() -> None:
        world, done = World(budget=10), asyncio.Event()
        using = asyncio.ensure_future(world.use("a", until=done))
        await world.loading.wait()
        waiting = asyncio.ensure_future(world.use("b"))
        while len(sought) < 2:
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(world.memory.close())
        done.set()
        await asyncio.gather(using, closing)
        for late in (waiting, asyncio.ensure_future(world.use("a"))):
            with pytest.raises(UnavailableError, match="the server is closing"):
                await late
        assert not world.memory.loaded
        assert "+b" not in world.log

    run(runner, scenario)
