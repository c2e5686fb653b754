"""
Readers for files of unknown origin: images, JSON, parquet and pickles. Nothing in a file is ever executed.

These modules import nothing from outside this folder.
"""
