"""
The CLIP teacher: loading it, caching its embeddings, and the loss terms that compare the student with it.

May use `model`, `data` and `utils`.
"""
