"""ClickHouse's exceptions, as this endpoint meets and raises them."""

from __future__ import annotations

import re
from typing import Final

from schemas.errors import FanfareError

# ClickHouse's error codes that this endpoint raises itself (src/Common/ErrorCodes.cpp).
BAD_ARGUMENTS: Final = 36
NOT_IMPLEMENTED: Final = 48
SYNTAX_ERROR: Final = 62
UNKNOWN_SETTING: Final = 115
INCORRECT_DATA: Final = 117
READONLY: Final = 164
QUERY_IS_TOO_LARGE: Final = 229
SESSION_NOT_FOUND: Final = 372
SESSION_IS_LOCKED: Final = 373
INVALID_SESSION_TIMEOUT: Final = 374
AUTHENTICATION_FAILED: Final = 516
UNKNOWN_EXCEPTION: Final = 1002

ERROR_NAMES: Final = {
    BAD_ARGUMENTS: "BAD_ARGUMENTS",
    NOT_IMPLEMENTED: "NOT_IMPLEMENTED",
    SYNTAX_ERROR: "SYNTAX_ERROR",
    UNKNOWN_SETTING: "UNKNOWN_SETTING",
    INCORRECT_DATA: "INCORRECT_DATA",
    READONLY: "READONLY",
    QUERY_IS_TOO_LARGE: "QUERY_IS_TOO_LARGE",
    SESSION_NOT_FOUND: "SESSION_NOT_FOUND",
    SESSION_IS_LOCKED: "SESSION_IS_LOCKED",
    INVALID_SESSION_TIMEOUT: "INVALID_SESSION_TIMEOUT",
    AUTHENTICATION_FAILED: "AUTHENTICATION_FAILED",
    UNKNOWN_EXCEPTION: "UNKNOWN_EXCEPTION",
}
_CODE: Final = re.compile(r"Code: (\d+)\.")


class QueryFailed(FanfareError):
    """A request that ClickHouse's protocol answers with an exception.

    ``code`` is ClickHouse's number; the message is ``Code: N. DB::Exception: …``, as on the wire.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, code: int, text: str) -> QueryFailed:
        """Build one of this endpoint's own refusals."""
        return cls(code, f"Code: {code}. DB::Exception: {text} ({ERROR_NAMES[code]})")

    @classmethod
    def from_engine(cls, error: Exception) -> QueryFailed:
        """Translate what chDB raised; text before ``Code:`` is chDB's own and is cut."""
        text = str(error).strip()
        match = _CODE.search(text)
        if match is None:
            return cls.of(UNKNOWN_EXCEPTION, text or type(error).__name__)
        return cls(int(match.group(1)), text[match.start() :])
