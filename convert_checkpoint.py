"""Convert a checkpoint, from a clone: the same command as `custom-gpt-convert` of an installation."""

import sys

from hf_model_cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
