"""Run a script that ends together with the process that started it: python recipes/watched.py SCRIPT [ARGUMENT ...]

That process holds the other end of standard input; the end of the pipe is its end, also after a kill. Without this a
killed comparison would leave its runs at work, beside those of its next start.
"""

import os
import runpy
import sys
import threading


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] else 2)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
