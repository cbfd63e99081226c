"""Generate text, from a clone: the same command as `custom-gpt-generate` of an installation."""

import sys

from hf_model_cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
