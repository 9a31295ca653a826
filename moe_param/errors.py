"""What every error of this package derives from."""


class MoeParamError(ValueError):
    """Something that cannot be done as asked; the message names it, says what was expected and what to do."""


class InputError(MoeParamError):
    """Something the user gave to a command cannot be used."""
