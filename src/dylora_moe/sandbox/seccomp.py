"""Which calls to the kernel a program may not make -> a filter that the kernel runs.

Namespaces and Landlock leave gaps: memory that no process maps and no limit counts (memfd_create, shmget), doors for
which kernels were attacked (bpf, io_uring, userfaultfd, mounts in a nested user namespace), sockets to the host of a
virtual machine (AF_VSOCK), and, without a PID namespace, the priority and limits of processes of the same user.

A filter is an array of 8 bytes an instruction, which is short enough to write down: libseccomp and its binding would
have to be installed where the program runs. Source: seccomp(2), linux/filter.h, linux/audit.h.
"""

import errno
import platform
import struct
from collections.abc import Mapping

# Name -> number on x86_64 and on aarch64, None where there is none. Source: asm/unistd_64.h, asm-generic/unistd.h.
_NEVER: Mapping[str, tuple[int | None, int | None]] = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "fanotify_init": (300, 262),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "personality": (135, 92),
    "syslog": (103, 116),
}
# Landlock does not govern modes, owners, times and attributes of files, nor a process's hold on others of its user.
_ON_THE_HOST: Mapping[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "ioprio_set": (251, 30),
    "socket": (41, 198),
}
# Of these only the caller itself may be meant, which is number 0 in the argument at this place.
_OF_ITSELF: Mapping[str, tuple[tuple[int | None, int | None], tuple[int, ...]]] = {
    "prlimit64": ((302, 261), (0,)),
    "sched_setaffinity": ((203, 122), (0,)),
    "sched_setscheduler": ((144, 119), (0,)),
    "sched_setparam": ((142, 118), (0,)),
    "sched_setattr": ((314, 274), (0,)),
    "setpriority": ((141, 140), (0, 1)),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*, but for the one of clocks, which clone cannot make
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
# Setxattrat is the first that is newer than these tables and undoes one of them: from here on nothing is there.
_NEWER = 463

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def is_known(machine: str | None = None) -> bool:
    """Whether there is a filter for this kind of processor."""
    return (machine or platform.machine()) in _ARCHITECTURES


def build_filter(*, on_the_host: bool, machine: str | None = None) -> bytes:
    """The filter as the kernel takes it.

    Args:
        on_the_host: The program sees the host's processes and files, so it may not touch what Landlock leaves open.
            All sockets are refused, too.
        machine: As `platform.machine` names it; None for this one.
    """
    column, architecture = _ARCHITECTURES[machine or platform.machine()]
    calls = dict(_NEVER) | (dict(_ON_THE_HOST) if on_the_host else {})
    number, first_argument = 0, 16
    rules = [
        _rule(_LOAD, 4),
        _rule(_EQUAL, architecture, 1, 0),
        _rule(_RETURN, _KILL),
        _rule(_LOAD, number),
        # That of x32 programs, and of calls that are newer than these tables.
        _rule(_AT_LEAST, _X32 if column == 0 else 0xFFFFFFFF, 0, 1),
        _rule(_RETURN, _KILL),
        _rule(_AT_LEAST, _NEWER, 0, 1),
        _rule(_RETURN, _FAIL | errno.ENOSYS),
        _rule(_EQUAL, _CLONE3[column], 0, 1),  # its flags lie in memory: libraries fall back to clone
        _rule(_RETURN, _FAIL | errno.ENOSYS),
    ]
    for numbers in calls.values():
        if numbers[column] is not None:
            rules += [_rule(_EQUAL, numbers[column] or 0, 0, 1), _rule(_RETURN, _FAIL | errno.EPERM)]
    for numbers, places in _OF_ITSELF.values() if on_the_host else ():
        checks = [
            part
            for place in places
            for part in (
                _rule(_LOAD, first_argument + 8 * place),
                _rule(_EQUAL, 0, 1, 0),
                _rule(_RETURN, _FAIL | errno.EPERM),
            )
        ]
        rules += _where(numbers[column] or 0, [*checks, _rule(_RETURN, _ALLOW)])
    rules += _where(
        _CLONE[column],
        [
            _rule(_LOAD, first_argument),
            _rule(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
            _rule(_RETURN, _FAIL | errno.EPERM),
            _rule(_RETURN, _ALLOW),
        ],
    )
    rules += _where(
        _SOCKET[column],
        [
            _rule(_LOAD, first_argument),
            *(part for family in _FAMILIES for part in (_rule(_EQUAL, family, 0, 1), _rule(_RETURN, _ALLOW))),
            _rule(_RETURN, _FAIL | errno.EAFNOSUPPORT),
        ],
    )
    return b"".join([*rules, _rule(_RETURN, _ALLOW)])


def _where(number: int, block: list[bytes]) -> list[bytes]:
    """A block for one call, which must return: the number is no longer at hand after it."""
    return [_rule(_EQUAL, number, 0, len(block)), *block]


def _rule(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
