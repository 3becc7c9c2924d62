"""`python -m embedllm`: the same as the `embedllm` command.

Owns nothing; see cli.py.
"""

import sys

from embedllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
