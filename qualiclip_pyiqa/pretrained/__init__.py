"""Weight files: `manifest` lists them, `find` finds or downloads them, `read` reads them, `model` makes models of them.

Listing and finding need no torch.
"""
