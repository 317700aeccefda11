"""Checks of everything that a stranger's zoo can say: JSON, paths, columns of the index, architecture arguments.

Each refusal is one `ZooError` of one line that names the file, the field, the value and what was expected.
"""
