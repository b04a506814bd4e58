"""Secrets as settings take them: checked where they are read, and not shown."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, SecretStr

from schemas.errors import InvalidInput
from transforms.unsubscribe import require_long


def _long_or_empty(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value():
        try:
            require_long(secret.get_secret_value().encode())
        except InvalidInput as error:
            raise ValueError(str(error)) from error
    return secret


UnsubscribeSecret = Annotated[SecretStr, AfterValidator(_long_or_empty)]
"""What unsubscribe links are signed with; empty: there are none."""
