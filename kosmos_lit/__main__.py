"""`python -m kosmos_lit`: the same as `main.py` of a checkout."""

import sys

if __name__ == "__main__":  # worker processes import this file: nothing may happen then
    from kosmos_lit.cli import main

    sys.exit(main(sys.argv[1:]))
