"""Files that a crash leaves whole or absent, and locks between processes."""

from flexlora.storage.files import is_locked, locked, write_atomically

__all__ = ["is_locked", "locked", "write_atomically"]
