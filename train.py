"""Fine-tune a dual encoder with GCL:  accelerate launch train.py RECIPE.yaml [--key value ...]

`python train.py --help` lists every key.
"""

import sys

from universal_gcl.failures import failing_together
from universal_gcl.train import main

if __name__ == "__main__":
    with failing_together():
        main(sys.argv[1:])
