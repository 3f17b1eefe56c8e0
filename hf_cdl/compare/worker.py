"""A run of a comparison as a separate process: python -m hf_cdl.compare.worker MODULE [ARGUMENT ...]

It ends together with the process that started it: that one holds the other end of its standard input, and the pipe
closes when it ends, even if it was killed. Otherwise a killed comparison would leave its runs running alongside those
of the next start.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_cdl.commands.stopping import end_after


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a module with its arguments (`hf_cdl`: the commands); it writes into `log`, and `environment` is added."""
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = [sys.executable, "-m", "hf_cdl.compare.worker", *words]
    env = {**os.environ, **environment}
    with open(log, "a") as output:
        return subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env)


if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print((__doc__ or "").strip())
        sys.exit(0 if sys.argv[1:] else 2)
    end_after(lambda: os.read(0, 1))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
