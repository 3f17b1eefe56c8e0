"""Run a script that ends together with the process that started it: python recipes/watched.py SCRIPT [ARGUMENT ...]

That process holds the other end of standard input; the end of the pipe is its end, also after a kill. Without this a
killed comparison would leave its runs at work, beside those of its next start.
"""

import os
import runpy
import sys

from stopping import end_after

if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print((__doc__ or "").strip())
        sys.exit(0 if sys.argv[1:] else 2)
    end_after(lambda: os.read(0, 1))
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
