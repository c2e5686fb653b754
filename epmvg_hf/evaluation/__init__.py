"""
What predicted boxes are worth: accuracy and its uncertainty, blind baselines, the modality gap, pictures of boxes.

May use `utils`.
"""
