"""
What a shared model needs: configuration, model, processors, geometry, losses, pretrained towers, pipeline, conversion.

Modules of this folder import each other only, never another folder of the package: transformers copies them, without
folders, into the repository of a model that is shared with its code.
"""
