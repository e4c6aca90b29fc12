"""The C library's allocator: memory that is freed is kept for the next step."""

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, see malloc.h
NEVER = 2**31 - 1


def keep_freed() -> None:
    """Let the C library hold on to large blocks that were freed.

    A training step allocates the same few hundred megabytes again and again. By default glibc hands blocks of that
    size back to the kernel, and each page that comes anew costs a fault: up to a third of a step on a virtual machine.
    Other C libraries have no such switch, and need none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(TRIM_THRESHOLD, NEVER)
    mallopt(MMAP_MAX, 0)
