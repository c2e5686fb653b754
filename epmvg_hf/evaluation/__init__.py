"""
How good predicted boxes are: accuracy with its uncertainty, blind baselines, the modality gap and plots of boxes.

May use `utils`.
"""
