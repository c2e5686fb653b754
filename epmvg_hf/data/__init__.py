"""
Rows of image, expression and box from the files of the benchmarks, from your own files and from any dataset.

May use `utils` and `model.letterbox`.
"""
