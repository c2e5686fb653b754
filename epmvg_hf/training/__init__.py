"""
The trainer and what it is made of: arguments, batches, augmentation, optimiser, callbacks, model cards.

May use `model`, `data`, `evaluation`, `distillation` and `utils`.
"""
