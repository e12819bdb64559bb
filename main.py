"""The command line: fit, validate, test, predict, prepare, rows, generate."""

import sys

if __name__ == "__main__":  # worker processes import this file: nothing may happen then
    from kosmos_lit.cli import main

    sys.exit(main(sys.argv[1:]))
