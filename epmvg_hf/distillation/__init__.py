"""
The CLIP teacher, what it computes, where that is kept, and the terms of the loss that it brings.

May use `model`, `data` and `utils`.
"""
