"""The filter of calls: read as the kernel reads it, for both kinds of processors, and tried for real."""

import errno
import platform
import struct

import pytest

from dylora_moe.sandbox import Limits, Sandbox
from dylora_moe.sandbox.seccomp import build_filter, is_known

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
EAFNOSUPPORT = 0x50000 | errno.EAFNOSUPPORT
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS = {
    "x86_64": {"read": 0, "clone": 56, "clone3": 435, "socket": 41, "ptrace": 101, "memfd_create": 319, "fchmod": 91},
    "aarch64": {
        "read": 63,
        "clone": 220,
        "clone3": 435,
        "socket": 198,
        "ptrace": 117,
        "memfd_create": 279,
        "fchmod": 52,
    },
}
PRLIMIT, SETPRIORITY = {"x86_64": 302, "aarch64": 261}, {"x86_64": 141, "aarch64": 140}


def answer(rules: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = 0) -> int:
    """What a filter says of a call. Source: the instructions of linux/filter.h that it uses."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at = value = 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", rules, 8 * at)
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("on_the_host", [False, True])
def test_what_it_says(machine: str, on_the_host: bool) -> None:
    rules = build_filter(on_the_host=on_the_host, machine=machine)
    numbers = NUMBERS[machine]

    def say(name: str | int, *arguments: int) -> int:
        number = numbers[name] if isinstance(name, str) else name
        return answer(rules, number, arguments, ARCHITECTURES[machine])

    assert say("read") == ALLOW
    assert say("ptrace") == say("memfd_create") == EPERM
    assert say("clone", 0x3D0F00) == ALLOW and say("clone", 17) == ALLOW  # a thread, a fork
    assert say("clone", 0x10000000 | 17) == EPERM and say("clone", 0x00020000) == EPERM
    assert say("clone3") == ENOSYS and say(463) == ENOSYS
    assert say("fchmod") == (EPERM if on_the_host else ALLOW)
    assert say("socket", 40, 1) == (EPERM if on_the_host else EAFNOSUPPORT)
    assert say("socket", 2, 1) == (EPERM if on_the_host else ALLOW)
    assert say(PRLIMIT[machine], 0) == ALLOW and say(SETPRIORITY[machine], 0, 0) == ALLOW
    for number, arguments in ((PRLIMIT[machine], (7,)), (SETPRIORITY[machine], (0, 7)), (SETPRIORITY[machine], (2, 0))):
        assert say(number, *arguments) == (EPERM if on_the_host else ALLOW)
    assert answer(rules, numbers["read"], (), 0x40000003) == KILL  # a 32 bit program


def test_other_processors_are_not_known() -> None:
    assert is_known("x86_64") and not is_known("riscv64")


@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no numbers of calls for this processor")
def test_it_is_set_in_every_sandbox(sandbox: Sandbox) -> None:
    """Calls that would work without it, tried by their numbers."""
    if sandbox.name == "docker":
        pytest.skip("Docker has a filter of its own")
    numbers = NUMBERS[platform.machine()]
    unshare = {"x86_64": 272, "aarch64": 97}[platform.machine()]
    calls = [
        (numbers["memfd_create"], 0, 0),
        (numbers["ptrace"], 0, 0, 0, 0),
        (unshare, 0x10000000),
        (numbers["socket"], 40, 1, 0),
    ]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in {calls}:
    print(libc.syscall(*call), ctypes.get_errno())
"""
    said = sandbox.run(program, Limits()).stdout.split("\n")
    last = errno.EPERM if sandbox.name == "sandlock" else errno.EAFNOSUPPORT
    assert said == [f"-1 {errno.EPERM}"] * 3 + [f"-1 {last}", ""]
