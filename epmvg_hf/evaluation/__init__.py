"""
Measures of a model: accuracy with its uncertainty, blind baselines, the modality gap, plots of predicted boxes,
and a report of the errors.

May use `utils`.
"""
