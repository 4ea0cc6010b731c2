"""What a training script needs around its loop: flags, processes, shares, checkpoints, a report.

``imagenet.py`` is the script; here is what of it is no story of how the loader is used.
"""
