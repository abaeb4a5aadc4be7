"""The structure of the code, read from its imports."""
