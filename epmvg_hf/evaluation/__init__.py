"""
Measures of a model: accuracy with its uncertainty, blind baselines, the modality gap, and plots of predicted boxes.

May use `utils`.
"""
