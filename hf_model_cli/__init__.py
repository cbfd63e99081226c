"""The command lines. They are no part of `hf_model`, which takes seconds to import: a wrong word is answered at once."""
