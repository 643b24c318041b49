"""What FlashCore raises. A call that raises has written nothing."""


class FlashCoreError(RuntimeError):
    """The base of all of them."""


class InvalidArgumentError(FlashCoreError, ValueError):
    """An argument breaks the contract of the operation; the message says what was given and what is accepted."""


class UnsupportedError(FlashCoreError, NotImplementedError):
    """A valid request that no kernel answers; the message has each candidate with the reason, and a way out."""


class DriverError(FlashCoreError):
    """A call of the CUDA driver failed."""


class DriverNotFoundError(DriverError):
    """The CUDA driver is not installed or cannot be loaded."""


class DriverTooOldError(DriverError):
    """The CUDA driver lacks a function that is needed."""


class ContextLostError(DriverError):
    """The device hit an error from which only a new process recovers."""


class DeviceNotFoundError(FlashCoreError):
    """There is no CUDA device with this ordinal."""


class BundleError(FlashCoreError):
    """A bundle of kernels is corrupt, truncated, or for another architecture."""


class BundleNotFoundError(BundleError):
    """No bundle has kernels for the device."""


class OutOfMemoryError(FlashCoreError, MemoryError):
    """Device memory is exhausted."""
