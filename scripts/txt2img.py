"""`ldm txt2img` as a script: python scripts/txt2img.py --help"""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["txt2img", *sys.argv[1:]]))
