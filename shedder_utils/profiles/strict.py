"""What all settings have in common: they are checked, they do not change, and an unknown key is refused."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Settings read from YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_known_keys(cls, values: Any) -> Any:
        """Refuse an unknown key with the known ones beside it, which pydantic's own message lacks."""
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}, expected one of {', '.join(cls.model_fields)}")
        return values
