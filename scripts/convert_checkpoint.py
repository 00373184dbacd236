"""`ldm convert` as a script: python scripts/convert_checkpoint.py --help"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
