"""The engine in this process: several models at once under a budget that holds only some."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from fundament.backbone.device import Placement
from fundament.core import Array, Embed, Embedded, Embeddings, Item, Media, Priority
from fundament.engine import local
from fundament.engine.batcher import Ticket
from fundament.engine.local import EngineOptions, LocalEngine, _unpaid, few_tokens_of, threads_of
from fundament.engine.weights import Local
from fundament.errors import BalanceError, ModelNotFoundError, RowError, TooLongError, UnavailableError
from fundament.telemetry import Metrics
from tests.checkpoints import WORDS
from tests.engine.berts import bert
from tests.served import PATIENCE_SECONDS, metrics_of

TEXTS = ["the search engine", "what people mean"]


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Local]:
    folder = tmp_path_factory.mktemp("berts")
    return {f"model-{seed}": bert(folder / f"model-{seed}", seed) for seed in range(4)}


def engine_of(berts: dict[str, Local], n_fit: float) -> LocalEngine:
    size = sum(path.stat().st_size for path in berts["model-0"].directory.glob("*.safetensors"))
    return LocalEngine(berts, EngineOptions(dtype="float32", memory_bytes=int(n_fit * size)), Metrics())


def tokens(engine: LocalEngine) -> float:
    """Tokens that have gone through models."""
    return sum(value for name, value in metrics_of(engine.metrics.page().decode()).items() if "_tokens_total" in name)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


async def vectors(engine: LocalEngine, model: str) -> torch.Tensor:
    result = await engine.run(model, Embed(inputs=TEXTS))
    assert isinstance(result, Embeddings)
    return torch.from_numpy(result.vectors)


def test_a_client_that_cycles_through_more_models_than_fit_gets_right_answers(
    runner: asyncio.Runner, berts: dict[str, Local]
) -> None:
    async def scenario() -> None:
        roomy, tight = engine_of(berts, 5), engine_of(berts, 2.5)
        expected = {model: await vectors(roomy, model) for model in berts}
        assert len({tuple(found[0, :4].tolist()) for found in expected.values()}) == len(berts)
        for _ in range(3):
            for model in berts:
                torch.testing.assert_close(await vectors(tight, model), expected[model])
                assert len(tight.memory.loaded) <= 2
        crowd = [*berts] * 8
        for model, found in zip(crowd, await asyncio.gather(*(vectors(tight, m) for m in crowd)), strict=True):
            torch.testing.assert_close(found, expected[model])
        page = tight.metrics.page().decode()
        assert 'fundament_model_loads_total{model="model-0"}' in page
        assert sum(loaded.n_bytes for loaded in tight.memory.loaded.values()) <= tight.memory.budget_bytes
        await roomy.close()
        await tight.close()

    runner.run(scenario())


def test_what_recurs_runs_once_while_its_model_stays(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine = engine_of(berts, 5)

        async def ask(*texts: str, n_recurring: int) -> tuple[Embeddings, float]:
            before = tokens(engine)
            result = await engine.run("model-0", Embed(inputs=texts, n_recurring=n_recurring))
            assert isinstance(result, Embeddings)
            return result, tokens(engine) - before

        async def alone(text: str) -> tuple[np.ndarray, float]:
            result, n_run = await ask(text, n_recurring=0)
            return result.vectors[0], n_run

        (query, n_query), (first, n_first), (second, n_second) = [
            await alone(text) for text in ("what people mean", "the search engine", "engine")
        ]
        assert (await ask("what people mean", "engine", n_recurring=1))[1] == n_query + n_second
        found, n_run = await ask("what people mean", "engine", "the search engine", "engine", n_recurring=3)
        assert n_run == n_query + n_first
        assert found.n_tokens == n_query + n_first + 2 * n_second  # all that was asked for counts
        np.testing.assert_allclose(found.vectors, [query, second, first, second], atol=1e-5)
        found, n_run = await ask("engine", n_recurring=1)
        assert n_run == 0
        np.testing.assert_allclose(found.vectors, [second], atol=1e-5)
        await engine.memory._let_go_unused_since(float("inf"))
        assert (await ask("engine", n_recurring=1))[1] == n_second
        await engine.close()

    runner.run(scenario())


def test_texts_that_read_alike_run_once_and_count_each_time(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine = engine_of(berts, 5)

        async def ask(*texts: str) -> tuple[Embeddings, float]:
            before = tokens(engine)
            result = await engine.run("model-0", Embed(inputs=texts, truncate=True))
            assert isinstance(result, Embeddings)
            return result, tokens(engine) - before

        (first, n_first), (second, n_second) = await ask("the search engine"), await ask("engine")
        found, n_run = await ask("engine", "the search engine", "engine", "the search engine", "engine")
        assert n_run == n_first + n_second
        assert found.n_tokens == 2 * n_first + 3 * n_second
        expected = [second.vectors[0], first.vectors[0]] * 2 + [second.vectors[0]]
        np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
        long, longer = "the " * 61 + "search", "the " * 61 + "search engine"  # the first fills the context of 64
        found, _ = await ask(long, longer)
        assert (found.n_tokens, found.n_truncated) == (2 * (await ask(long))[0].n_tokens, 1)
        await engine.close()

    runner.run(scenario())


@pytest.mark.parametrize(
    ("characters", "n_long", "leave", "held"),
    [
        pytest.param(4, 0, False, True, id="a short call is read"),
        pytest.param(5000, 0, False, False, id="a long one is"),
        pytest.param(4, 2, False, False, id="a short one waits for the threads that read long ones"),
        pytest.param(4, 2, True, False, id="the same, and whoever sent those has left"),
    ],
)
def test_rows_wait_for_short_calls_that_are_read(
    runner: asyncio.Runner,
    berts: dict[str, Local],
    monkeypatch: pytest.MonkeyPatch,
    characters: int,
    n_long: int,
    leave: bool,
    held: bool,
) -> None:
    gate = threading.Event()
    begun: list[Embed] = []
    waited: list[bool] = []

    async def scenario() -> None:
        engine = LocalEngine(berts, EngineOptions(dtype="float32", n_threads=2), Metrics())
        async with engine.memory.lease("model-0") as loaded:
            prepare, forward, loop = loaded.model.prepare, loaded.model.forward, asyncio.get_running_loop()
            rows = prepare(Embed(inputs=TEXTS))

            def slowly(call: Embed) -> list[Item]:
                begun.append(call)
                assert gate.wait(10)
                return prepare(call)

            def noted(items: Sequence[Item]) -> list[Array]:
                waited.append(gate.is_set())
                return forward(items)

            def embed(text: str) -> asyncio.Task[Embedded]:
                return asyncio.create_task(engine.run("model-0", Embed(inputs=[text], truncate=True)))

            monkeypatch.setattr(loaded.model, "prepare", slowly)
            monkeypatch.setattr(loaded.model, "forward", noted)
            long = [embed("x" * 5000) for _ in range(n_long)]
            while len(begun) < n_long:
                await asyncio.sleep(0.001)
            if leave:
                for call in long:
                    call.cancel()
                await asyncio.wait(long)
            call = embed("x" * characters)
            await asyncio.sleep(0)  # it begins
            ticket = Ticket(loop, loop.create_future())
            ticket.open(rows)
            loaded.batcher.submit(ticket, rows, Priority.INTERACTIVE)
            if not held:
                await ticket.done
            for _ in range(20):  # turns of the model's threads
                await asyncio.to_thread(lambda: None)
            gate.set()
            await asyncio.gather(ticket.done, call, *([] if leave else long))
            assert waited[0] is held
        await engine.close()

    runner.run(scenario())


def test_a_callers_files_wait_for_each_other_and_let_others_pass(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, turns = list[bytes](), threading.Semaphore(0)

    async def scenario() -> None:
        engine = LocalEngine(berts, EngineOptions(dtype="float32", n_threads=2), Metrics())  # two threads decode
        async with engine.memory.lease("model-0") as loaded:
            prepare = loaded.model.prepare

            def slowly(call: Embed) -> list[Item]:
                [file] = call.inputs
                assert isinstance(file, Media)
                begun.append(file.content)
                assert turns.acquire(timeout=PATIENCE_SECONDS)
                items: list[Item] = prepare(Embed(inputs=["a"]))
                return items

            def send(caller: str) -> asyncio.Task[Embedded]:
                call = Embed(inputs=[Media("image", caller.encode())])
                return asyncio.create_task(engine.run("model-0", call, caller=caller))

            monkeypatch.setattr(loaded.model, "prepare", slowly)
            many = [send("many") for _ in range(20)]
            while len(begun) < 2:
                await asyncio.sleep(0.001)
            one = send("one")
            for _ in range(20):  # it begins to wait
                await asyncio.sleep(0)
            many[0].cancel()  # whose thread is busy all the same
            await asyncio.sleep(0)
            turns.release()
            while len(begun) < 3:
                await asyncio.sleep(0.001)
            turns.release(30)
            await asyncio.gather(one, *many[1:])
        assert begun[:3] == [b"many", b"many", b"one"]
        await engine.close()

    runner.run(scenario())


def test_what_fits_is_loaded_once(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine = engine_of(berts, 5)
        await asyncio.gather(*(vectors(engine, model) for model in [*berts] * 5))
        page = engine.metrics.page().decode()
        for model in berts:
            assert f'fundament_model_loads_total{{model="{model}"}} 1.0' in page
        await engine.close()

    runner.run(scenario())


def test_a_model_whose_load_ends_after_the_engine_leaves_no_threads(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, before = threading.Event(), threading.Event(), set(threading.enumerate())

    def slowly(*arguments: object) -> object:
        begun.set()
        assert gate.wait(PATIENCE_SECONDS)
        return load_model(*arguments)

    async def scenario() -> None:
        engine = LocalEngine(berts, EngineOptions(dtype="float32"), Metrics())
        loading = asyncio.create_task(engine.load("model-0"))
        await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
        await engine.close()
        with suppress(asyncio.CancelledError):
            await loading

    load_model = local.load_model
    monkeypatch.setattr(local, "load_model", slowly)
    runner.run(scenario())
    (loader,) = (thread for thread in threading.enumerate() if thread.name.startswith("load"))
    gate.set()
    loader.join(PATIENCE_SECONDS)
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("model-0")]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the kernel's own count")
def test_memory_comes_back_when_models_go(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    async def scenario() -> None:
        engine = engine_of(berts, 1.5)
        await vectors(engine, "model-0")
        [size] = [loaded.n_bytes for loaded in engine.memory.loaded.values()]
        before = resident_bytes()
        for model in [*berts] * 6:
            await vectors(engine, model)
        # 24 loads of 20 MB each: what stays is one model and the allocator's change.
        assert resident_bytes() - before < 3 * size
        await engine.close()

    runner.run(scenario())


def test_an_engine_that_closes_answers_what_runs(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = threading.Event(), threading.Event()

    async def scenario() -> None:
        engine = engine_of(berts, 5)
        expected = await vectors(engine, "model-0")
        loaded = engine.memory.loaded["model-0"]
        forward = loaded.model.forward

        def slowly(items: Sequence[Item]) -> list[Array]:
            running.set()
            assert gate.wait(PATIENCE_SECONDS)
            arrays: list[Array] = forward(items)
            return arrays

        monkeypatch.setattr(loaded.model, "forward", slowly)
        call = asyncio.create_task(vectors(engine, "model-0"))
        assert await asyncio.to_thread(running.wait, PATIENCE_SECONDS)
        closing = asyncio.create_task(engine.close())
        while engine.memory.loaded:
            await asyncio.sleep(0)
        gate.set()
        wait_until(lambda: loaded.model is None)  # the caller's loop is told only then
        await closing
        torch.testing.assert_close(await call, expected)

    runner.run(scenario())


def test_nothing_holds_a_model_that_is_let_go(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    engine = LocalEngine(berts, EngineOptions(dtype="float32"), Metrics())
    runner.run(vectors(engine, "model-0"))
    loaded = engine.memory.loaded["model-0"]
    model = weakref.ref(loaded.model)
    runner.run(engine.close())
    assert model() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_death_is_known_when_its_model_has_gone(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise SystemExit("the driver has gone")

    def lost() -> None:
        raise RuntimeError("the driver has gone")

    async def scenario() -> None:
        engine = engine_of(berts, 1.5)
        await engine.load("model-0")
        monkeypatch.setattr(engine.memory.loaded["model-0"].model, "forward", dies)
        with pytest.raises(UnavailableError, match="the driver has gone"):
            await vectors(engine, "model-0")
        monkeypatch.setattr(torch.cuda, "empty_cache", lost)
        await engine.load("model-1")  # in its place
        assert [*engine.memory.loaded] == ["model-1"]
        assert [*engine.deaths()] == ["model-0"]
        await engine.close()

    runner.run(scenario())


def test_an_unknown_model_and_one_too_large_are_refused(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine = engine_of(berts, 0.5)
        with pytest.raises(ModelNotFoundError):
            await vectors(engine, "nobody")
        with pytest.raises(UnavailableError, match="memory") as refused:
            await vectors(engine, "model-0")
        assert refused.value.is_final  # no client needs to try again
        await engine.close()

    runner.run(scenario())


def test_a_text_that_is_too_long_is_named_by_its_place(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine = engine_of(berts, 5)
        with pytest.raises(TooLongError, match="Input 1 has"):
            await engine.run("model-0", Embed(inputs=["short", "a " * 100]))
        await engine.close()

    runner.run(scenario())


def test_small_models_run_side_by_side_and_large_ones_on_all_cores() -> None:
    assert threads_of(45_000_000, 2) == 2
    assert threads_of(45_000_000, 64) == 4
    assert threads_of(1_200_000_000, 64) == 1


@pytest.mark.parametrize(("n_cores", "few"), [(2, [1024, 1024, 1024]), (3, [96, 0, 0])])
def test_few_tokens_stay_together_in_bfloat16_or_on_two_cores(n_cores: int, few: list[int]) -> None:
    placements = [Placement(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert [few_tokens_of(placement, n_cores) for placement in placements] == few


def test_a_batch_takes_no_more_than_the_operator_says(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(dtype="float32", n_threads=2, max_batch_tokens=64)
    engine, sizes = LocalEngine(berts, options, Metrics()), []
    runner.run(engine.load("model-0"))
    model = engine.memory.loaded["model-0"].model
    forward = model.forward

    def sized(items: Sequence[Item]) -> list[Array]:
        sizes.append(sum(item.n_tokens for item in items))
        arrays: list[Array] = forward(items)
        return arrays

    monkeypatch.setattr(model, "forward", sized)
    runner.run(engine.run("model-0", Embed(inputs=[" ".join(words) for words in permutations(WORDS[:5], 3)])))
    runner.run(engine.close())
    assert max(sizes) <= 64 < sum(sizes)


def test_operators_divide_over_cores_in_a_models_threads_alone(
    runner: asyncio.Runner, berts: dict[str, Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = LocalEngine(berts, EngineOptions(dtype="float32", n_threads=8), Metrics()), []
    runner.run(engine.load("model-0"))
    model = engine.memory.loaded["model-0"].model
    forward = model.forward

    def counted(items: Sequence[Item]) -> list[Array]:
        found.append(torch.get_num_threads())
        assert engine._computing == {"model-0"}
        arrays: list[Array] = forward(items)
        return arrays

    monkeypatch.setattr(model, "forward", counted)
    runner.run(vectors(engine, "model-0"))
    assert set(found) == {2}  # four side by side
    assert {pool.submit(torch.get_num_threads).result() for pool in (engine._pool, engine._decoders)} == {1}
    runner.run(engine.close())


class Purse:
    """A bill that notes what is asked of it, and refuses what is beyond its tokens."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.asked: list[int] = []
        self.refunded: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None

    async def admit(self, n_tokens: int) -> None:
        self.asked.append(n_tokens)
        await asyncio.sleep(0)
        self.meanwhile()
        if n_tokens > self.n_tokens:
            raise BalanceError("spent")

    def refund(self, n_tokens: int) -> None:
        self.refunded.append(n_tokens)


def tokens_run(engine: LocalEngine) -> float:
    return metrics_of(engine.metrics.page().decode()).get("fundament_tokens_total", 0)


def test_a_call_is_paid_once_it_is_read_and_before_it_runs(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine, bill = engine_of(berts, 5), Purse(100)
        bill.meanwhile = lambda: ran.append(tokens_run(engine))
        ran: list[float] = []
        for n in (1, 90):  # few rows and many go to the threads in different ways
            texts = TEXTS * n
            answered = await engine.run("model-0", Embed(inputs=texts), bill=Purse(10**6))
            expected = answered.n_tokens
            bill.n_tokens, before = expected, tokens_run(engine)
            paid = await engine.run("model-0", Embed(inputs=texts), bill=bill)
            assert bill.asked[-1] == expected == paid.n_tokens
            assert ran[-1] == before
            bill.n_tokens, before = expected - 1, tokens_run(engine)
            with pytest.raises(BalanceError):
                await engine.run("model-0", Embed(inputs=texts), bill=bill)
            assert tokens_run(engine) == before
        with pytest.raises(TooLongError):
            await engine.run("model-0", Embed(inputs=["the " * 100]), bill=bill)
        assert len(bill.asked) == 4
        assert bill.refunded == []
        await engine.close()

    runner.run(scenario())


def test_what_did_not_run_is_refunded(runner: asyncio.Runner, berts: dict[str, Local]) -> None:
    async def scenario() -> None:
        engine, bill = engine_of(berts, 5), Purse(10**6)
        await engine.load("model-0")
        loaded = engine.memory.loaded["model-0"]
        assert loaded.model is not None
        forward, entered, held = loaded.model.forward, threading.Event(), threading.Event()

        def slow(items: Sequence[Item]) -> list[Array]:
            entered.set()
            held.wait(30)
            return forward(items)

        def broken(items: Sequence[Item]) -> list[Array]:
            raise ValueError

        loaded.model.forward = slow  # type: ignore[method-assign]
        task = asyncio.ensure_future(engine.run("model-0", Embed(inputs=TEXTS), bill=bill))
        async with asyncio.timeout(30):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()
        assert bill.refunded == bill.asked
        loaded.model.forward = broken  # type: ignore[method-assign]
        with pytest.raises(RowError):
            await engine.run("model-0", Embed(inputs=TEXTS), bill=bill)
        assert bill.refunded == bill.asked
        await engine.close()

    runner.run(scenario())


def test_whoever_leaves_pays_for_the_rows_that_have_run(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        items = [Item(features={}, n_tokens=9, n_counted=n_counted) for n_counted in (1, 10, 100)]
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop, loop.create_future())
        ticket.open(items)
        ticket.arrays[1] = np.zeros(1)
        assert _unpaid(items, ticket, asyncio.CancelledError()) == 101
        assert _unpaid(items, ticket, RowError("broken")) == 111

    runner.run(scenario())
