"""Generate text, from a clone: the same command as `custom-gpt-generate` of an installation."""

import sys

try:
    from hf_model_cli.generate import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
