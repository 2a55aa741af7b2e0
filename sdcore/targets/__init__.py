"""What the student is taught where the teacher is tilted by a reward."""

from .tilt import LogZ, Tilted, TiltOutput, TokenTilt

__all__ = ["LogZ", "TiltOutput", "Tilted", "TokenTilt"]
