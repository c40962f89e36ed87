"""The library's own exceptions: faults that a user can mend, each named by where it lies.

Everything below ``FlexloraError`` is reported as one sentence on the command line. Any other
exception is a fault of the library or of a plug-in, and shows its traceback. All are
``ValueError``s as well, so that code which catches those keeps working.
"""


class FlexloraError(ValueError):
    """A fault that the user can mend; its text says what, where and how."""


class ConfigError(FlexloraError):
    """A config or an option that cannot be used; names the line or the key where there is one."""


class DataError(FlexloraError):
    """Rows, a file of rows, or a partition that cannot be used."""


class AdapterError(FlexloraError):
    """An adapter or a base model that cannot be read, or that do not fit each other."""


class ProtocolError(FlexloraError):
    """A message, key or run folder that is not what the other side must send or have left."""
