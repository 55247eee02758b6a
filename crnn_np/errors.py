"""The package's own exceptions; the command line prints one as a single line and exits with 1."""


class CrnnError(Exception):
    """Base of everything that crnn_np raises about its input."""


class DataError(CrnnError):
    """A raw log or a prepared data set is missing, malformed or empty."""


class SettingsError(CrnnError, ValueError):
    """A setting or a preset is unknown or out of range."""


class ModelError(CrnnError):
    """A model file is unusable, or does not belong to the data."""


class TrainingError(CrnnError):
    """Training can't go on: the loss is not finite."""


class DeviceError(CrnnError):
    """The GPU can't be used: no CuPy, no device, a device too old or without enough memory."""
