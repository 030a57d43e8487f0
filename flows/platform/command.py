"""Runs a `prefect` command, such as its server or a worker, that ends with its parent process.

python -m flows.platform.command PARENT_PID worker start --pool train
"""

import runpy
import sys

from model.processes.parent import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = ["prefect", *sys.argv[2:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
