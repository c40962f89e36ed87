"""Files: whole or not there, with checksums, for their owner alone; locks; tensors one at a time.

``tensors`` is imported from its module: it needs PyTorch, which takes seconds to import.
"""

from flexlora.storage.files import (
    PUBLISHED,
    append,
    close_to_others,
    make_private,
    remove_drafts,
    sha256,
    sync_folder,
    write_atomically,
    write_new,
)
from flexlora.storage.locks import LOCK, is_lock_file, is_locked, locked
from flexlora.storage.paths import expanded
from flexlora.storage.sealed import (
    SUM,
    DamagedFile,
    copy_verified,
    is_intact,
    link_or_copy,
    read_sealed,
    remove_summed,
    sum_file,
    sum_of,
    write_sealed,
    write_summed,
)
from flexlora.storage.temporary import scratch

__all__ = [
    "LOCK",
    "PUBLISHED",
    "SUM",
    "DamagedFile",
    "append",
    "close_to_others",
    "copy_verified",
    "expanded",
    "is_intact",
    "is_lock_file",
    "is_locked",
    "link_or_copy",
    "locked",
    "make_private",
    "read_sealed",
    "remove_drafts",
    "remove_summed",
    "scratch",
    "sha256",
    "sum_file",
    "sum_of",
    "sync_folder",
    "write_atomically",
    "write_new",
    "write_sealed",
    "write_summed",
]
