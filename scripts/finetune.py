"""`ldm train` as a script: python scripts/finetune.py configs/lora.toml"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
