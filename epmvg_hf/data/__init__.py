"""
Rows of image, expression and box: from the files of the benchmarks, from your own files, and from any dataset of the
`datasets` library.

These modules may import `utils` and `model.letterbox`.
"""
