"""What every test runs under: no network, one torch thread per parallel worker, seeds made from the test id."""

import importlib.util
import os
import socket
import zlib
from collections.abc import Iterator

import pytest

# Set before anything imports torch or transformers. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
if not os.environ.get(
    "EMBEDLLM_TEST_GPU"
):  # `make test-gpu` sets it: there kernels run, elsewhere they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "house", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    # A GPU machine may lack these plugins; strict configuration would refuse their settings.
    settings_of = {
        "pytest_timeout": ("timeout",),
        "pytest_asyncio": ("asyncio_mode", "asyncio_default_fixture_loop_scope"),
    }
    for plugin, names in settings_of.items():
        if not importlib.util.find_spec(plugin):
            for name in names:
                parser.addini(name, f"ignored: {plugin} is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # What a foreign suite measures with pytest-benchmark runs once, as a test, and prints no table.
    if hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True


def equality_counts(config: pytest.Config) -> tuple[int, int]:
    """Requests whose tokens were compared with transformers', and those among them that ended in a rounding tie."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = [report for kind in reporter.stats.values() for report in kind] if reporter else []
    properties = [
        pair for report in reports if getattr(report, "when", "") == "call" for pair in report.user_properties
    ]
    counts = [value for name, value in properties if name == "equality"]
    return sum(requests for requests, _ in counts), sum(ties for _, ties in counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    requests, ties = equality_counts(config)
    if requests:
        terminalreporter.write_line(f"equality with transformers: {requests:,} requests, {ties} rounding ties")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A tie is right by itself, too many are not: one in a thousand requests, or a single one in a short run."""
    requests, ties = equality_counts(session.config)
    if ties > max(1, requests // 1_000) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def test_seed(request: pytest.FixtureRequest) -> int:
    """A 32-bit seed that is the same on every run and differs between tests and their parameters."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses connections that leave the machine, so that no test comes to depend on one."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}; tests use no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
