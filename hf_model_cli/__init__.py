"""The command lines. A mistyped option is reported at once: `hf_model`, which takes seconds to import, comes later."""
