"""What an engine reads: one module for each target, with its writer and its verification."""
