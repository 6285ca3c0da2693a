"""Every repair of PyTorch that second derivatives need, each held by a contract test.

Nothing here is ours by choice: a repair goes when the versions that need it are no longer served.
"""
