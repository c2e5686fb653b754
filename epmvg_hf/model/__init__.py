"""
All that inference needs, and all that travels with a model that is shared with its code: configuration, model, losses,
processors and their geometry, pretrained towers, the pipeline and the conversion of TransVG's checkpoints.

The modules of this folder import only each other, by `from .module import name`. transformers follows such imports
when it copies the code of a shared model, and it copies all files into one folder.
"""
