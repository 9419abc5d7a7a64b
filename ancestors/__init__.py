"""Settings of the programs that the families come from, a file for each: see from_ancestor.py."""
