"""`ldm train` as a script: python scripts/train_vae.py configs/shapes-vae.toml"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
