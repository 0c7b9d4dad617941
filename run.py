"""Run an experiment: `python run.py model=wan21_tiny cache=ertacache bench=vbench`; `--help` lists the choices."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

# glibc hands large buffers back after every operation; keeping them makes CPU inference faster.
# The settings count only at start-up, so the process starts itself again once with them.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}
if __name__ == "__main__" and sys.platform == "linux" and not any(key in os.environ for key in ALLOCATOR):
    os.environ.update(ALLOCATOR)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def interrupt_again(ignored: Any) -> None:
    """Ctrl-C in a finalizer or a callback, which Python would print and forget, is delivered once more a moment later."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


sys.unraisablehook = interrupt_again

try:
    from experiments.cli import main
except KeyboardInterrupt:  # the libraries take seconds to load
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main()
