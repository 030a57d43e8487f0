"""A Prefect worker of one pool that ends with its parent process.

python -m flows.platform.worker --pool train --parent PID
"""

import argparse
import runpy
import sys

from model.processes.parent import end_with_parent


def main() -> None:
    """Run `prefect worker start` in this process."""
    parser = argparse.ArgumentParser(prog="python -m flows.platform.worker")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    end_with_parent(args.parent)
    sys.argv = ["prefect", "worker", "start", "--pool", args.pool, "--type", "process"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
