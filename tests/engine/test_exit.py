"""A process that ends takes its engine with it: within two seconds, quietly, with the exit code it would have had."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)
SCENES = {  # what stdout holds
    "nothing": "",
    "end_of_the_main_module": "",
    "handles_in_a_local_frame": "",
    "system_exit": "",
    "an_exception": "",
    "half_read_streams": "",
    "a_reading_generator": "",
    "from_a_thread": "",
    "daemon_threads_that_wait": "",
    "a_thread_that_is_waited_for": "50\n",
    "asyncio_tasks_left_behind": "",
    "several_engines": "",
    "an_idle_engine": "",
    "closed_before": "",
    "used_in_an_atexit_function": "5\n",
    "in_a_cycle_with_a_finalizer": "",
    "during_a_load": "",
    "a_long_step": "",
    "terminated": "",
}
SECONDS = 2.0
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenes are forked"),
    pytest.mark.timeout(300),  # on a machine that has much else to do
]


@pytest.fixture(scope="module")
def endings() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(HERE.with_name("exits.py")), *SCENES],
        cwd=HERE.parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels"])},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.serial
@pytest.mark.parametrize("scene", SCENES)
def test_exit(scene: str, endings: dict[str, Any]) -> None:
    found = endings[scene]
    if scene == "an_exception":
        assert found["code"] == 1
        assert found["stderr"].strip().splitlines()[-1] == "ZeroDivisionError: this one is meant"
        assert found["stderr"].count("Traceback") == 1
    else:
        assert (found["code"], found["stderr"]) == (-signal.SIGTERM if scene == "terminated" else 0, "")
    assert found["stdout"] == SCENES[scene]
    assert found["engines"] <= SECONDS
    assert found["process"] <= 2 * endings["nothing"]["process"] + SECONDS  # and leaves nothing to take apart


@pytest.mark.serial
def test_every_scene_is_run(endings: dict[str, Any]) -> None:
    from tests.engine import exits

    assert set(exits.SCENES) - {"run_forked"} == set(SCENES) == set(endings)
