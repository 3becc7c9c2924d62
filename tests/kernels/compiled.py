"""Compiles Triton kernels for GPUs that are not here: what they would take of registers and shared memory.

Runs in a process of its own, because the tests' own process interprets kernels. As a script it reads builds as JSON
from stdin and writes what they take as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Build:
    """A kernel with the types of its arguments, as `triton.compile` takes them.

    kernel: "embedllm_kernels.triton.norm:_kernel". signature: argument → "*bf16", "*i32", "i64", "fp32" …; constants
    are named in `constants` only. divisible: arguments (pointers, strides) known to be multiples of 16.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers and spilled bytes (`local`) per thread, shared bytes per block; its PTX."""

    registers: int
    shared: int
    local: int
    ptx: str


def compile_for(capability: int, builds: list[Build]) -> list[Resources]:
    """Compile for one generation: 80 is A100, 90 is H100."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, str(capability)],
        input=json.dumps([asdict(build) for build in builds]),
        env={**env, "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return [Resources(**found) for found in json.loads(done.stdout)]


def _compile(build: Build, capability: int) -> Resources:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in build.constants else build.signature[n] for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in build.divisible}
    compiled = triton.compile(
        ASTSource(kernel, signature, {(names.index(n),): value for n, value in build.constants.items()}, attrs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.split("Function")[-1])}
    return Resources(counts["REG"], compiled.metadata.shared, counts["STACK"] + counts["LOCAL"], compiled.asm["ptx"])


def main() -> None:
    capability = int(sys.argv[1])
    builds = [Build(**{**found, "divisible": tuple(found["divisible"])}) for found in json.loads(sys.stdin.read())]
    print(json.dumps([asdict(_compile(build, capability)) for build in builds]))


if __name__ == "__main__":
    main()
