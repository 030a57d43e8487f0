"""A worker of one pool that ends with the process that started it. Knows no flow.

python -m flows.platform.worker --pool train --parent PID
"""

import argparse
import runpy
import sys

from model.processes.parent import end_with_parent


def main() -> None:
    """Become Prefect's worker."""
    parser = argparse.ArgumentParser(prog="python -m flows.platform.worker")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--parent", type=int, required=True)
    asked = parser.parse_args()
    end_with_parent(asked.parent)
    sys.argv = ["prefect", "worker", "start", "--pool", asked.pool, "--type", "process"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
