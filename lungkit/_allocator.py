"""Memory that the process has freed, kept for its next use."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST_KEPT = 1 << 30
_NEVER = -1

# What a user who sets them has chosen for the whole process.
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back to the system: faster networks on a CPU.

    The C library of Linux (glibc) returns large blocks, such as the features of a network, to the system as soon as
    they are freed. The next layer then gets new pages, which the system has to find and fill with zeros one by one:
    a third or more of the time of a 3D network, and many times that for large batches of cheap ones. After this call
    blocks of up to 1 GiB are kept; larger ones, as long scans are, are still returned. The price: the process stays
    as large as it has been once.

    lungkit's commands call it. A script of your own may call it once, at any time; it holds for the whole process.

    Returns:
        Whether it took effect: False where the C library is another one or the environment has chosen settings of
        its own (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TOP_PAD_``, ``GLIBC_TUNABLES``).

    Source: mallopt(3), "M_MMAP_THRESHOLD" and "M_TRIM_THRESHOLD".

    Example:
        >>> import lungkit
        >>> kept = lungkit.keep_freed_memory()
        >>> isinstance(kept, bool)
        True
    """
    if any(name in os.environ for name in _CHOICES):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  other libraries have a mallopt that does nothing
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # 1 is success for both; either is of use without the other.
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) == 1, mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1])


def release_free_memory() -> bool:
    """Give the system back what is free between the blocks in use, once.

    Where freed blocks are kept (:func:`keep_freed_memory`), blocks of changing sizes leave gaps that the C library does
    not always fill again: a long training would grow by some hundred MB an epoch. The next use of what is given back
    costs new pages, so this is for once in minutes.

    Returns:
        Whether there was something to give back; False where the C library is not glibc.

    Source: malloc_trim(3).

    Example:
        >>> from lungkit._allocator import release_free_memory
        >>> isinstance(release_free_memory(), bool)
        True
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        trim = library.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return bool(trim(0))
