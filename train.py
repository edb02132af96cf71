"""Train from a clone, on one or several processes:  accelerate launch train.py RECIPE [--key value ...]

`gcl train` does the same on one process. `gcl train --help` lists every key.
"""

import sys

from universal_gcl.failures import failing_together
from universal_gcl.quiet import quiet_imports

if __name__ == "__main__":
    quiet_imports()
    with failing_together():
        from universal_gcl.train import main

        main(sys.argv[1:])
