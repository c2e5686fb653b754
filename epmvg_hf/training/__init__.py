"""
The trainer and its parts: arguments, batches, augmentation, optimiser, callbacks, model cards.

May use `model`, `data`, `evaluation`, `distillation` and `utils`.
"""
