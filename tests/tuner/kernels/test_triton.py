"""The Triton execution: its numbers (triton_cases.py, in a process of its own), its launches, where it is taken."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dylora_moe.errors import TunerError
from dylora_moe.tuner import kernels
from dylora_moe.tuner.kernels.machine import Machine, is_automatic, lacking
from dylora_moe.tuner.routing import make_dispatch

TRITON_CASES, LIGER_CASES = (Path(__file__).with_name(f"{name}_cases.py") for name in ("triton", "liger"))
MODULE = sys.modules["dylora_moe.tuner.kernels.triton"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed here (Linux x86_64 only)"
)


def run_cases(cases: Path, **environment: str) -> None:
    """The tests of a file in a process of its own, as triton reads its environment once, when it is imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    inherited.pop("TRITON_INTERPRET", None)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(cases)],
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=cases.parents[3],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("cases", [TRITON_CASES, LIGER_CASES], ids=["triton", "liger"])
def test_numbers_in_the_interpreter(cases: Path) -> None:
    run_cases(cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("cases", [TRITON_CASES, LIGER_CASES], ids=["triton", "liger"])
def test_numbers_on_a_gpu(cases: Path) -> None:
    run_cases(cases)


class Ops(TorchDispatchMode):
    """Names of the operations that torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@dataclass(frozen=True, slots=True)
class Launch:
    name: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


def work_of(
    monkeypatch: pytest.MonkeyPatch,
    *,
    experts: int,
    top_k: int,
    rank: int = 8,
    widths: tuple[int, int] = (512, 1024),
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Launch], list[str]]:
    """What forward and backward launch, and the operations that they ask torch for.

    Of tensors that have shapes and no values: whoever wants to know a value (item, tolist, nonzero) gets an error.
    """
    launched: list[Launch] = []
    monkeypatch.setattr(
        MODULE, "_launch", lambda name, grid, *args, **meta: launched.append(Launch(name, grid, args, meta))
    )
    tokens, (inputs, outputs) = 640, widths
    with FakeTensorMode():
        x, weights = torch.empty(tokens, inputs, dtype=dtype), torch.empty(tokens * top_k)
        lora_a, lora_b = torch.empty(experts, rank, inputs), torch.empty(experts, outputs, rank)
        for leaf in (x, weights, lora_a, lora_b):
            leaf.requires_grad_()
        plan = make_dispatch(torch.zeros(tokens, top_k, dtype=torch.long), experts)
        base, out, grad = (torch.empty(size, dtype=dtype) for size in ((outputs, inputs), *((tokens, outputs),) * 2))
        with Ops() as ops:
            kernels.triton(out, x, weights, lora_a, lora_b, torch.empty(experts), plan, base).backward(grad)
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in (x, weights, lora_a, lora_b))
    return launched, ops.names


@pytest.mark.parametrize("top_k", [1, 2])
def test_launches_do_not_depend_on_the_experts_and_nothing_waits(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    few, many = (work_of(monkeypatch, experts=experts, top_k=top_k) for experts in (2, 64))
    expected = ["shrink", *["expand"] * top_k, "shrink", *["expand"] * top_k, "collect", "collect"]
    assert [launch.name for launch in few[0]] == [launch.name for launch in many[0]] == expected
    assert few[1] == many[1]
    assert not any("sort" in name for name in few[1]), "the dispatch is sorted once, for all Linears"


def test_programs_are_started_for_the_tokens_and_one_more_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for tokens times experts."""
    few, many = (work_of(monkeypatch, experts=experts, top_k=1)[0][0].grid[0] for experts in (2, 64))
    assert many - few == 62


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def compiled(launch: Launch, capability: int, capture: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """Bytes of shared memory, and bytes spilt from registers, of a kernel as a launch would make it, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dylora_moe.tuner.kernels import triton_jit

    kernel = getattr(triton_jit, launch.name)
    signature, constants, known = {}, dict(launch.meta), {}
    constants["IS_WIDE"] = False
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    for index, (name, value) in enumerate(zip(kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, int) and value == 1:
            constants[name] = value
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                known[(index,)] = [["tt.divisibility", 16]]
    assert set(signature) | set(constants) == set(kernel.arg_names)
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, known)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    told = capture.readouterr().out
    spilt = re.search(r"(\d+) bytes spill stores", told)
    assert spilt, told
    assert "tf32" not in made.asm["ptx"]
    return made.metadata.shared, int(spilt[1])


def often(*values: Any) -> Any:
    return pytest.param(*values)


def seldom(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("dtype", "rank", "capability"),
    [
        often(torch.bfloat16, 16, 80),
        often(torch.bfloat16, 128, 90),
        often(torch.float32, 64, 80),
        *(seldom(torch.bfloat16, rank, capability) for rank in (8, 24, 32, 64, 128, 256) for capability in (80, 90)),
        *(seldom(torch.float32, rank, capability) for rank in (8, 24, 32, 64, 128, 256) for capability in (80, 90)),
    ],
)
def test_kernels_compile_for_gpus_and_fit_into_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dtype: torch.dtype,
    rank: int,
    capability: int,
) -> None:
    """The interpreter takes what a compiler refuses; and a table of sizes is soon wrong for another rank."""
    launched, _ = work_of(monkeypatch, experts=8, top_k=2, rank=rank, dtype=dtype)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    for name in ("shrink", "expand", "collect"):
        of_backward = [launch for launch in launched if launch.name == name][-1]
        shared, spilt = compiled(of_backward, capability, capsys)
        assert shared <= 99 * 1024, f"{name}: {shared} bytes"
        assert spilt == 0, f"{name}: {spilt} bytes"


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_odd_widths_and_one_expert_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ones become constants of the kernel, and nothing is a multiple of 16."""
    launched, _ = work_of(monkeypatch, experts=1, top_k=1, rank=1, widths=(5, 1), dtype=torch.float16)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    assert [compiled(launch, 80, capsys)[1] for launch in launched] == [0] * 6


HERE = Machine(has_triton=True, is_interpreted=False, can_build=True, capability=(9, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_it_on_a_gpu(dtype: torch.dtype) -> None:
    assert lacking(dtype, 16, HERE) is None
    assert is_automatic(dtype, 16, HERE)


@pytest.mark.parametrize(
    ("dtype", "rank", "change", "reason"),
    [
        (torch.float32, 16, {"has_triton": False}, "package triton"),
        (torch.float64, 16, {}, "got float64"),
        (torch.float32, 257, {}, "ranks up to 256, got 257"),
        (torch.float32, 16, {"capability": None}, "Nvidia GPU"),
        (torch.float32, 16, {"capability": (7, 5)}, "8.0 or newer, got 7.5"),
        (torch.float32, 16, {"can_build": False}, "C compiler"),
    ],
)
def test_elsewhere_it_says_what_it_lacks(dtype: torch.dtype, rank: int, change: Any, reason: str) -> None:
    machine = replace(HERE, **change)
    assert reason in (lacking(dtype, rank, machine) or "")
    assert not is_automatic(dtype, rank, machine)


def test_the_interpreter_needs_no_gpu_and_is_never_taken_by_itself() -> None:
    machine = replace(HERE, is_interpreted=True, capability=None, can_build=False)
    assert lacking(torch.float32, 16, machine) is None
    assert not is_automatic(torch.float32, 16, machine)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_asked_for_on_a_cpu_it_says_what_to_do(make_model: Any, batch: Any) -> None:
    model = make_model(3, execution="triton")
    with pytest.raises(TunerError, match=r"needs .*, .*float32 on cpu.* set execution to auto"):
        model(**batch)


def test_auto_on_a_cpu_does_not_import_triton(tmp_path: Path) -> None:
    """Nor does importing the tuner."""
    script = (
        "import sys, torch; from dylora_moe.tuner import kernels\n"
        "assert not kernels.takes_triton(torch.zeros(1, 1), 8)\n"
        "assert 'dylora_moe.tuner.kernels.triton_jit' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
