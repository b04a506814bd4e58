"""Become a supervised child: `python launch.py SUPERVISOR_PID COMMAND...`.

Asks the kernel to kill this process when its parent dies, then turns into the command, so that
the pid is the server's own. Run by path with `-I -S`: it imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arrange to die with the parent, then replace this process by the command."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    # The supervisor may have died before the kernel was asked.
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the supervisor is gone")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Python ignores SIGPIPE, and what is ignored stays so through exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 (a shell would have another pid)
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main()
