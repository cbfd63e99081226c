"""The command lines. They stand outside of `hf_model`, whose import takes seconds: a wrong word is answered at once."""
