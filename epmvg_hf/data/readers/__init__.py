"""
One module for each format of annotation files, and the interface that they share.

May use the other modules of `data`, its `files`, `utils` and `model.letterbox`.
"""
