"""
One module for each format of annotation files, and the interface that they share (`source`).

These modules may import the other modules of `data`, its `files`, `utils` and `model.letterbox`.
"""
