"""What npu_fuse raises. Every message ends with what to do next.

No error here stops a model that would run without npu_fuse, unless the user asked for that:
`OptionError` and `TargetError` answer the options given, `StrictError` answers `strict=True`,
`ShadowMismatch` answers `prove="shadow"` with `shadow_action="raise"`. `RanksDisagree` stands for a wait without
end. A fault while recognising,
proving or lowering one site leaves that site as it was and goes into the report.
"""

from __future__ import annotations


class NpuFuseError(Exception):
    """Base of all errors of npu_fuse.

    `remedy` says what to do next; it is the last line of the message, so that it is still read inside
    torch's own wrapper exceptions, which keep the text only.
    """

    remedy: str = ""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\nWhat to do: {self.remedy}" if self.remedy else message


class OptionError(NpuFuseError, ValueError):
    """An option is unknown, has a value that is not allowed, or contradicts another option.

    `key` is the option's name, or "" when the options as a whole are wrong.
    """

    key: str = ""

    def __init__(self, message: str, *, key: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.key = key


class TargetError(NpuFuseError):
    """The target that was asked for cannot be used on this machine."""


class ProofError(NpuFuseError):
    """A proof could not be carried out.

    Caught by the engine: the site is left as it was, with status `error`. A proof that runs and fails
    is no error but a refusal (status `refused_by_proof`).
    """


class StrictError(NpuFuseError):
    """`strict=True` and at least one candidate site was left unfused."""


class ShadowMismatch(NpuFuseError):
    """`prove="shadow"`: the rewritten graph and the original gave different results on the user's data.

    `dump` is the file with the inputs that show it, or None when no `shadow_dump` folder was given.
    """

    dump: str | None = None

    def __init__(self, message: str, *, dump: str | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.dump = dump


class RanksDisagree(NpuFuseError):
    """A rank compiles alone on NPUs, and no form of a collective goes with the kernels that the other ranks run.

    Raised in place of ranks that wait for each other until their group's timeout.
    """


class CaptureError(NpuFuseError):
    """Dynamo could not capture the model that `explain` was given; its own message is included."""
