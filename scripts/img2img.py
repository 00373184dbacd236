"""`ldm img2img` as a script: python scripts/img2img.py --help"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["img2img", *sys.argv[1:]]))
