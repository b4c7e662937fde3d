"""Weight files: `manifest` lists, `find` finds or downloads, `read` reads tensors, `model` loads models.

Listing and finding do not import torch.
"""
