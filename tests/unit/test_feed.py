"""The feed: what listeners get is the engine's truth, at the promised rates, and nothing outlives its use."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

import embedllm
from embedllm import events, wire
from embedllm.events import Event
from embedllm.metrics import Metrics
from embedllm.recording import Recorders
from embedllm.replay import State
from embedllm.scheduler import Scheduler
from embedllm.view import feed as feed_module
from embedllm.view.feed import FASTEST, KEYFRAME_EVERY, PATIENCE, SLOWEST, UNSEEN, Feed, History, Ring
from tests.engine.policy import random_prompt
from tests.notebook.recorded import LIVELY, WatchedWorld, act


@dataclass
class RecordedWorld(WatchedWorld):
    """A world with recorders, as an engine has them."""

    recorders: list = field(default_factory=list)

    def append(self, event: Event) -> None:
        super().append(event)
        Recorders(self.recorders).append(event)


class FakeWorker:
    """Runs what it is told when `settle` says so, as a worker does between two steps; and is the engine itself."""

    last_beat = 0.0

    def __init__(self) -> None:
        self.world = RecordedWorld(LIVELY, eos_every=40)
        self.metrics = Metrics()
        self.alive = True
        self.told: list[Callable] = []
        self.random = random.Random(1)
        self.world.add(random_prompt(self.random), 20, n=2)

    def tell(self, function: Callable) -> None:
        self.told.append(function)

    def settle(self) -> None:
        told, self.told = self.told, []
        for function in told:
            function(self)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            act(self.world, self.random, resizing=True)

    def join(self) -> None:
        pass

    @property
    def scheduler(self) -> Scheduler:
        return self.world.scheduler

    @property
    def pins(self) -> SimpleNamespace:
        return SimpleNamespace(held=dict(zip(self.world.pin_ids, self.world.pins, strict=True)))

    def attach(self, recorder: object) -> None:
        self.world.recorders.append(recorder)

    def detach(self, recorder: object) -> None:
        self.world.recorders = [one for one in self.world.recorders if one is not recorder]


class Viewer:
    """Follows messages as a view does: a gap is waited out until the next keyframe."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.number = 0
        self.messages: list[wire.Message] = []
        self.num_gaps = 0

    def __call__(self, messages: list[bytes]) -> None:
        for message in wire.decode_all(b"".join(messages)):
            self.messages.append(message)
            if message.state is not None:
                assert (
                    self.state is None
                    or message.number != self.number + 1
                    or self.state.ended
                    or (self.state.digest() == message.state.digest())
                ), "a keyframe in the middle says something else than the events"
                self.state = message.state
            elif message.lost or message.number != self.number + 1:
                self.state, self.num_gaps = None, self.num_gaps + 1
            elif self.state is not None:
                self.state.apply(message.events)
            self.number = message.number


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


class Times:
    """A clock and a CPU clock that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.cpu = 0.0


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def feed(worker: FakeWorker, times: Times, monkeypatch: pytest.MonkeyPatch) -> Iterator[Feed]:
    """A feed whose thread does nothing: the test ticks."""
    monkeypatch.setattr(Feed, "_run", lambda self, stop: stop.wait())
    made = Feed(worker, clock=lambda: times.now, cpu=lambda: times.cpu)
    yield made
    made.close()


# ---- what is told ---------------------------------------------------------------------------------------------


def test_a_listener_follows_the_truth(feed: Feed, worker: FakeWorker) -> None:
    viewer = Viewer()
    feed.listen(viewer)
    feed.tick()
    assert viewer.messages == [], "nothing is known before the engine was asked"
    worker.settle()
    for i in range(150):
        worker.step(1 + i % 3)
        feed.tick()
        assert viewer.state is not None and viewer.state.digest() == worker.world.truth().digest()
    assert viewer.num_gaps == 0 and [m.number for m in viewer.messages] == list(
        range(viewer.messages[0].number, viewer.messages[0].number + len(viewer.messages))
    )
    count = len(viewer.messages)
    feed.tick()
    assert len(viewer.messages) == count, "a message about nothing"


def test_a_late_listener_begins_with_a_keyframe(feed: Feed, worker: FakeWorker) -> None:
    first, second, third = Viewer(), Viewer(), Viewer()
    feed.listen(first)
    worker.settle()
    worker.step(10)
    feed.tick()
    feed.listen(second)
    worker.step(10)
    feed.tick()
    assert feed._state is not None
    third([wire.encode_keyframe(feed._state, feed._number)])
    feed.listen(third)
    worker.step(10)
    feed.tick()
    truth = worker.world.truth().digest()
    for viewer in (first, second, third):
        assert viewer.state is not None and viewer.state.digest() == truth
    assert third.num_gaps == 0


def test_loss_is_marked_and_healed(feed: Feed, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "CAPACITY", 200)
    viewer = Viewer()
    feed.listen(viewer)
    worker.settle()
    worker.step(2)
    feed.tick()
    worker.step(60)  # more than 200 events
    feed.tick()
    assert viewer.state is None and viewer.messages[-1].lost and feed.num_losses == 1
    worker.step(2)
    feed.tick()
    assert viewer.state is None, "what follows a loss is not shown before the engine was asked"
    worker.settle()
    worker.step(2)
    feed.tick()
    assert viewer.state is not None and viewer.state.digest() == worker.world.truth().digest()
    assert len(worker.world.recorders) == 1, "the ring that lost events is still attached"


def test_it_goes_on_after_the_engine_started_over(feed: Feed, worker: FakeWorker) -> None:
    viewer = Viewer()
    feed.listen(viewer)
    worker.settle()
    worker.step(5)
    worker.world.append((events.START_OVER,))
    worker.world.recorders = []  # as the engine does
    feed.tick()
    assert viewer.state is not None and viewer.state.ended
    worker.step(5)
    worker.settle()
    worker.step(5)
    feed.tick()
    assert viewer.state.digest() == worker.world.truth().digest() and not viewer.state.ended


def test_leaving_and_coming_back(feed: Feed, worker: FakeWorker) -> None:
    """Nobody listens, nobody records; who comes back sees a new beginning, not old events missing the ones between."""
    viewer = Viewer()
    feed.listen(viewer)
    worker.settle()
    worker.step(5)
    feed.tick()
    number = viewer.number
    feed.leave(viewer)
    worker.settle()
    assert worker.world.recorders == []
    worker.step(5)
    feed.tick()
    assert viewer.number == number
    feed.listen(viewer)
    worker.settle()
    worker.step(5)
    feed.tick()
    assert viewer.messages[-2].state is not None and viewer.messages[-2].number > number + 1
    assert viewer.state is not None and viewer.state.digest() == worker.world.truth().digest()


def test_a_listener_that_fails_is_dropped(feed: Feed, worker: FakeWorker, caplog: pytest.LogCaptureFixture) -> None:
    viewer, calls = Viewer(), []

    def broken(messages: list[bytes]) -> None:
        calls.append(messages)
        raise RuntimeError("no view")

    feed.listen(broken)
    feed.listen(viewer)
    worker.settle()
    for _ in range(3):
        worker.step(3)
        feed.tick()
    assert len(calls) == 1 and "listener" in caplog.text
    assert viewer.state is not None and viewer.state.digest() == worker.world.truth().digest()


def test_the_ring_gives_everything_once() -> None:
    """Also what is recorded by a call that had begun before the ring was emptied."""
    ring, told = Ring(), [("allocate", i) for i in range(6)]
    ring.append(told[0])
    late = ring.append
    ring.append(told[1])
    assert ring.take() == (told[:2], False)
    late(told[2])
    ring.append(told[3])
    assert ring.take() == (told[2:4], False)
    ring.append(told[4])
    assert ring.take() == (told[4:5], False) and ring.take() == ([], False)


def test_nothing_is_lost_between_two_threads() -> None:
    ring, done, got = Ring(), threading.Event(), []

    def record() -> None:
        for i in range(200_000):
            ring.append(("allocate", i))
        done.set()

    thread = threading.Thread(target=record)
    thread.start()
    lost, ended = 0, False
    while not ended:
        ended = done.is_set()  # before the last take
        taken, overflown = ring.take()
        lost += overflown
        got.append([event[1] for event in taken])
    thread.join()
    numbers = [number for taken in got for number in taken]
    assert numbers == sorted(numbers)
    assert lost or numbers == list(range(200_000))


# ---- rates ----------------------------------------------------------------------------------------------------


def test_ticks_are_rare_while_nobody_acknowledges(feed: Feed, worker: FakeWorker, times: Times) -> None:
    feed.listen(Viewer())
    assert feed.interval == FASTEST
    times.now += PATIENCE + 0.1
    assert feed.interval == UNSEEN
    feed.acknowledge()
    assert feed.interval == FASTEST


def test_ticks_are_rare_while_they_take_too_much_of_a_core(feed: Feed, worker: FakeWorker, times: Times) -> None:
    def busy(messages: list[bytes]) -> None:
        times.cpu += load

    def seconds(number: float) -> float:
        for _ in range(int(number / 0.1)):
            feed.acknowledge()
            worker.step()
            feed.tick()
            times.now += 0.1
        return feed.interval

    feed.listen(busy)
    worker.settle()
    load = 0.0005  # of 0.1 s: half a percent
    assert seconds(10) == FASTEST
    load = 0.002
    assert seconds(3) == 2 * FASTEST and seconds(10) == SLOWEST
    load = 0.0001
    assert seconds(10) == FASTEST


def test_keyframes_come_now_and_then_and_when_asked_for(feed: Feed, worker: FakeWorker, times: Times) -> None:
    viewer = Viewer()
    feed.listen(viewer)
    worker.settle()

    def keyframes() -> int:
        worker.step()
        feed.tick()
        return sum(message.state is not None for message in viewer.messages)

    assert keyframes() == keyframes() == 1
    feed.ask_for_keyframe()
    assert keyframes() == keyframes() == 2
    times.now += KEYFRAME_EVERY
    assert keyframes() == 3
    times.now += KEYFRAME_EVERY
    feed.tick()
    count = len(viewer.messages)
    times.now += KEYFRAME_EVERY
    feed.tick()
    assert len(viewer.messages) == count, "a keyframe although nothing has happened since the last"


# ---- history --------------------------------------------------------------------------------------------------


def test_the_history_can_be_played(feed: Feed, worker: FakeWorker, times: Times) -> None:
    viewer, late = Viewer(), Viewer()
    feed.listen(viewer)
    worker.settle()
    for _ in range(100):
        worker.step()
        feed.tick()
        times.now += 0.2
    late(feed.history())
    assert late.num_gaps == 0 and late.state is not None and late.state.digest() == worker.world.truth().digest()
    assert len(late.messages) == len(viewer.messages)
    feed.close()
    assert len(feed.history()) == len(viewer.messages)


def test_the_history_thins_out_from_its_beginning() -> None:
    history = History(most_bytes=1_000, most_seconds=600.0)

    def chapter(now: float, name: str) -> None:
        history.add(now, name.encode() * 20, True)
        for _ in range(3):
            history.add(now, name.lower().encode() * 100, False)

    for i in range(3):
        chapter(float(i), "ABC"[i])
    assert history.size == 960
    chapter(3.0, "D")
    names = [message[:1].decode() for message in history.messages()]
    assert "".join(names) == "ABbbbCcccDddd" and history.size == sum(map(len, history.messages()))
    chapter(602.0, "E")
    assert "".join(message[:1].decode() for message in history.messages()) == "ABCcccDdddEeee"
    for i in range(60):
        chapter(700.0, "VWXYZ"[i % 5])
    messages = history.messages()
    assert history.size == sum(map(len, messages)) <= 1_000
    assert messages[-1] == b"z" * 100 and messages[0] != b"A" * 20


# ---- threads and lifetimes, on a real engine ------------------------------------------------------------------


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "embedllm-feed"]


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_real_engine_is_followed() -> None:
    viewer = Viewer()
    with embedllm.LLM(progress=False) as llm:
        worker = llm._core.worker
        feed = Feed(worker)
        feed.listen(viewer)
        llm.generate(["def one():", "def one(a):"] * 3, max_tokens=12, n=2)
        truth = worker.call(State.of).digest()
        assert wait_for(lambda: viewer.state is not None and viewer.state.digest() == truth)
        assert len(feeds()) == 1
        feed.leave(viewer)
        assert wait_for(lambda: not feeds()), "the thread outlives the last listener"
        assert worker.call(lambda engine: engine.recorder) is None, "events are recorded though nobody listens"


def test_the_end_of_the_engine_ends_the_feed() -> None:
    viewer, ended = Viewer(), threading.Event()
    llm = embedllm.LLM(progress=False)
    feed = Feed(llm._core.worker)
    feed.listen(viewer)
    feed.listen(lambda messages: None if messages else ended.set())
    generation = llm.submit("def one():", max_tokens=500, ignore_eos=True)
    next(iter(generation))
    llm.close()
    assert ended.wait(10) and wait_for(lambda: not feeds())
    assert viewer.state is not None and not viewer.state.sequences, "how it ended was not told"
    feed.listen(viewer)  # of an engine that is gone there is nothing to hear
    assert wait_for(lambda: not feeds())
    feed.close()


def test_a_feed_keeps_no_llm_alive() -> None:
    llm = embedllm.LLM(progress=False)
    worker = llm._core.worker
    llm.generate("def one():", max_tokens=2)
    feed = Feed(worker)
    feed.listen(Viewer())
    gone, core = weakref.ref(llm), weakref.ref(llm._core)
    model = weakref.ref(worker.call(lambda engine: engine._run))
    del llm
    gc.collect()
    assert gone() is None and core() is None
    assert wait_for(lambda: not feeds()) and not worker.alive
    gc.collect()
    assert model() is None, "the model is still there"
    feed.close()
