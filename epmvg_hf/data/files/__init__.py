"""
Reading files of unknown origin: images, JSON, parquet and pickles. Nothing in a file is executed.

Uses nothing outside this folder.
"""
