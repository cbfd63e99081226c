"""Convert a checkpoint, from a clone: the same command as `custom-gpt-convert` of an installation."""

import sys

try:
    from hf_model_cli.convert import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
