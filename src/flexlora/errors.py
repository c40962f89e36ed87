"""The library's own exceptions: faults that a user can mend, by what is at fault.

The command line reports everything below ``FlexloraError`` as one sentence. Any other exception is
a fault of the library or of a plug-in, and shows its traceback. All of these are ``ValueError`` as
well, so that code which catches that keeps working.
"""


class FlexloraError(ValueError):
    """A fault that the user can mend; the message is a sentence with the value and the remedy."""


class ConfigError(FlexloraError):
    """A config, an option or a missing package; names the key, and its line where there is one."""


class DataError(FlexloraError):
    """Rows, a file of rows, or a partition that cannot be used."""


class AdapterError(FlexloraError):
    """An adapter or a base model that cannot be read, or an adapter of another base model."""


class ProtocolError(FlexloraError):
    """A message, a key or a run's folder that is not what it must be."""
