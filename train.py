"""Train from a clone, on one or several processes:  accelerate launch train.py RECIPE [--key value ...]

`gcl train` does the same on one process. `gcl train --help` lists every key.
"""

import sys

from universal_gcl.failures import failing_together
from universal_gcl.quiet import quiet_imports


def main(argv: list[str]) -> None:
    """As `universal_gcl.train.main`."""
    quiet_imports()
    from universal_gcl.train import main as train

    train(argv)


if __name__ == "__main__":
    with failing_together():
        main(sys.argv[1:])
