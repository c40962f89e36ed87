"""Files: atomic writes, locks between processes, and tensors read one at a time.

``tensors`` is imported from its module: it needs PyTorch, which takes seconds to import.
"""

from flexlora.storage.files import is_locked, locked, sha256, write_atomically

__all__ = ["is_locked", "locked", "sha256", "write_atomically"]
