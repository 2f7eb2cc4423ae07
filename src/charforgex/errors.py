"""What can go wrong, for the person at the keyboard. A caller may catch at any level.

CharForgeError
├── ConfigError        a setting is unknown, missing, out of range or has no effect here
├── DataError          pictures, captions or a manifest are unusable
├── ModelError         a base model cannot be found, recognised or loaded
├── LoraError          an adapter file has keys left over, fits no layer, is empty or not finite
├── CheckpointError    no checkpoint of the run is whole
├── TrainingError      training had to stop: not finite, out of memory
└── LaunchError        a job elsewhere could not be started, was cancelled or failed there

All are `ValueError`s: the input is at fault. Our own mistakes are `assert`s.
"""


class CharForgeError(ValueError):
    """Base of every error that a user can mend. The message says the value, why, and the way out."""


class ConfigError(CharForgeError):
    pass


class DataError(CharForgeError):
    pass


class ModelError(CharForgeError):
    pass


class LoraError(CharForgeError):
    pass


class CheckpointError(CharForgeError):
    pass


class TrainingError(CharForgeError):
    pass


class LaunchError(CharForgeError):
    pass
