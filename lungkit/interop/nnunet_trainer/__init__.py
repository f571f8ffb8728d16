"""Folder in which nnU-Net finds a trainer that uses lungkit's loss: name it in ``nnUNet_extTrainer``.

It holds one module, which imports nnU-Net; this one does not.
"""
