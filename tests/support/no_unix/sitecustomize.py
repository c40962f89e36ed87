"""Python without the modules that only Unix has: on a PYTHONPATH this stands for Windows.

``fcntl`` is hidden from everything outside the standard library, the others from flexlora only:
the standard library, and psutil with its ``resource``, have files of their own for Windows, which
cannot be used here.
"""

import builtins
import sysconfig

HIDDEN = frozenset(("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"))
STANDARD_LIBRARY = sysconfig.get_path("stdlib")

_import = builtins.__import__


def _is_hidden(name, importer):
    ours = str(importer.get("__name__")).partition(".")[0] in ("flexlora", "__main__")
    file = importer.get("__file__") or ""
    standard = file.startswith(STANDARD_LIBRARY) and "site-packages" not in file
    return name in HIDDEN and (ours or (name == "fcntl" and bool(file) and not standard))


def _without_unix(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and _is_hidden(name, globals or {}):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import(name, globals, locals, fromlist, level)


builtins.__import__ = _without_unix
