"""`ldm train` as a script: python scripts/train.py configs/shapes.toml"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
