"""What embedllm changes in the process around it, and that it is put back."""

import os
import sys
from collections.abc import Iterator

import pytest

import embedllm
from embedllm.process import SWITCH_INTERVAL, Haste
from tests.engine.hooked import Hooked, opened, prompt_of, until


@pytest.fixture(autouse=True)
def interval() -> Iterator[float]:
    before = sys.getswitchinterval()
    yield before
    assert sys.getswitchinterval() == pytest.approx(before, rel=0.01)
    sys.setswitchinterval(before)


def test_threads_switch_sooner_while_an_engine_works(interval: float) -> None:
    seen: set[float] = set()
    model = Hooked()
    model.before = lambda plan: seen.add(sys.getswitchinterval())
    with opened(model) as llm:
        assert sys.getswitchinterval() == pytest.approx(interval, rel=0.01)
        llm.generate(prompt_of(1), max_tokens=5)
        until(lambda: sys.getswitchinterval() == pytest.approx(interval, rel=0.01))
        assert seen and all(value == pytest.approx(SWITCH_INTERVAL, rel=0.01) for value in seen)


def test_it_is_put_back_when_the_last_engine_rests(interval: float) -> None:
    first, second = Haste(), Haste()
    first.begin()
    second.begin()
    second.begin()
    first.end()
    first.end()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL, rel=0.01)
    second.end()
    assert sys.getswitchinterval() == pytest.approx(interval, rel=0.01)


def test_somebody_elses_setting_is_kept(interval: float) -> None:
    haste = Haste()
    haste.begin()
    sys.setswitchinterval(0.002)
    haste.end()
    assert sys.getswitchinterval() == pytest.approx(0.002)
    sys.setswitchinterval(1e-5)  # shorter than ours
    haste.begin()
    assert sys.getswitchinterval() == pytest.approx(1e-5)
    haste.end()
    assert sys.getswitchinterval() == pytest.approx(1e-5)
    sys.setswitchinterval(interval)


def test_closing_in_the_middle_puts_it_back(interval: float) -> None:
    llm = embedllm.LLM(Hooked(delay=0.01))
    running = llm.submit(prompt_of(1), max_tokens=500)
    until(lambda: sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL, rel=0.01))
    llm.close()
    until(lambda: sys.getswitchinterval() == pytest.approx(interval, rel=0.01))
    assert running.done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_its_own_again(interval: float) -> None:
    with opened(Hooked(delay=0.01)) as llm:
        running = llm.submit(prompt_of(1), max_tokens=500)
        until(lambda: sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL, rel=0.01))
        if (pid := os.fork()) == 0:
            os._exit(0 if sys.getswitchinterval() == pytest.approx(interval, rel=0.01) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        running.cancel()
        until(lambda: sys.getswitchinterval() == pytest.approx(interval, rel=0.01))
