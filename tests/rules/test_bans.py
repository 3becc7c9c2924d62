"""What the shipped code never does: run what it reads, change the process it is a guest in, or keep hidden state.

Each rule is a function from one source to its complaints. Where a rule has an exception, the exception is named here.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rules.tree import ROOT, Source, sources

# These run as a program of their own, not as a guest: they may print and set up their own process.
PROGRAMS = ("embedllm/cli.py", "embedllm/__main__.py", "embedllm/bench", "embedllm/demo")
PROCESS = "embedllm/process.py"  # what must touch the process lives here
REGISTRY = "embedllm/registry.py"  # the one place with module-level mutable state

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK_MODULES = {"socket", "http", "urllib.request", "requests", "httpx", "aiohttp", "urllib3"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {"torch.load", "os.system", "os.popen"}
PROCESS_WIDE = {
    "set_default_dtype",
    "set_default_device",
    "set_default_tensor_type",
    "set_num_threads",
    "set_num_interop_threads",
    "set_float32_matmul_precision",
    "use_deterministic_algorithms",
    "set_event_loop_policy",
    "set_event_loop",
    "set_start_method",
    "setswitchinterval",
    "setrecursionlimit",
    "basicConfig",
    "putenv",
    "unsetenv",
}
PROCESS_WIDE_CALLS = {
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.random.manual_seed",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "gc.disable",
    "gc.enable",
    "gc.freeze",
    "gc.set_threshold",
    "os.chdir",
    "warnings.simplefilter",
    "warnings.filterwarnings",
    "warnings.resetwarnings",
}
VAGUE_WORDS = ("Manager", "Processor", "Handler", "Utils")
CONTAINERS = {
    "dict",
    "list",
    "set",
    "bytearray",
    "defaultdict",
    "OrderedDict",
    "Counter",
    "deque",
    "SimpleQueue",
    "Queue",
}
CONTAINERS |= {"WeakSet", "WeakKeyDictionary", "WeakValueDictionary", "ContextVar", "local", "count", "Lock", "RLock"}
CHANGES = {"append", "add", "update", "pop", "popitem", "clear", "setdefault", "extend", "insert", "remove", "discard"}


def dotted(node: ast.AST) -> str:
    """`torch.cuda.manual_seed` for the expression of that name, and "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def is_program(source: Source) -> bool:
    return any(source.name == program or source.name.startswith(program + "/") for program in PROGRAMS)


def nodes(source: Source, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(source.tree) if isinstance(node, kinds))


def runs_what_it_reads(source: Source) -> Iterator[str]:
    for found in source.imports:
        if found.module.partition(".")[0] in UNSAFE_MODULES or found.module in UNSAFE_MODULES:
            yield f"{found.line} imports {found.module}"
        if found.module == "torch" and "load" in found.names:
            yield f"{found.line} imports torch.load"
    for call in nodes(source, ast.Call):
        name = dotted(call.func)
        if name in UNSAFE_CALLS or name in UNSAFE_ATTRIBUTES:
            yield f"{call.lineno} calls {name}"
        for keyword in call.keywords:
            if keyword.arg in ("allow_pickle", "shell"):
                yield f"{call.lineno} passes {keyword.arg}"


def opens_connections(source: Source) -> Iterator[str]:
    """Only huggingface_hub downloads, and only models; nothing listens."""
    for found in source.imports:
        if any(found.module == name or found.module.startswith(name + ".") for name in NETWORK_MODULES):
            yield f"{found.line} imports {found.module}"


def renders_unsandboxed(source: Source) -> Iterator[str]:
    """A chat template comes with a model file: only jinja2's sandbox may render it."""
    for found in source.imports:
        if found.module == "jinja2" and {"Environment", "Template", "NativeEnvironment"} & set(found.names):
            yield f"{found.line} imports an open jinja2 environment"
        if found.module == "jinja2.sandbox" and "SandboxedEnvironment" in found.names:
            yield f"{found.line} wants jinja2.sandbox.ImmutableSandboxedEnvironment"
    for node in nodes(source, ast.Attribute):
        if dotted(node) in ("jinja2.Environment", "jinja2.Template", "jinja2.sandbox.SandboxedEnvironment"):
            yield f"{node.lineno} uses {dotted(node)}"


def touches_the_process(source: Source) -> Iterator[str]:
    if is_program(source) or source.name == PROCESS:
        return
    for found in source.imports:
        if found.module == "signal":
            yield f"{found.line} imports signal"
    for call in nodes(source, ast.Call):
        name = dotted(call.func)
        if name in PROCESS_WIDE_CALLS or name.rpartition(".")[2] in PROCESS_WIDE:
            yield f"{call.lineno} calls {name}"
        if name.startswith("os.environ.") and name.rpartition(".")[2] not in ("get", "copy", "items", "keys"):
            yield f"{call.lineno} calls {name}"
        if name == "logging.getLogger" and not call.args:
            yield f"{call.lineno} takes the root logger"
    for node in nodes(source, ast.Subscript, ast.Attribute):
        writes = isinstance(node.ctx, ast.Store | ast.Del)
        if writes and dotted(node.value if isinstance(node, ast.Subscript) else node).startswith("os.environ"):
            yield f"{node.lineno} writes os.environ"


def prints(source: Source) -> Iterator[str]:
    if not is_program(source):
        for call in nodes(source, ast.Call):
            if dotted(call.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                yield f"{call.lineno} prints"


def keeps_hidden_state(source: Source) -> Iterator[str]:
    """A module may hold tables, never something that changes after it has been loaded."""
    if source.name == REGISTRY or is_program(source):
        return
    for node in nodes(source, ast.Global):
        yield f"{node.lineno} changes a module-level name"
    tables = dict(module_level_containers(source))
    for name, (line, is_table) in tables.items():
        if not is_table:
            yield f"{line} keeps the mutable {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = dotted(node.func.value)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = dotted(node.value)
        else:
            continue
        if changed in tables:
            yield f"{node.lineno} changes the module-level {changed}"


def module_level_containers(source: Source) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Names of module-level containers, and whether each is a filled table rather than something to fill."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign):
            names, value = [dotted(target) for target in node.targets], node.value
        elif isinstance(node, ast.AnnAssign):
            names, value = [dotted(node.target)], node.value
        else:
            continue
        if isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp):
            filled = not isinstance(value, ast.Dict | ast.List | ast.Set) or bool(
                value.keys if isinstance(value, ast.Dict) else value.elts
            )
        elif isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in CONTAINERS:
            filled = bool(value.args or value.keywords) and dotted(value.func) in ("dict", "list", "set")
        else:
            continue
        yield from ((name, (node.lineno, filled)) for name in names)


def names_vaguely(source: Source) -> Iterator[str]:
    for node in nodes(source, ast.ClassDef):
        if any(word in node.name for word in VAGUE_WORDS):
            yield f"{node.lineno} class {node.name}: say what it is"


RULES: list[Callable[[Source], Iterator[str]]] = [
    runs_what_it_reads,
    opens_connections,
    renders_unsandboxed,
    touches_the_process,
    prints,
    keeps_hidden_state,
    names_vaguely,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    assert not [f"{source.name}:{complaint}" for source in sources() for complaint in rule(source)]


GUILTY = {
    runs_what_it_reads: "import pickle\ntorch.load(path)\neval(text)\nnumpy.load(path, allow_pickle=True)",
    opens_connections: "import socket\nfrom urllib import parse\nfrom http.server import HTTPServer",
    renders_unsandboxed: "from jinja2 import Environment\njinja2.Template(text)",
    touches_the_process: "import os, signal\nos.environ['A'] = '1'\ntorch.manual_seed(0)\nlogging.getLogger()",
    prints: "print('hello')",
    keeps_hidden_state: "cache = {}\nNAMES = {'a': 1}\ndef f():\n    NAMES['b'] = 2",
    names_vaguely: "class BlockManager: ...",
}
INNOCENT = """
from urllib.parse import urlparse
from jinja2.sandbox import ImmutableSandboxedEnvironment
NAMES = {"a": 1}
log = logging.getLogger("embedllm")
model.eval()
generator.manual_seed(3)
os.environ.get("A")
local = {}.copy()
"""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_bites(rule: Callable[[Source], Iterator[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule complains of code that breaks it, and of nothing in code that breaks none."""
    assert list(rule(fake(GUILTY[rule])))
    assert not list(rule(fake(INNOCENT)))


def fake(text: str) -> Source:
    source = Source(ROOT / "embedllm" / "fake.py", "embedllm.fake")
    source.__dict__.update(text=text, tree=ast.parse(text))
    return source


# Absolute paths of somebody's machine, and package registries. Two files may name the public index of CPU builds.
MACHINE_PATH = re.compile(r"(?<![\w.\-/$}])/(?:home|root|work|Users|opt|mnt|tmp)/\w")
REGISTRY_HOST = re.compile(
    r"https?://[^\s/]*(?:pypi|pythonhosted|artifactory|nexus|devpi)|/simple/?\b|download\.pytorch\.org"
)
MAY_NAME_THE_INDEX = {"Makefile", "README.md"}
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".json", ".ipynb", ".cfg", ".js", ".css", ".html", ""}
LEFT_OUT = {".git", ".venv", ".hypothesis", "node_modules", "site", "dist", "build", "runs", "checkpoints"}


def text_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in LEFT_OUT or part.endswith("_cache") or part == "__pycache__" for part in parts)
        if not hidden and path.is_file() and path.suffix in TEXT and path.stat().st_size < 5_000_000:
            yield path


def test_nothing_names_a_machine() -> None:
    found = []
    for path in text_files():
        name = path.relative_to(ROOT).as_posix()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            host = REGISTRY_HOST.search(line)
            allowed = host and host[0].startswith("download.") and name in MAY_NAME_THE_INDEX
            if MACHINE_PATH.search(line) or (host and not allowed and name != "tests/rules/test_bans.py"):
                found.append(f"{name}:{number} {line.strip()[:80]}")
    assert not found
